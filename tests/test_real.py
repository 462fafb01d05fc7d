"""The embedded 135M model, end to end. The conversion from GGUF happens once per session (conftest)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignzoo
from alignzoo.batch import padded_layout
from alignzoo.data.dataset import prepare
from alignzoo.logprobs import Scorer, check_scorer
from alignzoo.recipe import load_recipe
from alignzoo.rundir import RunDir

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("real")]


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    return RunDir(run_dir).read_metrics()


def test_the_converted_model_answers_in_plain_transformers(real_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    turns = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert getattr(model.config, "quantization_config", None) is None


def test_its_log_probs_are_those_of_its_own_logits(real_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32)
    recipe = load_recipe(REPO / "recipes/dpo.toml")
    prepared = prepare(
        recipe.data, "pairs", AutoTokenizer.from_pretrained(real_folder), needs_mismatched=False, seed=0, say=print
    )
    assert (len(prepared.train), len(prepared.eval)) == (200, 64)
    check_scorer(Scorer(model), padded_layout(prepared.eval[:2]))


def test_dpo_moves_the_preferences_of_a_real_model(real_folder: Path, tmp_path: Path) -> None:
    """Three steps of the demo on a quarter of its rows: accuracy from 0.5 to well above, chosen not pushed down."""
    overrides = {
        "model.path": str(real_folder), "output.dir": str(tmp_path), "train.max_steps": 3, "train.warmup_steps": 0,
        "train.learning_rate": 2e-5, "samples.from_eval": 0, "samples.max_new_tokens": 8,
        "data.train": [{"path": str(REPO / "recipes/data/shop_train.jsonl"), "limit": 48}],
        "data.eval": [{"path": str(REPO / "recipes/data/shop_eval.jsonl"), "limit": 16}],
    }  # fmt: skip
    result = alignzoo.run(load_recipe(REPO / "recipes/dpo.toml", overrides))
    first, last = (r for r in records_of(result.run_dir) if "eval_loss" in r)
    assert first["eval_rewards/accuracies"] == 0.5
    assert first["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert last["eval_rewards/accuracies"] >= 0.75
    assert last["eval_loss"] < 0.66
    assert last["eval_mean_logps/chosen"] > first["eval_mean_logps/chosen"] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_demo_succeeds_with_several_seeds(seed: int, real_folder: Path, tmp_path: Path) -> None:
    overrides = {
        "model.path": str(real_folder), "output.dir": str(tmp_path), "train.seed": seed, "eval.every_steps": 13,
        "samples.from_eval": 0, "samples.prompts": [],
    }  # fmt: skip
    result = alignzoo.run(load_recipe(REPO / "recipes/dpo.toml", overrides))
    accuracy, chosen = result.summary["accuracy"], result.summary["chosen_logp_per_token"]
    assert accuracy["value"] >= 0.80
    assert accuracy["low"] > 0.65
    assert chosen["change"] > -0.1


@pytest.mark.slow
def test_dpo_is_trls_on_the_real_model(real_folder: Path, tmp_path: Path) -> None:
    from test_trl_parity import STEPS, compare, in_our_order, ours, rows, their_options
    from trl import DPOConfig, DPOTrainer

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32)

    def tokenizer() -> Any:
        return AutoTokenizer.from_pretrained(real_folder)

    from datasets import Dataset

    mine = ours({"name": "dpo"}, load(), tokenizer(), rows(), tmp_path, learning_rate=1e-5)
    trainer = DPOTrainer(
        model=load(), ref_model=load(), processing_class=tokenizer(),
        train_dataset=Dataset.from_list(in_our_order(rows())),
        args=DPOConfig(max_length=1024, **{**their_options(tmp_path), "learning_rate": 1e-5}),
    )  # fmt: skip
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(theirs) == STEPS
    compare(mine, theirs, {"loss": "loss", "grad_norm": "grad_norm"}, 1e-4)
    compare(mine, theirs, {n: n for n in ("logps/chosen", "logps/rejected")}, 1e-5)
