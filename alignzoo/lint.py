"""`alignzoo data lint` for people: paths or a recipe in; a table, JSON or a page out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignzoo.check import find_loss, room_for_completions
from alignzoo.data.dataset import make_pipeline
from alignzoo.data.formats_found import check_formats
from alignzoo.data.lint import LintReport, lint
from alignzoo.data.lint_rules import Finding, Thresholds
from alignzoo.data.watch import Watch
from alignzoo.errors import RecipeError
from alignzoo.plugins import discover
from alignzoo.progress import sayer
from alignzoo.recipe import Data, Recipe, Source

_COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}
_NAMED = 3  # rows of a finding that the table names


def lint_paths(
    paths: Sequence[str],
    held: Sequence[str],
    limits: Thresholds,
    console: Console,
    *,
    split: str | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    plugin_files: Sequence[Path] = (),
) -> LintReport:
    """Files as they are, without tokenizer and template. held: the files that are evaluated on."""
    train, held_out = (
        [Source(path=path, split=split, format=format, columns=dict(columns or {})) for path in group]
        for group in (paths, held)
    )
    data = Data(train=paths[0], on_bad_row="skip")
    registry = discover(plugin_files)
    return lint(train, held_out, data, limits, Watch(sayer(console), console), registry=registry)


def lint_recipe(recipe: Recipe, limits: Thresholds, console: Console, plugin_files: Sequence[Path] = ()) -> LintReport:
    """The data of a recipe as a run would read and tokenise it. Loads the tokenizer, no weights."""
    registry = discover(plugin_files)
    _, loss = find_loss(recipe, registry)
    check_formats(recipe, registry)
    from alignzoo.model import load_tokenizer, locate  # torch: a misspelt loss is told before it is imported

    data = room_for_completions(recipe)
    tokenizer = load_tokenizer(
        locate(recipe.model.path, recipe.model.revision), trust_remote_code=recipe.model.trust_remote_code
    )
    train, held = (
        [Source(path=named, format=data.format)] if isinstance(named, str) else list(named or ())
        for named in (data.train, data.eval)
    )
    pipeline = make_pipeline(data, "prompts" if recipe.rollout is not None else loss.data, tokenizer)
    return lint(train, held, data, limits, Watch(sayer(console), console), pipeline=pipeline, registry=registry)


def check_words(paths: Sequence[str], recipe: Path | None, given: Sequence[str]) -> None:
    """Raises RecipeError unless there are paths, or a recipe and none of the options for paths."""
    if bool(paths) == bool(recipe):
        raise RecipeError("data lint takes PATH..., or --recipe R.toml", fix="give one of the two")
    if recipe and given:
        raise RecipeError(
            f"{', '.join(given)}: for paths, and the recipe says it itself", fix="write it into [data], or use --set"
        )


def print_report(report: LintReport, console: Console) -> None:
    """A table of the findings, the worst first, each with its worst rows."""
    for source in report.sources:
        side = ", held out" if source.held_out else ""
        counts = f"{source.rows} rows, {source.usable} usable"
        line = f"{source.path}: {counts}, of format {source.format} ({source.kind}){side}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(report.held_out, markup=False, highlight=False, soft_wrap=True)
    table = Table()
    for name in ("severity", "finding", "rows", "share"):
        table.add_column(name, no_wrap=True, justify="right" if name in ("rows", "share") else "left")
    table.add_column("what", overflow="fold")
    for f in report.findings:
        rows = (f"{f.count} of {f.of}", f"{f.share:.1%}")
        table.add_row(Text(f.severity, style=_COLOURS[f.severity]), Text(f.id), *rows, Text(f.what))
    console.print(table)
    for finding in report.findings:
        _print_finding(finding, console)
    if not report.tokens:
        words = "templates, tokens and lengths were not looked at: alignzoo data lint --recipe R.toml does"
        console.print(words, markup=False, highlight=False, soft_wrap=True)
    console.print(", ".join(f"{n} {severity}(s)" for severity, n in report.counts().items()), highlight=False)


def _print_finding(finding: Finding, console: Console) -> None:
    console.print(Text(f"{finding.severity}: {finding.id}", style=_COLOURS[finding.severity]))
    parts = {"": finding.detail, "in training: ": finding.causes, "to do: ": finding.fix}
    lines = [f"{name}{words}" for name, words in parts.items() if words]
    lines += [f"{row.where}: {row.detail}" if row.detail else row.where for row in finding.rows[:_NAMED]]
    if finding.count > _NAMED < len(finding.rows):
        lines.append(f"... --html FILE and --json name {len(finding.rows)} rows, with their texts")
    for line in lines:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def as_json(report: LintReport) -> str:
    return json.dumps(report.table(), indent=2, ensure_ascii=True)
