"""`alignzoo data lint`, across rows: copies, leaks, contradictions, lengths and labels, from hashes and sketches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from alignzoo.data.lint_scan import Scan
from alignzoo.data.sketch import near, similarity

Rows = npt.NDArray[np.int64]
_SURE = 1.96  # standard errors that a share has to be away from a half


def look_across(scan: Scan, held_out: npt.NDArray[np.bool_]) -> None:
    """Adds to `scan.hits` what only shows between rows. held_out: (rows,)."""
    train, held = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    for side in (train, held):
        _copies(scan, side)
    _leaks(scan, train, held)
    _contradictions(scan, train)
    _length_bias(scan, train)
    _labels(scan, train)


def _earlier(keys: npt.NDArray[Any]) -> Rows:
    """For each row the first with the same key; itself where it is the first."""
    _, first, of = np.unique(keys, return_index=True, return_inverse=True)
    return np.asarray(first[of], np.int64)


def _report(scan: Scan, rule: str, rows: Rows, firsts: Rows, words: str, scores: Any = None) -> None:
    for i, (row, first) in enumerate(zip(rows.tolist(), firsts.tolist(), strict=True)):
        score = 0.0 if scores is None else float(scores[i])
        shown = "" if scores is None else f", similarity {score:.2f}"
        scan.hits.add(rule, scan.where(row), f"{words} {scan.where(first)}{shown}", score)


def _copies(scan: Scan, side: Rows) -> None:
    """Rows that stand in the same side before: in every word, nearly, or with another answer."""
    first = _earlier(scan.column("row_key")[side])
    copied = first < np.arange(len(side))
    _report(scan, "duplicate", side[copied], side[first[copied]], "equals")
    prompts, answers = scan.sketches("prompt")[side], scan.sketches("answer")[side]
    alike = near([prompts, answers], scan.limits.near)
    close = np.flatnonzero((alike >= 0) & ~copied)
    scores = np.minimum(*(similarity(part[close], part[alike[close]]) for part in (prompts, answers)))
    _report(scan, "near-duplicate", side[close], side[alike[close]], "nearly", scores)
    first = _earlier(scan.column("prompt_key")[side])
    again = (first < np.arange(len(side))) & ~copied & (alike < 0)
    _report(scan, "repeated-prompt", side[again], side[first[again]], "prompt of")


def _leaks(scan: Scan, train: Rows, held: Rows) -> None:
    if not len(held):
        return
    rows = np.concatenate([train, held])  # so that the first of a prompt is a training row
    first = _earlier(scan.column("prompt_key")[rows])
    place = np.arange(len(rows))
    leaked = (place >= len(train)) & (first < len(train))
    _report(scan, "leaked-prompt", rows[leaked], rows[first[leaked]], "prompt of")
    prompts = scan.sketches("prompt")[rows]
    alike = near([prompts], scan.limits.near, before=len(train))
    close = np.flatnonzero((place >= len(train)) & (alike >= 0) & ~leaked)
    scores = similarity(prompts[close], prompts[alike[close]])
    _report(scan, "leaked-near", rows[close], rows[alike[close]], "nearly the prompt of", scores)
    for rule in ("leaked-prompt", "leaked-near"):
        scan.hits.of[rule] = len(held)


def _contradictions(scan: Scan, train: Rows) -> None:
    """Pairs that stand there the other way round too, and answers with both labels."""
    keys, labels = scan.column("answers_key")[train], scan.column("label")[train]
    judged = np.flatnonzero(labels >= 0)
    if not len(judged):
        return
    first = judged[_earlier(keys[judged])]
    other = labels[first] != labels[judged]
    _report(scan, "contradiction", train[judged[other]], train[first[other]], "judged otherwise in")


def _kind(scan: Scan, train: Rows, kind: str) -> Rows:
    """The training rows of sources of that kind."""
    wanted = [i for i, source in enumerate(scan.sources) if source.kind == kind]
    return train[np.isin(scan.column("source")[train], wanted)]


def _length_bias(scan: Scan, train: Rows) -> None:
    """How often the longer answer is chosen, in characters; of labels, how often the desirable one of two is longer."""
    pairs = _kind(scan, train, "pairs")
    first, second = scan.column("first")[pairs], scan.column("second")[pairs]
    differ = first != second
    n, longer = int(differ.sum()), int((first > second).sum())
    if n:
        off = abs(longer / n - 0.5) > _SURE * math.sqrt(0.25 / n)
        words = (
            f"the longer answer is chosen in {longer} of {n} pairs ({longer / n:.0%}); median length "
            f"{np.median(first):.0f} characters chosen, {np.median(second):.0f} rejected"
        )
        _bias(scan, longer / n, n, off, words, lambda: _most_different(scan, pairs, longer / n > 0.5))
    rows = _kind(scan, train, "labelled")
    labels, lengths = scan.column("label")[rows] == 1, scan.column("first")[rows]
    good, bad = int(labels.sum()), int((~labels).sum())
    if good and bad:
        area = _area(lengths, labels)
        off = abs(area - 0.5) > _SURE * math.sqrt((good + bad + 1) / (12 * good * bad))  # Mann and Whitney 1947
        words = (
            f"a desirable answer is longer than an undesirable one in {area:.0%} of all pairings; median length "
            f"{np.median(lengths[labels]):.0f} and {np.median(lengths[~labels]):.0f} characters"
        )
        _bias(scan, area, good + bad, off, words, lambda: None)


def _bias(scan: Scan, share: float, n: int, off: bool, words: str, rows: Callable[[], None]) -> None:
    most = max(share, 1 - share)
    if off and most >= scan.limits.length_bias:
        rows()
        scan.hits.say("length-bias", round(most * n), n, words)
    else:
        scan.hits.say("lengths", round(most * n), n, words)


def _most_different(scan: Scan, pairs: Rows, longer: bool) -> None:
    """The pairs whose answers differ most in length, in the direction of the bias."""
    first, second = scan.column("first")[pairs], scan.column("second")[pairs]
    ratio = np.log1p(first) - np.log1p(second)
    order = np.argsort(-ratio if longer else ratio, kind="stable")[: scan.limits.rows]
    for i in order.tolist():
        words = f"chosen has {first[i]} characters, rejected {second[i]}"
        scan.hits.add("length-bias", scan.where(int(pairs[i])), words, abs(float(ratio[i])))


def _area(lengths: npt.NDArray[Any], labels: npt.NDArray[np.bool_]) -> float:
    """The probability that a row with the label is longer than one without, ties as one half."""
    values, of, counts = np.unique(lengths, return_inverse=True, return_counts=True)
    del values
    ranks = np.cumsum(counts) - (counts - 1) / 2  # mean rank of each value
    good, bad = int(labels.sum()), int((~labels).sum())
    return float((ranks[of[labels]].sum() - good * (good + 1) / 2) / (good * bad))


def _labels(scan: Scan, train: Rows) -> None:
    rows = _kind(scan, train, "labelled")
    good, n = int((scan.column("label")[rows] == 1).sum()), len(rows)
    rarer = min(good, n - good)
    words = f"{good} desirable, {n - good} undesirable"
    if n and not rarer:
        scan.hits.say("single-label", n, n, words)
    elif n:
        scan.hits.say("label-balance" if rarer < scan.limits.balance * n else "labels", rarer, n, words)
