"""Online training: completions are sampled from the policy during the run, rewarded, and made into what the loss eats.

Every completion has a generator of its own, seeded by the run's seed, the batch, the row and its number, so the same
ones come on any number of ranks. The ranks share out the prompts, and all of them know all completions afterwards.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from alignzoo.answering import Answerer, make_vllm
from alignzoo.batch import StepRows
from alignzoo.engine import Engine
from alignzoo.errors import AlignzooError
from alignzoo.making import Sampled, make_trees, mismatch, numbered
from alignzoo.metrics import Accumulator
from alignzoo.others import Hold, Others
from alignzoo.progress import StepProgress, sayer
from alignzoo.recipe import Recipe
from alignzoo.reference import ReferencePlan, lengths_of
from alignzoo.rewards import Rewards
from alignzoo.sharding import gathered, of_all_ranks
from alignzoo.tree import Completion, Tree

_HELD_OUT = 0  # the batch of held-out prompts: those of training count from 1


class Rollouts:
    """Makes the trees of each step and of each evaluation. All its methods are called on all ranks."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        rewards: Rewards,
        tokenizer: Any,
        stops: Sequence[int],
        folder: Path,
        held: Mapping[str, Hold],
        *,
        console: Console,
    ) -> None:
        """stops: tokens that end a completion; folder: of the run, for completions.jsonl; held: the others' models"""
        assert recipe.rollout is not None
        self.recipe, self.settings, self.engine, self.rewards = recipe, recipe.rollout, engine, rewards
        model, autocast, say = engine.bare.model, engine.accelerator.autocast, sayer(console)

        def beat(what: str) -> None:
            engine.beat(what)  # the one that it has then

        vllm = make_vllm(model, engine.accelerator, tokenizer, recipe, stops, say)
        self.answerer = Answerer(model, tokenizer, rewards, recipe, stops, autocast, beat, vllm)
        self.others = Others(recipe, tokenizer, stops, held, autocast, say, beat)
        self.console, self.file = console, folder / "completions.jsonl"
        loss = engine.objective.loss
        self.kind, self.mismatched = loss.data, loss.needs_mismatched
        moves = self.settings.refresh_every_steps * self.settings.iterations > 1
        self.keeps_old = self.kind == "groups" and moves
        self.window: dict[int, list[Tree]] = {}  # by batch

    def trees(self, rows: StepRows, batches: Sequence[StepRows], prompts: Sequence[Tree]) -> list[Tree]:
        """The trees of a step. batches: those that are answered together; prompts: of all rows of the data set."""
        if rows.batch not in self.window:
            self._fill(batches, prompts)
        return self.window[rows.batch]

    def _fill(self, batches: Sequence[StepRows], prompts: Sequence[Tree]) -> None:
        metrics = self.engine.tally.metrics
        asked = [(batch.batch, prompts[row]) for batch in batches for row in batch.rows]
        with self._progress(len(asked) * self.settings.completions, f"sampling for step {batches[0].step}") as progress:
            sampled = self._sample(asked, self.settings.completions, metrics, progress)
        self.window, made = {}, 0
        for batch in batches:
            own = [(p, s) for (number, p), s in zip(asked, sampled, strict=True) if number == batch.batch]
            self.window[batch.batch] = self._make(own, len(prompts))
            self._keep(batch.step, own)
            made += len(self.window[batch.batch])
        if self.kind != "groups":
            metrics.share("rollout/rows_per_prompt", made, len(asked))
        if self.keeps_old:
            self._remember_policy()

    def held_out(self, prompts: Sequence[Tree], step: int, metrics: Accumulator) -> list[Tree]:
        """The held-out prompts, answered by the policy as it is, always with the same seeds."""
        times = self.settings.eval_completions or self.settings.completions
        asked = [(_HELD_OUT, prompt) for prompt in prompts]
        with self._progress(len(asked) * times, f"sampling held-out completions at step {step}") as progress:
            sampled = self._sample(asked, times, metrics, progress)
        own = list(zip(prompts, sampled, strict=True))
        self._keep(step, own, held_out=True)
        return self._make(own, len(prompts))

    def _progress(self, total: int, title: str) -> StepProgress:
        return StepProgress(self.console if self.console.is_terminal else Console(quiet=True), total, title)

    # --- sampling and rewards

    def _sample(
        self, asked: Sequence[tuple[int, Tree]], times: int, metrics: Accumulator, progress: StepProgress
    ) -> list[list[Sampled]]:
        """`times` completions of each prompt with their rewards. asked: the prompts, each with its batch."""
        engine, mine = self.engine, range(self.engine.rank, len(asked), self.engine.ranks)
        began = time.perf_counter()
        found: dict[int, list[Sampled]] | AlignzooError
        with engine.holder.gathered():
            drawn = self.answerer.draw([asked[i] for i in mine], times, progress.advance)
        between = time.perf_counter()
        try:
            drawn = self.others.answer([asked[i] for i in mine], drawn)
            between = time.perf_counter()
            rewarded, failed = self.answerer.reward([asked[i][1] for i in mine], drawn)
            found = dict(zip(mine, rewarded, strict=True))
            record(metrics, [[one for one in of_prompt if not one.author] for of_prompt in rewarded])
            self.others.record(metrics, rewarded)
            for name, count in failed.items():
                metrics.share(f"rollout/rewards_failed/{name}", count, sum(map(len, rewarded)))
        except AlignzooError as error:
            found = error
        metrics.share("rollout/seconds_sampling", between - began, 1)
        metrics.share("rollout/seconds_rewards", time.perf_counter() - between, 1)
        merged: dict[int, list[Sampled]] = {}
        for one in of_all_ranks(engine.accelerator, found):
            if isinstance(one, AlignzooError):
                one.on_all_ranks = True
                raise one
            merged |= one
        return [merged[i] for i in range(len(asked))]

    # --- what the loss eats

    def _make(self, sampled: Sequence[tuple[Tree, Sequence[Sampled]]], rows: int) -> list[Tree]:
        bare = [replace(prompt, asked="", columns={}) for prompt, _ in sampled]
        made = [make_trees(self.kind, p, s, self.settings) for p, (_, s) in zip(bare, sampled, strict=True)]
        trees = numbered([tree for of_prompt in made for tree in of_prompt], rows)
        return mismatch(trees, self.recipe.data.max_length) if self.mismatched else trees

    @torch.no_grad()
    def _remember_policy(self) -> None:
        """Log-probs of the policy that sampled, by the training forward: the policy moves before they are used up."""
        trees = [tree for trees in self.window.values() for tree in trees]
        engine, mine = self.engine, dict[tuple[int, int], Any]()
        training = engine.bare.training
        engine.bare.eval()
        for round, members in engine.bare_rounds(trees):
            engine.beat("log-probs of the sampled completions")
            table = engine.policy(round.layout)["logps"].float().cpu().numpy()
            if round.mine is not None:
                places = [(i, k) for i in members for k in range(len(trees[i].completions))]
                for place, row, length in zip(places, table, lengths_of(round.layout), strict=True):
                    mine[place] = row[:length].copy()
        engine.bare.train(training)
        old = {place: row for rows in of_all_ranks(engine.accelerator, mine) for place, row in rows.items()}
        numbers = iter(range(len(trees)))
        for batch, own in self.window.items():
            self.window[batch] = [_with_old(tree, i, old) for tree, i in zip(own, numbers, strict=False)]

    # --- what stays on disk

    def _keep(self, step: int, sampled: Sequence[tuple[Tree, Sequence[Sampled]]], *, held_out: bool = False) -> None:
        """Some completions into completions.jsonl, those of one prompt together."""
        if self.engine.rank != 0 or not self.settings.keep:
            return
        flat = [(prompt, one) for prompt, of_prompt in sampled for one in of_prompt][: self.settings.keep]
        with self.file.open("a", encoding="utf-8") as file:
            for prompt, one in flat:
                line = {
                    "step": step, "held_out": held_out, "row": prompt.where or prompt.row, "prompt": prompt.asked,
                    "completion": one.text, "tokens": len(one.ids), "truncated": one.truncated, "reward": one.reward,
                    "rewards": dict(one.rewards), "author": one.author or "policy",
                }  # fmt: skip
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def state(self, done: int, window: Sequence[StepRows]) -> dict[str, Any]:
        """What a checkpoint after step `done` needs: completions that will be used again, and counts. JSON values."""
        left = {rows.batch for rows in window if rows.step > done}
        return {
            "window": {str(n): [_to_json(t) for t in trees] for n, trees in self.window.items() if n in left},
            "rewards": self.rewards.state(),
            "others": self.others.state(),
            "bytes": self.file.stat().st_size if self.file.exists() else 0,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.window = {int(n): [_from_json(t) for t in trees] for n, trees in state["window"].items()}
        self.rewards.load_state(state["rewards"])
        self.others.load_state(state.get("others", {}))
        self._trim(state["bytes"])

    def begin(self) -> None:
        """Before the first step; of a run that was killed before its first checkpoint some completions may be left."""
        self._trim(0)

    def _trim(self, size: int) -> None:
        if self.engine.rank == 0 and self.file.exists():
            with self.file.open("r+b") as file:
                file.truncate(size)


def record(metrics: Accumulator, sampled: Sequence[Sequence[Sampled]]) -> None:
    """Rewards and lengths of the policy's completions, by prompt."""
    flat = [one for of_prompt in sampled for one in of_prompt]
    if not flat:
        return
    rewards = [one.reward for one in flat if one.reward is not None]
    if flat[0].rewards:
        metrics.share("rollout/reward", sum(rewards), len(rewards))
        metrics.share("rollout/unrewarded", len(flat) - len(rewards), len(flat))
    for name in flat[0].rewards:
        own = [value for one in flat if (value := one.rewards[name]) is not None]
        metrics.share(f"rollout/rewards/{name}", sum(own), len(own))
    for of_prompt in sampled:
        own = [one.reward for one in of_prompt if one.reward is not None]
        if len(own) > 1:
            spread = float(np.std(own, ddof=1))
            metrics.share("rollout/reward_std", spread, 1)
            metrics.share("rollout/zero_spread", float(max(own) == min(own)), 1)
    lengths = torch.tensor([len(one.ids) for one in flat], dtype=torch.float64)
    metrics.mean("rollout/length", lengths)
    for reduce in ("min", "max"):
        metrics.reach(f"rollout/length_{reduce}", reduce, getattr(lengths, reduce)())
    metrics.share("rollout/truncated", sum(one.truncated for one in flat), len(flat))


def hold_reference(engine: Engine, plan: ReferencePlan) -> Hold | None:
    """The run's reference, to sample from; None where the run keeps none."""

    @contextmanager
    def adapter_off() -> Iterator[Any]:
        with engine.holder.gathered(), engine.bare.model.disable_adapter():
            yield engine.bare.model

    @contextmanager
    def frozen() -> Iterator[Any]:
        assert engine.frozen is not None
        with gathered(engine.frozen_forward) if engine.holder.sharded else nullcontext():
            yield engine.frozen.model

    holds: dict[str, Hold] = {"adapter_off": adapter_off, "frozen": frozen}
    return holds.get(plan.kind)


def _with_old(tree: Tree, number: int, old: Mapping[tuple[int, int], Any]) -> Tree:
    return replace(tree, completions=tuple(replace(c, old=old[number, k]) for k, c in enumerate(tree.completions)))


# --- trees of groups in a checkpoint


def _floats(values: Any) -> list[float] | None:
    return None if values is None else [float(v) for v in values]


def _to_json(tree: Tree) -> dict[str, Any]:
    def completion(one: Completion) -> dict[str, Any]:
        return {"ids": one.ids.tolist(), "old": _floats(one.old), "sampler": _floats(one.sampler)}

    rewards = None if tree.rewards is None else [None if math.isnan(r) else r for r in tree.rewards]
    return {
        "row": tree.row, "prompt": tree.prompt.tolist(), "completions": [completion(c) for c in tree.completions],
        "where": tree.where, "label": tree.label, "rewards": rewards, "truncated": tree.truncated,
        "extra": dict(tree.extra), "mismatched": None if tree.mismatched is None else completion(tree.mismatched),
    }  # fmt: skip


def _from_json(saved: Mapping[str, Any]) -> Tree:
    def array(values: Any) -> Any:
        return None if values is None else np.asarray(values, np.float32)

    def completion(one: Mapping[str, Any]) -> Completion:
        return Completion(np.asarray(one["ids"], np.int32), None, array(one["old"]), array(one["sampler"]))

    rewards, truncated, other = saved["rewards"], saved["truncated"], saved["mismatched"]
    return Tree(
        saved["row"], np.asarray(saved["prompt"], np.int32), tuple(completion(c) for c in saved["completions"]),
        saved["where"], saved["label"],
        None if rewards is None else tuple(math.nan if r is None else r for r in rewards),
        None if truncated is None else tuple(truncated), saved["extra"],
        None if other is None else completion(other),
    )  # fmt: skip
