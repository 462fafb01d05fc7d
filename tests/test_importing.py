"""LLaMA-Factory's and TRL's configurations as recipes: every key told, the recipe loads, its loss is there."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from conftest import REPO

from alignzoo.check import find_loss
from alignzoo.cli import cli
from alignzoo.plugins import discover
from alignzoo.recipe import load_recipe

SHARED = REPO.parent / "shared/data/llamafactory"
DPO: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-7B-Instruct", "stage": "dpo", "do_train": True, "finetuning_type": "lora",
    "lora_rank": 64, "lora_target": "all", "pref_beta": 0.1, "pref_loss": "sigmoid", "dataset": "pairs",
    "template": "qwen", "cutoff_len": 2048, "max_samples": 1000, "overwrite_cache": True, "output_dir": "saves/dpo",
    "logging_steps": 10, "save_steps": 500, "plot_loss": True, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16, "learning_rate": "5.0e-6", "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True, "val_size": 0.1, "neat_packing": True,
}  # fmt: skip


def imported(
    folder: Path, kind: str, values: dict[str, Any], *words: str
) -> tuple[dict[str, Any], dict[str, str], str]:
    """The table, the verdict of each key, and all that was said."""
    file, out = folder / "theirs.yaml", folder / "ours.toml"
    file.write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(cli, ["import", kind, str(file), "--out", str(out), *words])
    assert result.exit_code == 0, result.output
    verdicts = {}
    for line in result.output.splitlines()[:-1]:
        verdict, rest = line[:12].strip(), line[14:]
        verdicts[rest.split()[0]] = verdict
    return tomllib.loads(out.read_text()), verdicts, out.read_text()


@pytest.mark.parametrize(
    ("kind", "loss"), [("sigmoid", ("dpo", "beta")), ("hinge", ("hinge", "beta")), ("ipo", ("ipo", "tau"))]
)
def test_llamafactory_dpo(kind: str, loss: tuple[str, str], tmp_path: Path) -> None:
    table, verdicts, text = imported(tmp_path, "llamafactory", {**DPO, "pref_loss": kind}, "--world", "4")
    assert table["loss"] == {"name": loss[0], loss[1]: 0.1}
    assert table["model"] == {"path": "Qwen/Qwen2.5-7B-Instruct", "lora": {"rank": 64, "target": "all-linear"}}
    train = table["train"]
    assert (train["batch_size"], train["learning_rate"], train["epochs"]) == (64, 5e-6, 3)
    assert (train["lr_scheduler"], train["warmup_ratio"]) == ("cosine", 0.1)
    assert table["data"]["train"] == [{"path": "pairs", "limit": 1000}] and table["data"]["max_length"] == 2048
    assert table["engine"] == {"precision": "bf16", "gradient_checkpointing": True}
    assert verdicts.keys() >= DPO.keys()
    assert verdicts["neat_packing"] == "refused" and "refused: neat_packing" in text
    assert verdicts["template"] == "approximated" and verdicts["do_train"] == "not needed"
    assert {k for k, v in verdicts.items() if v == "refused"} == {"neat_packing"}
    recipe = load_recipe(tmp_path / "ours.toml")
    assert find_loss(recipe, discover())[1].name == loss[0]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not there")
def test_its_data_sets_are_found_and_read(tiny_folder: Path, tmp_path: Path) -> None:
    info = {
        "demo": {"file_name": str(SHARED / "dpo_en_demo.json"), "ranking": True, "formatting": "sharegpt",
                 "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}},
    }  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    values = {**DPO, "model_name_or_path": str(tiny_folder), "dataset": "demo", "cutoff_len": 4096}
    table, _, _ = imported(tmp_path, "llamafactory", values, "--dataset-info", str(tmp_path / "dataset_info.json"))
    assert table["data"]["train"] == [{"path": str((SHARED / "dpo_en_demo.json").resolve()), "limit": 1000}]
    result = CliRunner().invoke(cli, ["check", str(tmp_path / "ours.toml"), "--set", "engine.precision=fp32"])
    assert result.exit_code == 0 and "rows of format sharegpt_pairs" in result.output, result.output


def test_defaults_of_theirs_are_written_out(tmp_path: Path) -> None:
    table, verdicts, _ = imported(tmp_path, "llamafactory", {"model_name_or_path": "m", "dataset": "d"})
    assert table["loss"] == {"name": "sft"} and table["model"]["lora"]["rank"] == 8
    train = table["train"]
    assert (train["learning_rate"], train["epochs"], train["batch_size"]) == (5e-5, 3, 8)
    assert (train["lr_scheduler"], train["warmup_ratio"]) == ("linear", 0.0)
    assert table["data"]["max_length"] == 2048 and verdicts["learning_rate"] == "mapped"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stage": "ppo"}, 'stage = "ppo" has no counterpart'), ({"pref_loss": "kto_pair"}, "there are sigmoid, ipo"),
        ({"finetuning_type": "freeze"}, "there are lora and full"), ({"dataset": None}, "no dataset"),
        ({"learning_rate": "fast"}, "is no number"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_told(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({**DPO, **values}))
    result = CliRunner().invoke(
        cli, ["import", "llamafactory", str(tmp_path / "theirs.yaml"), "--out", str(tmp_path / "o")]
    )
    assert result.exit_code == 2 and words in result.output and not (tmp_path / "o").exists()


def test_trl_with_two_losses(tmp_path: Path) -> None:
    values = {
        "model_name_or_path": "m", "dataset_name": "d", "dataset_test_split": "test", "loss_type": ["ipo", "sft"],
        "loss_weights": [0.8, 0.5], "beta": 0.05, "use_peft": True, "lora_target_modules": ["q_proj"], "max_steps": -1,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "warmup_steps": 0.05, "fsdp": "full_shard",
    }  # fmt: skip
    table, verdicts, _ = imported(tmp_path, "trl", values, "--trainer", "dpo")
    assert table["loss"] == [{"name": "ipo", "weight": 0.8, "tau": 0.05}, {"name": "sft", "weight": 0.5}]
    assert table["model"]["lora"] == {"rank": 16, "alpha": 32.0, "dropout": 0.05, "target": ["q_proj"]}
    assert table["train"]["learning_rate"] == 1e-6 and table["train"]["batch_size"] == 8
    assert table["train"]["warmup_ratio"] == 0.05 and "max_steps" not in table["train"]
    assert table["data"]["eval"] == [{"path": "d", "split": "test"}]
    assert verdicts["fsdp"] == "refused" and verdicts.keys() >= values.keys()
    loss = find_loss(load_recipe(tmp_path / "ours.toml"), discover())[1]
    assert loss.name == "ipo+sft"


@pytest.mark.parametrize(
    ("kind", "settings"), [("apo_down", {"variant": "down"}), ("sigmoid_norm", {"length_normalised": True})]
)
def test_trl_losses_by_their_names(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    values = {"model_name_or_path": "m", "dataset_name": "d", "loss_type": kind, "beta": 0.3}
    table, _, _ = imported(tmp_path, "trl", values, "--trainer", "dpo")
    assert {k: table["loss"][k] for k in (*settings, "beta")} == {**settings, "beta": 0.3}
    find_loss(load_recipe(tmp_path / "ours.toml"), discover())


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(DPO))
    (tmp_path / "mine.toml").write_text("precious")
    command = ["import", "llamafactory", str(tmp_path / "theirs.yaml"), "--out", str(tmp_path / "mine.toml")]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 2 and (tmp_path / "mine.toml").read_text() == "precious"
