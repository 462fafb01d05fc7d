"""`alignzoo chat`, and `alignzoo plan`. As cli.py, it imports no torch by itself."""

from __future__ import annotations

from pathlib import Path

import click

from alignzoo.cli_data import recipe_options


@click.command()
@click.argument("source", metavar="RUN")
@click.option("--against", metavar="MODEL",
              help='A second model, asked the same: "reference" for that of RUN, or whatever RUN can be.')  # fmt: skip
@click.option("--system", metavar="TEXT", help="System turn.")
@click.option("--temperature", type=click.FloatRange(0), metavar="T", help="0: greedy.")
@click.option("--max-new-tokens", type=click.IntRange(1), metavar="N", help="Longest answer.")
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Of the sampling.")
def chat(
    source: str,
    against: str | None,
    system: str | None,
    temperature: float | None,
    max_new_tokens: int | None,
    seed: int | None,
) -> None:
    """Talk to the model of RUN: a run directory, a checkpoint, or what model.path of a recipe can be.

    What is not given is as [samples] of the run has it. Without a terminal each line of stdin is a question, and
    stdout has the answers. In the conversation: /reset, /system TEXT, /save FILE, /quit; Ctrl-C stops an answer.
    """
    from rich.console import Console

    from alignzoo.chat import Asked, start
    from alignzoo.progress import sayer

    asked = Asked(source, against, system, temperature, max_new_tokens, seed)
    start(asked, Console(), sayer(Console(stderr=True)))


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path), metavar="RECIPE")
@click.option("--gpus", type=click.IntRange(1), metavar="N", help="Plan for N GPUs, which need not be there.")
@click.option("--memory", type=click.FloatRange(0, min_open=True), metavar="GIB",
              help="Memory of one of them: say what fits. Of this machine's GPU if not given.")  # fmt: skip
@click.option("--probe/--no-probe", "probing", default=False, show_default=True,
              help="Run a few steps here, in a folder that is removed, and predict the time of all.")  # fmt: skip
@recipe_options
@click.option("--json", "to_json", is_flag=True, help="Print JSON, sizes in bytes.")
def plan(
    recipe: Path,
    gpus: int | None,
    memory: float | None,
    probing: bool,
    overrides: tuple[str, ...],
    plugins: tuple[Path, ...],
    to_json: bool,
) -> None:
    """Compute the memory that RECIPE takes at each ZeRO stage, by part; no weights are loaded.

    Tells also how far the last predictions were off, of the runs that have finished since.
    """
    from alignzoo.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from rich.console import Console

    from alignzoo.plan import run_plan
    from alignzoo.progress import sayer

    run_plan(
        loaded, gpus=gpus, memory=memory, probing=probing, plugins=plugins, to_json=to_json, console=Console(),
        say=sayer(Console(stderr=to_json)),
    )  # fmt: skip
