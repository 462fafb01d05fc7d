"""The training loop on accelerate.

Every term of a loss is a sum divided by the number of its units in the whole optimizer step, so micro-batches, their
order and the number of ranks change nothing but rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count, repeat
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from alignzoo.adapt import Steering
from alignzoo.api import Loss, LossOutput
from alignzoo.batch import PADDED, StepRows, Way, blocks_of, count_steps, plan_step, steps_of, windows_of
from alignzoo.errors import PluginError, RunError
from alignzoo.evalrows import RowScores
from alignzoo.logprobs import Scorer, is_mixture_of_experts
from alignzoo.metrics import Accumulator, memory_gib, record, record_preference
from alignzoo.micro import BadRows, MicroBatch, Round, Tally, Whole, memory_in_words, rounds_of
from alignzoo.objective import (
    Objective,
    Prepared,
    Scored,
    State,
    count_units,
    make_step,
    masked_sum,
    of_policy,
    pairs_of,
)  # fmt: skip
from alignzoo.once import Once, joined
from alignzoo.optim import make_optimizer, make_schedule
from alignzoo.progress import StepProgress, brief
from alignzoo.recipe import Recipe
from alignzoo.reference import AdapterOff, FrozenReference, ReferencePlan, Remembering, Scores
from alignzoo.sharding import hold, hold_frozen, of_all_ranks
from alignzoo.tree import Tree

TOKENS_PER_DEVICE = {
    "cpu": 2048,
    "cuda": 8192,
}  # activations of a 135M model: some 3 GB; of a 7B model with them: 20 GB
Record = dict[str, float]


class Online(Protocol):
    """Answers prompts during the run: what the engine needs of rollout.Rollouts."""

    def trees(self, rows: StepRows, window: Sequence[StepRows], prompts: Sequence[Tree]) -> Sequence[Tree]: ...

    def held_out(self, prompts: Sequence[Tree], step: int, metrics: Accumulator) -> Sequence[Tree]: ...

    def begin(self) -> None: ...

    def state(self, done: int, window: Sequence[StepRows]) -> dict[str, Any]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


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
        self.objective, self.steering = Objective(loss), Steering(recipe, loss)
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.budget = recipe.engine.tokens_per_device or TOKENS_PER_DEVICE[self.device.type]
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.bare, policy.home = policy, self.device
        sparse = is_mixture_of_experts(policy.causal_lm)
        self.holder = hold(recipe, accelerator, policy, make_optimizer(recipe, policy), sparse=sparse)
        self.policy = self.holder.policy
        self.frozen: Scorer | None = None
        self.frozen_forward: Callable[..., Any] | None = None
        make = self._reference_maker(reference, frozen)
        self.held_out_reference, self.pair_reference, self.step_reference = make(), make(), make()
        self.first_line: Record = {}  # goes into the first line of training metrics
        self.state: State = loss.init_state()
        self.tokens_seen = 0
        self.tally = Tally()
        self.online: Online | None = None  # rows are prompts, and it answers them
        self.window: Sequence[StepRows] = ()  # the steps whose prompts are answered together, the present one's
        self.way: Way = PADDED  # how trees are laid out, see loading.choose_layout
        self.beat: Callable[[str], None] = lambda _: None  # told what begins, see watchdog.py
        self.on_rows: Callable[[int, Sequence[Tree], RowScores], None] = lambda *_: None  # gets each evaluation's rows
        self.once: Once | None = None  # within an evaluation that asks for completions more than once

    def use_reference(self, step: Scores, held_out: Scores, pairs: Scores) -> None:
        """The reference's log-probs of training rows, held-out rows and held-out pairs, where they are kept."""
        self.step_reference, self.held_out_reference, self.pair_reference = step, held_out, pairs

    def _reference_maker(self, plan: ReferencePlan, frozen: Scorer | None) -> Callable[[], Scores | None]:
        if plan.kind in ("none", "cached"):  # cached: use_reference follows
            return lambda: None
        reference: AdapterOff | FrozenReference
        if plan.kind == "adapter_off":
            reference = AdapterOff(self.bare, self.policy)
        else:
            assert frozen is not None
            self.frozen, frozen.home = frozen.eval().requires_grad_(False), self.device
            self.frozen_forward = hold_frozen(self.recipe, self.accelerator, frozen)
            reference = FrozenReference(self.frozen_forward)
        return lambda: Remembering(reference, self.rank, self.ranks)

    @torch.no_grad()
    def inside(self, run: Callable[[Any], Any]) -> Any:
        """What `run` makes of the model, within the wrapped module: under ZeRO-3 the weights are at hand only there.

        All ranks call it, and do the same number of forward passes in it.
        """
        return self.policy(None, run=run)

    # --- training ----------------------------------------------------------------------------------------------------

    def fit(
        self,
        train: Sequence[Tree],
        held_out: Sequence[Tree],
        on_step: Callable[[int, Record], bool] = lambda *_: False,
        pairs: Sequence[Tree] = (),
        start: int = 0,
        on_start: Callable[[Record], bool] = lambda _: False,
    ) -> None:
        """The whole training: evaluations, steps, metrics.

        on_step: called after each step with its evaluation, {} where there was none (checkpoints); True ends it
        pairs: held-out pairs, chosen and rejected, that a loss on another kind of data is measured on too
        start: the step that a checkpoint was restored from
        on_start: called with the evaluation before the first step, where eval.at_start has one; True ends it there
        """
        plan, every, rollout = self.recipe.train, self.recipe.eval.every_steps, self.recipe.rollout
        size, times = (rollout.refresh_every_steps, rollout.iterations) if rollout else (1, 1)
        total = count_steps(len(train), plan.batch_size, plan.epochs, plan.max_steps, times)
        per_epoch = count_steps(len(train), plan.batch_size, 1, None, times)
        if start == 0:
            self.make_schedule(total)
            if self.online is not None:
                self.online.begin()
            if self.recipe.eval.at_start and on_start(self.evaluate(held_out, 0, 0.0, pairs)):
                return
        self.bare.train()
        batches = steps_of(len(train), plan.batch_size, plan.epochs, None, plan.seed)
        steps = ((rows, window) for window in windows_of(batches, size, times, total) for rows in window)
        with StepProgress(self.console, total, "training", start) as progress:
            for rows, self.window in steps:
                if rows.step <= start:
                    continue
                epoch = rows.step / per_epoch
                self._steer(rows.step, total)
                self._step(rows, self._trees(rows, train))
                self._sync_reference(rows.step)
                line, found = None, Record()
                if rows.step % self.recipe.log.every_steps == 0 or rows.step == total:
                    line = self._log_training(rows.step, epoch)
                progress.advance(rows.step, line)
                if rows.step == total or (every and rows.step % every == 0):
                    found = self.evaluate(held_out, rows.step, epoch, pairs)
                    self.bare.train()
                if on_step(rows.step, found):
                    break

    def _steer(self, step: int, total: int) -> None:
        """Another loss from here on, where settings of it move."""
        loss = self.steering.at(step, total)
        if loss is not self.objective.loss:
            self.objective = Objective(loss)

    def _trees(self, rows: StepRows, train: Sequence[Tree]) -> Sequence[Tree]:
        if self.online is None:
            return [train[r] for r in rows.rows]
        trees = self.online.trees(rows, self.window, train)
        self.tally.metrics.share("rollout/empty_steps", not trees, 1)
        return trees

    def _sync_reference(self, step: int) -> None:
        """TR-DPO, equation 3 of arXiv:2404.09656: reference <- alpha policy + (1 - alpha) reference."""
        settings = self.recipe.reference
        if settings.sync_every_steps is None or step % settings.sync_every_steps or self.frozen is None:
            return
        for kept, trained in zip(self.frozen.parameters(), self.bare.parameters(), strict=True):
            self.holder.blend(kept, trained, settings.sync_alpha)
        for memory in (self.held_out_reference, self.pair_reference):
            if memory is not None:
                memory.forget()

    def make_schedule(self, total: int) -> None:
        """The schedule of the learning rate over all steps of the run."""
        self.schedule = make_schedule(self.recipe, self.holder.optimizer, total)

    def _rounds(self, trees: Sequence[Tree], prepared: Prepared) -> tuple[list[Round], Whole]:
        """The forward passes of a step, and what its sums are divided by. Every rank knows all of it."""
        plan = plan_step(trees, self.ranks, self.budget, way=self.way)
        micro = [[self._micro_batch(trees, members, prepared) for members in of_rank] for of_rank in plan]
        return rounds_of(micro, self.rank, self.way), Whole.of([m for of_rank in micro for m in of_rank])

    def _micro_batch(self, trees: Sequence[Tree], members: Sequence[int], prepared: Prepared) -> MicroBatch:
        chosen, step = [trees[i] for i in members], prepared.of(members)
        layout = self.way.layout(chosen)
        return MicroBatch(chosen, layout, step, self.objective.units(chosen, layout, step))

    def _step(self, rows: StepRows, trees: Sequence[Tree]) -> None:
        """One optimizer step."""
        started, tally = time.perf_counter(), self.tally
        if not trees:  # of all the completions that were sampled for it, nothing could be learned
            self.learning_rate = self.schedule.get_last_lr()[0]
            self.schedule.step()
            return
        prepared, self.state = self._prepare(trees, self.state, self.step_reference)
        rounds, whole = self._rounds(trees, prepared)
        total, bad = torch.zeros((), device=self.device, dtype=torch.float64), BadRows()
        for i, round in enumerate(rounds):
            self.beat(f"step {rows.step}, micro-batch {i + 1} of {len(rounds)}")
            last = i == len(rounds) - 1
            with self.holder.accumulate(last), memory_in_words(f"step {rows.step}", round, self.budget):
                loss, router = self._forward(round, whole, tally.metrics, bad)
                if last:  # one flag for all micro-batches and ranks, so that no rank stops alone
                    self._stop_if(bad, f"step {rows.step}", rows.step - 1)
                self.holder.backward((loss + router) * self.ranks)
            total += loss.detach()
        self._update(rows.step)
        tally.losses.append(self.accelerator.reduce(total, "sum"))
        tally.tokens += sum(t.tokens for t in trees)
        tally.seconds += time.perf_counter() - started
        if self.step_reference is not None:
            self.step_reference.forget()

    def _forward(self, round: Round, whole: Whole, metrics: Accumulator, bad: BadRows) -> tuple[Tensor, Tensor]:
        """This rank's part of the step's loss in a round, and of its router loss."""
        output, scores = self._apply(round, metrics, self.step_reference, bad)
        if round.mine is None or output is None:
            nothing = of_policy(scores).sum() * 0.0
            return nothing, nothing * scores.get("router_loss", 0.0)
        self._check_units(round.mine, output)
        loss = torch.stack([masked_sum(t) / max(u, 1) for t, u in zip(output.terms, whole.units, strict=True)]).sum()
        router = loss.new_zeros(())
        if "router_loss" in scores:
            # a mean over the micro-batch's tokens; the one number here that depends on how a step is cut
            router = self.recipe.model.router_loss * round.mine.counted / whole.counted * scores["router_loss"]
            metrics.mean("router_loss", scores["router_loss"].reshape(1))
        layout = round.layout
        metrics.share("padding_fraction", layout.positions - layout.real_positions, layout.positions)
        metrics.share("shared_fraction", layout.saved, layout.real_positions + layout.saved)
        return loss, router

    def _apply(
        self, round: Round, metrics: Accumulator, reference: Scores | None, bad: BadRows, seen: RowScores | None = None
    ) -> tuple[LossOutput | None, Mapping[str, Tensor]]:
        """Log-probs of a round, and the loss of this rank's rows in it, recorded; None where it has none."""
        micro = round.mine
        table = None if reference is None else reference.score(round)
        scores = self._scores(round)
        if not torch.is_grad_enabled():
            scores = {name: value.detach() for name, value in scores.items()}
        if micro is None:
            return None, scores
        batch = self.objective.batch(Scored(micro.trees, micro.layout, scores, table, micro.step))
        output = self.objective(batch)
        record(metrics, self.objective.loss.name, batch, output)
        bad.look(micro, of_policy(scores), table, output)
        if seen is not None and "logps" in scores:
            seen.look(round.layout, scores["logps"], table)
        return output, scores

    def _scores(self, round: Round, stats: bool = True) -> dict[str, Tensor]:
        """What the policy makes of a round, with the token statistics of the loss or without. It is looked up where an
        evaluation has it already; a rank without rows of its own gets nothing then, as nobody forwards.
        """
        if self.once is None:
            return dict(self.policy(round.layout, self.objective.stats if stats else ()))
        return {} if round.mine is None else self.once.scores(round.mine.trees, round.layout, self.device)

    def _check_units(self, micro: MicroBatch, output: LossOutput) -> None:
        found = tuple(count_units(term) for term in output.terms)
        if found != micro.units:
            raise PluginError(
                f'loss "{self.objective.loss.name}": its terms have {found} units here, and {micro.units} with other '
                "log-probs",
                why="the mask of a term may depend on the data and on batch.step, never on the log-probs",
                fix="multiply the loss by zero where it shall not count, or compute the mask in prepare",
            )

    def _stop_if(self, bad: BadRows, when: str, done: int) -> None:
        """Raises RunError, the same on all ranks, where one of them found something that is not finite."""
        flag = torch.tensor(float(bool(bad.rows)), device=self.device)
        if self.accelerator.reduce(flag, "sum").item() == 0:
            return
        found = [one for one in of_all_ranks(self.accelerator, bad) if one.rows]
        rows = [row for one in found for row in one.rows]
        raise RunError(
            f"{when}: {found[0].what}",
            why="rows " + ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else ""),
            fix=f"the weights are as after step {done}: lower train.learning_rate, look at these rows, "
            'or set engine.precision = "fp32"',
            on_all_ranks=True,
        )

    def _update(self, step: int) -> None:
        """Clips, checks the gradient, and moves the weights."""
        self.learning_rate = self.schedule.get_last_lr()[0]
        update = self.holder.update()
        if not update.applied and self.accelerator.mixed_precision != "fp16":
            raise RunError(
                f"step {step}: the gradient is not finite (norm {update.norm.item()})",
                why="the loss and all log-probs were finite",
                fix=f"the weights are as after step {step - 1}: lower train.learning_rate, "
                'or set engine.precision = "fp32"',
                on_all_ranks=True,
            )
        if update.applied:
            self.schedule.step()
        else:  # fp16: the loss scale was too large
            self.tally.skipped += 1
        self.tally.metrics.mean("grad_norm", update.norm.reshape(1))

    # --- the whole step, for prepare ---------------------------------------------------------------------------------

    def _prepare(self, trees: Sequence[Tree], state: State, reference: Scores | None) -> tuple[Prepared, State]:
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
    def _sums(self, trees: Sequence[Tree], reference: Scores | None) -> Tensor:
        """Policy sum, reference sum and length of every branch, (N, 3), trees in order, the same on every rank."""
        mismatched = self.objective.loss.needs_mismatched
        sizes = [len(tree.branches if mismatched else tree.completions) for tree in trees]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        table = torch.zeros(sum(sizes), 3, device=self.device)
        for round, members in self.bare_rounds(trees, mismatched):
            scores = self._scores(round, stats=False)
            frozen = None if reference is None else reference.score(round)
            if round.mine is None:
                continue
            index = [starts[i] + k for i in members for k in range(sizes[i])]
            mask = torch.from_numpy(round.layout.mask).to(self.device)
            table[index, 0] = scores["logps"].masked_fill(~mask, 0.0).sum(-1).float()
            if frozen is not None:
                table[index, 1] = frozen.masked_fill(~mask, 0.0).sum(-1).float()
            table[index, 2] = mask.sum(-1).float()
        return self.accelerator.reduce(table, "sum")  # type: ignore[no-any-return]

    def bare_rounds(
        self, trees: Sequence[Tree], mismatched: bool = False, way: Way | None = None
    ) -> Iterator[tuple[Round, tuple[int, ...]]]:
        """Forward passes that no loss is computed from, each with the indices of this rank's trees.

        way: the layout, if not the one of the training
        """
        way = way or self.way
        plan = plan_step(trees, self.ranks, self.budget, mismatched=mismatched, way=way)
        micro = []
        for of_rank in plan:
            chosen = [[trees[i] for i in members] for members in of_rank]
            micro.append([MicroBatch(one, way.layout(one, mismatched=mismatched)) for one in chosen])
        mine = [*plan[self.rank], *[()] * len(trees)]
        return zip(rounds_of(micro, self.rank, way), mine, strict=False)

    # --- evaluation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, held_out: Sequence[Tree], step: int, epoch: float, pairs: Sequence[Tree] = ()) -> Record:
        """Loss and all metrics on the held-out rows, in consecutive blocks of batch_size; written with eval_ names."""
        if not held_out:
            return {}
        self.bare.eval()
        started, metrics, bad, seen = time.perf_counter(), Accumulator(), BadRows(), RowScores()
        if self.online is not None:
            held_out = self.online.held_out(held_out, step, metrics)
            if self.held_out_reference is not None:
                self.held_out_reference.forget()
        size, loss = self.recipe.train.batch_size, self.objective.loss
        again: Sequence[Tree] = ()  # where completions are asked for more than once, all of them
        if pairs or (loss.has_prepare and loss.prepare_pass):
            again = joined(chain(held_out, pairs), self.budget, self.way, mismatched=loss.needs_mismatched)
        first, blocks, pair_blocks = (blocks_of(rows, size) for rows in (again, held_out, pairs))
        quick = bool(again) and not isinstance(self.held_out_reference, Remembering)  # nothing is forwarded after it
        total = len(first) + (0 if quick else len(blocks) + len(pair_blocks))
        with StepProgress(self.console, total, f"evaluating at step {step}") as progress:
            done: Iterator[None] = map(progress.advance, count(1))
            self.once = self._forward_once(first, done) if again else None
            done = repeat(None) if quick else done
            try:
                eval_loss = self._evaluate_loss(blocks, metrics, bad, done, None if pairs else seen)
                for trees in pair_blocks:
                    self._evaluate_pairs(trees, metrics, seen)
                    next(done)
            finally:
                self.once = None
        self._stop_if(bad, f"evaluation at step {step}", step)
        # answers that were just made are no rows of others, and scores are no log-probs
        unlike = self.online is not None or loss.needs_scores
        rows = pairs or (() if unlike else held_out)
        self.on_rows(step, rows, RowScores.merged(of_all_ranks(self.accelerator, seen)))
        line: Record = {"step": step, "epoch": round(epoch, 6), "eval_loss": eval_loss}
        if not blocks:
            del line["eval_loss"]
        line |= {f"eval_{name}": value for name, value in self._over_ranks(metrics).items()}
        line["eval_runtime"] = time.perf_counter() - started
        self._write(line)
        self.console.print(f"held-out, step {step}: {brief(line)}", highlight=False)
        return line

    def _forward_once(self, blocks: Sequence[Sequence[Tree]], done: Iterator[None]) -> Once:
        """All completions of an evaluation, on every rank."""
        mine = Once()
        for trees in blocks:
            for round, _members in self.bare_rounds(trees):
                scores = self._scores(round)
                if round.mine is not None:
                    mine.add(round.mine.trees, round.layout, scores)
            next(done)
        return Once.merged(of_all_ranks(self.accelerator, mine))

    def _evaluate_loss(
        self, blocks: Sequence[Sequence[Tree]], metrics: Accumulator, bad: BadRows, done: Iterator[None],
        seen: RowScores | None,
    ) -> float:  # fmt: skip
        """The loss over all blocks: the sum of each term divided by all its units."""
        sums, units = [], []
        for trees in blocks:
            prepared, _ = self._prepare(trees, self.state, self.held_out_reference)
            rounds, whole = self._rounds(trees, prepared)
            mine = torch.zeros(len(whole.units), device=self.device, dtype=torch.float64)
            for round in rounds:
                output, _scores = self._apply(round, metrics, self.held_out_reference, bad, seen)
                if output is not None:
                    mine += torch.stack([masked_sum(t).double() for t in output.terms])
            sums.append(mine)
            units.append(torch.tensor(whole.units))
            next(done)
        if not blocks:
            return 0.0
        total = self.accelerator.reduce(torch.stack(sums).sum(0), "sum").cpu()
        return float((total / torch.stack(units).sum(0).clamp(min=1)).sum())

    def _evaluate_pairs(self, trees: Sequence[Tree], metrics: Accumulator, seen: RowScores) -> None:
        """Which side of held-out pairs the policy prefers, for a loss that does not eat pairs itself."""
        for round, _members in self.bare_rounds(trees):
            table = None if self.pair_reference is None else self.pair_reference.score(round)
            scores = self._scores(round, stats=False)
            if round.mine is not None:
                record_preference(metrics, pairs_of(Scored(round.mine.trees, round.layout, scores, table)))
                seen.look(round.layout, scores["logps"], table)

    # --- metrics -----------------------------------------------------------------------------------------------------

    def _log_training(self, step: int, epoch: float) -> Record:
        tally, self.tally = self.tally, Tally()
        self.tokens_seen += tally.tokens
        line: Record = {"step": step, "epoch": round(epoch, 6)}
        if tally.losses:
            line["loss"] = torch.stack([loss.cpu() for loss in tally.losses]).mean().item()
        line |= self.first_line
        self.first_line = {}
        line |= self._over_ranks(tally.metrics)
        line["learning_rate"] = self.learning_rate
        line |= self.steering.line
        line["num_tokens"] = self.tokens_seen
        if tally.seconds:
            line["tokens_per_second"] = tally.tokens / tally.seconds
        line["memory"] = max(of_all_ranks(self.accelerator, memory_gib(self.device)))
        if self.accelerator.mixed_precision == "fp16":
            line["skipped_steps"] = tally.skipped
        self._write(line)
        return line

    def _over_ranks(self, metrics: Accumulator) -> Record:
        return Accumulator.merged(of_all_ranks(self.accelerator, metrics.table())).result()

    def _write(self, line: Record) -> None:
        self.sink(line)
        self.steering.see(line)
        if self.recipe.log.trackers:
            self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=int(line["step"]))
