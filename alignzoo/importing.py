"""`alignzoo import`: a LLaMA-Factory or TRL configuration as a recipe, and what became of each of its keys.

Nothing is passed over: every key is mapped, approximated (the words say how it differs) or refused. Defaults of theirs
that differ from ours are written out where a result depends on them. Read from LLaMA-Factory 0.9.5 and TRL 1.16.0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w
import yaml

from alignzoo.errors import AlignzooError, RecipeError

Verdict = Literal["mapped", "approximated", "refused", "not needed"]
Values = dict[str, Any]


@dataclass(frozen=True)
class Fate:
    """What became of one key."""

    key: str
    verdict: Verdict
    words: str  # our key and value, or why there is none


@dataclass
class Import:
    """A configuration while it is read: keys are taken out one by one."""

    values: Values
    source: Path
    defaults: Mapping[str, Any]
    table: Values = field(default_factory=dict)
    fates: list[Fate] = field(default_factory=list)

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str) -> Any:
        """Theirs, or their default."""
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def put(self, key: str, ours: str, value: Any, words: str = "", verdict: Verdict | None = None) -> None:
        """Writes one of our keys, for one of theirs."""
        place = self.table
        *sections, name = ours.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
        shown = f"{ours} = {json.dumps(value)}"
        self.told(key, verdict or ("approximated" if words else "mapped"), f"{shown}: {words}" if words else shown)

    def told(self, key: str, verdict: Verdict, words: str) -> None:
        default = "" if self.has(key) else " (their default)"
        self.fates.append(Fate(key + default, verdict, words))
        self.values.pop(key, None)

    def number(self, key: str) -> float:
        """YAML reads 5e-6 as text."""
        try:
            return float(self.get(key))
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{self.source}: {key} = {self.get(key)!r} is no number") from error


TRAINING = {  # of transformers' TrainingArguments, where ours differ
    "learning_rate": 5e-5, "num_train_epochs": 3.0, "lr_scheduler_type": "linear", "warmup_ratio": 0.0,
    "warmup_steps": 0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
}  # fmt: skip
SAME: dict[str, tuple[str, Callable[[Any], Any]]] = {  # the same in both, where it is given
    "weight_decay": ("train.weight_decay", float), "adam_epsilon": ("train.adam_epsilon", float),
    "max_grad_norm": ("train.max_grad_norm", float), "seed": ("train.seed", int), "optim": ("train.optimizer", str),
    "eval_steps": ("eval.every_steps", int), "eval_on_start": ("eval.at_start", bool),
    "save_steps": ("checkpoint.every_steps", int), "save_total_limit": ("checkpoint.keep", int),
    "logging_steps": ("log.every_steps", int), "run_name": ("log.run_name", str), "output_dir": ("output.dir", str),
    "trust_remote_code": ("model.trust_remote_code", bool), "model_revision": ("model.revision", str),
}  # fmt: skip
NOT_NEEDED = {
    "do_train": "a run trains", "do_eval": "held-out rows are evaluated where there are some",
    "overwrite_cache": "prepared data is found by its content", "overwrite_output_dir": "no run is ever overwritten",
    "preprocessing_num_workers": "as many processes as there are cores", "dataloader_num_workers": "none are needed",
    "plot_loss": "the plot is always made", "ddp_timeout": "engine.hang_timeout is there", "dataset_dir": "read",
    "eval_strategy": "by eval.every_steps", "save_strategy": "by checkpoint.every_steps",
    "save_only_model": "a checkpoint holds all that a run needs", "per_device_eval_batch_size": "the training's",
    "remove_unused_columns": "columns that nothing reads are told", "ddp_find_unused_parameters": "by the model",
    "logging_strategy": "by log.every_steps", "resume_from_checkpoint": "is --resume",
    "include_num_input_tokens_seen": "num_tokens is always logged", "packing": "rows have no padding: engine.packing",
    "padding_free": "rows have no padding: engine.packing", "precompute_ref_log_probs": "the cache does it",
    "use_liger_kernel": "the head never makes all logits", "bf16_full_eval": "as in training",
    "dataset_num_proc": "as many processes as there are cores",
}  # fmt: skip


def read_yaml(path: Path) -> Values:
    """Raises RecipeError where it is no table."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read", why=str(error)) from error
    if not isinstance(found, dict):
        raise RecipeError(f"{path}: holds no keys", fix="name a YAML file of keys and values")
    return {str(key): value for key, value in found.items()}


# --- what both have --------------------------------------------------------------------------------------------------


def training(one: Import, world: int) -> None:
    """The keys of transformers' TrainingArguments. world: the processes that they were meant for."""
    per_device, accumulated = (
        int(one.number("per_device_train_batch_size")),
        int(one.number("gradient_accumulation_steps")),
    )
    words = f"{per_device} per device x {accumulated} accumulated x {world} processes"
    one.put("per_device_train_batch_size", "train.batch_size", per_device * accumulated * world, words, "mapped")
    one.told("gradient_accumulation_steps", "mapped", "part of train.batch_size")
    one.put("learning_rate", "train.learning_rate", one.number("learning_rate"))
    epochs = one.number("num_train_epochs")
    whole = math.ceil(epochs)
    one.put("num_train_epochs", "train.epochs", whole, "" if whole == epochs else f"{epochs:g}, rounded up")
    if one.has("max_steps"):
        steps = int(one.number("max_steps"))
        one.put("max_steps", "train.max_steps", steps) if steps > 0 else one.told("max_steps", "not needed", "no limit")
    one.put("lr_scheduler_type", "train.lr_scheduler", str(one.get("lr_scheduler_type")))
    warmup = one.number("warmup_steps")
    if warmup >= 1:
        one.put("warmup_steps", "train.warmup_steps", int(warmup))
        one.told("warmup_ratio", "not needed", "warmup_steps beats it")
    else:
        one.put("warmup_ratio", "train.warmup_ratio", max(warmup, one.number("warmup_ratio")))
        one.told("warmup_steps", "mapped", "part of train.warmup_ratio")
    if one.has("adam_beta1") or one.has("adam_beta2"):
        betas = [float(one.get("adam_beta1") or 0.9), float(one.get("adam_beta2") or 0.999)]
        one.put("adam_beta1", "train.adam_betas", betas)
        one.told("adam_beta2", "mapped", "part of train.adam_betas")
    for key, (ours, read) in SAME.items():
        if one.has(key):
            one.put(key, ours, read(one.get(key)))
    _precision(one)
    if one.has("report_to"):
        trackers = one.get("report_to")
        listed = [trackers] if isinstance(trackers, str) else list(trackers)
        one.put("report_to", "log.trackers", [name for name in listed if name not in ("none", "all")])
    if one.has("deepspeed"):
        one.put("deepspeed", "engine.config", str(one.get("deepspeed")), "set engine.zero to its stage")


def _precision(one: Import) -> None:
    for key, name in (("bf16", "bf16"), ("fp16", "fp16")):
        if one.has(key):
            on = bool(one.get(key))
            one.put(key, "engine.precision", name) if on else one.told(key, "not needed", "engine.precision = auto")


def rest(one: Import) -> None:
    """What no other function has taken."""
    for key in list(one.values):
        if key in NOT_NEEDED:
            one.told(key, "not needed", NOT_NEEDED[key])
        elif one.has(key):
            one.told(key, "refused", f"{json.dumps(one.values[key], default=str)}: has no counterpart")
        else:
            one.told(key, "not needed", "empty")


def lora(one: Import, names: Mapping[str, str]) -> None:
    """The adapter. names: their keys by ours."""
    table: dict[str, Any] = {"rank": int(one.number(names["rank"]))}
    one.table.setdefault("model", {})["lora"] = table
    one.told(names["rank"], "mapped", f"model.lora.rank = {table['rank']}")
    for ours, read in (("alpha", float), ("dropout", float), ("dora", bool), ("rslora", bool)):
        if one.get(names[ours]) is not None:
            one.put(names[ours], f"model.lora.{ours}", read(one.get(names[ours])))
    target = one.get(names["target"])
    if target is not None:
        listed = target.split(",") if isinstance(target, str) else list(target)
        every = listed in (["all"], ["all-linear"])
        one.put(names["target"], "model.lora.target", "all-linear" if every else [str(t).strip() for t in listed])
    saved = one.get(names["modules_to_save"])
    if saved is not None:
        listed = saved.split(",") if isinstance(saved, str) else list(saved)
        one.put(names["modules_to_save"], "model.lora.modules_to_save", [str(t).strip() for t in listed])


# --- the recipe ------------------------------------------------------------------------------------------------------


def write(one: Import, out: Path, say: Callable[[str], None]) -> None:
    """The recipe, with what is not the same in comments at its top; every key told. Raises AlignzooError."""
    if out.exists():
        raise AlignzooError(f"{out} is there already", fix="give another name with --out")
    odd = [fate for fate in one.fates if fate.verdict in ("approximated", "refused")]
    head = [f"# Made of {one.source.name} by alignzoo import. What is not the same:" if odd else
            f"# Made of {one.source.name} by alignzoo import."]  # fmt: skip
    head += [f"# {fate.verdict}: {fate.key}: {fate.words}" for fate in odd]
    out.write_text("\n".join(head) + "\n\n" + tomli_w.dumps(one.table), encoding="utf-8")
    width = max(len(fate.key) for fate in one.fates)
    for fate in one.fates:
        say(f"{fate.verdict:12}  {fate.key:{width}}  {fate.words}")
    counts = [f"{sum(fate.verdict == v for fate in one.fates)} {v}" for v in ("mapped", "approximated", "refused")]
    say(f"{', '.join(counts)}: {out}; try it with `alignzoo check {out}`")
