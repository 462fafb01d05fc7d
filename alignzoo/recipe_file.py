"""TOML files of recipes: reading, `extends`, --set, and the line of every key. It imports no torch."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignzoo.errors import RecipeError
from alignzoo.schema import Path as Key
from alignzoo.schema import Problem, Raw, dotted

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(#.*)?$")
_ENTRY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")


@dataclass
class Tables:
    """The merged tables of a recipe, and where each key was written."""

    content: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    file: Path | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.file.parent if self.file else Path()

    def locate(self, key: Key) -> str:
        """ "dpo.toml:12", or the --set that wrote the key, or the file where it is absent."""
        for n in range(len(key), 0, -1):
            if key[:n] in self.places:
                return self.places[key[:n]]
        inside = [place for k, place in self.places.items() if k[: len(key)] == key]
        if inside:
            return inside[0]
        return str(self.file) if self.file else "recipe"

    def override(self, overrides: Sequence[str] | Mapping[str, Any]) -> None:
        """Puts `--set key=value` (or a mapping of dotted keys) over the file's values."""
        if isinstance(overrides, str):
            raise TypeError("overrides is a list of strings or a mapping, not one string")
        if isinstance(overrides, Mapping):
            pairs = [(str(key), value) for key, value in overrides.items()]
        else:
            pairs = [_split_override(text) for text in overrides]
        for name, value in pairs:
            self._set(name, value)

    def _set(self, name: str, value: Any) -> None:
        key: Key = tuple(int(part) if part.isdigit() else part for part in name.split("."))
        self.places = {k: v for k, v in self.places.items() if k[: len(key)] != key}
        self.places[key] = f"--set {name}"
        node: Any = self.content
        for i, part in enumerate(key[:-1]):
            child = _child(node, part)
            if isinstance(child, Raw):
                child = _raw_table(child)
                node[part] = child
            if child is None and isinstance(node, dict):
                child = node[part] = {}
            if not isinstance(child, dict | list):
                self.problems.append(Problem(key, f'"{dotted(key[: i + 1])}" is no table, it has no "{key[i + 1]}"'))
                return
            node = child
        if isinstance(node, list) and not (isinstance(key[-1], int) and key[-1] < len(node)):
            self.problems.append(Problem(key, f'"{dotted(key[:-1])}" is a list of {len(node)}'))
            return
        node[key[-1]] = value


def _child(node: Any, part: str | int) -> Any:
    if isinstance(node, list):
        return node[part] if isinstance(part, int) and part < len(node) else None
    return node.get(part)


def _raw_table(text: Raw) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return str(text)


def _split_override(text: str) -> tuple[str, Raw]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {text}: not of the form key=value", fix="for example --set train.seed=1")
    return key.strip(), Raw(value.strip())


def tables_from(content: Mapping[str, Any]) -> Tables:
    return Tables(content=copy.deepcopy(dict(content)))


def read_tables(path: Path, seen: tuple[Path, ...] = ()) -> Tables:
    """A recipe file with all that it extends."""
    path = path.expanduser()
    if path.resolve() in seen:
        raise RecipeError(f"{path}: extends itself", why=" -> ".join(p.name for p in (*seen, path)))
    text = _read_text(path)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(
            f"{path}: not valid TOML: {error}", fix="strings need quotes; true and false are lower case"
        ) from error
    tables = Tables(content, _places(text, str(path)), path)
    base = content.pop("extends", None)
    if base is None:
        return tables
    if not isinstance(base, str):
        raise RecipeError(f'{tables.locate(("extends",))}: extends is a string, e.g. extends = "base.toml"')
    return _merge_tables(read_tables(path.parent / base, (*seen, path.resolve())), tables)


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise RecipeError(f"{path}: a folder, not a recipe", fix="name the .toml file")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such recipe", fix="see recipes/ for examples") from error
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
        base.places = {k: v for k, v in base.places.items() if k[0] != "loss"}
    content = _merge(base.content, top.content)
    return Tables(content, {**base.places, **top.places}, top.file)


def _loss_name(table: Any) -> Any:
    return table.get("name") if isinstance(table, Mapping) else table


def _merge(base: Any, top: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(top, Mapping)):
        return top
    merged = dict(base)
    for key, value in top.items():
        merged[key] = _merge(base[key], value) if key in base else value
    return merged


def _places(text: str, file: str) -> dict[Key, str]:
    """Where each key stands. tomllib keeps no lines, so headers and `key =` are found by their form."""
    places: dict[Key, str] = {}
    prefix: Key = ()
    counts: dict[Key, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        header, entry = _HEADER.match(line), _ENTRY.match(line)
        if header and not entry:
            prefix = _key(header.group(2))
            if header.group(1) == "[[":
                counts[prefix] = counts.get(prefix, -1) + 1
                prefix = (*prefix, counts[prefix])
            places.setdefault(prefix, f"{file}:{number}")
        elif entry:
            places.setdefault((*prefix, *_key(entry.group(1))), f"{file}:{number}")
    return places


def _key(text: str) -> Key:
    return tuple(part.strip().strip("\"'") for part in text.split("."))
