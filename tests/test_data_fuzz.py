"""Broken rows and files, thousands of them: each is used, or counted under a reason, or the source is a DataError."""

from __future__ import annotations

import gzip
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_tokenizers import CHATML, make_tokenizer

from alignzoo.data import formats
from alignzoo.data.reading import Reading, read
from alignzoo.data.rows import REASONS, BadRow, Dropped
from alignzoo.data.sources import open_live, open_source
from alignzoo.data.template import choose_template, render
from alignzoo.data.tokenise import Encoder, Limits, fit
from alignzoo.errors import DataError
from alignzoo.recipe import Data, Source

TURNS = [
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "fine", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "{}"},
    {"role": "assistant", "content": "thanks"},
]
SAID = [
    {"from": "human", "value": "how are you"},
    {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
    {"from": "observation", "value": "{}"},
    {"from": "gpt", "value": "fine"},
]
HUMAN = "\n\nHuman: how are you\n\nAssistant:"
BESIDE = {"system": "the shop", "tools": '[{"name": "f", "parameters": {}}]', "score": 1.5}
ALPACA = {"instruction": "say", "input": "it", "history": [["a", "b"]], **BESIDE}
RIGHT: dict[str, dict[str, Any]] = {  # a row of each format that has nothing wrong
    "labelled": {"prompt": "a", "completion": "b", "label": "👍", **BESIDE},
    "labelled_alpaca": {**ALPACA, "output": "fine", "label": 0},
    "labelled_messages": {"messages": TURNS, "label": True, **BESIDE},
    "labelled_sharegpt": {"conversations": SAID, "label": False, **BESIDE},
    "helpsteer3": {"context": TURNS[:1], "response1": "a", "response2": "b", "overall_preference": -2, "score": 1},
    "hh_prompt": {"prompt": HUMAN, "chosen": "fine", "rejected": "bad", **BESIDE},
    "pairs": {"prompt": TURNS[:1], "chosen": TURNS[3:], "rejected": "bad", **BESIDE},
    "alpaca_pairs": {**ALPACA, "chosen": "fine", "rejected": "bad"},
    "sharegpt_pairs": {"conversations": SAID[:1], "chosen": SAID[3], "rejected": [SAID[1]], **BESIDE},
    "hh": {"chosen": f"{HUMAN} fine", "rejected": f"{HUMAN} bad", **BESIDE},
    "pairs_implicit": {"chosen": TURNS, "rejected": [*TURNS[:3], {"role": "assistant", "content": "no"}], **BESIDE},
    "alpaca": {**ALPACA, "output": "fine"},
    "prompt_completion": {"prompt": "a", "completion": TURNS[3:], **BESIDE},
    "messages": {"messages": TURNS, **BESIDE},
    "sharegpt": {"conversations": SAID, **BESIDE},
    "text": {"text": "once upon a time", "score": 1},
    "groups": {"prompt": TURNS[:1], "completions": ["fine", TURNS[3:]], "rewards": [1, None], **BESIDE},
    "prompts": {"prompt": "a", "truth": [1], **BESIDE},
}
DEEP: Any = "x"
for level in range(900):
    DEEP = [DEEP] if level % 2 else {"arguments": DEEP}
JUNK = (
    None, True, 0, -1, 10**400, 1e308, float("nan"), float("inf"), "", " ", "\ud800", "</s>", "<|im_end|>", "\x00",
    "{{name}}", "{", "[]", '"\\ud800"', "null", HUMAN, "\n\nAssistant:", [], {}, [None], [[]], {"role": "user"},
    {"from": 3}, DEEP, {"role": "assistant", "content": None}, {"role": [], "content": {}},
    {"role": "assistant", "content": "", "tool_calls": [3]}, {1: 2}, b"bytes", object, "😀" * 50,
    {"role": "tool", "content": ["x"], "tool_calls": {"name": "f", "arguments": "[1]"}},
)  # fmt: skip
ROWS_OF_A_FORMAT = 600  # times 18 formats: more than ten thousand


def broken(row: Any, rng: random.Random) -> Any:
    """The row with something wrong at a place of any depth."""
    copy = json.loads(json.dumps(row))
    holder, key = rng.choice(list(places(copy)))
    action = rng.randrange(5)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif action == 2:
        holder[key] = [holder[key]]
    elif action == 3 and isinstance(holder[key], str):
        text = holder[key]
        cut = rng.randrange(len(text) + 1)
        holder[key] = text[:cut] + rng.choice(["", "\ud800", "\n\nHuman:", '"', " "]) + text[cut:][::-1]
    else:
        holder[key] = rng.choice(JUNK)
    return copy


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def drawn(reading: Reading, chat: bool) -> int:
    """Goes through a reading to the end, and on to the ids. How many examples there were."""
    tokenizer = make_tokenizer(template=CHATML if chat else None)
    template = choose_template(Data(train="x"), tokenizer)
    encoder, limits = Encoder(tokenizer, template), Limits(60, None, None, "completion_right")
    count = 0
    for example in reading.examples:
        count += 1
        example.where.encode()
        if example.kind == "prompts":
            continue
        try:
            pieces = encoder.encode([render(example, template, tokenizer)])[0]
            if isinstance(pieces, BadRow):
                raise pieces
            fitted, _ = fit(pieces, limits)
        except BadRow as problem:
            reading.tally.add_bad(example.where, problem)
            continue
        except Dropped as dropped:
            assert dropped.reason in REASONS
            continue
        except DataError as error:  # a conversation without a template
            assert not chat
            assert "no chat template" in str(error)
            continue
        assert all(completion.counted for completion in fitted.completions)
        assert len(fitted.prompt) >= 1
        assert all(int(np.max(completion.ids)) < len(tokenizer) for completion in fitted.completions)
    return count


def check_counts(reading: Reading, name: str) -> None:
    """Every row is an example, or counted under a known reason; the first bad ones are named."""
    tally = reading.tally
    assert set(tally.bad) | set(tally.dropped) <= set(REASONS)
    for line in tally.shown:
        line.encode()
        assert line.startswith(name)
        assert line.endswith("]")


@pytest.mark.parametrize("name", [known.name for known in formats.FORMATS])
def test_broken_rows_of_every_format(name: str) -> None:
    rng = random.Random(f"seed {name}")
    row = RIGHT[name]
    assert formats.detect(list(row), "auto", "f", [row]).name == name
    rows = [row] + [broken(row, rng) for _ in range(ROWS_OF_A_FORMAT)]
    for train_on, chat in (("every", True), ("last", False)):
        source = Source(path="train", format=name)
        reading = read(open_live(rows, "train"), source, Data(train="x", train_on=train_on))  # type: ignore[arg-type]
        count = drawn(reading, chat)
        assert reading.tally.read == len(rows)
        assert count == reading.tally.examples >= 1
        check_counts(reading, "train row ")
    assert reading.tally.bad.total() > ROWS_OF_A_FORMAT / 20


def test_each_row_is_counted_once() -> None:
    for name, row in RIGHT.items():
        rng = random.Random(name)
        rows = [row] + [broken(row, rng) for _ in range(200)]
        data = Data(train="x", keep=("score",) if "score" in row else ())
        reading = read(open_live(rows, "train"), Source(path="train", format=name), data)
        used = sum(1 for _ in reading.examples)
        assert used + reading.tally.bad.total() + reading.tally.dropped.total() == len(rows)


@pytest.mark.parametrize("kind", ["pairs", "labelled", "demonstrations"])
def test_broken_rows_of_mixed_formats(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(150):
        rows = [broken(rng.choice(list(RIGHT.values())), rng) for _ in range(4)]
        try:
            reading = read(open_live(rows, "train"), Source(path="train"), Data(train="x"), kind)
            drawn(reading, chat=True)
        except DataError as error:
            str(error).encode()
            assert str(error).startswith("train")
            continue
        check_counts(reading, "train row ")


VALID = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in RIGHT.values() if "messages" in row),
    ".json": json.dumps([RIGHT["sharegpt"], RIGHT["sharegpt"]], indent=1),
    ".csv": 'prompt,completion,label\na,b,good\n"c\nd",e,bad\n',
}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.sampled_from(list(VALID)),
    st.integers(0, 600),
    st.binary(max_size=4) | st.sampled_from([b'"', b"\n", b"{", b"]", b"\xff\xfe", b"\x00", b"\\ud800", b",,", b"NaN"]),
    st.integers(0, 8),
    st.booleans(),
)
def test_broken_files(ending: str, place: int, inserted: bytes, removed: int, compressed: bool) -> None:
    content = VALID[ending].encode()
    content = content[:place] + inserted + content[place + removed :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (f"a{ending}.gz" if compressed else f"a{ending}")
        path.write_bytes(gzip.compress(content) if compressed and removed else content)
        try:
            reading = read(open_source(Source(path=str(path))), Source(path=str(path)), Data(train="x"))
            drawn(reading, chat=True)
        except DataError as error:
            str(error).encode()
            assert path.name in str(error)
            return
        check_counts(reading, reading.name)
