"""Recipes: whatever is written is read, or refused with a RecipeError."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_recipe import EVERYTHING, SMALL

from alignzoo.errors import RecipeError
from alignzoo.recipe import SECTIONS, Recipe, load_recipe, to_table
from alignzoo.recipe_file import read_tables

# --- anything at all -------------------------------------------------------------------------------------------------

KEYS = [
    *SECTIONS, "loss", "name", "extends", *{f.name for cls in SECTIONS.values() for f in dataclasses.fields(cls)},
    "rank", "target", "limit", "0", "", "x",
]  # fmt: skip
SCALARS = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.text(max_size=8), st.dates(), st.none(),
    st.sampled_from([10**400, "auto", "4bit", "sft", "~x/y", "a\0b", "x" * 300]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)
FIELDS = {name: [f.name for f in dataclasses.fields(cls)] for name, cls in SECTIONS.items()} | {
    "loss": ["name", "beta"]
}


@st.composite
def recipe_tables(draw: st.DrawFn) -> dict[str, Any]:
    """Tables that look like a recipe here and there."""
    table: dict[str, Any] = draw(st.sampled_from([{}, SMALL, EVERYTHING]))
    table = {section: dict(content) for section, content in table.items()}
    for _ in range(draw(st.integers(0, 4))):
        section = draw(st.sampled_from([*FIELDS, "x"]))
        if draw(st.integers(0, 3)):
            table.setdefault(section, {})[draw(st.sampled_from(FIELDS.get(section, KEYS)))] = draw(VALUES)
        else:
            return {**table, section: draw(VALUES)}
    return table


OVERRIDES = st.tuples(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4).map(".".join), st.text(max_size=12))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(recipe_tables(), st.lists(OVERRIDES, max_size=2))
def test_whatever_is_written_is_read_or_refused(table: dict[str, Any], overrides: list[tuple[str, str]]) -> None:
    try:
        recipe = load_recipe(table, [f"{key}={text}" for key, text in overrides])
    except RecipeError as error:
        assert str(error)
        return
    assert isinstance(recipe, Recipe)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(recipe_tables(), st.dictionaries(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3).map(".".join), VALUES))
def test_the_same_for_overrides_from_python(table: dict[str, Any], overrides: dict[str, Any]) -> None:
    try:
        recipe = load_recipe(table, overrides)
    except RecipeError:
        return
    assert load_recipe(to_table(recipe)) == recipe


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(recipe_tables())
def test_lines_are_found_in_whatever_tomli_w_writes(tmp_path: Path, table: dict[str, Any]) -> None:
    """Every key of a file has a place, and the line that it names holds the last part of the key."""
    try:
        text = tomli_w.dumps(table)
    except (TypeError, UnicodeEncodeError, ValueError):
        return
    path = tmp_path / "any.toml"
    try:
        path.write_text(text, encoding="utf-8", newline="")
        tables = read_tables(path)
    except (UnicodeEncodeError, RecipeError):
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    for section, content in tables.content.items():
        for key in content if isinstance(content, dict) else ():
            place = tables.locate((section, key))
            number = int(place.rpartition(":")[2])
            assert place.startswith(str(path)) and (key in lines[number - 1])
