"""The files of kept log-probs: what may go wrong with them, and the commands that look after them."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_helpers import LINE, PLAIN, apart, cache, counts, recipe_file, records, run, weights, write_rows
from click.testing import CliRunner

from alignzoo import refstore
from alignzoo.cli import cli
from alignzoo.refstore import Identity, ReferenceStore, row_key

# --- what goes wrong with a file


def store_of(name: str = "one", said: list[str] | None = None) -> ReferenceStore:
    identity = Identity(name, {"precision": "no"}, f"model {name}")
    return ReferenceStore(identity, ([] if said is None else said).append)


def some_rows(n: int, seed: int = 0) -> dict[bytes, Any]:
    rng = np.random.default_rng(seed)
    return {row_key(ids(i, 1), ids(i, 2)): rng.normal(size=3 + i).astype(np.float32) for i in range(n)}


def ids(*tokens: int) -> Any:
    return np.array(tokens, np.int32)


def lengths(rows: dict[bytes, Any]) -> dict[bytes, int]:
    return {key: len(value) for key, value in rows.items()}


def assert_holds(store: ReferenceStore, rows: dict[bytes, Any]) -> None:
    found = store.find(lengths(rows))
    assert found.keys() == rows.keys()
    assert all(np.array_equal(found[key], rows[key]) and found[key].dtype == np.float32 for key in rows)


def test_rows_are_found_again_as_they_were() -> None:
    rows = some_rows(1203)  # more than are asked for at once
    store = store_of()
    store.keep(rows)
    store.close()
    again = store_of()
    assert_holds(again, rows)
    assert again.find({b"x" * 16: 3}) == {}
    assert store_of("two").find(lengths(rows)) == {}
    assert not again.bad


def test_the_key_tells_prompt_from_completion() -> None:
    keys = {
        row_key(ids(1, 2), ids(3)),
        row_key(ids(1), ids(2, 3)),
        row_key(ids(1, 2, 3), ids()),
        row_key(ids(3), ids(1, 2)),
    }
    assert len(keys) == 4
    assert row_key(ids(1), ids(2)) == row_key(ids(1).astype(np.int64), ids(2))


def test_what_is_not_finite_is_not_kept() -> None:
    rows = some_rows(2)
    bad = next(iter(rows))
    rows[bad][1] = np.nan
    store = store_of()
    store.keep(rows)
    assert store.find(lengths(rows)).keys() == rows.keys() - {bad}
    assert not store.bad


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE rows SET logps = substr(logps, 1, length(logps) - 4)",
        "UPDATE rows SET logps = CAST(x'00000000' || substr(logps, 5) AS BLOB)",
        "UPDATE rows SET checksum = checksum + 1",
        "UPDATE rows SET length = length + 1",
        "UPDATE rows SET logps = 'text'",
        "UPDATE rows SET logps = (SELECT logps FROM rows LIMIT 1)",
    ],
)
def test_a_row_that_is_not_as_it_was_written(change: str) -> None:
    rows = some_rows(4)
    store = store_of()
    store.keep(rows)
    path = store.path
    store.close()
    with sqlite3.connect(path) as db:
        db.execute(f"{change} WHERE rowid > 2")
    db.close()
    store = store_of()
    assert len(store.find(lengths(rows))) == 2
    assert store.bad == 2
    store.keep(rows)
    assert_holds(store, rows)


def test_a_row_of_another_length_is_not_taken() -> None:
    rows = some_rows(1)
    store = store_of()
    store.keep(rows)
    assert store.find(dict.fromkeys(rows, 1)) == {}
    assert store.bad == 1


def test_a_run_over_a_damaged_row_says_so_and_is_the_same(recipe_file: Path, cache: Path) -> None:
    first, _ = run(recipe_file)
    (path,) = (cache / "reference").glob("*.sqlite")
    with sqlite3.connect(path) as db:
        db.execute("UPDATE rows SET logps = CAST(x'00000000' || substr(logps, 5) AS BLOB) WHERE rowid <= 3")
    db.close()
    second, said = run(recipe_file)
    assert "3 rows of" in said and "not as they had been written" in said
    assert counts(said)[2] == 3
    assert torch.allclose(weights(second.model_path), weights(first.model_path), atol=1e-6)
    assert counts(run(recipe_file)[1])[2] == 0


@pytest.mark.parametrize("how", ["text", "half", "empty", "middle"])
def test_a_damaged_file_is_begun_anew(how: str) -> None:
    rows, said = some_rows(600), list[str]()
    store = store_of()
    store.keep(rows)
    path = store.path
    store.close()
    content = path.read_bytes()
    middle = content[:4096] + b"\x55" * (len(content) - 4096)
    path.write_bytes(
        {"text": b"no database " * 999, "half": content[: len(content) // 2], "empty": b"", "middle": middle}[how]
    )
    store = store_of(said=said)
    assert len(store.find(lengths(rows))) < len(rows)
    store.keep(rows)
    store.close()
    store = store_of()
    assert_holds(store, rows)
    assert not store.off
    assert how == "empty" or any("damaged" in line for line in said), said


def test_a_locked_file_is_said_and_the_run_goes_on(
    recipe_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refstore, "WAIT", 0.2)
    first, _ = run(recipe_file)
    (path,) = (cache / "reference").glob("*.sqlite")
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")  # somebody writes and does not end
    write_rows(recipe_file.parent, 9, 3)
    _, said = run(recipe_file)
    assert counts(said) == (22, 24, 2)
    assert "not kept" in said and "locked" in said
    holder.execute("ROLLBACK")
    holder.close()
    _, said = run(recipe_file)
    assert counts(said) == (22, 24, 2)
    assert counts(run(recipe_file)[1]) == (24, 24, 0)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    write_rows(recipe_file.parent, 8, 3)
    second, _ = run(recipe_file)
    holder.close()
    assert torch.allclose(weights(second.model_path), weights(first.model_path), atol=1e-6)


def test_without_a_place_to_keep_it(recipe_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNZOO_CACHE_GB", "0")
    _, said = run(recipe_file, "train.max_steps=1")
    assert "not kept: ALIGNZOO_CACHE_GB = 0" in said
    assert not (cache / "reference").exists()
    monkeypatch.delenv("ALIGNZOO_CACHE_GB")
    cache.mkdir(exist_ok=True)
    (cache / "reference").write_text("a file")
    _, said = run(recipe_file, "train.max_steps=1")
    assert "not kept: the cache" in said


# --- the commands


def call(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["cache", *words])
    return done.exit_code, done.output


def test_ls_verify_gc_and_clear(recipe_file: Path, cache: Path) -> None:
    run(recipe_file, "train.max_steps=1")
    code, text = call("ls", "--json")
    kinds = {row["kind"]: row for row in json.loads(text)}
    assert code == 0
    assert kinds["reference"]["rows"] == 14
    assert kinds["data"]["rows"] > 0
    size = sum(p.stat().st_size for p in (cache / "reference").glob("*.sqlite*"))
    assert kinds["reference"]["bytes"] == size > 14 * 4
    assert kinds["reference"]["numerics"]["precision"] == "no"
    assert "float32" in call("ls")[1]
    code, text = call("verify")
    assert (code, "14 rows are whole" in text) == (0, True), text
    (path,) = (cache / "reference").glob("*.sqlite")
    with sqlite3.connect(path) as db:
        db.execute("UPDATE rows SET checksum = 0 WHERE rowid = 1")
    db.close()
    code, text = call("verify")
    assert (code, "13 rows are whole, 1 were not" in text) == (2, True), text
    assert call("verify")[0] == 0
    path.write_bytes(b"nothing" * 1000)
    assert "damaged" in call("ls")[1]
    assert call("verify")[0] == 2
    assert not path.exists()
    for file in (cache / "data").glob("*/tokens.bin"):
        file.write_bytes(b"x" * file.stat().st_size)
    assert call("verify")[0] == 2
    assert json.loads(call("ls", "--json")[1]) == []
    run(recipe_file, "train.max_steps=1")
    assert call("clear", "--only", "reference")[0] == 0
    assert {row["kind"] for row in json.loads(call("ls", "--json")[1])} == {"data"}
    assert call("clear")[0] == 0
    assert json.loads(call("ls", "--json")[1]) == []


def test_gc_removes_what_was_not_used_for_the_longest_time() -> None:
    paths = []
    for number, name in enumerate(("old", "middle", "new")):
        store = store_of(name)
        store.keep(some_rows(600, number))
        paths.append(store.path)
        store.close()
    for number, path in enumerate(paths):
        os.utime(path, (1e9 + number, 1e9 + number))
    size = refstore._size(paths[0])
    code, text = call("gc", "--max-gb", str(2.5 * size / 1e9))
    assert code == 0
    assert [path.exists() for path in paths] == [False, True, True]
    assert "removed reference log-probs last used on 2001" in text
    user = store_of("middle")
    os.utime(paths[1], (1e9, 1e9))
    code, text = call("gc", "--max-gb", "0")
    assert [path.exists() for path in paths] == [False, True, False]  # one is in use
    assert "in use" not in text
    assert_holds(user, some_rows(600, 1))
    assert "it stays" in call("clear")[1]
    user.close()
    call("clear")
    assert not list(refstore.reference_folder().iterdir())


def test_a_run_keeps_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    first = store_of("first")
    first.keep(some_rows(600))
    path, size = first.path, refstore._size(first.path)
    first.close()
    os.utime(path, (1e9, 1e9))
    monkeypatch.setenv("ALIGNZOO_CACHE_GB", str(1.5 * size / 1e9))
    said: list[str] = []
    second = store_of("second", said)
    second.keep(some_rows(600, 1))
    second.close()
    assert not path.exists() and second.path.exists()
    assert any("removed reference log-probs" in line for line in said)
    third = store_of("third", said)
    for seed in range(3):
        third.keep({key + bytes([seed]): value for key, value in some_rows(600, seed).items()})
    assert "allows no more" in third.off
    assert refstore._size(third.path) < 3 * size
    third.close()
