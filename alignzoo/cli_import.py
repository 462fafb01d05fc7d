"""The commands `alignzoo import ...`. As cli.py, it imports no torch by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from alignzoo.importing import Import

_FILE = click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE")
_OUT = click.option("--out", type=click.Path(path_type=Path), metavar="RECIPE",
                    help="Recipe to write; FILE with .toml, in this folder, if not given.")  # fmt: skip
_WORLD = click.option("--world", default=1, show_default=True, type=click.IntRange(1), metavar="N",
                      help="Processes that it was meant for: train.batch_size counts them in.")  # fmt: skip


@click.group("import")
def import_() -> None:
    """Make a recipe of another program's configuration, and say what became of each of its keys."""


@import_.command()
@_FILE
@click.option("--dataset-info", type=click.Path(path_type=Path), metavar="JSON",
              help="Its dataset_info.json; the one in its dataset_dir if not given.")  # fmt: skip
@_OUT
@_WORLD
def llamafactory(file: Path, dataset_info: Path | None, out: Path | None, world: int) -> None:
    """Of a LLaMA-Factory YAML file."""
    from alignzoo.import_llamafactory import convert

    _write(convert(file, dataset_info, world), file, out)


@import_.command()
@_FILE
@click.option("--trainer", required=True, type=click.Choice(["sft", "dpo", "kto"]), help="As in `trl dpo`.")
@_OUT
@_WORLD
def trl(file: Path, trainer: str, out: Path | None, world: int) -> None:
    """Of a YAML file for TRL's command line."""
    from alignzoo.import_trl import convert

    _write(convert(file, trainer, world), file, out)


def _write(one: Import, file: Path, out: Path | None) -> None:
    from alignzoo.importing import write

    write(one, out or Path(file.with_suffix(".toml").name), click.echo)
