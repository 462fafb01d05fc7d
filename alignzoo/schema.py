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


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean "x"?)', or '' where nothing is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""


def describe_type(annotation: Any) -> str:
    """A type in the words of a recipe's author."""
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    if annotation in plain:
        return plain[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(f'"{a}"' if isinstance(a, str) else str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(a) for a in args if a is not type(None))
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return f"a list of {describe_type(args[0]).removeprefix('a ')}s" if args[0] in plain else "a list of tables"
    if origin is tuple:
        return "a list of " + ", ".join(describe_type(a) for a in args)
    return "a table"


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
        wanted = " ".join(filter(None, (describe_type(annotation), spec.range())))
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
        return (value, "") if value in args else (None, "is not among the choices")
    if origin is tuple:
        return _convert_tuple(value, args, path, problems)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        if isinstance(value, annotation):
            return value, ""
        if not isinstance(value, Mapping):
            return None, "is not a table"
        return build(typing.cast(type, annotation), value, path, problems), ""
    if origin in (dict, Mapping) or annotation in (dict, Mapping) or origin is typing.get_origin(Mapping[str, Any]):
        return (dict(value), "") if isinstance(value, Mapping) else (None, "is not a table")
    return _convert_scalar(value, annotation)


def _convert_union(value: Any, options: tuple[Any, ...], path: Path, problems: list[Problem]) -> tuple[Any, str]:
    if value is None and type(None) in options:
        return None, ""
    options = tuple(o for o in options if o is not type(None))
    complaint = ""
    for option in options:
        trial: list[Problem] = []
        found, complaint = _convert(value, option, path, trial)
        if not complaint and not trial:
            return found, ""
        if trial:  # the shape fits, something inside does not: that is the complaint to hear
            problems.extend(trial)
            return None, ""
    return None, complaint if len(options) == 1 else "has the wrong type"


def _convert_tuple(value: Any, args: tuple[Any, ...], path: Path, problems: list[Problem]) -> tuple[Any, str]:
    if not isinstance(value, list | tuple):
        return None, "is not a list"
    each = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
    if len(each) != len(value):
        return None, f"has {len(value)} elements, not {len(each)}"
    found = []
    for i, (item, annotation) in enumerate(zip(value, each, strict=True)):
        converted, complaint = _convert(item, annotation, (*path, i), problems)
        if complaint:
            return None, f"element {i} ({show(item)}) {complaint}"
        found.append(converted)
    return tuple(found), ""


def _convert_scalar(value: Any, annotation: Any) -> tuple[Any, str]:
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not annotation and not (annotation is str and isinstance(value, str)):
        return None, "has the wrong type"
    if annotation is float and not math.isfinite(value):
        return None, "is not a finite number"
    return value, ""


def parse_raw(text: Raw, annotation: Any) -> Any:
    """The text of --set: verbatim for a string field, else as TOML; what is not TOML stays a string."""
    options = [o for o in typing.get_args(annotation) if o is not type(None)] or [annotation]
    strings = [o for o in options if o is str or isinstance(o, str)]  # the choices of a Literal are strings themselves
    if options == strings:
        return str(text)
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return str(text)


def show(value: Any) -> str:
    text = (
        f'"{value}"'
        if isinstance(value, str)
        else "true"
        if value is True
        else "false"
        if value is False
        else repr(value)
    )
    return text if len(text) <= 60 else text[:57] + "..."


def check_instance(instance: Any) -> list[Problem]:
    """The same types and bounds for a dataclass that was built in Python."""
    problems: list[Problem] = []
    hints = type_hints(type(instance))
    for field in dataclasses.fields(instance):
        convert(getattr(instance, field.name), hints[field.name], (field.name,), problems, spec_of(field))
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
    """Every setting of a dataclass, nested ones with dotted names."""
    hints, rows = type_hints(cls), []
    for field in dataclasses.fields(typing.cast(Any, cls)):
        spec, annotation = spec_of(field), hints[field.name]
        nested = [a for a in (annotation, *typing.get_args(annotation)) if dataclasses.is_dataclass(a)]
        default = "required" if field.default is MISSING else "" if field.default is None else show(field.default)
        described = describe_type(annotation)
        rows.append(Row(prefix + field.name, described, default, spec.range(), spec.help))
        for inner in nested:
            rows.extend(rows_of(typing.cast(type, inner), f"{prefix}{field.name}."))
    return rows
