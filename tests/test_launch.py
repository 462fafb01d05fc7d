"""Starting ranks, their signals and their errors. The ranks are tests/launch_child.py, which imports no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from alignzoo import launch as launching
from alignzoo.cli import cli
from alignzoo.errors import AlignzooError
from alignzoo.launch import (
    Death,
    check_devices,
    check_free,
    deepspeed_words,
    launch,
    launch_hosts,
    read_hostfile,
    run_forwarding,
    torchrun_words,
    verdict,
    without_options,
)
from alignzoo.ranks import ERRORS, Report

REPO = Path(__file__).resolve().parents[1]
DPO = str(REPO / "recipes" / "dpo.toml")
CHILD = [str(REPO / "tests" / "launch_child.py")]
SIGKILL, SIGTERM, SIGABRT = -9, -15, -6


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", ERRORS):
        monkeypatch.delenv(name, raising=False)


def ranked(monkeypatch: pytest.MonkeyPatch, rank: int, world: int = 2, local: int | None = None) -> None:
    values = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank if local is None else local}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def report(rank: int, text: str = "it went wrong", *, at: float = 0.0, code: int = 1, echo: bool = False) -> Report:
    return Report(rank, at, text, code, echo)


# --- pure ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["a.toml", "--processes", "2", "--set", "x=1"], ["a.toml", "--set", "x=1"]),
        (["--gpus=8", "a.toml"], ["a.toml"]),
        (["a.toml", "--hostfile", "hosts"], ["a.toml"]),
        (["--set", "log.run_name=--gpus", "a.toml"], ["--set", "log.run_name=--gpus", "a.toml"]),
        (["--", "--gpus", "2"], ["--", "--gpus", "2"]),
        (["a.toml", "--gpus"], ["a.toml"]),
    ],
)
def test_words_without_the_launching_options(words: list[str], kept: list[str]) -> None:
    assert without_options(words, ("--processes", "--gpus", "--hostfile")) == kept


def test_the_commands_that_are_said_can_be_typed() -> None:
    assert torchrun_words(2, ["run", "a.toml"]) == [
        "python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "alignzoo", "run",
        "a.toml",
    ]  # fmt: skip
    assert deepspeed_words(Path("hosts"), ["run", "a.toml", "--set", "x=1"]) == [
        "deepspeed", "--hostfile", "hosts", "--module", "alignzoo", "run", "a.toml", "--set", "x=1"
    ]  # fmt: skip


def test_a_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# the cluster\n\nnode-1 slots=8\n  node-2\tslots=4  # half\n")
    assert read_hostfile(path) == {"node-1": 8, "node-2": 4}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node-1 slots=8\nnode-2\n", ':2: "node-2" is not of the form HOST slots=N'),
        ("node-1 slots=0\n", ":1:"),
        ("node-1 slots=8 node-2 slots=8\n", ":1:"),
        ("node-1 slots=8\nnode-1 slots=8\n", ":2: node-1 is there twice"),
        ("# none\n", "names no host"),
        (None, "cannot be read"),
    ],
)
def test_a_malformed_hostfile(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(AlignzooError) as caught:
        read_hostfile(path)
    assert f"{path}{said}" in str(caught.value) or f"{path}: {said}" in str(caught.value)


@pytest.mark.parametrize(
    ("reports", "deaths", "lines", "code"),
    [
        # all alike: once, without ranks
        ([report(0, "bad", code=2), report(1, "bad", code=2)], [], ["bad"], 2),
        # one of two; the other was ended by the launcher
        ([report(1, "nan")], [Death(0, 1, SIGTERM), Death(1, 1, 1)], ["rank 1: nan"], 1),
        # the first that is no echo, though an echo came before it
        ([report(0, "closed", at=1, echo=True), report(1, "bug", at=2)], [], ["rank 1: bug"], 1),
        ([report(1, "nan", at=1, code=2), report(0, "late", at=2)], [], ["rank 1: nan"], 2),
        # killed: that is the cause, whatever the survivor saw
        ([report(0, "closed", echo=True)], [Death(0, 1, 1), Death(1, 1, SIGKILL)],
         ["rank 1 was killed by SIGKILL: most often the machine had no memory left"], 137),
        ([report(0, "odd")], [Death(0, 1, 1), Death(1, 1, SIGKILL)],
         ["rank 1 was killed by SIGKILL: most often the machine had no memory left", "rank 0: odd"], 137),
        # the launcher kills survivors that do not end
        ([report(1, "nan")], [Death(1, 1, 1), Death(0, 31, SIGKILL)], ["rank 1: nan"], 1),
        # nobody says why
        ([], [Death(0, 2, SIGTERM), Death(1, 1, 7)], ["rank 1 ended with exit code 7 and left no error"], 7),
        ([report(0, "closed", echo=True)], [Death(0, 2, 1), Death(1, 1, SIGABRT)],
         ["rank 1 ended by SIGABRT and left no error"], 134),
        ([report(0, "closed", echo=True)], [Death(0, 1, 1)], ["rank 0: closed"], 1),
        # several, not all; a traceback begins on its own line
        ([report(0, "x", at=1), report(2, "x", at=2), report(1, "y", at=3)], [], ["ranks 0, 2: x"], 1),
        ([report(1, "Traceback (most recent call last):\n  ...")], [],
         ["rank 1:\nTraceback (most recent call last):\n  ..."], 1),
    ],
)  # fmt: skip
def test_whose_error_is_shown(reports: list[Report], deaths: list[Death], lines: list[str], code: int) -> None:
    world = 3 if any(r.rank == 2 for r in reports) else 2
    assert verdict(sorted(reports, key=lambda r: r.time), deaths, world) == (lines, code)


# --- real processes --------------------------------------------------------------------------------------------------


def start(mode: str, folder: Path, *rest: str) -> tuple[int, list[str]]:
    """The exit code and what the parent said on stdout."""
    lines: list[str] = []
    return launch(["run", mode, str(folder), *rest], 2, lines.append, program=CHILD), lines


def test_two_ranks_run_with_the_same_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    code, lines = start("well", tmp_path, "a b")
    assert code == 0 and len(lines) == 1
    assert lines[0].startswith("starting 2 processes as torchrun does: python -m torch.distributed.run --standalone ")
    assert lines[0].endswith(f"-m alignzoo run well {tmp_path} 'a b'")
    for rank in (0, 1):  # local rank, ranks, threads of each, words
        assert (tmp_path / f"rank-{rank}").read_text() == f"{rank} 2 3 ['{tmp_path}', 'a b']"
    assert dict(os.environ) == before and signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize(
    ("mode", "code", "said"),
    [
        ("alike", 2, "error: the recipe has a mistake\n  way out: mend it\n"),
        ("second", 1, "error: rank 1: step 3: the loss is not finite\n  why: it is nan\n"),
        ("killed", 137, "error: rank 1 was killed by SIGKILL: most often the machine had no memory left\n"),
        ("silent", 7, "error: rank 1 ended with exit code 7 and left no error\n"),
        ("knows", 137, "error: rank 1 was killed by SIGKILL: most often the machine had no memory left\n"),
    ],
)
def test_the_cause_is_what_a_person_sees(
    mode: str, code: int, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(mode, tmp_path)[0] == code
    out, err = capfd.readouterr()
    assert (out, err) == ("", said)
    assert mode != "knows" or (tmp_path / "known").exists()


def test_a_survivor_that_does_not_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launching, "_AFTER_FAILURE", 0.5)
    monkeypatch.setattr(launching, "_AT_ONCE", 0.4)
    began = time.monotonic()
    assert start("stubborn", tmp_path)[0] == 1 and time.monotonic() - began < 20
    assert capfd.readouterr().err == "error: rank 1: the disk is full\n"


def test_a_bug_in_one_rank_keeps_its_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start("bug", tmp_path)[0] == 1
    err = capfd.readouterr().err
    assert err.startswith("error: rank 1:\nTraceback (most recent call last):")
    assert err.endswith("ZeroDivisionError: a bug\n") and "Connection closed" not in err


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Does a process run? A zombie does not."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


Parent = tuple["subprocess.Popen[str]", list[int]]


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Callable[[str], Parent]]:
    """Starts `launch` in a process of its own: that process, and the ids of its ranks when they are ready."""
    started: list[subprocess.Popen[str]] = []

    def begin(mode: str) -> Parent:
        code = f"""
        import sys
        from alignzoo import launch
        launch.GRACE = 2 if {mode!r} == "deaf" else 60
        words = ["run", {mode!r}, {str(tmp_path)!r}]
        sys.exit(launch.launch(words, 2, lambda line: None, program={CHILD!r}))
        """
        command = [sys.executable, "-c", textwrap.dedent(code)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        wait_for(lambda: process.poll() is not None or len(list(tmp_path.glob("ready-*"))) == 2)
        wait_for(lambda: all(file.read_text() for file in tmp_path.glob("ready-*")))
        return process, [int(file.read_text()) for file in tmp_path.glob("ready-*")]

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_get_a_signal_once_and_time_to_save(  # sent twice at a time, as `timeout` does
    number: signal.Signals, tmp_path: Path, parent: Callable[[str], Parent]
) -> None:
    process, ranks = parent("saving")
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (128 + number, "", f"stopped by {number.name}\n")
    for rank in (0, 1):
        assert (tmp_path / f"signals-{rank}").read_text() == f"{int(number)}\n"
        assert (tmp_path / f"saved-{rank}").exists()
    assert not any(map(alive, ranks))


def test_ctrl_c_is_told_once(parent: Callable[[str], Parent]) -> None:
    process, _ = parent("interrupted")
    process.send_signal(signal.SIGINT)
    said = "interrupted: what was written to the run directory stays there\nstopped by SIGINT\n"
    assert (process.communicate(timeout=30), process.returncode) == (("", said), 130)


def test_ranks_that_do_not_end_are_killed(parent: Callable[[str], Parent]) -> None:
    process, ranks = parent("deaf")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143 and 1.5 < time.monotonic() - began < 15
    wait_for(lambda: not any(map(alive, ranks)))


def test_a_second_signal_ends_at_once(tmp_path: Path, parent: Callable[[str], Parent]) -> None:
    process, ranks = parent("slow")
    process.send_signal(signal.SIGINT)
    wait_for(lambda: (tmp_path / "signals-0").exists())
    time.sleep(1.1)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - began < 5
    assert not any(map(alive, ranks)) and not (tmp_path / "saved-0").exists()


def test_no_rank_outlives_its_parent(tmp_path: Path, parent: Callable[[str], Parent]) -> None:
    process, ranks = parent("saving")
    process.kill()
    wait_for(lambda: not any(map(alive, ranks)))
    assert (tmp_path / "saved-0").exists()


def test_a_forwarded_command_gets_a_signal_once(tmp_path: Path) -> None:
    code = f"import sys; from alignzoo.launch import run_forwarding; sys.exit(run_forwarding({CHILD_COMMAND!r}))"
    process = subprocess.Popen([sys.executable, "-c", code.replace("FOLDER", str(tmp_path))])
    wait_for(lambda: (tmp_path / "ready-0").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    assert (tmp_path / "signals-0").read_text() == "15\n" and (tmp_path / "saved-0").exists()


CHILD_COMMAND = [sys.executable, *CHILD, "run", "saving", "FOLDER"]


def test_the_exit_code_of_a_forwarded_command() -> None:
    for code, wanted in (("import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137), ("", 0)):
        assert run_forwarding([sys.executable, "-c", code]) == wanted


def torchrun(mode: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *torchrun_words(2, [])[1:-2], *CHILD, "run", mode, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("mode", "said"),
    [("second", "error: rank 1: step 3: the loss is not finite"), ("alike", "error: the recipe has a")],
)
def test_under_torchrun_itself(mode: str, said: str, tmp_path: Path) -> None:
    done = torchrun(mode, tmp_path)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error:") and said in line]
    assert done.stderr.count("error: ") == 1


@pytest.mark.slow
def test_under_deepspeeds_launcher(tmp_path: Path) -> None:
    deepspeed = Path(sys.executable).with_name("deepspeed")
    if not deepspeed.exists():
        pytest.skip("deepspeed is not installed")
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    command = [str(deepspeed), "--num_gpus", "2", *CHILD]
    done = subprocess.run([*command, "run", "well", str(tmp_path)], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(f.name for f in tmp_path.iterdir()) == ["rank-0", "rank-1"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """What `alignzoo run` would start."""
    calls: list[tuple[list[str], int]] = []

    def record(words: list[str], processes: int, say: object) -> int:
        calls.append((list(words), processes))
        return 7

    monkeypatch.setattr(launching, "launch", record)
    return calls


def test_run_starts_processes_with_its_other_words(started: list[tuple[list[str], int]]) -> None:
    result = CliRunner().invoke(cli, ["run", DPO, "--processes", "2", "--set", "train.max_steps=1"])
    assert result.exit_code == 7, result.output
    assert started == [(["run", DPO, "--set", "train.max_steps=1"], 2)]


def test_mistakes_are_told_before_anything_starts(
    started: list[tuple[list[str], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*words: str) -> str:
        result = CliRunner().invoke(cli, ["run", DPO, *words])
        assert result.exit_code == 2 and not result.stdout, result.output
        return result.stderr

    assert 'unknown key "sead"' in fails("--processes", "2", "--set", "train.sead=1")
    hpz = ("--set", "engine.zero=3", "--set", "engine.hpz=3")
    assert "engine.hpz = 3 does not divide 2 processes" in fails("--processes", "2", *hpz)
    assert "give one of them" in fails("--processes", "2", "--gpus", "2")
    assert "0 is not in the range" in fails("--processes", "0")
    assert "nohosts: cannot be read" in fails("--hostfile", "nohosts")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert "--gpus 2: torch sees 1 GPU here" in fails("--gpus", "2")
    monkeypatch.setenv("RANK", "0")
    assert "a launcher has started this process already, as rank 0 of 1" in fails("--processes", "2")
    assert started == []


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(processes: int, device: str, gpus: bool, found: int) -> str:
        monkeypatch.setattr("torch.cuda.device_count", lambda: found)
        try:
            check_devices(processes, device, gpus=gpus)
        except AlignzooError as error:
            return str(error)
        return ""

    assert refused(4, "auto", True, 4) == refused(4, "auto", False, 8) == refused(2, "auto", False, 0) == ""
    assert refused(2, "cpu", False, 1) == ""
    assert "--gpus 4: torch sees 2 GPUs here" in refused(4, "auto", True, 2)
    assert "--gpus 2: torch sees no GPUs here" in refused(2, "auto", True, 0)
    assert "--processes 4: torch sees 2 GPUs" in refused(4, "auto", False, 2)
    assert 'engine.device = "cpu"' in refused(2, "cpu", True, 2)


def test_several_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node-1 slots=8\nnode-2 slots=8\n")
    commands: list[list[str]] = []
    monkeypatch.setattr(launching, "run_forwarding", lambda command: commands.append(list(command)) or 5)
    lines: list[str] = []
    assert launch_hosts(["run", "a.toml"], hosts, lines.append) == 5
    assert lines == [f"starting 16 processes on 2 hosts: deepspeed --hostfile {hosts} --module alignzoo run a.toml"]
    assert commands[0][1:] == deepspeed_words(hosts, ["run", "a.toml"])[1:] and commands[0][0].endswith("deepspeed")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AlignzooError, match="the command deepspeed is not there"):
        launch_hosts(["run", "a.toml"], hosts, lines.append)


def test_a_process_of_a_launcher_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    check_free()
    ranked(monkeypatch, 1)
    with pytest.raises(AlignzooError, match="as rank 1 of 2"):
        check_free()
