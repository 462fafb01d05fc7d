"""Attention over a packed row of token trees, through transformers' AttentionInterface.

A packed row has nodes: prompts, and completions that go on from one. A token sees its own node up to itself and, in a
completion, all of the prompt; nothing else. So a row is worked through node by node, and no mask of row by row exists.

The layout travels in the place of the attention mask: models hand on a mask of four dimensions as it is, also to the
layers that gradient checkpointing runs a second time. Every other mask is left to the implementation that the model
had, so padded rows and generation are as before.

Shapes: Hq heads of queries over Hk of keys and values, G = Hq / Hk, L positions of D channels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_torch_flex_attn_available

from alignzoo.batch import Layout

BASES = ("sdpa", "eager")  # what a model may compute with otherwise
_PREFIX = "token_trees_over_"
_KINDS = {"full_attention", "sliding_attention"}  # of layers
_REFUSED = {"s_aux": "attention sinks", "position_bias": "biases on positions (ALiBi, T5)"}
_watching: list[list[int | None]] = []


class CannotPack(Exception):
    """Why a model cannot compute packed rows."""


# --- looking at a model ----------------------------------------------------------------------------------------------


def why_not(lm: Any) -> str:
    """What a transformers model has that packed rows have no place for, "" where nothing is seen."""
    config = lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _KINDS
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    if not lm._can_set_attn_implementation():
        return "it does not use transformers' attention interface"
    if kinds:
        return f"its layers are of other kinds ({', '.join(sorted(kinds))})"
    if original(lm) not in BASES:
        return f'model.attention = "{original(lm)}" is kept'
    return ""


def original(lm: Any) -> str:
    """The attention implementation that the model had."""
    return str(lm.config._attn_implementation).removeprefix(_PREFIX)


def sliding_windows(lm: Any) -> list[int]:
    """The window of each layer that has one."""
    config = lm.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return []
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window for kind in kinds if kind == "sliding_attention"]


@contextmanager
def windows_seen() -> Iterator[list[int | None]]:
    """Collects the windows that layers tell the attention while a packed row is computed."""
    seen: list[int | None] = []
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


def enable(lm: Any, on: bool = True) -> None:
    """Lets a model compute packed rows too, or no longer."""
    lm.set_attn_implementation((_PREFIX if on else "") + original(lm))


# --- what a model is given -------------------------------------------------------------------------------------------


def tree_inputs(layout: Layout, device: torch.device, flex: bool) -> dict[str, Any]:
    """Positions and the mask's stand-in for a packed row.

    flex: on a GPU flex_attention may compute it, which knows neither dropout nor, here, sliding windows
    """
    assert layout.nodes is not None
    assert layout.position_ids is not None
    nodes = torch.from_numpy(layout.nodes)
    mask: Any = nodes[None, None]  # (1, 1, n, 2) int32, always on the CPU
    if device.type == "cuda" and flex and is_torch_flex_attn_available():
        mask = _block_mask(nodes, device)
    return {"attention_mask": mask, "position_ids": torch.from_numpy(layout.position_ids).to(device)}


def _block_mask(nodes: Tensor, device: torch.device) -> Any:
    """What flex_attention computes with, made once for all layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    lengths, goes_on = nodes.to(device).long().unbind(1)
    number = torch.arange(len(lengths), device=device).repeat_interleave(lengths)  # (L,)
    before = goes_on.repeat_interleave(lengths)  # (L,)

    def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((number[k] == number[q]) | (number[k] == before[q]))

    return create_block_mask(sees, None, None, len(number), len(number), device=device)


# --- the attention ---------------------------------------------------------------------------------------------------


def _attention(base: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """As transformers calls an attention: query (B, Hq, L, D), key and value (B, Hk, L, D) to (B, L, Hq, D), None."""
    if isinstance(mask, Tensor) and mask.dtype == torch.int32:
        return tree_attention(module, query, key, value, mask, **options), None
    if mask is not None and not isinstance(mask, Tensor):  # a BlockMask
        _refuse(module, options)
        query, key = query.to(value.dtype), key.to(value.dtype)
        return ALL_ATTENTION_FUNCTIONS["flex_attention"](module, query, key, value, mask, **options)
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = own if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
    return attend(module, query, key, value, mask, **options)  # type: ignore[misc]


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    nodes: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """query (1, Hq, L, D), key and value (1, Hk, L, D), nodes (1, 1, n, 2) -> (1, L, Hq, D).

    Raises CannotPack for what it does not compute.
    """
    _refuse(module, options)
    for seen in _watching:
        seen.append(sliding_window)
    lengths, goes_on = zip(*nodes[0, 0].tolist(), strict=True)
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves them in float32 after the rotation
    attend: Callable[..., Tensor] = functional.scaled_dot_product_attention
    if softcap:
        attend = partial(_softcapped, softcap=softcap)
    # key heads as the batch, the G query heads of each as its heads: keys and values are not copied for them
    queries = query.reshape(-1, groups, *query.shape[2:]).split(lengths, 2)
    keys, values = (x.transpose(0, 1).split(lengths, 2) for x in (key, value))
    found = []
    for q, node, before in zip(queries, range(len(lengths)), goes_on, strict=True):
        k, v = keys[node], values[node]
        if before >= 0:
            k, v = torch.cat([keys[before], k], 2), torch.cat([values[before], v], 2)
        mask = _mask(q.shape[2], k.shape[2], sliding_window, q.device)
        k, v = (x.expand(-1, groups, -1, -1) for x in (k, v))
        found.append(attend(q, k, v, mask, dropout, mask is None, scale=scaling))
    return torch.cat(found, 2).reshape(1, heads, sum(lengths), -1).transpose(1, 2).contiguous()


def _refuse(module: Any, options: dict[str, Any]) -> None:
    for name, what in _REFUSED.items():
        if options.get(name) is not None:
            raise CannotPack(f"its attention has {what}")
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise CannotPack("its attention is not causal")


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys the last `queries` of `keys` positions see, (queries, keys); None: each all up to itself."""
    narrow = window if window and window < keys else None
    if queries == keys and narrow is None:
        return None
    return _made_mask(queries, keys, narrow, device)


@lru_cache(maxsize=64)
def _made_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, *,
    scale: float | None, softcap: float,
) -> Tensor:  # fmt: skip
    """Attention whose scores are soft-capped: softcap * tanh(scores / softcap)."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * (scores / softcap).tanh()
    seen = _made_mask(query.shape[2], key.shape[2], None, query.device) if causal else mask
    assert seen is not None
    weights = scores.float() if scores.dtype != torch.float64 else scores
    weights = weights.masked_fill(~seen, float("-inf")).softmax(-1).to(value.dtype)
    return functional.dropout(weights, dropout) @ value


def _register(bases: Sequence[str]) -> None:
    masks: dict[str, Callable[..., Any]] = dict(ALL_MASK_ATTENTION_FUNCTIONS.items())
    for base in bases:
        AttentionInterface.register(_PREFIX + base, partial(_attention, base))
        AttentionMaskInterface.register(_PREFIX + base, masks[base])


_register(BASES)
