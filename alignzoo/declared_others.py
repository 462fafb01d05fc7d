"""What a format and a callback must declare, compared with the contract (api.py). It imports no torch."""

from __future__ import annotations

import inspect
from typing import Any

from alignzoo import schema
from alignzoo.api import CALLS, KINDS, Callback, Format
from alignzoo.declared import CONTRACT_RULE, NAME_RULE, Rule, check_contract, named_faults, place, rule_faults
from alignzoo.errors import PluginError

RESERVED = ("name", "strict")  # keys of [[callbacks]] that are not settings
KINDS_OF_ROWS = (*KINDS, "prompts")


def _is_words(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(word, str) for word in value)


_WORDS: Rule = (_is_words, "a tuple of names")
_FUNCTION: Rule = (lambda v: v is None or callable(v), "a function of a row, or None")
_RULES: dict[str, Rule] = {
    "name": (lambda v: NAME_RULE[0](v) and v != "auto", f'{NAME_RULE[1]}; "auto" is taken'),
    "kind": (lambda v: v in KINDS_OF_ROWS, "one of " + ", ".join(f'"{kind}"' for kind in KINDS_OF_ROWS)),
    "columns": (lambda v: _is_words(v) and bool(v), "a tuple of one name or more"),
    "description": (lambda v: isinstance(v, str) and bool(v.strip()), "a sentence"),
    "make": (callable, "a function of a row"), "optional": _WORDS, "looks": _FUNCTION, "derived": _FUNCTION,
    "adds": _WORDS, "contract": CONTRACT_RULE,
}  # fmt: skip


def checked_format(thing: Any) -> Format:
    """The format as it is. Raises PluginError that names everything wrong at once."""
    if not isinstance(thing, Format):
        raise PluginError(f"{schema.show(thing)} is no alignzoo.Format")
    who = f"format {schema.show(thing.name)}"
    check_contract(who, thing.contract)
    faults = [fault for name, rule in _RULES.items() for fault in rule_faults(name, getattr(thing, name), rule)]
    if faults:
        raise PluginError(f"{who}{place(thing.make)}: " + "; ".join(faults))
    return thing


def callback_class(thing: Any) -> type[Callback]:
    """The class as it is. Raises PluginError that names everything wrong at once."""
    if not (isinstance(thing, type) and issubclass(thing, Callback)):
        raise PluginError(f"{schema.show(thing)} is not a subclass of alignzoo.Callback")
    who = f'callback "{vars(thing).get("name", thing.__name__)}"'
    check_contract(who, thing.contract)
    faults = named_faults(thing, RESERVED, "[[callbacks]]") + rule_faults("contract", thing.contract, CONTRACT_RULE)
    if all(getattr(thing, call) is getattr(Callback, call) for call in CALLS):
        faults.append("has none of the methods " + ", ".join(CALLS))
    faults += [
        f"{call} takes (self, {wanted})"
        for call in CALLS
        if len(_names(getattr(thing, call))) != 2
        for wanted in _names(getattr(Callback, call))[1:]
    ]
    if faults:
        raise PluginError(f"{who}{place(thing)}: " + "; ".join(faults))
    return thing


def _names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)
