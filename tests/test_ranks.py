"""Which rank a process is, quiet ranks, and what a failing rank says or leaves for its parent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_ranks_processes import LAUNCHERS, python

from alignzoo import ranks
from alignzoo.errors import AlignzooError, ModelError, RunError
from alignzoo.ranks import (
    ERRORS,
    FAILED,
    Rank,
    Report,
    another_rank_failed,
    by_rank,
    describe,
    is_echo,
    leave,
    read_reports,
    tell,
)

CLOSED = "[third_party/gloo/gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:36034"
LONG = 60.0  # seconds; a test that waits for them fails


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


Become = Callable[..., None]


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Become:
    """become(1, 2): from here on this process is rank 1 of 2."""

    def change(rank: int, world: int = 2, local: int | None = None) -> None:
        values = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank if local is None else local}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return change


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a parent waits for errors."""
    path = tmp_path / "errors"
    path.mkdir()
    monkeypatch.setenv(ERRORS, str(path))
    return path


def write(folder: Path, rank: int, *, at: float = 0.0, text: str = "gone") -> None:
    """A report as another rank leaves it."""
    content = {"rank": rank, "time": at, "text": text, "exit_code": 1, "echo": False}
    (folder / f"rank-{rank}.json").write_text(json.dumps(content), encoding="utf-8")


# --- which rank this is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        # torchrun: the second process of the second of two machines
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
          "ROLE_RANK": "3", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}, Rank(3, 1, 4)),
        # deepspeed
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "CROSS_RANK": "0", "CROSS_SIZE": "1",
          "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, Rank(1, 1, 2)),
        # accelerate: several processes, and one
        ({"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16", "ACCELERATE_MIXED_PRECISION": "bf16"}, Rank(8, 0, 16)),
        ({"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}, Rank(0, 0, 1)),
        # none at all; a machine of its own for each; rubbish
        ({}, Rank(0, 0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Rank(2, 2, 4)),
        ({"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": ""}, Rank(0, 0, 1)),
        ({"RANK": "-1", "LOCAL_RANK": "-1", "WORLD_SIZE": "-1"}, Rank(0, 0, 1)),
        ({"RANK": "one", "LOCAL_RANK": "1.0", "WORLD_SIZE": "²"}, Rank(0, 0, 1)),
    ],
)  # fmt: skip
def test_a_rank_knows_itself(environment: dict[str, str], rank: Rank) -> None:
    assert Rank.here(environment) == rank
    assert Rank.here(environment).many == (rank.world > 1)


def test_a_rank_looks_at_its_own_environment(become: Become) -> None:
    assert Rank.here() == Rank(0, 0, 1) and not Rank.here().many
    become(3, 4, local=1)
    assert Rank.here() == Rank(3, 1, 4) and Rank.here().many
    assert Rank.here({}) == Rank(0, 0, 1)


# --- errors in words -------------------------------------------------------------------------------------------------


def caught(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The error as one that was raised, from a cause if there is one."""
    try:
        raise error from cause
    except BaseException as raised:
        return raised


def while_handling(first: BaseException, error: BaseException, *, hide: bool = False) -> BaseException:
    """The error, raised in the handler of another one; hide: with `from None`."""
    try:
        raise first
    except BaseException:
        return caught(error, None) if hide else uncaused(error)


def uncaused(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as raised:
        return raised


class Saved(AlignzooError):
    exit_code = 143


@pytest.mark.parametrize(
    ("error", "code", "echo"),
    [
        (AlignzooError("a mistake"), 2, False),
        (RunError("the loss is not finite"), 1, False),
        (Saved("stopped by SIGTERM"), 143, False),
        (KeyError("a bug"), 1, False),
        (KeyboardInterrupt(), 130, True),
        (RuntimeError(CLOSED), 1, True),
    ],
)
def test_a_report_of_an_error(error: BaseException, code: int, echo: bool) -> None:
    before = time.time()
    report = Report.of(error, 3)
    assert (report.rank, report.exit_code, report.echo, report.text) == (3, code, echo, describe(error))
    assert before <= report.time <= time.time()


def test_a_mistake_in_words_and_a_bug_with_its_traceback() -> None:
    mistake = AlignzooError("it is wrong", why="so it is", fix="mend it")
    assert describe(caught(mistake)) == "it is wrong\n  why: so it is\n  way out: mend it"
    bug = caught(ZeroDivisionError("a bug"), caught(KeyError("its cause")))
    text = describe(bug)
    assert text.startswith("Traceback (most recent call last):\n") and text.endswith("\nZeroDivisionError: a bug")
    assert "KeyError: 'its cause'" in text and "in caught" in text
    assert text + "\n" == "".join(traceback.format_exception(bug))


@pytest.mark.parametrize(
    "text",
    [
        # gloo
        CLOSED,
        "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:18358: Connection reset by peer. This is typically "
        "caused by a remote worker hanging or bugs in the application.",
        "[gloo/transport/tcp/pair.cc:446] writev [10.0.0.2]:4022: Broken pipe",
        "[gloo/transport/tcp/unbound_buffer.cc:82] Application timeout caused pair closure",
        # the store
        "Failed to recv, got 0 bytes",
        "Connection was likely closed. Did the remote server shutdown or crash?",
        "The client socket has failed: Connection refused by remote peer",
        # NCCL
        "NCCL error in: ProcessGroupNCCL.cpp:2251, remote process exited or there was a network error, NCCL version "
        "2.21.5\nncclRemoteError: A call failed possibly due to a network error or a remote process exiting.",
        "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n"
        "Last error:\nsocketProgress: Connection closed by remote peer node-2<54321>",
        "NCCL communicator was aborted on rank 1. Original reason for failure was: a timeout",
    ],
)  # fmt: skip
def test_what_a_rank_sees_when_another_has_gone(text: str) -> None:
    assert is_echo(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Expected all tensors to be on the same device"),
        RuntimeError("NCCL error: invalid usage"),
        RuntimeError(""),
        KeyError("connection"),
        # the hub's, or a pipe's
        ConnectionResetError(104, "Connection reset by peer"),
        BrokenPipeError(32, "Broken pipe"),
        OSError("cannot reach the hub: connection closed by remote peer"),
        AlignzooError("the model cannot be loaded", why="Connection reset by peer"),
    ],
)
def test_an_error_of_its_own(error: BaseException) -> None:
    assert not is_echo(error)


class ReadError(Exception):
    """Of the hub's HTTP client: neither an OSError nor a RuntimeError."""


def test_a_hub_that_cannot_be_reached_is_no_echo() -> None:
    lost = caught(ReadError("[Errno 104] Connection reset by peer"), ConnectionResetError(104, "Connection reset"))
    assert not is_echo(caught(OSError("Can't load the configuration of 'nobody/nothing'."), lost))
    assert not is_echo(caught(ModelError("nobody/nothing: cannot be loaded"), caught(OSError("offline"), lost)))


def test_an_echo_is_seen_through_its_cause_and_context() -> None:
    def closed() -> RuntimeError:
        return RuntimeError(CLOSED)

    assert is_echo(caught(ModelError("it cannot be loaded"), closed()))
    assert is_echo(caught(KeyError(1), caught(ValueError(2), closed())))
    assert is_echo(while_handling(closed(), KeyError("a lock")))
    assert is_echo(caught(ValueError(2), while_handling(closed(), KeyError(1))))
    assert not is_echo(while_handling(closed(), KeyError("a lock"), hide=True))
    assert not is_echo(while_handling(KeyError(1), ValueError(2)))


def test_errors_that_are_each_others_cause() -> None:
    first, second = KeyError(1), KeyError(2)
    first.__cause__, second.__cause__ = second, first
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(is_echo(first)), daemon=True)  # it might never end
    thread.start()
    thread.join(10)
    assert found == [False]


def test_what_gloo_and_the_store_really_raise() -> None:
    """Rank 0, which holds the store, ends without a word; rank 1 goes on to use both."""
    code = """
        import datetime, os, sys
        import torch
        import torch.distributed as d
        from alignzoo.ranks import is_echo
        first = sys.argv[1] == "0"
        port = int(sys.stdin.readline()) if not first else 0
        store = d.TCPStore("127.0.0.1", port, 2, first, datetime.timedelta(seconds=30), wait_for_workers=False)
        print(store.port, flush=True)
        d.init_process_group("gloo", store=store, rank=int(sys.argv[1]), world_size=2)
        d.barrier()
        if first:
            os._exit(3)
        for use in (lambda: d.all_reduce(torch.ones(2)), lambda: store.get("what rank 0 never sets")):
            try:
                use()
            except RuntimeError as error:
                print(type(error).__name__, is_echo(error))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen([*command, "0"], stdout=pipe, stderr=subprocess.DEVNULL, text=True) as first,
        subprocess.Popen([*command, "1"], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as second,
    ):
        assert first.stdout is not None
        try:
            out, err = second.communicate(first.stdout.readline(), timeout=LONG)
        finally:
            first.kill()
            second.kill()
    assert out.splitlines()[1:] == ["RuntimeError True", "DistNetworkError True"], err


@pytest.mark.parametrize(
    ("numbers", "text", "said"),
    [
        ([1], "it went wrong", "rank 1: it went wrong"),
        ([1, 3], "it went wrong", "ranks 1, 3: it went wrong"),
        ([0], "Traceback (most recent call last):\n  ...", "rank 0:\nTraceback (most recent call last):\n  ..."),
        ([0, 2], "a Traceback", "ranks 0, 2: a Traceback"),
    ],
)
def test_the_ranks_before_their_error(numbers: list[int], text: str, said: str) -> None:
    assert by_rank(numbers, text) == said


# --- under `launch` --------------------------------------------------------------------------------------------------


def refuse(text: str) -> None:
    """For a rank that has nothing to say."""
    raise AssertionError(f"said: {text}")


def seconds(action: Callable[[], Any]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("error", "code", "echo"),
    [
        (AlignzooError("„naïve“ — a mistake", fix="mend it"), 2, False),
        (RuntimeError(CLOSED), 1, True),
        (KeyboardInterrupt(), 130, True),
        (ZeroDivisionError("a bug"), 1, False),
    ],
)
def test_a_rank_leaves_its_error_for_the_parent(
    error: BaseException, code: int, echo: bool, folder: Path, become: Become, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_TOGETHER", 0.0)
    become(1)
    assert tell(error, refuse) == code
    assert [f.name for f in folder.iterdir()] == ["rank-1.json"]
    [report] = read_reports(folder)
    assert report == Report(1, report.time, describe(error), code, echo)
    assert 0 <= time.time() - report.time < LONG


def test_a_mistake_waits_for_the_other_ranks(folder: Path, become: Become, monkeypatch: pytest.MonkeyPatch) -> None:
    become(1, 3)
    monkeypatch.setattr(ranks, "_TOGETHER", 0.3)
    assert 0.3 <= seconds(lambda: tell(AlignzooError("a mistake"), refuse)) < LONG
    monkeypatch.setattr(ranks, "_TOGETHER", LONG)
    assert seconds(lambda: tell(ZeroDivisionError("a bug"), refuse)) < LONG / 2
    write(folder, 0)
    later = threading.Timer(0.4, write, (folder, 2))
    later.start()
    assert 0.3 < seconds(lambda: tell(AlignzooError("a mistake"), refuse)) < LONG / 2
    later.join()
    assert seconds(lambda: tell(AlignzooError("a mistake"), refuse)) < LONG / 2  # all have reported


def test_reports_are_read_by_time_then_rank(folder: Path) -> None:
    for rank, at in ((10, 1.5), (0, 3.0), *((rank, 2.0) for rank in (5, 2, 9, 1, 7, 3, 8, 6, 4))):
        write(folder, rank, at=at)
    (folder / "draft-11").write_text('{"rank": 11', encoding="utf-8")
    (folder / FAILED).touch()
    assert [r.rank for r in read_reports(folder)] == [10, *range(1, 10), 0]
    assert read_reports(folder / "gone") == []


def test_another_rank_failed(folder: Path, become: Become, monkeypatch: pytest.MonkeyPatch) -> None:
    become(1)
    assert not another_rank_failed()
    write(folder, 1)
    assert not another_rank_failed()
    (folder / FAILED).touch()
    assert another_rank_failed()
    (folder / FAILED).unlink()
    write(folder, 0)
    assert another_rank_failed()
    monkeypatch.setenv(ERRORS, str(folder / "gone"))
    assert not another_rank_failed()
    monkeypatch.setenv(ERRORS, str(folder))
    become(0, 3)
    assert another_rank_failed()
    monkeypatch.delenv(ERRORS)
    assert not another_rank_failed()


def test_a_rank_that_ends_without_an_exception(
    folder: Path, become: Become, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "_TOGETHER", LONG)
    become(1)
    assert seconds(lambda: leave("nothing moved")) < LONG / 2
    [report] = read_reports(folder)
    assert report == Report(1, report.time, "nothing moved", 1, echo=False) and time.time() - report.time < LONG
    leave(CLOSED, exit_code=7)  # in these words it is the rank's own
    [report] = read_reports(folder)
    assert (report.text, report.exit_code, report.echo) == (CLOSED, 7, False)
    monkeypatch.delenv(ERRORS)
    before = report
    leave("no parent")
    assert read_reports(folder) == [before] and capfd.readouterr() == ("", "")


def gone(folder: Path) -> None:
    folder.rmdir()


def read_only(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder.chmod(0o500)


@pytest.mark.parametrize("spoil", [gone, read_only])
def test_an_error_that_cannot_be_left_is_not_lost(
    spoil: Callable[[Path], None], folder: Path, become: Become, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(ranks, "_TOGETHER", LONG)
    become(1)
    spoil(folder)
    assert seconds(lambda: leave("nothing moved")) < LONG / 2
    out, err = capfd.readouterr()
    assert (
        out == "" and err.startswith("rank 1: nothing moved\n(not left for the parent: [Errno ") and err[-2:] == ")\n"
    )
    assert tell(AlignzooError("a mistake"), refuse) == 2
    assert capfd.readouterr().err.startswith("rank 1: a mistake\n(not left for the parent: [Errno ")


def test_a_disk_that_is_full_leaves_no_half_report(tmp_path: Path) -> None:
    done = python(
        """
        import resource
        from alignzoo.ranks import leave
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))  # bytes of a file
        leave("nothing moved " * 9)
        """,
        **{ERRORS: str(tmp_path), "RANK": "1", "WORLD_SIZE": "2"},
    )
    assert done.returncode == 0
    assert done.stderr.startswith(f"rank 1: {'nothing moved ' * 9}\n(not left for the parent: ")
    assert read_reports(tmp_path) == []


# --- under another launcher ------------------------------------------------------------------------------------------


@pytest.fixture
def told(become: Become) -> Callable[..., list[str]]:
    """What a rank says of an error."""

    def say(error: BaseException, code: int, rank: int, world: int = 2, local: int | None = None) -> list[str]:
        lines: list[str] = []
        become(rank, world, local)
        assert tell(error, lines.append) == code
        return lines

    return say


Told = Callable[..., list[str]]


def test_each_rank_says_what_is_its_own(told: Told) -> None:
    run_error = RunError("step 3: the loss is not finite", why="it is nan")
    assert told(run_error, 1, rank=0) == ["error: step 3: the loss is not finite\n  why: it is nan"]
    assert told(run_error, 1, rank=1) == ["error: rank 1: step 3: the loss is not finite\n  why: it is nan"]
    bug = caught(ZeroDivisionError("a bug"))
    [first], [second] = told(bug, 1, rank=0), told(bug, 1, rank=1)
    assert first == "error: " + describe(bug) and second == "error: rank 1:\n" + describe(bug)


def test_a_mistake_that_all_ranks_find_is_told_once_on_each_machine(told: Told) -> None:
    mistake = AlignzooError("the recipe has a mistake")
    said = [told(mistake, 2, rank, 4, local=rank % 2) for rank in range(4)]
    assert said == [["error: the recipe has a mistake"], [], ["error: rank 2: the recipe has a mistake"], []]


def test_a_mistake_that_one_rank_finds_later_is_told(told: Told, tmp_path: Path) -> None:
    from torch import distributed

    mistake = AlignzooError("row 7 is empty")
    assert told(mistake, 2, rank=1) == []
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert told(mistake, 2, rank=1) == ["error: rank 1: row 7 is empty"]
    finally:
        distributed.destroy_process_group()


def test_an_echo_is_told_by_the_first_rank_as_such(told: Told) -> None:
    closed = RuntimeError(CLOSED)
    assert told(closed, 1, rank=0) == ["stopped: another rank failed, see its error"]
    assert told(closed, 1, rank=1) == told(closed, 1, rank=2, world=4, local=0) == []
    wrapped = caught(AlignzooError("the checkpoint cannot be written"), closed)
    assert told(wrapped, 2, rank=0) == ["stopped: another rank failed, see its error"]


def test_an_interrupted_rank_says_nothing_itself(told: Told) -> None:
    assert told(KeyboardInterrupt(), 130, rank=0) == told(KeyboardInterrupt(), 130, rank=1) == []
