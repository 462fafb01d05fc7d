"""Answers of a model to some prompts, before and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from alignzoo.progress import StepProgress, sayer
from alignzoo.recipe import Samples
from alignzoo.sampling import Sampling, draw, how


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
    beat: Callable[[], object] = lambda: None,
) -> list[str]:
    """One answer for each prompt (token ids), greedy at temperature 0. The model is left in the mode that it was in.

    end: the special token that closes a turn in the chat template, beside the tokenizer's EOS
    generate: takes the place of model.generate where the weights are shared out over the ranks
    beat: called before every token
    """
    reason = how(model) if prompts and generate is None else ""
    if reason:
        sayer(console)(f"{title}: one prompt at a time, {reason}")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with StepProgress(console, len(prompts), title) as progress:
        drawn = draw(
            model,
            [np.asarray(prompt, np.int32) for prompt in prompts],
            1,
            Sampling(settings.max_new_tokens, settings.temperature),
            stops=stop_tokens(model, tokenizer, end),
            pad=pad or 0,
            seeds=[(seed, row) for row in range(len(prompts))],
            beat=beat,
            progress=progress.advance,
            generate=generate,
        )
    return [str(tokenizer.decode(made.ids.tolist(), skip_special_tokens=True)).strip() for (made,) in drawn]


def stop_tokens(model: Any, tokenizer: Any, end: str) -> list[int]:
    """The tokens that end an answer: the generation settings', the tokenizer's and the template's."""
    configured = model.generation_config.eos_token_id
    found = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    if end in tokenizer.get_vocab():
        found.add(tokenizer.get_vocab()[end])
    return sorted(t for t in found if t is not None)
