"""Does the program in the answer pass the tests of the row?"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import alignzoo
from alignzoo.errors import PluginError
from alignzoo_rewards.sandbox import Limits, Sandbox, find_sandbox

RISK = (
    "it runs programs that the model wrote on this machine, in a process with limits on time, memory, files, processes "
    "and, where the system lets it, network; that is no wall against a program that means harm. "
    "Set allow_execution = true to allow it, best in a container or on a machine that holds nothing of value"
)


@dataclass(frozen=True)
class Settings:
    allow_execution: bool = alignzoo.setting(
        False, "must be true: programs that the model wrote are run on this machine"
    )
    tests: str = alignzoo.setting("tests", "column with the tests: Python that raises, e.g. asserts; or a list of such")
    value: Literal["all", "share"] = alignzoo.setting("all", "all: 1 where every test passes, else 0; share: that pass")
    seconds: float = alignzoo.setting(10.0, "time for a program with a test", gt=0)
    memory_mb: int = alignzoo.setting(512, "address space of each process, in MiB", ge=64)
    processes: int = alignzoo.setting(16, "processes and threads that a program may have at once", ge=1)
    workers: int = alignzoo.setting(4, "programs at the same time, on each rank", ge=1)

    def __post_init__(self) -> None:
        if not self.allow_execution:
            raise ValueError(RISK)


class Code(alignzoo.Reward):
    """1 where the Python program in the completion passes the tests of the row; None where the row has no tests.

    The program is the last fenced block that is marked as Python or not at all, else the whole completion. It and the
    tests run in one process; a program that ends before the tests do has failed, whatever its exit code is.
    """

    name = "code"
    Settings = Settings
    sandbox: Sandbox

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.settings.tests,)

    def start(self, device: Any) -> str:
        try:
            self.sandbox = find_sandbox()
        except RuntimeError as error:
            raise PluginError(str(error), fix="leave the reward out, or use another machine") from error
        missing = ", ".join(self.sandbox.missing)
        return "programs are run with limits; " + (
            f"WARNING: on this machine nothing keeps them from: {missing}" if missing else "without a network"
        )

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        with ThreadPoolExecutor(self.settings.workers) as pool:
            return list(pool.map(self._value, completions, columns[self.settings.tests]))

    def _value(self, completion: str, tests: Any) -> float | None:
        if tests is None:
            return None
        listed = [tests] if isinstance(tests, str) else [str(test) for test in tests]
        if not listed:
            return None
        program = program_of(completion)
        if self.settings.value == "all":
            return float(self._passes(program, "\n".join(listed)))
        return sum(self._passes(program, test) for test in listed) / len(listed)

    def _passes(self, program: str, test: str) -> bool:
        token = secrets.token_hex(16)
        limits = Limits(self.settings.seconds, self.settings.memory_mb * 2**20, self.settings.processes)
        outcome = self.sandbox.run(f"{program}\n\n{test}\n\nprint('\\n{token}')\n", limits)
        return outcome.code == 0 and token in outcome.output.splitlines()


_BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


def program_of(completion: str) -> str:
    """The last fenced block that is marked as Python or not at all; the whole text where there is none."""
    blocks = [
        text for language, text in _BLOCK.findall(completion) if language.lower() in ("", "py", "python", "python3")
    ]
    return blocks[-1] if blocks else completion
