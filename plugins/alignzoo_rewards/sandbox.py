"""Programs of others in a process with limits: time, memory, files, processes, network.

What cuts off the network and other processes is Linux's namespaces (unshare); what shuts files is Landlock
(sandbox_child.py). Root gives each program a user of its own, since root's processes are not counted; it keeps
the right to read files, as Python may be installed where only root reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
USERS = range(61184, 65520)  # systemd's range for transient users: nobody else's
SPARE = 2.0  # seconds beyond the program's own for two starts of Python
APART = ("--net", "--pid", "--fork", "--kill-child", "--mount-proc")
TAIL = 65536  # bytes of what a program printed that are looked at
WAIT = ("sh", "-c", '"$@"; exit $?', "sh")  # the first process of a namespace: when it ends, all in it ends

_PROBE = """
import os, socket
def reach():
    try:
        socket.create_connection(("127.0.0.1", 9), timeout=0.2)
    except OSError as error:
        return error.errno != 101  # ENETUNREACH: not even this machine
    return True
print(os.environ["SANDBOX_FILES"], os.getuid(), os.getpid() < 10, reach())
"""


@dataclass(frozen=True)
class Limits:
    seconds: float = 10.0  # of the wall clock, and rounded up of each process's CPU
    memory: int = 512 * 2**20  # bytes of address space of each process
    processes: int = 16
    file_size: int = 16 * 2**20  # bytes of each file


@dataclass(frozen=True)
class Outcome:
    code: int | None  # None: it was ended, since its time was over
    output: str  # the end of what it printed


@dataclass(frozen=True)
class Sandbox:
    """How programs are run here. Made by `find_sandbox`."""

    unshare: tuple[str, ...]  # the command that cuts off network and processes; () where it cannot be had
    own_user: bool  # each program runs as a user of its own
    missing: tuple[str, ...] = ()  # what this machine cannot keep a program from

    def run(self, source: str, limits: Limits) -> Outcome:
        """Runs a Python program in a folder of its own, with an empty environment and no input."""
        with tempfile.TemporaryDirectory(prefix="alignzoo-code-", ignore_cleanup_errors=True) as folder:
            (Path(folder) / "program.py").write_text(source, encoding="utf-8", errors="replace")
            user = secrets.choice(USERS)
            if self.own_user:
                os.chown(folder, user, user)
            return self._run(folder, limits, user)

    def _run(self, folder: str, limits: Limits, user: int) -> Outcome:
        text = {
            "seconds": int(limits.seconds) + 1, "memory": limits.memory, "file_size": limits.file_size,
            "processes": limits.processes, "folder": folder,
        }  # fmt: skip
        apart = (*self.unshare, *WAIT) if self.unshare else ()
        drop = _as_user(user) if self.own_user else ()
        command = [*apart, *drop, sys.executable, "-I", str(CHILD), json.dumps(text), "program.py"]
        environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryFile() as printed:  # the limit on files holds for what is printed too
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=printed,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(limits.seconds + SPARE)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
            size = printed.seek(0, os.SEEK_END)
            printed.seek(max(0, size - TAIL))
            return Outcome(code, printed.read().decode(errors="replace"))


def _as_user(user: int) -> tuple[str, ...]:
    rights = "-all,+dac_read_search"
    return (
        "setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", f"--inh-caps={rights}",
        f"--ambient-caps={rights}", f"--bounding-set={rights}",
    )  # fmt: skip


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends it and all that it has started; without unshare not what has left its session, which CPU time ends."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def find_sandbox() -> Sandbox:
    """The strongest that works here, found by trying. Raises RuntimeError where none does."""
    root = os.getuid() == 0
    unshare = ("unshare", *APART) if root else ("unshare", "--user", "--map-root-user", *APART)
    output = ""
    for apart in (unshare, ()):
        for own_user in (True, False) if root else (False,):
            if shutil.which("unshare" if apart else "sh") and shutil.which("setpriv" if own_user else "sh"):
                outcome = Sandbox(apart, own_user).run(_PROBE, Limits())
                if outcome.code == 0:
                    return Sandbox(apart, own_user, _missing(outcome.output, root))
                output = outcome.output
    raise RuntimeError(f"no program can be run with limits here: {output.strip()[-300:]}")


def _missing(output: str, root: bool) -> tuple[str, ...]:
    files, user, alone, network = output.split()
    lacks = {
        "reaching the network": network == "True",
        "signalling this user's other processes": alone == "False",
        "writing files wherever this user may": files == "no",
        "starting processes without limit": root and int(user) == 0,
    }
    return tuple(what for what, is_missing in lacks.items() if is_missing)
