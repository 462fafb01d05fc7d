"""`alignzoo sample`: completions sampled and rewarded into a file, as rows that a later run learns from.

The file grows prompt by prompt; beside it lies FILE.sampling.json, which tells what made it, so that an interrupted
command goes on where it stopped and another one does not mix its rows in.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from alignzoo.answering import Answerer, make_vllm
from alignzoo.answers import plain
from alignzoo.check import Job, make_job
from alignzoo.data.rows import content_hash
from alignzoo.data.template import choose_template
from alignzoo.data.watch import Watch
from alignzoo.errors import AlignzooError, DataError, RecipeError
from alignzoo.making import Sampled, better_and_worse, ranked, to_imitate
from alignzoo.model import load_model
from alignzoo.others import Others, hold_others
from alignzoo.progress import Say, StepProgress, sayer
from alignzoo.recipe import Recipe, Rollout, to_table
from alignzoo.samples import stop_tokens
from alignzoo.sharding import make_accelerator
from alignzoo.tree import Tree

_AT_ONCE = 16  # prompts between two writes
ALPACA_EVAL = "alpaca_eval"
_PLACE = re.compile(r"(:| row )\d+$")  # of a row, behind the name of its file
Line = dict[str, Any]
_Maker = Callable[[Tree, Sequence[Sampled], Rollout], Iterator[Line]]


def _ranked(prompt: Tree, sampled: Sequence[Sampled], settings: Rollout) -> Iterator[Line]:
    """All completions in a row, the best first, those without a reward last."""
    del settings
    order = [*ranked(sampled), *(one for one in sampled if one.reward is None)]
    yield {
        "prompt": prompt.asked, "completions": [one.text for one in order], "rewards": [one.reward for one in order],
        "each": [dict(one.rewards) for one in order], "truncated": [one.truncated for one in order],
        "authors": [one.author or "policy" for one in order],
    }  # fmt: skip


def _pairs(prompt: Tree, sampled: Sequence[Sampled], settings: Rollout) -> Iterator[Line]:
    for best, worst in better_and_worse(sampled, settings):
        yield {
            "prompt": prompt.asked, "chosen": best.text, "rejected": worst.text, "chosen_reward": best.reward,
            "rejected_reward": worst.reward,
        }  # fmt: skip


def _best(prompt: Tree, sampled: Sequence[Sampled], settings: Rollout) -> Iterator[Line]:
    for one in to_imitate(sampled, settings):
        yield {"prompt": prompt.asked, "completion": one.text, "reward": one.reward}


MAKERS: dict[str, _Maker] = {"ranked": _ranked, "pairs": _pairs, "best": _best}


def _alpaca_eval(generator: str) -> _Maker:
    """What AlpacaEval reads as model outputs (https://github.com/tatsu-lab/alpaca_eval): one answer a prompt.

    It is the one with the highest reward, or the first where no reward applies.
    """

    def make(prompt: Tree, sampled: Sequence[Sampled], settings: Rollout) -> Iterator[Line]:
        del settings
        own = prompt.columns.get("dataset") or Path(_PLACE.sub("", prompt.where)).stem
        best = next(iter(ranked(sampled)), sampled[0])
        yield {
            "instruction": plain(prompt.asked), "output": best.text.strip(), "generator": generator,
            "dataset": str(own),
        }  # fmt: skip

    return make


def sample(
    recipe: Recipe, out: Path, make: str, plugins: Sequence[Path], console: Console, generator: str | None = None
) -> None:
    """Answers every training prompt of a recipe with [rollout], and writes what `make` says to a JSON Lines file.

    make: "ranked", "pairs" or "best"; or "alpaca_eval", which is a JSON list, whole when the command has come to its
        end. generator: the model's name in it; model.path if not given
    Raises AlignzooError; a file of another command is never written to.
    """
    say = sayer(console)
    if recipe.rollout is None:
        raise RecipeError(
            f"{recipe.tables.file or 'the recipe'} samples nothing",
            fix="add a [rollout] section and at least one [[rewards]]",
        )
    accelerator = make_accelerator(recipe)
    job = make_job(recipe, say, plugin_files=plugins, watch=Watch(say, console))
    prompts, listed = job.data.train, make == ALPACA_EVAL
    name = generator or recipe.model.path
    maker = _alpaca_eval(name) if listed else MAKERS[make]
    if listed:
        make = f"{make} {name}"
        _check_instructions(prompts)
    note = out.with_name(f"{out.name}.sampling.json")
    done = _begin(job, out, note, make, len(prompts), say)
    if done == len(prompts):
        _close(out, listed)
        return
    job.rewards.start(accelerator.device)
    say(f"loading {recipe.model.path} ({recipe.model.dtype})")
    settings = dataclasses.replace(recipe.model, lora=None)  # an adapter that is not trained yet changes nothing
    model = load_model(job.location, settings, say).to(accelerator.device)
    stops = stop_tokens(model, job.tokenizer, choose_template(recipe.data, job.tokenizer).does.end)
    own = None if recipe.reference.path else partial(nullcontext, model)  # the start model is the reference
    held = hold_others(job, accelerator.device, own, say)
    others = Others(recipe, job.tokenizer, stops, held, accelerator.autocast, say)
    vllm = make_vllm(model, accelerator, job.tokenizer, recipe, stops, say)
    answerer = Answerer(model, job.tokenizer, job.rewards, recipe, stops, accelerator.autocast, vllm=vllm)
    rows = 0
    with StepProgress(console, len(prompts), f"sampling {recipe.rollout.completions} completions", done) as progress:
        for start in range(done, len(prompts), _AT_ONCE):
            asked = prompts[start : start + _AT_ONCE]
            batch = [(1, tree) for tree in asked]
            drawn = others.answer(batch, answerer.draw(batch, recipe.rollout.completions, lambda _: None))
            rewarded, _failed = answerer.reward(asked, drawn)
            lines = [
                json.dumps(line, ensure_ascii=False)
                for prompt, own in zip(asked, rewarded, strict=True)
                for line in maker(prompt, own, recipe.rollout)
            ]
            _append(out, lines, listed)
            rows += len(lines)
            _note(note, job, make, start + len(asked), out.stat().st_size)
            progress.advance(start + len(asked))
    _close(out, listed)
    say(f"{rows} rows of {len(prompts) - done} prompts into {out}")


def _append(out: Path, lines: Sequence[str], listed: bool) -> None:
    """JSON Lines, or the elements of a JSON list that is not closed yet."""
    with out.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(f"{',' if file.tell() else '['}\n{line}" if listed else f"{line}\n")


def _close(out: Path, listed: bool) -> None:
    """Ends a list. The note does not count these bytes, so going on cuts them off again."""
    if listed:
        with out.open("a", encoding="utf-8") as file:
            file.write("\n]\n" if file.tell() else "[]\n")


def _check_instructions(prompts: Sequence[Tree]) -> None:
    odd = [tree.where for tree in prompts if not isinstance(plain(tree.asked), str)]
    if odd:
        raise DataError(
            f"{odd[0]}: a conversation, and AlpacaEval's instructions are texts",
            why=f"{len(odd)} of {len(prompts)} rows",
            fix="leave out the rows that have more than one user turn",
        )


def _identity(job: Job, make: str) -> str:
    """Of all that the rows depend on."""
    table = to_table(job.recipe, job.settings, job.rewards.settings)
    other = [one.source for one in job.recipe.rollout.others] if job.recipe.rollout else []
    names = ("model", "data", "rollout", "rewards", *(["reference"] if "reference" in other else []))
    wanted = {name: table.get(name) for name in names}
    sources = [source.sha256 for source in job.data.report.sources]
    return content_hash(wanted, sources, job.recipe.train.seed, make).hex()


def _note(note: Path, job: Job, make: str, prompts: int, size: int) -> None:
    text = json.dumps({"identity": _identity(job, make), "make": make, "prompts": prompts, "bytes": size})
    partial = note.with_name(f".{note.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(note)


def _begin(job: Job, out: Path, note: Path, make: str, prompts: int, say: Say) -> int:
    """How many prompts are done in the file, which is cut to what they wrote."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        out.touch()
        _note(note, job, make, 0, 0)
        return 0
    try:
        saved = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        saved = {}
    if saved.get("identity") != _identity(job, make):
        raise AlignzooError(
            f"{out} is there already, and this command did not make it",
            why=f"{note.name} {'tells of another recipe, other data or other plugins' if saved else 'is not there'}",
            fix="give another name, or remove the file",
        )
    with out.open("r+b") as file:
        file.truncate(saved["bytes"])
    done: int = saved["prompts"]
    say(f"{out}: {done} of {prompts} prompts are done" + ("" if done == prompts else ", going on"))
    return done
