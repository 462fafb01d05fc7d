"""IPO, hinge, ORPO and KTO through the engine: micro-batches change nothing, and KTO's baseline is that of the step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alignzoo_losses.hinge import Hinge
from alignzoo_losses.ipo import IPO
from alignzoo_losses.kto import KTO
from alignzoo_losses.orpo import ORPO
from conftest import REPO, make_trees, tiny_llama
from test_engine import error, labelled, make_engine, make_recipe, update_of

import alignzoo
from alignzoo.data.dataset import prepare
from alignzoo.engine import Engine
from alignzoo.recipe import load_recipe
from alignzoo.tree import Completion, Tree

FAST: dict[str, Any] = {"train__learning_rate": 4.0}  # a large step, of which float32 weights keep more digits
UNSTABLE = {"tokens_per_second", "memory", "padding_fraction", "shared_fraction"}
LOSSES = {
    "ipo": lambda: IPO(tau=0.3),
    "ipo sum": lambda: IPO(tau=0.3, reduction="sum"),
    "hinge": lambda: Hinge(beta=0.05),
    "orpo": lambda: ORPO(lambda_=0.7),
    "kto": lambda: KTO(beta=0.05, desirable_weight=1.4, undesirable_weight=0.6),
    "kto without baseline": lambda: KTO(beta=0.05, baseline="none"),
}


@cache
def favourite(prompt: tuple[int, ...], length: int, seed: int = 0) -> Completion:
    """What a model answers greedily: the policy of `update_of`, or with seed 1 its reference, likes it better."""
    model, ids = tiny_llama(seed), list(prompt)
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return Completion(np.array(ids[len(prompt) :], np.int32))


def labelled_trees(labels: Sequence[bool]) -> list[Tree]:
    """Rows with these labels whose mismatched completions have 1 to 3 tokens and a baseline above 0."""
    trees = labelled(make_trees(len(labels), seed=3))
    return [
        replace(t, label=label, mismatched=favourite(tuple(t.prompt.tolist()), 1 + t.row % 3))
        for t, label in zip(trees, labels, strict=True)
    ]


def trees_for(loss: alignzoo.Loss, n: int = 7) -> list[Tree]:
    return labelled_trees([i % 3 != 0 for i in range(n)]) if loss.data == "labelled" else make_trees(n, seed=3)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_does_not_depend_on_the_micro_batches(name: str) -> None:
    loss = LOSSES[name]()
    trees = trees_for(loss)
    whole, metrics = update_of(loss, trees, engine__tokens_per_device=100_000, **FAST)
    assert whole.norm() > 0.1
    assert name != "kto" or metrics["baseline"] > 1
    for budget in (1, 40, 90):
        update, again = update_of(loss, trees, engine__tokens_per_device=budget, **FAST)
        assert error(update, whole) < 1e-5, budget
        assert again.keys() == metrics.keys()
        for key in metrics.keys() - UNSTABLE:
            assert again[key] == pytest.approx(metrics[key], rel=1e-5, abs=1e-6), key
    for seed in (1, 2):  # another order of the rows
        update, _ = update_of(loss, trees, engine__tokens_per_device=60, train__seed=seed, **FAST)
        assert error(update, whole) < 1e-5


# --- kto, against plain autograd on the plain model -------------------------------------------------------------------


def logp(model: Any, prompt: Any, completion: Completion) -> torch.Tensor:
    """The summed log-prob of a completion, token by token from the logits."""
    ids = torch.tensor([[*prompt.tolist(), *completion.ids.tolist()]])
    table = model(ids).logits[0].log_softmax(-1)
    start = len(prompt)
    return torch.stack([table[start + i - 1, ids[0, start + i]] for i in range(ids.shape[1] - start)]).sum()


def kto_by_hand(
    trees: Sequence[Tree], beta: float, weights: tuple[float, float], *, baseline: bool = True, attached: bool = False
) -> tuple[torch.Tensor, float, float]:
    """The gradient of the mean loss over all rows, the loss, and the baseline."""
    model, reference = tiny_llama(), tiny_llama(seed=1)

    def ratio(tree: Tree, completion: Completion) -> torch.Tensor:
        return logp(model, tree.prompt, completion) - logp(reference, tree.prompt, completion).detach()

    z = torch.zeros(())
    if baseline:
        z = torch.stack([ratio(t, t.mismatched) for t in trees if t.mismatched is not None]).mean()
        z = torch.maximum(z if attached else z.detach(), torch.zeros(()))
    losses = []
    for tree in trees:
        gain = beta * (ratio(tree, tree.completions[0]) - z)
        value = 1 / (1 + torch.exp(-gain if tree.label else gain))
        losses.append(weights[0 if tree.label else 1] * (1 - value))
    loss = torch.stack(losses).mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), loss.item(), z.item()


LABELS = {
    "mixed, odd": [True, False, False, True, True],
    "desirable only": [True] * 4,
    "undesirable only": [False] * 3,
    "one to five": [False, False, True, False, False, False],
    "one row": [True],
}


@pytest.mark.parametrize("name", LABELS)
def test_the_gradient_of_kto_is_that_of_the_loss_by_hand(name: str) -> None:
    """Any mixture of labels, in micro-batches of which most have one label only."""
    trees = labelled_trees(LABELS[name])
    loss = KTO(beta=0.05, desirable_weight=1.4, undesirable_weight=0.6)
    update, metrics = update_of(loss, trees, engine__tokens_per_device=40, **FAST)
    gradient, expected, baseline = kto_by_hand(trees, 0.05, (1.4, 0.6))
    assert baseline > 1
    assert error(update, -4.0 * gradient) < 1e-5
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["baseline"] == pytest.approx(baseline, rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    assert ("rewards/chosen" in metrics, "rewards/rejected" in metrics) == (
        any(t.label for t in trees),
        not all(t.label for t in trees),
    )
    swapped, _, _ = kto_by_hand(trees, 0.05, (0.6, 1.4))
    attached, _, _ = kto_by_hand(trees, 0.05, (1.4, 0.6), attached=True)
    assert min(error(-4.0 * wrong, update) for wrong in (swapped, attached)) > 1e-2  # the test tells them apart


def test_a_baseline_below_zero_is_zero() -> None:
    """Mismatched completions that the reference likes better: the gradient is that without a baseline."""
    trees = labelled_trees([True, False, True])
    unliked = [replace(t, mismatched=favourite(tuple(t.prompt.tolist()), 2, seed=1)) for t in trees]
    update, metrics = update_of(KTO(beta=0.05), unliked, **FAST)
    without, _ = update_of(KTO(beta=0.05, baseline="none"), unliked, **FAST)
    with_one, _ = update_of(KTO(beta=0.05), trees, **FAST)
    assert metrics["baseline"] == 0.0
    assert error(update, without) < 1e-6
    assert error(with_one, without) > 1e-2


def test_without_a_baseline_there_is_no_extra_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees need no mismatched completion, and the model is called once for each micro-batch."""
    trees = [replace(t, mismatched=None) for t in labelled_trees([True, False, True])]

    def never(*_: Any) -> Any:
        raise AssertionError("the pass for prepare was made")

    monkeypatch.setattr(Engine, "_sums", never)
    update, metrics = update_of(KTO(beta=0.05, baseline="none"), trees, **FAST)
    gradient, expected, _ = kto_by_hand(trees, 0.05, (1.0, 1.0), baseline=False)
    assert error(update, -4.0 * gradient) < 1e-5
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert "baseline" not in metrics
    with pytest.raises(AssertionError, match="was made"):
        update_of(KTO(beta=0.05), labelled_trees([True, False, True]))


def test_the_baseline_is_that_of_each_step() -> None:
    """Two steps of three rows: each has its own baseline, and the second one sees the moved policy."""
    trees = labelled_trees([True, False, True, False, True, False])
    recipe = make_recipe(train__batch_size=3, train__learning_rate=0.5)
    engine, records = make_engine(KTO(beta=0.05), tiny_llama(), recipe, reference=tiny_llama(seed=1))
    seen: list[float] = []
    real = engine.objective.prepare

    def spy(*args: Any) -> Any:
        values, state = real(*args)
        seen.append(values["baseline"].item())
        return values, state

    engine.objective.prepare = spy  # type: ignore[method-assign]
    engine.fit(trees, [])
    assert [r["baseline"] for r in records] == pytest.approx(seen)
    first, second = ([trees[i] for i in rows] for rows in _rows_of_two_steps(recipe))
    assert seen[0] == pytest.approx(kto_by_hand(first, 0.05, (1.0, 1.0))[2], rel=1e-5)
    assert seen[1] != pytest.approx(kto_by_hand(second, 0.05, (1.0, 1.0))[2], rel=1e-3)


def _rows_of_two_steps(recipe: Any) -> list[tuple[int, ...]]:
    from alignzoo.batch import steps_of

    return [step.rows for step in steps_of(6, 3, 1, None, recipe.train.seed)]


def test_kto_at_step_zero() -> None:
    """Policy and reference are one: half of the weights, a baseline of 0, every row a tie."""
    engine, records = make_engine(KTO(desirable_weight=3.0), tiny_llama(), make_recipe(), reference=tiny_llama())
    engine.evaluate(labelled_trees([True, False, False, True]), 0, 0.0)
    (found,) = records
    assert found["eval_loss"] == pytest.approx((1.5 + 0.5) / 2, abs=1e-5)
    assert found["eval_baseline"] == pytest.approx(0.0, abs=1e-4)
    assert (found["eval_rewards/accuracies"], found["eval_rewards/ties"]) == (0.5, 1.0)
    assert found["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-4)


# --- kto, from files to steps -----------------------------------------------------------------------------------------


def test_mismatched_answers_of_the_demo_are_of_other_prompts(tokenizer: Any) -> None:
    """Its pairs become two rows with one prompt each; neither gets the other's answer, in training nor held out."""
    recipe = load_recipe(REPO / "recipes/kto.toml")
    data = prepare(recipe.data, "labelled", tokenizer, needs_mismatched=True, seed=0, say=lambda _: None)
    for rows in (data.train, data.eval):
        answers: dict[bytes, set[bytes]] = {}
        for tree in rows:
            answers.setdefault(tree.prompt.tobytes(), set()).add(tree.completions[0].ids.tobytes())
        assert len(answers) == len(rows) // 2
        for tree in rows:
            assert tree.mismatched is not None
            assert tree.mismatched.ids.tobytes() not in answers[tree.prompt.tobytes()]
        used = {tree.mismatched.ids.tobytes() for tree in rows if tree.mismatched}
        assert len(used) > 0.9 * len(rows) / 2  # not one answer for all


def test_one_prompt_is_enough_without_a_baseline(tokenizer: Any, tmp_path: Path) -> None:
    """The setting reaches the data: what has no mismatched answers trains, where the baseline would refuse it."""
    rows = [{"prompt": "Who are you?", "completion": f"I am number {i}.", "label": i % 2 == 0} for i in range(5)]

    def run(loss: dict[str, Any]) -> alignzoo.Result:
        table = {
            "loss": loss, "model": {"path": "given"}, "data": {"train": "given"}, "engine": {"device": "cpu"},
            "train": {"learning_rate": 1e-3, "batch_size": 3}, "output": {"dir": str(tmp_path / "runs")},
        }  # fmt: skip
        model = tiny_llama(vocabulary=len(tokenizer))
        return alignzoo.run(load_recipe(table), model=model, tokenizer=copy.deepcopy(tokenizer), train=rows)

    assert run({"name": "kto", "baseline": "none"}).summary["steps"] == 2
    with pytest.raises(alignzoo.AlignzooError, match="has no row with another prompt"):
        run({"name": "kto"})
