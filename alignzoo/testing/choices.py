"""Values of settings: usual ones, the edges of what is declared, and what lies just beyond."""

from __future__ import annotations

import dataclasses
import types
import typing
from random import Random
from typing import Any, Literal

from alignzoo import schema
from alignzoo.api import Loss
from alignzoo.errors import AlignzooError

Settings = tuple[tuple[str, Any], ...]
Field = dataclasses.Field[Any]
FEW = 2  # values of a number beside the default in the variants
COMBINED = 5  # variants in which every setting is drawn


def make(cls: type[Loss], settings: Settings) -> Loss | None:
    """A loss with these settings; None where it refuses them."""
    try:
        return cls(**dict(settings))
    except (AlignzooError, ValueError, TypeError):
        return None


def fields_of(cls: type[Loss]) -> list[Field]:
    return [field for field in dataclasses.fields(cls.Settings) if field.init]


def variants(cls: type[Loss]) -> list[Settings]:
    """Settings that the loss takes: the defaults first, then each setting changed alone, then all drawn together."""
    fields, random = fields_of(cls), Random(0)
    given = tuple((f.name, values(cls, f)[0]) for f in fields if default_of(f) is dataclasses.MISSING)
    found = [given]
    found += [_taken(cls, given, f, v) for f in fields for v in values(cls, f)[1 : _count(cls, f)]]
    if len(fields) > 1:
        draws = range(COMBINED)
        found += [tuple((f.name, random.choice(values(cls, f)[: _count(cls, f)])) for f in fields) for _ in draws]
    unique = [settings for i, settings in enumerate(found) if settings not in found[:i]]
    return [settings for settings in unique if make(cls, settings) is not None]


def refused(cls: type[Loss], taken: list[Settings]) -> list[str]:
    """The values that no variant has, since the loss refused them with whatever was tried beside them."""
    had = [setting for settings in taken for setting in settings]
    tried = [(f.name, v) for f in fields_of(cls) for v in values(cls, f)[1 : _count(cls, f)]]
    return [f"{name}={value!r}" for name, value in tried if (name, value) not in had]


def _taken(cls: type[Loss], given: Settings, field: Field, value: Any) -> Settings:
    """A setting changed alone; where it needs another one beside it, with the first that serves."""
    alone = changed(given, field.name, value)
    others = [(f.name, v) for f in fields_of(cls) if f.name != field.name for v in values(cls, f)[1:]]
    tried = (alone, *(changed(alone, name, v) for name, v in others))
    return next((settings for settings in tried if make(cls, settings) is not None), alone)


def _count(cls: type[Loss], field: Field) -> int | None:
    """How many values a variant takes: all of words and flags, few of numbers."""
    numbers = [v for v in values(cls, field) if isinstance(v, int | float) and not isinstance(v, bool)]
    return FEW + 1 if len(numbers) > FEW and schema.spec_of(field).choices is None else None


def changed(settings: Settings, name: str, value: Any) -> Settings:
    return (*((n, v) for n, v in settings if n != name), (name, value))


def default_of(field: Field) -> Any:
    """MISSING where it must be given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def values(cls: type[Loss], field: Field) -> list[Any]:
    """Values within the declared bounds, the default first."""
    hint, spec, default = schema.type_hints(cls.Settings)[field.name], schema.spec_of(field), default_of(field)
    found = [] if default is dataclasses.MISSING else [default]
    found += list(spec.choices) if spec.choices is not None else _candidates(hint, spec, default)
    return _allowed(found, hint, spec, field.name)


def edges(cls: type[Loss], field: Field) -> list[Any]:
    """The least and the largest numbers that the declaration allows; beyond a missing bound 0, a negative, a large."""
    hint, spec, default = schema.type_hints(cls.Settings)[field.name], schema.spec_of(field), default_of(field)
    one = next((option for option in _options(hint) if option in (int, float)), None)
    if one is None or spec.choices is not None:
        return []
    size = abs(default) if isinstance(default, int | float) and default else 1
    near = 1 if one is int else 1e-3 * size
    low = [spec.ge] if spec.ge is not None else [spec.gt + near] if spec.gt is not None else [-size, 0]
    high = [spec.le] if spec.le is not None else [spec.lt - near] if spec.lt is not None else [10 * size]
    return _allowed([one(v) for v in (*low, *high)], hint, spec, field.name)


def beyond(cls: type[Loss], field: Field) -> list[Any]:
    """Values that the declaration forbids."""
    hint, spec = schema.type_hints(cls.Settings)[field.name], schema.spec_of(field)
    outside = [spec.gt, spec.lt]
    outside += [None if spec.ge is None else spec.ge - 1, None if spec.le is None else spec.le + 1]
    numbers = [type_(v) for v in outside if v is not None for type_ in _options(hint) if type_ in (int, float)]
    words = spec.choices is not None or any(typing.get_origin(o) is Literal for o in _options(hint))
    return [*numbers, *(["no such choice"] if words else [])]


def _allowed(found: list[Any], hint: Any, spec: schema.Spec, name: str) -> list[Any]:
    kept: list[Any] = []
    for value in found:
        problems: list[schema.Problem] = []
        schema.convert(value, hint, (name,), problems, spec)
        if not problems and not any(type(value) is type(k) and value == k for k in kept):
            kept.append(value)
    return kept


def _options(hint: Any) -> list[Any]:
    """The types of a union, or the type itself."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return list(typing.get_args(hint)) if union else [hint]


def _candidates(hint: Any, spec: schema.Spec, default: Any) -> list[Any]:
    found: list[Any] = []
    for option in _options(hint):
        origin, args = typing.get_origin(option), typing.get_args(option)
        if option is bool:
            found += [True, False]
        elif origin is Literal:
            found += args
        elif option in (int, float):
            found += _numbers(option, spec, default)
        elif option is str:
            found += ["kept", "other"]
        elif option is type(None):
            found.append(None)
        elif origin is tuple:
            found += _tuples(args, spec, default)
        elif dataclasses.is_dataclass(option):
            found += _tables(option, default)
    return found


def _numbers(kind: type, spec: schema.Spec, default: Any) -> list[Any]:
    base = default if isinstance(default, int | float) and not isinstance(default, bool) and default else 1
    low, high = (next((b for b in pair if b is not None), None) for pair in ((spec.ge, spec.gt), (spec.le, spec.lt)))
    found: list[Any]
    if kind is int:
        found = [2 * base, base - 1, base + 1, 1, 2, 3, 0, low, high]
    else:
        found = [3 * base, base / 10, 0.5, 1.0, 0.1, 0.0, 10 * base, -base, low, high, 0.9, 2.0, 5.0]
        if low is not None and high is not None:
            found = [low + part * (high - low) for part in (0.4, 0.8, 0.1, 0.01, 0.99)] + found
    return [kind(v) for v in found if v is not None]


def _tuples(args: tuple[Any, ...], spec: schema.Spec, default: Any) -> list[Any]:
    """Of one element each, or of as many as the type has; elements in the order of their candidates."""
    element = default[0] if isinstance(default, tuple) and default else None
    inner = _candidates(args[0], spec, element)
    if args[-1] is Ellipsis:
        return [*((v,) for v in inner), ()]
    return [tuple(row) for row in zip(*(_candidates(arg, spec, None) for arg in args), strict=False)]


def _tables(cls: Any, default: Any) -> list[Any]:
    """A table with each of its settings changed alone."""
    try:
        base = default if isinstance(default, cls) else cls()
    except TypeError:  # one of its settings must be given
        return []
    hints, found = schema.type_hints(cls), [base]
    for field in dataclasses.fields(cls):
        spec, value = schema.spec_of(field), getattr(base, field.name)
        options = list(spec.choices) if spec.choices is not None else _candidates(hints[field.name], spec, value)
        for option in _allowed(options, hints[field.name], spec, field.name):
            found.append(dataclasses.replace(base, **{field.name: option}))
    return found
