"""Floating-point operations of a training step, by formula, for both layouts. It imports no torch.

A forward pass over some positions costs

    2 W n + 4 A p + 2 H V m

W: weights of the layers' matrices; n: positions; A: attention heads x channels of one, over all layers; p: pairs of a
query and a key that it sees; H x V: the head's matrix; m: positions that the head is computed at. Multiply and add are
two. Norms, activations and the softmax are left out. A backward pass costs twice its forward pass; what a program
computes again (gradient checkpointing, logits in the backward pass) is its own affair and not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignzoo.batch import PADDED, plan_step
from alignzoo.tree import Completion, Tree


@dataclass(frozen=True)
class Size:
    """W, A and H V of a model."""

    matrices: int
    attention: int
    head: int


@dataclass(frozen=True)
class Pass:
    """n, p and m of a forward pass."""

    positions: int = 0
    pairs: int = 0
    scored: int = 0

    def __add__(self, other: Pass) -> Pass:
        return Pass(self.positions + other.positions, self.pairs + other.pairs, self.scored + other.scored)

    def flops(self, size: Size) -> int:
        return 2 * size.matrices * self.positions + 4 * size.attention * self.pairs + 2 * size.head * self.scored


def size_of(model: Any) -> Size:
    """Of a transformers model: all of its linear layers but the head."""
    from torch import nn

    config, head = model.config.get_text_config(), model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Size(linear, config.num_attention_heads * channels * config.num_hidden_layers, head.weight.numel())


def _causal(length: int) -> int:
    return length * (length + 1) // 2


def _branches(tree: Tree, which: str) -> tuple[Completion, ...]:
    if which == "mismatched":
        assert tree.mismatched is not None
        return (tree.mismatched,)
    return tree.branches if which == "branches" else tree.completions


def padded_pass(blocks: Sequence[Sequence[Tree]], which: str, *, all_scored: bool) -> Pass:
    """Blocks of rows, each padded to its longest sequence.

    which: "completions", "mismatched", or both as "branches"
    all_scored: the head is computed at every position but the last of a row, else at those that predict completions
    """
    total = Pass()
    for trees in blocks:
        branches = [(len(t.prompt), len(c.ids)) for t in trees for c in _branches(t, which)]
        longest = max(prompt + own for prompt, own in branches)
        scored = len(branches) * (longest - 1) if all_scored else sum(own for _, own in branches)
        total += Pass(len(branches) * longest, len(branches) * _causal(longest), scored)
    return total


def packed_pass(trees: Sequence[Tree], which: str, *, shared: bool) -> Pass:
    """Rows without padding; shared: a prompt is computed once for its completions."""
    total = Pass()
    for tree in trees:
        prompt, own = len(tree.prompt), [len(c.ids) for c in _branches(tree, which)]
        once = len(own) - 1 if shared else 0
        positions = sum(prompt + n for n in own) - once * prompt
        pairs = sum(_causal(prompt + n) for n in own) - once * _causal(prompt)
        total += Pass(positions, pairs, sum(own))
    return total


def _training(one: Any, *, kto: bool, reference: bool, whole_step: bool) -> tuple[Pass, Pass]:
    """What a step forwards with gradients, and without. one: `which` to the pass over it.

    KTO's baseline is a pass without gradients over mismatched completions; ours scores the whole step in it
    (whole_step), and a live reference then is asked once for all of it.
    """
    graded = one("completions")
    if not kto:
        return graded, graded if reference else Pass()
    bare = one("branches" if whole_step else "mismatched")
    if not reference:
        return graded, bare
    return graded, bare + bare if whole_step else bare + bare + graded


def step_flops(
    trees: Sequence[Tree], size: Size, *, kto: bool, reference: bool, per_device: int, budget: int
) -> dict[str, int]:
    """Operations of a step in each layout.

    trl: padded blocks of per_device rows, the head at every position; trl_head: the same, the head where it is needed
    padded, packed, trees: ours; `padded` sorts rows by length, in micro-batches of at most `budget` positions
    reference: whether one is forwarded in the step
    """
    blocks = [trees[i : i + per_device] for i in range(0, len(trees), per_device)]
    sorted_blocks = [[trees[i] for i in members] for members in plan_step(trees, 1, budget, way=PADDED)[0]]
    layouts = {
        "trl": lambda which: padded_pass(blocks, which, all_scored=True),
        "trl_head": lambda which: padded_pass(blocks, which, all_scored=False),
        "padded": lambda which: padded_pass(sorted_blocks, which, all_scored=False),
        "packed": lambda which: packed_pass(trees, which, shared=False),
        "trees": lambda which: packed_pass(trees, which, shared=True),
    }
    found = {}
    for name, one in layouts.items():
        whole = not name.startswith("trl")
        graded, bare = _training(one, kto=kto, reference=reference, whole_step=whole)
        found[name] = 3 * graded.flops(size) + bare.flops(size)
    return found
