"""The commands about data: `alignzoo data ...` and `alignzoo suggest`. As cli.py, it imports no torch by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--plugin and --set, of all commands that read a recipe."""
    for option in (
        click.option("--plugin", "plugins", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
                     help="A Python file with a plugin that is not installed. May be repeated."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
                     help="Override a key, e.g. train.learning_rate=1e-5. May be repeated."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.group()
def data() -> None:
    """Look at data files."""


def columns_of(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """OURS=THEIRS, several times, as a dictionary."""
    pairs = [value.partition("=") for value in values]
    for ours, equals, theirs in pairs:
        if not (ours and equals and theirs):
            raise click.BadParameter(f'"{ours}{equals}{theirs}" is not OURS=THEIRS', context, parameter)
    return {ours: theirs for ours, _, theirs in pairs}


@data.command("show")
@click.argument("path")
@click.option("--rows", default=3, show_default=True, type=click.IntRange(1), help="How many rows to print.")
@click.option("--split", default=None, help="Split of a saved or hub data set.")
@click.option("--format", default="auto", show_default=True, help="Format of the rows; auto: found from the columns.")
@click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", callback=columns_of,
              help="Read THEIRS as our column OURS, e.g. prompt=question. May be repeated.")  # fmt: skip
@click.option("--plugin", "plugins", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="A Python file with a plugin that is not installed. May be repeated.")  # fmt: skip
def data_show(
    path: str, rows: int, split: str | None, format: str, columns: dict[str, str], plugins: tuple[Path, ...]
) -> None:
    """Print what alignzoo reads from PATH: format, kind, columns, counts and the first rows.

    Brackets stand around what a loss learns.
    """
    from rich.console import Console

    from alignzoo.data.show import show_rows
    from alignzoo.plugins import discover

    registry = discover(plugins)
    Console().print(show_rows(path, rows, split=split, format=format, columns=columns, registry=registry))


@data.command("lint")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option("--recipe", type=click.Path(path_type=Path), metavar="R.toml",
              help="Look at the data of a recipe, with its template, tokenizer and lengths.")  # fmt: skip
@click.option("--eval", "held", multiple=True, metavar="PATH", help="What is held out. May be repeated.")
@click.option("--split", default=None, help="Split of saved or hub data sets.")
@click.option("--format", default="auto", show_default=True, help="Format of the rows; auto: found from the columns.")
@click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", callback=columns_of,
              help="Read THEIRS as our column OURS. May be repeated.")  # fmt: skip
@recipe_options
@click.option("--near", default=0.8, show_default=True, type=click.FloatRange(0.5, 1),
              help="Similarity from which texts are nearly the same.")  # fmt: skip
@click.option("--length-bias", default=0.65, show_default=True, type=click.FloatRange(0.5, 1),
              help="Part of the pairs whose longer (or shorter) answer is chosen that is a warning.")  # fmt: skip
@click.option("--balance", default=0.2, show_default=True, type=click.FloatRange(0, 0.5),
              help="Part of the rows below which a label is rare.")  # fmt: skip
@click.option("--minor", default=0.01, show_default=True, type=click.FloatRange(0, 1),
              help="Part of the rows below which a warning is a note.")  # fmt: skip
@click.option("--rows", default=10, show_default=True, type=click.IntRange(1), help="Worst rows of each finding.")
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings too.")
@click.option("--json", "to_json", is_flag=True, help="Print JSON.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Write a page with the worst rows.")  # fmt: skip
@click.pass_context
def data_lint(
    context: click.Context,
    paths: tuple[str, ...],
    recipe: Path | None,
    held: tuple[str, ...],
    split: str | None,
    format: str,
    columns: dict[str, str],
    overrides: tuple[str, ...],
    plugins: tuple[Path, ...],
    near: float,
    length_bias: float,
    balance: float,
    minor: float,
    rows: int,
    strict: bool,
    to_json: bool,
    html: Path | None,
) -> None:
    """Look for what is wrong with the data of PATHs, or of a recipe.

    The exit code is 1 with an error, and with --strict also with a warning.
    """
    from rich.console import Console

    from alignzoo.data.lint_rules import Thresholds
    from alignzoo.lint import as_json, check_words, lint_paths, lint_recipe, print_report
    from alignzoo.recipe import load_recipe

    options = {"--eval": held, "--split": split, "--format": format != "auto", "--column": columns}
    check_words(paths, recipe, [name for name, given in options.items() if given])
    console, limits = Console(stderr=to_json), Thresholds(near, length_bias, balance, minor, rows)
    if recipe:
        report = lint_recipe(load_recipe(recipe, overrides), limits, console, plugins)
    else:
        report = lint_paths(paths, held, limits, console, split=split, format=format, columns=columns,
                            plugin_files=plugins)  # fmt: skip
    if html:
        from alignzoo.lint_page import write_page

        write_page(report, html)
        click.echo(f"page: {html}", err=to_json)
    click.echo(as_json(report)) if to_json else print_report(report, console)
    context.exit(report.exit_code(strict))


@data.command("agreement")
@click.argument("path", metavar="FILE")
@click.option("--annotators", required=True, metavar="A,B[,C]",
              help="Columns of FILE, or with a row for each answer the values of its column annotator.")  # fmt: skip
@click.option("--gold", default="gold", show_default=True, help="Column with the right label, where it is known.")
@click.option("--label-column", "label", default="label", show_default=True, help="With a row for each answer.")
@click.option("--annotator-column", "annotator", default="annotator", show_default=True,
              help="With a row for each answer.")  # fmt: skip
@click.option("--item-column", "item", default="id", show_default=True,
              help="With a row for each answer: what it is about; the other columns if there is none.")  # fmt: skip
@click.option("--seconds", default="seconds", show_default=True,
              help="Column with the time of an answer; A_seconds where annotators have columns.")  # fmt: skip
@click.option("--words-per-minute", default=1000.0, show_default=True, type=click.FloatRange(0, min_open=True),
              help="Reading faster than this is implausible.")  # fmt: skip
@click.option("--strict", is_flag=True, help="Exit with 1 for a warning.")
@click.option("--json", "to_json", is_flag=True, help="Print JSON.")
@click.pass_context
def data_agreement(
    context: click.Context,
    /,
    path: str,
    annotators: str,
    words_per_minute: float,
    strict: bool,
    to_json: bool,
    **columns: str,
) -> None:
    """Compare annotators: Cohen's kappa (below 0.6 is a warning), accuracy on gold rows, implausibly fast answers."""
    from rich.console import Console

    from alignzoo.data.agreement import Columns, agreement
    from alignzoo.recipe import Source
    from alignzoo.tables import print_agreement

    names = [name.strip() for name in annotators.split(",") if name.strip()]
    if len(set(names)) < max(2, len(names)):
        raise click.UsageError("--annotators: at least two different names, separated by commas")
    report = agreement(Source(path=path), names, Columns(**columns), words_per_minute)
    click.echo(json.dumps(report.table(), indent=2)) if to_json else print_agreement(report, Console())
    context.exit(int(strict and bool(report.warnings)))


@click.command()
@click.argument("path", metavar="DATA")
@click.option("--split", default=None, help="Split of a saved or hub data set.")
@click.option("--format", default="auto", show_default=True, help="Format of the rows; auto: found from the columns.")
@click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", callback=columns_of,
              help="Read THEIRS as our column OURS. May be repeated.")  # fmt: skip
@click.option("--plugin", "plugins", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="A Python file with a plugin that is not installed. May be repeated.")  # fmt: skip
@click.option("--json", "to_json", is_flag=True, help="Print JSON.")
def suggest(
    path: str, split: str | None, format: str, columns: dict[str, str], plugins: tuple[Path, ...], to_json: bool
) -> None:
    """Say which of the installed losses fit DATA, and why."""
    from rich.console import Console

    from alignzoo.plugins import discover
    from alignzoo.recipe import Source
    from alignzoo.suggest import print_suggestion
    from alignzoo.suggest import suggest as compare

    source = Source(path=path, split=split, format=format, columns=columns)
    found = compare(source, discover(plugins))
    click.echo(json.dumps(found.table(), indent=2)) if to_json else print_suggestion(found, Console())
