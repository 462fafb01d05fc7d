"""`alignzoo data lint` with a recipe: what its chat template, tokenizer and lengths make of each row."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from alignzoo.data.encode import Pipeline
from alignzoo.data.lint_rules import Hits
from alignzoo.data.lint_scan import by_key
from alignzoo.data.rows import BadRow, Dropped, Example
from alignzoo.data.selection import held_key, hold_out, prompt_key, short
from alignzoo.data.template import Texts, render
from alignzoo.data.tokenise import Pieces, fit

Converter = Callable[[Example], tuple[Example, ...]]
_LIMITS = {  # reason: which length it is about
    "prompt-too-long": "prompt", "prompt-left": "prompt", "no-room-for-completion": "prompt",
    "completion-too-long": "completion", "completion-right": "completion", "no-room-for-prompt": "completion",
}  # fmt: skip


class TokenScan:
    """Rows rendered, tokenised and fitted as a run would do it; what is found goes to `hits`."""

    def __init__(self, pipeline: Pipeline, hits: Hits) -> None:
        self.pipeline, self.hits = pipeline, hits
        self.bos = pipeline.tokenizer.bos_token_id
        self._tried = False
        self._last: dict[str, int] = {}  # rule: the row that it was found in last
        self._kept = {"row": array("q"), "prompt_key": array("Q"), "held_key": array("Q")}

    def _hit(self, rule: str, row: int, where: str, detail: str = "", score: float = 0.0) -> None:
        """Once for each row, also where two examples are made of one."""
        if self._last.get(rule) != row:
            self._last[rule] = row
            self.hits.add(rule, where, detail, score)

    def add(self, rows: Sequence[tuple[int, Example]], change: Converter) -> None:
        """Some rows by their numbers, as the source holds them. change: to the kind that the loss wants."""
        ready: list[tuple[int, Example, Texts]] = []
        for number, example in rows:
            try:
                for one in change(example):
                    ready.append((number, one, render(one, self.pipeline.template, self.pipeline.tokenizer)))
            except BadRow as problem:
                self._hit(problem.reason, number, example.where, problem.text)
            except Dropped as dropped:
                self._hit(dropped.reason, number, example.where)
        encoded = self.pipeline.encoder.encode([texts for _, _, texts in ready])
        for (number, example, texts), pieces in zip(ready, encoded, strict=True):
            if isinstance(pieces, BadRow):
                self._hit(pieces.reason, number, example.where, pieces.text)
            else:
                self._look_at(number, example, texts, pieces)

    def _look_at(self, number: int, example: Example, texts: Texts, pieces: Pieces) -> None:
        where, whole = example.where, (*texts.wholes, texts.prompt)[0]
        for key, details in by_key(texts.notes).items():
            self._hit(key, number, where, ", ".join(filter(None, details)))
        beginning = np.concatenate([pieces.prompt[:2], *(one.ids[:2] for one in pieces.completions[:1])])[:2].tolist()
        if self.bos is not None and beginning == [self.bos, self.bos]:
            self._hit("doubled-bos", number, where, repr(whole[:60]))
        if not texts.closed or (texts.raw and pieces.completions and self.pipeline.encoder.eos is None):
            self._hit("open-end", number, where, repr(whole[-60:]))
        self._try_elsewhere(where, texts, whole)
        try:
            _, cuts = fit(pieces, self.pipeline.limits)
        except Dropped as dropped:
            self._say_length(dropped.reason, number, where, pieces)
            return
        for cut in cuts:
            self._say_length(cut, number, where, pieces)
        self._kept["row"].append(number)
        self._kept["prompt_key"].append(short(prompt_key(texts.key)))
        self._kept["held_key"].append(held_key(example))

    def _try_elsewhere(self, where: str, texts: Texts, whole: str) -> None:
        """Whether a tokenizer that adds its special tokens to rendered text doubles BOS; tried on one row."""
        if self._tried or texts.raw or self.bos is None:
            return
        self._tried = True
        doubled = self.pipeline.tokenizer(whole[:200])["input_ids"][:2] == [self.bos, self.bos]
        if doubled and "doubled-bos" not in self.hits.counts:
            self.hits.add("bos-elsewhere", where)
            self.hits.of["bos-elsewhere"] = 1

    def _say_length(self, reason: str, number: int, where: str, pieces: Pieces) -> None:
        prompt, completion = len(pieces.prompt), pieces.longest
        score = {"prompt": prompt, "completion": completion}.get(_LIMITS.get(reason, ""), prompt + completion)
        words = f"prompt {prompt}, completion {completion} tokens; data.max_length is {self.pipeline.limits.total}"
        self._hit(reason, number, where, words, score)

    def held_out(self, counts: npt.NDArray[np.int64], fraction: float) -> npt.NDArray[np.bool_]:
        """Which rows data.eval_fraction holds out, as a run would do it. counts: how often each row counts, (rows,)."""
        held = np.zeros(len(counts), np.bool_)
        rows, prompts, places = (np.frombuffer(column, column.typecode) for column in self._kept.values())
        used = counts[rows] > 0
        if used.any():
            chosen = hold_out(prompts[used], places[used], fraction)
            held[rows[used][chosen]] = True
        return held
