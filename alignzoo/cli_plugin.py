"""The command `alignzoo new-plugin`. As cli.py, it imports no torch by itself."""

from __future__ import annotations

import click

from alignzoo.api import KINDS


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
