"""Ranks as processes of their own: who is quiet, and how one ends that has failed."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from alignzoo.ranks import ERRORS

ALL_QUIET = {
    "TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY", "TQDM_DISABLE",
    "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "PYTHONWARNINGS",
}  # fmt: skip
LAUNCHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", ERRORS}
LONG = 60.0  # seconds; a test that waits for them fails


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process that has no launcher, nor a quiet setting, but these."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS | ALL_QUIET}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=LONG)


# --- quiet ranks -----------------------------------------------------------------------------------------------------

NOISY = """
    import ctypes, json, logging, os, subprocess, sys, warnings
    from alignzoo.ranks import quiet_unless_first
    before = dict(os.environ)
    quiet_unless_first()
    warnings.warn("a warning")
    warnings.warn_explicit("of the future", FutureWarning, "f.py", 1, module="elsewhere")
    warnings.warn_explicit("of an optimizer", FutureWarning, "f.py", 1, module="torch.optim.adam")
    warnings.warn_explicit("of a collective", FutureWarning, "f.py", 1, module="torch.distributed.c10d_logger")
    warnings.warn_explicit("of this use", UserWarning, "f.py", 1, module="torch.distributed.c10d_logger")
    logging.getLogger("a.library").warning("a line")
    logging.getLogger("a.library").error("an error")
    logging.getLogger("a.library").critical("the worst")
    subprocess.run([sys.executable, "-c", "import warnings; warnings.warn('of a child')"])
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
    print(json.dumps([{k: v for k, v in os.environ.items() if before.get(k) != v}, number.value, sorted(sys.modules)]))
"""
WARNED = ("a warning", "of the future", "of an optimizer", "of this use", "a line", "an error", "of a child")


@pytest.mark.skipif(sys.platform != "linux", reason="the signal at a parent's end is Linux's")
@pytest.mark.parametrize(
    ("environment", "heard", "silent", "at_parents_end"),
    [
        ({}, (*WARNED, "of a collective"), (), 0),
        ({"RANK": "0", "WORLD_SIZE": "1", ERRORS: "folder"}, (*WARNED, "of a collective"), (), 0),
        ({"RANK": "0", "WORLD_SIZE": "2"}, WARNED, ("of a collective",), 0),
        ({"RANK": "0", "WORLD_SIZE": "2", ERRORS: "folder"}, WARNED, ("of a collective",), 15),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (), (*WARNED, "of a collective"), 0),
        # the first of the second machine
        ({"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}, (), (*WARNED, "of a collective"), 0),
    ],
)
def test_only_the_first_rank_warns_and_logs(
    environment: dict[str, str], heard: tuple[str, ...], silent: tuple[str, ...], at_parents_end: int
) -> None:
    done = python(NOISY, **environment)
    assert done.returncode == 0, done.stderr
    assert [text for text in heard if text not in done.stderr] == []
    assert [text for text in silent if text in done.stderr] == []
    assert "the worst" in done.stderr
    changed, number, modules = json.loads(done.stdout)
    assert set(changed) == (ALL_QUIET if not heard else set())
    assert number == at_parents_end
    assert "torch" not in modules and "transformers" not in modules


@pytest.mark.parametrize("rank", [0, 1])
def test_the_libraries_understand_it(rank: int) -> None:
    done = python(
        """
        from alignzoo.ranks import quiet_unless_first
        quiet_unless_first()
        import datasets, huggingface_hub, transformers
        from huggingface_hub.utils import are_progress_bars_disabled
        from tqdm import tqdm
        for _ in tqdm(range(2)):
            pass
        levels = [library.utils.logging.get_verbosity() for library in (transformers, datasets, huggingface_hub)]
        print(levels, are_progress_bars_disabled(), datasets.are_progress_bars_disabled())
        """,
        RANK=str(rank),
        WORLD_SIZE="2",
    )
    critical, warning = logging.CRITICAL, logging.WARNING
    wanted = f"{[critical] * 3} True True" if rank else f"{[warning] * 3} False False"
    assert done.stdout.strip() == wanted, done.stderr
    assert ("2/2" in done.stderr) == (rank == 0)


# --- the end of a rank that failed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "hangs", "code"), [("2", 40, 1), ("1", 2, 7)])
def test_a_failed_rank_ends_though_a_thread_of_it_hangs(world: str, hangs: int, code: int) -> None:
    lines = f"""
        import sys, threading, time
        from alignzoo import ranks
        ranks._LAST_SECONDS = 1
        threading.Thread(target=time.sleep, args=({hangs},)).start()  # Python waits for it
        ranks.end_in_time()
        sys.exit(7)
    """
    began = time.monotonic()
    done = python(lines, RANK="0", WORLD_SIZE=world)
    assert (done.returncode, done.stderr) == (code, "") and time.monotonic() - began < 30


def test_a_failed_rank_has_time_to_end(tmp_path: Path) -> None:
    code = f"""
        import atexit, pathlib, sys, time
        from alignzoo import ranks
        ranks.end_in_time()
        atexit.register(lambda: (time.sleep(0.3), pathlib.Path({str(tmp_path / "ended")!r}).touch()))
        sys.exit(2)
    """
    done = python(code, RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stderr) == (2, "") and (tmp_path / "ended").exists()
