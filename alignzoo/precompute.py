"""The reference's log-probs of a whole run, before its first step: found in the cache, or computed and kept there.

Every rank ends with the same table of all completions that the run will ask for. The first rank reads and writes the
cache; what it finds goes to the others, and what all compute comes to it. Where the reference is the start model, the
policy computes them before it moves, so there is no second model; another one is loaded only if something is missing,
and dropped before training.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor

from alignzoo.batch import PADDED, Layout, Way, steps_of
from alignzoo.check import Job
from alignzoo.engine import Engine
from alignzoo.errors import RunError
from alignzoo.fingerprint import fingerprint_of_files, fingerprint_of_model
from alignzoo.loading import load_reference, make_packed, make_padded
from alignzoo.logprobs import SCORER
from alignzoo.micro import memory_in_words
from alignzoo.model import locate
from alignzoo.once import Once, joined
from alignzoo.progress import StepProgress, sayer
from alignzoo.reference import AdapterOff, Cached, FrozenReference, Reference
from alignzoo.refstore import Identity, ReferenceStore, prompt_key, row_key
from alignzoo.sharding import hold_frozen, of_all_ranks, same_everywhere
from alignzoo.tree import LogPs, Tree

if TYPE_CHECKING:
    from accelerate import Accelerator

DRIFT_ROWS = 16
TOLERANCE = {True: 1e-3, False: 0.1}  # nats per token: exact (float32 throughout), or not
_LOOKED_UP = 2000  # completions that are looked up, and sent to the other ranks, at once
_BLOCK = 4  # micro-batches of each rank whose log-probs are kept in one transaction

Score = Callable[[Layout], Tensor]


@dataclass
class Wanted:
    """All completions that a run asks the reference for. Those that are the same have one number."""

    keys: list[bytes] = field(default_factory=list)  # of each completion that is different
    lengths: list[int] = field(default_factory=list)
    homes: list[tuple[int, int, int]] = field(default_factory=list)  # where each stands: (data set, index, slot)
    cost: list[int] = field(default_factory=list)  # positions with its prompt
    prompts: list[int] = field(default_factory=list)  # the same number for those of the same prompt
    first: list[dict[int, int]] = field(default_factory=list)  # of each data set: row -> its first entry of `number`
    number: list[int] = field(default_factory=list)  # of each completion, the same ones too
    data: list[Sequence[Tree]] = field(default_factory=list)
    _known: dict[bytes, int] = field(default_factory=dict)
    _prompts: dict[bytes, int] = field(default_factory=dict)

    def add(self, data: Sequence[Tree], rows: Sequence[int], mismatched: bool) -> None:
        """The rows with these indices."""
        firsts: dict[int, int] = {}
        for index in rows:
            tree = data[index]
            firsts[tree.row] = len(self.number)
            for slot, completion in enumerate(tree.branches if mismatched else tree.completions):
                key = row_key(tree.prompt, completion.ids)
                if key not in self._known:
                    self._known[key] = len(self.keys)
                    self.keys.append(key)
                    self.lengths.append(len(completion.ids))
                    self.homes.append((len(self.data), index, slot))
                    self.cost.append(len(tree.prompt) + len(completion.ids))
                    self.prompts.append(self._prompts.setdefault(prompt_key(tree.prompt), len(self._prompts)))
                self.number.append(self._known[key])
        self.first.append(firsts)
        self.data.append(data)

    def tree(self, number: int) -> Tree:
        """A completion with its prompt."""
        data, index, slot = self.homes[number]
        found = self.data[data][index]
        return Tree(number, found.prompt, (found.branches[slot],), where=found.where)


class Table:
    """The log-probs of `Wanted`, one completion after the other, and which of them are there."""

    def __init__(self, wanted: Wanted) -> None:
        self.starts = np.cumsum([0, *wanted.lengths])
        self.values = np.zeros(int(self.starts[-1]), np.float32)
        self.have = np.zeros(len(wanted.lengths), np.bool_)

    def put(self, rows: Mapping[int, LogPs]) -> None:
        for number, logps in rows.items():
            self.values[self.starts[number] : self.starts[number + 1]] = logps
            self.have[number] = True

    def row(self, number: int) -> LogPs:
        return self.values[self.starts[number] : self.starts[number + 1]]


class Precompute:
    """Made before the models are loaded, since a model given from Python is told by the weights that it has then."""

    def __init__(self, job: Job, accelerator: Accelerator, console: Console) -> None:
        self.job, self.accelerator, self.console, self.say = job, accelerator, console, sayer(console)
        self.own = job.live.model if job.reference.kind == "cached" and job.recipe.reference.path is None else None
        self.used: dict[str, Any] = {}  # how much the cache had, for the report
        self.given = fingerprint_of_model(self.own) if self.own is not None and accelerator.is_main_process else None

    def run(self, engine: Engine, start: int = 0) -> None:
        """Fills the engine's references. start: the step that a checkpoint was made after; the policy has moved then.

        Raises RunError where the policy, which is the reference before its first step, gives other log-probs than the
        cache holds, and the recipe forbids to compute without it.
        """
        job = self.job
        if job.reference.kind != "cached":
            return
        wanted = wanted_rows(job, start)
        self.wanted, self.table, self.engine = wanted, Table(wanted), engine
        self.source = _Source(job, engine, self.accelerator, self.say)
        store = self._open()
        try:
            self._fill(store)
            if job.recipe.reference.path is None and start == 0:
                self._check_drift(store)
        finally:
            store.close()
            self.source.drop()
        engine.use_reference(*self._references())
        del self.wanted, self.table  # what is needed of them, the references have

    def _references(self) -> Iterator[Cached]:
        """Of training rows, held-out rows and pairs."""
        wanted, table = self.wanted, self.table
        starts, values = table.starts, table.values
        if len(wanted.number) != len(wanted.keys):  # completions that are there more than once
            lengths = np.asarray(wanted.lengths)[wanted.number]
            starts = np.cumsum([0, *lengths.tolist()])
            values = np.concatenate([table.row(n) for n in wanted.number])
        for first in wanted.first:
            yield Cached(first, starts, values, self.engine.rank, self.engine.device)

    def _open(self) -> ReferenceStore:
        """The store, on the first rank; others get one that keeps nothing."""
        fingerprint = self.given if self.own is not None else self._of_files()
        if self.engine.rank:
            return ReferenceStore(None, self.say, off="the first rank does")
        off = "" if fingerprint else f"the files of {self.source.path} were not found"
        numerics = numerics_of(self.job, self.engine)
        return ReferenceStore(Identity(fingerprint or "", numerics, self.source.words), self.say, off)

    def _of_files(self) -> str | None:
        """The fingerprint, on the first rank. A reference of the hub that is not on this machine is loaded first."""
        first, where = self.engine.rank == 0, self.source.location
        found = fingerprint_of_files(where) if first else None
        if self.job.recipe.reference.path is not None and same_everywhere(self.accelerator, found is None):
            self.source.reference()
            found = fingerprint_of_files(where) if first else None
        return found

    # --- filling

    def _fill(self, store: ReferenceStore) -> None:
        """All that is missing in the table: from the store, else computed."""
        began, wanted, table = time.monotonic(), self.wanted, self.table
        everything = range(len(wanted.keys))
        for at in range(0, len(wanted.keys), _LOOKED_UP):
            self._look_up(store, everything[at : at + _LOOKED_UP])
        self.found = np.flatnonzero(table.have)
        missing = np.flatnonzero(~table.have)
        if store.bad:
            self.say(f"{store.bad} rows of {store.path} were not as they had been written: they are computed again")
        computed = self._compute(store, missing.tolist()) if len(missing) else 0
        self.used = {"completions": len(wanted.keys), "computed": computed, "seconds": time.monotonic() - began}
        where = f"not kept: {store.off}" if store.off else str(store.folder)
        self.say(
            f"reference log-probs: {len(wanted.keys) - computed} of {len(wanted.keys)} completions from the cache, "
            f"{computed} computed in {time.monotonic() - began:.1f} s ({where})"
        )

    def _look_up(self, store: ReferenceStore, numbers: Sequence[int]) -> None:
        """Takes from the store what it has of these completions, on all ranks."""
        wanted = self.wanted
        found = store.find({wanted.keys[n]: wanted.lengths[n] for n in numbers})
        rows = {n: found[wanted.keys[n]] for n in numbers if wanted.keys[n] in found}
        self.table.put(same_everywhere(self.accelerator, rows))

    def _compute(self, store: ReferenceStore, missing: Sequence[int], look: bool = True) -> int:
        """Computes completions block by block, the longest first, and keeps each block. Returns how many.

        Another run that fills the same store is not waited for: this one begins at the other end, and looks before each
        block for what is there by then.
        """
        reference = self.source.reference()
        done = computed = 0
        with store.alone() as alone, StepProgress(self.console, len(missing), "reference log-probs") as progress:
            blocks = self._blocks(missing)
            alone = same_everywhere(self.accelerator, alone)
            if not alone:
                self.say("another run computes log-probs of the same reference: the work is shared")
                blocks.reverse()
            for block in blocks:
                done += len(block)
                if look:
                    self._look_up(store, block)
                    block = [n for n in block if not self.table.have[n]]
                if block:
                    rows = self._score(reference.score, block, self.source.way)
                    store.keep({self.wanted.keys[n]: logps for n, logps in rows.items()})
                    self.table.put(rows)
                    computed += len(block)
                progress.advance(done)
        return computed

    def _blocks(self, missing: Sequence[int]) -> list[list[int]]:
        """Completions in blocks of like length, those of one prompt together."""
        wanted, of_prompt = self.wanted, dict[int, list[int]]()
        for n in missing:
            of_prompt.setdefault(wanted.prompts[n], []).append(n)
        blocks: list[list[int]] = []
        room, most = 0, _BLOCK * self.engine.budget * self.engine.ranks
        for numbers in sorted(of_prompt.values(), key=lambda numbers: -max(wanted.cost[n] for n in numbers)):
            for n in numbers:
                if not blocks or wanted.cost[n] > room:
                    blocks.append([])
                    room = most
                blocks[-1].append(n)
                room -= wanted.cost[n]
        return blocks

    def _score(self, score: Score, numbers: Sequence[int], way: Way) -> dict[int, LogPs]:
        """The log-probs of some completions, computed by all ranks, on all of them."""
        engine, mine = self.engine, Once()
        trees = joined((self.wanted.tree(n) for n in numbers), engine.budget, way, mismatched=False)
        with torch.no_grad():
            for round, _members in engine.bare_rounds(trees, way=way):
                engine.beat("reference log-probs")
                with memory_in_words("reference log-probs", round, engine.budget):
                    table = score(round.layout).float()
                if round.mine is not None:
                    mine.add(round.mine.trees, round.layout, {"logps": table})
        found = Once.merged(of_all_ranks(self.accelerator, mine)).kept
        return {n: found[self.wanted.keys[n]]["logps"].numpy() for n in numbers}

    # --- drift

    def _check_drift(self, store: ReferenceStore) -> None:
        """Scores some completions with the policy, which still is the reference; over tolerance it stops, or computes
        all of them again."""
        rows = self.found if len(self.found) else np.arange(len(self.wanted.keys))
        if not len(rows):
            return
        limit = TOLERANCE[_exact(self.job, self.engine)]
        largest, mean = self._drift(rows)
        if largest > limit or not np.isfinite(largest):
            words = (
                f"the policy, which is the reference before its first step, differs by up to {largest:.3g} nats per "
                f"token from the log-probs in {store.folder}"
            )
            if self.job.recipe.reference.mode == "cache":
                raise RunError(
                    words, why=f"at most {limit:g} is rounding", fix="alignzoo cache clear, or reference.mode = auto"
                )
            self.say(f"WARNING: {words}; at most {limit:g} is rounding: all of them are computed again")
            self.table.have[:] = False
            self._compute(store, range(len(self.wanted.keys)), look=False)
            largest, mean = self._drift(np.arange(len(self.wanted.keys)))
        self.engine.first_line |= {"reference/drift": largest, "reference/drift_mean": mean}

    def _drift(self, rows: npt.NDArray[Any]) -> tuple[float, float]:
        """The largest and the mean difference per token of policy and table, over rows evenly spread among these."""
        count = min(DRIFT_ROWS, len(rows))
        numbers = [int(rows[i * len(rows) // count]) for i in range(count)]
        engine = self.engine
        training = engine.bare.training
        engine.bare.eval()
        try:
            found = self._score(lambda layout: engine.policy(layout)["logps"], numbers, engine.way)
        finally:
            engine.bare.train(training)
        apart = np.concatenate([np.abs(logps - self.table.row(n)) for n, logps in found.items()])
        return float(apart.max()), float(apart.mean())


class _Source:
    """Who computes the reference's log-probs: the policy before it moves, or a model that is loaded when needed."""

    def __init__(self, job: Job, engine: Engine, accelerator: Accelerator, say: Callable[[str], None]) -> None:
        self.job, self.engine, self.accelerator, self.say = job, engine, accelerator, say
        own = job.recipe.reference.path
        self.path = own or job.recipe.model.path
        self.location = locate(own, job.recipe.reference.revision) if own else job.location
        self.words = "a model given from Python" if job.live.model is not None and not own else self.path
        self.way = engine.way  # how it gets its rows
        self._made: Reference | None = None

    def reference(self) -> Reference:
        """All ranks call it."""
        if self._made is None:
            self._made = self._load() if self.job.recipe.reference.path else self._policy()
        return self._made

    def _policy(self) -> Reference:
        return AdapterOff(self.engine.bare, self.engine.policy)

    def _load(self) -> Reference:
        scorer = load_reference(self.job, self.engine.bare.causal_lm, self.accelerator, self.say)
        scorer.home = self.engine.device
        forward = hold_frozen(self.job.recipe, self.accelerator, scorer.eval().requires_grad_(False))
        recipe, tree, longest = self.job.recipe, self.job.data.train[0], self.job.recipe.data.max_length
        if self.way.packed:
            reason = make_packed(recipe, self.engine, scorer, forward, self.way, tree, longest)
            if reason:
                make_padded(scorer)
                self.way = PADDED
                self.say(f"layout of the reference: padded: {reason}")
        return FrozenReference(forward)

    def drop(self) -> None:
        """Lets go of a model that was loaded."""
        made, self._made = self._made, None
        if isinstance(made, FrozenReference):
            destroy = getattr(made.forward, "destroy", None)
            if destroy is not None:  # DeepSpeed's engine has hooks that hold it
                destroy()
        del made
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def wanted_rows(job: Job, start: int) -> Wanted:
    """The completions of the rows that are still to be trained on, and of all held-out ones."""
    wanted, train, data = Wanted(), job.recipe.train, job.data
    steps = steps_of(len(data.train), train.batch_size, train.epochs, train.max_steps, train.seed)
    used = sorted({row for step in steps if step.step > start for row in step.rows})
    mismatched = job.loss.needs_mismatched
    wanted.add(data.train, used, mismatched)
    wanted.add(data.eval, range(len(data.eval)), mismatched)
    wanted.add(job.pairs, range(len(job.pairs)), False)
    return wanted


def _exact(job: Job, engine: Engine) -> bool:
    """Whether log-probs are computed in float32 throughout."""
    model = job.recipe.model
    narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in engine.bare.parameters())
    return engine.accelerator.mixed_precision == "no" and not narrow and model.quantization is None


def numerics_of(job: Job, engine: Engine) -> dict[str, Any]:
    """How log-probs are computed: what of it changes more than the last bits."""
    model = job.recipe.model
    return {
        "scorer": SCORER,
        "layout": engine.way.name,
        "precision": engine.accelerator.mixed_precision,
        "dtype": model.dtype,
        "quantization": model.quantization,
        "attention": getattr(engine.bare.causal_lm.config, "_attn_implementation", model.attention),
        "device": engine.device.type,
    }
