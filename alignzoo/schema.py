"""Tables of a recipe into frozen dataclasses: types, bounds, and errors that name the nearest key.

Used twice: for the sections of a recipe (recipe.py) and for the settings of a loss (api.py). It imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Spec:
    """What `setting` knows beside the default: the help text and the allowed range."""

    help: str
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    choices: tuple[Any, ...] | None = None

    def range(self) -> str:
        """The allowed range in words, "" where everything of the type is allowed."""
        if self.choices is not None:
            return "one of " + ", ".join(repr(c) for c in self.choices)
        signs = ((">", self.gt), (">=", self.ge), ("<", self.lt), ("<=", self.le))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in signs if bound is not None)

    def allows(self, value: Any) -> bool:
        if self.choices is not None:
            return value in self.choices
        return (
            (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )


class Raw(str):
    """The text behind `--set key=`: read by the type of the field that it is for."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a table, and where."""

    path: Path
    message: str

    @property
    def key(self) -> str:
        return dotted(self.path)


def setting(
    default: T,
    help: str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    choices: Iterable[Any] | None = None,
) -> T:
    """A field of a Settings dataclass, with its help text and bounds.

    The bounds hold for a recipe, for --set and for a loss built in Python; those of a tuple hold for its elements.
    Pass `dataclasses.MISSING` as the default of a setting that must be given.
    """
    if not help.strip():
        raise ValueError("a setting needs a help text")
    spec = Spec(help, gt, ge, lt, le, None if choices is None else tuple(choices))
    if default is MISSING:
        return dataclasses.field(metadata={"spec": spec})  # type: ignore[no-any-return]
    if isinstance(default, dict):
        return typing.cast(T, dataclasses.field(default_factory=default.copy, metadata={"spec": spec}))
    return dataclasses.field(default=default, metadata={"spec": spec})


def spec_of(field: dataclasses.Field[Any]) -> Spec:
    spec = field.metadata.get("spec")
    return spec if isinstance(spec, Spec) else Spec("")


def dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)


def nearest(word: object, known: Iterable[str]) -> str:
    """' (did you mean "x"?)', or '' where nothing is near."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""


_ONE: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_MANY: dict[Any, str] = {bool: "true and false", int: "whole numbers", float: "numbers", str: "strings"}


def describe_type(annotation: Any) -> str:
    """A type in the words of a recipe's author."""
    if annotation in _ONE:
        return _ONE[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(f'"{a}"' if isinstance(a, str) else str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(a) for a in args if a is not type(None))
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return "a list of " + (_MANY.get(args[0]) or ("tables" if nested_in(args[0]) else describe_type(args[0])))
    if origin is tuple:
        return f"a list of {len(args)}: " + ", ".join(describe_type(a) for a in args)
    return "anything" if annotation is Any else "a table"


def type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def build(cls: type[T], table: Mapping[str, Any], path: Path, problems: list[Problem]) -> T | None:
    """A dataclass from a table. Every problem is added to `problems`; None where there was one."""
    before = len(problems)
    hints = type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    for key in table:
        if key not in fields:
            kind = "section" if not path else "key"
            problems.append(Problem((*path, key), f'unknown {kind} "{key}"{nearest(key, fields)}'))
    values: dict[str, Any] = {}
    for name, field in fields.items():
        here = (*path, name)
        if name in table:
            values[name] = convert(table[name], hints[name], here, problems, spec_of(field))
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(Problem(here, f'"{name}" is missing: {spec_of(field).help or describe_type(hints[name])}'))
    return cls(**values) if len(problems) == before else None


def convert(value: Any, annotation: Any, path: Path, problems: list[Problem], spec: Spec) -> Any:
    """One value by the type of its field; a value that does not fit is a problem."""
    if isinstance(value, Raw):
        value = parse_raw(value, annotation)
    found, complaint = _convert(value, annotation, path, problems)
    if complaint:
        between = " " if spec.choices is None else ", "
        wanted = between.join(filter(None, (describe_type(annotation), spec.range())))
        problems.append(Problem(path, f"{path[-1]} = {show(value)}: {complaint} (wanted: {wanted})"))
    elif found is not None and not _in_range(found, spec):
        problems.append(Problem(path, f"{path[-1]} = {show(value)} is out of range (allowed: {spec.range()})"))
    return found


def _in_range(value: Any, spec: Spec) -> bool:
    if spec.choices is None and isinstance(value, tuple):
        return all(_in_range(v, spec) for v in value)
    if spec.choices is None and (isinstance(value, bool) or not isinstance(value, int | float)):
        return True
    return spec.allows(value)


def _convert(value: Any, annotation: Any, path: Path, problems: list[Problem]) -> tuple[Any, str]:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value, ""
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, args, path, problems)
    if origin is typing.Literal:
        among = any(type(value) is type(a) and value == a for a in args)  # True is no 1
        return (value, "") if among else (None, "is not among the choices")
    if origin is tuple:
        return _convert_tuple(value, args, path, problems)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        if isinstance(value, annotation):
            problems.extend(check_instance(value, path))
            return value, ""
        if not isinstance(value, Mapping):
            return None, "is not a table"
        return build(typing.cast(type, annotation), value, path, problems), ""
    if origin in _DICTS or annotation in _DICTS:
        return _convert_dict(value, args, path, problems)
    return _convert_scalar(value, annotation)


_DICTS = (dict, Mapping)


def _convert_dict(value: Any, args: tuple[Any, ...], path: Path, problems: list[Problem]) -> tuple[Any, str]:
    if not isinstance(value, Mapping):
        return None, "is not a table"
    of_values = args[1] if args else Any
    plain = {str(k): convert(v, of_values, (*path, str(k)), problems, Spec("")) for k, v in value.items()}
    return plain, ""


_WRONG_SHAPE = ("has the wrong type", "is not a list", "is not a table")


def _convert_union(value: Any, options: tuple[Any, ...], path: Path, problems: list[Problem]) -> tuple[Any, str]:
    if value is None and type(None) in options:
        return None, ""
    complaints = []
    for option in (o for o in options if o is not type(None)):
        trial: list[Problem] = []
        found, complaint = _convert(value, option, path, trial)
        if not complaint and not trial:
            return found, ""
        if trial:  # the shape fits, something inside does not: that is the complaint to hear
            problems.extend(trial)
            return None, ""
        complaints.append(complaint)
    telling = [c for c in complaints if c not in _WRONG_SHAPE]
    return None, telling[0] if telling else complaints[0] if len(complaints) == 1 else "has the wrong type"


def _convert_tuple(value: Any, args: tuple[Any, ...], path: Path, problems: list[Problem]) -> tuple[Any, str]:
    if not isinstance(value, list | tuple):
        return None, "is not a list"
    each = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
    if len(each) != len(value):
        return None, f"has {len(value)} elements, not {len(each)}"
    found = []
    for i, (item, annotation) in enumerate(zip(value, each, strict=True)):
        plain = parse_raw(item, annotation) if isinstance(item, Raw) else item
        converted, complaint = _convert(plain, annotation, (*path, i), problems)
        if complaint:
            return None, f"element {i} ({show(item)}) {complaint}"
        found.append(converted)
    return tuple(found), ""


def _convert_scalar(value: Any, annotation: Any) -> tuple[Any, str]:
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            return None, "is too large"
    if type(value) is not annotation and not (annotation is str and isinstance(value, str)):
        return None, "has the wrong type"
    if annotation is float and not math.isfinite(value):
        return None, "is not a finite number"
    return value, ""


def parse_raw(text: Raw, annotation: Any) -> Any:
    """The text of --set: verbatim for a string field, else as TOML; what is not TOML stays a string.

    Where a field takes a string or a list, a text that is neither in TOML is the string: `--set data.train=2024`.
    """
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = [o for o in typing.get_args(annotation) if o is not type(None)] if union else [annotation]
    if all(o is str or _is_words(o) for o in options):
        return str(text)
    try:
        content = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # TOMLDecodeError, and what int() and deep nesting raise
        return str(text)
    value = content["value"]
    options += [int] if float in options else []
    fits = isinstance(value, list | dict) or type(value) in options or str not in options
    return value if fits and len(content) == 1 else str(text)  # a second line would be a second key


def _is_words(annotation: Any) -> bool:
    """Is it a Literal of strings?"""
    choices = typing.get_args(annotation)
    return typing.get_origin(annotation) is typing.Literal and all(isinstance(c, str) for c in choices)


def show(value: Any) -> str:
    """A value in at most 60 characters, much as TOML writes it."""
    text = _WORDS[value] if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else _repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_WORDS = {True: "true", False: "false"}


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return f"a {type(value).__name__} too long to show"


def check_instance(instance: Any, path: Path = ()) -> list[Problem]:
    """The same types and bounds for a dataclass that was built in Python."""
    problems: list[Problem] = []
    hints = type_hints(type(instance))
    for field in dataclasses.fields(instance):
        convert(getattr(instance, field.name), hints[field.name], (*path, field.name), problems, spec_of(field))
    return problems


@dataclass(frozen=True)
class Row:
    """One setting as documentation and `alignzoo losses` show it."""

    name: str
    type: str
    default: str
    range: str
    help: str


def rows_of(cls: type, prefix: str = "") -> list[Row]:
    """Every setting of a dataclass; those of a table in it follow with dotted names, of a list of tables with []."""
    hints, rows = type_hints(cls), []
    for field in dataclasses.fields(typing.cast(Any, cls)):
        spec, annotation = spec_of(field), hints[field.name]
        name = prefix + field.name
        rows.append(Row(name, describe_type(annotation), _default(field), spec.range(), spec.help))
        for inner, listed in nested_in(annotation):
            rows.extend(rows_of(inner, f"{name}[]." if listed else f"{name}."))
    return rows


def nested_in(annotation: Any, listed: bool = False) -> list[tuple[type, bool]]:
    """The dataclasses that a type is made of, and whether each stands in a list: LoRA | None has one."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [(annotation, listed)]
    in_list = listed or typing.get_origin(annotation) is tuple
    return [found for inner in typing.get_args(annotation) for found in nested_in(inner, in_list)]


def _default(field: dataclasses.Field[Any]) -> str:
    """The default in TOML's words, "" where a key that is left out means something of its own."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if default is MISSING:
        return "required"
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        return "the defaults of its keys"
    return "" if default is None else _toml(default)


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    return show(value)
