"""Three steps of ours against TRL's trainers on the same model, rows, order and optimizer."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, tiny_llama
from datasets import Dataset

import alignzoo
from alignzoo.batch import steps_of
from alignzoo.engine import Engine
from alignzoo.recipe import load_recipe
from alignzoo.rundir import RunDir

STEPS, BATCH, SEED = 3, 4, 7


def rows(n: int = 14) -> list[dict[str, str]]:
    lines = (REPO / "recipes/data/shop_train.jsonl").read_text(encoding="utf-8").splitlines()[:n]
    return [{k: v for k, v in json.loads(line).items() if k in ("prompt", "chosen", "rejected")} for line in lines]


def ours(
    loss: dict[str, Any],
    model: Any,
    tokenizer: Any,
    data: list[dict[str, Any]],
    folder: Path,
    changes: dict[str, Any] | None = None,
    **train: Any,
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
        },
        changes or {},
    )  # fmt: skip
    result = alignzoo.run(recipe, model=model, tokenizer=tokenizer, train=data)
    return RunDir(result.run_dir).read_metrics()


def in_our_order(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
    """What a step lacks with them, the rewards of a label that it does not hold, it must lack with us."""
    assert len(mine) == STEPS
    for one, other in zip(mine, theirs, strict=False):
        assert [name in one for name in names] == [name in other for name in names.values()]
        for name, their_name in ((n, t) for n, t in names.items() if n in one):
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


@pytest.mark.parametrize(
    ("loss", "kind"), [({"name": "ipo", "tau": 0.3}, "ipo"), ({"name": "hinge", "beta": 0.3}, "hinge")]
)
def test_ipo_and_hinge_are_trls(loss: dict[str, Any], kind: str, tokenizer: Any, tmp_path: Path) -> None:
    """Their beta is our tau. The rewards of TRL's IPO are those of summed log-ratios: compared for hinge only."""
    from trl import DPOConfig, DPOTrainer

    model, data = tiny_llama(vocabulary=len(tokenizer)), rows()
    reference = copy.deepcopy(model)
    mine = ours(loss, copy.deepcopy(model), copy.deepcopy(tokenizer), data, tmp_path)
    options = DPOConfig(loss_type=kind, beta=0.3, max_length=1024, **their_options(tmp_path))
    trainer = DPOTrainer(
        model=model, ref_model=reference, args=options, train_dataset=Dataset.from_list(in_our_order(data)),
        processing_class=copy.deepcopy(tokenizer),
    )  # fmt: skip
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    assert abs(mine[-1]["loss"] - mine[0]["loss"]) > 0.01
    compare(mine, theirs, {"loss": "loss", "grad_norm": "grad_norm"}, 1e-4)
    compare(mine, theirs, {n: n for n in ("logps/chosen", "logps/rejected")}, 1e-5)
    if kind == "hinge":
        compare(mine, theirs, {n: n for n in ("rewards/chosen", "rewards/rejected", "rewards/margins")}, 1e-3)


# --- orpo -------------------------------------------------------------------------------------------------------------


def their_orpo(model: Any, tokenizer: Any, data: list[dict[str, str]], folder: Path) -> list[dict[str, Any]]:
    """One micro-batch for each step: their NLL is a mean over a micro-batch's tokens, ours over those of the step."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    whole = {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1}
    options = ORPOConfig(beta=0.4, max_length=1024, **{**their_options(folder), **whole})
    trainer = ORPOTrainer(
        model=model, args=options, train_dataset=Dataset.from_list(in_our_order(data)),
        processing_class=copy.deepcopy(tokenizer),
    )  # fmt: skip
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")


def test_orpo_is_trls_where_the_prompt_is_one_token(tokenizer: Any, tmp_path: Path) -> None:
    """Then their NLL over prompt and completion is one over the completion: nothing predicts the first token."""
    model, data = tiny_llama(vocabulary=len(tokenizer)), [row | {"prompt": "<s>"} for row in rows()]
    mine = ours({"name": "orpo", "lambda_": 0.4}, copy.deepcopy(model), copy.deepcopy(tokenizer), data, tmp_path)
    theirs = their_orpo(model, tokenizer, data, tmp_path)
    assert abs(mine[-1]["loss"] - mine[0]["loss"]) > 0.01
    names = ("loss", "grad_norm", "nll_loss", "log_odds_chosen", *REWARDS)
    compare(mine, theirs, {name: name for name in names}, 1e-4)
    compare(mine, theirs, {"mean_logps/chosen": "logps/chosen", "mean_logps/rejected": "logps/rejected"}, 1e-5)


def test_orpo_with_prompts_is_trls_but_for_the_nll(tokenizer: Any, tmp_path: Path) -> None:
    """The first step, before the two part."""
    model, data = tiny_llama(vocabulary=len(tokenizer)), [row | {"prompt": "<s>" + row["prompt"]} for row in rows()]
    mine = ours({"name": "orpo", "lambda_": 0.4}, copy.deepcopy(model), copy.deepcopy(tokenizer), data, tmp_path)[0]
    theirs = their_orpo(model, tokenizer, data, tmp_path)[0]
    for name in ("log_odds_chosen", *REWARDS):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert mine["nll_loss"] != pytest.approx(theirs["nll_loss"], rel=1e-3)
    assert mine["loss"] - mine["nll_loss"] == pytest.approx(theirs["loss"] - theirs["nll_loss"], rel=1e-3)


def test_the_odds_ratio_is_trls_function() -> None:
    from types import SimpleNamespace

    import torch
    from alignzoo_losses.orpo import ORPO
    from loss_helpers import completion, units_by_term
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = [-1e-3, -0.5, -3.0, -40.0], [-2.0, -1e-2, -3.0, -0.7]
    sides = [completion([[value] for value in values]) for values in (chosen, rejected)]
    found = units_by_term(ORPO(lambda_=0.4)(alignzoo.Pairs(chosen=sides[0], rejected=sides[1])))[1]
    trainer = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    expected, *_ = ORPOTrainer.odds_ratio_loss(trainer, torch.tensor(chosen), torch.tensor(rejected))
    assert found == pytest.approx((-expected).tolist(), rel=1e-5)


# --- kto --------------------------------------------------------------------------------------------------------------


def labelled_rows() -> list[dict[str, Any]]:
    """One side of each pair, so that no two rows have one prompt; more undesirable than desirable ones."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 == 0 else "rejected"], "label": i % 3 == 0}
        for i, row in enumerate(rows())
    ]


def rotated(trees: list[Any]) -> list[Any]:
    """Trees in our order with the mismatched completions that TRL gives them: of the row before, within each step."""
    made = list(trees)
    for step in steps_of(len(trees), BATCH, 1, STEPS, SEED):
        for row, before in zip(step.rows, (step.rows[-1], *step.rows[:-1]), strict=True):
            made[row] = dataclasses.replace(trees[row], mismatched=trees[before].completions[0])
    return made


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto_is_trls(kind: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that is not the policy gives a baseline above 0 from the first step on. It gets TRL's own mismatched
    completions here, which are part of its data preparation; what it calls apo_zero_unpaired is KTO without a baseline.
    """
    from trl import KTOConfig, KTOTrainer

    model, reference = tiny_llama(1, len(tokenizer)), tiny_llama(0, len(tokenizer))
    reference.save_pretrained(tmp_path / "reference")
    real = Engine.fit
    monkeypatch.setattr(Engine, "fit", lambda self, train, *rest: real(self, rotated(list(train)), *rest))
    loss = {"name": "kto", "beta": 0.05, "desirable_weight": 1.5, "undesirable_weight": 0.8,
            "baseline": "mismatched" if kind == "kto" else "none"}  # fmt: skip
    # live: the rows are changed on their way to the engine, after log-probs would have been computed
    changes = {"reference.path": str(tmp_path / "reference"), "reference.mode": "live"}
    mine = ours(loss, copy.deepcopy(model), copy.deepcopy(tokenizer), labelled_rows(), tmp_path, changes)
    whole = {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1}
    options = KTOConfig(
        loss_type=kind, beta=0.05, desirable_weight=1.5, undesirable_weight=0.8, max_length=1024,
        **{**their_options(tmp_path), **whole},
    )  # fmt: skip
    trainer = KTOTrainer(
        model=model, ref_model=reference, args=options, train_dataset=Dataset.from_list(in_our_order(labelled_rows())),
        processing_class=copy.deepcopy(tokenizer),
    )  # fmt: skip
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    assert len({round(line["loss"], 3) for line in mine}) == STEPS
    assert "rewards/chosen" in mine[0] and "rewards/chosen" not in mine[2]  # the third step has undesirable rows only
    compare(mine, theirs, {"loss": "loss", "grad_norm": "grad_norm"}, 1e-4)
    compare(mine, theirs, {n: n for n in ("logps/chosen", "logps/rejected")}, 1e-5)
    compare(mine, theirs, {n: n for n in REWARDS}, 1e-3)
    if kind == "kto":
        assert mine[0]["baseline"] > 1
        compare(mine, theirs, {"baseline": "kl"}, 1e-4)
