"""The recipes of ipo, hinge, orpo and kto on the embedded model: each learns the shop's preferences."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import REPO

import alignzoo
from alignzoo.recipe import load_recipe

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.xdist_group("real")]

FALL = {"ipo": -0.5}  # it asks for a difference only, and reaches it by letting both sides fall: see its page


@pytest.mark.parametrize("name", ["ipo", "hinge", "orpo", "kto"])
def test_a_recipe_reaches_its_accuracy(name: str, real_folder: Path, tmp_path: Path) -> None:
    """Measured on held-out pairs, whatever the loss eats; and the better answers have not sunk."""
    overrides = {
        "model.path": str(real_folder), "output.dir": str(tmp_path), "eval.every_steps": 13, "eval.at_start": True,
        "samples.from_eval": 0, "samples.prompts": [],
    }  # fmt: skip
    summary = alignzoo.run(load_recipe(REPO / f"recipes/{name}.toml", overrides)).summary
    assert summary["accuracy"]["rows"] == 64
    assert summary["accuracy"]["value"] >= 0.75
    assert summary["chosen_logp_per_token"]["change"] > FALL.get(name, -0.1)
    assert summary["eval_loss"]["change"] < 0
