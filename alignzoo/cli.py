"""The command line: each command reads its words and calls one function. It imports no torch by itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alignzoo import __version__
from alignzoo.errors import AlignzooError

if TYPE_CHECKING:
    from alignzoo.plugins import Registry


class _Group(click.Group):
    """Prints an AlignzooError without a traceback and exits with its code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AlignzooError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted: what was written to the run directory stays there", err=True)
            ctx.exit(130)


def _recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--plugin", "plugins", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
                     help="A Python file with a loss plugin that is not installed. May be repeated."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
                     help="Override a key, e.g. train.learning_rate=1e-5. May be repeated."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="alignzoo")
def cli() -> None:
    """A zoo of LLM alignment algorithms: one recipe, any loss plugin, one shared engine."""


@cli.command()
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RECIPE...")
@_recipe_options
def run(recipes: tuple[Path, ...], overrides: tuple[str, ...], plugins: tuple[Path, ...]) -> None:
    """Train a model as RECIPE says.

    With several recipes each starts from the model that the one before has trained. --set and --plugin hold for all.
    """
    from alignzoo.recipe import load_recipe

    for path in recipes:  # a mistake is told at once: the next import takes seconds
        load_recipe(path, overrides)
    from alignzoo.runner import run_chain

    run_chain(recipes, overrides, plugins, command=sys.argv)


@cli.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@_recipe_options
def check(recipe: Path, overrides: tuple[str, ...], plugins: tuple[Path, ...]) -> None:
    """Check RECIPE: everything short of loading the weights."""
    from alignzoo.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from rich.console import Console

    from alignzoo.check import check as run_check

    run_check(loaded, Console(), plugins)


@cli.group()
def data() -> None:
    """Look at data files."""


def _columns(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
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
@click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", callback=_columns,
              help="Read THEIRS as our column OURS, e.g. prompt=question. May be repeated.")  # fmt: skip
def data_show(path: str, rows: int, split: str | None, format: str, columns: dict[str, str]) -> None:
    """Print what alignzoo reads from PATH: format, kind, columns, counts and the first rows.

    Brackets stand around what a loss learns.
    """
    from rich.console import Console

    from alignzoo.data.show import show_rows

    Console().print(show_rows(path, rows, split=split, format=format, columns=columns))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plugin", "plugins", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="A Python file with a loss plugin that is not installed. May be repeated.")  # fmt: skip
def losses(as_json: bool, plugins: tuple[Path, ...]) -> None:
    """List the losses that recipes can name, with their settings."""
    from alignzoo.plugins import discover, loss_table
    from alignzoo.tables import print_losses

    registry = discover(plugins)
    rows = loss_table(registry)
    _echo_json(rows, registry) if as_json else print_losses(rows, registry)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plugins(as_json: bool) -> None:
    """List the plugins that are installed: loaded, blocked, or broken with the error."""
    from alignzoo.plugins import discover, plugin_table
    from alignzoo.tables import print_plugins

    registry = discover()
    rows = plugin_table(registry)
    _echo_json(rows, registry) if as_json else print_plugins(rows, registry)


def _echo_json(rows: list[dict[str, Any]], registry: Registry) -> None:
    """The rows on stdout, and warnings where they cannot spoil them."""
    for warning in registry.warnings:
        click.echo(f"WARNING: {warning}", err=True)
    click.echo(json.dumps(rows, indent=2))
