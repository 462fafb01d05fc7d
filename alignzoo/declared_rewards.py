"""What a reward must declare, compared with the contract (api.py); plain functions as classes. It imports no torch."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from alignzoo import schema
from alignzoo.api import Reward, setting
from alignzoo.declared import NAME_RULE, named_faults, place, rule_faults, settings_faults
from alignzoo.errors import PluginError

RESERVED = ("name", "weight", "timeout", "max_failures")  # keys of [[rewards]] that are not settings
FIRST = ("prompts", "completions")


def reward_class(thing: Any) -> type[Reward]:
    """A reward class as it is, or the class of a function. Raises PluginError that names everything wrong at once."""
    if inspect.isfunction(thing):
        return _of_function(thing)
    if not (isinstance(thing, type) and issubclass(thing, Reward)):
        raise PluginError(f"{schema.show(thing)} is neither a function nor a subclass of alignzoo.Reward")
    faults = named_faults(thing, RESERVED, "[[rewards]]")
    if thing.__call__ is Reward.__call__:
        faults.append("has no __call__")
    elif [p.kind for p in _parameters(thing.__call__)][1:3] != [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2:
        faults.append("__call__ takes (self, prompts, completions, **columns)")
    if faults:
        raise PluginError(f'reward "{vars(thing).get("name", thing.__name__)}"{place(thing)}: ' + "; ".join(faults))
    return thing


def is_async(reward: Reward) -> bool:
    return inspect.iscoroutinefunction(type(reward).__call__)


def takes(reward: Reward, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of the columns of the rows: those that the reward gets, and those whose names mean something else to it."""
    taken = {*FIRST, "self", *(reward.taken if isinstance(reward, _FunctionReward) else ())}
    hidden = [name for name in names if name in taken]
    wants: set[str] | None = reward.named if isinstance(reward, _FunctionReward) else _named(type(reward).__call__)
    return [n for n in names if n not in hidden and (wants is None or n in wants)], hidden


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _named(function: Callable[..., Any]) -> set[str] | None:
    """The names of all parameters; None where **columns takes any."""
    found = _parameters(function)
    return None if any(p.kind is p.VAR_KEYWORD for p in found) else {p.name for p in found}


# --- functions -------------------------------------------------------------------------------------------------------


class _FunctionReward(Reward):
    """The base of the classes that functions are made into."""

    function: Callable[..., Any]
    named: set[str] | None
    taken: set[str]  # the names of its settings

    def __call__(self, *texts: Any, **columns: Sequence[Any]) -> Any:
        return self.function(*texts, **columns, **vars(self.settings))


class _AsyncFunctionReward(_FunctionReward):
    async def __call__(self, *texts: Any, **columns: Sequence[Any]) -> Any:
        return await self.function(*texts, **columns, **vars(self.settings))


@cache  # one function by two doors is one reward
def _of_function(function: Callable[..., Any]) -> type[Reward]:
    name = getattr(function, "name", function.__name__)
    parameters = _parameters(function)
    faults = rule_faults("name", name, NAME_RULE)
    if tuple(p.name for p in parameters[:2]) != FIRST:
        faults.append("its first two parameters are not prompts and completions")
    of_settings = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    settings: type | None = None
    try:
        hints = typing.get_type_hints(function)
        fields = [
            (p.name, hints.get(p.name, type(p.default)), setting(p.default, "a parameter of the function"))
            for p in of_settings
        ]
        settings = dataclasses.make_dataclass("Settings", fields, frozen=True)
        faults += settings_faults(settings, RESERVED, "[[rewards]]")
    except Exception as error:  # names that no type stands behind, defaults that no dataclass takes
        faults.append(f"its keyword-only parameters cannot be settings: {type(error).__name__}: {error}")
    if faults:
        raise PluginError(f'reward "{name}"{place(function)}: ' + "; ".join(faults))
    base = _AsyncFunctionReward if inspect.iscoroutinefunction(function) else _FunctionReward
    content = {
        "name": name,
        "Settings": settings,
        "columns": tuple(p.name for p in parameters[2:] if p.kind in named and p.default is p.empty),
        "function": staticmethod(function),
        "named": _named(function),
        "taken": {p.name for p in of_settings},
        "__doc__": function.__doc__,
        "__module__": function.__module__,
    }
    return type(function.__name__, (base,), content)
