"""The cache of prepared data: what comes from it, what its key holds, and what happens where it is damaged or full."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data_tokenizers import CHATML, chat_tokenizer, make_tokenizer

import alignzoo.data.cache as cache_module
from alignzoo.data.cache import DataCache, cache_folder
from alignzoo.data.dataset import Prepared, prepare
from alignzoo.data.store import COLUMNS, Packed, Store, StoreWriter
from alignzoo.errors import DataError
from alignzoo.recipe import Data, Source
from alignzoo.tree import Tree

AS_ROOT = os.geteuid() == 0
REPO = Path(__file__).parents[1]


def pair(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {i}", "chosen": f"good answer {i}", "rejected": f"bad {i}", **more}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the entries, not made yet."""
    monkeypatch.setenv("ALIGNZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Rows of which some are bad, some too long and some have placeholders."""
    found = [pair(i) for i in range(40)]
    found[3]["chosen"] = found[3]["rejected"]
    found[4]["prompt"] = "how are you today " * 30
    found[5]["chosen"] = "I am {{name}}"
    return write(tmp_path / "rows.jsonl", [*found, {"prompt": "x"}])


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(
    path: str | tuple[Source, ...], kind: str = "pairs", tokenizer: Any = None, **keys: Any
) -> tuple[Prepared, list[str]]:
    """The rows, and what was said beside the report."""
    said: list[str] = []
    keys = {"on_bad_row": "skip", "max_length": 60, **keys}
    tokenizer = tokenizer or chat_tokenizer()
    prepared = prepare(
        Data(train=path, **keys), kind, tokenizer, needs_mismatched=kind == "labelled", seed=0, say=said.append
    )
    lines = prepared.report.lines()
    assert said[-len(lines) :] == lines
    return prepared, said[: -len(lines)]


def plain(tree: Tree) -> tuple[Any, ...]:
    """All of a tree in plain values."""
    branches = [(c.ids.tolist(), None if c.mask is None else c.mask.tolist()) for c in tree.branches]
    return tree.row, tree.prompt.tolist(), branches, tree.label, dict(tree.extra), tree.where


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if not path.name.startswith(".")) if cache.exists() else []


def from_cache(said: list[str]) -> bool:
    return any("from the cache" in line for line in said)


def whole(prepared: Prepared) -> list[Any]:
    """All that came of the preparation."""
    sides = (prepared.train, prepared.eval)
    return [prepared.report.lines(), *([*map(plain, side), *side.asked] for side in sides)]


def same(one: Prepared, other: Prepared) -> bool:
    return whole(one) == whole(other)


# --- from the cache


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("pairs", {}),
        ("pairs", {"eval_fraction": 0.2, "max_length": 40, "truncation": "completion_right"}),
        ("pairs", {"max_length": 40, "truncation": "prompt_left", "max_prompt_length": 30}),
        ("labelled", {"eval_fraction": 0.2, "max_length": 40, "truncation": "completion_right"}),
        ("demonstrations", {"keep": ("size",), "columns": {"size": "n"}}),
    ],
)
def test_the_second_time_gives_equal_trees_and_the_same_report(
    rows: str, kind: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    if "keep" in keys:
        rows = write(tmp_path / "n.jsonl", [pair(i, n=i / 3, other="x") for i in range(9)])
    first, said = run(rows, kind, **keys)
    assert not from_cache(said)
    second, said = run(rows, kind, **keys)
    assert from_cache(said)
    assert same(first, second)
    report = "\n".join(second.report.lines())
    expected = ["columns not used: other"] if "keep" in keys else ["{{name}}", "[missing-column]", "[chosen-equals"]
    assert all(words in report for words in expected)


def test_every_note_cut_and_remark_comes_from_the_cache(tmp_path: Path) -> None:
    turns = [("human", "hi"), ("function_call", '{"name": "find", "arguments": {}}'), ("observation", "yes")]
    spoken = [{"from": speaker, "value": text} for speaker, text in [("system", "the shop"), *turns]]
    done = [{"conversation": [*spoken, {"from": "gpt", "value": "good " * n}], "tools": [{"name": "find"}]}
            for n in (1, 2, 200)]  # fmt: skip
    path = write(tmp_path / "a.jsonl", done)
    no_system = CHATML.replace("{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}"
                               "{% endif %}{% for", 1)  # fmt: skip
    tokenizer = make_tokenizer(template=no_system, eos="<|im_end|>")
    made, keys = [], {"max_length": 300, "truncation": "completion_right"}
    for cached in (False, True):
        prepared, said = run(path, "demonstrations", tokenizer, **keys)
        assert from_cache(said) == cached
        made.append(prepared)
    assert same(*made)
    report = "\n".join(made[1].report.lines())
    for words in ("knows no tools", "knows no function calls", "takes no system turn", "several assistant turns",
                  'column "conversation" is read as messages', "cut 1: completion cut at its end"):  # fmt: skip
        assert words in report, report


def test_bad_rows_are_named_by_the_path_of_this_time(rows: str, tmp_path: Path) -> None:
    run(rows)
    other = tmp_path / "elsewhere.jsonl"
    shutil.copy(rows, other)
    prepared, said = run(str(other))
    assert from_cache(said)
    assert prepared.train[0].where == f"{other}:1"
    with pytest.raises(DataError, match=r"elsewhere\.jsonl:4: .*\[chosen-equals-rejected\]"):
        run(str(other), on_bad_row="fail")


def test_rows_that_stop_a_run_are_not_kept(rows: str, cache: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match="2 of 41 rows"):
            run(rows, on_bad_row="fail")
    assert list(cache.iterdir()) == [cache / ".lock"]


def test_a_file_that_is_named_twice_is_prepared_once(rows: str, cache: Path) -> None:
    prepared, said = run((Source(rows, weight=1.0), Source(rows, weight=2.0)))
    assert len(entries(cache)) == 1
    assert from_cache(said)
    assert prepared.report.sources[1].counted == 2 * prepared.report.sources[0].counted


def test_live_rows_are_kept_where_their_content_is_known(cache: Path) -> None:
    datasets = pytest.importorskip("datasets")
    found = [pair(i) for i in range(5)]
    for live, kept in ((found, 0), (datasets.Dataset.from_list(found), 1)):
        for time_around in range(2):
            said: list[str] = []
            prepare(
                Data(train="unused"), "pairs", chat_tokenizer(), needs_mismatched=False, train=live, seed=0,
                say=said.append,
            )  # fmt: skip
            assert from_cache(said) == bool(kept and time_around)
        assert len(entries(cache)) == kept
    changed = datasets.Dataset.from_list([*found[:4], pair(9)])
    prepare(Data(train="unused"), "pairs", chat_tokenizer(), needs_mismatched=False, train=changed, seed=0, say=len)
    assert len(entries(cache)) == 2


# --- damage, interruptions, other processes


@pytest.mark.parametrize("name", ["tokens.bin", "prompt.bin", "meta.json"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "removed"])
def test_a_damaged_entry_is_said_and_made_anew(rows: str, cache: Path, name: str, how: str) -> None:
    first = whole(run(rows)[0])
    path = entries(cache)[0] / name
    content = path.read_bytes()
    if how == "flipped":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])
    elif how == "truncated":
        path.write_bytes(content[:-3])
    else:
        path.unlink()
    second, said = run(rows)
    assert any("cannot be used, so it is made anew" in line and str(path.parent) in line for line in said)
    assert not from_cache(said)
    assert whole(second) == first
    third, said = run(rows)
    assert from_cache(said)
    assert whole(third) == first
    assert not [p for p in cache.iterdir() if p.name.startswith(".new-")]


class Failed(Exception):
    pass


def test_an_interrupted_fill_leaves_nothing(cache: Path) -> None:
    def fails(writer: StoreWriter) -> dict[str, Any]:
        raise Failed

    found = DataCache([].append)
    for key in ("0" * 40, None):
        with pytest.raises(Failed):
            found.make(key, "name", fails)
    assert [path.name for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_in_between_leaves_no_entry(rows: str, cache: Path, stop: signal.Signals) -> None:
    code = """
    import sys, time
    from alignzoo.data.cache import DataCache
    def fill(writer):
        print("filling", flush=True)
        time.sleep(60)
    DataCache(print).make("0" * 40, "name", fill)
    """
    process = python(code)
    assert process.stdout is not None
    assert process.stdout.readline() == "filling\n"
    process.send_signal(stop)
    process.wait(timeout=30)
    left = [path for path in cache.iterdir() if path.name != ".lock"]
    assert not entries(cache)
    assert bool(left) == (stop == signal.SIGKILL)
    for path in left:  # a folder that nobody writes to any more goes with the next entry
        for file in (path, *path.iterdir()):
            os.utime(file, (0, 0))
    run(rows)  # nor is a lock left behind
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == [".lock"]
    assert len(entries(cache)) == 1


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=REPO / "tests",
    )  # fmt: skip


WORKER = """
import sys, time
from pathlib import Path
from alignzoo.data import dataset
from test_data_cache import plain, run
fill, rows, go = dataset.fill, sys.argv[1], Path(sys.argv[2])
def slow(*arguments):
    print("fills", flush=True)
    time.sleep(1)
    return fill(*arguments)
dataset.fill = slow
print("ready", flush=True)
while not go.exists():
    time.sleep(0.01)
prepared, said = run(rows, eval_fraction=0.2)
print(*said, sep="\\n")
print([plain(tree) for side in (prepared.train, prepared.eval) for tree in side])
"""


def test_of_two_processes_one_works_and_the_other_waits(rows: str, cache: Path, tmp_path: Path) -> None:
    processes = [python(WORKER, rows, str(tmp_path / "go")) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    results = [process.communicate(timeout=60) for process in processes]
    assert all(process.returncode == 0 for process in processes), results
    out = sorted((result[0].splitlines() for result in results), key=lambda lines: "fills" in lines)
    assert out[0][-1] == out[1][-1]  # the same trees
    assert "fills" not in out[0]
    assert any("another process prepares" in line and "waiting" in line for line in out[0])
    assert from_cache(out[0])
    assert "fills" in out[1]
    assert not from_cache(out[1])
    assert len(entries(cache)) == 1
    assert len(list(cache.iterdir())) == 2  # and the lock


def test_where_nothing_can_be_locked_both_work_and_one_entry_stays(
    rows: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(cache_module.fcntl, "lockf", refused)
    found = run(rows)[0]
    key = entries(cache)[0].name

    def fill_while_another_is_faster(writer: StoreWriter) -> dict[str, Any]:
        shutil.copytree(tmp := cache.parent / "kept", cache / key)
        assert tmp.exists()
        return {"of": "the slower one"}

    entries(cache)[0].rename(cache.parent / "kept")
    store = DataCache([].append).make(key, "name", fill_while_another_is_faster)
    assert store.facts == {"of": "the slower one"}  # its own stays readable
    assert Store(cache / key, "name", key=key).facts != store.facts
    assert same(found, run(rows)[0])
    assert [path.name for path in cache.iterdir() if path.name.startswith(".new-")] == []


# --- where it lies, and how large it gets


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for named, folder in (("here", tmp_path / "here"), ("~/there", tmp_path / "home/there"),
                          ("", tmp_path / "xdg/alignzoo")):  # fmt: skip
        monkeypatch.setenv("ALIGNZOO_CACHE", named)
        assert cache_folder() == folder / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home/.cache/alignzoo/data"


def test_others_may_read_what_the_user_lets_them(rows: str, cache: Path) -> None:
    before = os.umask(0o022)
    try:
        run(rows)
    finally:
        os.umask(before)
    assert entries(cache)[0].stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in entries(cache)[0].iterdir()} == {0o644}


def hidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be written to, for root too."""
    make = Path.mkdir

    def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        if path.is_relative_to(folder):
            raise PermissionError(13, "Permission denied")
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    if not AS_ROOT and folder.exists():
        folder.chmod(0o500)


def test_a_cache_that_cannot_be_written_to_is_said_once_and_nothing_else_changes(
    rows: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run((Source(rows), Source(rows, limit=9)))[0]
    monkeypatch.setenv("ALIGNZOO_CACHE", str(tmp_path / "other"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with monkeypatch.context() as patch:
        hidden(tmp_path / "other", patch)
        for _ in range(2):
            prepared, said = run((Source(rows), Source(rows, limit=9)))
            assert same(prepared, expected)
            about = [line for line in said if "is not kept" in line]
            assert about == [f"prepared data is not kept: the cache {tmp_path / 'other' / 'data'} cannot be written to "
                             "(Permission denied)"]  # fmt: skip
            assert not list(tmp_path.glob("alignzoo-*"))  # the stores were open, and their folders gone


def test_a_read_only_cache_is_read(rows: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(rows)[0]
    hidden(cache, monkeypatch)
    prepared, said = run(rows)
    assert from_cache(said)
    assert same(prepared, expected)
    prepared, said = run((Source(rows), Source(rows, limit=9)))
    assert from_cache(said)
    assert any("is not kept" in line for line in said)
    assert prepared.report.sources[1].rows == 9
    cache.chmod(0o700)


@pytest.mark.parametrize("named", ["file", "file/below", "~nobody-of-that-name/x"])
def test_a_cache_that_is_no_folder(rows: str, tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ALIGNZOO_CACHE", named if named.startswith("~") else str(tmp_path / named))
    prepared, said = run(rows)
    assert len(prepared.train) == 38
    assert [line for line in said if "is not kept" in line]


def test_a_user_without_a_home(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ALIGNZOO_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    prepared, said = run(rows)
    assert len(prepared.train) == 38
    assert any("is not kept: Could not determine home directory" in line for line in said)


def test_no_folder_at_all_is_an_error_with_a_way_out(
    rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**options: Any) -> str:
        raise OSError("read-only file system")

    monkeypatch.setenv("ALIGNZOO_CACHE_GB", "0")
    monkeypatch.setattr(cache_module.tempfile, "mkdtemp", refused)
    with pytest.raises(DataError, match=r"(?s)no folder to prepare data in.*TMPDIR"):
        run(rows)


def size(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.iterdir())


def filled(rows: int) -> Callable[[StoreWriter], dict[str, Any]]:
    def fill(writer: StoreWriter) -> dict[str, Any]:
        columns = {name: np.zeros(rows, dtype) for name, dtype in COLUMNS.items() if name != "marks"}
        writer.append(Packed(columns, [()] * rows))
        return {}

    return fill


def test_what_was_not_used_for_the_longest_time_goes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [str(i) * 40 for i in range(4)]
    for age, key in enumerate(keys[:3]):
        DataCache([].append).make(key, "name", filled(1000))
        os.utime(cache / key, (1000.0 - age, 1000.0 - age))
    assert DataCache([].append).find(keys[2], "name") is not None  # used just now, so the last to go
    monkeypatch.setenv("ALIGNZOO_CACHE_GB", str(size(cache / keys[0]) * 2.5 / 1e9))
    said: list[str] = []
    store = DataCache(said.append).make(keys[3], "name", filled(1000))
    assert [entry.name for entry in entries(cache)] == [keys[2], keys[3]]
    assert len(store) == 1000
    assert [key in line for line, key in zip(said, (keys[1], keys[0]), strict=True)] == [True, True]
    assert all("removed prepared data" in line for line in said)


def test_entries_of_the_run_stay_and_those_of_others_stay_readable(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNZOO_CACHE_GB", "1e-9")
    ours = DataCache([].append)
    stores = [ours.make(key * 40, "name", filled(10)) for key in "12"]
    assert len(entries(cache)) == 2
    DataCache([].append).make("3" * 40, "name", filled(10))
    assert [entry.name for entry in entries(cache)] == ["3" * 40]
    assert [store.column("prompt").tolist() for store in stores] == [[0] * 10] * 2


def test_a_size_of_nothing_turns_the_cache_off(rows: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(rows)
    monkeypatch.setenv("ALIGNZOO_CACHE_GB", "0")
    _, said = run(rows)
    assert said == ["prepared data is not kept: ALIGNZOO_CACHE_GB = 0"]
    assert len(entries(cache)) == 1  # what is there is left alone


@pytest.mark.parametrize("text", ["much", "-1", "nan"])
def test_a_size_that_is_none(rows: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNZOO_CACHE_GB", text)
    with pytest.raises(DataError, match=rf"(?s)ALIGNZOO_CACHE_GB = '{text}'.*gigabytes"):
        run(rows)


def test_the_cache_is_faster(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair(i) for i in range(3000)])
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        run(path)
        seconds.append(time.perf_counter() - started)
    assert seconds[1] < seconds[0] / 3
