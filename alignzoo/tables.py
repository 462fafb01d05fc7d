"""What `alignzoo losses`, `rewards` and `plugins` print in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignzoo.data.agreement import AgreementReport
from alignzoo.plugin_kinds import ALL
from alignzoo.plugins import Registry

Rows = Sequence[Mapping[str, Any]]


def _warn(console: Console, registry: Registry) -> None:
    for warning in registry.warnings:
        console.print(f"WARNING: {warning}", markup=False, highlight=False)


def reference_in_words(row: Mapping[str, Any]) -> str:
    needs = row["needs_reference"]
    if isinstance(needs, bool):
        return "yes" if needs else "no"
    return f"by settings ({'yes' if row['needs_reference_by_default'] else 'no'})"


def setting_in_words(setting: Mapping[str, str]) -> str:
    """ "beta = 0.1 (> 0)" """
    allowed = f" ({setting['range']})" if setting["range"] else ""
    return f"{setting['name']} = {setting['default'] or 'none'}{allowed}"


def print_losses(rows: Rows, registry: Registry) -> None:
    """A block for each loss; broken plugins and doubled names are said below."""
    console = Console()
    for row in rows:
        doubled = " (doubled: recipes cannot name it)" if row["duplicate"] else ""
        head = f"{row['data']}, reference: {reference_in_words(row)}, from {row['distribution']} {row['version']}"
        console.print(f"[bold]{row['name']}[/bold]{doubled}  {head}", highlight=False)
        console.print(f"  {row['paper'] or 'no paper'}", highlight=False, markup=False)
        console.print(_settings_grid(row))
    _end(console, registry)


def print_named(rows: Rows, registry: Registry) -> None:
    """A block for each reward or callback; as `print_losses`."""
    console = Console()
    for row in rows:
        doubled = " (doubled: recipes cannot name it)" if row["duplicate"] else ""
        head = f"from {row['distribution']} {row['version']}"
        console.print(f"[bold]{row['name']}[/bold]{doubled}  {head}", highlight=False)
        console.print(f"  {row['summary'] or 'no description'}", highlight=False, markup=False)
        console.print(_settings_grid(row))
    _end(console, registry)


def _settings_grid(row: Mapping[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for setting in row["settings"]:
        grid.add_row("", Text(setting_in_words(setting)), Text(setting["help"]))  # [x] in a str would be markup
    return grid


def _end(console: Console, registry: Registry) -> None:
    """Warnings, and the plugins that are broken."""
    _warn(console, registry)
    for status in registry.statuses():
        if status.state == "broken":
            line = f'broken plugin "{status.label}" ({status.distribution} {status.version}): {status.error}'
            console.print(line, markup=False, highlight=False)


def print_plugins(rows: Rows, registry: Registry) -> None:
    """A table of all plugins, with the error of each broken one."""
    console = Console()
    table = Table(title="plugins", show_lines=True)
    for column in ("label", "distribution", "version", "state", "what it brings, or error"):
        table.add_column(column, overflow="fold")
    for row in rows:
        brings = [f"{kind.kinds}: {', '.join(row[kind.kinds])}" for kind in ALL if row[kind.kinds]]
        what = row["error"] or "\n".join(brings) or "-"
        cells = (row["label"], row["distribution"], row["version"], row["state"], what)
        table.add_row(*map(Text, cells))  # [x] in an error would be markup
    console.print(table)
    _warn(console, registry)


def print_agreement(report: AgreementReport, console: Console) -> None:
    """The pairs of annotators, then each of them, then what somebody should look at."""
    pairs = Table(title="agreement", title_justify="left")
    for column in ("annotators", "items of both", "equal", "Cohen's kappa", "first disagreements"):
        pairs.add_column(column, overflow="fold")
    for pair in report.pairs:
        kappa = "not defined" if pair.kappa is None else f"{pair.kappa:.3f}"
        cells = (f"{pair.a}, {pair.b}", str(pair.items), f"{pair.agreement:.1%}", kappa)
        pairs.add_row(*map(Text, (*cells, "\n".join(pair.disagreements[:3]))))
    people = Table(title="annotators", title_justify="left")
    for column in ("annotator", "answers", "labels", "right on gold rows", "too fast", "fastest"):
        people.add_column(column, overflow="fold")
    for one in report.annotators:
        gold = f"{one.right} of {one.gold} ({one.right / one.gold:.1%})" if one.gold else "no gold rows"
        fast = f"{one.fast} of {one.timed}" if one.timed else "no times"
        labels = ", ".join(f"{label} {count}" for label, count in one.labels.items())
        people.add_row(*map(Text, (one.name, str(one.answers), labels, gold, fast, "\n".join(one.fastest[:3]))))
    console.print(pairs, people)
    for warning in report.warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
