"""What the tests of the reference's kept log-probs share."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO
from rich.console import Console
from transformers import AutoModelForCausalLM

import alignzoo
from alignzoo.recipe import load_recipe
from alignzoo.rundir import RunDir

LINE = re.compile(
    r"reference log-probs: (\d+) of (\d+) completions from the cache, (\d+) computed in [\d.]+ s \((.*)\)"
)
PLAIN = ("train.optimizer=sgd", "train.max_grad_norm=0", "train.lr_scheduler=constant", "samples.from_eval=0")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def recipe_file(tiny_folder: Path, tmp_path: Path) -> Path:
    """A recipe on the tiny model: 8 training and 3 held-out rows, two steps."""
    write_rows(tmp_path, 8, 3)
    (tmp_path / "dpo.toml").write_text(
        f'[loss]\nname = "dpo"\n[model]\npath = "{tiny_folder}"\n[data]\ntrain = "train.jsonl"\neval = "eval.jsonl"\n'
        f'[train]\nlearning_rate = 0.1\nbatch_size = 4\nwarmup_ratio = 0.0\n[output]\ndir = "{tmp_path / "runs"}"\n'
        '[engine]\ndevice = "cpu"\n'
    )
    return tmp_path / "dpo.toml"


def write_rows(folder: Path, train: int, held_out: int) -> None:
    for name, count in (("train", train), ("eval", held_out)):
        lines = (REPO / f"recipes/data/shop_{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(recipe: Path, *sets: str, **live: Any) -> tuple[Any, str]:
    """A run, and what it said."""
    console = Console(file=io.StringIO(), width=300)
    result = alignzoo.run(load_recipe(recipe, [*PLAIN, *sets]), console=console, **live)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def counts(said: str) -> tuple[int, int, int]:
    """Completions from the cache, all of them, computed."""
    found = LINE.findall(said)
    assert len(found) == 1, said
    return int(found[0][0]), int(found[0][1]), int(found[0][2])


def weights(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def apart(one: Path, other: Path, start: Path) -> float:
    """Of two updates, relative L2."""
    a, b, s = weights(one), weights(other), weights(start)
    assert (b - s).norm() / s.norm() > 1e-5
    return float((a - b).norm() / (b - s).norm())


def records(result: Any) -> list[dict[str, float]]:
    return RunDir(result.run_dir).read_metrics()
