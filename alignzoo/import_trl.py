"""A configuration of TRL's command line (`trl dpo --config FILE`) as a recipe. Read from TRL 1.16.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignzoo.errors import RecipeError
from alignzoo.importing import TRAINING, Import, lora, read_yaml, rest, training

TRAINERS = ("sft", "dpo", "kto")
DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {
        **TRAINING,
        "learning_rate": 2e-5,
        "max_length": 1024,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
    },
    "dpo": {
        **TRAINING,
        "learning_rate": 1e-6,
        "max_length": 1024,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
    },
    "kto": {
        **TRAINING,
        "learning_rate": 1e-6,
        "max_length": 1024,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
    },
}
LORA = {
    "rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save", "dora": "use_dora", "rslora": "use_rslora",
}  # fmt: skip
LOSSES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {  # loss_type: our loss and its settings
    "sft": {"nll": ("sft", {}), "dft": ("dft", {})},
    "kto": {"kto": ("kto", {}), "apo_zero_unpaired": ("kto", {"baseline": "none"})},
    "dpo": {
        "sigmoid": ("dpo", {}), "sigmoid_norm": ("dpo", {"length_normalised": True}), "ipo": ("ipo", {}),
        "hinge": ("hinge", {}), "robust": ("robust", {}), "exo_pair": ("exo", {}), "nca_pair": ("nca", {}),
        "discopop": ("discopop", {}), "sppo_hard": ("sppo", {}),
        "apo_zero": ("apo", {"variant": "zero"}), "apo_down": ("apo", {"variant": "down"}),
        "aot": ("aot", {"variant": "paired"}), "aot_unpaired": ("aot", {"variant": "unpaired"}),
        "bco_pair": ("bco", {"shift": "none"}),
    },
}  # fmt: skip


def convert(path: Path, trainer: str, world: int = 1) -> Import:
    """What the file says in our words. trainer: that of the command. Raises RecipeError for what alignzoo has not."""
    one = Import(read_yaml(path), path, DEFAULTS[trainer])
    _loss(one, trainer)
    if not one.has("model_name_or_path"):
        raise RecipeError(f"{path}: no model_name_or_path")
    one.put("model_name_or_path", "model.path", str(one.get("model_name_or_path")))
    for key, ours in (("dtype", "model.dtype"), ("attn_implementation", "model.attention")):
        if one.has(key):
            one.put(key, ours, str(one.get(key)))
    if one.values.pop("use_peft", False):
        one.told("use_peft", "mapped", "[model.lora]")
        lora(one, LORA)
    for key, value in (("load_in_4bit", "4bit"), ("load_in_8bit", "8bit")):
        if one.has(key):
            one.put(key, "model.quantization", value) if one.get(key) else one.told(key, "not needed", "off")
    _data(one)
    training(one, world)
    on = one.values.get("gradient_checkpointing", True)
    one.put("gradient_checkpointing", "engine.gradient_checkpointing", bool(on))
    rest(one)
    return one


def _loss(one: Import, trainer: str) -> None:
    kinds = one.get("loss_type") or next(iter(LOSSES[trainer]))
    listed = [kinds] if isinstance(kinds, str) else list(kinds)
    unknown = [kind for kind in listed if kind not in LOSSES[trainer] and not (trainer == "dpo" and kind == "sft")]
    if unknown:
        raise RecipeError(
            f"{one.source}: loss_type {', '.join(map(str, unknown))} has no counterpart",
            why="there are " + ", ".join(LOSSES[trainer]),
        )
    weights = [float(weight) for weight in one.get("loss_weights") or [1.0] * len(listed)]
    tables = []
    for kind, weight in zip(listed, weights, strict=True):
        name, settings = ("sft", {}) if kind == "sft" else LOSSES[trainer][kind]
        tables.append({"name": name, **({"weight": weight} if len(listed) > 1 else {}), **settings})
    one.table["loss"] = tables if len(tables) > 1 else tables[0]
    one.told("loss_type", "mapped", " + ".join(f'loss "{table["name"]}"' for table in tables))
    if one.has("loss_weights"):
        one.told("loss_weights", "mapped", "weight of each [[loss]]")
    for key in ("beta", "label_smoothing", "desirable_weight", "undesirable_weight"):
        if one.has(key):
            _setting(one, key, tables)


def _setting(one: Import, key: str, tables: list[dict[str, Any]]) -> None:
    """One of the settings that the losses share."""
    value, told = one.number(key), []
    for table in tables:
        ours = "tau" if (table["name"], key) == ("ipo", "beta") else key
        takes = {"beta": table["name"] not in ("sft", "dft"), "label_smoothing": table["name"] == "dpo"}
        if takes.get(key, table["name"] == "kto"):
            table[ours] = value
            told.append(f"{table['name']}: {ours} = {value:g}")
    one.told(key, "mapped" if told else "refused", "; ".join(told) or "no loss of these reads it")


def _data(one: Import) -> None:
    if not one.has("dataset_name"):
        raise RecipeError(f"{one.source}: no dataset_name")
    split = str(one.get("dataset_train_split") or "train")
    one.put("dataset_name", "data.train", [{"path": str(one.get("dataset_name")), "split": split}])
    if one.has("dataset_train_split"):
        one.told("dataset_train_split", "mapped", f'split = "{split}"')
    if one.has("dataset_test_split"):
        test = {**one.table["data"]["train"][0], "split": str(one.get("dataset_test_split"))}
        one.put("dataset_test_split", "data.eval", [test])
    one.put("max_length", "data.max_length", int(one.number("max_length")))
    words = "of a row whose prompt alone is too long nothing is left: it is dropped and counted, as there"
    one.put("truncation_mode", "data.truncation", "completion_right", words, "mapped")
