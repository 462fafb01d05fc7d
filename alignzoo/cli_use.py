"""`alignzoo chat`, and `alignzoo plan`. As cli.py, it imports no torch by itself."""

from __future__ import annotations

import click


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
