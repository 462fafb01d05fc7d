"""The commands about plugins: what they bring, and `alignzoo new-plugin`. As cli.py, it imports no torch by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alignzoo.api import KINDS

if TYPE_CHECKING:
    from alignzoo.plugins import Registry


@click.command("new-plugin")
@click.argument("name")
@click.option("--data", type=click.Choice(list(KINDS)), default="pairs", show_default=True,
              help="The kind of data that the loss learns from.")  # fmt: skip
@click.option("--loss", metavar="NAME", help="The loss's name in recipes, where it is to be another one.")
def new_plugin(name: str, data: str, loss: str | None) -> None:
    """Write a plugin into the new folder NAME: a distribution with a loss, tests, a recipe and rows.

    It installs, passes its tests and trains as it stands; then put in a formula of your own.
    """
    from alignzoo.newplugin import new_plugin as write

    folder = write(name, data, loss)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    click.echo(f"written: {folder}")
    for file in files:
        click.echo(f"  {file}")
    click.echo(f"next: cd {folder} && pip install -e '.[dev]' && pytest && alignzoo run recipe.toml")


@click.command()
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


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plugin", "plugins", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="A Python file with a reward plugin that is not installed. May be repeated.")  # fmt: skip
def rewards(as_json: bool, plugins: tuple[Path, ...]) -> None:
    """List the rewards that recipes can name, with their settings."""
    from alignzoo.plugins import discover, reward_table
    from alignzoo.tables import print_named

    registry = discover(plugins)
    rows = reward_table(registry)
    _echo_json(rows, registry) if as_json else print_named(rows, registry)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plugin", "plugins", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="A Python file with a callback that is not installed. May be repeated.")  # fmt: skip
def callbacks(as_json: bool, plugins: tuple[Path, ...]) -> None:
    """List the callbacks that recipes can name, with their settings."""
    from alignzoo.plugin_kinds import CallbackInfo
    from alignzoo.plugins import discover, named_table
    from alignzoo.tables import print_named

    registry = discover(plugins)
    rows = named_table(registry, CallbackInfo)
    _echo_json(rows, registry) if as_json else print_named(rows, registry)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plugins(as_json: bool) -> None:
    """List the plugins that are installed, with what they bring: loaded, blocked, or broken with the error."""
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
