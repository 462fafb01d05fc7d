"""A LLaMA-Factory YAML file as a recipe. Read from LLaMA-Factory 0.9.5."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignzoo.errors import RecipeError
from alignzoo.importing import TRAINING, Import, lora, read_yaml, rest, training

DEFAULTS = {
    **TRAINING, "stage": "sft", "pref_loss": "sigmoid", "pref_beta": 0.1, "pref_ftx": 0.0, "simpo_gamma": 0.5,
    "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "cutoff_len": 2048, "dataset_dir": "data",
    "val_size": 0.0,
}  # fmt: skip
LORA = {
    "rank": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout", "target": "lora_target",
    "modules_to_save": "additional_target", "dora": "use_dora", "rslora": "use_rslora",
}  # fmt: skip
PREFERENCES = {  # pref_loss: our loss, and what pref_beta is in it
    "sigmoid": ("dpo", "beta"), "ipo": ("ipo", "tau"), "hinge": ("hinge", "beta"), "orpo": ("orpo", "lambda_"),
    "simpo": ("simpo", "beta"),
}  # fmt: skip
ATTENTION = {"auto": "auto", "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}


def convert(path: Path, dataset_info: Path | None = None, world: int = 1) -> Import:
    """What the file says in our words. dataset_info: dataset_info.json, in dataset_dir if not given.

    Raises RecipeError for a stage, a loss or a kind of training that alignzoo has not.
    """
    one = Import(read_yaml(path), path, DEFAULTS)
    _loss(one)
    _model(one)
    _data(one, dataset_info or path.parent / str(one.get("dataset_dir")) / "dataset_info.json")
    training(one, world)
    if one.values.pop("disable_gradient_checkpointing", False):
        one.put("disable_gradient_checkpointing", "engine.gradient_checkpointing", False)
    else:
        one.put("disable_gradient_checkpointing", "engine.gradient_checkpointing", True)
    rest(one)
    return one


def _loss(one: Import) -> None:
    stage = str(one.get("stage"))
    if stage in ("sft", "pt"):
        one.put("stage", "loss.name", "sft", "on data with a column of text" if stage == "pt" else "")
    elif stage == "kto":
        one.put("stage", "loss.name", "kto")
        one.put("pref_beta", "loss.beta", one.number("pref_beta"))
        for theirs, ours in (("kto_chosen_weight", "desirable_weight"), ("kto_rejected_weight", "undesirable_weight")):
            if one.has(theirs):
                one.put(theirs, f"loss.{ours}", one.number(theirs))
    elif stage == "dpo":
        _preference(one)
    else:
        raise RecipeError(f'{one.source}: stage = "{stage}" has no counterpart', why="there are sft, pt, dpo and kto")


def _preference(one: Import) -> None:
    kind = str(one.get("pref_loss"))
    if kind not in PREFERENCES:
        raise RecipeError(
            f'{one.source}: pref_loss = "{kind}" has no counterpart', why="there are " + ", ".join(PREFERENCES)
        )
    name, beta = PREFERENCES[kind]
    mixed = one.number("pref_ftx") > 0
    if mixed and kind != "sigmoid":
        one.told("pref_ftx", "refused", "a loss of its own beside this one: write two [[loss]], with sft as the second")
        mixed = False
    one.put("stage", "loss.name", "rpo" if mixed else name)
    one.told("pref_loss", "mapped", f'the loss "{kind}"')
    one.put("pref_beta", f"loss.{beta}", one.number("pref_beta"))
    if mixed:
        one.put("pref_ftx", "loss.nll_weight", one.number("pref_ftx"))
    if kind == "simpo":
        one.put("simpo_gamma", "loss.gamma", one.number("simpo_gamma"))
    if one.has("dpo_label_smoothing"):
        if name == "dpo" and not mixed:
            one.put("dpo_label_smoothing", "loss.label_smoothing", one.number("dpo_label_smoothing"))
        else:
            one.told("dpo_label_smoothing", "not needed", "the loss does not read it")


def _model(one: Import) -> None:
    if not one.has("model_name_or_path"):
        raise RecipeError(f"{one.source}: no model_name_or_path")
    one.put("model_name_or_path", "model.path", str(one.get("model_name_or_path")))
    if one.has("adapter_name_or_path"):
        one.put(
            "adapter_name_or_path", "model.path", str(one.get("adapter_name_or_path")), "merged into its base first"
        )
    kind = str(one.get("finetuning_type"))
    if kind not in ("lora", "full"):
        raise RecipeError(f'{one.source}: finetuning_type = "{kind}" has no counterpart', why="there are lora and full")
    one.told("finetuning_type", "mapped", "[model.lora]" if kind == "lora" else "all weights train")
    if kind == "lora":
        lora(one, LORA)
    if one.has("quantization_bit"):
        one.put("quantization_bit", "model.quantization", f"{one.get('quantization_bit')}bit")
    if one.has("flash_attn"):
        value = str(one.get("flash_attn")).lower()
        if value in ATTENTION:
            one.put("flash_attn", "model.attention", ATTENTION[value])
    if one.has("ref_model"):
        one.put("ref_model", "reference.path", str(one.get("ref_model")))
    if one.has("moe_aux_loss_coef"):
        one.put("moe_aux_loss_coef", "model.router_loss", one.number("moe_aux_loss_coef"))


def _data(one: Import, info: Path) -> None:
    if not one.has("dataset"):
        raise RecipeError(f"{one.source}: no dataset")
    entries = _entries(info)
    for theirs, ours in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        if one.has(theirs):
            value = one.get(theirs)
            names = value.split(",") if isinstance(value, str) else list(value)
            found = [_source(str(name).strip(), entries, info, one) for name in names]
            missing = [name for name in names if str(name).strip() not in entries]
            words = f"{', '.join(missing)} is not in {info}: put the path in" if missing else ""
            one.put(theirs, ours, found, words)
    if one.has("max_samples"):
        one.told("max_samples", "mapped", "limit of each source")
    share = one.number("val_size")
    if share >= 1:
        one.told("val_size", "refused", f"{share:g} rows: data.eval_fraction is a share of them")
    elif share > 0:
        one.put("val_size", "data.eval_fraction", share, "held out by prompt and by content, not at random")
    one.put("cutoff_len", "data.max_length", int(one.number("cutoff_len")), "what is longer is dropped and counted")
    if one.has("template"):
        words = (
            f"the tokenizer's own template, not their {one.get('template')}: see the row that `alignzoo check` shows"
        )
        one.put("template", "data.chat_template", "auto", words)
    if one.has("default_system"):
        one.put("default_system", "data.system", str(one.get("default_system")))
    if one.has("mask_history"):
        one.put("mask_history", "data.train_on", "last" if one.get("mask_history") else "every")


def _entries(info: Path) -> Mapping[str, Any]:
    if not info.is_file():
        return {}
    try:
        found = json.loads(info.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{info}: cannot be read", why=str(error)) from error
    return found if isinstance(found, dict) else {}


def _source(name: str, entries: Mapping[str, Any], info: Path, one: Import) -> dict[str, Any]:
    """A table of [[data.train]] for the name of a data set."""
    entry = entries.get(name, {})
    table: dict[str, Any] = {"path": name}
    if "file_name" in entry:
        table["path"] = str((info.parent / entry["file_name"]).resolve())
    elif "hf_hub_url" in entry:
        table["path"] = entry["hf_hub_url"]
    if "split" in entry:
        table["split"] = entry["split"]
    columns = {_OURS.get(ours, ours): theirs for ours, theirs in entry.get("columns", {}).items()}
    columns = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    if columns:
        table["columns"] = columns
    limit = one.get("max_samples") or entry.get("num_samples")
    if limit:
        table["limit"] = int(limit)
    return table


_OURS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "kto_tag": "label",
    "messages": "conversations",
}
