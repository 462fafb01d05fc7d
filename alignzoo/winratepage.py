"""A win rate in the terminal, as JSON and as a page. It imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from alignzoo import __version__
from alignzoo.asking import as_text
from alignzoo.judging import TIE, A, B
from alignzoo.lengthcontrol import RESAMPLES as REFITS
from alignzoo.pages import Table, page
from alignzoo.resampling import RESAMPLES, Estimate
from alignzoo.rundir import strict_json
from alignzoo.winning import Dimension, Pair, Results

if TYPE_CHECKING:
    from rich.table import Table as RichTable

LAYOUT = 1  # of results.json; grows when a reader of an older one would be misled
_SHOWN = 200  # pairs on the page
_NAMES = {A: "A", B: "B", TIE: "tie"}
_HEADER = ("verdict", "win rate of A", "length-controlled", "A / tie / B", "pairs", "position bias")


def as_json(found: Results) -> str:
    """Everything in numbers."""
    table: dict[str, Any] = {
        "layout": LAYOUT, "judge": found.judge, "a": found.names[A], "b": found.names[B], "prompts": len(found.pairs),
        "mean_characters": dict(found.characters), "verdict": found.verdict, "notes": list(found.notes),
        "intervals": f"bootstrap over prompts, {RESAMPLES} resamples ({REFITS} length-controlled), seed 0, 95 %",
        "dimensions": {one.name: {**asdict(one), "bias": one.bias} for one in found.dimensions},
    }  # fmt: skip
    return strict_json(table, "results.json", indent=2) + "\n"


def terminal_table(found: Results) -> RichTable:
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(*_HEADER, title=f"A: {found.names[A]}, B: {found.names[B]}", title_justify="left")
    for one in found.dimensions:
        table.add_row(*map(Text, _cells(one)))
    return table


def _cells(one: Dimension) -> list[str]:
    bias = "none" if one.bias is None else f"{one.bias:.1%}"
    if one.flips:
        bias += f" ({one.to_first} to the first, {one.flips - (one.to_first or 0)} to the second)"
    counts = f"{one.wins} / {one.ties} / {one.losses}"
    return [one.name, _estimate(one.rate), _estimate(one.controlled), counts, str(one.pairs), bias]


def _estimate(found: Estimate | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:.3f}" + ("" if found.low is None else f" ({found.low:.3f} to {found.high:.3f})")


def html(found: Results) -> str:
    header = [
        ("A", found.names[A]), ("B", found.names[B]), ("judge", found.judge), ("prompts", str(len(found.pairs))),
        ("mean length", f"{found.characters[A]:.0f} and {found.characters[B]:.0f} characters"),
    ]  # fmt: skip
    caption = (
        "Wins and half of the ties, of the pairs with a verdict; in brackets 95 % bootstrap intervals over the "
        "prompts. Position bias: the share of pairs in which the order of the answers decides; they count as ties."
    )
    left = len(found.pairs) - _SHOWN
    return page(
        "winrate.html",
        title=f"{found.names[A]} against {found.names[B]}",
        header=Table((), header),
        verdict=found.verdict,
        notes=list(found.notes),
        rates=Table(_HEADER, [_cells(one) for one in found.dimensions], caption),
        pair_header=["prompt", f"A: {found.names[A]}", f"B: {found.names[B]}", "verdicts"],
        pairs=[_row(found, pair) for pair in found.pairs[:_SHOWN]],
        left=f"{left} more pairs are not shown; they are in the .jsonl files beside this page." if left > 0 else "",
        footer=f"alignzoo {__version__}. This page needs no network and runs no script.",
    )


def _row(found: Results, pair: Pair) -> list[str]:
    verdicts = [f"{one.name}: {_in_words(pair, one.name, found.orders)}" for one in found.dimensions]
    return [as_text(pair.prompt), pair.answers[A], pair.answers[B], "\n".join(verdicts)]


def _in_words(pair: Pair, dimension: str, orders: Sequence[str]) -> str:
    """ "A", "tie", "tie (ab: A, ba: B)", "none" """
    each = pair.by_order(dimension, orders)
    if each is None:
        return "none"
    if len(set(each)) == 1:
        return _NAMES[each[0]]
    return f"tie ({', '.join(f'{order}: {_NAMES[one]}' for order, one in zip(orders, each, strict=True))})"
