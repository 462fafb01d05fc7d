"""Prompts answered by a model and rewarded, in this process: what online training and `alignzoo sample` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from typing import Any

from alignzoo.making import Sampled
from alignzoo.progress import Say
from alignzoo.recipe import Recipe
from alignzoo.rewards import Rewards
from alignzoo.sampling import Sampling, draw
from alignzoo.tree import Tree
from alignzoo.vllm_sampler import VllmSampler


def make_vllm(
    model: Any, accelerator: Any, tokenizer: Any, recipe: Recipe, stops: Sequence[int], say: Say
) -> VllmSampler | None:
    """The sampler of rollout.sampler = "vllm"; None where the model itself draws."""
    if recipe.rollout is None or recipe.rollout.sampler != "vllm":
        return None
    where = recipe.rollout.vllm
    say(f"starting vLLM: {where.url if where.mode == 'server' else 'in these processes'}")
    return VllmSampler(model, accelerator, tokenizer, recipe, stops)


class Answerer:
    """A model with the recipe's [rollout] and its rewards."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rewards: Rewards,
        recipe: Recipe,
        stops: Sequence[int],
        autocast: Callable[[], AbstractContextManager[Any]],
        beat: Callable[[str], None] = lambda _: None,
        vllm: VllmSampler | None = None,
    ) -> None:
        """stops: tokens that end a completion; autocast: around forward passes; beat: is told what begins

        vllm: draws in the place of the model
        """
        assert recipe.rollout is not None
        self.model, self.tokenizer, self.rewards, self.seed = model, tokenizer, rewards, recipe.train.seed
        self.stops, self.autocast, self.beat, settings = list(stops), autocast, beat, recipe.rollout
        self.vllm = vllm
        self.sampling = Sampling(
            max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, top_p=settings.top_p,
            top_k=settings.top_k, min_p=settings.min_p, batch_tokens=settings.batch_tokens,
        )  # fmt: skip

    def draw(
        self, asked: Sequence[tuple[int, Tree]], times: int, progress: Callable[[int], Any]
    ) -> list[list[Sampled]]:
        """`times` completions of each prompt. asked: the prompts, each with the number of its batch, for the seeds."""
        prompts = [tree.prompt for _, tree in asked]
        if self.vllm is not None:
            self.beat("sampling with vLLM")
            drawn = self.vllm.draw(prompts, times)
            progress(len(prompts) * times)
        else:
            with self.autocast():
                drawn = draw(
                    self.model, prompts, times, self.sampling, stops=self.stops, pad=0,
                    seeds=[(self.seed, batch, tree.row) for batch, tree in asked],
                    beat=lambda: self.beat("sampling"), progress=progress,
                )  # fmt: skip
        return [[Sampled(d.ids, d.logps, d.truncated, self._text(d.ids)) for d in of_prompt] for of_prompt in drawn]

    def _text(self, ids: Any) -> str:
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def reward(
        self, prompts: Sequence[Tree], drawn: Sequence[Sequence[Sampled]]
    ) -> tuple[list[list[Sampled]], Mapping[str, int]]:
        """The completions with their rewards, from one call, and by reward how many values failed."""
        flat = [(prompt, one) for prompt, of_prompt in zip(prompts, drawn, strict=True) for one in of_prompt]
        if not flat:
            return [], {}
        self.beat("rewards")
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        columns = {name: [prompt.columns.get(name) for prompt, _ in flat] for name in names}
        scored = self.rewards.score([p.asked for p, _ in flat], [one.text for _, one in flat], columns)
        rewarded = iter(
            replace(one, reward=scored.total[i], rewards={name: values[i] for name, values in scored.each.items()})
            for i, (_, one) in enumerate(flat)
        )
        return [list(islice(rewarded, len(of_prompt))) for of_prompt in drawn], scored.failed
