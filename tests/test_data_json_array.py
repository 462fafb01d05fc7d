"""Arrays of JSON read piece by piece: what json.loads reads, and what is broken by its line."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignzoo.data.json_array import JsonArray
from alignzoo.errors import DataError


def pair(i: int) -> dict[str, Any]:
    return {"prompt": f"question {i}", "chosen": f"good answer {i}", "rejected": f"bad {i}"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["\ud83d\ude00", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
SPACE = st.sampled_from(["", " ", "\n", "\r\n\t", " " * 40])


def read(content: bytes, piece: int) -> list[Any]:
    return list(JsonArray("a.json", io.BytesIO(content), piece))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(JSON, max_size=6), st.integers(1, 60), st.booleans(), st.booleans(), st.lists(SPACE, min_size=3), st.data()
)
def test_an_array_in_pieces_is_what_json_reads(
    values: list[Any], piece: int, escaped: bool, mark: bool, space: list[str], data: Any
) -> None:
    indent = data.draw(st.none() | st.integers(0, 3))
    escaped = escaped or "\\ud8" in json.dumps(values)  # half a pair has no bytes of its own
    parts = [json.dumps(value, ensure_ascii=escaped, indent=indent) for value in values]
    text = f"{space[0]}[{space[1]}{f'{space[0]},{space[2]}'.join(parts)}{space[1]}]{space[2]}"
    content = (b"\xef\xbb\xbf" if mark else b"") + text.encode()
    assert repr(read(content, piece)) == repr(json.loads(text))  # nan is not equal to itself


@settings(max_examples=300, deadline=None)
@given(
    st.lists(JSON, min_size=1, max_size=3).map(json.dumps)
    | st.text(alphabet='[]{}",:1e-.tfn \n\\u', max_size=12).map("[{}".format),
    st.integers(1, 40),
    st.data(),
)
def test_broken_arrays_are_refused_where_json_refuses_them_and_on_the_same_line(
    text: str, piece: int, data: Any
) -> None:
    place = data.draw(st.integers(0, len(text)))
    text = (
        text[:place]
        + data.draw(st.sampled_from(["", ",", "\n", '"', "]", "}", "1", "\\", "x", "\n\n nul"]))
        + text[place:]
    )
    text = text[: data.draw(st.integers(1, len(text)))]
    if not text.lstrip().startswith("["):
        text = "[" + text
    try:
        expected: Any = json.loads(text)
    except json.JSONDecodeError as error:
        with pytest.raises(DataError, match=r"a\.json:\d+: broken JSON") as raised:
            read(text.encode(), piece)
        line = int(str(raised.value).split(":")[1])
        assert line == error.lineno
        return
    assert repr(read(text.encode(), piece)) == repr(expected)


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b'[{"a": 1},\n{"a": 2}\n{"a": 3}]', 3, "delimiter"),
        (b'[{"a": 1},\n\n{"a": }]', 3, "Expecting value"),
        (b'[{"a": 1},\n{"a": "unended\n}]', 2, "control character"),
        (b'[{"a": 1}\n]\n[2]', 3, "Extra data"),
        (b'[{"a": 1},\n', 2, "Expecting value"),
        (b'[{"a": 1}\n', 2, "delimiter"),
        (b"[\n1" + b"0" * 5000 + b"]", 2, "cannot be read"),
        (b"[1,\n2,\n" + b"[" * 100_000, 3, "cannot be read"),
        (b'[1,\n2,\n"\xff"]', 3, "UTF-8"),
        (b'[1,\n2,\n"\xe2\x82', 3, "UTF-8"),
    ],
)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_what_is_broken_is_named_by_its_line(content: bytes, line: int, says: str, piece: int) -> None:
    with pytest.raises(DataError, match=rf"a\.json:{line}: ") as error:
        read(content, piece)
    assert says in str(error.value)


class Counting(io.BytesIO):
    """How much of it was read."""

    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        self.taken += len(found)
        return found


def test_an_array_is_read_no_further_than_needed() -> None:
    file = Counting(json.dumps([pair(i) for i in range(1000)]).encode())
    values = iter(JsonArray("a.json", file, piece=100))
    assert [next(values) for _ in range(3)] == [pair(i) for i in range(3)]
    assert file.taken <= 400


def test_one_value_much_larger_than_a_piece_takes_few_readings() -> None:
    text = json.dumps([{"a": "x" * 1_000_000}, 3])
    started = time.perf_counter()
    assert read(text.encode(), 64) == json.loads(text)
    assert time.perf_counter() - started < 2  # each reading is as long as what is there: not 16 000 of them
