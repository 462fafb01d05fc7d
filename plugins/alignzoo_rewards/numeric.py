"""Is the answer mathematically that of the row?"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import alignzoo
from alignzoo.errors import PluginError
from alignzoo_rewards.exact import after_mark

WORKER = Path(__file__).with_name("math_worker.py")


@dataclass(frozen=True)
class Settings:
    answer: str = alignzoo.setting("answer", "column with the right answer")
    after: str = alignzoo.setting(
        "####", "only what follows the last of these marks counts, in the answer and in the completion; as GSM8K has it"
    )
    seconds: float = alignzoo.setting(5.0, "time to compare one completion; 0 is its value if that is not enough", gt=0)


class Numeric(alignzoo.Reward):
    """1 where math-verify takes the completion's answer for the row's, else 0. It needs the extra math.

    In the completion math-verify looks for a boxed answer, another LaTeX expression or the last number, in this order.
    None where the row has no answer, or one that math-verify cannot read.
    """

    name = "numeric"
    Settings = Settings

    def __init__(self, settings: Any = None, /, **values: Any) -> None:
        super().__init__(settings, **values)
        if importlib.util.find_spec("math_verify") is None:
            raise PluginError("the package math-verify is not installed", fix="pip install 'alignzoo[math]'")
        self._worker: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # a call that was given up may still be at work

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.settings.answer,)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | Exception | None]:
        with self._lock:
            return [self._value(*pair) for pair in zip(completions, columns[self.settings.answer], strict=True)]

    def _value(self, completion: str, answer: Any) -> float | Exception | None:
        if answer is None:
            return None
        if self._worker is None or self._worker.poll() is not None:
            self._worker = _started()
        stdin, stdout = self._worker.stdin, self._worker.stdout
        assert stdin is not None and stdout is not None, "both are pipes"
        texts = {"answer": str(answer), "completion": completion}
        stdin.write(json.dumps({key: after_mark(text, self.settings.after) for key, text in texts.items()}) + "\n")
        stdin.flush()
        clock = threading.Timer(self.settings.seconds, self._worker.kill)
        clock.start()
        line = stdout.readline()
        clock.cancel()
        if line:
            return json.loads(line)["value"]  # type: ignore[no-any-return]
        if self._worker.wait() == -signal.SIGKILL:
            return 0.0
        return RuntimeError(f"math-verify's process ended with code {self._worker.returncode}")


def _started() -> subprocess.Popen[str]:
    """A worker that has imported math-verify. Raises RuntimeError where it cannot."""
    command = [sys.executable, "-P", str(WORKER)]  # -P: a file beside it is called code.py
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert worker.stdin is not None and worker.stdout is not None, "both are pipes"
    worker.stdin.write(json.dumps({"answer": "1", "completion": "1"}) + "\n")
    worker.stdin.flush()
    if not worker.stdout.readline():
        raise RuntimeError(f"its process ended with code {worker.wait()}: see the lines above")
    return worker
