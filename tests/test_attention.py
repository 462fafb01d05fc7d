"""The attention over packed rows: against one dense mask, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_trees
from torch import Tensor

from alignzoo.attention import CannotPack, tree_attention
from alignzoo.batch import Layout, tree_layout

HEADS, KEY_HEADS, CHANNELS = 4, 2, 8


def dense_mask(layout: Layout, window: int | None = None) -> Tensor:
    """Who sees whom, position by position, by following each position's path: (L, L)."""
    assert layout.nodes is not None
    paths: list[list[int]] = []
    seen = torch.zeros(layout.positions, layout.positions, dtype=torch.bool)
    at = 0
    for length, before in layout.nodes.tolist():
        path = list(paths[before]) if before >= 0 else []
        for position in range(at, at + length):
            path.append(position)
            visible = path if window is None else path[-window:]
            seen[position, visible] = True
        paths.append(path)
        at += length
    return seen


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def made(layout: Layout, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    sizes = (HEADS, KEY_HEADS, KEY_HEADS)
    return [2 * torch.randn(1, n, layout.positions, CHANNELS, dtype=torch.float64) for n in sizes]


def ours(layout: Layout, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    assert layout.nodes is not None
    nodes = torch.from_numpy(layout.nodes)[None, None]
    return tree_attention(SimpleNamespace(is_causal=True), q, k, v, nodes, scaling=0.3, **options)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_values_and_gradients_are_those_of_a_dense_mask(
    shared: bool, window: int | None, softcap: float | None
) -> None:
    layout = tree_layout(make_trees(4, completions=3), shared=shared)
    inputs = [x.requires_grad_() for x in made(layout)]
    weight = torch.randn(1, layout.positions, HEADS, CHANNELS, dtype=torch.float64)
    expected = dense(*inputs, dense_mask(layout, window), 0.3, softcap)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    found = ours(layout, *inputs, sliding_window=window, softcap=softcap)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-12
    got = torch.autograd.grad((found * weight).sum(), inputs)
    assert all((a - b).abs().max() < 1e-11 for a, b in zip(got, wanted, strict=True))


def test_a_mask_that_is_wrong_is_seen() -> None:
    layout = tree_layout(make_trees(2, completions=2))
    inputs = made(layout)
    causal = torch.ones(layout.positions, layout.positions, dtype=torch.bool).tril()
    assert (ours(layout, *inputs) - dense(*inputs, causal, 0.3)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"position_bias": torch.zeros(1)}, "biases"),
        ({"is_causal": False}, "causal"),
    ],
)
def test_what_it_does_not_compute_is_refused(options: dict[str, Any], message: str) -> None:
    layout = tree_layout(make_trees(1))
    with pytest.raises(CannotPack, match=message):
        ours(layout, *made(layout), **options)


def test_mixed_types_as_under_autocast() -> None:
    layout = tree_layout(make_trees(2))
    q, k, v = (x.float() for x in made(layout))
    found = ours(layout, q, k, v.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.float() - dense(q, k, v, dense_mask(layout), 0.3)).abs().max() < 0.1
