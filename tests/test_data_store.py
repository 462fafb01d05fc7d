"""Token trees on disk: what is written comes back, whatever the batches; what is damaged is found."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignzoo.batch import Way
from alignzoo.data.store import COLUMNS, Damaged, Packed, Store, StoreWriter, Trees, packed_mask
from alignzoo.errors import DataError
from alignzoo.tree import Completion, Tree

PER_ROW = (
    "prompt",
    "total",
    "longest",
    "own",
    "highest",
    "prompt_key",
    "ids_key",
    "held_key",
    "weight_key",
    "ring_key",
)


@dataclass
class Row:
    """One row in plain lists: the reference."""

    prompt: list[int]
    completions: list[list[tuple[int, bool]]]  # token, and whether it counts
    label: bool | None = None
    extra: dict[str, float] | None = None
    marks: tuple[str, ...] = ()


def packed(rows: Sequence[Row], first: int = 0) -> Packed:
    """The columns of a batch, made one by one."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS if name != "marks"}
    for number, row in enumerate(rows, start=first):
        made = [completion(c) for c in row.completions]
        words = packed_mask(made)
        columns["tokens"] += [*row.prompt, *(token for c in row.completions for token, _ in c), *words.tolist()]
        columns["text"] += list(json.dumps([f":{number + 1}", f"asked {number} ü", row.extra or {}]).encode())
        columns["lengths"] += [len(c) for c in row.completions]
        for end, column in (("tokens_end", "tokens"), ("text_end", "text"), ("completions_end", "lengths")):
            columns[end].append(len(columns[column]))
        columns["label"].append(-1 if row.label is None else int(row.label))
        numbers = [*row.prompt, *(token for c in row.completions for token, _ in c)]
        facts = {
            "prompt": len(row.prompt),
            "total": len(numbers),
            "longest": max(map(len, row.completions), default=0),
            "own": sum(counts for _, counts in row.completions[0]) if row.completions else 0,
            "highest": max(numbers, default=-1),
        }
        for name in PER_ROW:
            columns[name].append(facts.get(name, 2**63 + number))
    return Packed({name: np.asarray(v, COLUMNS[name]) for name, v in columns.items()}, [r.marks for r in rows])


def completion(tokens: list[tuple[int, bool]]) -> Completion:
    mask = np.array([counts for _, counts in tokens], np.bool_)
    return Completion(np.array([token for token, _ in tokens], np.int32), None if mask.all() else mask)


def write(folder: Path, rows: Sequence[Row], batches: Sequence[int] = (), key: str = "key") -> Path:
    """A store. batches: where one batch ends and the next begins."""
    folder.mkdir(exist_ok=True)
    writer = StoreWriter(folder)
    for start, stop in zip([0, *batches], [*batches, len(rows)], strict=True):
        writer.append(packed(rows[start:stop], start))
    writer.finish(key, {"rows": len(rows), "words": "grün"})
    return folder


def check(tree: Tree, row: Row, number: int) -> None:
    assert tree.prompt.tolist() == row.prompt
    assert len(tree.completions) == len(row.completions)
    for found, made in zip(tree.completions, row.completions, strict=True):
        assert found.ids.tolist() == [token for token, _ in made]
        mask = [counts for _, counts in made]
        assert (found.mask is None) == all(mask)
        assert found.mask is None or found.mask.tolist() == mask
        assert found.ids.dtype == np.int32
    assert (tree.label, dict(tree.extra), tree.where) == (row.label, row.extra or {}, f"name:{number + 1}")


TOKEN = st.tuples(st.integers(0, 2**31 - 1), st.booleans())
ROWS = st.lists(
    st.builds(
        Row,
        prompt=st.lists(st.integers(0, 2**31 - 1), max_size=9),
        completions=st.lists(st.lists(TOKEN, min_size=1, max_size=40), max_size=3),
        label=st.none() | st.booleans(),
        extra=st.none() | st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=2),
        marks=st.sampled_from([(), ("cut:a",), ("b",), ("cut:a", "b")]),
    ),
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(ROWS, st.data())
def test_what_is_written_comes_back_whatever_the_batches(rows: list[Row], data: Any) -> None:
    batches = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    with tempfile.TemporaryDirectory() as folder:
        store = Store(write(Path(folder) / "store", rows, batches), "name", key="key")
        assert (len(store), store.facts) == (len(rows), {"rows": len(rows), "words": "grün"})
        for i, row in enumerate(rows):
            check(store.tree(i, i), row, i)
            assert store.where(i) == f"name:{i + 1}"
            assert store.asked(i) == f"asked {i} ü"
            if row.completions:
                assert store.own(i).tolist() == [token for token, counts in row.completions[0] if counts]
        for mark in ("cut:a", "b", "c"):
            assert store.marked(mark).tolist() == [mark in row.marks for row in rows]


def test_the_bytes_do_not_depend_on_the_batches(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", SOME), write(tmp_path / "b", SOME, [1, 1, 3])
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted([*(f"{name}.bin" for name in COLUMNS), "meta.json"])
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


SOME = [
    Row([5, 6], [[(7, True), (8, True)], [(9, True)]], marks=("joined",)),
    Row([5], [[(7, False), (80, True), (8, True)]], label=True, extra={"score": 0.5}),
    Row([], [[(4, True)] * 70], label=False),
    Row([1, 2, 3], [[(2, True)]], marks=("cut:prompt-left", "joined")),
]


@pytest.mark.parametrize("name", [*(f"{column}.bin" for column in COLUMNS), "meta.json"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "longer", "removed"])
def test_every_damage_of_every_file_is_found(tmp_path: Path, name: str, how: str) -> None:
    path = write(tmp_path / "store", SOME) / name
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes({"flipped": flipped, "truncated": content[:-1], "longer": content + b"\0"}.get(how, b""))
    if how == "removed":
        path.unlink()
    if name == "meta.json" and how == "removed":
        with pytest.raises(FileNotFoundError):
            Store(tmp_path / "store", "name", key="key")
        return
    with pytest.raises(Damaged, match=name):
        Store(tmp_path / "store", "name", key="key")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"meta": {}}', '{"meta": 3, "sum": 3}', "\xff"])
def test_a_meta_file_of_something_else(tmp_path: Path, content: str) -> None:
    (write(tmp_path / "store", SOME) / "meta.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(Damaged, match=r"meta\.json"):
        Store(tmp_path / "store", "name", key="key")


def test_a_store_of_another_key(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="something else"):
        Store(write(tmp_path / "store", SOME), "name", key="other")


def test_an_open_store_survives_the_removal_of_its_folder(tmp_path: Path) -> None:
    store = Store(write(tmp_path / "store", SOME), "name")
    shutil.rmtree(tmp_path / "store")
    for i, row in enumerate(SOME):
        check(store.tree(i, i), row, i)


def test_a_file_that_is_cut_while_it_is_in_use_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    store = Store(write(tmp_path / "store", SOME), "name")
    os.truncate(tmp_path / "store" / "tokens.bin", 8)
    with pytest.raises(DataError, match=r"(?s)name: .*shorter.*start again"):
        store.tree(2, 2)


def test_a_folder_that_cannot_be_written_to_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)cannot be written.*TMPDIR"):
        StoreWriter(tmp_path / "nowhere")


def test_a_full_disk_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "tokens.bin").symlink_to("/dev/full")
    writer = StoreWriter(folder)
    with pytest.raises(DataError, match=r"(?s)No space left.*ALIGNZOO_CACHE"):
        for _ in range(2000):
            writer.append(packed(SOME))
        writer.finish("key", {})


# --- views of several stores


@pytest.fixture
def stores(tmp_path: Path) -> list[Store]:
    parts = [SOME[:2], [], SOME[2:]]
    return [Store(write(tmp_path / str(i), rows), "name") for i, rows in enumerate(parts)]


def test_rows_are_counted_through_all_stores(stores: list[Store]) -> None:
    order = [3, 0, 0, 2, 1]
    trees = Trees(stores, np.array(order))
    assert len(trees) == 5
    assert [tree.row for tree in trees] == list(range(5))
    for tree, row in zip(trees, order, strict=True):
        assert tree.prompt.tolist() == SOME[row].prompt
    assert [tree.row for tree in trees[1:4:2]] == [1, 3]
    assert trees[-1].prompt.tolist() == SOME[1].prompt
    assert list(trees.asked) == ["asked 1 ü", "asked 0 ü", "asked 0 ü", "asked 0 ü", "asked 1 ü"]
    assert trees.asked[1:3] == ["asked 0 ü"] * 2
    for place in (5, -6):
        with pytest.raises(IndexError):
            trees[place]


def test_facts_of_the_columns_are_those_of_the_trees(stores: list[Store]) -> None:
    trees = Trees(stores, np.array([3, 0, 0, 2, 1]))
    rows = list(trees)
    parts = [ids for tree in rows for ids in (tree.prompt, *(c.ids for c in tree.completions))]
    assert trees.highest_token == max(token for ids in parts for token in ids.tolist())
    assert trees.shortest == min(range(5), key=lambda i: rows[i].tokens)
    assert trees.prompt_lengths.tolist() == [len(tree.prompt) for tree in rows]
    assert trees.completions.tolist() == [len(tree.completions) for tree in rows]
    assert trees.completion_lengths.tolist() == [len(c.ids) for tree in rows for c in tree.completions]
    longest = [max(len(c.ids) for c in tree.completions) for tree in rows]
    assert trees.positions.tolist() == [
        len(tree.completions) * (len(tree.prompt) + n) for tree, n in zip(rows, longest, strict=True)
    ]
    for way in (Way(packed=True), Way(packed=True, shared=True)):
        assert trees.packed_positions(way.shared).tolist() == [way.positions([tree]) for tree in rows]


def test_no_rows_at_all(stores: list[Store]) -> None:
    trees = Trees(stores, np.array([], np.int64))
    assert (len(trees), list(trees), trees.highest_token, trees.completion_lengths.tolist()) == (0, [], -1, [])
    assert Trees([], np.array([], np.int64)).highest_token == -1


def test_mismatched_completions_are_those_of_the_partners_without_their_prompt(stores: list[Store]) -> None:
    trees = Trees(stores, np.array([0, 3]), np.array([1, 2]), max_length=30)
    first, second = trees[0].mismatched, trees[1].mismatched
    assert first is not None
    assert second is not None
    assert first.ids.tolist() == [80, 8]  # the first token belongs to the partner's prompt
    assert len(second.ids) == 30 - 3  # cut to fit after this prompt
    assert trees[0].branches[-1].ids.tolist() == [80, 8]
