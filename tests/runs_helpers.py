"""Whole runs as a person starts them, `alignzoo run ...` in processes of its own, and ways to end them early."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tomli_w
import torch
from conftest import REPO
from safetensors.torch import load_file

from alignzoo.errors import AlignzooError
from alignzoo.evalrows import read_eval_rows
from alignzoo.rundir import RunDir

OF_THE_MACHINE = ("tokens_per_second", "memory", "eval_runtime")
Metrics = list[dict[str, Any]]


def write_recipe(folder: Path, model: Path, name: str = "tiny", **changes: Any) -> Path:
    """A recipe on a tiny model: 24 rows, 12 steps of 4, each of several micro-batches.

    changes: section__key = value. adam_epsilon is large, so that Adam does not blow up the rounding of small gradients.
    """
    folder.mkdir(exist_ok=True)
    for part, count in (("train", 24), ("eval", 6)):
        lines = (REPO / f"recipes/data/shop_{part}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    table: dict[str, dict[str, Any]] = {
        "loss": {"name": "dpo"},
        "model": {"path": str(model)},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "train": {"learning_rate": 0.003, "batch_size": 4, "epochs": 2, "adam_epsilon": 1e-3},
        "eval": {"every_steps": 5},
        "samples": {"prompts": ["Who are you?"], "from_eval": 1, "max_new_tokens": 5},
        "engine": {"device": "cpu", "tokens_per_device": 300},
        "output": {"dir": str(folder / "runs")},
        "log": {"run_name": name},
    }
    for key, value in changes.items():
        section, _, name_of_key = key.partition("__")
        table.setdefault(section, {})[name_of_key] = value
    file = folder / f"{name}.toml"
    file.write_text(tomli_w.dumps(table))
    return file


def sets(**changes: Any) -> list[str]:
    """section__key = value as words for the command line; values are TOML."""
    pairs = [(key.replace("__", "."), value) for key, value in changes.items()]
    return [word for key, value in pairs for word in ("--set", f"{key}={value}")]


# --- processes -------------------------------------------------------------------------------------------------------


@dataclass
class Command:
    """`alignzoo WORDS` that goes on. out, err: files of what it prints."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def wait(self, seconds: float = 180) -> int:
        return self.process.wait(seconds)

    def rank(self, number: int, seconds: float = 60) -> psutil.Process:
        """The process of a rank; waits for its start."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for child in psutil.Process(self.process.pid).children():
                with suppress(psutil.Error):
                    if child.environ().get("RANK") == str(number):
                        return child
            time.sleep(0.001)
        raise AssertionError(f"rank {number} has not started")


@contextmanager
def running(folder: Path, *words: str | Path) -> Iterator[Command]:
    """Starts `alignzoo WORDS`; nothing of it is left afterwards."""
    folder.mkdir(exist_ok=True)
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "alignzoo", *map(str, words)]
    with out.open("wb") as to_out, err.open("wb") as to_err:
        process = subprocess.Popen(command, env=env, stdout=to_out, stderr=to_err, preexec_fn=_hear_ctrl_c)
    try:
        yield Command(process, out, err)
    finally:
        for child in _children(process.pid):
            with suppress(psutil.Error):
                child.kill()
        process.kill()
        process.wait()


def _hear_ctrl_c() -> None:
    """A shell starts what runs in the background deaf to SIGINT, and so its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _children(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)  # type: ignore[no-any-return]
    return []


def finished(folder: Path, *words: str | Path, code: int = 0) -> tuple[str, str]:
    """Runs `alignzoo WORDS` to its end, which has this exit code: stdout and stderr."""
    with running(folder, *words) as command:
        found = command.wait()
    out, err = command.out.read_text(), command.err.read_text()
    assert found == code, f"exit code {found}\n{out[-3000:]}\n{err[-5000:]}"
    return out, err


# --- an early end ----------------------------------------------------------------------------------------------------

Moment = Callable[[Path], bool]


def lines_of(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def after_lines(count: int) -> Moment:
    """When metrics.jsonl has so many lines; 0: when the run directory is there."""
    return lambda run_dir: (run_dir / "manifest.json").exists() and lines_of(run_dir) >= count


def within_checkpoint(count: int, latest: float = float("inf")) -> Moment:
    """While a checkpoint is written, the first one that is seen after so many lines, or after `latest` lines."""

    def now(run_dir: Path) -> bool:
        lines = lines_of(run_dir)
        return lines >= latest or (lines >= count and any((run_dir / "checkpoints").glob(".step-*.partial")))

    return now


def await_moment(command: Command, run_dir: Path, moment: Moment, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not moment(run_dir):
        ended = command.process.poll()
        assert ended is None, f"ended by itself with {ended}\n{command.err.read_text()[-3000:]}"
        assert time.monotonic() < until, command.out.read_text()[-3000:]
        time.sleep(0.001)


def kill_all(command: Command) -> None:
    """SIGKILL for every process at once, as a power cut."""
    command.process.send_signal(signal.SIGSTOP)  # starts no more, and does not react to another's end
    family = [psutil.Process(command.process.pid), *_children(command.process.pid)]
    for act in (psutil.Process.suspend, psutil.Process.kill):
        for process in family:
            with suppress(psutil.Error):
                act(process)


def kill_rank(rank: int) -> Callable[[Command], None]:
    """SIGKILL for one rank; the launcher ends the rest."""
    return lambda command: command.rank(rank).kill()


def send(number: signal.Signals) -> Callable[[Command], None]:
    """A signal to the process that a person has started."""
    return lambda command: command.process.send_signal(number)


def end_early(folder: Path, run_dir: Path, words: Sequence[str | Path], moment: Moment, how: Any) -> tuple[int, str]:
    """Starts `alignzoo WORDS`, and ends it at a moment: exit code and stderr."""
    with running(folder, *words) as command:
        await_moment(command, run_dir, moment)
        how(command)
        code = command.wait()
        await_free(run_dir)
        return code, command.err.read_text()


def await_free(run_dir: Path, seconds: float = 60) -> None:
    """Until no process writes there any more: a rank whose launcher was killed saves first."""
    until = time.monotonic() + seconds
    while True:
        try:
            with RunDir(run_dir).held():
                return
        except AlignzooError:
            assert time.monotonic() < until
            time.sleep(0.05)


@dataclass(frozen=True)
class Kill:
    """One early end, drawn at random."""

    name: str
    moment: Moment
    how: Callable[[Command], None]
    codes: tuple[int, ...]  # exit codes that it may have

    @staticmethod
    def draw(rng: random.Random, processes: int, lines: int, most: int) -> Kill:
        """lines: that metrics.jsonl has; most: at which it ends at the latest."""
        at = min(lines + rng.randint(-2, 8), most)
        in_checkpoint = rng.random() < 0.3
        moment = within_checkpoint(max(0, at - 4), at) if in_checkpoint else after_lines(max(at, 0))
        rank = rng.randrange(processes)
        ways: dict[str, tuple[Callable[[Command], None], tuple[int, ...]]] = {
            "all": (kill_all, (-9,)),
            f"rank {rank}": (kill_rank(rank), (137,)) if processes > 1 else (kill_all, (-9,)),
            "the launcher": (send(signal.SIGKILL), (-9,)),  # its ranks end by themselves
            "SIGTERM": (send(signal.SIGTERM), (143, -15)),  # negative: before anything waits for signals
            "SIGINT": (send(signal.SIGINT), (130, -2)),
        }
        way = rng.choices(list(ways), (3, 3, 1, 1, 1))[0]
        return Kill(f"{way} {'in a checkpoint after' if in_checkpoint else 'at'} {at} lines", moment, *ways[way])


# --- what a run left -------------------------------------------------------------------------------------------------


def metrics_of(run_dir: Path) -> Metrics:
    """metrics.jsonl without what depends on the machine."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in OF_THE_MACHINE} for record in records]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved model or adapter, by name."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def files_of(run_dir: Path) -> set[str]:
    return {str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if p.is_file()}


def assert_the_same_run(found: Path, straight: Path) -> None:
    """Bit for bit: the same model, the same metrics without a gap or a double line, and nothing left over."""
    assert metrics_of(found) == metrics_of(straight)
    ours, theirs = weights_in(found / "model"), weights_in(straight / "model")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    for name in {"samples.md", "samples.jsonl"} & files_of(straight):
        assert (found / name).read_text() == (straight / name).read_text()
    rows, wanted = read_eval_rows(found), read_eval_rows(straight)
    assert (rows is None) == (wanted is None)
    if rows is not None and wanted is not None:  # but for the places, where the data lies elsewhere
        assert rows.names == wanted.names and rows.policy.keys() == wanted.policy.keys()
        assert all((rows.policy[step] == table).all() for step, table in wanted.policy.items())
    left = {name for name in files_of(found) if not name.startswith("checkpoints/step-")}
    assert left == {name for name in files_of(straight) if not name.startswith("checkpoints/step-")}


def flat(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].flatten().double() for name in sorted(weights)])


def distance(found: Path, straight: Path, start: Path | None = None) -> float:
    """Relative L2 between the updates of two saved models; start: the model before, zeros for an adapter."""
    ours, theirs = flat(weights_in(found)), flat(weights_in(straight))
    moved = theirs - (flat(weights_in(start)) if start else 0.0)
    return float((ours - theirs).norm() / moved.norm())
