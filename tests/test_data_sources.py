"""Files, folders, the hub and live objects -> rows."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignzoo.data.rows import Row
from alignzoo.data.sources import open_live, open_source
from alignzoo.errors import DataError
from alignzoo.recipe import Source

ROWS = [{"prompt": f"p{i}", "completion": f"ünï {i}\nline"} for i in range(3)]


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(path: str, **more: Any) -> list[Row]:
    return list(open_source(Source(path=path, **more)).rows)


def write(name: str, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    Path(name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return name


def as_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows: list[dict[str, Any]]) -> str:
    return "prompt,completion\n" + "".join(f'{row["prompt"]},"{row["completion"]}"\n' for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", as_lines(ROWS), [":1", ":2", ":3"]),
        ("b.jsonl", "\ufeff" + as_lines(ROWS[:1]) + "\n  \n" + as_lines(ROWS[1:]), [":1", ":4", ":5"]),
        ("c.json", as_lines(ROWS), [":1", ":2", ":3"]),
        ("d.json", json.dumps(ROWS, indent=1), [" row 1", " row 2", " row 3"]),
        ("e.jsonl", "\n " + json.dumps(ROWS), [" row 1", " row 2", " row 3"]),
        ("f.jsonl.gz", as_lines(ROWS), [":1", ":2", ":3"]),
        ("g.csv", as_csv(ROWS), [":2", ":4", ":6"]),
        ("h.csv.gz", "\ufeff" + as_csv(ROWS), [":2", ":4", ":6"]),
    ],
)
def test_text_files(name: str, content: str, places: list[str]) -> None:
    rows = read(write(name, content))
    assert [row.values for row in rows] == ROWS
    assert [row.where for row in rows] == [name + place for place in places]
    assert not any(row.problem for row in rows)


def test_rows_are_read_lazily() -> None:
    opened = open_source(Source(path=write("a.jsonl", as_lines(ROWS) + "broken\n")))
    assert next(opened.rows).values == ROWS[0]
    assert isinstance(opened.rows, Iterator)


def test_digest_is_that_of_the_file() -> None:
    content = as_lines(ROWS)
    opened = open_source(Source(path=write("a.jsonl", content)))
    assert opened.digest() == hashlib.sha256(content.encode()).hexdigest()


def test_wrong_lines_are_bad_rows_with_their_place() -> None:
    content = b'{"prompt": "a"}\n{"prompt": \n[1]\n{"prompt": "\xff"}\n' + b"[" * 100_000 + b"\n" + b"1" * 5000 + b"\n"
    rows = read(write("a.jsonl", content))
    problems = [row.problem.reason if row.problem else "" for row in rows]
    assert problems == ["", "invalid-json", "not-an-object", "invalid-utf8", "invalid-json", "invalid-json"]
    assert [row.where for row in rows] == [f"a.jsonl:{i}" for i in range(1, 7)]


def test_csv_rows_of_another_width_are_bad_rows() -> None:
    rows = read(write("a.csv", 'prompt,completion\na,b\n\nc\n"d\ne",f\n'))
    assert [row.where for row in rows] == ["a.csv:2", "a.csv:4", "a.csv:5"]
    assert rows[1].problem is not None
    assert rows[1].problem.reason == "field-count"
    assert rows[2].values == {"prompt": "d\ne", "completion": "f"}


def test_csv_takes_long_fields() -> None:
    rows = read(write("a.csv", f"prompt,completion\na,{'b' * 300_000}\n"))
    assert len(rows[0].values["completion"]) == 300_000


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", "[{}, ", ["a.json:1", "broken JSON"]),
        ("b.json", b'[\n{"a": "\xff"}]', ["b.json:2", "UTF-8"]),
        ("c.csv", 'a,b\n"x"y,z\n', ["c.csv:2", "broken CSV"]),
        ("d.csv", b"a,b\n1,2\n\xff,3\n", ["d.csv:3", "UTF-8"]),
        ("e.csv", "a,b,a\n1,2,3\n", ["e.csv:1", "twice: a"]),
        ("f.jsonl", as_lines(ROWS).encode("utf-16"), ["f.jsonl", "UTF-16"]),
        ("g.txt", "hello", ["g.txt", ".jsonl", ".parquet"]),
        ("h.parquet", "nonsense", ["h.parquet", "parquet"]),
        ("i.json", "[" * 100_000, ["i.json", "cannot be read"]),
    ],
)
def test_broken_files(name: str, content: str | bytes, says: list[str]) -> None:
    with pytest.raises(DataError) as error:
        read(write(name, content))
    assert all(word in str(error.value) for word in says)


def test_a_broken_gz_file() -> None:
    Path("a.jsonl.gz").write_bytes(gzip.compress(as_lines(ROWS * 99).encode())[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read"):
        read("a.jsonl.gz")


def test_a_missing_file_suggests_near_names() -> None:
    write("train.jsonl", "{}")
    with pytest.raises(DataError, match=r"(?s)trian\.jsonl: no such file.*there is train\.jsonl"):
        read("trian.jsonl")
    with pytest.raises(DataError, match="folder nowhere does not exist"):
        read("nowhere/train.jsonl")


def test_a_file_has_no_split() -> None:
    with pytest.raises(DataError, match='no split "train"'):
        read(write("a.jsonl", "{}"), split="train")


def test_parquet() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": [{"role": "user", "content": "x"}], "n": i} for i in range(3)]
    datasets.Dataset.from_list(rows).to_parquet("a.parquet")
    found = read("a.parquet")
    assert [row.values for row in found] == rows
    assert [row.where for row in found] == ["a.parquet row 1", "a.parquet row 2", "a.parquet row 3"]


def test_saved_folders() -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk("one")
    datasets.DatasetDict(train=one, test=one.select([0])).save_to_disk("two")
    datasets.DatasetDict(only=one).save_to_disk("three")
    assert [row.values for row in read("one")] == ROWS
    assert [row.values for row in read("two", split="test")] == ROWS[:1]
    assert [row.values for row in read("three")] == ROWS
    assert len(open_source(Source(path="one")).digest()) == 64
    with pytest.raises(DataError, match=r"(?s)two: which split\?.*train, test"):
        read("two")
    with pytest.raises(DataError, match='no split "dev"'):
        read("two", split="dev")
    with pytest.raises(DataError, match='no split "dev"'):
        read("one", split="dev")


def test_a_folder_that_was_not_saved_by_datasets() -> None:
    Path("folder").mkdir()
    write("folder/rows.jsonl", "{}")
    with pytest.raises(DataError, match=r"(?s)not saved by datasets.*rows\.jsonl"):
        read("folder")
    Path("folder/dataset_info.json").write_text("nonsense")
    with pytest.raises(DataError, match="cannot be read as a saved data set"):
        read("folder")


def test_a_hub_id_offline_is_one_clear_error() -> None:
    code = (
        "from alignzoo.data.sources import open_source\nfrom alignzoo.recipe import Source\n"
        "from alignzoo.errors import DataError\n"
        "try: open_source(Source(path='nobody/no-such-rows'))\nexcept DataError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    for words in ('"nobody/no-such-rows"', "cannot be reached", "local path", "HF_HOME"):
        assert words in done.stdout
    assert "Traceback" not in done.stderr


def test_live_rows() -> None:
    opened = open_live([*ROWS, 3], "train")
    rows = list(opened.rows)
    assert [row.values for row in rows[:3]] == ROWS
    assert rows[0].where == "train row 1"
    assert rows[3].problem is not None
    assert opened.digest() != open_live(ROWS, "train").digest()
    again = open_live(iter([*ROWS, 3]), "eval")
    list(again.rows)
    assert again.digest() == opened.digest()


@pytest.mark.parametrize("wrong", ["train.jsonl", {"train": []}, 3])
def test_live_objects_that_are_no_rows(wrong: Any) -> None:
    with pytest.raises(DataError, match="is no data set"):
        open_live(wrong, "train")


def test_reading_loads_neither_torch_nor_datasets() -> None:
    write("a.jsonl", as_lines(ROWS))
    code = (
        "import sys\nfrom alignzoo.data.show import show_rows\nimport alignzoo.data.dataset\nshow_rows('a.jsonl')\n"
        "print([name for name in ('torch', 'datasets', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
