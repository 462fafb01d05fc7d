"""What benchmarks/step.py trains on: token trees of given lengths, and the same rows as TRL's trainers take them.

Lengths are drawn with a seed; the tokens are a text of the repository, cut anywhere. Both sides get these very ids.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignzoo.batch import steps_of
from alignzoo.tree import Completion, Tree

REPO = Path(__file__).resolve().parents[1]
TEXT = REPO / "recipes/data/shop_train.jsonl"
DEMO = REPO.parent / "shared/data/llamafactory/dpo_en_demo.json"
KINDS = {"dpo": "pairs", "orpo": "pairs", "sft": "demonstrations", "kto": "labelled", "grpo": "groups"}


@dataclass(frozen=True)
class Shape:
    """rows trees; tokens of a prompt and of each of `completions` completions, both ends included.

    batch: rows of one optimizer step
    """

    rows: int
    prompt: tuple[int, int]
    completion: tuple[int, int]
    completions: int = 2
    batch: int = 4


SHAPES = {
    "std": Shape(64, (64, 256), (16, 192)),
    "long": Shape(32, (512, 1024), (64, 128), batch=2),
    "groups": Shape(16, (256, 256), (64, 64), completions=8, batch=1),
    **{f"tokens-{n}": Shape(8 * n, (128, 128), (64, 64), batch=n) for n in (1, 2, 4, 8)},  # 256 tokens each
    **{f"completions-{n}": Shape(8, (256, 256), (64, 64), completions=n, batch=1) for n in (1, 2, 4, 8, 16)},
    "tiny": Shape(8, (8, 24), (4, 16)),
    "tiny-groups": Shape(4, (16, 16), (8, 8), completions=4, batch=1),
}
DEMO_ROWS, DEMO_BATCH = 64, 2
NAMES = (*SHAPES, "demo")


def batch_of(data: str, factor: int = 1) -> int:
    """Rows of one optimizer step."""
    return factor * (DEMO_BATCH if data == "demo" else SHAPES[data].batch)


def read_trees(data: str, tokenizer: Any, seed: int, least: int = 0) -> list[Tree]:
    """The rows of a data set, chosen and rejected or a group, in its own order; more where `least` asks for more."""
    if data == "demo":
        return _demo(tokenizer, max(least, DEMO_ROWS))
    shape, rng = SHAPES[data], np.random.default_rng(seed)
    lines = [json.loads(line) for line in TEXT.read_text(encoding="utf-8").splitlines()]
    text = "\n".join(line[key] for line in lines for key in ("prompt", "chosen", "rejected"))
    stream = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def cut(between: tuple[int, int]) -> Any:
        length = int(rng.integers(between[0], between[1] + 1))
        start = int(rng.integers(0, len(stream) - length))
        return stream[start : start + length]

    trees = []
    for row in range(max(least, shape.rows)):
        prompt = cut(shape.prompt)
        branches = tuple(Completion(cut(shape.completion)) for _ in range(shape.completions))
        rewards = tuple(float(reward) for reward in rng.random(shape.completions).round(3))
        trees.append(Tree(row, prompt, branches, where=f"{data}:{row}", rewards=rewards))
    return trees


def _demo(tokenizer: Any, rows: int) -> list[Tree]:
    """The first rows of LLaMA-Factory's demo, prepared as a run prepares them."""
    from alignzoo.data.dataset import prepare
    from alignzoo.recipe import Data, Source

    source = Data(train=(Source(path=str(DEMO), limit=rows),), max_length=1024)
    made = prepare(source, "pairs", tokenizer, needs_mismatched=False, seed=0, say=lambda _: None)
    return list(made.train)


def as_kind(trees: Sequence[Tree], kind: str) -> list[Tree]:
    """The same rows as another kind of data: pairs unpaired in order, or their chosen sides alone."""
    if kind == "groups":
        return list(trees)
    plain = [dataclasses.replace(tree, rewards=None) for tree in trees]
    if kind == "pairs":
        return plain
    slots = (0, 1) if kind == "labelled" else (0,)
    made = [(tree, tree.completions[slot], slot == 0) for tree in plain for slot in slots]
    label = kind == "labelled"
    return [
        dataclasses.replace(tree, row=row, completions=(completion,), label=chosen if label else None)
        for row, (tree, completion, chosen) in enumerate(made)
    ]


@dataclass(frozen=True)
class Plan:
    """The rows of all steps, warm-up first, in the order that both sides take them."""

    trees: list[Tree]  # the whole data set, as ours gets it
    steps: list[list[Tree]]  # those of each step
    per_device: int  # rows of TRL's forward pass: eight sequences, or four pairs


def plan_of(spec: Mapping[str, Any], tokenizer: Any) -> Plan:
    """That of a specification of a case."""
    seed, steps, batch = spec["seed"], spec["warmup"] + spec["steps"], batch_of(spec["data"], spec["factor"])
    trees = read_trees(spec["data"], tokenizer, seed, least=steps * batch)
    return make_plan(spec["loss"], trees, batch, steps, seed)


def make_plan(loss: str, trees: Sequence[Tree], batch: int, steps: int, seed: int) -> Plan:
    """Rows for so many steps; a labelled row gets TRL's mismatched completion: of the row before in its forward pass.

    Raises ValueError where the data holds fewer rows than that.
    """
    kind = KINDS[loss]
    rows = as_kind(trees, kind)
    if len(rows) < batch * steps:
        raise ValueError(f"{len(rows)} rows are too few for {steps} steps of {batch}")
    order = [step.rows for step in steps_of(len(rows), batch, 1, steps, seed)]
    per_device = min(batch, {"pairs": 4, "groups": 1, "demonstrations": 4, "labelled": 8}[kind])
    if kind == "labelled":
        for step in order:
            for start in range(0, batch, per_device):
                block = step[start : start + per_device]
                for row, before in zip(block, (block[-1], *block[:-1]), strict=True):
                    rows[row] = dataclasses.replace(rows[row], mismatched=rows[before].completions[0])
    return Plan(rows, [[rows[i] for i in step] for step in order], per_device)


def sequence_tokens(trees: Sequence[Tree]) -> int:
    """Tokens without padding, a prompt once for each of its completions: what TRL counts, for both sides."""
    return sum(len(tree.prompt) + len(c.ids) for tree in trees for c in tree.completions)


def trl_rows(loss: str, trees: Sequence[Tree]) -> list[dict[str, Any]]:
    """The columns that TRL's own preparation gives for these ids."""
    return [_TRL_ROW[KINDS[loss]](tree) for tree in trees]


def _pair(tree: Tree) -> dict[str, Any]:
    chosen, rejected = (c.ids.tolist() for c in tree.completions)
    return {"prompt_ids": tree.prompt.tolist(), "chosen_ids": chosen, "rejected_ids": rejected}


def _labelled(tree: Tree) -> dict[str, Any]:
    assert tree.mismatched is not None
    prompt, own, other = (ids.tolist() for ids in (tree.prompt, tree.completions[0].ids, tree.mismatched.ids))
    return {"prompt_ids": prompt, "completion_ids": own, "KL_completion_ids": other, "label": tree.label}


def _demonstration(tree: Tree) -> dict[str, Any]:
    prompt, completion = tree.prompt.tolist(), tree.completions[0].ids.tolist()
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


_TRL_ROW = {
    "pairs": _pair, "labelled": _labelled, "demonstrations": _demonstration,
    "groups": lambda tree: {"prompt": str(tree.row)},  # a rollout function finds the ids by it
}  # fmt: skip
