"""Formats that a recipe names: alignzoo's own and those that plugins bring, whose rows are checked like anybody's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from alignzoo.api import Format
from alignzoo.data.formats import FORMATS, convert
from alignzoo.data.rows import BadRow, Dropped, Example, describe
from alignzoo.data.values import value
from alignzoo.errors import PluginError
from alignzoo.plugin_errors import one_line, own_files
from alignzoo.plugin_kinds import FormatInfo
from alignzoo.plugins import Registry
from alignzoo.recipe import Recipe, Source

Row = Mapping[str, Any]
_OWN = ("labelled", "labelled_messages", "pairs", "prompt_completion", "messages", "text", "groups", "prompts")
_RETURNED = tuple(known for known in FORMATS if known.name in _OWN)  # what a stranger's `make` may return, by kind


def named(source: Source, registry: Registry | None) -> str | Format:
    """What `detect` takes for the format of a source.

    Raises PluginError for one that nobody brings, or more than one. registry: None where alignzoo's own are enough
    """
    if source.format == "auto" or registry is None:
        return source.format
    info = registry.one(FormatInfo, source.format)
    return info.cls if info.cls in FORMATS else _guarded(info)


def strangers(sources: Sequence[Source], registry: Registry) -> list[FormatInfo]:
    """The formats of some sources that are not alignzoo's own, each once."""
    names = dict.fromkeys(source.format for source in sources if source.format != "auto")
    found = [registry.one(FormatInfo, name) for name in names]
    return [info for info in found if info.cls not in FORMATS]


def check_formats(recipe: Recipe, registry: Registry) -> None:
    """Raises RecipeError, with its place, for a format that nobody brings or more than one."""
    data = recipe.data
    for role, sources in (("train", data.train), ("eval", data.eval or ())):
        for i, source in enumerate(sources if isinstance(sources, tuple) else ()):
            try:
                named(source, registry)
            except PluginError as error:
                key = ("data", "format") if source.format == data.format else ("data", role, i, "format")
                raise recipe.error(key, error.what, why=error.why, fix=error.fix) from error


def _guarded(info: FormatInfo) -> Format:
    """A stranger's format as one of ours: what it returns is read by our own format of its kind."""
    known, roots = info.cls, own_files(info.origin, info.distribution != "file")

    def call(function: Callable[[Row], Any], row: Row) -> Any:
        try:
            return function(dict(row))
        except RecursionError:
            raise
        except ValueError as error:
            raise BadRow("refused", f'format "{known.name}": {error}') from error
        except Exception as error:
            raise BadRow("format-failed", f'format "{known.name}": {one_line(error, roots)}') from error

    def make(row: Row) -> Example:
        for column in known.columns:
            value(row, column)
        made = call(known.make, row)
        if made is None:
            raise Dropped("left-out")
        return _read(known, made)

    derived = None if known.derived is None else partial(call, known.derived)
    return replace(known, make=make, derived=derived)


def _read(known: Format, made: Any) -> Example:
    if not isinstance(made, Mapping):
        raise BadRow("format-failed", f'format "{known.name}" returned {describe(made)}, not a row')
    own = [one for one in _RETURNED if one.kind == known.kind]
    fitting = next((one for one in own if set(one.columns) <= made.keys()), None)
    if fitting is None:
        wanted = " or ".join(", ".join(one.columns) for one in own)
        found = ", ".join(map(str, made)) or "none"
        raise BadRow("format-failed", f'format "{known.name}" returned the columns {found}; {known.kind} have {wanted}')
    return convert(fitting, made)
