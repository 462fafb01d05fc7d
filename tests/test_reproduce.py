"""The first steps of a run made again: the same to the last bit, rounding, or not the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from runs_helpers import files_of, write_recipe

import alignzoo
from alignzoo.cli import cli
from alignzoo.errors import AlignzooError, RunError
from alignzoo.recipe import load_recipe
from alignzoo.reproduce import reproduce

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def original(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    recipe = write_recipe(folder, tiny_folder, checkpoint__every_steps=4, eval__every_steps=2)
    return alignzoo.run(load_recipe(recipe), console=QUIET).run_dir


@pytest.fixture
def run_dir(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def changed(run_dir: Path, line: int, key: str, factor: float) -> None:
    """metrics.jsonl with one number changed."""
    file = run_dir / "metrics.jsonl"
    records = [json.loads(text) for text in file.read_text().splitlines()]
    records[line][key] *= factor
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def told(run_dir: Path, steps: int = 3) -> list[str]:
    lines: list[str] = []
    reproduce(run_dir, steps, lines.append, QUIET)
    return lines


def test_a_run_is_reproduced_to_the_last_bit(run_dir: Path) -> None:
    before, metrics = files_of(run_dir), (run_dir / "metrics.jsonl").read_bytes()
    done = CliRunner().invoke(cli, ["reproduce", str(run_dir), "--steps", "3"])
    assert done.exit_code == 0, done.output
    for line in ("the same versions", "the same data", "the same start model", "the same plugin"):
        assert line in done.output
    losses = [json.loads(line).get("loss") for line in metrics.splitlines()]
    shown = ", ".join(f"{loss:.6g}" for loss in losses if loss is not None and losses.index(loss) < 5)
    assert f"5 records to step 3 (loss {shown}): all numbers are the same to the last bit" in done.output
    assert files_of(run_dir) == before and (run_dir / "metrics.jsonl").read_bytes() == metrics


def test_all_steps_can_be_made_again(run_dir: Path) -> None:
    """The last ones too, whose learning rate depends on how many there are."""
    assert reproduce(run_dir, 100, print, QUIET) == []


@pytest.mark.parametrize(
    ("line", "key"), [(1, "loss"), (4, "grad_norm"), (0, "eval_loss"), (2, "learning_rate"), (3, "eval_kl/chosen")]
)
def test_another_number_is_found(line: int, key: str, run_dir: Path) -> None:
    changed(run_dir, line, key, 1.1)
    with pytest.raises(RunError, match=f"not reproduced: 1 numbers differ, the furthest at step .*{key}"):
        told(run_dir)


def test_rounding_is_told_from_a_difference(run_dir: Path) -> None:
    changed(run_dir, 2, "loss", 1 + 1e-6)
    assert "reproduced up to rounding" in told(run_dir)[-1] and "1 numbers differ" in told(run_dir)[-1]
    changed(run_dir, 2, "memory", 9.0)  # of the machine
    changed(run_dir, 11, "loss", 9.0)  # after the steps that are made again
    assert "reproduced up to rounding" in told(run_dir)[-1]


def test_what_else_differs_is_said(run_dir: Path) -> None:
    manifest: dict[str, Any] = json.loads((run_dir / "manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    manifest["data"] = dict.fromkeys(manifest["data"], "0" * 64)
    manifest["weights"] = {"other.safetensors": "0" * 64}
    manifest["plugins"][0]["version"] = "0.0.1"
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    text = "\n".join(told(run_dir))
    for words in (
        "torch 1.0 -> ",
        "WARNING: the data differs: train: ",
        "WARNING: the start model differs: other",
        "0.0.1",
    ):
        assert words in text, words
    changed(run_dir, 1, "loss", 2.0)
    with pytest.raises(RunError, match="its versions, data, start model or plugin differ"):
        told(run_dir)


def test_runs_that_cannot_be_made_again(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(AlignzooError, match="no run directory"):
        told(tmp_path / "nothing")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    (run_dir / "manifest.json").write_text(json.dumps({**manifest, "live": ["model"]}))
    with pytest.raises(AlignzooError, match="model: given as objects from Python"):
        told(run_dir)
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    (run_dir / "metrics.jsonl").write_text("")
    with pytest.raises(AlignzooError, match="no record of its first 3 steps"):
        told(run_dir)
