"""`alignzoo data lint`, row by row: what is wrong with a text is counted at once, the rest kept as hashes and sketches.

Of each row about 300 bytes stay in memory, however long it is.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alignzoo.data.language import Languages
from alignzoo.data.lint_rules import Hits, Thresholds
from alignzoo.data.rows import BadRow, Example, Tally, Turns, content_hash
from alignzoo.data.selection import short
from alignzoo.data.sketch import MINIMA, Shingles, jaccard, normalised, shingles, sketch

_NUMBER = re.compile(r"\d+$")
_BROKEN = re.compile(r"[\ufffd\x00-\x08\x0e-\x1f\x7f]|Ã[\u0080-\u00bf]|â€[\u0099\u009c\u009d\u2122\u0153]")
_MARKERS = re.compile(
    r"<\|(?:im_start|im_end|endoftext|begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|user|assistant|"
    r"system|end)\|>|<(?:start|end)_of_turn>|\[/?INST\]|<<SYS>>|</s>"
)
_COLUMNS = {  # of each row: array's type code
    "source": "H", "number": "q", "row_key": "Q", "prompt_key": "Q", "answers_key": "Q", "label": "b",
    "first": "i", "second": "i",
}  # fmt: skip


@dataclass
class CountedBadRows(Tally):
    """A tally that gives each bad row to `hits`."""

    hits: Hits = field(default_factory=lambda: Hits(0))

    def add_bad(self, where: str, problem: BadRow) -> None:
        super().add_bad(where, problem)
        self.hits.add(problem.reason, where, problem.text)


@dataclass
class Scanned:
    """A source: its name up to the number of a row, and which side it is on."""

    name: str
    held_out: bool
    kind: str = ""
    prefix: str = ""


class Scan:
    """All rows of all sources. `add` looks at one, the columns are there afterwards."""

    def __init__(self, limits: Thresholds) -> None:
        self.limits, self.hits = limits, Hits(limits.rows)
        self.sources: list[Scanned] = []
        self.languages: Counter[str] = Counter()
        self.identifier = Languages()
        self._columns = {name: array(code) for name, code in _COLUMNS.items()}
        self._sketches = {"prompt": bytearray(), "answer": bytearray()}

    def __len__(self) -> int:
        return len(self._columns["number"])

    def column(self, name: str) -> Any:
        """A column as an array, (rows,): row_key of all content, prompt_key, answers_key of the answers in any order;
        label: 1 for desirable and for pairs whose answers are in order, 0, or -1; first, second: lengths in characters.
        """
        return np.frombuffer(self._columns[name], self._columns[name].typecode)

    def sketches(self, name: str) -> Any:
        """Sketches of "prompt" or "answer", (rows, MINIMA)."""
        return np.frombuffer(self._sketches[name], np.uint8).reshape(-1, MINIMA)

    def where(self, row: int) -> str:
        """ "file:line" of a row."""
        return f"{self.sources[self._columns['source'][row]].prefix}{self._columns['number'][row]}"

    def add(self, example: Example) -> None:
        """A row of the last of `sources`."""
        source, place = self.sources[-1], _NUMBER.search(example.where)
        assert place is not None, "sources number their rows"
        source.kind, source.prefix = example.kind, example.where[: place.start()]
        prompt, answers = said(example.prompt), [said(completion) for completion in example.completions]
        parts = [shingles(text) for text in (prompt, *answers)]
        self._keep(example, int(place[0]), prompt, answers, parts)
        for key, details in by_key(example.notes).items():
            self.hits.add(key, example.where, ", ".join(filter(None, details)))
        self._look_at_texts(example, prompt, answers)
        if example.kind == "pairs":
            self._look_at_pair(example.where, answers, jaccard(parts[1], parts[2]))

    def _keep(
        self, example: Example, number: int, prompt: str, answers: Sequence[str], parts: Sequence[Shingles]
    ) -> None:
        answer = sketch(parts[1] if answers else parts[0])
        asked = (normalised(prompt or "".join(answers)), system_text(example.prompt), example.tools)
        keys = [short(content_hash(normalised(text))) for text in answers]
        ordered = len(keys) < 2 or keys[0] <= keys[1]
        values = {
            "source": len(self.sources) - 1,
            "number": number,
            "row_key": example.weight_key,
            "prompt_key": short(content_hash(asked)),  # text without a prompt is its own
            "answers_key": short(content_hash(asked, sorted(keys))),
            "label": int(ordered) if example.kind == "pairs" else -1 if example.label is None else int(example.label),
            "first": len(answers[0]) if answers else 0,
            "second": len(answers[-1]) if answers else 0,
        }
        for name, value in values.items():
            self._columns[name].append(value)
        self._sketches["prompt"] += (sketch(parts[0]) if prompt else answer).tobytes()
        self._sketches["answer"] += answer.tobytes()

    def _look_at_texts(self, example: Example, prompt: str, answers: Sequence[str]) -> None:
        where, texts = example.where, (prompt, *answers)
        for rule, pattern in (("broken-text", _BROKEN), ("template-in-text", _MARKERS)):
            found = [match for text in texts for match in pattern.findall(text)]
            if found:
                shown = ", ".join(map(repr, dict.fromkeys(found[:3])))
                self.hits.add(rule, where, f"{len(found)} x {shown}", len(found))
        for answer in answers:
            if not any(map(str.isalnum, answer)):
                self.hits.add("no-words", where, repr(answer[:40]))
                break
        asked, *spoken = [self.identifier.of(text) for text in texts]
        self.languages.update(spoken[:1])
        if example.kind == "pairs" and len(set(filter(None, spoken))) > 1:
            self.hits.add("pair-languages", where, f"chosen {spoken[0]}, rejected {spoken[1]}")
        elif asked and spoken and spoken[0] and spoken[0] != asked:
            self.hits.add("answer-language", where, f"prompt {asked}, answer {spoken[0]}")

    def _look_at_pair(self, where: str, answers: Sequence[str], alike: float) -> None:
        if alike >= self.limits.near:
            same = "" if normalised(answers[0]) != normalised(answers[1]) else ": letter case and white space differ"
            self.hits.add("near-identical-pair", where, f"similarity {alike:.2f}{same}", alike)


def by_key(notes: Sequence[str]) -> dict[str, list[str]]:
    """Notes, "key" or "key: detail", as the details of each key."""
    found: dict[str, list[str]] = {}
    for note in notes:
        key, _, detail = note.partition(": ")
        found.setdefault(key, []).append(detail)
    return found


def said(turns: Turns) -> str:
    """What is said in some turns, function calls included, but for system turns: those are the same in many rows."""
    if isinstance(turns, str):
        return turns
    return "\n".join(_turn(turn) for turn in turns if turn["role"] not in ("system", "developer"))


def system_text(turns: Turns) -> str:
    """What `said` leaves out."""
    system = () if isinstance(turns, str) else (t["content"] for t in turns if t["role"] in ("system", "developer"))
    return normalised("\n".join(system))


def _turn(turn: Any) -> str:
    calls = [json.dumps(call.get("function"), ensure_ascii=False) for call in turn.get("tool_calls", ())]
    return "\n".join(filter(None, [turn["content"], *calls]))
