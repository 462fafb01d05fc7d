"""Run directories as finished runs leave them, made without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from conftest import make_trees

from alignzoo.evalrows import FILE, RowScores, write_eval_rows
from alignzoo.readrun import LOG, SAMPLES
from alignzoo.tree import Tree

Sums = Mapping[int, Sequence[Sequence[float]]]  # step -> for each row the log-probs of its completions, in nats


def write_run(
    folder: Path,
    trees: Sequence[Tree],
    sums: Sums,
    *,
    loss: str = "dpo",
    seed: int = 42,
    reference: Sequence[Sequence[float]] | None = None,
    samples: Sequence[tuple[str, str, str]] = (),
    said: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    manifest: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    records: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """A finished run with these held-out log-probs. settings: sections of the recipe over the usual ones."""
    (folder / "model").mkdir(parents=True)
    recipe: dict[str, Any] = {
        "loss": {"name": loss}, "model": {"path": "/start"}, "data": {"train": "t", "eval": "e"},
        "train": {"learning_rate": 0.1, "seed": seed}, "output": {"dir": str(folder.parent)},
        "log": {"run_name": folder.name},
    }  # fmt: skip
    for name, section in (settings or {}).items():
        recipe[name] = {**recipe.get(name, {}), **section}
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    made_from = {
        "command": ["alignzoo", "run"], "seed": seed, "alignzoo": "1", "versions": {"torch": "2"},
        "data": {"train: t": "a" * 64, "eval: e": "b" * 64}, "weights": {"model.safetensors": "c" * 64},
        **(manifest or {}),
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(made_from))
    figures = {"recipe": "made", "loss": loss, "steps": max(sums, default=0), "seconds": 2.0, **(summary or {})}
    (folder / "summary.json").write_text(json.dumps(figures))
    lines = [{"prompt": p, "before": b, "after": a} for p, b, a in samples]
    (folder / SAMPLES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / LOG).write_text("".join(f"{line}\n" for line in said))
    records = [*records, *({"step": step, "eval_loss": 1.0 / (step + 1)} for step in sorted(sums))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for step, table in sums.items():
        write_eval_rows(folder, step, trees, scores_of(trees, table, reference))
    assert (folder / FILE).exists() == bool(sums)
    return folder


def scores_of(
    trees: Sequence[Tree], sums: Sequence[Sequence[float]], reference: Sequence[Sequence[float]] | None = None
) -> RowScores:
    def keyed(table: Sequence[Sequence[float]]) -> dict[tuple[int, int], float]:
        return {(t.row, k): float(v) for t, row in zip(trees, table, strict=True) for k, v in enumerate(row)}

    return RowScores(keyed(sums), {} if reference is None else keyed(reference))


def made_pairs(rows: int, lead: float, seed: int = 0) -> tuple[list[Tree], dict[int, list[list[float]]]]:
    """Pairs, and log-probs at steps 0 and 4: the chosen side gains `lead` nats more than the other, with noise of 1.

    seed: of the noise; the start is the same for all
    """
    start = np.random.default_rng(0).normal(-40, 5, (rows, 2))
    gained = np.random.default_rng([seed, 1]).normal(0, 1, (rows, 2))
    gained[:, 0] += lead
    return make_trees(rows), {0: start.tolist(), 4: (start + gained).tolist()}
