"""A plugin-based zoo of alignment algorithms. What a plugin's author needs is here; importing it loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alignzoo.api import (
    Callback,
    CompletionScores,
    Demonstrations,
    Format,
    Groups,
    Labelled,
    LogProbs,
    Loss,
    LossOutput,
    Metric,
    NoSettings,
    Pairs,
    Reward,
    ScoredPairs,
    SequenceStats,
    Step,
    metric,
    setting,
)
from alignzoo.errors import AlignzooError
from alignzoo.hookspecs import hookimpl

if TYPE_CHECKING:
    from alignzoo.recipe import Recipe as Recipe
    from alignzoo.recipe import load_recipe as load_recipe
    from alignzoo.runner import Result as Result
    from alignzoo.runner import run as run

__version__ = "0.1.0"
__all__ = [
    "AlignzooError", "Callback", "CompletionScores", "Demonstrations", "Format", "Groups", "Labelled", "LogProbs",
    "Loss", "LossOutput", "Metric", "NoSettings", "Pairs", "Recipe", "Result", "Reward", "ScoredPairs",
    "SequenceStats", "Step", "hookimpl", "load_recipe", "metric", "run", "setting",
]  # fmt: skip

_LATE = {"load_recipe": "recipe", "Recipe": "recipe", "run": "runner", "Result": "runner"}


def __getattr__(name: str) -> Any:
    """`load_recipe` and `run` are imported when they are used: `run` needs torch."""
    if name not in _LATE:
        raise AttributeError(f"module 'alignzoo' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"alignzoo.{_LATE[name]}"), name)
