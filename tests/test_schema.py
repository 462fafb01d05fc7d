"""Tables into frozen dataclasses: types, bounds, the text of --set, and the rows that documentation shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal

import pytest

from alignzoo import schema
from alignzoo.schema import Problem, Raw, build, check_instance, convert, parse_raw, rows_of, setting

Kind = Literal["a", "b"]


@dataclass(frozen=True)
class Inner:
    path: str = setting(MISSING, "a path")
    weight: float = setting(1.0, "a weight", gt=0)


@dataclass(frozen=True)
class Outer:
    rate: float = setting(MISSING, "a rate", gt=0, le=1)
    count: int = setting(3, "a count", ge=1)
    flag: bool = setting(False, "a flag")
    word: str = setting("x", "a word")
    kind: Kind = setting("a", "one of two")
    size: Literal[1, 2] = setting(1, "one or two")
    maybe: int | None = setting(None, "a number or nothing", ge=0)
    betas: tuple[float, float] = setting((0.9, 0.99), "two rates", ge=0, lt=1)
    names: tuple[str, ...] = setting((), "names")
    either: str | tuple[str, ...] = setting("all", "one or more")
    columns: dict[str, str] = setting({}, "a mapping")
    anything: dict[str, Any] = setting({}, "whatever")
    inner: Inner | None = setting(None, "a table")
    sources: str | tuple[Inner, ...] = setting("", "a path or tables")
    level: int = setting(1, "one, five or nine", choices=(1, 5, 9))


def made(**table: Any) -> Outer:
    problems: list[Problem] = []
    outer = build(Outer, {"rate": 0.5, **table}, ("here",), problems)
    assert not problems
    assert outer is not None
    return outer


def messages(**table: Any) -> dict[str, str]:
    problems: list[Problem] = []
    assert build(Outer, {"rate": 0.5, **table}, ("here",), problems) is None
    return {p.key.removeprefix("here."): p.message for p in problems}


# --- what fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("rate", 1, 1.0),
        ("count", 10**30, 10**30),
        ("maybe", None, None),
        ("maybe", 0, 0),
        ("kind", "b", "b"),
        ("size", 2, 2),
        ("betas", [0, 0.5], (0.0, 0.5)),
        ("names", ["a", "b"], ("a", "b")),
        ("either", "q_proj", "q_proj"),
        ("either", ["q", "v"], ("q", "v")),
        ("columns", {"chosen": "good"}, {"chosen": "good"}),
        ("anything", {"deep": {"er": [1, True]}}, {"deep": {"er": [1, True]}}),
        ("inner", {"path": "p", "weight": 2}, Inner("p", 2.0)),
        ("sources", [{"path": "p"}], (Inner("p"),)),
        ("level", 9, 9),
    ],
)
def test_values_by_the_type_of_their_field(key: str, value: Any, found: Any) -> None:
    got = getattr(made(**{key: value}), key)
    assert got == found
    assert type(got) is type(found)


def test_a_default_table_is_not_shared() -> None:
    first, second = made(), made()
    first.columns["x"] = "y"
    assert second.columns == {} and made().columns == {}


# --- what does not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rate", "0.1", 'rate = "0.1": has the wrong type (wanted: a number > 0 and <= 1)'),
        ("rate", True, "rate = true: has the wrong type (wanted: a number > 0 and <= 1)"),
        ("rate", math.nan, "rate = nan: is not a finite number (wanted: a number > 0 and <= 1)"),
        ("rate", math.inf, "rate = inf: is not a finite number (wanted: a number > 0 and <= 1)"),
        ("rate", 10**400, "is too large (wanted: a number > 0 and <= 1)"),
        ("rate", 0, "rate = 0 is out of range (allowed: > 0 and <= 1)"),
        ("rate", 1.5, "rate = 1.5 is out of range (allowed: > 0 and <= 1)"),
        ("count", 1.0, "count = 1.0: has the wrong type (wanted: a whole number >= 1)"),
        ("count", True, "count = true: has the wrong type"),
        ("count", 0, "count = 0 is out of range (allowed: >= 1)"),
        ("flag", 1, "flag = 1: has the wrong type (wanted: true or false)"),
        ("word", 3, "word = 3: has the wrong type (wanted: a string)"),
        ("word", None, "word = None: has the wrong type"),
        ("kind", "c", 'kind = "c": is not among the choices (wanted: one of "a", "b")'),
        ("kind", ["a"], "is not among the choices"),
        ("size", True, "size = true: is not among the choices (wanted: one of 1, 2)"),
        ("size", 1.0, "size = 1.0: is not among the choices"),
        ("maybe", -1, "maybe = -1 is out of range (allowed: >= 0)"),
        ("maybe", "1", 'maybe = "1": has the wrong type (wanted: a whole number >= 0)'),
        ("betas", [0.9], "betas = [0.9]: has 1 elements, not 2 (wanted: a list of 2: a number, a number >= 0 and < 1)"),
        ("betas", 0.9, "betas = 0.9: is not a list"),
        ("betas", [0.9, math.nan], "element 1 (nan) is not a finite number"),
        ("betas", [0.9, 1], "is out of range (allowed: >= 0 and < 1)"),
        ("names", "a", 'names = "a": is not a list (wanted: a list of strings)'),
        ("names", ["a", 1], "element 1 (1) has the wrong type"),
        ("either", 3, "either = 3: has the wrong type (wanted: a string or a list of strings)"),
        ("either", ["a", 1], "element 1 (1) has the wrong type"),
        ("columns", ["a"], "columns = ['a']: is not a table (wanted: a table)"),
        ("inner", "p", 'inner = "p": is not a table (wanted: a table)'),
        ("sources", [1], "element 0 (1) is not a table"),
        ("level", 2, "level = 2 is out of range (allowed: one of 1, 5, 9)"),
        ("level", "1", "(wanted: a whole number, one of 1, 5, 9)"),
    ],
)
def test_a_value_that_does_not_fit(key: str, value: Any, message: str) -> None:
    found = messages(**{key: value})
    assert list(found) == [key] and message in found[key]


def test_problems_inside_of_tables_carry_their_whole_key() -> None:
    found = messages(
        inner={"weight": 0, "patth": "p"}, sources=[{"path": "p"}, {"path": 3}], columns={"chosen": 3}, either=["a"]
    )
    assert set(found) == {"inner.patth", "inner.path", "inner.weight", "sources.1.path", "columns.chosen"}
    assert found["inner.patth"] == 'unknown key "patth" (did you mean "path"?)'
    assert found["inner.path"] == '"path" is missing: a path'


def test_all_mistakes_at_once_and_the_missing_named() -> None:
    problems: list[Problem] = []
    assert build(Outer, {"count": 0, "flagg": True, "zzz": 1}, (), problems) is None
    assert [p.message for p in problems] == [
        'unknown section "flagg" (did you mean "flag"?)',
        'unknown section "zzz"',
        '"rate" is missing: a rate',
        "count = 0 is out of range (allowed: >= 1)",
    ]


def test_keys_that_are_no_strings() -> None:
    """From Python: told, not a TypeError out of difflib."""
    problems: list[Problem] = []
    build(Inner, {1: 2, "path": "p"}, ("here",), problems)  # type: ignore[dict-item]
    assert [p.message for p in problems] == ['unknown key "1"']


@pytest.mark.parametrize("value", ["x" * 200, [10**5000], list(range(100)), {"a": "b" * 100}])
def test_a_long_value_is_shown_short(value: Any) -> None:
    assert len(schema.show(value)) <= 60


# --- the text of --set -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (str, "3", "3"),
        (str, "true", "true"),
        (str, '"quoted"', '"quoted"'),
        (str | None, "1e-5", "1e-5"),
        (str | None, " x ", " x "),
        (Kind, "a", "a"),
        (Kind | None, "4", "4"),
        (Literal[1, 2], "2", 2),
        (int, "3", 3),
        (int, "0x10", 16),
        (float, "1e-5", 1e-5),
        (float, "abc", "abc"),
        (float, "", ""),
        (bool, "true", True),
        (bool, "True", "True"),
        (int | None, "7", 7),
        (tuple[str, ...], '["a"]', ["a"]),
        (str | tuple[str, ...], '["a"]', ["a"]),
        (str | tuple[str, ...], "all-linear", "all-linear"),
        (str | tuple[str, ...], "2024", "2024"),
        (str | tuple[str, ...], "true", "true"),
        (str | tuple[str, ...], '"2024"', "2024"),
        (str | float, "2", 2),
        (str | float, "2.0", 2.0),
        (dict[str, Any], "{a = 1}", {"a": 1}),
        (Any, "false", False),
        (Any, "yes", "yes"),
        (int, "3\nother = 4", "3\nother = 4"),  # a second line is no second key
        (int, "3 # a comment", 3),
        (int, "1" * 5000, "1" * 5000),  # Python reads no more than 4300 digits
        (Any, "[" * 100_000, "[" * 100_000),
    ],
)
def test_text_is_read_by_the_type(annotation: Any, text: str, value: Any) -> None:
    found = parse_raw(Raw(text), annotation)
    assert found == value
    assert type(found) is type(value)


def test_text_anywhere_in_a_table() -> None:
    """--set may write one element of a list or one key of a mapping."""
    outer = made(
        rate=Raw("0.25"), betas=[Raw("0.5"), 0.9], columns={"chosen": Raw("3")}, anything={"on": Raw("false")},
        sources=[Raw('{path = "p"}'), {"path": Raw("7"), "weight": Raw("2")}],
    )  # fmt: skip
    assert (outer.rate, outer.betas, outer.columns, outer.anything) == (
        0.25,
        (0.5, 0.9),
        {"chosen": "3"},
        {"on": False},
    )
    assert outer.sources == (Inner("p"), Inner("7", 2.0))
    assert type(outer.columns["chosen"]) is str


# --- dataclasses made in Python --------------------------------------------------------------------------------------


def test_check_instance_finds_what_build_finds() -> None:
    bad = Outer(rate=2.0, count=True, betas=(0.9, 1.0), inner=Inner("p", -1.0), sources=(Inner("q", 0.0),))
    assert [p.key for p in check_instance(bad)] == ["rate", "count", "betas", "inner.weight", "sources.0.weight"]
    assert check_instance(Outer(rate=0.5)) == []


def test_an_instance_in_a_table_keeps_its_bounds() -> None:
    assert made(inner=Inner("p")).inner == Inner("p")
    assert messages(inner=Inner("p", 0.0)) == {"inner.weight": "weight = 0.0 is out of range (allowed: > 0)"}


def test_a_setting_needs_its_help() -> None:
    with pytest.raises(ValueError, match="help"):
        setting(1, "  ")


# --- rows for documentation ------------------------------------------------------------------------------------------


def test_rows_show_every_setting_and_those_of_tables_in_it() -> None:
    rows = {row.name: row for row in rows_of(Outer)}
    assert list(rows) == [
        "rate", "count", "flag", "word", "kind", "size", "maybe", "betas", "names", "either", "columns", "anything",
        "inner", "inner.path", "inner.weight", "sources", "sources[].path", "sources[].weight", "level",
    ]  # fmt: skip
    assert (rows["rate"].default, rows["rate"].range, rows["rate"].type) == ("required", "> 0 and <= 1", "a number")
    assert (rows["columns"].default, rows["betas"].default, rows["maybe"].default) == ("{}", "[0.9, 0.99]", "")
    assert rows["inner.path"].default == "required" and rows["flag"].default == "false"
    assert rows["sources"].type == "a string or a list of tables"


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Kind | None, 'one of "a", "b"'),
        (tuple[int, ...], "a list of whole numbers"),
        (tuple[Kind, ...], 'a list of one of "a", "b"'),
        (tuple[bool, ...], "a list of true and false"),
        (tuple[float, float], "a list of 2: a number, a number"),
        (Mapping[str, Any], "a table"),
        (Inner, "a table"),
        (Any, "anything"),
    ],
)
def test_types_in_words(annotation: Any, words: str) -> None:
    assert schema.describe_type(annotation) == words


def test_bounds_of_whole_numbers_of_any_size() -> None:
    problems: list[Problem] = []
    convert(10**400, int, ("n",), problems, schema.Spec("n", le=5))
    assert [p.key for p in problems] == ["n"]
