"""What a loss class must declare, compared with the contract (api.py) when it is registered. It imports no torch."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from alignzoo import schema
from alignzoo.api import CONTRACT, INVARIANCES, KINDS, TOKEN_STATS, Loss
from alignzoo.errors import PluginError

DECLARED = ("name", "data", "Settings", "needs_reference")
NAMED = ("name", "Settings")  # what a reward and a callback declare
RESERVED = ("name", "weight")  # keys of [loss] that are not settings


def _is_names(value: Any, allowed: frozenset[str] | None = None) -> bool:
    strings = isinstance(value, set | frozenset) and all(isinstance(v, str) for v in value)
    return strings and (allowed is None or value <= allowed)


_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
Rule = tuple[Callable[[Any], bool], str]
_BY_SETTINGS: Rule = (lambda v: isinstance(v, bool | property), "True, False, or a property")
NAME_RULE: Rule = (
    lambda v: isinstance(v, str) and _NAME.fullmatch(v) is not None,
    "lower-case letters, digits, - and _",
)
CONTRACT_RULE: Rule = (lambda v: type(v) is int and v >= 1, "a whole number from 1")
_RULES: dict[str, Rule] = {
    "name": NAME_RULE,
    "data": (lambda v: isinstance(v, str) and v in KINDS, "one of " + ", ".join(f'"{kind}"' for kind in KINDS)),
    "needs_reference": _BY_SETTINGS,
    "contract": CONTRACT_RULE,
    "columns": (
        lambda v: isinstance(v, property) or (isinstance(v, tuple | list) and all(isinstance(c, str) for c in v)),
        "a tuple of names, or a property",
    ),
    "needs_scores": (lambda v: isinstance(v, bool), "True or False"),
    "token_stats": (lambda v: _is_names(v, TOKEN_STATS), "a set out of " + ", ".join(sorted(TOKEN_STATS))),
    "invariances": (lambda v: _is_names(v, frozenset(INVARIANCES)), "a set out of " + ", ".join(INVARIANCES)),
    "needs_mismatched": _BY_SETTINGS,
    "prepare_pass": _BY_SETTINGS,
    "paper": (lambda v: isinstance(v, str), "a string"),
    "family": (lambda v: isinstance(v, str), "a string"),
}


def check_loss_class(cls: type[Loss]) -> None:
    """Compare a class with the contract. Raises PluginError that names everything missing and wrong at once."""
    if not (isinstance(cls, type) and issubclass(cls, Loss)):
        raise PluginError(f"{schema.show(cls)} is not a subclass of alignzoo.Loss")
    who = (
        f'loss "{cls.__dict__["name"]}"' if isinstance(cls.__dict__.get("name"), str) else f"loss class {cls.__name__}"
    )
    check_contract(who, inspect.getattr_static(cls, "contract"))
    missing = [name for name in DECLARED if name not in vars(cls)]
    faults = ["does not declare " + ", ".join(missing) + " in the class itself"] if missing else []
    faults += _attribute_faults(cls, missing) + _score_faults(cls)
    if cls.__call__ is Loss.__call__:
        faults.append("has no __call__")
    if "Settings" not in missing:
        faults += settings_faults(cls.Settings, RESERVED, "[loss]")
    if faults:
        raise PluginError(f"{who}{place(cls)}: " + "; ".join(faults))


def check_contract(who: str, contract: Any) -> None:
    """Raises PluginError for what was written for another contract than this alignzoo's."""
    if type(contract) is not int or contract < 1 or contract == CONTRACT:
        return
    raise PluginError(
        f"{who} is made for contract {contract} of alignzoo, and this alignzoo has contract {CONTRACT}",
        fix="upgrade alignzoo: pip install -U alignzoo" if contract > CONTRACT
        else "upgrade the plugin, or install an alignzoo of its time",
    )  # fmt: skip


def named_faults(cls: type[Any], reserved: Sequence[str], table: str) -> list[str]:
    """What is wrong with the name and the Settings of a class that has no other declarations."""
    missing = [name for name in NAMED if name not in vars(cls)]
    faults = ["does not declare " + ", ".join(missing) + " in the class itself"] if missing else []
    if "name" not in missing:
        faults += rule_faults("name", cls.name, NAME_RULE)
    return faults + ([] if "Settings" in missing else settings_faults(cls.Settings, reserved, table))


def rule_faults(name: str, value: Any, rule: Rule) -> list[str]:
    return [] if rule[0](value) else [f"{name} = {schema.show(value)} (wanted: {rule[1]})"]


def _attribute_faults(cls: type[Loss], missing: Sequence[str]) -> list[str]:
    values = {name: inspect.getattr_static(cls, name) for name in _RULES if name not in missing}
    return [
        f"{name} = {schema.show(value)} (wanted: {_RULES[name][1]}){_meant(name, value)}"
        for name, value in values.items()
        if not _RULES[name][0](value)
    ]


_OF_SCORES = {"data": "pairs", "needs_reference": False, "needs_mismatched": False, "token_stats": frozenset()}


def _score_faults(cls: type[Loss]) -> list[str]:
    """What a loss of scores asks for that comes of log-probs only."""
    if cls.needs_scores is not True:
        return []
    wanted: dict[str, Any] = {**_OF_SCORES, **({} if cls.prepare is Loss.prepare else {"prepare_pass": False})}
    wrong = [(name, value) for name, value in wanted.items() if inspect.getattr_static(cls, name, None) != value]
    return [f"needs_scores = True goes with {name} = {schema.show(value)} only" for name, value in wrong]


def _meant(name: str, value: Any) -> str:
    """What a misspelt name of a property is taken for."""
    if name != "invariances" or not _is_names(value):
        return ""
    return "".join(schema.nearest(word, INVARIANCES) for word in sorted(value - INVARIANCES.keys()))


def settings_faults(settings: Any, reserved: Sequence[str], table: str) -> list[str]:
    """What is wrong with a Settings class. reserved: names that `table` of the recipe keeps for itself."""
    params = vars(settings).get("__dataclass_params__") if isinstance(settings, type) else None
    if params is None or not params.frozen:
        return ["Settings is not a frozen dataclass (@dataclass(frozen=True)); alignzoo.NoSettings is for none"]
    try:
        hints = schema.type_hints(settings)
    except Exception as error:
        return [f"the types of its Settings cannot be resolved: {type(error).__name__}: {error}"]
    kept = f"the names {', '.join(reserved[:-1])} and {reserved[-1]} are kept for {table} itself"
    return [
        f"setting {f.name}: {fault}"
        for f in dataclasses.fields(settings)
        for fault in ([kept] if f.name in reserved else _field_faults(f, hints[f.name]))
    ]


def _field_faults(field: dataclasses.Field[Any], annotation: Any) -> list[str]:
    if not isinstance(field.metadata.get("spec"), schema.Spec):
        return ["is not made with alignzoo.setting(...)"]
    if not _is_known(annotation):
        type_name = getattr(annotation, "__name__", None) if not typing.get_args(annotation) else None
        return [
            f"the type {type_name or annotation} cannot be read from a recipe "
            "(bool, int, float, str, Literal, X | None, tuple[X, ...], dict and dataclasses can)"
        ]
    problems: list[schema.Problem] = []
    if field.default is not dataclasses.MISSING:
        schema.convert(field.default, annotation, (field.name,), problems, schema.spec_of(field))
    return [f"its default breaks its own rules: {problem.message}" for problem in problems]


def _is_known(annotation: Any) -> bool:
    """Does `schema.convert` know the type."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return all(_is_known(arg) for arg in args if arg is not type(None))
    if origin is tuple:
        return bool(args) and all(_is_known(arg) for arg in args if arg is not Ellipsis)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return all(_is_known(hint) for hint in schema.type_hints(annotation).values())
    known = (bool, int, float, str, dict, Mapping, Any)
    return annotation in known or origin in (Literal, dict, typing.get_origin(Mapping[str, Any]))


def place(thing: Any) -> str:
    """ " (file:line)" of a function or class, "" where it has no file."""
    with suppress(OSError, TypeError):
        return f" ({inspect.getsourcefile(thing)}:{inspect.findsource(thing)[1] + 1})"
    return ""
