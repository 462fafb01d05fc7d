"""How far the preparation of data is, shown where it takes longer than a moment."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from alignzoo.progress import Say

_PATIENCE = 2.0  # seconds until the first sign
_PAUSE = 10.0  # seconds between lines, then ever longer


class Watch:
    """A bar in a terminal, else a line now and then. It is told of every batch."""

    def __init__(self, say: Say, console: Console | None = None) -> None:
        self._say, self._console = say, console if console is not None and console.is_terminal else None
        self._bar: Progress | None = None
        self._begin("")

    def _begin(self, name: str) -> None:
        self._name, self._started = name, time.monotonic()
        self._next, self._pause = _PATIENCE, _PAUSE

    def update(self, name: str, rows: int, share: float | None) -> None:
        """rows: of the source, read so far. share: of the source, from 0 to 1, None where it is not known."""
        if name != self._name:
            self.close()
            self._begin(name)
        spent = time.monotonic() - self._started
        if self._console is not None and (self._bar or spent > _PATIENCE):
            self._draw(self._console, rows, share)
        elif self._console is None and spent > self._next:
            part = f", {share:.0%}, {spent / share - spent:.0f} s left" if share else ""
            self._say(f"preparing {name}: {rows:,} rows in {spent:.0f} s{part}")
            self._pause *= 1.5
            self._next = spent + self._pause

    def _draw(self, console: Console, rows: int, share: float | None) -> None:
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
            self._bar = Progress(  # no thread of its own: processes are forked while it is shown
                *columns, TextColumn("left"), TimeRemainingColumn(), console=console, auto_refresh=False, transient=True
            )
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        self._bar.update(
            self._task, description=f"preparing {self._name}: {rows:,} rows", completed=share or 0.0,
            total=None if share is None else 1.0, refresh=True,
        )  # fmt: skip

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
