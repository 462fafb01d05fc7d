"""What `alignzoo data lint` can find: for each rule how bad it is, what it does to training, and the way out."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from alignzoo.data.rows import NOTES, REASONS

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")  # the worst first
_LATE = ("no-preference", "left-out", "undesirable")  # reasons that rows are dropped by, in order as they are


@dataclass(frozen=True)
class Rule:
    severity: Severity
    what: str
    causes: str = ""  # in training
    fix: str = ""
    minor: bool = True  # a warning about few rows is a note


@dataclass(frozen=True)
class Thresholds:
    """Where a finding begins. All are options of the command."""

    near: float = 0.8  # Jaccard index of runs of 5 characters
    length_bias: float = 0.65  # part of the pairs whose longer answer is chosen (or whose shorter one)
    balance: float = 0.2  # part of the rows that the rarer label has
    minor: float = 0.01  # part of the rows below which a warning is a note
    rows: int = 10  # worst rows that are named


@dataclass(frozen=True)
class Worst:
    """A row that a finding is about."""

    where: str  # "file:line"
    detail: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)  # prompt, chosen and the like, shortened


@dataclass(frozen=True)
class Finding:
    """What a rule found."""

    id: str
    severity: Severity
    count: int
    of: int  # rows that it was looked for in
    what: str
    causes: str
    fix: str
    detail: str = ""  # the figure behind it
    rows: tuple[Worst, ...] = ()  # the worst first

    @property
    def share(self) -> float:
        return self.count / self.of if self.of else 0.0


class Hits:
    """Counts by rule, and of each rule the rows with the highest score; of equal ones the first."""

    def __init__(self, most: int) -> None:
        self.counts: dict[str, int] = {}
        self.of: dict[str, int] = {}
        self.details: dict[str, str] = {}
        self._most, self._added = most, 0
        self._worst: dict[str, list[tuple[float, int, str, str]]] = {}

    def add(self, rule: str, where: str, detail: str = "", score: float = 0.0) -> None:
        self.counts[rule] = self.counts.get(rule, 0) + 1
        self._added -= 1
        heap = self._worst.setdefault(rule, [])
        push = heapq.heappush if len(heap) < self._most else heapq.heappushpop
        push(heap, (score, self._added, where, detail))

    def say(self, rule: str, count: int, of: int, detail: str = "") -> None:
        """A finding about all rows together."""
        self.counts[rule], self.of[rule], self.details[rule] = count, of, detail

    def worst(self, rule: str) -> tuple[Worst, ...]:
        return tuple(Worst(where, detail) for _, _, where, detail in sorted(self._worst.get(rule, ()), reverse=True))


def findings(hits: Hits, rows: int, limits: Thresholds, *, skip_bad: bool = False) -> list[Finding]:
    """All that was found, the worst first. rows: that were read. skip_bad: data.on_bad_row = "skip"."""
    found = []
    for key, count in hits.counts.items():
        rule, of = rule_of(key), hits.of.get(key, rows)
        severity = rule.severity
        if skip_bad and key in REASONS and severity == "error":
            severity = "warning"
        if severity == "warning" and rule.minor and count < limits.minor * of:
            severity = "note"
        found.append(
            Finding(
                key, severity, count, of, rule.what, rule.causes, rule.fix, hits.details.get(key, ""), hits.worst(key)
            )
        )
    return sorted(found, key=lambda f: (SEVERITIES.index(f.severity), -f.share, f.id))


def rule_of(key: str) -> Rule:
    """The rule of an identifier; reasons of bad rows and notes on rows have theirs from rows.py."""
    if key in RULES:
        return RULES[key]
    if key in NOTES:
        words = NOTES[key]
        return Rule("warning" if words.startswith("warning: ") else "note", words.removeprefix("warning: "))
    if key in _LATE:
        return Rule("note", REASONS[key], "the row is dropped and counted")
    return Rule(
        "error", REASONS[key],
        'the run stops before the model is loaded; with data.on_bad_row = "skip" the row is left out',
        "mend or remove the row",
    )  # fmt: skip


_LIMIT_FIX = "raise the limit, or set data.truncation to cut such rows"
_TOO_LONG = "the row is left out (data.truncation); the model learns from the short ones only"

RULES: dict[str, Rule] = {
    # --- across rows
    "leaked-prompt": Rule(
        "error", "held-out rows whose prompt is also trained on",
        "evaluation measures what was memorised: its figures are too good",
        "remove these rows from one side, or leave data.eval out and set data.eval_fraction, which splits by prompt",
    ),
    "leaked-near": Rule(
        "warning", "held-out rows whose prompt is nearly that of a training row",
        "evaluation is partly of what was memorised", "remove these rows from one side",
    ),
    "duplicate": Rule(
        "warning", "rows that stand in the data before, in every word",
        "they count twice, and repeated text is what models come to say by heart (Lee et al. 2022, arXiv:2107.06499)",
        "remove them; to count rows more often on purpose, give the source a weight",
    ),
    "near-duplicate": Rule(
        "warning", "rows whose prompt and answer are nearly those of an earlier row",
        "as duplicates: they count more often than others", "keep one of each, unless they are meant as variants",
    ),
    "repeated-prompt": Rule(
        "note", "rows whose prompt stands in an earlier row, with another answer",
        "nothing is wrong with several answers to a prompt; prompts with many rows weigh more",
        "look whether it is meant",
    ),
    "contradiction": Rule(
        "warning", "the same answers judged both ways",
        "their gradients cancel; a loss with label_smoothing, or with a target, takes less harm",
        "decide for one of the two, or remove both",
    ),
    # --- pairs and labels
    "near-identical-pair": Rule(
        "warning", "pairs whose two answers are nearly the same text",
        "the shared tokens get no signal, and the log-prob of the chosen answer may fall with the rejected one's (Pal "
        "et al. 2024, arXiv:2402.13228)",
        "remove them, or make sure that the few characters are what is judged",
    ),
    "length-bias": Rule(
        "warning", "the preferred answers differ in length",
        "the model learns to write longer (or shorter) answers whatever they say (Singhal et al. 2023, "
        "arXiv:2310.03716; Park et al. 2024, arXiv:2403.19159)",
        "balance the lengths, or take a loss that is normalised by length; compare the lengths of answers before and "
        "after",
        minor=False,
    ),
    "lengths": Rule("note", "the preferred answers are about as long as the others"),
    "labels": Rule("note", "both labels are there; counted is the rarer one"),
    "label-balance": Rule(
        "warning", "one label is rare",
        "the common label has most of the gradient",
        "take more rows of the rarer label, or a loss with weights for the two labels and set them", minor=False,
    ),
    "single-label": Rule(
        "warning", "all rows have the same label",
        "nothing is told apart: a loss on labels only moves all answers up, or all down",
        "add rows of the other label, or take a loss that imitates the desirable ones", minor=False,
    ),
    # --- texts
    "no-words": Rule(
        "warning", "answers without a letter or a digit", "the model learns to say nothing", "remove or mend them",
    ),
    "broken-text": Rule(
        "warning", "text that was decoded wrongly: replacement or control characters, or UTF-8 read as Latin-1",
        "the model learns to write it", "read the source again with its own encoding",
    ),
    "template-in-text": Rule(
        "warning", "text that holds the markers of a chat template",
        "the template is applied twice, or a turn ends in the middle of the text",
        'give messages without markers, or set data.chat_template = "none" for text that is a whole conversation',
    ),
    "pair-languages": Rule(
        "warning", "pairs whose two answers are in different languages",
        "the language may be what is learned as preferred", "look whether the language is what is judged",
    ),
    "answer-language": Rule("note", "answers in another language than their prompt",
                            "the model may answer in it too", "fine for translations"),
    "languages": Rule("note", "answers whose language is known"),
    # --- tokens, with a recipe
    "doubled-bos": Rule(
        "error", "rows that begin with BOS twice",
        "training begins with tokens that the model never sees afterwards", "take one out of the template or the text",
    ),
    "bos-elsewhere": Rule(
        "note", "the template writes BOS, and the tokenizer adds one to text by itself",
        "alignzoo adds none to templated text; a program that tokenises it with add_special_tokens doubles it",
        "with the trained model, tokenise templated text without special tokens",
    ),
    "open-end": Rule(
        "error", "rows that do not end with an end-of-turn token",
        "the model does not learn to stop", "take a template that ends turns, and a tokenizer that has the token",
    ),
    "too-long": Rule("warning", REASONS["too-long"], _TOO_LONG, _LIMIT_FIX),
    "prompt-too-long": Rule("warning", REASONS["prompt-too-long"], _TOO_LONG, _LIMIT_FIX),
    "completion-too-long": Rule("warning", REASONS["completion-too-long"], _TOO_LONG, _LIMIT_FIX),
    "no-room-for-prompt": Rule("warning", REASONS["no-room-for-prompt"], _TOO_LONG, "raise data.max_length"),
    "no-room-for-completion": Rule("warning", REASONS["no-room-for-completion"], _TOO_LONG, "raise data.max_length"),
    "equal-after-cut": Rule("warning", REASONS["equal-after-cut"], "the row is left out", _LIMIT_FIX),
    "prompt-left": Rule(
        "warning", REASONS["prompt-left"],
        "what is asked, or the system turn, may be missing", "raise data.max_length or data.max_prompt_length",
    ),
    "completion-right": Rule(
        "warning", REASONS["completion-right"],
        "the end of turn is cut too: the model learns to write answers that do not end",
        "raise the limit, or drop such rows",
    ),
}  # fmt: skip
