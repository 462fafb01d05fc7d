"""Mixtures: what a weight and a limit take, what is held out, what is mismatched with what. All of it by content."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_tokenizers import CHATML, chat_tokenizer, make_tokenizer

from alignzoo.data.dataset import Prepared, held_out, prepare
from alignzoo.data.selection import hold_out, partners, times
from alignzoo.errors import DataError
from alignzoo.recipe import Data, Source

REPO = Path(__file__).parents[1]
ROWS = [{"prompt": f"question {i}", "chosen": f"good answer {i}", "rejected": f"bad {i}"} for i in range(200)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "a.jsonl", ROWS)


def run(*sources: Source, kind: str = "pairs", tokenizer: Any = None, seed: int = 0, **keys: Any) -> Prepared:
    return prepare(
        Data(train=sources, **keys), kind, tokenizer or chat_tokenizer(), needs_mismatched=False, seed=seed, say=len
    )


def numbers(trees: Any) -> list[int]:
    """The numbers of the rows, by what is asked."""
    return [int(asked.removeprefix("question ")) for asked in trees.asked]


# --- weights

HALF = [2, 4, 5, 10, 12, 13, 15, 16, 17, 18, 22, 23, 24, 25, 26, 28, 29, 35, 39]  # of the first 40 rows


def test_the_same_half_every_time(path: str, tmp_path: Path) -> None:
    """Pinned: on every machine, in every version, whatever the order, the seed, the template and the kind."""
    half = run(Source(path, limit=40, weight=0.5))
    assert numbers(half.train) == HALF
    backwards = write(tmp_path / "b.jsonl", [{**row, "id": i} for i, row in enumerate(ROWS[:40])][::-1])
    assert numbers(run(Source(backwards, weight=0.5), seed=7).train) == HALF[::-1]
    raw = run(Source(path, limit=40, weight=0.5), chat_template="none", max_length=200, system="x")
    assert numbers(raw.train) == HALF
    assert numbers(run(Source(path, limit=40, weight=0.5), kind="demonstrations").train) == HALF
    labelled = run(Source(path, limit=40, weight=0.5), kind="labelled")
    assert numbers(labelled.train) == [i for i in HALF for _ in range(2)]  # both sides of a pair, or none
    assert labelled.report.sources[0].dropped == {"weight": 2 * (40 - len(HALF))}


def test_the_same_half_in_another_process(path: str) -> None:
    code = (
        "import sys\nfrom test_data_mixtures import Source, numbers, run\n"
        "prepared = run(Source(sys.argv[1], limit=40, weight=0.5), eval_fraction=0.25)\n"
        "print([numbers(prepared.train), numbers(prepared.eval)])"
    )
    outputs = []
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "ALIGNZOO_CACHE_GB": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code, path], capture_output=True, text=True, env=environment, cwd=REPO / "tests"
        )
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads(done.stdout))
    assert outputs[0] == outputs[1]
    assert sorted(outputs[0][0] + outputs[0][1]) == HALF


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0, 2.0, 2.5, 3.75])
def test_a_weight_is_its_whole_part_and_a_share_of_the_rows(path: str, weight: float) -> None:
    prepared = run(Source(path, weight=weight))
    counts = Counter(numbers(prepared.train))
    whole = int(weight)
    assert set(counts.values()) <= {whole, whole + 1} - {0}
    share = sum(counts[i] == whole + 1 for i in range(200)) / 200
    assert abs(share - (weight - whole)) < 0.12
    source = prepared.report.sources[0]
    assert (source.kept, source.counted) == (len(counts), sum(counts.values()))
    assert [tree.row for tree in prepared.train] == list(range(len(prepared.train)))
    assert numbers(prepared.train) == sorted(numbers(prepared.train))  # in the order of the file
    if weight != 1:
        assert f"counted as {source.counted}" in source.lines()[0] or weight < 1


def test_a_greater_weight_takes_all_that_a_smaller_one_takes(path: str) -> None:
    taken = [set(numbers(run(Source(path, weight=weight)).train)) for weight in (0.1, 0.3, 0.9)]
    assert taken[0] < taken[1] < taken[2]
    more = Counter(numbers(run(Source(path, weight=2.3)).train))
    assert {row for row, count in more.items() if count == 3} == taken[1]


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=20), st.floats(1e-12, 20, exclude_min=True))
def test_times(keys: list[int], weight: float) -> None:
    exact = Fraction(weight)
    whole = exact.numerator // exact.denominator
    expected = [whole + (Fraction(key, 2**64) < exact - whole) for key in keys]
    assert times(np.array(keys, np.uint64), weight, "a").tolist() == expected


@pytest.mark.parametrize("weight", [1e300, 1e8])
def test_a_weight_that_no_memory_holds(path: str, weight: float) -> None:
    with pytest.raises(DataError, match=r"(?s)a\.jsonl: weight = .*200 rows.*train\.epochs"):
        run(Source(path, weight=weight))


def test_a_weight_that_takes_nothing(path: str) -> None:
    with pytest.raises(DataError, match=r"(?s)no row is left of 3.*3 x weight"):
        run(Source(path, limit=3, weight=1e-9))


# --- several sources


def test_what_is_taken_of_a_source_does_not_depend_on_the_others(path: str, tmp_path: Path) -> None:
    other = write(tmp_path / "b.jsonl", [{**row, "prompt": f"question {i + 1000}"} for i, row in enumerate(ROWS)])
    alone = numbers(run(Source(path, weight=0.5)).train)
    mixed = run(Source(other, weight=0.25, limit=100), Source(path, weight=0.5))
    taken = numbers(mixed.train)
    assert [n for n in taken if n < 1000] == alone
    assert taken == sorted(taken, key=lambda n: n < 1000)  # source after source
    limited = run(Source(other, weight=0.25, limit=50))
    assert set(numbers(limited.train)) == {n for n in taken if 1000 <= n < 1050}  # the limit comes before the weight
    assert [source.rows for source in mixed.report.sources] == [100, 200]
    assert [tree.where.rpartition(":")[0] for tree in (mixed.train[0], mixed.train[-1])] == [other, path]


def test_a_source_that_is_weighted_into_another_kind(path: str, tmp_path: Path) -> None:
    labelled = write(tmp_path / "b.jsonl", [{"prompt": f"question {i}", "completion": "x", "label": i % 2 == 0}
                                            for i in range(300, 340)])  # fmt: skip
    mixed = run(Source(path, weight=0.5), Source(labelled, weight=2.0), kind="demonstrations")
    assert mixed.report.sources[1].dropped == {"undesirable": 20}
    assert Counter(n for n in numbers(mixed.train) if n >= 300) == dict.fromkeys(range(300, 340, 2), 2)


def test_limits_count_rows_that_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": "x"}, *ROWS[:5]]
    prepared = run(Source(write(tmp_path / "a.jsonl", rows), limit=3), on_bad_row="skip")
    assert numbers(prepared.train) == [0, 1]
    assert prepared.report.sources[0].rows == 3


# --- held-out rows

HELD = [
    13,
    26,
    31,
    32,
    45,
    47,
    56,
    65,
    70,
    78,
    86,
    87,
    97,
    118,
    156,
    157,
    160,
    180,
    188,
    194,
]  # of all rows, one in ten


def test_the_same_rows_are_held_out_every_time(path: str, tmp_path: Path) -> None:
    """Pinned: whatever the order, the files, the seed, the template, its date, the kind and the weight."""
    first, second = write(tmp_path / "b.jsonl", ROWS[120:][::-1]), write(tmp_path / "c.jsonl", ROWS[:120])
    dated = make_tokenizer(template="{{ strftime_now('%d %b %Y') }}" + CHATML, eos="<|im_end|>")
    for prepared in (
        run(Source(path), eval_fraction=0.1),
        run(Source(first), Source(second), eval_fraction=0.1, seed=5),
        run(Source(path), eval_fraction=0.1, chat_template="none"),
        run(Source(path), eval_fraction=0.1, system="be kind"),
        run(Source(path), eval_fraction=0.1, tokenizer=dated),
        run(Source(path), eval_fraction=0.1, kind="demonstrations"),
        run(Source(path, weight=3.0), eval_fraction=0.1),
    ):
        assert sorted(numbers(prepared.eval)) == HELD
        assert not set(numbers(prepared.train)) & set(HELD)
    labelled = run(Source(path), eval_fraction=0.1, kind="labelled")
    assert sorted(set(numbers(labelled.eval))) == HELD


def test_text_and_one_user_turn_are_held_out_alike(path: str, tmp_path: Path) -> None:
    turns = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}],
              "chosen": [{"role": "assistant", "content": row["chosen"]}],
              "rejected": [{"role": "assistant", "content": row["rejected"]}]} for row in ROWS]  # fmt: skip
    prepared = run(Source(write(tmp_path / "b.jsonl", turns)), eval_fraction=0.1)
    assert sorted(numbers(prepared.eval)) == HELD


def test_more_rows_move_only_those_at_the_edge(path: str, tmp_path: Path) -> None:
    more = [{**row, "prompt": f"question {i + 1000}"} for i, row in enumerate(ROWS[:20])]
    added = run(Source(path), Source(write(tmp_path / "b.jsonl", more)), eval_fraction=0.1)
    held = {n for n in numbers(added.eval) if n < 1000}
    assert len(added.eval) == 22
    assert len(held ^ set(HELD)) <= 3
    assert set(numbers(run(Source(path), eval_fraction=0.05).eval)) < set(HELD)


def test_prompts_that_the_template_writes_alike_are_on_one_side(tmp_path: Path) -> None:
    """With one system text or another: the template leaves both out."""
    rows = [{**ROWS[i], "system": f"{side} {i}", "chosen": f"good {side}"} for i in range(60) for side in "ab"]
    blind = (
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(template=blind, eos="<|im_end|>")
    raw = tokenizer.apply_chat_template(
        [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], tokenize=False
    )
    assert raw == "<|im_start|>b<|im_end|>"
    swapped = write(tmp_path / "b.jsonl", rows[::-1])
    held = []
    for file in (write(tmp_path / "a.jsonl", rows), swapped):
        prepared = run(Source(file), eval_fraction=0.2, tokenizer=tokenizer)
        sides = [{tree.prompt.tobytes() for tree in side} for side in (prepared.train, prepared.eval)]
        assert not sides[0] & sides[1]
        held.append(sides[1])
    assert held[0] == held[1]


KEYS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=24)


@settings(max_examples=200, deadline=None)
@given(KEYS, st.floats(0.01, 0.99))
def test_hold_out(keys: list[tuple[int, int, int]], fraction: float) -> None:
    prompts, held = [key[0] for key in keys], [key[1] for key in keys]
    arguments = np.array(prompts, np.uint64), np.array(held, np.uint64), fraction
    if len(set(prompts)) < 2:
        with pytest.raises(DataError, match="the same prompt"):
            hold_out(*arguments)
        return
    side = hold_out(*arguments)
    chosen = {prompt for prompt, out in zip(prompts, side, strict=True) if out}
    assert all((prompt in chosen) == out for prompt, out in zip(prompts, side, strict=True))
    assert 0 < len(chosen) < len(set(prompts))
    sizes = Counter(prompts)
    order = sorted(sizes, key=lambda p: (min(h for q, h in zip(prompts, held, strict=True) if q == p), p))
    room, expected = max(1, round(fraction * len(keys))), []
    for prompt in order:
        if sizes[prompt] <= room and len(expected) < len(sizes) - 1:
            expected.append(prompt)
            room -= sizes[prompt]
    assert chosen == set(expected or [min(order, key=lambda p: sizes[p])])


@pytest.mark.parametrize("kind", ["labelled", "demonstrations"])
@pytest.mark.parametrize("count", [44, 47, 52])
@pytest.mark.parametrize("max_length", [30, 200])
def test_the_held_out_pairs_of_another_kind_have_the_same_prompts(
    tmp_path: Path, kind: str, count: int, max_length: int
) -> None:
    """Their number is rounded among other rows, and of a pair that is dropped one side may fit: none is trained on."""
    rows = [{**row, "rejected": "bad " * 20} if i % 5 == 0 else row for i, row in enumerate(ROWS[:count])]
    path, keys = write(tmp_path / "a.jsonl", rows), {"eval_fraction": 0.1, "max_length": max_length}
    prepared = run(Source(path, weight=2.0), kind=kind, **keys)
    data = Data(train=(Source(path, weight=2.0),), **keys)
    pairs = held_out(prepared, data, "pairs", chat_tokenizer(), say=len)
    fits = {n for n in numbers(prepared.eval) if max_length == 200 or n % 5}
    assert numbers(pairs) == sorted(fits)
    assert all(len(tree.completions) == 2 for tree in pairs)
    named = Data(train="nowhere.jsonl", eval=(Source(path),), max_length=max_length)
    everything = prepare(named, kind, chat_tokenizer(), needs_mismatched=False, train=ROWS[60:99], seed=0, say=len)
    again = held_out(everything, named, "pairs", chat_tokenizer(), train=ROWS[60:99], say=len)
    assert numbers(again) == [n for n in range(count) if max_length == 200 or n % 5]


# --- mismatched completions


@settings(max_examples=300, deadline=None)
@given(KEYS)
def test_partners(keys: list[tuple[int, int, int]]) -> None:
    """The next row in the order of content with another prompt, as text and as tokens; looked for one by one."""
    prompts, ids = [key[0] for key in keys], [key[2] for key in keys]
    ring = [(key[1], i) for i, key in enumerate(keys)]
    order = sorted(range(len(keys)), key=lambda i: ring[i])
    expected = [-1] * len(keys)
    for place, row in enumerate(order):
        for step in range(1, len(keys)):
            other = order[(place + step) % len(keys)]
            if prompts[other] != prompts[row] and ids[other] != ids[row]:
                expected[row] = other
                break
    columns = (np.array(column, np.uint64) for column in (prompts, ids, [key[1] for key in keys]))
    assert partners(*columns).tolist() == expected
