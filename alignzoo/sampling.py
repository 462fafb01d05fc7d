"""Completions drawn from a model: each prompt computed once, its cache expanded to all of its completions.

The decode loop is our own, over a transformers model and its DynamicCache: generate() of transformers computes a prompt
again for each of its completions, and keeps finished rows until the last one ends.

Noise: a token is chosen by Gumbel-max, argmax(score + noise). The noise is a hash of (seed, position, token id), made
on the model's device, so a row comes out the same whatever else is in its batch and on whichever rank it is drawn.
One uniform number and the inverse of the cumulative distribution is cheaper (0.6 ms against 1.7 ms for hash and argmax
of 8 rows of 49,152 tokens on one core, where a decode step of a 135M model takes some 100 ms), but rounding moves all
of its steps at once: with logits off by 1e-6 it drew another token in 11 of 3,840 cases, with 1e-2 (bfloat16) in
1,447; Gumbel-max in 0 and 23. numpy's exponential noise took 2.1 ms, and would have to be carried to the device.

Shapes: P prompts, R rows (completions that are made together), L tokens of the longest prompt, T new tokens, V tokens
of the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alignzoo.errors import DataError
from alignzoo.logprobs import is_mixture_of_experts, positions_of

_KINDS = {"full_attention", "sliding_attention"}  # of layers whose cache is keys and values by position
_VARYING = {"dynamic", "longrope"}  # kinds of rotary positions
_DROP = 8  # finished rows are dropped when they are at least 1/8 of those computed


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. The order of the filters is transformers': temperature, top_k, top_p, min_p."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy, and the filters have no say
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # 0: off
    batch_tokens: int = 16384  # positions of the rows made together, padding and new tokens included; at least one row


@dataclass(frozen=True, eq=False)
class Drawn:
    """One completion."""

    ids: NDArray[np.int32]  # (n,), with the end token where it ended by itself; n >= 1
    logps: NDArray[np.float32]  # (n,) nats, under what it was drawn from: temperature and filters; greedy: the softmax
    truncated: bool  # max_new_tokens came before an end token


def how(model: Any) -> str:
    """Why the prompts of a model cannot be shared and padded, in words; "" where they can."""
    lm = _bare(model)
    config = lm.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - _KINDS
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    if getattr(lm, "_is_stateful", False):
        return "it keeps a recurrent state"
    if others:
        return f"its layers are of other kinds ({', '.join(sorted(others))})"
    if not lm._supports_default_dynamic_cache():
        return "it has a cache of its own kind"
    rope = getattr(config, "rope_parameters", None) or {}
    varying = _VARYING & {one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)}
    if varying:
        return f"its rotary angles depend on the longest row of a batch ({', '.join(sorted(varying))})"
    if "position_ids" not in inspect.signature(lm.forward).parameters:
        return "it takes no position_ids"
    return ""


@torch.no_grad()
def draw(
    model: Any,
    prompts: Sequence[NDArray[np.int32]],
    per_prompt: int,
    sampling: Sampling,
    *,
    stops: Sequence[int],
    pad: int,
    seeds: Sequence[Sequence[int]],
    beat: Callable[[], object] = lambda: None,
    progress: Callable[[int], object] = lambda _done: None,
    generate: Callable[..., Tensor] | None = None,
    see: Callable[[Tensor], object] = lambda _tokens: None,
) -> list[list[Drawn]]:
    """Completions for each prompt, in the order of the prompts. The model is left in the modes that it was in.

    Of the model's own generation settings none is applied. A model that how() has words for, and any model with
    `generate`, is computed by transformers' generate() instead, one prompt at a time and without padding; the noise is
    the same.

    seeds: non-negative numbers for each prompt; completion k of a prompt is drawn with (*seed, k)
    stops: tokens that end a completion
    pad: any token; its value has no effect
    beat: called before every token; progress: with the number of finished completions, as it grows
    generate: takes the place of model.generate where the weights are shared out over the ranks; all ranks then must
        draw for the same prompts
    see: called with the new token of each row that goes on, (r,), as it is chosen
    Raises DataError, before the first forward pass, for an empty prompt and for one that leaves no room for
    max_new_tokens in the positions that the model has a table for.
    """
    for place, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise DataError(f"prompt {place + 1} of {len(prompts)} has no tokens", fix="give it at least one")
    table, longest = positions_of(_bare(model)), max(map(len, prompts), default=0)
    if table is not None and longest + sampling.max_new_tokens > table:
        raise DataError(
            f"a prompt of {longest} tokens and max_new_tokens = {sampling.max_new_tokens} are more than {table}",
            why=f"the model has a table of {table} positions",
            fix="a shorter prompt, or a smaller max_new_tokens",
        )
    alone = generate is not None or bool(how(model))
    device, shown = next(model.parameters()).device, 0
    found: dict[tuple[int, int], Drawn] = {}

    def moved(before: int, finished: int) -> None:
        nonlocal shown
        beat()
        finished += before
        if finished > shown:
            progress(finished)
            shown = finished

    with _evaluating(model):
        for chosen in _batches([len(p) for p in prompts], per_prompt, sampling, alone):
            rows = _Rows([(*seeds[p], k) for p, k in chosen], sampling, stops, device, see)
            told = partial(moved, len(found))
            if alone:
                _by_generate(model, generate, prompts[chosen[0][0]], rows, pad, told)
            else:
                _decode(model, prompts, [p for p, _ in chosen], rows, pad, told)
            found |= zip(chosen, rows.drawn(), strict=True)
            moved(len(found), 0)
    return [[found[p, k] for k in range(per_prompt)] for p in range(len(prompts))]


def _bare(model: Any) -> Any:
    """The transformers model, without an adapter around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _batches(
    lengths: Sequence[int], per_prompt: int, sampling: Sampling, alone: bool
) -> Iterator[list[tuple[int, int]]]:
    """(prompt, completion) of the rows made together, the longest prompts first.

    alone: no two prompts together
    """
    rows: list[tuple[int, int]] = []
    for prompt in sorted(range(len(lengths)), key=lambda p: -lengths[p]):
        for number in range(per_prompt):
            widest = lengths[rows[0][0] if rows else prompt] + sampling.max_new_tokens
            full = (len(rows) + 1) * widest > sampling.batch_tokens or (alone and rows and rows[0][0] != prompt)
            if rows and full:
                yield rows
                rows = []
            rows.append((prompt, number))
    if rows:
        yield rows


# --- the choice of tokens --------------------------------------------------------------------------------------------


class _Rows:
    """Completions that are made together: chooses their tokens and keeps them."""

    def __init__(
        self, seeds: Sequence[Sequence[int]], sampling: Sampling, stops: Sequence[int], device: torch.device,
        see: Callable[[Tensor], object],
    ) -> None:  # fmt: skip
        self.see = see
        most = sampling.max_new_tokens
        raw = [np.random.PCG64(list(seed)).random_raw(most).view(np.int32) for seed in seeds]
        self.keys = torch.from_numpy(np.stack(raw)).to(device).view(len(seeds), most, 2)  # (R, T, 2) int32
        self.greedy, self.filters = sampling.temperature == 0, _filters(sampling)
        self.stops = torch.tensor(list(stops), dtype=torch.long, device=device)
        self.ids = torch.zeros(len(seeds), most, dtype=torch.int32, device=device)  # (R, T)
        self.logps = torch.zeros(len(seeds), most, device=device)  # (R, T)
        self.lengths = torch.full((len(seeds),), most, device=device)  # (R,)
        self.stopped = torch.zeros(len(seeds), dtype=torch.bool, device=device)  # (R,)

    def choose(self, logits: Tensor, at: Tensor, step: int) -> Tensor:
        """Token number `step` of the rows `at` (r,) from logits (r, V): (r,)."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.greedy:
            tokens = scores.argmax(-1)
        else:
            scores = self.filters(None, scores)
            tokens = (scores + gumbel(self.keys[at, step], scores.shape[-1])).argmax(-1)
        self.ids[at, step] = tokens.int()
        self.logps[at, step] = (scores.gather(1, tokens[:, None]).squeeze(1) - scores.logsumexp(-1)).float()
        ends = torch.isin(tokens, self.stops) & ~self.stopped[at]
        self.lengths[at] = torch.where(ends, step + 1, self.lengths[at])
        self.stopped[at] |= ends
        self.see(tokens)
        return tokens

    def drawn(self) -> list[Drawn]:
        ids, logps = self.ids.cpu().numpy(), self.logps.cpu().numpy()
        ends = zip(self.lengths.tolist(), self.stopped.tolist(), strict=True)
        return [Drawn(ids[i, :n].copy(), logps[i, :n].copy(), not stopped) for i, (n, stopped) in enumerate(ends)]


def _filters(sampling: Sampling) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if sampling.temperature not in (0, 1):
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found


def gumbel(keys: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise for each token, float32 (r, V), a function of keys (r, 2) int32 and the token id alone.

    A 32-bit multiply and xor-shift hash (constants: "lowbias32", nullprogram.com/blog/2018/07/31, with the second
    key between its rounds) makes 31 bits w of each token, and E = -log(1 - w) is an exponential waiting time: the
    smallest ones, which win, are resolved to 2**-31. Integers are the same on every device; logarithms may differ in
    the last bit.
    """
    ids = torch.arange(vocabulary, dtype=torch.int32, device=keys.device)
    x = (ids * -1640531535)[None] + keys[:, :1]  # 2**32 / golden ratio; int32 wraps around
    x.bitwise_xor_(_shifted(x, 16)).mul_(0x21F0AAAD).add_(keys[:, 1:])
    x.bitwise_xor_(_shifted(x, 15)).mul_(0x735A2D97)
    x.bitwise_xor_(_shifted(x, 15)).bitwise_and_(0x7FFFFFFF)
    w = x.float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return w.neg_().log1p_().neg_().log_().neg_()


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of the 32 bits without their sign."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


# --- the passes of the model -----------------------------------------------------------------------------------------


def _decode(
    model: Any, prompts: Sequence[NDArray[np.int32]], owners: Sequence[int], rows: _Rows, pad: int,
    told: Callable[[int], object],
) -> None:  # fmt: skip
    """Rows (R,) that go on from the prompts `owners` (R,); a prompt that comes several times is computed once."""
    device, steps = rows.keys.device, rows.keys.shape[1]
    once = list(dict.fromkeys(owners))
    which = torch.tensor([once.index(p) for p in owners], device=device)  # (R,) of P
    width = max(len(prompts[p]) for p in once)
    ids = torch.full((len(once), width), pad)  # (P, L)
    seen = torch.ones(len(once), width + steps, dtype=torch.long)  # (P, L + T)
    for row, p in enumerate(once):
        begin = width - len(prompts[p])
        ids[row, begin:] = torch.from_numpy(np.asarray(prompts[p], np.int64))
        seen[row, :begin] = 0
    ids, seen = ids.to(device), seen.to(device)
    positions = (seen.cumsum(-1) - 1).clamp_(min=0)  # (P, L + T)
    forward = _Forward(model)
    logits = forward(ids, seen[:, :width], positions[:, :width])
    forward.keep(which)
    logits, seen, positions, at = logits[which], seen[which], positions[which], torch.arange(len(which), device=device)
    for step in range(steps):
        tokens = rows.choose(logits, at, step)
        going = ~rows.stopped[at]
        left = int(going.sum())
        told(len(rows.stopped) - left)
        if left == 0 or step == steps - 1:
            return
        if (len(at) - left) * _DROP >= len(at):
            keep = going.nonzero().squeeze(1)
            forward.keep(keep)
            tokens, seen, positions, at = tokens[keep], seen[keep], positions[keep], at[keep]
        end = width + step + 1
        logits = forward(tokens[:, None], seen[:, :end], positions[:, end - 1 : end])


class _Forward:
    """A model and its cache: token after token in, the logits (r, V) after the last one out."""

    def __init__(self, model: Any) -> None:
        lm = _bare(model)
        self.model, self.cache = model, DynamicCache(config=lm.config)
        self.options: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if "logits_to_keep" in inspect.signature(lm.forward).parameters:
            self.options["logits_to_keep"] = 1
        if is_mixture_of_experts(lm):
            self.options["output_router_logits"] = False

    def __call__(self, ids: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        found = self.model(
            input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=self.cache, **self.options
        )
        return found.logits[:, -1]  # type: ignore[no-any-return]

    def keep(self, rows: Tensor) -> None:
        """These rows from now on; one may come several times."""
        self.cache.batch_select_indices(rows)


def _by_generate(
    model: Any, generate: Callable[..., Tensor] | None, prompt: NDArray[np.int32], rows: _Rows, pad: int,
    told: Callable[[int], object],
) -> None:  # fmt: skip
    """Rows (R,) that go on from one prompt, by generate() of transformers: it computes, `rows` chooses."""
    lm, device = _bare(model), rows.keys.device
    ids = torch.from_numpy(np.asarray(prompt, np.int64)).to(device).repeat(len(rows.ids), 1)  # (R, L)
    everyone = torch.arange(len(ids), device=device)

    def choose(so_far: Tensor, logits: Tensor) -> Tensor:
        tokens = rows.choose(logits, everyone, so_far.shape[1] - ids.shape[1])
        told(int(rows.stopped.sum()))
        return torch.full_like(logits, float("-inf")).scatter_(1, tokens[:, None], 0.0)

    own, lm.generation_config = lm.generation_config, GenerationConfig()  # no repetition penalty and the like
    synced = {} if generate else {"synced_gpus": False}
    try:
        (generate or model.generate)(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=rows.keys.shape[1], pad_token_id=pad,
            eos_token_id=rows.stops.tolist() or None, logits_processor=LogitsProcessorList([choose]), use_cache=True,
            **synced,
        )  # fmt: skip
    finally:
        lm.generation_config = own
