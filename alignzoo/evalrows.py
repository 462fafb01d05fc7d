"""eval_rows.json: what the policy makes of each held-out row, in numbers that mean the same for every loss.

For each completion of a row the sum of its log-probs and its counted tokens; from these follow accuracies and margins
by log-prob, by log-prob per token and by log-ratio to the start model, row by row, whatever was trained. Rows of
different runs are paired by `row_name`, a hash of their token ids. It imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from alignzoo.errors import AlignzooError
from alignzoo.rundir import atomic_write, strict_json

if TYPE_CHECKING:
    from torch import Tensor

    from alignzoo.batch import Layout
    from alignzoo.tree import Tree

FILE = "eval_rows.json"
_DIGITS = 4  # of what is written, in nats
Sums = npt.NDArray[np.float64]


@dataclass
class RowScores:
    """Sums over completions that one rank has seen in an evaluation, by (row, slot)."""

    policy: dict[tuple[int, int], float] = field(default_factory=dict)  # nats
    reference: dict[tuple[int, int], float] = field(default_factory=dict)  # nats; empty without a reference

    def look(self, layout: Layout, policy: Tensor, reference: Tensor | None) -> None:
        """Adds the rows of a micro-batch. policy, reference: (N, T), nats."""
        for into, table in ((self.policy, policy), (self.reference, reference)):
            if table is not None:
                sums = np.where(layout.mask, table.detach().double().cpu().numpy(), 0.0).sum(-1)
                into.update(zip(layout.keys, sums.tolist(), strict=True))

    @classmethod
    def merged(cls, ranks: Sequence[RowScores]) -> RowScores:
        whole = cls()
        for one in ranks:
            whole.policy |= one.policy
            whole.reference |= one.reference
        return whole

    @staticmethod
    def table(sums: Mapping[tuple[int, int], float], trees: Sequence[Tree]) -> list[list[float]]:
        """A list for each row, trees in order, of the sums of its completions."""
        return [[round(sums[t.row, k], _DIGITS) for k in range(len(t.completions))] for t in trees]


def row_name(tree: Tree) -> str:
    """What a row is known by in all runs: a hash of the token ids of its prompt and of all its completions."""
    from alignzoo.refstore import row_key  # its module takes longer to import than all others that a report needs

    keys = [row_key(tree.prompt, completion.ids) for completion in tree.completions]
    return hashlib.blake2b(b"".join(keys), digest_size=12).hexdigest()


def write_eval_rows(folder: Path, step: int, trees: Sequence[Tree], scores: RowScores) -> None:
    """Adds an evaluation to a run's file. Those of later steps, which an interrupted run left, are dropped.

    Nothing is written where there are no rows: none are held out, or the evaluation itself has made their answers.
    """
    if not trees:
        return
    path = folder / FILE
    names = [row_name(tree) for tree in trees]
    found = json.loads(path.read_bytes()) if path.exists() else None
    if found is None or [row["name"] for row in found["rows"]] != names:
        rows = [
            {"name": name, "where": tree.where, "tokens": [c.counted for c in tree.completions]}
            for name, tree in zip(names, trees, strict=True)
        ]
        reference = RowScores.table(scores.reference, trees) if scores.reference else None
        found = {"rows": rows, "reference": reference, "evaluations": []}
    kept = [one for one in found["evaluations"] if one["step"] < step]
    found["evaluations"] = [*kept, {"step": step, "policy": RowScores.table(scores.policy, trees)}]
    atomic_write(path, (strict_json(found, FILE) + "\n").encode("utf-8"))


@dataclass(frozen=True, eq=False)
class EvalRows:
    """The held-out rows of a run, R of them with K completions each: (chosen, rejected) where they are pairs."""

    names: tuple[str, ...]  # see row_name
    where: tuple[str, ...]  # "file:line"
    tokens: Sums  # (R, K) counted tokens
    reference: Sums | None  # (R, K) nats, of the reference at the first evaluation; None without one
    policy: Mapping[int, Sums]  # step -> (R, K) nats


def read_eval_rows(folder: Path) -> EvalRows | None:
    """What `write_eval_rows` wrote; None where the run has no held-out rows, or was made before there was such a file.

    Of rows with different numbers of completions (groups) the first one of each is read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        rows = found["rows"]
        k = min(len(row["tokens"]) for row in rows)
        k = k if all(len(row["tokens"]) == k for row in rows) else 1

        def table(values: Sequence[Sequence[float]]) -> Sums:
            return np.array([row[:k] for row in values], dtype=np.float64)

        reference = None if found["reference"] is None else table(found["reference"])
        policy = {int(one["step"]): table(one["policy"]) for one in found["evaluations"]}
        names, where = tuple(row["name"] for row in rows), tuple(row["where"] for row in rows)
        return EvalRows(names, where, table([row["tokens"] for row in rows]), reference, policy)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AlignzooError(f"{path}: cannot be read", why=str(error), fix="run it again, or move the file") from error
