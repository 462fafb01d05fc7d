"""What a person sees while a run goes on: a bar in a terminal, plain lines where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from weakref import WeakKeyDictionary

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Say = Callable[[str], None]
_SAID: WeakKeyDictionary[Console, list[str]] = WeakKeyDictionary()


def sayer(console: Console) -> Say:
    """Prints a line as it is: no markup, no wrapping, no colours. `said` has it afterwards."""
    lines = said(console)

    def say(text: str) -> None:
        lines.append(text)
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    return say


def said(console: Console) -> list[str]:
    """All that sayers of this console have said so far, for the report. Clear it where a run begins."""
    return _SAID.setdefault(console, [])


_SHOWN = {"loss": "loss", "accuracies": "acc", "margins": "margin", "reward": "reward", "tokens_per_second": "tok/s"}


class StepProgress:
    """A progress bar over optimizer steps, or about twenty lines where the output is no terminal."""

    def __init__(self, console: Console, total: int, title: str, start: int = 0) -> None:
        """start: steps that were done before."""
        self.console, self.total, self.title, self.start = console, total, title, start
        self.started = time.monotonic()
        self.every = max(1, total // 20)
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
            )
            self.bar = Progress(
                *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console
            )
            self.task = self.bar.add_task(title, total=total, completed=start, shown="")

    def __enter__(self) -> StepProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        shown = brief(metrics or {})
        if self.bar:
            self.bar.update(self.task, completed=step, shown=shown)
        elif step % self.every == 0 or step in (self.start + 1, self.total):
            spent = time.monotonic() - self.started
            left = spent / max(step - self.start, 1) * (self.total - step)
            self.console.print(
                f"{self.title} {step}/{self.total}  {shown}  {spent:.0f} s, {left:.0f} s left", highlight=False
            )


def brief(metrics: Mapping[str, float]) -> str:
    """The few numbers that fit in a line: loss, accuracy, margin, tokens/s."""
    parts = []
    for name, value in metrics.items():
        label = _SHOWN.get(name.removeprefix("eval_").rpartition("/")[2])
        if label:
            parts.append(f"{label} {value:.0f}" if label == "tok/s" else f"{label} {value:.4g}")
    return "  ".join(parts)
