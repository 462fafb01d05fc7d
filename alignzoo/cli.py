"""The command line: each command reads its words and calls one function. It imports no torch by itself."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alignzoo import __version__
from alignzoo.cli_data import data, suggest
from alignzoo.cli_data import recipe_options as _recipe_options
from alignzoo.cli_import import import_
from alignzoo.cli_judge import lm_eval, winrate
from alignzoo.cli_plugin import callbacks, losses, new_plugin, plugins, rewards
from alignzoo.cli_use import chat, plan
from alignzoo.errors import AlignzooError
from alignzoo.launch import without_options
from alignzoo.ranks import Rank, quiet_unless_first, tell

if TYPE_CHECKING:
    from alignzoo.recipe import Recipe


class Group(click.Group):
    """Prints an AlignzooError without a traceback and exits with its code. Of several ranks, one has the word."""

    def invoke(self, ctx: click.Context) -> Any:
        here = Rank.here()
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):
            raise
        except click.ClickException as error:
            if here.local == 0:
                raise
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as error:
            if here.rank == 0:
                click.echo("interrupted: what was written to the run directory stays there", err=True)
            ctx.exit(_tell(error) if here.many else 130)
        except Exception as error:
            if here.many:
                ctx.exit(_tell(error))
            if not isinstance(error, AlignzooError):
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)


def _tell(error: BaseException) -> int:
    return tell(error, lambda text: click.echo(text, err=True))


_LAUNCH = ("--processes", "--gpus", "--hostfile")


class _Launchable(click.Command):
    """Keeps the words that a launcher is to start it with, in each process."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["words"] = [str(ctx.info_name), *without_options(args, _LAUNCH)]
        return super().parse_args(ctx, _resume_apart(args))


def _resume_apart(args: list[str]) -> list[str]:
    """--resume takes a directory or nothing; a recipe that stands behind it is a recipe."""
    pairs = zip(args, [*args, ""][1:], strict=True)
    return ["--resume=" if word == "--resume" and after.endswith(".toml") else word for word, after in pairs]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="alignzoo")
@click.option("--local_rank", "--local-rank", type=int, default=None, hidden=True,
              help="Put here by DeepSpeed's launcher, which sets LOCAL_RANK too.")  # fmt: skip
def cli(local_rank: int | None) -> None:
    """A zoo of LLM alignment algorithms: one recipe, any loss plugin, one shared engine."""
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))


@cli.command()
@click.argument("recipe", type=click.Path(path_type=Path), metavar="RECIPE")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="File to write.")
@click.option("--make", type=click.Choice(["ranked", "pairs", "best"]),
              help="Of each prompt: all completions, best and worst as a pair, or the best one; "
                   "ranked if not given.")  # fmt: skip
@click.option("--format", type=click.Choice(["jsonl", "alpaca_eval"]), default="jsonl", show_default=True,
              help="JSON Lines, or the JSON list that AlpacaEval reads, with the best completion "
                   "of each prompt.")  # fmt: skip
@click.option("--generator", metavar="NAME", help="The model's name for AlpacaEval; model.path if not given.")
@_recipe_options
def sample(
    recipe: Path, out: Path, make: str | None, format: str, generator: str | None, overrides: tuple[str, ...],
    plugins: tuple[Path, ...],
) -> None:  # fmt: skip
    """Sample and reward completions of a recipe with [rollout] into a file.

    Without training: the model answers every training prompt. Started again, it goes on where it stopped.
    """
    listed = format == "alpaca_eval"
    if (make and listed) or (generator and not listed):
        raise click.UsageError("--make belongs to --format jsonl, and --generator to --format alpaca_eval")
    wanted = format if listed else make or "ranked"
    from rich.console import Console

    from alignzoo.offline import sample as sample_offline
    from alignzoo.recipe import load_recipe

    sample_offline(load_recipe(recipe, overrides), out, wanted, plugins, Console(), generator)


for _command in (losses, rewards, callbacks, plugins, data, suggest, import_, new_plugin, chat, plan, winrate, lm_eval):
    cli.add_command(_command)


@cli.command(cls=_Launchable)
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RECIPE...")
@_recipe_options
@click.option("--processes", type=click.IntRange(1), metavar="N", help="Train in N processes on this machine.")
@click.option("--gpus", type=click.IntRange(1), metavar="N", help="Train on N GPUs of this machine.")
@click.option("--hostfile", type=click.Path(path_type=Path), metavar="FILE",
              help='Train on several machines: lines "HOST slots=N" for deepspeed.')  # fmt: skip
@click.option("--resume", is_flag=False, flag_value="", metavar="[DIR]",
              help="Go on with an interrupted run: DIR, a checkpoint in it, or else the newest of RECIPE.")  # fmt: skip
@click.pass_context
def run(
    context: click.Context,
    recipes: tuple[Path, ...],
    overrides: tuple[str, ...],
    plugins: tuple[Path, ...],
    processes: int | None,
    gpus: int | None,
    hostfile: Path | None,
    resume: str | None,
) -> None:
    """Train a model as RECIPE says.

    With several recipes each starts from the model that the one before has trained. --set and --plugin hold for all.

    torchrun, deepspeed and accelerate launch start it too, as the module alignzoo.
    """
    quiet_unless_first()
    if sum(option is not None for option in (processes, gpus, hostfile)) > 1:
        raise click.UsageError("--processes, --gpus and --hostfile: give one of them")
    from alignzoo.callbacks import make_callbacks
    from alignzoo.check import find_loss
    from alignzoo.data.formats_found import check_formats
    from alignzoo.plugins import discover
    from alignzoo.recipe import load_recipe
    from alignzoo.rewards import make_rewards
    from alignzoo.zero import check_zero

    many = processes or gpus or (None if hostfile else Rank.here().world)
    loaded = [load_recipe(path, overrides) for path in recipes]  # a mistake is told at once: what follows takes seconds
    registry = discover(plugins)
    for recipe in loaded:
        find_loss(recipe, registry)
        make_rewards(recipe, registry)
        make_callbacks(recipe, registry)
        check_formats(recipe, registry)
        check_zero(recipe, ranks=many)
    going_on = _find_run(loaded, resume)
    code = _launch(context.meta["words"], [r.engine.device for r in loaded], processes, gpus, hostfile)
    if code is not None:
        context.exit(code)
    from alignzoo.runner import run_chain

    run_chain(recipes, overrides, plugins, command=sys.argv, resume=going_on)


def _find_run(recipes: list[Recipe], resume: str | None) -> Path | bool:
    """What run_chain is to resume. What cannot go on is told at once."""
    if resume is None:
        return False
    from alignzoo.resume import find_run

    if len(recipes) == 1:  # run_chain refuses more
        find_run(recipes[0], Path(resume) if resume else None, lambda _: None)
    return Path(resume) if resume else True


def _launch(
    words: list[str], devices: list[str], processes: int | None, gpus: int | None, hostfile: Path | None
) -> int | None:
    """The exit code of a run in other processes; None where this one is to train."""
    from alignzoo.launch import check_devices, check_free, launch, launch_hosts

    count = processes or gpus
    if count is None and hostfile is None:
        return None
    check_free()
    if hostfile is not None:
        return launch_hosts(words, hostfile, click.echo)
    for device in devices:
        check_devices(count or 1, device, gpus=gpus is not None)
    return launch(words, count, click.echo) if count and count > 1 else None


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


@cli.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="RUN_OR_CHECKPOINT")
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The folder to make.")
@click.option("--merge", is_flag=True, help="Fold a LoRA adapter into its base.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Type of the weights; as model.dtype has it if not given.")  # fmt: skip
def export(source: Path, to: Path, merge: bool, dtype: str | None) -> None:
    """Make a folder that transformers loads, of a run or of one of its checkpoints."""
    from rich.console import Console

    from alignzoo.export import export as write
    from alignzoo.progress import sayer

    say = sayer(Console())
    say(f"model: {write(source, to, merge=merge, dtype=dtype, say=say)}")


@cli.command()
@click.argument("pairs", metavar="PAIRS")
@click.option("--model", required=True, help="The model, as model.path of a recipe.")
@click.option("--reference", help="The model that it is compared with.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="JSON Lines file to write.")
@click.option("--beta", default=0.1, show_default=True, type=click.FloatRange(0, min_open=True),
              help="Of the implicit reward, with --reference.")  # fmt: skip
@click.option("--by", metavar="COLUMN", help="Accuracy by the values of a column.")
@click.option("--keep", metavar="CONDITION", help='Write only such rows, e.g. "abs(margin) > 0.1".')
@click.option("--most-uncertain", "most", type=click.IntRange(1), metavar="K", help="Write only K rows, to annotate.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A key of a recipe, e.g. data.max_length.")
def score(
    pairs: str,
    model: str,
    reference: str | None,
    out: Path,
    beta: float,
    by: str | None,
    keep: str | None,
    most: int | None,
    overrides: tuple[str, ...],
) -> None:
    """Score preference PAIRS with a model: log-probs, rewards, margin and probability of each row.

    PAIRS is a file or hub id, as data.train of a recipe. Log-probs come from the cache where a run has computed them.
    """
    from rich.console import Console

    from alignzoo.expression import Expression
    from alignzoo.score import NUMBERS, Asked
    from alignzoo.score import score as score_pairs

    condition = Expression(keep, NUMBERS) if keep else None
    score_pairs(Asked(pairs, model, reference, beta, by, condition, most), out, overrides, Console())


@cli.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path), metavar="[RUN]...")
@click.option("--recipe", type=click.Path(path_type=Path), metavar="RECIPE", help="Run this recipe with --losses.")
@click.option("--losses", metavar="A,B,...", help="The losses that RECIPE is run with.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1), metavar="N",
              help="Runs of each loss: train.seed of RECIPE, and the numbers after it.")  # fmt: skip
@click.option("--loss-set", "of_loss", multiple=True, metavar="LOSS:KEY=VALUE",
              help="As --set, for one of the losses. May be repeated.")  # fmt: skip
@click.option("--baseline", metavar="LOSS", help="What the others are compared with; the first if not given.")
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR",
              help="Where the report is written, and with --recipe the runs; comparison, or compare-RECIPE below "
                   "its output.dir, if not given.")  # fmt: skip
@_recipe_options
@click.pass_context
def compare(
    context: click.Context,
    runs: tuple[Path, ...],
    recipe: Path | None,
    losses: str | None,
    output: Path | None,
    baseline: str | None,
    seeds: int,
    of_loss: tuple[str, ...],
    overrides: tuple[str, ...],
    plugins: tuple[Path, ...],
) -> None:
    """Compare finished RUNs, or run RECIPE with several losses and compare these.

    Writes comparison.html, a page that needs no network, and its numbers and plots. What is finished in DIR is not run
    again. The exit code is 1 where a run failed.
    """
    from alignzoo.comparing import compare_losses, compare_runs

    if runs and not (recipe or losses or seeds > 1 or of_loss or overrides or plugins):
        compare_runs(runs, output or Path("comparison"), baseline, click.echo)
        return
    if runs or recipe is None or not losses:
        raise click.UsageError("give run directories, with --baseline and --output; or --recipe and --losses")
    names = [name for word in losses.split(",") if (name := word.strip())]
    context.exit(
        compare_losses(
            recipe, names, output, baseline, click.echo,
            seeds=seeds, overrides=overrides, of_loss=of_loss, plugins=plugins,
        )
    )  # fmt: skip


@cli.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--steps", default=5, show_default=True, type=click.IntRange(1), metavar="K",
              help="How many optimizer steps to make again.")  # fmt: skip
def reproduce(run: Path, steps: int) -> None:
    """Make the first steps of RUN again, and compare versions, hashes and numbers with what it recorded.

    RUN is not written to. The exit code is 1 where the numbers differ by more than rounding.
    """
    from alignzoo.reproduce import reproduce as again

    again(run, steps, click.echo)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.pass_context
def doctor(context: click.Context, runs: tuple[Path, ...]) -> None:
    """Tell what is wrong with finished, interrupted or running runs, as the watch does.

    RUN is a run directory. The exit code is 1 where something is wrong, 2 where there is no run.
    """
    from rich.console import Console

    from alignzoo.doctor import examine
    from alignzoo.progress import sayer

    context.exit(1 if examine(runs, sayer(Console())) else 0)


@cli.group()
def cache() -> None:
    """Look at what is kept between runs: prepared data, and log-probs of references."""


@cache.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cache_ls(as_json: bool) -> None:
    """List what is kept, with its rows, size and last use."""
    from alignzoo.caches import entries, print_entries

    rows = entries()
    click.echo(json.dumps(rows, indent=2)) if as_json else print_entries(rows)


@cache.command("verify")
def cache_verify() -> None:
    """Read all that is kept, and remove what is damaged. The exit code is 2 where something was."""
    from alignzoo.caches import verify

    verify(click.echo)


@cache.command("gc")
@click.option("--max-gb", type=click.FloatRange(0), metavar="GB",
              help="How large each kind may stay; ALIGNZOO_CACHE_GB, or 20, if not given.")  # fmt: skip
def cache_gc(max_gb: float | None) -> None:
    """Remove what was not used for the longest time, where it is more than it may be."""
    from alignzoo.caches import collect

    collect(max_gb, click.echo)


@cache.command("clear")
@click.option("--only", type=click.Choice(["reference", "data"]), help="One kind.")
def cache_clear(only: str | None) -> None:
    """Remove all that is kept. Later runs make it again."""
    from alignzoo.caches import clear

    clear(only, click.echo)


@cli.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "every", is_flag=True, help="All losses that are installed.")
@click.option(
    "--plugin",
    "plugins",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A Python file with a loss plugin that is not installed. Without NAME: all of its losses.",
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A Python file with reference(batch, settings), which gives the values that the loss should have.",
)
@click.option("--fixtures", type=click.Path(path_type=Path), metavar="FILE", help="A JSON file of rows and results.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def conform(
    context: click.Context,
    names: tuple[str, ...],
    every: bool,
    plugins: tuple[Path, ...],
    reference: Path | None,
    fixtures: Path | None,
    as_json: bool,
) -> None:
    """Check that losses keep the contract: gradients, masks, micro-batches, declarations, settings.

    Prints what holds, what fails, and the smallest case that shows it. The exit code is 1 where something fails.
    """
    from rich.console import Console

    from alignzoo.plugins import discover
    from alignzoo.testing.command import conform as check

    results = check(discover(plugins), names, every, reference, fixtures)
    if as_json:
        click.echo(json.dumps([result.to_json() for result in results], indent=2))
    else:
        from alignzoo.testing.show import print_results

        print_results(results, Console())
    context.exit(1 if any(result.verdict.state == "fails" for result in results) else 0)
