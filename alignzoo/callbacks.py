"""Callbacks at work: told what happens in a run, on its first rank, with copies of plain data.

One that fails stops nothing: its first failure is told, the others are counted. With `strict` the run ends after the
step. Whatever a callback draws from the random generators, the training goes on as if it had not. Importing this
imports no torch: what a recipe names is checked before that.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from alignzoo.choices import Chosen, make_chosen
from alignzoo.plugin_errors import one_line, own_files
from alignzoo.plugin_kinds import CallbackInfo
from alignzoo.plugins import Registry
from alignzoo.progress import Say
from alignzoo.recipe import CallbackChoice, Recipe


class Callbacks:
    """The callbacks of a recipe. Made by `make_callbacks`; silent until `begin`."""

    def __init__(self, chosen: Sequence[Chosen[CallbackInfo, CallbackChoice]]) -> None:
        self._chosen = tuple(chosen)
        self._say: Say | None = None  # None: nobody is called
        self.failed: Counter[str] = Counter()  # calls that failed, by label
        self.fault = ""  # the first failure of a strict one
        self.metrics: dict[str, float] = {}  # the last of each name

    @property
    def strict(self) -> bool:
        """Whether any of them may end the run; the same on all ranks."""
        return any(one.choice.strict for one in self._chosen)

    @property
    def infos(self) -> list[CallbackInfo]:
        """Who brought each."""
        return [one.info for one in self._chosen]

    @property
    def settings(self) -> list[dict[str, Any]]:
        """The settings of each, as recipe.to_table takes them."""
        return [dataclasses.asdict(one.thing.settings) for one in self._chosen]

    def describe(self) -> list[str]:
        """A line for each: 'webhook (alignzoo 0.1.0): url_env = "HOOK"'."""
        return [f"{one.label} ({one.owner}): {one.settings}" for one in self._chosen]

    def begin(self, say: Say) -> None:
        """From here on they are called: on the first rank of a run."""
        self._say = say

    def see(self, line: Mapping[str, float]) -> None:
        """A line of metrics, of a step or of an evaluation."""
        self.metrics |= line
        self.call("evaluated" if any(name.startswith("eval_") for name in line) else "step_ended", dict(line))

    def call(self, name: str, given: Any) -> None:
        """Calls the method of all of them, each with a copy. It raises nothing but what ends the process."""
        if self._say is None:
            return
        for one in self._chosen:
            try:
                with _same_randomness():
                    getattr(one.thing, name)(copy.deepcopy(given))
            except Exception as error:
                words = one_line(error, own_files(one.info.origin, one.info.distribution != "file"))
                if not self.failed[one.label]:
                    self._say(f'WARNING: callback "{one.label}" failed in {name}: {words}')
                self.failed[one.label] += 1
                if one.choice.strict and not self.fault:
                    self.fault = f'callback "{one.label}" failed in {name}: {words}'

    def end(self, end: Mapping[str, Any]) -> None:
        """The last call, and the counts of those that failed more than once."""
        self.call("run_ended", {**end, "metrics": self.metrics})
        for label, count in self.failed.items():
            if count > 1 and self._say is not None:
                self._say(f'WARNING: callback "{label}" failed {count} times')


def make_callbacks(recipe: Recipe, registry: Registry) -> Callbacks:
    """The callbacks of a recipe with their settings. Raises RecipeError that names the place; calls nobody."""
    return Callbacks(make_chosen(recipe, registry, CallbackInfo, recipe.callbacks))


@contextmanager
def _same_randomness() -> Iterator[None]:
    """Leaves the generators of Python, numpy and torch as they were."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
