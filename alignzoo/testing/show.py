"""What `alignzoo conform` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignzoo.testing.suite import Result

_STYLES = {"holds": "green", "fails": "bold red", "not tested": "dim"}


def print_results(results: Sequence[Result], console: Console) -> None:
    """A table of the checks of one loss, or of several losses; then each failure in full."""
    names = list(dict.fromkeys(result.loss for result in results))
    console.print(_of_one(results) if len(names) == 1 else _of_many(results, names))
    for result in results:
        if result.verdict.state == "fails":
            console.print(Text(result.message()), soft_wrap=True)
            console.print()


def _of_one(results: Sequence[Result]) -> Table:
    table = Table(title=f"conformance of {results[0].loss}", box=SIMPLE_HEAD)
    for column in ("check", "result", "what holds"):
        table.add_column(column, overflow="fold")
    for result in results:
        verdict = result.verdict
        note = "see below" if verdict.state == "fails" else verdict.what
        words = Text(result.check.holds + (f" ({note})" if note else ""))
        table.add_row(result.check.name, Text(verdict.state, _STYLES[verdict.state]), words)
    return table


def _of_many(results: Sequence[Result], names: Sequence[str]) -> Table:
    table = Table(title="conformance", box=SIMPLE_HEAD)
    for column in ("loss", "holds", "fails", "not tested"):
        table.add_column(column, overflow="fold")
    for name in names:
        own = [r for r in results if r.loss == name]
        holds, fails, left = ([r.check.name for r in own if r.verdict.state == state] for state in _STYLES)
        red = Text(", ".join(fails) or "-", _STYLES["fails"] if fails else "")
        table.add_row(name, str(len(holds)), red, Text(", ".join(left), _STYLES["not tested"]))
    return table
