"""When a run ends before its last step, and which of its models was the best.

A signal asks for a stop after the step that is under way; a second one ends the run at once.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import Any

from alignzoo.errors import AlignzooError
from alignzoo.progress import Say
from alignzoo.ranks import another_rank_failed
from alignzoo.recipe import Recipe

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOGETHER = 1.0  # seconds within which a signal that comes twice is one: launchers and shells both hand it on


class Interrupted(AlignzooError):
    """A signal ended the run, after a checkpoint. The exit code is a shell's: 128 and the signal's number."""

    def __init__(self, number: int, what: str, *, fix: str = "") -> None:
        super().__init__(what, fix=fix, on_all_ranks=True)
        self.exit_code = 128 + number


class Signals:
    """While it is entered, the first SIGINT or SIGTERM is only noted; the next one acts as it always did."""

    def __init__(self, say: Say) -> None:
        self.asked: int = 0  # the signal's number
        self.words = "stopping after this step, with a checkpoint; once more: at once"
        self._say = say
        self._since = 0.0
        self._before: dict[int, Any] = {}

    @staticmethod
    def name(number: int) -> str:
        """Of a signal, e.g. SIGTERM."""
        return signal.Signals(number).name

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as under nohup
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._since < TOGETHER:
            return
        if self.asked or another_rank_failed():  # where one rank is gone, no checkpoint can be made
            before = self._before.get(number)
            self._restore()
            if callable(before):
                before(number, frame)
                return
            raise SystemExit(128 + number)
        self.asked, self._since = number, now
        self._say(f"{self.name(number)}: {self.words}")


@dataclass
class Best:
    """The best evaluation so far."""

    metric: str | None = None
    value: float | None = None
    step: int = 0
    since: int = 0  # evaluations without a better one


class Stopping:
    """Reads each evaluation: is it the best, and shall the run end."""

    def __init__(self, recipe: Recipe, state: Mapping[str, Any] | None = None) -> None:
        self.settings, self.recipe = recipe.eval, recipe
        self.best = Best(**(state or {}))
        if self.best.metric != self.settings.best_metric:  # another one since the run was interrupted
            self.best = Best(self.settings.best_metric)

    @property
    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self.best)

    def check(self, line: Mapping[str, float]) -> None:
        """Raises RecipeError where an evaluation, {} without held-out rows, has not the metrics that are asked for."""
        if self.settings.best_metric is not None:
            self._metric(line, self.settings.best_metric, "best_metric")
        if self.settings.max_kl is not None:
            self._metric(line, f"eval_{self.settings.max_kl_metric}", "max_kl_metric")

    def look(self, line: Mapping[str, float]) -> bool:
        """Whether this evaluation is the best one. Raises RecipeError where it has no metric of that name."""
        name = self.settings.best_metric
        if name is None or not line:
            return False
        value = self._metric(line, name, "best_metric")
        sign = -1.0 if self._lower_is_better(name) else 1.0
        if math.isnan(value) or (self.best.value is not None and sign * value <= sign * self.best.value):
            self.best.since += 1
            return False
        self.best = Best(name, value, int(line["step"]))
        return True

    def reason(self, line: Mapping[str, float]) -> str:
        """Why the run ends here, in words; "" where it goes on."""
        patience, limit = self.settings.patience, self.settings.max_kl
        if patience is not None and self.best.since >= patience:
            best = (
                "never a number"
                if self.best.value is None
                else f"best at step {self.best.step} ({self.best.value:.6g})"
            )
            return (
                f"{self.settings.best_metric} was {best}, and {self.best.since} evaluations did not better it "
                "(eval.patience)"
            )
        if limit is not None and line:
            name = f"eval_{self.settings.max_kl_metric}"
            value = self._metric(line, name, "max_kl_metric")
            if not abs(value) <= limit:  # NaN too
                return f"|{name}| is {abs(value):.4g}, more than eval.max_kl = {limit:g}"
        return ""

    def _metric(self, line: Mapping[str, float], name: str, key: str) -> float:
        if name in line:
            return line[name]
        raise self.recipe.error(
            ("eval", key),
            f'eval.{key}: there is no metric "{name}"',
            fix="one of " + ", ".join(sorted(k.removeprefix("eval_") if key != "best_metric" else k for k in line)),
        )

    def _lower_is_better(self, name: str) -> bool:
        wanted = self.settings.best
        return "loss" in name or "ties" in name if wanted == "auto" else wanted == "lowest"
