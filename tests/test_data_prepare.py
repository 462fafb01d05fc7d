"""The whole way from [data] to token trees: counts, weights, held-out rows, mismatched completions, poisoned input."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_tokenizers import chat_tokenizer, make_tokenizer

from alignzoo.data.dataset import Prepared, prepare
from alignzoo.errors import DataError
from alignzoo.recipe import Data, Source
from alignzoo.tree import Tree


def pair(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {i}", "chosen": f"good answer {i}", "rejected": f"bad {i}", **more}


PAIRS = [pair(i) for i in range(40)]


def run(
    train: Any = None,
    kind: str = "pairs",
    *,
    source: Any = "unused",
    mismatched: bool = False,
    live_eval: Any = None,
    tokenizer: Any = None,
    seed: int = 1,
    **keys: Any,
) -> Prepared:
    """prepare(), from live rows or from `source`; the other keys are those of [data]."""
    said: list[str] = []
    data, tokenizer = Data(train=source, **keys), tokenizer or chat_tokenizer()
    prepared = prepare(
        data, kind, tokenizer, needs_mismatched=mismatched, train=train, eval=live_eval, seed=seed, say=said.append
    )
    lines = prepared.report.lines()
    assert said[-len(lines) :] == lines
    return prepared


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text(tree: Tree, k: int = 0) -> str:
    return str(chat_tokenizer().decode([*tree.prompt, *tree.completions[k].ids]))


def content(tree: Tree) -> bytes:
    return b"|".join([tree.prompt.tobytes(), *(c.ids.tobytes() for c in tree.completions)])


def test_pairs_in_file_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", PAIRS)
    prepared = run(source=path)
    assert [tree.row for tree in prepared.train] == list(range(40))
    assert [tree.where for tree in prepared.train] == [f"{path}:{i}" for i in range(1, 41)]
    assert "question 7<|im_end|>\n<|im_start|>assistant\ngood answer 7<|im_end|>" in text(prepared.train[7])
    assert "bad 7" in text(prepared.train[7], 1)
    assert len(prepared.eval) == 0
    assert all(c.ids.dtype == np.int32 for c in prepared.train[0].completions)
    source = prepared.report.sources[0]
    assert (source.rows, source.kept, source.format, dict(source.dropped)) == (40, 40, "pairs", {})
    assert len(source.sha256) == 64


def test_several_sources_limits_and_own_columns(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", PAIRS)
    second = write(tmp_path / "b.jsonl", [{"prompt": "x", "good": "y", "rejected": "z", "id": 3}])
    sources = (Source(first, limit=3), Source(second, columns={"chosen": "good"}))
    prepared = run(source=sources)
    assert len(prepared.train) == 4
    assert "y<|im_end|>" in text(prepared.train[3])
    assert prepared.report.sources[0].rows == 3
    assert prepared.report.sources[1].unused == ("id",)
    with pytest.raises(DataError, match=r'a\.jsonl: data\.columns maps chosen = "good"'):
        run(source=sources, columns={"chosen": "good"})


def test_a_renamed_column_is_gone_so_that_the_other_format_is_found() -> None:
    prepared = run(PAIRS, "demonstrations", columns={"completion": "rejected"})
    assert prepared.report.sources[0].format == "prompt_completion"
    assert "bad 0" in text(prepared.train[0])


def test_kept_columns_arrive_in_extra() -> None:
    rows = [pair(i, score=i / 2, flag=i % 2 == 0) for i in range(3)]
    assert [dict(t.extra) for t in run(rows, keep=("score", "flag")).train] == [
        {"score": 0.0, "flag": 1.0},
        {"score": 0.5, "flag": 0.0},
        {"score": 1.0, "flag": 1.0},
    ]
    rows[1]["score"] = "high"
    with pytest.raises(DataError, match=r"train row 2: column \"score\" is 'high'"):
        run(rows, keep=("score",))
    with pytest.raises(DataError, match=r'names "scores".*"score"'):
        run(rows, keep=("scores",))


def test_live_data_sets() -> None:
    datasets = pytest.importorskip("datasets")
    live = datasets.Dataset.from_list(PAIRS)
    prepared = run(live, live_eval=live.select([3]).to_iterable_dataset())
    assert list(map(content, prepared.train)) == list(map(content, run(PAIRS).train))
    assert len(prepared.eval) == 1
    assert prepared.report.sources[0].sha256 == live._fingerprint
    with pytest.raises(DataError, match="one split"):
        run(datasets.DatasetDict(train=live))


def test_a_conversation_that_the_assistant_begins_needs_a_system_text() -> None:
    rows = [{"messages": [{"role": "assistant", "content": "hello"}]}]
    with pytest.raises(DataError, match="no-prompt"):
        run(rows, "demonstrations")
    assert text(run(rows, "demonstrations", system="the shop").train[0]).startswith("<|im_start|>system\nthe shop")


# --- bad rows


BAD = [
    {**PAIRS[0], "chosen": ""},
    {**PAIRS[1], "rejected": PAIRS[1]["chosen"]},
    {"prompt": "x"},
    {**PAIRS[2], "prompt": 3},
]


def test_bad_rows_stop_the_run_and_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [PAIRS[3], *BAD, *BAD])
    with pytest.raises(DataError) as error:
        run(source=path, live_eval=[{**PAIRS[0], "rejected": None}])
    message = str(error.value)
    assert "9 of 10 rows cannot be used" in message
    for line, reason in (
        (2, "empty-completion"),
        (3, "chosen-equals-rejected"),
        (4, "missing-column"),
        (5, "not-text"),
    ):
        assert any(f"a.jsonl:{line}:" in text and f"[{reason}]" in text for text in message.splitlines())
    assert "a.jsonl:7" not in message  # five are named, the others counted
    assert "and 4 more" in message
    assert 'on_bad_row = "skip"' in message


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [PAIRS[3], *BAD, PAIRS[4]])
    path.write_bytes(path.read_bytes() + b"{broken\n\xff\n")
    prepared = run(source=str(path), on_bad_row="skip")
    assert [tree.row for tree in prepared.train] == [0, 1]
    source = prepared.report.sources[0]
    assert (source.rows, source.kept) == (8, 2)
    assert source.dropped == Counter(
        {"empty-completion": 1, "chosen-equals-rejected": 1, "missing-column": 1, "not-text": 1, "invalid-json": 1,
         "invalid-utf8": 1}
    )  # fmt: skip
    assert any("dropped 1" in line and "[invalid-json]" in line for line in prepared.report.lines())


def test_nothing_left_is_an_error_with_the_reasons() -> None:
    for rows, reason in ((BAD, "not-text"), ([3, 4], "not-an-object"), ([{}, {}], "missing-column")):
        with pytest.raises(DataError, match=rf"(?s)no row is left of {len(rows)}.*{reason}"):
            run(rows, on_bad_row="skip")
    with pytest.raises(DataError, match=r"(?s)no row is left of 40.*40 x too-long"):
        run(PAIRS, max_length=5)
    with pytest.raises(DataError, match="train: holds no rows"):
        run([])
    with pytest.raises(DataError, match="eval: holds no rows"):
        run(PAIRS, live_eval=[])


def test_an_empty_file(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.csv"):
        (tmp_path / name).write_text("\n")
        with pytest.raises(DataError, match=rf"{name}: holds no rows"):
            run(source=str(tmp_path / name))


def test_a_bad_row_that_only_the_tokenizer_finds() -> None:
    strips = "{% for m in messages %}<|im_start|>{{ m.content.strip() }}<|im_end|>{% endfor %}"
    rows = [PAIRS[0], {**PAIRS[1], "rejected": PAIRS[1]["chosen"] + " "}]
    tokenizer = make_tokenizer(template=strips)
    with pytest.raises(DataError, match=r"train row 2: chosen and rejected have the same tokens"):
        run(rows, tokenizer=tokenizer)
    assert run(rows, tokenizer=tokenizer, on_bad_row="skip").report.sources[0].dropped == {"chosen-equals-rejected": 1}


@pytest.mark.parametrize(("tag", "column"), [("<image>", "images"), ("<video>", "videos"), ("<audio>", "audio")])
def test_a_text_about_an_image_is_a_bad_row_and_the_tag_alone_is_counted(tag: str, column: str) -> None:
    seen = [pair(0), pair(1, prompt=f"{tag}What is this?", **{column: ["a.png"]})]
    with pytest.raises(DataError, match=rf"train row 2: {tag} in the text, and the column \"{column}\": .*\[media\]"):
        run(seen)
    skipped = run(seen, on_bad_row="skip").report.sources[0]
    assert (skipped.kept, skipped.dropped) == (1, {"media": 1})
    unseen = [pair(0, prompt=f"What is {tag}?", **{column: []}), pair(1, prompt="a < b", **{column: ["b.png"]})]
    report = run(unseen).report.sources[0]
    assert report.kept == 2
    assert f"warning: placeholders that nobody has filled in: {tag} in 1 rows" in report.said
    assert report.unused == (column,)


# --- kinds


def test_conversions_are_reported() -> None:
    labelled = run(PAIRS, "labelled")
    assert [tree.label for tree in labelled.train[:4]] == [True, False, True, False]
    assert len(labelled.train) == 80
    assert labelled.report.conversions == (
        "train: 40 pairs -> 80 examples: chosen labelled true and rejected false, two examples of each pair",
    )
    shown = run(PAIRS, "demonstrations")
    assert [len(tree.completions) for tree in shown.train] == [1] * 40
    assert "good answer 3" in text(shown.train[3])
    assert run(PAIRS).report.conversions == ()
    with pytest.raises(DataError, match="train: holds demonstrations, and the loss wants pairs"):
        run([{"prompt": "a", "completion": "b"}])


# --- truncation


def test_drops_and_cuts_are_counted() -> None:
    rows = [*PAIRS[:3], {**PAIRS[3], "chosen": "today " * 50}, {**PAIRS[4], "prompt": "today " * 50}]
    dropped = run(rows, max_length=60)
    assert dropped.report.sources[0].dropped == {"too-long": 2}
    assert [tree.row for tree in dropped.train] == [0, 1, 2]
    assert any("2 of 5 examples are left out" in w and "max_length = 60" in w for w in dropped.report.warnings)
    assert not run([*PAIRS[:20], rows[3]], max_length=60).report.warnings
    cut = run(rows, max_length=60, truncation="completion_right")
    assert cut.report.sources[0].cut == {"completion-right": 1}
    assert cut.report.sources[0].dropped == {"no-room-for-completion": 1}
    left = run(rows, max_length=60, truncation="prompt_left")
    assert left.report.sources[0].cut == {"prompt-left": 2}
    for prepared in (dropped, cut, left):
        assert max(len(t.prompt) + len(c.ids) for t in prepared.train for c in t.completions) <= 60
    assert any("[completion-right]" in line for line in cut.report.lines())
    same = {**PAIRS[5], "chosen": "today " * 50 + "good", "rejected": "today " * 50 + "bad"}
    equal = run([*PAIRS[:2], same], max_length=60, truncation="completion_right")
    assert equal.report.sources[0].dropped == {"equal-after-cut": 1}


# --- weights


def test_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", PAIRS)
    for weight, low, high in ((1.0, 40, 40), (2.0, 80, 80), (0.5, 10, 30), (2.5, 90, 110)):
        prepared = run(source=(Source(path, weight=weight),))
        counts = Counter(map(content, prepared.train))
        assert low <= len(prepared.train) <= high
        assert set(counts.values()) <= {int(weight), int(weight) + (weight % 1 > 0)} - {0}
        assert [tree.row for tree in prepared.train] == list(range(len(prepared.train)))
        assert prepared.report.sources[0].counted == len(prepared.train)
    half = run(source=(Source(path, weight=0.5),))
    assert half.report.sources[0].dropped == {"weight": 40 - len(half.train)}


def test_a_weight_picks_by_content(tmp_path: Path) -> None:
    picked = []
    for name, rows in (("a.jsonl", PAIRS), ("b.jsonl", PAIRS[::-1]), ("c.jsonl", [{**r, "id": 1} for r in PAIRS])):
        prepared = run(source=(Source(write(tmp_path / name, rows), weight=0.5),), seed=len(picked))
        picked.append({content(tree) for tree in prepared.train})
    assert picked[0] == picked[1] == picked[2]
    limited = run(source=(Source(str(tmp_path / "a.jsonl"), weight=0.5, limit=20),))
    assert {content(tree) for tree in limited.train} <= picked[0]  # the limit comes before the weight


# --- held-out rows


def prompts(trees: list[Tree]) -> set[bytes]:
    return {tree.prompt.tobytes() for tree in trees}


def test_rows_are_held_out_by_prompt_and_content() -> None:
    rows = [*PAIRS, *[{**pair(i), "rejected": f"worse {i}"} for i in range(0, 40, 2)]]
    one = run(rows, eval_fraction=0.25)
    assert len(one.eval) == 15
    assert len(one.train) == 45
    assert not prompts(one.train) & prompts(one.eval)
    assert [tree.row for tree in one.eval] == list(range(15))
    assert [tree.row for tree in one.train] == list(range(45))
    two = run(rows[::-1], eval_fraction=0.25, seed=7)
    assert prompts(one.eval) == prompts(two.eval)
    assert "15 held out (by prompt" in "".join(one.report.lines())


def test_each_side_has_at_least_one_row() -> None:
    for fraction in (0.001, 0.999):
        prepared = run(PAIRS[:2], eval_fraction=fraction)
        assert (len(prepared.train), len(prepared.eval)) == (1, 1)
    many = [{**PAIRS[0], "chosen": f"good {i}"} for i in range(10)]
    prepared = run([*many, PAIRS[1]], eval_fraction=0.5)
    assert (len(prepared.train), len(prepared.eval)) == (10, 1)
    with pytest.raises(DataError, match="the same prompt"):
        run(many, eval_fraction=0.5)


def test_held_out_rows_count_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", PAIRS)
    prepared = run(source=(Source(path, weight=3.0),), eval_fraction=0.25)
    assert (len(prepared.train), len(prepared.eval)) == (90, 10)


def test_named_held_out_rows_and_shared_prompts(tmp_path: Path) -> None:
    prepared = run(PAIRS[:30], live_eval=PAIRS[28:])
    assert (len(prepared.train), len(prepared.eval)) == (30, 12)
    assert any("2 of 12 held-out rows have a prompt that is also trained on" in w for w in prepared.report.warnings)
    train, held = write(tmp_path / "a.jsonl", PAIRS[:30]), write(tmp_path / "b.jsonl", PAIRS[30:])
    files = run(source=train, eval=held)
    assert len(files.eval) == 10
    assert not files.report.warnings
    assert len(run(PAIRS).eval) == 0


# --- mismatched completions


def mismatches(trees: list[Tree]) -> dict[bytes, bytes]:
    return {content(tree): tree.mismatched.ids.tobytes() for tree in trees if tree.mismatched is not None}


def test_mismatched_completions_are_of_another_prompt() -> None:
    prepared = run(PAIRS, "labelled", mismatched=True, eval_fraction=0.2)
    for trees in (prepared.train, prepared.eval):
        owners = {c.ids.tobytes(): tree.prompt.tobytes() for tree in trees for c in tree.completions}
        for tree in trees:
            assert tree.mismatched is not None
            assert owners[tree.mismatched.ids.tobytes()] != tree.prompt.tobytes()
            assert tree.mismatched.mask is None
    used = Counter(tree.mismatched.ids.tobytes() for tree in prepared.train if tree.mismatched)
    assert max(used.values()) <= 4  # no single completion stands for all
    assert not prepared.report.cut


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(12)), st.integers(0, 99))
def test_mismatched_completions_do_not_depend_on_order_or_seed(order: list[int], seed: int) -> None:
    rows = [{**pair(i), "prompt": f"question {i % 5}"} for i in range(12)]
    expected = mismatches(run(rows, mismatched=True).train)
    assert mismatches(run([rows[i] for i in order], mismatched=True, seed=seed).train) == expected


def test_the_same_prompt_under_other_ids_is_no_other_prompt() -> None:
    labels = {"label": True}  # "foo" + "bar" is one token, so the prompts of the first two have other ids
    rows = [{"prompt": "hello foo", "completion": end, **labels} for end in ("bar", " today")]
    rows.append({"prompt": "question", "completion": " good", **labels})
    trees = run(rows, "labelled", mismatched=True, tokenizer=make_tokenizer()).train
    assert trees[0].prompt.tolist() != trees[1].prompt.tolist()
    for tree in trees[:2]:
        assert tree.mismatched is not None
        assert tree.mismatched.ids.tolist() == trees[2].completions[0].ids.tolist()


def test_prompts_that_were_cut_to_the_same_are_no_other_prompts() -> None:
    rows = [{**pair(i), "prompt": f"{i} " + "today " * 40} for i in range(3)]
    with pytest.raises(DataError, match="no row with another prompt"):
        run(rows, mismatched=True, max_length=40, truncation="prompt_left")


def test_one_prompt_has_no_mismatched_completion() -> None:
    rows = [{**pair(i), "prompt": "the same"} for i in range(3)]
    with pytest.raises(DataError, match=r"training rows.*has no row with another prompt"):
        run(rows, mismatched=True)
    assert run(rows).train
    both = [*rows, pair(1)]  # one row with another prompt is enough for all of them
    assert all(tree.mismatched is not None for tree in run(both, mismatched=True).train)
    with pytest.raises(DataError, match="held-out rows"):
        run(PAIRS, live_eval=rows, mismatched=True)


def test_mismatched_completions_fit_into_max_length() -> None:
    long = [{**pair(i), "prompt": "today " * 30 + str(i), "chosen": "good", "rejected": "bad"} for i in range(4)]
    wide = [{**pair(i), "chosen": "fine " * 30, "rejected": f"bad {i}"} for i in range(4)]
    prepared = run([*long, *wide], mismatched=True, max_length=60)
    assert not prepared.report.sources[0].dropped
    assert prepared.report.cut["mismatched-right"] > 0
    assert max(len(t.prompt) + len(t.mismatched.ids) for t in prepared.train if t.mismatched) <= 60
    assert any("[mismatched-right]" in line for line in prepared.report.lines())


# --- the report


def test_lengths() -> None:
    prepared = run(PAIRS, eval_fraction=0.25)
    trees = [*prepared.train, *prepared.eval]
    for name, lengths in (
        ("prompt", sorted(len(t.prompt) for t in trees)),
        ("completion", sorted(len(c.ids) for t in trees for c in t.completions)),
    ):
        found = prepared.report.lengths[name]
        assert (found.min, found.max) == (lengths[0], lengths[-1])
        assert found.median in lengths
        assert sum(n <= found.p95 for n in lengths) >= 0.95 * len(lengths)


def test_warnings() -> None:
    raw = run([{"prompt": "hello foo", "completion": "bar"}], "demonstrations", tokenizer=make_tokenizer(), system="s")
    assert any("joins the prompt's end" in w for w in raw.report.warnings)
    assert any("data.system is not used" in w for w in raw.report.warnings)
    no_eos = run(PAIRS[:1], tokenizer=make_tokenizer(eos=None))
    assert any("no EOS" in w for w in no_eos.report.warnings)
    open_end = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert any("end-of-turn" in w for w in run(PAIRS[:1], tokenizer=make_tokenizer(template=open_end)).report.warnings)
    assert not run(PAIRS[:1]).report.warnings


def test_264_rows_take_well_under_two_seconds() -> None:
    rows = [pair(i, prompt=f"hello {i} " * 20) for i in range(264)]
    chat_tokenizer()
    start = time.perf_counter()
    run(rows, "labelled", mismatched=True, eval_fraction=0.2)
    assert time.perf_counter() - start < 2


# --- poisoned input

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["\ud800", "</s>"])
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human"])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES | SCALARS, "content": st.text(max_size=6) | SCALARS}, optional={"tool_calls": SCALARS}
    ),
    max_size=4,
)
JSON = st.recursive(
    SCALARS, lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=4), c, max_size=3), max_leaves=6
)
COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages", "label", "score")
ROWS = st.lists(
    st.dictionaries(st.sampled_from(COLUMNS) | st.text(max_size=3), st.text(max_size=9) | MESSAGES | JSON, max_size=7)
    | JSON,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(
    ROWS,
    st.sampled_from(["pairs", "labelled", "demonstrations"]),
    st.sampled_from(["fail", "skip"]),
    st.sampled_from(["drop", "prompt_left", "completion_right"]),
    st.booleans(),
)
def test_poisoned_rows_raise_nothing_but_data_errors(
    rows: list[Any], kind: str, on_bad_row: str, truncation: str, chat: bool
) -> None:
    keys = {"on_bad_row": on_bad_row, "truncation": truncation, "max_length": 40, "max_completion_length": 5}
    try:
        prepared = run(rows, kind, mismatched=True, tokenizer=None if chat else make_tokenizer(), **keys)
    except DataError as error:
        str(error).encode()
        return
    for tree in prepared.train:
        assert len(tree.prompt) >= 1
        assert all(completion.counted for completion in tree.branches)
        assert len(tree.prompt) + max(len(c.ids) for c in tree.branches) <= 40


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz"]),
    st.binary(max_size=60)
    | ROWS.map(lambda rows: json.dumps(rows).encode())
    | ROWS.map(repr).map(lambda s: s.encode("utf-8", "replace")),
    st.sampled_from([b"", b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', b"prompt,completion\na,b\n"]),
)
def test_poisoned_files_raise_nothing_but_data_errors(ending: str, content: bytes, before: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{ending}"
        path.write_bytes(before + content)
        for on_bad_row in ("fail", "skip"):
            try:
                run(source=str(path), on_bad_row=on_bad_row)
            except DataError as error:
                str(error).encode()
