"""Cases with known results as JSON: rows in, numbers out. The format is in docs/conformance.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignzoo import schema
from alignzoo.api import Loss
from alignzoo.errors import DataError
from alignzoo.testing import choices
from alignzoo.testing.kit import Check, Subject, Verdict, raised
from alignzoo.testing.rows import Rows
from alignzoo.testing.step import run
from alignzoo.tree import Completion, Tree

_NAMES = {"pairs": ("chosen", "rejected")}
_ROW = ("label", "rewards", "truncated", "extra")
_RESULTS = ("values", "loss", "gradient", "metrics")
_CASE = ("settings", "before", "rows", *_RESULTS)


def load(path: Path) -> list[dict[str, Any]]:
    """The cases of a file. Raises DataError where it is not such a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"the fixtures {path} cannot be read: {error}") from error
    if not isinstance(content, list) or not content:
        raise DataError(f"the fixtures {path} are not a list of cases", fix="see docs/conformance.md")
    for number, case in enumerate(content, start=1):
        where = f"{path}, case {number}"
        for key in case:
            if key not in _CASE:
                raise DataError(f'{where}: unknown key "{key}"{schema.nearest(key, _CASE)}')
        if not case.get("rows") or not set(_RESULTS) & case.keys():
            raise DataError(f'{where}: it needs "rows", and one of {", ".join(_RESULTS)}')
    return content


def rows_of(kind: str, given: Sequence[Mapping[str, Any]], where: str) -> Rows:
    """Rows of a kind of data from plain lists of log-probs. Raises DataError for one that does not fit."""
    trees, starts, values = [], {}, {name: list[float]() for name in ("policy", "reference", "old", "sampler")}
    for row, entry in enumerate(given):
        names = _NAMES.get(kind, ("completion",))
        known = (*names, "completions", "mismatched", *_ROW)
        for key in entry:
            if key not in known:
                raise DataError(f'{where}, row {row + 1}: unknown key "{key}"{schema.nearest(key, known)}')
        sides = list(entry["completions"]) if kind == "groups" else [entry[name] for name in names]
        branches = [*sides, *([entry["mismatched"]] if "mismatched" in entry else [])]
        for slot, side in enumerate(branches):
            starts[row, slot] = len(values["policy"])
            values["policy"] += side["policy"]
            values["reference"] += side.get("reference", [-1.0] * len(side["policy"]))
            values["old"] += side.get("old", [])
            values["sampler"] += side.get("sampler", [])
        made = [Completion(np.arange(1, 1 + len(s["policy"]), dtype=np.int32), _mask(s)) for s in branches]
        trees.append(
            Tree(
                row, np.ones(1, np.int32), tuple(made[: len(sides)]), f"{where}, row {row + 1}",
                label=entry.get("label"), rewards=_rewards(entry), truncated=_tuple(entry.get("truncated")),
                extra=entry.get("extra", {}), mismatched=made[-1] if "mismatched" in entry else None,
            )
        )  # fmt: skip
    tables = {name: torch.tensor(found, dtype=torch.float64) for name, found in values.items() if found}
    policy = tables["policy"]
    for name, table in tables.items():
        if len(table) != len(policy):
            raise DataError(f'{where}: "{name}" has {len(table)} numbers for {len(policy)} tokens')
    stats = {"entropy": -policy, "log_sum_sq_probs": policy, "is_top1": policy > -0.5}
    return Rows(tuple(trees), starts, stats=stats, **tables)


def _mask(side: Mapping[str, Any]) -> Any:
    return np.array(side["mask"], bool) if "mask" in side else None


def _tuple(values: Any) -> Any:
    return None if values is None else tuple(values)


def _rewards(entry: Mapping[str, Any]) -> tuple[float, ...] | None:
    """null is a completion without a reward."""
    if "rewards" not in entry:
        return None
    return tuple(math.nan if reward is None else float(reward) for reward in entry["rewards"])


def check_fixtures(cls: type[Loss], path: Path) -> None:
    """Raises DataError where a file has no cases, or rows that are not of the loss's kind of data."""
    for number, case in enumerate(load(path), start=1):
        where = f"{path}, case {number}"
        try:
            rows_of(cls.data, case.get("before", []) + case["rows"], where)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{where}: {type(error).__name__}: {error}", fix="see docs/conformance.md") from error


def _fault(loss: Loss, case: Mapping[str, Any], where: str) -> str:
    state = run(loss, rows_of(loss.data, case["before"], where)).state if "before" in case else None
    outcome = run(loss, rows_of(loss.data, case["rows"], where), state=state)
    pairs = [(f"metric {name}", outcome.metrics.get(name, math.nan), v) for name, v in case.get("metrics", {}).items()]
    pairs += [("the loss", outcome.loss.item(), case["loss"])] if "loss" in case else []
    lists = {"values": ("unit", outcome.values()), "gradient": ("token", outcome.gradient.tolist())}
    for key, (one, found) in lists.items():
        wanted = case.get(key, found)
        if len(found) != len(wanted):
            return f"it has {len(found)} {one}s and the fixture {len(wanted)} {key}"
        pairs += [(f"{key} of {one} {i}", f, v) for i, (f, v) in enumerate(zip(found, wanted, strict=True))]
    wrong = [(name, f, v) for name, f, v in pairs if not abs(f - v) <= 1e-9 + 1e-6 * abs(v)]
    return f"{wrong[0][0]} is {wrong[0][1]:.9g} and the fixture has {wrong[0][2]:.9g}" if wrong else ""


def _fixtures(subject: Subject) -> Verdict:
    if subject.fixtures is None:
        return Verdict("not tested", "no fixtures were given")
    cases = load(subject.fixtures)
    for number, case in enumerate(cases, start=1):
        where = f"{subject.fixtures}, case {number}"
        settings = tuple(case.get("settings", {}).items())
        loss = choices.make(subject.cls, settings)
        try:
            what = "it refuses the settings" if loss is None else _fault(loss, case, where)
        except Exception as error:
            what = raised(error)
        if what:
            return Verdict("fails", what, where)
    return Verdict("holds", f"{len(cases)} case{'s' * (len(cases) > 1)}")


FIXTURES = Check(
    "fixtures",
    "the numbers of the author's fixtures",
    "the loss was changed, or the fixture was worked with other settings",
    "work the case by hand",
    _fixtures,
)
