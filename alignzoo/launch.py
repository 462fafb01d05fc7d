"""Starting many ranks, on one machine or several, and telling how they ended. It imports torch to count GPUs only.

`launch` gives its processes the environment that torchrun gives them, so that all that runs under torchrun runs under
it. It is no call of torchrun's own machinery because of what a run here needs: a signal reaches every rank once even if
it comes twice at a time, ranks have minutes to save after it, a second one ends them at once, and a rank that fails
ends the others within seconds.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from alignzoo.errors import AlignzooError
from alignzoo.ranks import ERRORS, FAILED, PARENT, Rank, Report, Say, by_rank, read_reports

GRACE = 300.0  # seconds that ranks get to save after a signal, before they are killed
_AFTER_FAILURE = 30.0  # seconds that ranks get to end after another one has failed
_SAME_SIGNAL = 1.0  # seconds; `timeout` and some schedulers send one twice, to the process and to its group
PROGRAM = ("-m", "alignzoo")

# --- how ranks ended -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Death:
    """How a rank's process ended. exit_code is negative for a signal, as in subprocess."""

    rank: int
    time: float
    exit_code: int

    @property
    def signal(self) -> str:
        return signal.Signals(-self.exit_code).name if self.exit_code < 0 else ""


def verdict(reports: Sequence[Report], deaths: Sequence[Death], world: int) -> tuple[list[str], int]:
    """What to show of a failed run, and its exit code: the ranks that were killed, and the first error of a rank."""
    killed = _killed(deaths)
    real = [r for r in reports if not r.echo]
    lines = [_killed_in_words(death) for death in killed]
    if real:
        alike = sorted(r.rank for r in real if r.text == real[0].text)
        lines.append(real[0].text if len(alike) == world else by_rank(alike, real[0].text))
        return lines, 128 - killed[0].exit_code if killed else real[0].exit_code
    if killed:
        return lines, 128 - killed[0].exit_code
    return _without_reason(reports, deaths)


def _without_reason(reports: Sequence[Report], deaths: Sequence[Death]) -> tuple[list[str], int]:
    """Nobody says why: the rank that ended first, or the first echo."""
    silent = [d for d in deaths if d.rank not in {r.rank for r in reports}]
    if silent:
        first = min(silent, key=lambda d: d.time)
        if first.exit_code < 0:
            return [f"rank {first.rank} ended by {first.signal} and left no error"], 128 - first.exit_code
        return [f"rank {first.rank} ended with exit code {first.exit_code} and left no error"], first.exit_code or 1
    if reports:
        return [by_rank([reports[0].rank], reports[0].text)], reports[0].exit_code
    return ["the ranks ended and left no error"], 1


# Not SIGTERM and SIGABRT: the launcher sends the one, and NCCL ends a rank by the other when its neighbour has gone.
_HARD = ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE")
_AT_ONCE = 10.0  # seconds; the launcher's own SIGKILL comes later after the first end


def _killed(deaths: Sequence[Death]) -> list[Death]:
    """Ranks that a signal from elsewhere ended."""
    first = min((d.time for d in deaths), default=0.0)
    hit = [d for d in deaths if d.signal in _HARD and d.time - first < _AT_ONCE]
    return sorted(hit, key=lambda d: (d.time, d.rank))


def _killed_in_words(death: Death) -> str:
    reasons = {"SIGKILL": ": most often the machine had no memory left"}
    return f"rank {death.rank} was killed by {death.signal}{reasons.get(death.signal, '')}"


# --- one machine -----------------------------------------------------------------------------------------------------


def check_free() -> None:
    """Raises AlignzooError within a process that a launcher has started."""
    here = Rank.here()
    if "RANK" in os.environ or here.many:
        raise AlignzooError(
            f"a launcher has started this process already, as rank {here.rank} of {here.world}",
            fix="leave out --processes, --gpus and --hostfile, or the launcher",
        )


def check_devices(processes: int, device: str, *, gpus: bool) -> None:
    """Raises AlignzooError where there are fewer GPUs than processes. It imports torch.

    device: engine.device. gpus: were GPUs asked for? Without, processes on a machine that has none compute on the CPU.
    """
    if gpus and device == "cpu":
        raise AlignzooError(
            f'--gpus {processes}: the recipe says engine.device = "cpu"', fix="--processes, or no device"
        )
    if device == "cpu":
        return
    import torch

    found = torch.cuda.device_count()
    if found >= processes or (found == 0 and not gpus):
        return
    asked = f"--{'gpus' if gpus else 'processes'} {processes}"
    raise AlignzooError(
        f"{asked}: torch sees {found or 'no'} GPU{'s' if found != 1 else ''} here",
        fix=f"--gpus {found}" if found else f"--processes {processes} computes on the CPU",
    )


def torchrun_words(processes: int, words: Sequence[str]) -> list[str]:
    """The command that `launch` stands for. words: those behind `alignzoo`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return ["python", *launcher, *PROGRAM, *words]


def launch(words: Sequence[str], processes: int, say: Say, *, program: Sequence[str] = PROGRAM) -> int:
    """Runs `alignzoo WORDS` in several processes on this machine, as torchrun does. Returns the exit code.

    say: prints a line of the parent. program: what Python runs in each process, for tests.
    """
    say(f"starting {processes} processes as torchrun does: {shlex.join(torchrun_words(processes, words))}")
    command = [sys.executable, "-u", *program, *words]
    with tempfile.TemporaryDirectory(prefix="alignzoo-") as folder:
        family = Family([(command, e) for e in environments(processes, folder)], Path(folder) / FAILED)
        family.run()
        reports = read_reports(Path(folder))
    deaths = family.deaths
    if family.asked:  # what ranks then say is where they stopped, or an error while they saved
        deaths, reports = [], [r for r in reports if not r.echo]
    if not (reports or deaths):
        if family.asked:
            _complain(f"stopped by {signal.Signals(family.asked).name}")
        return 128 + family.asked if family.asked else 0
    lines, code = verdict(reports, deaths, processes)
    for line in lines:
        _complain(f"error: {line}")
    return 128 + family.asked if family.asked else code


def environments(processes: int, folder: str) -> list[dict[str, str]]:
    """Of each rank, what its environment has beside this one's: torchrun's names, and the cores shared out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    common = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // processes)),
        ERRORS: folder,
        PARENT: str(os.getpid()),
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass
class Family:
    """Processes that end together. Each has a session of its own, so a terminal's Ctrl-C comes through here alone.

    commands: of each process, its command and what its environment has beside this one's
    mark: a file that is made when one has failed, before the others are told to end
    errors: where their stderr goes, if not to this one's
    """

    commands: Sequence[tuple[Sequence[str], dict[str, str]]]
    mark: Path | None = None
    errors: IO[bytes] | None = None
    asked: int = 0  # the number of the signal that this process got
    _members: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _ended: dict[int, Death] = field(default_factory=dict)
    _to_send: list[int] = field(default_factory=list)
    _last_signal: float = 0.0
    _deadline: float = float("inf")

    @property
    def deaths(self) -> list[Death]:
        """Of those that did not end well."""
        return [death for death in self._ended.values() if death.exit_code]

    def run(self) -> None:
        """Starts them and waits for the last one."""
        try:
            with self._handlers():
                for command, environment in self.commands:
                    member = subprocess.Popen(
                        command, env=os.environ | environment, start_new_session=True, stderr=self.errors
                    )
                    self._members.append(member)
                while len(self._ended) < len(self._members):
                    self._look()
                    time.sleep(0.05)
        finally:
            self._send(signal.SIGKILL)

    def _look(self) -> None:
        for rank, member in enumerate(self._members):
            code = member.poll()
            if code is not None:
                self._ended.setdefault(rank, Death(rank, time.monotonic(), code))
        while self._to_send:
            self._send(self._to_send.pop(0))
        if self.deaths and self._deadline == float("inf"):
            if self.mark is not None:
                self.mark.touch()
            self._send(signal.SIGTERM)
            self._deadline = time.monotonic() + _AFTER_FAILURE
        if time.monotonic() > self._deadline:
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for member in self._members:
            if member.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(member.pid, number)

    @contextmanager
    def _handlers(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._on_signal) for number in _ENDING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """The first is handed on, the next one kills."""
        now = time.monotonic()
        again, self._last_signal = now - self._last_signal, now
        if not self.asked:
            self.asked = number
            self._to_send.append(number)
            self._deadline = now + GRACE
        elif again > _SAME_SIGNAL:
            self._to_send.append(signal.SIGKILL)


def _complain(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


# --- several machines ------------------------------------------------------------------------------------------------

_HOST = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>[1-9]\d*)(\s*#.*)?")


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> processes, from lines "HOST slots=N"; empty lines and #... are left out. Raises AlignzooError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AlignzooError(f"--hostfile {path}: cannot be read", why=str(error)) from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        found = _HOST.fullmatch(line)
        if found is None:
            raise AlignzooError(f'{path}:{number}: "{line}" is not of the form HOST slots=N', fix="e.g. node-1 slots=8")
        if found["host"] in hosts:
            raise AlignzooError(f"{path}:{number}: {found['host']} is there twice", fix="one line for each host")
        hosts[found["host"]] = int(found["slots"])
    if not hosts:
        raise AlignzooError(f"{path}: names no host", fix="a line for each, e.g. node-1 slots=8")
    return hosts


def deepspeed_words(hostfile: Path, words: Sequence[str], deepspeed: str = "deepspeed") -> list[str]:
    """The command that runs `alignzoo WORDS` on the hosts of a file."""
    return [deepspeed, "--hostfile", str(hostfile), "--module", PROGRAM[1], *words]


def launch_hosts(words: Sequence[str], hostfile: Path, say: Say) -> int:
    """Runs `alignzoo WORDS` on several machines through DeepSpeed's launcher. Returns the exit code."""
    hosts = read_hostfile(hostfile)
    beside = Path(sys.executable).with_name("deepspeed")
    deepspeed = str(beside) if beside.exists() else shutil.which("deepspeed")
    if deepspeed is None:
        raise AlignzooError("--hostfile: the command deepspeed is not there", fix="pip install deepspeed (Linux)")
    shown = shlex.join(deepspeed_words(hostfile, words))
    on = f"{len(hosts)} hosts" if len(hosts) > 1 else next(iter(hosts))
    say(f"starting {sum(hosts.values())} processes on {on}: {shown}")
    return run_forwarding(deepspeed_words(hostfile, words, deepspeed))


def run_forwarding(command: Sequence[str], errors: IO[bytes] | None = None) -> int:
    """Runs a command, hands signals on once, and returns its exit code. errors: where its stderr goes."""
    family = Family([(command, {})], errors=errors)
    family.run()
    code = family.deaths[0].exit_code if family.deaths else 0
    return 128 + family.asked if family.asked else 128 - code if code < 0 else code


# --- words -----------------------------------------------------------------------------------------------------------


def without_options(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """A command line without these options and their values; what stands behind `--` is kept."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            return [*kept, word, *rest]
        if word in options:
            next(rest, None)
        elif word.partition("=")[0] not in options:
            kept.append(word)
    return kept
