"""A run in which nothing moves ends with the stack of each of its threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from alignzoo.ranks import ERRORS, read_reports

FIRST_LINES = (
    "rank {rank}: nothing moved for {seconds} s (engine.hang_timeout), last at: {doing}\n"
    "the stack of each of its threads, most recent call first:\n"
)


START = """
import pathlib, threading, time
from alignzoo.watchdog import Watchdog
run = pathlib.Path({!r})
"""


def watched(code: str, run: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code that has Watchdog, threading, time and `run`, a run's directory."""
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", ERRORS}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", START.format(str(run)) + textwrap.dedent(code)]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=60)


def test_a_run_that_hangs_tells_where_and_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "stacks"
    began = time.monotonic()
    done = watched(
        """
        def a_loader_that_waits():
            threading.Event().wait()

        def a_step_that_hangs():
            time.sleep(1000)

        with Watchdog(1, 0, run) as dog:
            dog.beat("reading rows")
            threading.Thread(target=a_loader_that_waits).start()
            dog.beat("step 7")
            dog.beat()
            a_step_that_hangs()
        """,
        tmp_path / "run",
    )
    assert done.returncode == 1 and time.monotonic() - began < 20
    assert done.stdout == ""
    assert [f.name for f in folder.iterdir()] == ["rank-0.txt"]
    for text in ((folder / "rank-0.txt").read_text(encoding="utf-8"), done.stderr):
        assert text.startswith(FIRST_LINES.format(rank=0, seconds=1, doing="step 7"))
        stacks = re.split(r"^(?:Current thread|Thread) .*\n", text, flags=re.MULTILINE)[1:]
        assert len(stacks) == 3
        assert sum("in a_step_that_hangs" in stack for stack in stacks) == 1
        assert sum("in a_loader_that_waits" in stack for stack in stacks) == 1


def test_a_run_that_hangs_before_it_said_anything(tmp_path: Path) -> None:
    done = watched("with Watchdog(0.4, 3, run):\n    time.sleep(1000)", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(FIRST_LINES.format(rank=3, seconds=0.4, doing="starting"))
    kept = (tmp_path / "stacks" / "rank-3.txt").read_text()
    own = r"line \d+ in _stop"  # the watchdog itself, which writes the one after the other
    assert re.sub(own, "", kept) == re.sub(own, "", done.stderr)


def test_the_parent_gets_to_know_it(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    errors.mkdir()
    code = """
        with Watchdog(0.4, 1, run) as dog:
            dog.beat("saving")
            time.sleep(1000)
    """
    done = watched(code, tmp_path / "run", RANK="1", WORLD_SIZE="2", **{ERRORS: str(errors)})
    assert done.returncode == 1
    [report] = read_reports(errors)
    said = f"nothing moved for 0.4 s (engine.hang_timeout), last at: saving; stacks: {tmp_path / 'run' / 'stacks'}"
    assert (report.rank, report.text, report.exit_code, report.echo) == (1, said, 1, False)


@pytest.mark.parametrize(
    "code",
    [
        # signs of life
        """
        with Watchdog(1.5, 0, run) as dog:
            dog.beat("step 1")
            for _ in range(30):
                dog.beat()
                time.sleep(0.1)
        """,
        # 0: never
        """
        with Watchdog(0, 0, run):
            names = [thread.name for thread in threading.enumerate()]
            time.sleep(1)
        assert names == ["MainThread"], names
        """,
        # what comes after it has as long as it takes
        """
        with Watchdog(0.3, 0, run):
            pass
        try:
            with Watchdog(0.3, 0, run):
                raise KeyError
        except KeyError:
            time.sleep(1.5)
        """,
    ],
)
def test_it_leaves_a_run_alone(code: str, tmp_path: Path) -> None:
    done = watched(textwrap.dedent(code) + "\nprint('ended well')", tmp_path / "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended well\n", "")
    assert not (tmp_path / "run").exists()


def test_it_ends_a_run_whose_directory_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").touch()  # a file
    done = watched("with Watchdog(0.4, 0, run):\n    time.sleep(5)", tmp_path / "run")
    assert done.returncode == 1
    assert done.stderr.startswith(FIRST_LINES.format(rank=0, seconds=0.4, doing="starting"))
