"""What tests of rewards share: a plugin with rewards of all kinds, good and bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignzoo.plugins import discover
from alignzoo.recipe import load_recipe
from alignzoo.rewards import Rewards, Scored, make_rewards

BREVITY = Path(__file__).parent / "fixtures_plugins" / "alignzoo_brevity.py"
SMALL: dict[str, Any] = {
    "loss": {"name": "sft"}, "model": {"path": "m"}, "data": {"train": "rows.jsonl"}, "train": {"learning_rate": 1e-5},
}  # fmt: skip
PLUGIN = '''
import asyncio, time
from dataclasses import dataclass
from typing import Literal
import alignzoo

def ones(prompts, completions, **columns): return [1.0] * len(completions)
def words(prompts, completions, **columns): return [len(c.split()) for c in completions]
def odd(prompts, completions, **columns): return [1.0 if i % 2 else None for i in range(len(completions))]
def nothing(prompts, completions, **columns): return [None] * len(completions)
def raises(prompts, completions, **columns): raise KeyError("no such thing")
def leaves(prompts, completions, **columns): raise SystemExit("bye")
def hangs(prompts, completions, **columns): time.sleep(30)
def few(prompts, completions, **columns): return [1.0]
def nan(prompts, completions, **columns): return [float("nan")] * len(completions)
def infinite(prompts, completions, **columns): return [float("inf")] * len(completions)
def text(prompts, completions, **columns): return ["1"] * len(completions)
def bare(prompts, completions, **columns): return 1.0
def array(prompts, completions, **columns):
    import numpy
    return numpy.ones(len(completions), dtype=numpy.float32)
def tensor(prompts, completions, **columns):
    import torch
    return torch.ones(len(completions))
def true(prompts, completions, **columns): return [True] * len(completions)
def some(prompts, completions, **columns): return [ValueError("not this one"), *[0.5] * (len(completions) - 1)]
def mistake(prompts, completions, **columns): raise alignzoo.AlignzooError("the data is wrong", fix="mend it")
def names(prompts, completions, **columns): return [float(len(columns))] * len(completions)
def closed(prompts, completions): return [2.0] * len(completions)
def same(prompts, completions, answer, **columns): return [float(c == a) for c, a in zip(completions, answer)]
def maybe(prompts, completions, answer=None, **columns): return [float(answer is not None)] * len(completions)
def spoils(prompts, completions, **columns):
    completions.clear()
    return [0.0, 0.0]
def factor(prompts, completions, *, by: float = 2.0, kind: Literal["a", "b"] = "a", **columns):
    return [by] * len(completions)
async def soon(prompts, completions, **columns):
    await asyncio.sleep(0.3)
    return [3.0] * len(completions)
async def later(prompts, completions, *, seconds: float = 0.3, **columns):
    await asyncio.sleep(seconds)
    return [4.0] * len(completions)
async def blocks(prompts, completions, **columns):
    time.sleep(30)
def renamed(prompts, completions, **columns): return [5.0] * len(completions)
renamed.name = "another-name"

@dataclass(frozen=True)
class Settings:
    value: float = alignzoo.setting(1.0, "what it gives", ge=0)
    column: str = alignzoo.setting("answer", "a column")

class Constant(alignzoo.Reward):
    """Always the same.

    And more about it.
    """
    name, Settings = "constant", Settings
    @property
    def columns(self): return (self.settings.column,)
    def start(self, device):
        self.device = device
        if device == "broken": raise OSError("no such device")
        return f"on {device}"
    def __call__(self, prompts, completions, **columns): return [self.settings.value] * len(completions)

@alignzoo.hookimpl
def alignzoo_rewards():
    return [ones, words, odd, nothing, raises, leaves, hangs, few, nan, infinite, text, bare, array, tensor, true, some,
            mistake, names, closed, same, maybe, spoils, factor, soon, later, blocks, renamed, Constant]
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plugin") / "mine.py"
    file.write_text(PLUGIN)
    return file


class Case:
    """Rewards of tables over the plugin above, and what they said."""

    def __init__(self, plugin: Path) -> None:
        self.registry = discover([plugin])
        self.said: list[str] = []

    def make(self, *tables: dict[str, Any] | str) -> Rewards:
        content = {**SMALL, "rewards": [{"name": t} if isinstance(t, str) else t for t in tables]}
        return make_rewards(load_recipe(content), self.registry, self.said.append)

    def score(self, *tables: dict[str, Any] | str, **columns: Any) -> Scored:
        return self.make(*tables).score(["p", "p"], ["one", "two words"], columns)


@pytest.fixture
def case(plugin: Path) -> Case:
    return Case(plugin)
