"""The training loop on accelerate.

Every term of a loss is a sum divided by the number of its units in the whole optimizer step, so micro-batches, their
order and the number of ranks change nothing but rounding.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from rich.console import Console
from torch import Tensor

from alignzoo.api import Loss, LossOutput
from alignzoo.batch import Layout, StepRows, blocks_of, count_steps, padded_layout, plan_step, steps_of
from alignzoo.errors import PluginError, RunError
from alignzoo.logprobs import Scorer
from alignzoo.metrics import Accumulator, memory_gib, record, record_preference
from alignzoo.objective import Objective, Prepared, Scored, State, count_units, make_step, masked_sum, pairs_of
from alignzoo.optim import make_optimizer, make_schedule
from alignzoo.progress import StepProgress, brief
from alignzoo.recipe import Recipe
from alignzoo.reference import AdapterOff, FrozenReference, Reference, ReferencePlan, Remembering
from alignzoo.tree import Tree

TOKENS_PER_DEVICE = {
    "cpu": 2048,
    "cuda": 8192,
}  # activations of a 135M model: some 3 GB; of a 7B model with them: 20 GB
Record = dict[str, float]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Some trees of a step, laid out for one forward pass."""

    trees: Sequence[Tree]
    layout: Layout
    step: Mapping[str, Tensor]  # the results of `prepare` for these trees
    units: tuple[int, ...]  # of each term of the loss

    @property
    def counted(self) -> int:
        """Completion tokens that count."""
        return sum(c.counted for t in self.trees for c in t.completions)


@dataclass(frozen=True)
class Whole:
    """What a step's sums are divided by."""

    units: tuple[int, ...]  # of each term, over all micro-batches and ranks
    counted: int

    @staticmethod
    def of(micro: Sequence[MicroBatch]) -> Whole:
        return Whole(tuple(sum(u) for u in zip(*(m.units for m in micro), strict=True)), sum(m.counted for m in micro))


@dataclass
class Tally:
    """What is collected until the next line of metrics."""

    metrics: Accumulator = field(default_factory=Accumulator)
    losses: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    positions: int = 0
    real_positions: int = 0
    skipped: int = 0


def check_machine(recipe: Recipe) -> None:
    """Raises RecipeError where this machine lacks the device, the precision or a tracker that the recipe asks for."""
    choose_precision(recipe)
    installed = {str(getattr(t, "value", t)) for t in get_available_trackers()}
    for tracker in recipe.log.trackers:
        if tracker not in installed:
            known = tracker in LOGGER_TYPE_TO_CLASS
            raise recipe.error(
                ("log", "trackers"),
                f'log.trackers: "{tracker}" is {"not installed" if known else "no tracker that accelerate knows"}',
                fix=f"pip install {tracker}" if known else "one of " + ", ".join(sorted(LOGGER_TYPE_TO_CLASS)),
            )


def on_cpu(recipe: Recipe) -> bool:
    """Whether the recipe computes on the CPU here."""
    if recipe.engine.device == "cuda" and not torch.cuda.is_available():
        raise recipe.error(("engine", "device"), 'engine.device = "cuda", and torch sees no GPU here')
    return recipe.engine.device == "cpu" or not torch.cuda.is_available()


def choose_precision(recipe: Recipe) -> str:
    """engine.precision on this machine: "fp32", "bf16" or "fp16"."""
    wanted, cpu = recipe.engine.precision, on_cpu(recipe)
    if wanted == "auto":
        return "bf16" if not cpu and torch.cuda.is_bf16_supported() else "fp32"
    if wanted == "fp16" and cpu:
        raise recipe.error(
            ("engine", "precision"), 'engine.precision = "fp16" needs a GPU', fix='use "fp32" or "bf16" on a CPU'
        )
    return wanted


def make_accelerator(recipe: Recipe, project_dir: str) -> Accelerator:
    """An accelerator for the device and precision of the recipe."""
    AcceleratorState._reset_state(reset_partial_state=True)  # a second run in one process may want another precision
    precision, cpu = choose_precision(recipe), on_cpu(recipe)
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares the search for another, and a warning that it failed
    return Accelerator(
        cpu=cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(recipe.log.trackers) or None,
        project_dir=project_dir,
    )


class Engine:
    """Trains one policy with one loss. `sink` gets every line of metrics."""

    def __init__(
        self,
        recipe: Recipe,
        loss: Loss,
        policy: Scorer,
        reference: ReferencePlan,
        frozen: Scorer | None,
        accelerator: Accelerator,
        *,
        console: Console,
        sink: Callable[[Record], None],
    ) -> None:
        self.recipe, self.console, self.sink = recipe, console, sink
        self.objective = Objective(loss)
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.budget = recipe.engine.tokens_per_device or TOKENS_PER_DEVICE[self.device.type]
        policy.to(self.device)
        self.bare = policy
        self.policy, self.optimizer = accelerator.prepare(policy, make_optimizer(recipe, policy))
        self.reference = self._make_reference(reference, frozen)
        self.held_out_reference = None if self.reference is None else Remembering(self.reference)
        self.pair_reference = None if self.reference is None else Remembering(self.reference)
        self.step_reference = None if self.reference is None else Remembering(self.reference)
        self.state: State = loss.init_state()
        self.tokens_seen = 0

    def _make_reference(self, plan: ReferencePlan, frozen: Scorer | None) -> Reference | None:
        if plan.kind == "adapter_off":
            return AdapterOff(self.bare, self.policy)
        if plan.kind == "frozen":
            assert frozen is not None
            return FrozenReference(frozen.to(self.device), self.accelerator.autocast)
        return None

    # --- training ----------------------------------------------------------------------------------------------------

    def fit(
        self,
        train: Sequence[Tree],
        held_out: Sequence[Tree],
        on_step: Callable[[int], None] = lambda _: None,
        pairs: Sequence[Tree] = (),
    ) -> None:
        """The whole training: evaluations, steps, metrics. `on_step` is called after each step (checkpoints).

        pairs: held-out pairs, chosen and rejected, that a loss on another kind of data is measured on too.
        """
        plan = self.recipe.train
        total = count_steps(len(train), plan.batch_size, plan.epochs, plan.max_steps)
        per_epoch = count_steps(len(train), plan.batch_size, 1, None)
        self.schedule = make_schedule(self.recipe, self.optimizer, total)
        every, tally = self.recipe.eval.every_steps, Tally()
        if self.recipe.eval.at_start:
            self.evaluate(held_out, 0, 0.0, pairs)
        self.policy.train()
        with StepProgress(self.console, total, "training") as progress:
            for rows in steps_of(len(train), plan.batch_size, plan.epochs, plan.max_steps, plan.seed):
                epoch = rows.step / per_epoch
                self._step(rows, [train[r] for r in rows.rows], tally)
                line = None
                if rows.step % self.recipe.log.every_steps == 0 or rows.step == total:
                    line = self._log_training(rows.step, epoch, tally)
                    tally = Tally()
                progress.advance(rows.step, line)
                on_step(rows.step)
                if rows.step == total or (every and rows.step % every == 0):
                    self.evaluate(held_out, rows.step, epoch, pairs)
                    self.policy.train()

    def _micro_batches(self, trees: Sequence[Tree], prepared: Prepared) -> list[list[MicroBatch]]:
        """Of each rank, its micro-batches."""
        plan = plan_step(trees, self.accelerator.num_processes, self.budget)
        return [[self._micro_batch(trees, members, prepared) for members in of_rank] for of_rank in plan]

    def _micro_batch(self, trees: Sequence[Tree], members: Sequence[int], prepared: Prepared) -> MicroBatch:
        chosen, step = [trees[i] for i in members], prepared.of(members)
        layout = padded_layout(chosen)
        return MicroBatch(chosen, layout, step, self.objective.units(chosen, layout, step))

    def _step(self, rows: StepRows, trees: Sequence[Tree], tally: Tally) -> None:
        """One optimizer step."""
        started = time.perf_counter()
        prepared, self.state = self._prepare(trees, self.state, self.step_reference)
        ranks = self._micro_batches(trees, prepared)
        whole = Whole.of([m for rank in ranks for m in rank])
        mine = ranks[self.accelerator.process_index]
        total, bad = torch.zeros((), device=self.device, dtype=torch.float64), _BadRows()
        for i, micro in enumerate(mine):
            last = i == len(mine) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.policy):
                loss, router = self._forward(micro, whole, tally.metrics, bad)
                if last:  # one flag for all micro-batches and ranks, so that no rank stops alone
                    self._stop_if(bad, f"step {rows.step}", rows.step - 1)
                self.accelerator.backward((loss + router) * self.accelerator.num_processes)
            total += loss.detach()
            tally.positions += micro.layout.positions
            tally.real_positions += micro.layout.real_positions
        self._update(rows.step, tally)
        tally.losses.append(self.accelerator.reduce(total, "sum"))
        tally.tokens += sum(t.tokens for t in trees)
        tally.seconds += time.perf_counter() - started
        if self.step_reference is not None:
            self.step_reference.forget()

    def _forward(self, micro: MicroBatch, whole: Whole, metrics: Accumulator, bad: _BadRows) -> tuple[Tensor, Tensor]:
        """A micro-batch's part of the step's loss, and of its router loss."""
        output, scores = self._apply(micro, metrics, self.step_reference, bad)
        self._check_units(micro, output)
        loss = torch.stack([masked_sum(t) / max(u, 1) for t, u in zip(output.terms, whole.units, strict=True)]).sum()
        router = loss.new_zeros(())
        if "router_loss" in scores:
            # a mean over the micro-batch's tokens; the one number here that depends on how a step is cut
            router = self.recipe.model.router_loss * micro.counted / whole.counted * scores["router_loss"]
            metrics.mean("router_loss", scores["router_loss"].reshape(1))
        return loss, router

    def _apply(
        self, micro: MicroBatch, metrics: Accumulator, reference: Reference | None, bad: _BadRows
    ) -> tuple[LossOutput, Mapping[str, Tensor]]:
        """Log-probs and the loss of a micro-batch, recorded."""
        table = None if reference is None else reference.score(micro.layout)
        scores = dict(self.policy(micro.layout, self.objective.stats))
        if not torch.is_grad_enabled():
            scores = {name: value.detach() for name, value in scores.items()}
        batch = self.objective.batch(Scored(micro.trees, micro.layout, scores, table, micro.step))
        output = self.objective(batch)
        record(metrics, self.objective.loss.name, batch, output)
        bad.look(micro, scores["logps"], table, output)
        return output, scores

    def _check_units(self, micro: MicroBatch, output: LossOutput) -> None:
        found = tuple(count_units(term) for term in output.terms)
        if found != micro.units:
            raise PluginError(
                f'loss "{self.objective.loss.name}": its terms have {found} units here, and {micro.units} with other '
                "log-probs",
                why="the mask of a term may depend on the data and on batch.step, never on the log-probs",
                fix="multiply the loss by zero where it shall not count, or compute the mask in prepare",
            )

    def _stop_if(self, bad: _BadRows, when: str, done: int) -> None:
        flag = torch.tensor(float(bool(bad.rows)), device=self.device)
        if self.accelerator.reduce(flag, "sum").item() > 0:
            raise RunError(
                f"{when}: {bad.what or 'another rank found a loss or log-prob that is not finite'}",
                why="rows " + ", ".join(bad.rows[:5]) + (f" and {len(bad.rows) - 5} more" if len(bad.rows) > 5 else ""),
                fix=f"the weights are as after step {done}: lower train.learning_rate, look at these rows, "
                'or set engine.precision = "fp32"',
            )

    def _update(self, step: int, tally: Tally) -> None:
        """Clips, checks the gradient, and moves the weights."""
        limit = self.recipe.train.max_grad_norm
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(trained, limit if limit > 0 else float("inf"))
        if not torch.isfinite(norm) and self.accelerator.scaler is None:
            raise RunError(
                f"step {step}: the gradient is not finite (norm {norm.item()})",
                why="the loss and all log-probs were finite",
                fix=f"the weights are as after step {step - 1}: lower train.learning_rate, "
                'or set engine.precision = "fp32"',
            )
        self.learning_rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        if self.optimizer.step_was_skipped:  # fp16: the loss scale was too large
            tally.skipped += 1
        self.schedule.step()
        self.optimizer.zero_grad()
        tally.metrics.mean("grad_norm", norm.reshape(1))

    # --- the whole step, for prepare ---------------------------------------------------------------------------------

    def _prepare(self, trees: Sequence[Tree], state: State, reference: Reference | None) -> tuple[Prepared, State]:
        """Runs the loss's `prepare` over all rows of a step; without one it does nothing."""
        loss = self.objective.loss
        if not loss.has_prepare:
            return Prepared(), state
        table = self._sums(trees, reference) if loss.prepare_pass else None
        counts = [len(t.completions) for t in trees]
        starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        values, new_state = self.objective.prepare(make_step(loss, trees, table), state, starts[-1])
        return Prepared(values, tuple(starts)), new_state

    @torch.no_grad()
    def _sums(self, trees: Sequence[Tree], reference: Reference | None) -> Tensor:
        """Policy sum, reference sum and length of every branch, (N, 3), trees in order, the same on every rank."""
        mismatched = self.objective.loss.needs_mismatched
        sizes = [len(tree.branches if mismatched else tree.completions) for tree in trees]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        table = torch.zeros(sum(sizes), 3, device=self.device)
        plan = plan_step(trees, self.accelerator.num_processes, self.budget, mismatched=mismatched)
        for members in plan[self.accelerator.process_index]:
            layout = padded_layout([trees[i] for i in members], mismatched=mismatched)
            index = [
                starts[i] + k
                for i in members
                for k in range(len(trees[i].branches if mismatched else trees[i].completions))
            ]
            mask = torch.from_numpy(layout.mask).to(self.device)
            scores = self.policy(layout)["logps"]
            table[index, 0] = scores.masked_fill(~mask, 0.0).sum(-1).float()
            if reference is not None:
                table[index, 1] = reference.score(layout).masked_fill(~mask, 0.0).sum(-1).float()
            table[index, 2] = mask.sum(-1).float()
        return self.accelerator.reduce(table, "sum")  # type: ignore[no-any-return]

    # --- evaluation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, held_out: Sequence[Tree], step: int, epoch: float, pairs: Sequence[Tree] = ()) -> Record:
        """Loss and all metrics on the held-out rows, in consecutive blocks of batch_size; written with eval_ names."""
        if not held_out:
            return {}
        self.policy.eval()
        started, metrics, bad = time.perf_counter(), Accumulator(), _BadRows()
        size = self.recipe.train.batch_size
        blocks, pair_blocks = ([[rows[i] for i in b] for b in blocks_of(len(rows), size)] for rows in (held_out, pairs))
        with StepProgress(self.console, len(blocks) + len(pair_blocks), f"evaluating at step {step}") as progress:
            loss = self._evaluate_loss(blocks, metrics, bad, progress)
            for number, trees in enumerate(pair_blocks, start=len(blocks) + 1):
                self._evaluate_pairs(trees, metrics)
                progress.advance(number)
        self._stop_if(bad, f"evaluation at step {step}", step)
        line: Record = {"step": step, "epoch": round(epoch, 6), "eval_loss": loss}
        line |= {f"eval_{name}": value for name, value in metrics.result().items()}
        line["eval_runtime"] = time.perf_counter() - started
        self._write(line)
        self.console.print(f"held-out, step {step}: {brief(line)}", highlight=False)
        return line

    def _evaluate_loss(
        self, blocks: Sequence[Sequence[Tree]], metrics: Accumulator, bad: _BadRows, progress: StepProgress
    ) -> float:
        """The loss over all blocks: the sum of each term divided by all its units."""
        sums, units = [], []
        for number, trees in enumerate(blocks, start=1):
            prepared, _ = self._prepare(trees, self.state, self.held_out_reference)
            for micro in self._micro_batches(trees, prepared)[self.accelerator.process_index]:
                output, _scores = self._apply(micro, metrics, self.held_out_reference, bad)
                sums.append(torch.stack([masked_sum(t).double() for t in output.terms]))
                units.append(torch.tensor(micro.units))
            progress.advance(number)
        return float((torch.stack(sums).sum(0).cpu() / torch.stack(units).sum(0).clamp(min=1)).sum())

    def _evaluate_pairs(self, trees: Sequence[Tree], metrics: Accumulator) -> None:
        """Which side of held-out pairs the policy prefers, for a loss that does not eat pairs itself."""
        for members in plan_step(trees, self.accelerator.num_processes, self.budget)[self.accelerator.process_index]:
            layout = padded_layout([trees[i] for i in members])
            table = None if self.pair_reference is None else self.pair_reference.score(layout)
            record_preference(
                metrics, pairs_of(Scored([trees[i] for i in members], layout, self.policy(layout), table))
            )

    # --- metrics -----------------------------------------------------------------------------------------------------

    def _log_training(self, step: int, epoch: float, tally: Tally) -> Record:
        self.tokens_seen += tally.tokens
        line: Record = {"step": step, "epoch": round(epoch, 6)}
        line["loss"] = torch.stack(tally.losses).mean().item()
        line |= tally.metrics.result()
        line["learning_rate"] = self.learning_rate
        line["num_tokens"] = self.tokens_seen
        line["tokens_per_second"] = tally.tokens / tally.seconds
        line["padding_fraction"] = 1 - tally.real_positions / max(tally.positions, 1)
        line["memory"] = memory_gib(self.device)
        if self.accelerator.scaler is not None:
            line["skipped_steps"] = tally.skipped
        self._write(line)
        return line

    def _write(self, line: Record) -> None:
        self.sink(line)
        if self.recipe.log.trackers:
            self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=int(line["step"]))


@dataclass
class _BadRows:
    """The rows whose log-probs or loss are not finite."""

    what: str = ""
    rows: list[str] = field(default_factory=list)

    def look(self, micro: MicroBatch, policy: Tensor, reference: Tensor | None, output: LossOutput) -> None:
        tables = {"a log-prob of the policy": policy, "a log-prob of the reference": reference}
        for what, table in tables.items():
            if table is not None and not torch.isfinite(table).all():
                index = (~torch.isfinite(table)).any(-1).nonzero().flatten().tolist()
                self._add(what, {micro.layout.keys[n][0] for n in index}, micro)
                return
        if not all(torch.isfinite(masked_sum(t)) for t in output.terms):
            self._add("the loss", {t.row for t in micro.trees}, micro)

    def _add(self, what: str, rows: set[int], micro: MicroBatch) -> None:
        self.what = self.what or f"{what} is not finite"
        self.rows += [t.where or str(t.row) for t in micro.trees if t.row in rows]
