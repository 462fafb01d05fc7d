"""`alignzoo score`: what a model, and a reference beside it, makes of preference pairs, row by row.

Log-probs come through the cache of reference log-probs (see precompute.py), so what any run has computed of a model is
not computed again, and an interrupted command goes on where it stopped.

With a reference the reward of an answer is beta (log pi - log ref) (DPO, arXiv:2305.18290, equation 5 without the term
of the prompt); without one its log-prob per token. margin: of the chosen over the rejected one; probability: sigmoid of
it, the Bradley-Terry model; uncertainty: 1 - 2 |probability - 1/2|.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from alignzoo.check import make_job
from alignzoo.data.sources import open_source
from alignzoo.engine import Engine
from alignzoo.errors import DataError
from alignzoo.expression import Expression
from alignzoo.loading import check_head, choose_layout, load_models
from alignzoo.precompute import Precompute
from alignzoo.progress import Say, sayer
from alignzoo.recipe import Source, load_recipe
from alignzoo.reference import Cached
from alignzoo.rundir import atomic_write
from alignzoo.sharding import make_accelerator
from alignzoo.tree import Completion, Tree

NUMBERS = (
    "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens", "chosen_reward", "rejected_reward", "margin",
    "probability", "uncertainty",
)  # fmt: skip
OF_REFERENCE = ("chosen_reference_logp", "rejected_reference_logp")
_SAID = ("loss:", "reference:", "steps:", "dropout:")  # of a run's lines, what means nothing here
Scores = dict[str, float]


@dataclass(frozen=True)
class Asked:
    """What is scored, and what is kept of it. keep: over NUMBERS; most: so many rows, the most uncertain first."""

    path: str
    model: str
    reference: str | None = None
    beta: float = 0.1
    by: str | None = None  # a column of categories
    keep: Expression | None = None
    most: int | None = None


def score(asked: Asked, out: Path, overrides: Sequence[str], console: Console) -> None:
    """Writes the rows with their scores to a JSON Lines file, and prints the accuracy, by category where asked.

    Raises AlignzooError; `out` is written at the end, whole.
    """
    say = sayer(console)
    if out.exists():
        raise DataError(f"{out} is there already", fix="give another name, or remove the file")
    trees, policy = _sums(asked.path, asked.model, overrides, console, say)
    reference = None
    if asked.reference is not None:
        reference = _sums(asked.path, asked.reference, overrides, console, lambda _line: None)[1]
    scored = [_scores(tree, policy[i], None if reference is None else reference[i], asked) for i, tree in
              enumerate(trees)]  # fmt: skip
    rows = _rows(asked, [tree.where for tree in trees])
    console.print(_accuracies(scored, [_category(asked, row) for row in rows], asked))
    chosen = _chosen(scored, asked)
    lines = [json.dumps({**rows[i], "scores": scored[i]}, ensure_ascii=False, default=str) for i in chosen]
    atomic_write(out, "".join(f"{line}\n" for line in lines).encode())
    left = "" if len(chosen) == len(trees) else f", {len(trees) - len(chosen)} left out"
    say(f"{len(chosen)} rows{left}: {out}")


def _sums(path: str, model: str, overrides: Sequence[str], console: Console, say: Say) -> tuple[list[Tree], Any]:
    """The pairs, and (rows, 2) sums of the log-probs of chosen and rejected under a model."""
    table = {
        "loss": {"name": "dpo"}, "model": {"path": model}, "data": {"train": path}, "reference": {"mode": "cache"},
        "train": {"learning_rate": 0.0, "batch_size": 1},
    }  # fmt: skip
    recipe = load_recipe(table, list(overrides))
    accelerator = make_accelerator(recipe)
    job = make_job(recipe, lambda line: None if line.startswith(_SAID) else say(line))
    filling = Precompute(job, accelerator, console)
    policy, _ = load_models(job, accelerator, say)
    engine = Engine(
        recipe, job.loss, policy, job.reference, None, accelerator, console=console, sink=lambda _line: None
    )
    check_head(job, engine)
    say(choose_layout(recipe, engine, job.data.train[0], recipe.data.max_length))
    filling.run(engine)
    found = engine.step_reference
    assert isinstance(found, Cached)
    trees = list(job.data.train)
    sums = np.array([[_sum(found, tree.row, k, c) for k, c in enumerate(tree.completions)] for tree in trees])
    engine.holder.close()
    return trees, sums


def _sum(table: Cached, row: int, slot: int, completion: Completion) -> float:
    number = table.first[row] + slot
    own = table.values[table.starts[number] : table.starts[number + 1]].astype(np.float64)
    return float(own.sum() if completion.mask is None else own[completion.mask].sum())


def _scores(tree: Tree, policy: Any, reference: Any | None, asked: Asked) -> Scores:
    lengths = np.array([completion.counted for completion in tree.completions])
    rewards = policy / lengths if reference is None else asked.beta * (policy - reference)
    margin = float(rewards[0] - rewards[1])
    probability = 1 / (1 + math.exp(-margin)) if margin > -700 else 0.0
    values = (*policy, *lengths, *rewards, margin, probability, 1 - 2 * abs(probability - 0.5))
    found = dict(zip(NUMBERS, (float(v) for v in values), strict=True))
    if reference is not None:
        found |= dict(zip(OF_REFERENCE, (float(v) for v in reference), strict=True))
    return found


def _rows(asked: Asked, wanted: Sequence[str]) -> list[Mapping[str, Any]]:
    """The rows of the file that the trees were made of, with all of their columns."""
    places = set(wanted)
    found = {row.where: row.values for row in open_source(Source(path=asked.path)).rows if row.where in places}
    return [found[where] for where in wanted]


def _category(asked: Asked, row: Mapping[str, Any]) -> str:
    if asked.by is None:
        return ""
    if asked.by not in row:
        raise DataError(f'{asked.path}: no column "{asked.by}"', why=f"the columns are {', '.join(row)}")
    return str(row[asked.by])


def _accuracies(scored: Sequence[Scores], categories: Sequence[str], asked: Asked) -> Table:
    """Where the chosen answer is preferred; a tie counts one half. "mean": over categories, as RewardBench has it."""
    sizes, right = Counter(categories), dict.fromkeys(categories, 0.0)
    for one, category in zip(scored, categories, strict=True):
        right[category] += 1.0 if one["margin"] > 0 else 0.5 if one["margin"] == 0 else 0.0
    table = Table(asked.by or "", "rows", "accuracy", title=f"chosen over rejected: {asked.model}")
    for category, rows in sorted(sizes.items()) if asked.by is not None else ():
        table.add_row(category, str(rows), f"{right[category] / rows:.3f}")
    if asked.by is not None:
        table.add_row("mean", str(len(sizes)), f"{sum(right[c] / n for c, n in sizes.items()) / len(sizes):.3f}")
    table.add_row("all", str(len(scored)), f"{sum(right.values()) / len(scored):.3f}")
    return table


def _chosen(scored: Sequence[Scores], asked: Asked) -> list[int]:
    """The rows that are written, in the order of the file, or the most uncertain first."""
    keep = asked.keep
    chosen = [i for i, one in enumerate(scored) if keep is None or keep.holds(one)]
    if asked.most is None:
        return chosen
    return sorted(chosen, key=lambda i: (-scored[i]["uncertainty"], i))[: asked.most]
