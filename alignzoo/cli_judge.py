"""The commands that judge what was trained: `alignzoo winrate`, `alignzoo lm-eval`. It imports no torch by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from alignzoo.cli_data import columns_of

if TYPE_CHECKING:
    from alignzoo.answers import Dtype


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--prompts", required=True, metavar="P", help="File of prompts; of pairs and demonstrations the prompts.")
@click.option("--judge", required=True, metavar="JUDGE",
              help="Address that speaks OpenAI's protocol, up to /v1; folder of a reward model; or name "
                   "of a reward.")  # fmt: skip
@click.option("--judge-set", "settings", multiple=True, metavar="KEY=VALUE",
              help="Of an address: model (required), api_key_env, concurrency, ...; of a reward its settings. "
                   "May be repeated.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Folder to write; one that the same command began is gone on with.")  # fmt: skip
@click.option("--dimensions", default="helpful,accurate,clear,safe", show_default=True, metavar="X,Y,...",
              help="By what the answers are judged, beside overall.")  # fmt: skip
@click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", callback=columns_of,
              help="Read THEIRS of the prompts as our column OURS. May be repeated.")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N prompts.")
@click.option("--max-new-tokens", default=512, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: greedy.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the sampling.")
@click.option("--batch-tokens", default=16384, show_default=True, type=click.IntRange(1),
              help="Positions that are sampled at once; it changes nothing but rounding.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Type of the weights that answer; as the run has it, or float32, if not given.")  # fmt: skip
@click.option("--max-failures", default=0.1, show_default=True, type=click.FloatRange(0, 1),
              help="Stop where a larger share of the requests fails or has no verdict that can be read.")  # fmt: skip
@click.option("--plugin", "plugins", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="A Python file with a reward plugin that is not installed. May be repeated.")  # fmt: skip
def winrate(
    a: str,
    b: str,
    prompts: str,
    judge: str,
    settings: tuple[str, ...],
    out: Path,
    dimensions: str,
    columns: dict[str, str],
    limit: int | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_tokens: int,
    dtype: Dtype | None,
    max_failures: float,
    plugins: tuple[Path, ...],
) -> None:
    """Let a judge compare A's answers with B's: how often A wins, with intervals and by dimension.

    A and B are run directories, models as model.path of a recipe, or files of answers.
    """
    from rich.console import Console

    from alignzoo.sampling import Sampling
    from alignzoo.winrate import Asked
    from alignzoo.winrate import winrate as compare

    sampling = Sampling(max_new_tokens, temperature=temperature, batch_tokens=batch_tokens)
    asked = Asked(a, b, prompts, judge, settings, dimensions, columns, limit, sampling, dtype, seed, max_failures,
                  plugins)  # fmt: skip
    compare(asked, out, Console())


@click.command("lm-eval")
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.argument("extra", nargs=-1, metavar="[-- EXTRA...]")
@click.option("--tasks", required=True, metavar="T", help="Tasks of the harness, separated by commas, or a YAML file.")
@click.option("--limit", metavar="N", help="Only N rows of each task.")
def lm_eval(run: Path, extra: tuple[str, ...], tasks: str, limit: str | None) -> None:
    """Run EleutherAI's lm-evaluation-harness on the model of a finished RUN.

    The results go into RUN/lm-eval. EXTRA is handed to lm_eval as it is. Needs the extra lm-eval.
    """
    from rich.console import Console

    from alignzoo.lmeval import lm_eval as evaluate
    from alignzoo.progress import sayer

    evaluate(run, tasks, limit, extra, sayer(Console()))
