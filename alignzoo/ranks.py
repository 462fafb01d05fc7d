"""Which of several ranks this process is, quiet ranks, and whose error a person gets to see. It imports no torch.

Under `launch` a failing rank leaves its error in a folder that the parent made, and the parent shows the first one that
is no mere echo of another rank's end. Under torchrun, deepspeed or accelerate there is no such folder, and each rank
decides by itself whether it has something to say.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from alignzoo.errors import AlignzooError

Say = Callable[[str], None]

ERRORS = "ALIGNZOO_ERRORS"  # the folder for the errors of ranks that `launch` started
PARENT = "ALIGNZOO_PARENT"  # the process id of `launch`
FAILED = "failed"  # a file there, made when a rank has ended badly
_LAST_SECONDS = 20  # a failed rank that cannot even end within these is ended
_TOGETHER = 3.0  # seconds that a failed rank waits for others with the same error


# --- which rank this is ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rank:
    """This process among those that train, as its launcher's environment tells."""

    rank: int = 0
    local: int = 0  # on its machine
    world: int = 1

    @classmethod
    def here(cls, environment: Mapping[str, str] | None = None) -> Rank:
        found = os.environ if environment is None else environment

        def number(name: str, default: int) -> int:
            text = found.get(name, "")
            return int(text) if text.isdecimal() else default

        rank = number("RANK", 0)
        return cls(rank, number("LOCAL_RANK", rank), number("WORLD_SIZE", 1))

    @property
    def many(self) -> bool:
        return self.world > 1


_QUIET = {
    "TRANSFORMERS_VERBOSITY": "critical",
    "DATASETS_VERBOSITY": "critical",
    "DIFFUSERS_VERBOSITY": "critical",
    "HF_HUB_VERBOSITY": "critical",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}


def quiet_unless_first() -> None:
    """Of several ranks only the first warns and logs. To be called before transformers or torch is imported.

    A rank that `launch` started also asks to be told to end when its parent dies, so that none is left behind.
    """
    here = Rank.here()
    if not here.many:
        return
    if ERRORS in os.environ:
        _end_with_parent()
    # DeepSpeed's use of torch.distributed, at every collective
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    if here.rank > 0:
        os.environ.update(_QUIET)
        logging.disable(logging.ERROR)
        warnings.simplefilter("ignore")


def _end_with_parent() -> None:
    """SIGTERM when the parent is gone; Linux only."""
    import ctypes

    set_death_signal = 1
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "prctl"):
        library.prctl(set_death_signal, signal.SIGTERM)
        if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):  # it was gone before
            os.kill(os.getpid(), signal.SIGTERM)


# --- the errors of ranks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """How a rank ended: what it says, and whether that is only the echo of another rank's end."""

    rank: int
    time: float  # seconds since 1970
    text: str
    exit_code: int
    echo: bool

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Report:
        interrupted = isinstance(error, KeyboardInterrupt)
        code = error.exit_code if isinstance(error, AlignzooError) else 130 if interrupted else 1
        return cls(rank, time.time(), describe(error), code, interrupted or is_echo(error))


def describe(error: BaseException) -> str:
    """An AlignzooError in its own words; of any other, which is a bug, the traceback."""
    if isinstance(error, AlignzooError):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


_ECHO = re.compile(
    r"connection (was )?(closed|reset|refused|aborted) by (remote )?peer|connection reset|broken pipe|"
    r"remote process (has )?(exited|terminated)|ncclRemoteError|ncclCommAbort|communicator was aborted|"
    r"failed to recv, got 0 bytes|socket closed|"
    r"connection was likely closed|application timeout caused pair closure|nccl.*remote.*(error|exited)",
    re.IGNORECASE,
)


def is_echo(error: BaseException) -> bool:
    """Is this what a rank sees when another one has gone? Its cause, and what it came from, are looked at too."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, RuntimeError) and _ECHO.search(str(link)):  # an OSError is the hub's, or a pipe's
            return True
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return False


def another_rank_failed() -> bool:
    """Has another rank failed, so that nothing is left to do that needs all ranks? Known under `launch` only.

    A SIGTERM that comes then asks for no checkpoint: it cannot be made.
    """
    if ERRORS not in os.environ:
        return False
    folder = Path(os.environ[ERRORS])
    return (folder / FAILED).exists() or any(r.rank != Rank.here().rank for r in read_reports(folder))


def read_reports(folder: Path) -> list[Report]:
    """The errors that ranks have left, the earliest first."""
    reports = [Report(**json.loads(file.read_text(encoding="utf-8"))) for file in folder.glob("rank-*.json")]
    return sorted(reports, key=lambda r: (r.time, r.rank))


def tell(error: BaseException, echo: Say) -> int:
    """Says, or leaves for the parent to say, what ended this rank. Returns the exit code. `echo` prints on stderr."""
    here = Rank.here()
    report = Report.of(error, here.rank)
    if ERRORS in os.environ:
        _leave(report, here, Path(os.environ[ERRORS]), wait=isinstance(error, AlignzooError))
    elif isinstance(error, KeyboardInterrupt):
        pass  # the command line says it
    elif here.rank > 0 and getattr(error, "on_all_ranks", False):
        pass
    elif report.echo:
        if here.rank == 0:
            echo("stopped: another rank failed, see its error")
    elif here.local == 0 or not _alike_on_one_machine(report):
        echo(f"error: {report.text if here.rank == 0 else by_rank([here.rank], report.text)}")
    return report.exit_code


def by_rank(ranks: Sequence[int], text: str) -> str:
    """'rank 1: ...', or 'ranks 1, 3: ...'; a traceback begins on a line of its own."""
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return f"{who}:{chr(10) if text.startswith('Traceback') else ' '}{text}"


def end_in_time() -> None:
    """Ends this process, should its failed rank hang while Python shuts down: the launcher waits for its end."""
    if Rank.here().many:
        faulthandler.dump_traceback_later(_LAST_SECONDS, exit=True, file=os.open(os.devnull, os.O_WRONLY))


def _alike_on_one_machine(report: Report) -> bool:
    """A mistake of the user that is found before the ranks are joined is found by all ranks of a machine."""
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return report.exit_code == AlignzooError.exit_code and not joined


def leave(text: str, exit_code: int = 1) -> None:
    """Tells the parent why this rank is about to end without an exception. Nothing where there is no such parent."""
    if ERRORS in os.environ:
        here = Rank.here()
        report = Report(here.rank, time.time(), text, exit_code, echo=False)
        _leave(report, here, Path(os.environ[ERRORS]), wait=False)


def _leave(report: Report, here: Rank, folder: Path, *, wait: bool) -> None:
    """Writes the report, whole or not at all. With `wait` it stays until all ranks have reported, or a moment."""
    draft = folder / f"draft-{here.rank}"
    try:
        draft.write_text(json.dumps(asdict(report)), encoding="utf-8")
        draft.replace(folder / f"rank-{here.rank}.json")
    except OSError as error:  # a full disk; the parent may be gone too
        sys.stderr.write(f"rank {here.rank}: {report.text}\n(not left for the parent: {error})\n")
        return
    until = time.monotonic() + _TOGETHER
    while wait and len(read_reports(folder)) < here.world and time.monotonic() < until:
        time.sleep(0.05)
