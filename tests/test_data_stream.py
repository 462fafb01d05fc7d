"""Large files: read piece by piece, prepared by several processes, in the same order and in little memory."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_data_cache import from_cache, plain
from test_data_tokenizers import CHATML, chat_tokenizer, make_tokenizer

from alignzoo.data import encode, filling
from alignzoo.data.dataset import Prepared, prepare
from alignzoo.data.watch import Watch
from alignzoo.errors import DataError
from alignzoo.recipe import Data

REPO = Path(__file__).parents[1]
several = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNZOO_CACHE", str(tmp_path / "cache"))


def pair(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {i}", "chosen": f"good answer {i}", "rejected": f"bad {i}", **more}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(
    path: str, kind: str = "pairs", tokenizer: Any = None, say: Callable[[str], Any] | None = None, **keys: Any
) -> Prepared:
    keys = {"max_length": 60, **keys}
    return prepare(
        Data(train=path, **keys), kind, tokenizer or chat_tokenizer(), needs_mismatched=False, seed=0, say=say or len
    )


# --- several processes


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From now on: three processes from the first batch on, of few rows each."""

    def start(workers: int = 3, batch: int = 4) -> None:
        monkeypatch.setattr(encode, "PATIENCE", -1.0)
        monkeypatch.setattr(encode, "_workers", lambda: workers)
        monkeypatch.setattr(filling, "BATCH", batch)
        monkeypatch.setenv("ALIGNZOO_CACHE_GB", "0")

    return start


def mixed(count: int = 60) -> list[Any]:
    """Rows in order, bad ones, ones that are too long, ones that are only found out by the tokenizer."""
    rows: list[Any] = [pair(i) for i in range(count)]
    rows[5]["prompt"] = "today " * 80
    rows[11] = {"prompt": "x"}
    rows[17]["rejected"] = rows[17]["chosen"] + " "  # the template strips it
    rows[30] = 7
    rows[41]["rejected"] = rows[41]["chosen"] + "  "
    rows[42]["chosen"] = "I am {{name}} " + "good " * 30
    return rows


STRIPS = make_tokenizer(template=CHATML.replace("message['content']", "message['content'].strip()"), eos="<|im_end|>")


@several
@pytest.mark.parametrize("kind", ["pairs", "labelled", "demonstrations"])
@pytest.mark.parametrize("truncation", ["drop", "completion_right"])
def test_several_processes_give_the_same_rows_counts_and_lines(
    tmp_path: Path, parallel: Callable[..., None], kind: str, truncation: str
) -> None:
    path, found = write(tmp_path / "a.jsonl", mixed()), []
    for workers in (1, 3):
        parallel(workers)
        said: list[str] = []
        prepared = run(path, kind, STRIPS, said.append, on_bad_row="skip", truncation=truncation, eval_fraction=0.1)
        assert not from_cache(said)
        found.append((said, [plain(tree) for side in (prepared.train, prepared.eval) for tree in side]))
    assert found[0] == found[1]
    assert any("[missing-column]" in line for line in found[0][0])


@several
def test_several_processes_name_the_same_bad_rows_in_the_same_order(
    tmp_path: Path, parallel: Callable[..., None]
) -> None:
    messages = []
    for rows in ([row for i, row in enumerate(mixed()[:18]) if i != 11], mixed()):
        path = write(tmp_path / "a.jsonl", rows)
        for workers in (1, 3):
            parallel(workers)
            with pytest.raises(DataError) as error:
                run(path, tokenizer=STRIPS)
            messages.append(str(error.value))
        assert messages[-1] == messages[-2]
    assert "1 of 17 rows" in messages[0]
    assert "[chosen-equals-rejected]" in messages[0]
    assert "2 of 60 rows" in messages[2]
    assert "a.jsonl:12:" in messages[2]
    assert "examples were not tokenised after that: there may be more" in messages[2]


@several
def test_an_error_of_the_reading_comes_after_the_batches_before_it(
    tmp_path: Path, parallel: Callable[..., None]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([pair(i) for i in range(30)])[:-1] + ",\n{broken}]")
    for workers in (1, 3):
        parallel(workers)
        with pytest.raises(DataError, match=r"a\.json:2: broken JSON"):
            run(str(path))
    conversation = {"prompt": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b"}
    rows = [*map(pair, range(30)), conversation, *map(pair, range(9))]
    path.write_text(json.dumps(rows)[:-1] + ",\n{broken}]")
    for workers in (1, 3):  # the row before is told first, though what is wrong with it takes longer to find
        parallel(workers)
        with pytest.raises(DataError, match=r"a\.json row 31: a conversation"):
            run(str(path), chat_template="none")


@several
def test_an_error_in_a_process_comes_out_as_itself(tmp_path: Path, parallel: Callable[..., None]) -> None:
    rows = [
        *(pair(i) for i in range(30)),
        {"prompt": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b"},
    ]
    path, messages = write(tmp_path / "a.jsonl", rows), []
    for workers in (1, 3):
        parallel(workers)
        with pytest.raises(DataError, match=r"(?s)a\.jsonl:31: a conversation.*no chat template.*chatml") as error:
            run(path, chat_template="none")
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def children(of: int | None = None) -> set[int]:
    listed = Path(f"/proc/{of or os.getpid()}/task").glob("*/children")
    return {int(number) for path in listed for number in path.read_text().split()}


@several
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_is_an_error_with_a_way_out_and_none_is_left(
    tmp_path: Path,
    by: signal.Signals,
    parallel: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    parallel()
    before, inner = children(), encode.encode

    def dies(pipeline: Any, name: str, examples: Any) -> Any:
        if encode._adopted and "a.jsonl:21" in {example.where.rpartition("/")[2] for example in examples}:
            os.kill(os.getpid(), by)
        return inner(pipeline, name, examples)

    monkeypatch.setattr(encode, "encode", dies)
    own = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of the run: its processes do not inherit it
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, own))
    with pytest.raises(DataError, match=r"(?s)a\.jsonl: a process .* was stopped from outside.*memory"):
        run(write(tmp_path / "a.jsonl", [pair(i) for i in range(60)]))
    assert children() == before
    assert not encode._adopted
    monkeypatch.setattr(encode, "encode", inner)
    assert len(run(str(tmp_path / "a.jsonl")).train) == 60
    assert children() == before


PARENT = """
import os, sys, time
from alignzoo.data import encode, filling
from test_data_stream import run
inner = encode.encode
def slow(*arguments):
    if encode._adopted:
        os.write(1, b"works\\n")
        time.sleep(60)
    return inner(*arguments)
encode.encode, encode.PATIENCE, encode._workers, filling.BATCH = slow, -1.0, lambda: 2, 4
run(sys.argv[1])
"""


@several
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_the_processes_end_with_a_parent_that_is_killed(tmp_path: Path, stop: signal.Signals) -> None:
    path = write(tmp_path / "a.jsonl", [pair(i) for i in range(60)])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, path], stdout=subprocess.PIPE, text=True, cwd=REPO / "tests"
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "works\n"
    workers = children(parent.pid)
    assert len(workers) == 2
    parent.send_signal(stop)
    parent.wait(timeout=20)
    deadline = time.monotonic() + 15
    while alive(workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = alive(workers)
    for number in left:
        os.kill(number, signal.SIGKILL)
    assert not left


def alive(processes: set[int]) -> set[int]:
    def state(number: int) -> str:
        try:
            return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "gone"

    return {number for number in processes if state(number) not in ("gone", "Z", "X")}


@several
def test_the_environment_is_as_before(
    tmp_path: Path, parallel: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel()
    path = write(tmp_path / "a.jsonl", [pair(i) for i in range(20)])
    for value in (None, "true"):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if value:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        run(path)
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value


# --- a file that is changed, or goes, while it is read


@pytest.mark.parametrize("how", ["appended", "replaced", "removed"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, inner = Path(write(tmp_path / "a.jsonl", [pair(i) for i in range(20)])), filling.encode_all

    def changed(*arguments: Any) -> Iterator[Any]:
        yield from inner(*arguments)
        if how == "appended":
            with path.open("a") as file:
                file.write(json.dumps(pair(99)) + "\n")
        elif how == "replaced":
            write(tmp_path / "b.jsonl", [pair(i) for i in range(20)])
            (tmp_path / "b.jsonl").replace(path)
        else:
            path.unlink()

    monkeypatch.setattr(filling, "encode_all", changed)
    with pytest.raises(DataError, match=r"(?s)a\.jsonl: the file was changed while it was read.*start again"):
        run(str(path))
    left = [entry for entry in (tmp_path / "cache" / "data").iterdir() if entry.name != ".lock"]
    assert not left


def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, inner = write(tmp_path / "a.jsonl", [pair(0)]), Path.open

    def refused(self: Path, *arguments: Any, **options: Any) -> Any:
        if str(self) == path:
            raise PermissionError(13, "Permission denied")
        return inner(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(DataError, match=r"(?s)a\.jsonl: cannot be read.*Permission denied"):
        run(path)


# --- how far it is


def test_lines_tell_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], []
    monkeypatch.setattr("alignzoo.data.watch.time.monotonic", lambda: now[0])
    watch = Watch(said.append)
    for second in range(60):
        now[0] = float(second)
        watch.update("a.jsonl", 1000 * second, second / 100 if second > 9 else None)
    assert said[0] == "preparing a.jsonl: 3,000 rows in 3 s"
    assert said[1] == "preparing a.jsonl: 19,000 rows in 19 s, 19%, 81 s left"
    assert len(said) == 3  # ever more seldom
    watch.update("b.jsonl", 5, 0.5)
    assert len(said) == 3  # the next one has its own two seconds


def test_a_bar_in_a_terminal_goes_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignzoo.data.watch._PATIENCE", -1.0)
    monkeypatch.chdir(tmp_path)  # a name that has room in a line
    screen = io.StringIO()
    watch = Watch([].append, Console(file=screen, force_terminal=True, width=100))
    path = tmp_path / "a.json"
    path.write_text(json.dumps([pair(i) for i in range(300)])[:-1] + ",\n{broken}]")
    with pytest.raises(DataError):
        prepare(Data(train=str(path)), "pairs", chat_tokenizer(), needs_mismatched=False, seed=0, say=len, watch=watch)
    shown = screen.getvalue()
    assert "preparing" in shown
    assert "256 rows" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is hidden, and comes back


# --- memory


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("data_prepare", REPO / "benchmarks" / "data_prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MEASURED = """
import json, os, re, resource, sys
if hasattr(os, "sched_setaffinity"):  # two processes beside this one, on whatever machine
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
from transformers import AutoTokenizer
from alignzoo.data.dataset import prepare
from alignzoo.recipe import Data, Source
def worker(): return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
def peak():  # not ru_maxrss, which begins at the peak of the process that started this one
    return int(re.findall(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[0]) * 1024
def place(tree): return int(re.search(r"\\d+$", tree.where)[0])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
prepare(Data(train=(Source(sys.argv[1], limit=600),)), "pairs", tokenizer, needs_mismatched=True, seed=0, say=len)
before = peak()
limit = json.loads(sys.argv[3])
data = Data(train=(Source(sys.argv[1], limit=limit),), max_length=4096, eval_fraction=0.01)
prepared = prepare(data, "pairs", tokenizer, needs_mismatched=True, seed=0, say=len)
rows = len(prepared.train)
for i in range(0, rows, 7):
    prepared.train[i]
first = [[place(t), t.prompt.tolist(), [c.ids.tolist() for c in t.completions]]
         for t in (prepared.train[i] for i in range(200))]
last = prepared.train[-1]
print(json.dumps({"rows": prepared.report.sources[0].rows, "before": before, "peak": peak(),
                  "worker": worker(), "first": first, "last": place(last),
                  "ordered": [place(prepared.train[i]) for i in range(0, rows, 97)]}))
"""


def measured(path: Path, tokenizer: Path, limit: int | None = None) -> dict[str, Any]:
    """Prepares the file in a process of its own, and reads each seventh row. Bytes."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURED), str(path), str(tokenizer), json.dumps(limit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def words(tmp_path: Path) -> Path:
    benchmark().small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@several
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_a_larger_file_takes_hardly_more_memory(tmp_path: Path, words: Path, ending: str) -> None:
    path = tmp_path / f"rows{ending}"
    rows = benchmark().write_rows(path, 30 if ending == ".jsonl" else 10)
    if ending == ".json":
        path.write_text("[" + path.read_text().rstrip().replace("\n", ",\n") + "]")
    found = measured(path, words)
    assert found["rows"] == rows
    grown = found["peak"] - found["before"]
    assert grown < 16e6, f"{grown / 1e6:.0f} MB more"
    assert found["ordered"] == sorted(found["ordered"])


@several
@pytest.mark.slow
def test_two_gigabytes_in_less_than_one_gigabyte_of_memory(tmp_path: Path, words: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = benchmark().write_rows(path, 2000)
    assert path.stat().st_size > 1.99e9
    small = measured(path, words, limit=1000)
    found = measured(path, words)
    assert found["rows"] == rows
    assert found["ordered"] == sorted(found["ordered"])
    assert found["last"] > 0.99 * rows
    whole = {place: rest for place, *rest in found["first"]}
    assert all(whole.get(place, rest) == rest for place, *rest in small["first"])  # but for those that are held out
    assert len({place for place, *_ in small["first"]} & set(whole)) > 150
    assert found["peak"] + 2 * found["worker"] < 1e9  # what they share is counted three times
