"""Answers of a model to some prompts, before and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from alignzoo.progress import StepProgress
from alignzoo.recipe import Samples


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: Samples,
    seed: int,
    console: Console,
    title: str,
    end: str = "",
    generate: Callable[..., Tensor] | None = None,
) -> list[str]:
    """One answer for each prompt (token ids), greedy at temperature 0. The model is left in the mode that it was in.

    generate: takes the place of model.generate where the weights are shared out over the ranks
    end: the special token that closes a turn in the chat template, beside the tokenizer's EOS.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    answers, stops = [], _stops(model, tokenizer, end)
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            StepProgress(console, len(prompts), title) as progress,
        ):
            torch.manual_seed(seed)
            for number, prompt in enumerate(prompts, start=1):
                answers.append(_one(generate or model.generate, device, tokenizer, prompt, settings, stops))
                progress.advance(number)
    finally:
        model.train(was_training)
    return answers


def _one(
    generate: Callable[..., Tensor],
    device: torch.device,
    tokenizer: Any,
    prompt: Sequence[int],
    settings: Samples,
    stops: list[int] | None,
) -> str:
    ids = torch.tensor([list(prompt)], device=device)  # one at a time: no padding, so no padding to get wrong
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": settings.temperature} if settings.temperature > 0 else {"do_sample": False}
    )
    made = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=stops,
        use_cache=True,
        **sampling,
    )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def _stops(model: Any, tokenizer: Any, end: str) -> list[int] | None:
    """The tokens that end an answer: the generation settings', the tokenizer's and the template's."""
    configured = model.generation_config.eos_token_id
    found = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    if end in tokenizer.get_vocab():
        found.add(tokenizer.get_vocab()[end])
    return sorted(t for t in found if t is not None) or None
