"""Examples -> packed rows: rendered, tokenised, fitted, hashed. In this process, and in several where it takes long."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from alignzoo.data.rows import BadRow, Dropped, Example, Turns
from alignzoo.data.selection import held_key, ids_key, prompt_key, ring_key, short
from alignzoo.data.store import COLUMNS, Packed, packed_mask
from alignzoo.data.template import Template, Texts, render
from alignzoo.data.tokenise import Encoder, Limits, Pieces, fit
from alignzoo.errors import DataError
from alignzoo.recipe import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUT = "cut:"  # before the marks that say what was cut; the others are notes
PATIENCE = 2.0  # seconds of work in one process before others are started
_MOST_WORKERS = 16  # beyond that the process that reads the rows is the slowest


@dataclass(frozen=True)
class Pipeline:
    """What all sources of a run share."""

    data: Data
    kind: str
    tokenizer: PreTrainedTokenizerBase
    template: Template
    encoder: Encoder
    limits: Limits


@dataclass(frozen=True)
class Encoded:
    """What became of a batch of examples."""

    packed: Packed
    bad: Sequence[tuple[str, BadRow]] = ()  # where and why
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        return len(self.packed.marks)


def encode(pipeline: Pipeline, name: str, examples: Sequence[Example]) -> Encoded:
    """The rows of a batch. name: of the source, with which the place of each example begins."""
    packer, bad, dropped = _Packer(name), [], Counter[str]()
    rendered: list[tuple[Example, Texts]] = []
    for example in examples:
        try:
            rendered.append((example, render(example, pipeline.template, pipeline.tokenizer)))
        except BadRow as problem:
            bad.append((example.where, problem))
    encoded = pipeline.encoder.encode([texts for _, texts in rendered])
    for (example, texts), pieces in zip(rendered, encoded, strict=True):
        try:
            if isinstance(pieces, BadRow):
                raise pieces
            packer.add(example, texts, *fit(pieces, pipeline.limits), joined=pieces.joined)
        except BadRow as problem:
            bad.append((example.where, problem))
        except Dropped as too_long:
            dropped[too_long.reason] += 1
    return Encoded(packer.packed(), bad, dropped)


def _last_turn(prompt: Turns) -> str:
    return prompt if isinstance(prompt, str) else "".join(turn["content"] for turn in prompt[-1:])


class _Packer:
    """Collects rows as columns."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rows: list[dict[str, int]] = []
        self._marks: list[tuple[str, ...]] = []
        self._parts: dict[str, list[Any]] = {"tokens": [], "text": [], "lengths": []}
        self._ends = dict.fromkeys(self._parts, 0)

    def add(self, example: Example, texts: Texts, pieces: Pieces, cuts: tuple[str, ...], *, joined: bool) -> None:
        completions = pieces.completions
        lengths = [len(completion.ids) for completion in completions]
        place, asked = example.where.removeprefix(self._name), _last_turn(example.prompt)
        whole: list[Any] = [example.prompt, dict(example.columns)] if example.kind == "prompts" else []
        whole += [example.rewards] if example.rewards is not None else []
        text = json.dumps([place, asked, dict(example.extra), *whole], ensure_ascii=False, default=str)
        self._put("tokens", np.concatenate([pieces.prompt, *(c.ids for c in completions), packed_mask(completions)]))
        self._put("text", np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8))
        self._put("lengths", np.asarray(lengths, np.int32))
        ids = (pieces.prompt, *(c.ids for c in completions))
        prompt = prompt_key(texts.key)
        self._rows.append(
            {
                "tokens_end": self._ends["tokens"],
                "text_end": self._ends["text"],
                "completions_end": self._ends["lengths"],
                "label": -1 if example.label is None else int(example.label),
                "prompt": len(pieces.prompt),
                "total": len(pieces.prompt) + sum(lengths),
                "longest": max(lengths, default=0),
                "own": completions[0].counted if completions else 0,
                "highest": max((int(part.max()) for part in ids if len(part)), default=-1),
                "prompt_key": short(prompt),
                "ids_key": ids_key(pieces.prompt),
                "held_key": held_key(example),
                "weight_key": example.weight_key,
                "ring_key": ring_key(prompt, ids),
            }
        )
        found = {"joined": joined and texts.prefix, "other-prompt": not texts.prefix, "open-end": not texts.closed}
        notes = dict.fromkeys((*texts.notes, *(note for note, holds in found.items() if holds)))
        self._marks.append((*(f"{CUT}{cut}" for cut in cuts), *notes))

    def _put(self, column: str, values: Any) -> None:
        self._parts[column].append(values)
        self._ends[column] += len(values)

    def packed(self) -> Packed:
        columns: dict[str, Any] = {}
        for name, dtype in COLUMNS.items():
            if name in self._parts:
                columns[name] = np.concatenate([np.empty(0, dtype), *self._parts[name]])
            elif name != "marks":
                columns[name] = np.asarray([row[name] for row in self._rows], dtype)
        return Packed(columns, self._marks)


# --- several processes


def encode_all(pipeline: Pipeline, name: str, batches: Iterator[list[Example]]) -> Generator[Encoded, None, None]:
    """What becomes of each batch, in their order, whatever the number of processes.

    Errors come in that order too: what goes wrong in the reading of a batch is raised after the batches before it.
    """
    started, workers = time.monotonic(), _workers()
    for batch in batches:
        yield encode(pipeline, name, batch)
        if workers > 1 and time.monotonic() - started > PATIENCE:
            break
    else:
        return
    yield from _in_parallel(pipeline, name, batches, workers)


def _workers() -> int:
    """Processes that can work at once. They are forked: a spawned one would import the user's script again."""
    if sys.platform != "linux":
        return 1
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


def _in_parallel(pipeline: Pipeline, name: str, batches: Iterator[list[Example]], workers: int) -> Iterator[Encoded]:
    failed: Exception | None = None
    waiting: deque[Future[Encoded]] = deque()
    with _pool(pipeline, name, workers) as pool:
        while True:
            try:
                batch = None if failed else next(batches, None)
            except Exception as error:  # raised when the batches before it are through
                failed, batch = error, None
            if batch is not None:
                waiting.append(pool.submit(_encode_here, batch))
                if len(waiting) <= 2 * workers:  # so many batches are in memory at most
                    continue
            if not waiting:
                break
            yield waiting.popleft().result()
    if failed:
        raise failed


@contextmanager
def _pool(pipeline: Pipeline, name: str, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Forked processes that have the pipeline: nothing is pickled but examples and rows."""
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_adopt, initargs=(pipeline, name))
    set_by_user = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork; set, it is not warned about either
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            yield pool
    except BrokenProcessPool as error:
        raise DataError(
            f"{name}: a process that prepares the data was stopped from outside",
            why="most often the machine has no memory left",
            fix="free memory, or start again: sources that were finished come from the cache",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if set_by_user is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = set_by_user


_adopted: tuple[Pipeline, str] | None = None  # in a forked process only


def _adopt(pipeline: Pipeline, name: str) -> None:
    global _adopted
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by this, whatever it does at that signal itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _adopted = pipeline, name


def _end_with_parent() -> None:
    """Ends this process where its parent was killed: nobody else would."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_here(examples: list[Example]) -> Encoded:
    assert _adopted is not None
    return encode(*_adopted, examples)
