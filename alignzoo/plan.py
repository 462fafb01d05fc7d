"""`alignzoo plan`: what a recipe takes, before it runs: memory at each ZeRO stage, and with a probe the time.

Memory is computed (memory.py); time is what a few steps take here (probing.py) by the tokens of the whole run. How far
such predictions were off is told from runs that have finished since (predictions.py).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from alignzoo.batch import count_steps, steps_of
from alignzoo.check import Job, make_job
from alignzoo.data.store import Trees
from alignzoo.engine import TOKENS_PER_DEVICE
from alignzoo.errors import AlignzooError
from alignzoo.memory import CUDA, GIB, Estimate, Load, Setup, Shape, estimate, is_known, read_config, shape_of
from alignzoo.metrics import memory_gib
from alignzoo.model import locate
from alignzoo.place import table_of_job
from alignzoo.predictions import errors, keep, recipe_hash, settle
from alignzoo.probing import Probe, probe, reference_tokens, tokens_of
from alignzoo.progress import Say
from alignzoo.recipe import LoRA, Recipe
from alignzoo.rundir import RunDir
from alignzoo.sharding import choose_precision
from alignzoo.zero import check_zero, deepspeed_config

Device = Literal["cpu", "cuda"]
PARTS = ("weights", "gradients", "optimizer", "buffers", "reference", "activations", "temporary", "libraries")
# Stage, and what is offloaded to the machine's memory: the fastest first.
WAYS: tuple[tuple[int, bool, bool], ...] = (
    (0, False, False), (1, False, False), (2, False, False), (3, False, False),
    (2, True, False), (3, True, False), (3, True, True),
)  # fmt: skip


@dataclass(frozen=True)
class Where:
    """The machine that is planned for. libraries: bytes of a process without a model."""

    device: Device
    precision: str
    ranks: int
    libraries: int


@dataclass(frozen=True)
class Row:
    """One way to share a run out. estimate: None where it cannot be, refused says why."""

    zero: int
    offload_optimizer: bool
    offload_parameters: bool
    estimate: Estimate | None
    refused: str = ""

    @property
    def words(self) -> str:
        offloaded = ("offload_optimizer",) * self.offload_optimizer + ("offload_parameters",) * self.offload_parameters
        return " + ".join([f"zero = {self.zero}", *offloaded])

    def fits(self, limit: float | None) -> bool:
        return self.estimate is not None and limit is not None and self.estimate.total <= limit


@dataclass(frozen=True)
class Plan:
    """All that `alignzoo plan` has to say. limit: bytes of one device, where they are known."""

    job: Job
    recipe: Recipe
    where: Where
    limit: float | None
    shape: Shape
    load: Load
    rows: list[Row]
    advice: str
    probe: Probe | None = None
    seconds: dict[str, float] | None = None

    @property
    def own(self) -> Row:
        """The row of the recipe itself."""
        engine = self.recipe.engine
        way = (engine.zero, engine.offload_optimizer != "none", engine.offload_parameters != "none")
        found = [r for r in self.rows if (r.zero, r.offload_optimizer, r.offload_parameters) == way]
        return found[0] if found else make_row(self.recipe, self.shape, self.load, self.where, way)


# --- memory ----------------------------------------------------------------------------------------------------------


def make_plan(
    recipe: Recipe, say: Say, *, gpus: int | None = None, memory: float | None = None, plugins: Sequence[Path] = ()
) -> Plan:
    """Everything but the probe. memory: GiB of one device. Raises AlignzooError as `alignzoo check` does."""
    check_zero(recipe, ranks=gpus or 1)
    device = _device(recipe, gpus)
    here = replace(recipe.engine, device="auto" if device == "cuda" else "cpu", precision="auto", hpz=1)
    job = make_job(replace(recipe, engine=here), say, plugin_files=plugins)
    job = replace(job, recipe=recipe)
    if not is_known(recipe.train.optimizer):
        say(f"train.optimizer = {recipe.train.optimizer}: counted as Adam, two numbers for each weight")
    where = Where(device, _precision(recipe, device), gpus or 1, _libraries(device))
    config = None if job.location is None else read_config(job.location, recipe.model.trust_remote_code)
    assert config is not None
    shape = shape_of(config, recipe.model)
    load = load_of(job, where, _reference(job, config))
    rows = [make_row(recipe, shape, load, where, way) for way in _ways(device)]
    limit = _limit(device, memory)
    return Plan(
        job, recipe, where, limit, shape, load, rows,
        "" if limit is None else _advice(job, config, rows, limit, where),
    )  # fmt: skip


def _device(recipe: Recipe, gpus: int | None) -> Device:
    wanted = recipe.engine.device
    cuda = gpus is not None or wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    return "cuda" if cuda else "cpu"


def _precision(recipe: Recipe, device: Device) -> str:
    """engine.precision there. A GPU that is not of this machine is taken for one that has bf16."""
    if device == "cpu" or torch.cuda.is_available():
        return choose_precision(
            replace(recipe, engine=replace(recipe.engine, device="auto" if device == "cuda" else "cpu"))
        )
    return "bf16" if recipe.engine.precision == "auto" else recipe.engine.precision


def _libraries(device: Device) -> int:
    """On a CPU what this process, which has the same libraries and data, has had at its peak."""
    return CUDA if device == "cuda" else round(memory_gib(torch.device("cpu")) * GIB)


def _limit(device: Device, memory: float | None) -> float | None:
    if memory is not None:
        return memory * GIB
    if device == "cuda" and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return None


def _ways(device: Device) -> Sequence[tuple[int, bool, bool]]:
    """On a CPU there is no other memory to offload to."""
    return WAYS if device == "cuda" else [way for way in WAYS if not way[1]]


def _reference(job: Job, config: Any) -> Shape | None:
    """The frozen model beside the policy, where there is one during the training."""
    if job.reference.kind != "frozen":
        return None
    own = job.recipe.reference
    if own.path is not None:
        config = read_config(locate(own.path, own.revision), job.recipe.model.trust_remote_code)
    return shape_of(config, replace(job.recipe.model, lora=None))


def load_of(job: Job, where: Where, reference: Shape | None) -> Load:
    """The largest micro-batch that a rank can get: the budget, or the longest row, or all of a step if that is less.

    Rows are taken as the recipe wants them laid out; a model that cannot be packed pads them.
    """
    recipe = job.recipe
    budget = recipe.engine.tokens_per_device or TOKENS_PER_DEVICE[where.device]
    sides = [_positions(side, recipe) for side in (job.data.train, job.data.eval) if len(side)]
    sizes, sampled = np.sort(np.concatenate(sides))[::-1], 0
    if recipe.rollout is not None:
        answers = recipe.rollout.completions * recipe.rollout.max_new_tokens
        sizes, sampled = sizes + answers, recipe.rollout.batch_tokens
    step = int(sizes[: math.ceil(recipe.train.batch_size / where.ranks)].sum())
    return Load(max(int(sizes[0]), min(budget, step)), int(sizes[0]), sampled, reference)


def _positions(trees: Trees, recipe: Recipe) -> Any:
    if recipe.engine.packing == "off":
        return trees.positions
    return trees.packed_positions(recipe.engine.prefix_sharing != "off")


def make_row(recipe: Recipe, shape: Shape, load: Load, where: Where, way: tuple[int, bool, bool]) -> Row:
    """The estimate of one way, or why alignzoo would refuse it."""
    zero, optimizer, parameters = way
    engine = replace(
        recipe.engine, zero=zero, offload_optimizer="cpu" if optimizer else "none",
        offload_parameters="cpu" if parameters else "none", nvme_path=None, hpz=1, config=None,
    )  # fmt: skip
    variant = replace(recipe, engine=engine)
    try:
        if zero:
            deepspeed_config(variant, precision=where.precision, ranks=where.ranks, model_dtype=recipe.model.dtype)
    except AlignzooError as error:
        return Row(*way, None, error.what.splitlines()[0])
    setup = Setup(
        where.device, where.precision, where.ranks, zero, optimizer, parameters, engine.gradient_checkpointing,
        recipe.model.attention == "eager", recipe.train.optimizer,
    )  # fmt: skip
    return Row(*way, estimate(shape, setup, load, where.libraries))


def _advice(job: Job, config: Any, rows: Sequence[Row], limit: float, where: Where) -> str:
    """The first row that fits; where none does, the first change of the recipe with which one would."""
    for row in rows:
        if row.fits(limit):
            assert row.estimate is not None
            return f"fits in {limit / GIB:.1f} GiB: engine.{row.words}, {row.estimate.total / GIB:.2f} GiB"
    smallest = min(row.estimate.total for row in rows if row.estimate is not None)
    nothing = f"nothing fits in {limit / GIB:.1f} GiB: the smallest way takes {smallest / GIB:.2f}"
    for words, recipe in _changes(job.recipe, where):
        changed = replace(job, recipe=recipe)
        shape, load = shape_of(config, recipe.model), load_of(changed, where, _reference(changed, config))
        for row in (make_row(recipe, shape, load, where, way) for way in _ways(where.device)):
            if row.fits(limit):
                assert row.estimate is not None
                return f"{nothing}; with {words} and engine.{row.words} it is {row.estimate.total / GIB:.2f} GiB"
    return f"{nothing}; no change of the recipe that is tried here helps: take a smaller model or more devices"


def _changes(recipe: Recipe, where: Where) -> Iterator[tuple[str, Recipe]]:
    """Each on top of those before it."""
    budget = max(1, (recipe.engine.tokens_per_device or TOKENS_PER_DEVICE[where.device]) // 4)
    words = []
    if not recipe.engine.gradient_checkpointing:
        words.append("engine.gradient_checkpointing = true")
        recipe = replace(recipe, engine=replace(recipe.engine, gradient_checkpointing=True))
        yield " and ".join(words), recipe
    words.append(f"engine.tokens_per_device = {budget}")
    recipe = replace(recipe, engine=replace(recipe.engine, tokens_per_device=budget))
    yield " and ".join(words), recipe
    if recipe.model.lora is None:
        words.append("model.lora = {}")
        recipe = replace(recipe, model=replace(recipe.model, lora=LoRA()))
        yield " and ".join(words), recipe
    if recipe.model.quantization is None and where.device == "cuda":
        words.append('model.quantization = "4bit"')
        yield " and ".join(words), replace(recipe, model=replace(recipe.model, quantization="4bit"))


# --- time ------------------------------------------------------------------------------------------------------------


def with_probe(plan: Plan, plugins: Sequence[Path]) -> Plan:
    """Runs a few steps on this machine, in one process, and predicts the whole run by its tokens."""
    with tempfile.TemporaryDirectory(prefix="alignzoo-plan-") as name:
        folder = Path(name)
        RunDir(folder).write_recipe(table_of_job(plan.job))
        found = probe(folder, plugins)
    return replace(plan, probe=found, seconds=predict(plan.job, found))


def predict(job: Job, found: Probe) -> dict[str, float]:
    """Seconds of each part of the run: what was measured, by the tokens (or rounds) that there will be."""
    recipe, rollout = job.recipe, job.recipe.rollout
    if rollout is None:
        train = found.step_seconds * train_tokens(job) / found.step_tokens
        sampling = 0.0
    else:  # what will be sampled is not known: steps as they were
        train = found.step_seconds * job.steps / found.steps
        sampling = found.sampling_seconds * job.steps / (rollout.refresh_every_steps * rollout.iterations)
    every = recipe.eval.every_steps
    times = int(recipe.eval.at_start) + (job.steps // every if every else 0) + int(not every or job.steps % every > 0)
    held_out = tokens_of(job.data.eval) + tokens_of(job.pairs)
    wanted = reference_tokens(job) if job.reference.kind == "cached" else 0
    return {
        "loading": found.loading_seconds,
        "reference": found.reference_seconds * wanted / max(found.reference_tokens, 1),
        "answers": 2 * found.answers_seconds,
        "sampling": sampling,
        "steps": train,
        "evaluation": times * found.eval_seconds * held_out / max(found.eval_tokens, 1),
    }


def train_tokens(job: Job) -> int:
    """Tokens of all steps; a prompt counts once, as in num_tokens."""
    train = job.recipe.train
    sizes = job.data.train.packed_positions(True)
    if job.steps == count_steps(len(sizes), train.batch_size, train.epochs, None):
        return int(sizes.sum()) * train.epochs
    steps = steps_of(len(sizes), train.batch_size, train.epochs, train.max_steps, train.seed)
    return sum(int(sizes[list(step.rows)].sum()) for step in steps)


def remember(plan: Plan) -> None:
    """Keeps the prediction of a run in one process on this machine, to be compared with the run."""
    here = plan.where.device == ("cuda" if torch.cuda.is_available() else "cpu")
    if plan.where.ranks > 1 or not here or plan.own.estimate is None:
        return
    seconds, key = plan.seconds, recipe_hash(table_of_job(plan.job))
    fit = None if seconds is None else seconds["steps"] + seconds["evaluation"] + seconds["sampling"]
    memory = plan.probe.memory if plan.probe else _counted(plan, plan.own.estimate)
    keep(key, Path(plan.recipe.output.dir), plan.job.steps, fit, (seconds or {}).get("reference", 0.0), memory)


def _counted(plan: Plan, found: Estimate) -> float:
    """GiB as a run counts them: of a GPU without CUDA's own."""
    return (found.total - (CUDA if plan.where.device == "cuda" else 0)) / GIB


# --- telling ---------------------------------------------------------------------------------------------------------


def memory_table(rows: Sequence[Row], limit: float | None) -> list[list[str]]:
    """Header and cells in GiB; the way, each part, the sum, the machine's memory, and whether it fits."""
    cells = [["engine", *PARTS, "sum", "at", "host", *(["fits"] if limit is not None else [])]]
    for row in rows:
        if row.estimate is None:
            cells.append([row.words, *["-"] * len(PARTS), "-", row.refused, "-", *(["-"] if limit is not None else [])])
            continue
        own = row.estimate
        sizes = [_gib(own.parts[part]) for part in PARTS]
        verdict = [] if limit is None else ["yes" if row.fits(limit) else "no"]
        cells.append([row.words, *sizes, _gib(own.total), own.when, _gib(own.host), *verdict])
    return cells


def _gib(size: int) -> str:
    return "-" if not size else f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"


def heading(plan: Plan) -> str:
    shape, where = plan.shape, plan.where
    what = f"{shape.parameters:,} weights, {shape.trained:,} train"
    how = f"{where.ranks} x {where.device}, {where.precision} over {shape.dtype}, {plan.recipe.train.optimizer}"
    return f"{what}; {how}; micro-batches of {plan.load.positions} positions, longest row {plan.load.longest}"


def print_plan(plan: Plan, console: Console, say: Say) -> None:
    """The table of memory, the time, and how far such predictions were off."""
    say(heading(plan))
    header, *cells = memory_table(plan.rows, plan.limit)
    table = Table(*header, title="GiB on each device at its peak, computed")
    for line in cells:
        table.add_row(*line, style="bold" if line[0] == plan.own.words else None)
    console.print(table)
    if plan.advice:
        say(plan.advice)
    if plan.probe is not None and plan.seconds is not None:
        own = plan.own.estimate
        computed = f", computed {_counted(plan, own):.2f}" if own is not None and plan.where.ranks == 1 else ""
        say(f"probe: {plan.probe.steps} steps of {plan.job.steps} in one process here, "
            f"{plan.probe.step_tokens / plan.probe.step_seconds:.0f} tokens/s, "
            f"peak {plan.probe.memory:.2f} GiB{computed}")  # fmt: skip
        parts = ", ".join(f"{name} {_time(value)}" for name, value in plan.seconds.items() if value)
        say(f"the whole run: {_time(sum(plan.seconds.values()))} ({parts})")
    answered = settle()
    if answered:
        say(in_words(len(answered), *errors(answered)))


def in_words(count: int, time_off: float | None, memory_off: float | None) -> str:
    """The errors of the predictions that a run has answered."""
    said = [f"{name} off by {off:.0%}" for name, off in (("time", time_off), ("memory", memory_off)) if off is not None]
    return f"last {count} prediction{'s' * (count > 1)}: {', '.join(said)}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plan_table(plan: Plan) -> dict[str, Any]:
    """For --json; sizes in bytes."""
    answered = settle()
    time_off, memory_off = errors(answered)
    rows = [
        {"zero": row.zero, "offload_optimizer": row.offload_optimizer, "offload_parameters": row.offload_parameters,
         "refused": row.refused, "fits": None if plan.limit is None else row.fits(plan.limit),
         **({} if row.estimate is None else {**asdict(row.estimate), "total": row.estimate.total})}
        for row in plan.rows
    ]  # fmt: skip
    return {
        "recipe": plan.recipe.name, **asdict(plan.where), "memory": plan.limit,
        "model": {**asdict(plan.shape), "parameters": plan.shape.parameters},
        "load": {"positions": plan.load.positions, "longest": plan.load.longest, "sampled": plan.load.sampled},
        "rows": rows, "own": plan.rows.index(plan.own) if plan.own in plan.rows else None, "advice": plan.advice,
        "steps": plan.job.steps, "probe": None if plan.probe is None else asdict(plan.probe), "seconds": plan.seconds,
        "predictions": {"count": len(answered), "time_off": time_off, "memory_off": memory_off},
    }  # fmt: skip


def run_plan(
    recipe: Recipe, *, gpus: int | None, memory: float | None, probing: bool, plugins: Sequence[Path], to_json: bool,
    console: Console, say: Say,
) -> None:  # fmt: skip
    """The command."""
    found = make_plan(recipe, (lambda _: None) if to_json else say, gpus=gpus, memory=memory, plugins=plugins)
    if probing:
        say(f"probe: a few steps of {recipe.name} in a folder that is removed")
        found = with_probe(found, plugins)
    if to_json:
        console.file.write(json.dumps(plan_table(found), indent=2) + "\n")
    else:
        print_plan(found, console, say)
    remember(found)
