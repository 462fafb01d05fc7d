"""Several losses as one: values, units, states, metrics, and what cannot be mixed."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from alignzoo_losses.dpo import DPO
from alignzoo_losses.ipo import IPO
from alignzoo_losses.kto import KTO
from alignzoo_losses.orpo import ORPO
from alignzoo_losses.sft import SFT
from conftest import make_trees
from loss_helpers import make_pairs
from rich.console import Console
from runs_helpers import write_recipe
from torch import Tensor

import alignzoo
from alignzoo.batch import padded_layout
from alignzoo.errors import AlignzooError, PluginError
from alignzoo.mixture import Mixture
from alignzoo.objective import Objective, Scored, count_units, make_step, masked_sum
from alignzoo.recipe import load_recipe
from alignzoo.tree import Tree


def value(loss: Any, batch: Any) -> Tensor:
    """Each term divided by its own units."""
    return sum((masked_sum(t) / count_units(t) for t in Objective(loss)(batch).terms), torch.zeros(()))


def test_the_value_and_the_gradient_are_the_weighted_sums() -> None:
    parts = [(DPO(beta=0.3), 0.8), (IPO(tau=0.2), 0.05), (SFT(), 1.5)]
    mixture = Mixture([loss for loss, _ in parts], [weight for _, weight in parts])
    batch = make_pairs(requires_grad=True)
    demonstrations = alignzoo.Demonstrations(completion=batch.chosen)
    alone = [value(loss, demonstrations if loss.name == "sft" else batch) for loss, _ in parts]
    expected = sum((weight * v for (_, weight), v in zip(parts, alone, strict=True)), torch.zeros(()))
    found = value(mixture, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    sides = (batch.chosen.policy, batch.rejected.policy)
    for ours, theirs in zip(torch.autograd.grad(found, sides), torch.autograd.grad(expected, sides), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-15)


def test_what_it_declares_is_what_any_of_its_losses_needs() -> None:
    mixture = Mixture([ORPO(), SFT()], [1.0, 1.0])
    assert (mixture.name, mixture.data, mixture.needs_reference, mixture.has_prepare) == (
        "orpo+sft",
        "pairs",
        False,
        False,
    )
    assert mixture.token_stats == ORPO.token_stats | SFT.token_stats
    assert Mixture([SFT(), DPO()], [1.0, 1.0]).needs_reference
    both = Mixture([KTO(), KTO(beta=0.5)], [1.0, 2.0])
    assert both.data == "labelled" and both.needs_mismatched and both.prepare_pass and both.has_prepare


def test_metrics_and_rewards_tell_whose_they_are() -> None:
    batch = make_pairs()
    output = Objective(Mixture([DPO(), DPO(beta=0.5), SFT()], [1.0, 1.0, 1.0]))(batch)
    names = set(output.metrics)
    assert {"dpo/loss", "dpo_2/loss", "sft/loss"} <= names
    alone = DPO()(batch)
    assert set(alone.metrics) == {n.removeprefix("dpo/") for n in names if n.startswith("dpo/")} - {"loss"}
    assert isinstance(output.rewards, tuple) and isinstance(alone.rewards, tuple)
    assert torch.equal(output.rewards[0], alone.rewards[0])


class Shifting(alignzoo.Loss):
    """Keeps a count in its state, and a value for each completion."""

    name, data, Settings, needs_reference = "shifting", "pairs", alignzoo.NoSettings, True

    def init_state(self) -> dict[str, Tensor]:
        return {"seen": torch.zeros(())}

    def prepare(self, step: alignzoo.Step, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert step.chosen is not None
        ratios = step.chosen.log_ratio()
        values = {"mean": ratios.mean(), "row": ratios.repeat_interleave(2)}
        return values, {"seen": state["seen"] + len(ratios)}

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        return alignzoo.LossOutput(-(batch.chosen.log_ratio() - batch.step["mean"]) * batch.step["row"][::2])


class Averaging(Shifting):
    """The same on demonstrations."""

    name, data, Settings, needs_reference = "averaging", "demonstrations", alignzoo.NoSettings, True

    def prepare(self, step: alignzoo.Step, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert step.completion is not None
        return {"mean": step.completion.log_ratio().mean()}, {"seen": state["seen"] + 1}

    def __call__(self, batch: Any) -> alignzoo.LossOutput:
        return alignzoo.LossOutput((batch.completion.log_ratio() - batch.step["mean"]) ** 2)


def test_each_loss_prepares_and_remembers_for_itself() -> None:
    trees: list[Tree] = make_trees(4)
    table = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    mixture = Mixture([Shifting(), Averaging(), Shifting()], [1.0, 1.0, 1.0])
    state = mixture.init_state()
    assert state.keys() == {"shifting.seen", "averaging.seen", "shifting_2.seen"}
    step = make_step(mixture, trees, table)
    values, state = Objective(mixture).prepare(step, state, 8)
    assert {k: v.item() for k, v in state.items()} == {"shifting.seen": 4, "averaging.seen": 1, "shifting_2.seen": 4}
    alone, _ = Shifting().prepare(make_step(Shifting(), trees, table), Shifting().init_state())
    for label in ("shifting", "shifting_2"):
        assert all(torch.equal(values[f"{label}.{k}"], v) for k, v in alone.items())
    assert torch.equal(values["averaging.mean"], alone["mean"])
    layout = padded_layout(trees)
    scores = {"logps": torch.randn(layout.mask.shape, generator=torch.Generator().manual_seed(1))}
    batch = Objective(mixture).batch(Scored(trees, layout, scores, scores["logps"] - 0.3, values))
    output = Objective(mixture)(batch)
    own = Shifting()(dataclasses.replace(batch, step=alone))  # type: ignore[type-var]
    assert torch.allclose(output.terms[0].loss, own.loss) and torch.allclose(output.terms[2].loss, own.loss)


def test_what_cannot_be_mixed_is_told() -> None:
    with pytest.raises(PluginError, match="dpo eats pairs, kto eats labelled"):
        Mixture([DPO(), KTO()], [1.0, 1.0])


# --- recipes of several losses ---------------------------------------------------------------------------------------


def several(folder: Path, model: Path, *tables: str) -> Path:
    file = write_recipe(folder, model, "several", train__max_steps=3, eval__every_steps=3)
    text = re.sub(r"\[loss\]\nname = \"dpo\"\n", "", file.read_text())
    file.write_text(text + "\n" + "\n".join(f"[[loss]]\n{table}" for table in tables))
    return file


def test_a_recipe_of_three_losses(tiny_folder: Path, tmp_path: Path) -> None:
    tables = (
        'name = "dpo"\nweight = 0.8\nbeta = 0.2\n',
        'name = "bco"\nweight = 0.2\n',
        'name = "sft"\nweight = 0.5\n',
    )
    file = several(tmp_path, tiny_folder, *tables)
    found = alignzoo.run(load_recipe(file, ["loss.2.weight=0.25"]), console=Console(file=io.StringIO()))
    first, last = found.summary["first_eval"], found.summary["eval"]
    assert first["eval_dpo/loss"] == pytest.approx(math.log(2), abs=1e-4)
    for record in (first, last):
        parts = 0.8 * record["eval_dpo/loss"] + 0.2 * record["eval_bco/loss"] + 0.25 * record["eval_sft/loss"]
        assert record["eval_loss"] == pytest.approx(parts, rel=1e-4)
    saved = tomllib.loads((found.run_dir / "recipe.toml").read_text())["loss"]
    assert [(one["name"], one["weight"]) for one in saved] == [("dpo", 0.8), ("bco", 0.2), ("sft", 0.25)]
    assert saved[0]["beta"] == 0.2
    again = load_recipe(found.run_dir / "recipe.toml")
    assert [choice.weight for choice in again.losses] == [0.8, 0.2, 0.25]
    manifest = json.loads((found.run_dir / "manifest.json").read_text())
    assert [one["loss"] for one in manifest["plugins"]] == ["dpo", "bco", "sft"]


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        (('name = "dpo"\n', 'name = "kto"\n'), "dpo eats pairs, kto eats labelled"),
        (('name = "dpo"\n', 'name = "ipo"\nbeta = 1\n'), r"\[loss.1.beta\]"),
        (('name = "dpo"\nweight = 2.0\n',), "weights are for several"),
        (('name = "dpo"\n', 'name = "ipo"\nweight = "much"\n'), r"\[loss.1.weight\]"),
    ],
)
def test_mistakes_in_several_losses_have_their_place(
    tables: tuple[str, ...], words: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(AlignzooError, match=words):
        alignzoo.run(several(tmp_path, tiny_folder, *tables), console=Console(file=io.StringIO()))
