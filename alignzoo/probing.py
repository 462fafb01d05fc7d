"""A few steps of a recipe, measured: what `alignzoo plan --probe` runs in a process of its own.

`python -m alignzoo.probing FOLDER [PLUGIN...]` runs FOLDER/recipe.toml on some of its rows, writes FOLDER/probe.json,
and nothing outside of FOLDER. The log-probs of the reference are computed anew, so that they can be timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from alignzoo.check import Job, make_job
from alignzoo.data.store import Trees
from alignzoo.errors import RunError
from alignzoo.metrics import memory_gib
from alignzoo.place import start_or_resume
from alignzoo.precompute import wanted_rows
from alignzoo.progress import sayer
from alignzoo.recipe import load_recipe
from alignzoo.runner import make_ready, sample_prompts
from alignzoo.sharding import make_accelerator

STEPS = 3  # the first one warms up, the others are measured
BLOCKS = 2  # batches of held-out rows


@dataclass(frozen=True)
class Probe:
    """Seconds by what they were spent on, with the tokens that went through; memory in GiB."""

    steps: int
    step_seconds: float
    step_tokens: int
    sampling_seconds: float  # of a round, with its rewards
    eval_seconds: float
    eval_tokens: int
    reference_seconds: float
    reference_tokens: int
    answers_seconds: float
    loading_seconds: float
    memory: float


def probe(folder: Path, plugins: Sequence[Path]) -> Probe:
    """Starts this module on FOLDER/recipe.toml. Raises RunError with its last words where it fails."""
    words = [sys.executable, "-m", "alignzoo.probing", str(folder), *map(str, plugins)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RunError("the probe failed", why="\n".join(said[-3:]), fix="alignzoo run shows all of it; --no-probe")
    return Probe(**json.loads((folder / "probe.json").read_text(encoding="utf-8")))


def measure(folder: Path, plugins: Sequence[Path]) -> Probe:
    """Loads, answers, evaluates and trains as a run does, on as many rows as STEPS and BLOCKS need."""
    own = {"output.dir": str(folder / "runs"), "log.run_name": "probe", "log.every_steps": 1, "log.trackers": [],
           "watch.stop": [], "eval.at_start": True}  # fmt: skip
    recipe = load_recipe(folder / "recipe.toml", own)
    console = Console(quiet=True)
    accelerator = make_accelerator(recipe)
    whole = make_job(recipe, sayer(console), plugin_files=plugins)
    os.environ["ALIGNZOO_CACHE"] = str(folder / "cache")
    job, times = shortened(whole), [time.perf_counter()]
    with ExitStack() as held:
        place = start_or_resume(job, accelerator, False, (), datetime.now().astimezone(), sayer(console), held)
        training = make_ready(job, accelerator, place, console, held)
        engine = training.engine
        times.append(time.perf_counter())
        _, prompts = sample_prompts(job, sayer(console))
        if prompts:
            training.answers(prompts, "answers")
        times.append(time.perf_counter())
        engine.fit(job.data.train, job.data.eval, lambda step, _: step == STEPS, job.pairs)
        records = place.run_dir.read_metrics()
        memory = memory_gib(engine.device)
    engine.holder.close()
    reference = training.cached.get("seconds", 0.0)
    return Probe(
        **_of_steps([r for r in records if "num_tokens" in r]),
        eval_seconds=next((r["eval_runtime"] for r in records if "eval_runtime" in r), 0.0),
        eval_tokens=tokens_of(job.data.eval) + tokens_of(job.pairs), reference_seconds=reference,
        reference_tokens=reference_tokens(job) if training.cached else 0, answers_seconds=times[2] - times[1],
        loading_seconds=times[1] - times[0] - reference, memory=memory,
    )  # fmt: skip


def _of_steps(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the steps after the first, where there are some; without sampling."""
    tokens = np.diff([0, *(r["num_tokens"] for r in records)])
    timed = [
        (int(n), n / r["tokens_per_second"]) for n, r in zip(tokens, records, strict=True) if "tokens_per_second" in r
    ]
    timed = timed[1:] or timed
    rounds = [sum(r.get(f"rollout/seconds_{what}", 0.0) for what in ("sampling", "rewards")) for r in records]
    return {
        "steps": len(timed), "step_seconds": float(sum(s for _, s in timed)), "step_tokens": sum(n for n, _ in timed),
        "sampling_seconds": max(rounds, default=0.0),
    }  # fmt: skip


def shortened(job: Job) -> Job:
    """The job on some of its rows, evenly spread, the longest among them."""
    size = job.recipe.train.batch_size
    data = replace(job.data, train=_some(job.data.train, STEPS * size), eval=_some(job.data.eval, BLOCKS * size))
    pairs = _some(job.pairs, BLOCKS * size) if isinstance(job.pairs, Trees) else job.pairs
    return replace(job, data=data, pairs=pairs)


def _some(trees: Trees, count: int) -> Trees:
    if len(trees) <= count:
        return trees
    rows = np.arange(count) * len(trees) // count
    longest = int(trees.packed_positions(True).argmax())
    if longest not in rows:
        rows[-1] = longest
    return trees.chosen(rows)


def tokens_of(trees: Any) -> int:
    """Of all rows, a prompt once."""
    return int(trees.packed_positions(True).sum()) if isinstance(trees, Trees) else sum(t.tokens for t in trees)


def reference_tokens(job: Job) -> int:
    """Positions of all completions that the reference is asked for, each with its prompt."""
    return sum(wanted_rows(job, 0).cost)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    found = measure(target, [Path(word) for word in sys.argv[2:]])
    (target / "probe.json").write_text(json.dumps(asdict(found)), encoding="utf-8")
