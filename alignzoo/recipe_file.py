"""TOML files of recipes: reading, `extends`, --set, and the line of every key. It imports no torch."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignzoo.errors import RecipeError
from alignzoo.schema import Path as Key
from alignzoo.schema import Problem, Raw, dotted, parse_raw


@dataclass(frozen=True)
class Place:
    """Where a key was written."""

    text: str  # "dpo.toml:12", or "--set train.seed"
    folder: Path | None = None  # of that file


@dataclass
class Tables:
    """The merged tables of a recipe, and where each key was written."""

    content: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)
    file: Path | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.file.parent if self.file else Path()

    def locate(self, key: Key) -> str:
        """ "dpo.toml:12", or the --set that wrote the key, or the file where it is absent."""
        inside = next((place for k, place in self.places.items() if k[: len(key)] == key), None)
        found = self.places.get(key) or inside or self._place(key)
        if found:
            return found.text
        return str(self.file) if self.file else "recipe"

    def folder_of(self, key: Key) -> Path:
        """The folder of the file that wrote a key; the recipe's where no file did."""
        place = self._place(key)
        return self.folder if place is None or place.folder is None else place.folder

    def _place(self, key: Key) -> Place | None:
        return next((self.places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.places), None)

    def override(self, overrides: Sequence[str] | Mapping[str, Any]) -> None:
        """Puts `--set key=value` (or a mapping of dotted keys) over the file's values."""
        if isinstance(overrides, str):
            raise TypeError("overrides is a list of strings or a mapping, not one string")
        if isinstance(overrides, Mapping):
            for name, value in overrides.items():
                self._set(str(name), copy.deepcopy(value), Place(f"overrides[{str(name)!r}]"))
            return
        for text in overrides:
            name, raw = _split_override(text)
            self._set(name, raw, Place(f"--set {name}"))

    def _set(self, name: str, value: Any, place: Place) -> None:
        key: Key = ()
        node: Any = self.content
        parts = name.split(".")
        try:
            for part, following in zip(parts, [*parts[1:], None], strict=True):
                key = (*key, _step(node, part, key))
                if following is not None:
                    node = _table_in(node, key, following)
            node[key[-1]] = value
        except _NoSuchPlace as error:
            key = tuple(parts)
            self.problems.append(Problem(key, str(error)))
        self.places = {k: v for k, v in self.places.items() if k[: len(key)] != key}
        self.places[key] = place


class _NoSuchPlace(Exception):
    """An override that leads nowhere."""


def _step(node: Any, part: str, key: Key) -> str | int:
    """The index or key that a part of a dotted name means in a list or table. `key` is the node's own."""
    if not isinstance(node, list):
        return part
    if part.isascii() and part.isdecimal() and int(part) < len(node):
        return int(part)
    raise _NoSuchPlace(f'"{dotted(key)}" is a list of {len(node)}: write {dotted(key)}.0 for its first')


def _table_in(node: Any, key: Key, following: str) -> Any:
    """The table or list at the last step of `key`; a new table where there is nothing."""
    step = key[-1]
    child = node.get(step) if isinstance(node, dict) else node[step]
    if isinstance(child, Raw):
        child = node[step] = parse_raw(child, dict)
    if child is None:
        child = node[step] = {}
    if not isinstance(child, dict | list):
        raise _NoSuchPlace(f'"{dotted(key)}" is no table, it has no "{following}"')
    return child


def _split_override(text: str) -> tuple[str, Raw]:
    """Key and text of --set. The text is kept as it is, but for `key = value`, written with spaces as in TOML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {text}: not of the form key=value", fix="for example --set train.seed=1")
    return key.strip(), Raw(value.strip() if key[-1].isspace() else value)


def tables_from(content: Mapping[str, Any]) -> Tables:
    return Tables(content=copy.deepcopy(dict(content)))


def read_tables(path: Path) -> Tables:
    """A recipe file with all that it extends. Raises RecipeError."""
    return _read(path, (), "")


def _read(path: Path, seen: tuple[Path, ...], extended_by: str) -> Tables:
    """seen: the files that lead to this one. extended_by: the place of the `extends` that names it."""
    path, why = _expanded(path), f"{extended_by} extends it" if extended_by else ""
    identity = _resolved(path)
    if identity in seen:
        raise RecipeError(f"{path}: extends itself", why=" -> ".join(p.name for p in (*seen, path)))
    text = _read_text(path, why)
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, and what int() and deep nesting raise
        raise RecipeError(
            f"{path}: not valid TOML: {error}", why=why, fix="strings need quotes; true and false are lower case"
        ) from error
    tables = Tables(content, _places(text, path), path)
    base = content.pop("extends", None)
    if base is None:
        return tables
    place = tables.locate(("extends",))
    if not isinstance(base, str):
        raise RecipeError(f'{place}: extends is a string, e.g. extends = "base.toml"')
    return _merge_tables(_read(path.parent / _expanded(Path(base)), (*seen, identity), place), tables)


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # ~nobody
        return path


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null byte
        raise RecipeError(f"{path!s}: cannot be read", why=str(error)) from error


def _read_text(path: Path, why: str) -> str:
    if path.is_dir():
        raise RecipeError(f"{path}: a folder, not a recipe", why=why, fix="name the .toml file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such recipe", why=why, fix="see recipes/ for examples") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read", why=str(error)) from error


def _merge_tables(base: Tables, top: Tables) -> Tables:
    """The keys of `top` over those of `base`. Another loss takes the place of the base's with all its settings."""
    other_loss = "loss" in top.content and _loss_name(top.content["loss"]) not in (
        None,
        _loss_name(base.content.get("loss")),
    )
    if other_loss:
        base.content.pop("loss", None)
    content = _merge(base.content, top.content)
    whole = {key for key in top.places if not isinstance(_value(top.content, key), Mapping)}
    if other_loss:
        whole.add(("loss",))
    kept = {k: v for k, v in base.places.items() if not any(k[:n] in whole for n in range(1, len(k) + 1))}
    return Tables(content, {**kept, **top.places}, top.file)


def _loss_name(table: Any) -> Any:
    return table.get("name") if isinstance(table, Mapping) else table


def _value(content: Any, key: Key) -> Any:
    for part in key:
        content = content.get(part) if isinstance(content, Mapping) else content[part]
    return content


def _merge(base: Any, top: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(top, Mapping)):
        return top
    merged = dict(base)
    for key, value in top.items():
        merged[key] = _merge(base[key], value) if key in base else value
    return merged


# --- lines -----------------------------------------------------------------------------------------------------------


def _places(text: str, file: Path) -> dict[Key, Place]:
    """The first line of the statement that wrote each key; tomllib keeps no lines."""
    places: dict[Key, Place] = {}
    prefix: Key = ()
    counts: dict[Key, int] = {}  # of each [[array of tables]], the index of its last table
    for number, is_header, parsed in _statements(text):
        place = Place(f"{file}:{number}", file.parent)
        if is_header:
            prefix = _header_key(parsed, counts)
            places.setdefault(prefix, place)
            if isinstance(prefix[-1], int):
                places.setdefault(prefix[:-1], place)
        else:
            for key in _keys(parsed):
                places.setdefault((*prefix, *key), place)
    return places


def _statements(text: str) -> Iterator[tuple[int, bool, dict[str, Any]]]:
    """Line, is it a header, and content of each statement of valid TOML: as many lines as are TOML by themselves."""
    lines: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        lines.append(line)
        try:
            parsed = tomllib.loads("\n".join(lines))
        except tomllib.TOMLDecodeError:
            continue
        if parsed:
            yield number - len(lines) + 1, lines[0].lstrip().startswith("["), parsed
        lines = []


def _header_key(parsed: Any, counts: dict[Key, int]) -> Key:
    """The key of [a.b], or of the next table of [[a.b]]; within an array of tables that of its last one."""
    key: Key = ()
    while isinstance(parsed, dict) and parsed:
        if key in counts:
            key = (*key, counts[key])
        name, parsed = next(iter(parsed.items()))
        key = (*key, name)
    if isinstance(parsed, list):
        counts[key] = counts.get(key, -1) + 1
        key = (*key, counts[key])
    return key


def _keys(value: Any, prefix: Key = ()) -> Iterator[Key]:
    """The key of a value and of all that lies in it."""
    if prefix:
        yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, inner in items:
        yield from _keys(inner, (*prefix, part))
