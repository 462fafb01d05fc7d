"""HTML pages that need no network and run no script: templates filled, everything escaped, plots inside.

What a model answers, and what data files hold, is text that nobody has vouched for.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class Image:
    """A plot within a page."""

    svg: bytes
    words: str  # what it shows, for who cannot see it

    @property
    def source(self) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode("ascii")


@dataclass(frozen=True)
class Table:
    """Cells of text. The first column names the row. marked: rows, by their index, that are to be seen first."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    marked: frozenset[int] = frozenset()


def page(template: str, **values: Any) -> str:
    """A page from templates/, whole."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("alignzoo"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters["visible"] = visible
    return made


def visible(text: str) -> str:
    """Text of a model or a file: control characters, and those that turn the direction of writing, are shown."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text) or "(empty)"


def shown(value: Any) -> str:
    """A value of a recipe, or of a table, in a few characters."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {shown(v)}" for key, v in value.items()) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
