"""Sketches estimate the similarity that they claim to, and near copies are found among many texts."""

from __future__ import annotations

import numpy as np
import pytest
from test_lint import WORDS, sentence

from alignzoo.data.sketch import MINIMA, jaccard, near, normalised, shingles, similarity, sketch


def edited(text: str, share: float, rng: np.random.Generator) -> str:
    return " ".join(f"x{rng.integers(10**6)}" if rng.random() < share else word for word in text.split())


def exact(a: str, b: str) -> float:
    """The Jaccard index by its definition, with Python's sets of the runs themselves."""
    one, other = ({t[i : i + 5] for i in range(len(t) - 4)} for t in map(normalised, (a, b)))
    return len(one & other) / len(one | other)


def test_jaccard_is_that_of_the_sets() -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.1, 0.5, 1.0):
        text = " ".join(rng.permutation(WORDS.split() * 3)) + f" {rng.integers(10**9)}"
        other = edited(text, share, rng)
        assert jaccard(shingles(text), shingles(other)) == pytest.approx(exact(text, other), abs=1e-9)


def test_the_estimate_is_unbiased_and_as_exact_as_128_minima_can_be() -> None:
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(60):
        text = sentence(rng, 80)
        for share in (0.01, 0.05, 0.2):
            a, b = shingles(text), shingles(edited(text, share, rng))
            true = jaccard(a, b)
            errors.append((float(similarity(sketch(a), sketch(b))) - true) / np.sqrt(true * (1 - true) / MINIMA + 1e-9))
    assert abs(np.mean(errors)) < 0.4 and np.std(errors) < 1.4


def test_unrelated_texts_are_not_similar() -> None:
    rng = np.random.default_rng(2)
    texts = ["".join(chr(97 + c) for c in rng.integers(0, 26, 400)) for _ in range(50)]
    made = np.stack([sketch(shingles(text)) for text in texts])
    assert similarity(made[:-1], made[1:]).max() < 0.05
    assert (near([made], 0.8) == -1).all()


def test_white_space_and_case_do_not_count_and_short_texts_have_a_sketch() -> None:
    assert np.array_equal(sketch(shingles("A  b\nc def")), sketch(shingles("a b C DEF ")))
    for a, b, same in (("", " ", True), ("4", "5", False), ("好", "好", True), ("\ud800", "a", False)):
        assert (similarity(sketch(shingles(a)), sketch(shingles(b))) == 1.0) == same


def test_near_finds_nearly_all_copies_and_only_earlier_rows() -> None:
    rng = np.random.default_rng(3)
    texts = [sentence(rng, 60) for _ in range(150)]
    texts = ["".join(rng.permutation(list(text))) for text in texts]  # no runs in common
    copies = [text[:-3] + "xyz" for text in texts]
    made = np.stack([sketch(shingles(text)) for text in (*texts, *copies)])
    found = near([made], 0.8)
    assert (found[:150] == -1).all()
    hit = found[150:] == np.arange(150)
    assert hit.mean() > 0.98
    assert (near([made], 0.8, before=100)[250:] == -1).all()
    other = made[rng.permutation(300)]
    assert (near([made, other], 0.8)[150:] == -1).mean() > 0.95  # both parts have to be near
