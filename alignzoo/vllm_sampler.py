"""Completions drawn by vLLM, through TRL: in this process or by a server, with the policy's weights before each window.

vLLM has random numbers of its own: no other number of ranks, and no resumed run, draws the same completions again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from alignzoo.errors import RunError
from alignzoo.recipe import Recipe
from alignzoo.sampling import Drawn
from alignzoo.sharding import of_all_ranks
from alignzoo.tree import Ids


class VllmSampler:
    """trl.generation's VLLMGeneration with a recipe's [rollout]. Made, and drawn from, on all ranks."""

    def __init__(self, model: Any, accelerator: Any, tokenizer: Any, recipe: Recipe, stops: Sequence[int]) -> None:
        """model: the policy, whose name_or_path vLLM loads; stops: tokens that end a completion."""
        from trl.generation.vllm_generation import VLLMGeneration

        assert recipe.rollout is not None
        settings, how = recipe.rollout, recipe.rollout.vllm
        self.accelerator, self.stops = accelerator, set(stops)
        self.generation = VLLMGeneration(
            model, accelerator, tokenizer, mode=how.mode, server_base_url=how.url,
            tensor_parallel_size=how.tensor_parallel,
            gpu_memory_utilization=how.memory, enable_sleep_mode=how.sleep, max_model_length=recipe.data.max_length,
            trust_remote_code=recipe.model.trust_remote_code, temperature=settings.temperature, top_p=settings.top_p,
            top_k=settings.top_k, min_p=settings.min_p, max_completion_length=settings.max_new_tokens, logprobs=0,
            generation_kwargs={"stop_token_ids": sorted(self.stops)},
        )  # fmt: skip

    def draw(self, prompts: Sequence[Ids], times: int) -> list[list[Drawn]]:
        """`times` completions of each prompt by the policy as it is; its weights are whole on every rank.

        TRL gives each rank a slice of equal size, so a rank with fewer prompts asks for some twice. Raises RunError
        where vLLM gives no log-probs.
        """
        most = max(of_all_ranks(self.accelerator, len(prompts)))
        if most == 0:
            return []
        self.generation.sync_weights()
        asked = [ids.tolist() for ids in prompts]
        asked += [asked[0] if asked else sorted(self.stops)[:1]] * (most - len(asked))
        repeated = [ids for ids in asked for _ in range(times)]
        _, completions, logps, _ = self.generation.generate(repeated, None, times)
        if logps is None:
            raise RunError("vLLM gives no log-probs", fix="start its server with `trl vllm-serve`")
        made = [self._drawn(*one) for one in zip(completions, logps, strict=True)]
        return [made[p * times : (p + 1) * times] for p in range(len(prompts))]

    def _drawn(self, ids: Sequence[int], logps: Sequence[Sequence[float | None]]) -> Drawn:
        """logps: of each token a list, of the drawn token alone; TRL has None for NaN."""
        flat = [one[0] for one in logps]
        if not flat or None in flat:
            raise RunError("vLLM gives a completion without tokens, or a log-prob that is no number")
        return Drawn(np.asarray(ids, np.int32), np.asarray(flat, np.float32), ids[-1] not in self.stops)
