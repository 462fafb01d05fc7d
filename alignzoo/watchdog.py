"""Ends a run in which nothing moves any more, with the stack of every rank.

A rank that hangs lets all others wait for it, so each finds out by itself and tells where it stands.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from alignzoo.ranks import leave

EXIT = 1  # of a run that was ended


class Watchdog:
    """`beat` says what begins; `seconds` without a beat end the process. 0 seconds: never."""

    def __init__(self, seconds: float, rank: int, run: Path) -> None:
        """run: its directory gets the stacks as stacks/rank-N.txt, beside what stderr gets."""
        self.seconds, self.rank, self.folder = seconds, rank, run / "stacks"
        self._doing, self._since = "starting", time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()

    def beat(self, doing: str | None = None) -> None:
        """A sign of life; `doing` names what begins now."""
        self._doing, self._since = doing or self._doing, time.monotonic()

    def _watch(self) -> None:
        while not self._end.wait(min(self.seconds / 4, 5.0)):
            if time.monotonic() - self._since > self.seconds:
                self._stop()

    @staticmethod
    def _write(to: TextIO | None, title: str) -> None:
        if to is not None:
            to.write(title)
            to.flush()
            faulthandler.dump_traceback(to, all_threads=True)

    def _stop(self) -> None:
        title = (
            f"rank {self.rank}: nothing moved for {self.seconds:g} s (engine.hang_timeout), last at: {self._doing}\n"
            "the stack of each of its threads, most recent call first:\n"
        )
        self._write(sys.__stderr__, title)
        with contextlib.suppress(OSError):  # a full disk shall not keep it from ending
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank-{self.rank}.txt").open("w", encoding="utf-8") as file:
                self._write(file, title)
        leave(
            f"nothing moved for {self.seconds:g} s (engine.hang_timeout), last at: {self._doing}; stacks: {self.folder}"
        )
        time.sleep(min(self.seconds, 2.0))  # the others stand still too, and tell where
        os._exit(EXIT)
