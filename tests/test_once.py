"""An evaluation forwards each completion once, whoever asks for it, and finds what passes of their own find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from alignzoo_losses.dpo import DPO
from alignzoo_losses.kto import KTO
from alignzoo_losses.sft import SFT
from conftest import make_trees, tiny_llama
from test_engine import make_engine, make_recipe

import alignzoo
from alignzoo import attention
from alignzoo.batch import PADDED, TREES, Way
from alignzoo.engine import Engine
from alignzoo.logprobs import Scorer
from alignzoo.once import Once, joined
from alignzoo.refstore import row_key
from alignzoo.tree import Completion, Tree

TIMED = {"eval_runtime"}


def rows_of_pairs(pairs: Sequence[Tree]) -> list[Tree]:
    """Labelled rows as they are made of pairs: both answers to a prompt, one after the other; y' of the next prompt."""
    found = []
    for i, pair in enumerate(pairs):
        other = pairs[(i + 1) % len(pairs)].completions
        for slot, completion in enumerate(pair.completions):
            row = Tree(
                len(found), pair.prompt, (completion,), where=pair.where, label=slot == 0, mismatched=other[slot]
            )
            found.append(row)
    return found


def evaluation(loss: alignzoo.Loss, rows: Sequence[Tree], pairs: Sequence[Tree], way: Way) -> dict[str, Any]:
    """The line of an evaluation, what `on_rows` got, and the positions that the policy forwarded for it."""
    recipe = make_recipe(train__batch_size=4, engine__tokens_per_device=150)
    engine, records = make_engine(loss, tiny_llama(), recipe, reference=tiny_llama(seed=1))
    engine.way = way
    if way is TREES:
        for scorer in (engine.bare, engine.frozen):
            if scorer is not None:
                attention.enable(scorer.causal_lm)
    forwarded, given = [], []
    engine.policy.register_forward_hook(lambda _m, args, _o: forwarded.append(args[0].real_positions))
    engine.on_rows = lambda _step, _rows, scores: given.append(scores)
    engine.evaluate(rows, 3, 1.0, pairs)
    assert engine.once is None
    return {"line": records[-1], "rows": given[-1].policy, "forwarded": sum(forwarded)}


def tokens_of(trees: Sequence[Tree]) -> int:
    """Positions of all different completions, each prompt once: what an evaluation has to forward at least."""
    prompts = {t.prompt.tobytes(): len(t.prompt) for t in trees}
    completions = {row_key(t.prompt, c.ids): len(c.ids) for t in trees for c in t.branches}
    return sum(prompts.values()) + sum(completions.values())


@pytest.mark.parametrize("way", [PADDED, TREES], ids=["padded", "trees"])
@pytest.mark.parametrize("loss", [KTO(beta=0.05), SFT()], ids=["kto", "sft"])
def test_once_is_the_same_as_every_time(loss: alignzoo.Loss, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_trees(9, seed=3)
    rows = rows_of_pairs(pairs)
    if loss.data == "demonstrations":
        rows = [replace(pair, completions=pair.completions[:1]) for pair in pairs]
    once = evaluation(loss, rows, pairs, way)
    monkeypatch.setattr(Engine, "_forward_once", lambda *_: None)
    again = evaluation(loss, rows, pairs, way)
    assert once["line"].keys() == again["line"].keys() >= {"eval_loss", "eval_pairs/accuracies"}
    for name in once["line"].keys() - TIMED:
        assert once["line"][name] == pytest.approx(again["line"][name], rel=1e-5, abs=1e-6), name
    assert once["rows"] == pytest.approx(again["rows"], rel=1e-5)
    assert set(once["rows"]) == {(pair.row, slot) for pair in pairs for slot in (0, 1)}
    if way is TREES:
        assert once["forwarded"] == tokens_of([*rows, *pairs])
    assert once["forwarded"] <= again["forwarded"] * (0.7 if loss.data == "demonstrations" else 0.5)


def test_a_loss_that_asks_once_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """DPO on pairs: nothing is looked up, so nothing has to be held in memory."""

    def never(*_: Any) -> Any:
        raise AssertionError("kept")

    monkeypatch.setattr(Once, "add", never)
    pairs = make_trees(5, seed=3)
    assert evaluation(DPO(), pairs, (), TREES)["forwarded"] == tokens_of(pairs)


class Sure(alignzoo.Loss):
    """Reads a token statistic, and what `prepare` makes of the step."""

    name, data, needs_reference = "sure", "demonstrations", False
    Settings = alignzoo.NoSettings
    token_stats = frozenset({"entropy", "is_top1"})

    def prepare(self, step: alignzoo.Step, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        assert step.completion is not None
        return {"mean": step.completion.mean().mean()}, state

    def __call__(self, batch: alignzoo.Demonstrations) -> alignzoo.LossOutput:
        one = batch.completion
        assert one.is_top1 is not None and one.is_top1.dtype is torch.bool
        value = one.entropy * (1 + one.is_top1) - batch.step["mean"]
        return alignzoo.LossOutput(value * one.policy, per="token", mask=one.mask)


def test_token_statistics_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [replace(t, completions=t.completions[:1]) for t in make_trees(6, seed=5)]
    once = evaluation(Sure(), rows, (), TREES)
    assert once["forwarded"] == tokens_of(rows)
    monkeypatch.setattr(Engine, "_forward_once", lambda *_: None)
    assert once["line"]["eval_loss"] == pytest.approx(
        evaluation(Sure(), rows, (), TREES)["line"]["eval_loss"], rel=1e-5
    )


def test_an_evaluation_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training after it must ask the policy, not what it was."""
    engine, _ = make_engine(SFT(), tiny_llama(), make_recipe())

    def fails(*_: Any) -> Any:
        assert engine.once is not None
        raise RuntimeError("interrupted")

    monkeypatch.setattr(engine, "_evaluate_pairs", fails)
    pairs = make_trees(3, seed=3)
    with pytest.raises(RuntimeError, match="interrupted"):
        engine.evaluate([replace(pair, completions=pair.completions[:1]) for pair in pairs], 1, 1.0, pairs)
    assert engine.once is None


# --- joined ----------------------------------------------------------------------------------------------------------


def completion(*ids: int) -> Completion:
    return Completion(np.array(ids, np.int32))


def tree(prompt: Sequence[int], *completions: Completion, mismatched: Completion | None = None) -> Tree:
    return Tree(7, np.array(prompt, np.int32), completions, where="f:1", mismatched=mismatched)


def ids(trees: Sequence[Tree]) -> list[tuple[list[int], list[list[int]]]]:
    return [(t.prompt.tolist(), [c.ids.tolist() for c in t.completions]) for t in trees]


def test_completions_of_a_prompt_are_joined() -> None:
    rows = [
        tree([1, 2], completion(3), mismatched=completion(9)), tree([1], completion(2, 3)),
        tree([1, 2], completion(4, 5)), tree([1, 2], completion(3), completion(6)),
    ]  # fmt: skip
    assert ids(joined(rows, 100, TREES, mismatched=False)) == [([1, 2], [[3], [4, 5], [6]]), ([1], [[2, 3]])]
    assert ids(joined(rows, 100, TREES, mismatched=True)) == [([1, 2], [[3], [9], [4, 5], [6]]), ([1], [[2, 3]])]
    assert [t.row for t in joined(rows, 100, TREES, mismatched=True)] == [0, 1]


def test_a_prompt_with_many_completions_becomes_several_trees() -> None:
    """Each of them within the budget, padding included; a completion that is larger by itself is there all the same."""
    rows = [tree([1, 2], *(completion(*range(3, 3 + n)) for n in (1, 2, 3, 4, 40, 1, 5, 7)))]
    found = joined(rows, 16, PADDED, mismatched=False)
    assert [[len(c.ids) for c in t.completions] for t in found] == [[1, 2, 3], [4], [40], [5], [7]]
    assert all(PADDED.positions([t]) <= 16 or len(t.completions) == 1 for t in found)


def test_kept_values_are_looked_up_by_their_tokens() -> None:
    """Other trees, in another order and with other neighbours: the values and the zeros of a forward pass."""
    trees = make_trees(5, seed=9)
    scorer = Scorer(tiny_llama()).eval()
    plain = Scorer(tiny_llama()).eval()
    attention.enable(scorer.causal_lm)
    layout, kept = TREES.layout(trees), Once()
    with torch.no_grad():
        kept.add(trees, layout, scorer(layout, ("entropy", "is_top1")))
        part = [replace(trees[3], completions=trees[3].completions[1:]), trees[1]]
        wanted = plain(PADDED.layout(part), ("entropy", "is_top1"))
    found = kept.scores(part, PADDED.layout(part), torch.device("cpu"))
    assert found.keys() == wanted.keys()
    for name, table in wanted.items():
        assert found[name].dtype == table.dtype
        torch.testing.assert_close(found[name], table, rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError):
        kept.scores([tree([1], completion(2))], PADDED.layout([tree([1], completion(2))]), torch.device("cpu"))


def test_ranks_are_merged() -> None:
    a, b = Once({b"a": {"logps": torch.ones(1)}}), Once({b"b": {"logps": torch.zeros(2)}})
    assert Once.merged([a, b]).kept.keys() == {b"a", b"b"}
