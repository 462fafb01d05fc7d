"""Three steps of ours against TRL's trainers on the same model, rows, order and optimizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, tiny_llama
from datasets import Dataset

import alignzoo
from alignzoo.batch import steps_of
from alignzoo.recipe import load_recipe

STEPS, BATCH, SEED = 3, 4, 7


def rows(n: int = 14) -> list[dict[str, str]]:
    lines = (REPO / "recipes/data/shop_train.jsonl").read_text(encoding="utf-8").splitlines()[:n]
    return [{k: v for k, v in json.loads(line).items() if k in ("prompt", "chosen", "rejected")} for line in lines]


def ours(
    loss: dict[str, Any], model: Any, tokenizer: Any, data: list[dict[str, str]], folder: Path, **train: Any
) -> Any:
    recipe = load_recipe(
        {
            "loss": loss,
            "model": {"path": "given"},
            "data": {"train": "given", "chat_template": "none"},
            "train": {"learning_rate": 1e-3, "batch_size": BATCH, "max_steps": STEPS, "lr_scheduler": "linear",
                      "warmup_ratio": 0.0, "max_grad_norm": 1.0, "seed": SEED, **train},
            "engine": {"device": "cpu", "tokens_per_device": 300},
            "output": {"dir": str(folder)},
        }
    )  # fmt: skip
    result = alignzoo.run(recipe, model=model, tokenizer=tokenizer, train=data)
    return [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]


def in_our_order(data: list[dict[str, str]]) -> list[dict[str, str]]:
    order = [row for step in steps_of(len(data), BATCH, 1, STEPS, SEED) for row in step.rows]
    return [data[i] for i in order]


def their_options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2,
        "max_steps": STEPS, "learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_steps": 0, "logging_steps": 1,
        "bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "train_sampling_strategy": "sequential", "max_grad_norm": 1.0, "weight_decay": 0.0, "disable_tqdm": True,
    }  # fmt: skip


def compare(mine: list[dict[str, Any]], theirs: list[dict[str, Any]], names: dict[str, str], rel: float) -> None:
    assert len(mine) == STEPS
    for one, other in zip(mine, theirs, strict=False):
        for name, their_name in names.items():
            assert one[name] == pytest.approx(other[their_name], rel=rel, abs=1e-6), (one["step"], name)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_is_trls(beta: float, tokenizer: Any, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    model, data = tiny_llama(vocabulary=len(tokenizer)), rows()
    reference = copy.deepcopy(model)
    mine = ours({"name": "dpo", "beta": beta}, copy.deepcopy(model), copy.deepcopy(tokenizer), data, tmp_path)
    trainer = DPOTrainer(
        model=model, ref_model=reference, args=DPOConfig(beta=beta, max_length=1024, **their_options(tmp_path)),
        train_dataset=Dataset.from_list(in_our_order(data)), processing_class=copy.deepcopy(tokenizer),
    )  # fmt: skip
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    assert abs(mine[-1]["loss"] - mine[0]["loss"]) > 0.01  # the weights moved
    compare(mine, theirs, {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate"}, 1e-4)
    compare(mine, theirs, {n: n for n in ("logps/chosen", "logps/rejected")}, 1e-5)
    compare(mine, theirs, {n: n for n in ("rewards/chosen", "rewards/rejected", "rewards/margins")}, 1e-3)


def test_sft_is_trls(tokenizer: Any, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    model = tiny_llama(vocabulary=len(tokenizer))
    data = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows()]
    mine = ours({"name": "sft"}, copy.deepcopy(model), copy.deepcopy(tokenizer), data, tmp_path)
    trainer = SFTTrainer(
        model=model, args=SFTConfig(max_length=1024, completion_only_loss=True, **their_options(tmp_path)),
        train_dataset=Dataset.from_list(in_our_order(data)), processing_class=copy.deepcopy(tokenizer),
    )  # fmt: skip
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    assert len({round(line["loss"], 2) for line in mine}) == STEPS
    compare(mine, theirs, {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate"}, 1e-4)
