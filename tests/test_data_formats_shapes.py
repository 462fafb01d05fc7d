"""The shapes of rows that other projects write: Anthropic, Alpaca, ShareGPT, KTO, HelpSteer3, plain text, prompts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from alignzoo.data import formats
from alignzoo.data.kinds import choose_turns
from alignzoo.data.reading import Reading, read
from alignzoo.data.rows import BadRow, Dropped, Example
from alignzoo.data.sources import open_live
from alignzoo.errors import DataError
from alignzoo.recipe import Data, Source


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def detect(row: dict[str, Any]) -> formats.Match:
    return formats.detect(list(row), "auto", "file", [row])


def convert(row: dict[str, Any]) -> Example:
    return detect(row).convert(row)


def reading_of(rows: list[Any], kind: str | None = None, **keys: Any) -> Reading:
    return read(open_live(rows, "train"), Source(path="train"), Data(train="train", **keys), kind)


def refused(row: dict[str, Any]) -> str:
    """The reason for which a row is bad, with its words."""
    with pytest.raises(BadRow) as problem:
        convert(row)
    return f"{problem.value.reason}: {problem.value.text}"


# --- Anthropic's transcripts

ASKED = "\n\nHuman: What is open?\n\nAssistant: The shop.\n\nHuman: Until when?\nToday.\n\nAssistant:"


def test_transcripts_share_their_beginning() -> None:
    row = {"chosen": f"{ASKED} Until nine.\n\nBye.", "rejected": f"{ASKED} Who knows"}
    assert detect(row).name == "hh"
    assert convert(row) == Example(
        "pairs",
        (user("What is open?"), assistant("The shop."), user("Until when?\nToday.")),
        ((assistant("Until nine.\n\nBye."),), (assistant("Who knows"),)),
    )


def test_one_transcript_among_the_first_rows_decides() -> None:
    rows = [{"chosen": "a", "rejected": "b"}, {"chosen": f"{ASKED} a", "rejected": f"{ASKED} b"}]
    assert formats.detect(["chosen", "rejected"], "auto", "f", rows).name == "hh"
    assert formats.detect(["chosen", "rejected"], "auto", "f", rows[:1]).name == "pairs_implicit"
    assert formats.detect(["chosen", "rejected"], "hh", "f", rows[:1]).name == "hh"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (f"{ASKED} a", f"{ASKED} a", "chosen-equals-rejected"),
        (f"{ASKED} a", f"{ASKED}", "empty-completion: rejected"),
        (f"Well. {ASKED} a", f"{ASKED} b", 'bad-transcript: column "chosen" begins with \'Well.'),
        (f"{ASKED} a", "\n\nHuman: Other?\n\nAssistant: x\n\nHuman: y\n\nAssistant: z", "not-assistant"),
        (f"{ASKED} a\n\nHuman: b", f"{ASKED} a\n\nHuman: c", "not-assistant"),
        (f"{ASKED} a", "text", "bad-transcript: column \"rejected\" begins with 'text'"),
        (f"{ASKED} a", "", "bad-transcript"),
        (f"{ASKED} a", None, "missing-column"),
    ],
)
def test_malformed_transcripts(chosen: Any, rejected: Any, reason: str) -> None:
    found = formats.detect(["chosen", "rejected"], "hh", "f")
    with pytest.raises(BadRow) as problem:
        found.convert({"chosen": chosen, "rejected": rejected})
    assert f"{problem.value.reason}: {problem.value.text}".startswith(reason)


def test_a_transcript_as_prompt() -> None:
    row = {"prompt": ASKED, "chosen": " Until nine.", "rejected": " No idea.", "response": "x"}
    assert detect(row).name == "hh_prompt"
    example = convert(row)
    assert example.prompt[-1] == user("Until when?\nToday.")
    assert example.completions == ((assistant("Until nine."),), (assistant("No idea."),))
    assert detect({**row, "prompt": "Human: a question about Assistant:"}).name == "pairs"


# --- Alpaca

ALPACA = {"instruction": "Translate.", "input": "gut", "output": "good"}


def test_alpaca_joins_instruction_and_input_with_a_newline() -> None:
    assert convert(ALPACA) == Example("demonstrations", "Translate.\ngut", ("good",))
    assert convert({**ALPACA, "input": ""}).prompt == "Translate."
    assert convert({**ALPACA, "input": None}).prompt == "Translate."
    assert convert({**ALPACA, "instruction": ""}).prompt == "gut"
    assert refused({**ALPACA, "instruction": "", "input": " "}).startswith("no-prompt")
    assert refused({**ALPACA, "output": ""}).startswith("empty-completion")
    assert refused({**ALPACA, "input": 3}).startswith("not-text")


def test_alpaca_with_system_and_history() -> None:
    row = {**ALPACA, "system": "the shop", "history": [["hi", "hello"], ["a", "b"]]}
    example = convert(row)
    assert example.prompt == (system("the shop"), user("hi"))
    asked = user("Translate.\ngut")
    assert example.completions == ((assistant("hello"), user("a"), assistant("b"), asked, assistant("good")),)
    last = choose_turns(example, "last")  # as in other projects, the history's answers are learned unless told not to
    assert last.prompt == (system("the shop"), user("hi"), assistant("hello"), user("a"), assistant("b"), asked)
    assert last.completions == ((assistant("good"),),)
    assert convert({**row, "system": "", "history": []}) == convert(ALPACA)
    for wrong in ("hi", [["hi"]], [["hi", 3]], 7):
        assert refused({**ALPACA, "history": wrong}).startswith("not-text")


def test_alpaca_pairs_and_labels() -> None:
    asked = {"instruction": "Translate.", "input": "gut"}
    row = {**asked, "chosen": "good", "rejected": "bad", "system": "the shop"}
    assert detect(row).name == "alpaca_pairs"
    prompt = (system("the shop"), user("Translate.\ngut"))
    assert convert(row) == Example("pairs", prompt, ((assistant("good"),), (assistant("bad"),)))
    labelled = {**ALPACA, "kto_tag": True, "history": [["hi", "hello"]]}
    assert detect(labelled).name == "labelled_alpaca"
    example = convert(labelled)  # a label is for the last answer alone
    assert example == Example(
        "labelled", (user("hi"), assistant("hello"), user("Translate.\ngut")), ((assistant("good"),),), True
    )


# --- ShareGPT


def turn(speaker: str, text: Any) -> dict[str, Any]:
    return {"from": speaker, "value": text}


CALL = {"name": "find", "arguments": {"what": "rice", "where": ["here"]}}
TOOLS = [{"name": "find", "description": "Finds.", "parameters": {"type": "object", "properties": {}}}]
CALLED = [
    turn("human", "Rice?"),
    turn("function_call", json.dumps(CALL)),
    turn("observation", '{"found": true}'),
    turn("gpt", "Here."),
]


def test_sharegpt_turns() -> None:
    row = {
        "conversations": [
            turn("system", "s"),
            turn("human", "a"),
            turn("gpt", "b"),
            turn("user", "c"),
            turn("GPT", "d"),
        ]
    }
    assert convert(row) == Example(
        "demonstrations", (system("s"), user("a")), ((assistant("b"), user("c"), assistant("d")),)
    )
    same = {"conversations": [system("s"), user("a"), assistant("b"), user("c"), assistant("d")]}
    assert convert(same) == convert(row)


def test_trl_reads_the_same_of_sharegpt_and_its_pairs() -> None:
    from datasets import Dataset
    from trl import maybe_convert_to_chatml, unpair_preference_dataset

    said = [turn("system", "s"), turn("user", "a"), turn("assistant", "b")]
    theirs = maybe_convert_to_chatml({"conversations": json.loads(json.dumps(said))})["messages"]
    ours = convert({"conversations": said})
    assert [*ours.prompt, *ours.completions[0]] == theirs
    rows = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(3)]
    unpaired = unpair_preference_dataset(Dataset.from_list(rows))
    examples = [(e.prompt, e.completions[0], e.label) for e in reading_of(rows, "labelled").examples]
    assert sorted(examples) == sorted((row["prompt"], row["completion"], row["label"]) for row in unpaired)


def test_turns_of_from_and_value_in_other_columns() -> None:
    row = {"chosen": [turn("human", "a"), turn("gpt", "b")], "rejected": [turn("human", "a"), turn("gpt", "c")]}
    assert convert(row) == Example("pairs", (user("a"),), ((assistant("b"),), (assistant("c"),)))
    assert convert({"messages": row["chosen"]}) == Example("demonstrations", (user("a"),), ((assistant("b"),),))
    assert convert({"prompt": [turn("human", "a")], "completion": "b"}).prompt == (user("a"),)


def test_sharegpt_calls_and_tools() -> None:
    example = convert({"conversations": CALLED, "tools": json.dumps(TOOLS)})
    assert example.tools == ({"type": "function", "function": TOOLS[0]},)
    called, result, said = example.completions[0]
    call = {"id": "call00001", "type": "function", "function": CALL}
    assert called == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert result == {"role": "tool", "content": '{"found": true}', "tool_call_id": "call00001"}
    assert said == assistant("Here.")
    two = [CALLED[0], turn("function_call", json.dumps([CALL, CALL])), *[CALLED[2]] * 3, *CALLED[1:]]
    called, *results, again = convert({"conversations": two}).completions[0][:5]
    assert [call["id"] for call in called["tool_calls"]] == ["call00001", "call00002"]
    assert [result.get("tool_call_id") for result in results] == ["call00001", "call00002", None]
    assert again["tool_calls"][0]["id"] == "call00003"
    for empty in ("", "[]", [], None):
        assert convert({"conversations": CALLED, "tools": empty}).tools == ()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": [turn("human", "?"), turn("function_call", "find rice")]}, "bad-tool-call"),
        ({"conversations": [turn("human", "?"), turn("function_call", "{}")]}, "bad-tool-call"),
        ({"conversations": [turn("human", "?"), turn("function_call", None)]}, "bad-tool-call"),
        (
            {"conversations": [turn("human", "?"), turn("robot", "!")]},
            'unknown-role: column "conversations", message 2',
        ),
        ({"conversations": [turn("human", "?"), turn("gpt", None)]}, "not-text"),
        ({"conversations": ["hi"]}, "not-text"),
        ({"conversations": "hi"}, "not-text"),
        ({"conversations": []}, "no-assistant-turn"),
        ({"conversations": [turn("human", "?")]}, "no-assistant-turn"),
        ({"conversations": CALLED, "tools": "{broken"}, "bad-tools"),
        ({"conversations": CALLED, "tools": ["find"]}, "bad-tools"),
        ({"conversations": CALLED, "tools": 3}, "bad-tools"),
        ({"conversations": CALLED, "system": 3}, "not-text"),
        ({"conversations": CALLED, "tools": '[{"name": "\\ud800"}]'}, "not-unicode"),
    ],
)
def test_wrong_sharegpt_rows(row: dict[str, Any], reason: str) -> None:
    assert refused(row).startswith(reason)


def test_sharegpt_pairs_and_labels() -> None:
    row = {"conversations": [turn("human", "a")], "chosen": turn("gpt", "good"), "rejected": turn("gpt", "bad")}
    assert detect(row).name == "sharegpt_pairs"
    expected = Example("pairs", (user("a"),), ((assistant("good"),), (assistant("bad"),)))
    assert convert(row) == convert({**row, "rejected": "bad"}) == expected
    assert convert({**row, "system": "s"}).prompt == (system("s"), user("a"))
    assert refused({**row, "chosen": turn("human", "x")}).startswith("not-assistant")
    labelled = {"conversations": [turn("human", "a"), turn("gpt", "b")], "label": False}
    assert convert(labelled) == Example("labelled", (user("a"),), ((assistant("b"),),), False)


def test_a_system_column_gives_way_to_a_system_turn() -> None:
    row = {"messages": [system("own"), user("a"), assistant("b")], "system": "other"}
    assert convert(row).prompt[0] == system("own")
    assert convert({"prompt": "a", "completion": "b", "system": "s"}).prompt == (system("s"), user("a"))


# --- tools in messages


def test_calls_of_messages_become_what_templates_read() -> None:
    calls = [{"id": "x", "function": {"name": "find", "arguments": '{"what": "rice"}'}}]  # as OpenAI has it
    row = {"messages": [user("?"), {"role": "assistant", "content": None, "tool_calls": calls}], "tools": TOOLS}
    example = convert(row)
    call = {"id": "x", "type": "function", "function": {"name": "find", "arguments": {"what": "rice"}}}
    assert example.completions == (({"role": "assistant", "content": "", "tool_calls": [call]},),)
    filled = [{"function": {"name": "find", "arguments": {"what": "rice", "unused": None}}}]  # Arrow fills columns up
    row = {"messages": [user("?"), {"role": "assistant", "content": "", "tool_calls": filled}]}
    arguments = convert(row).completions[0][0]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"what": "rice"}
    for wrong in ("x", [3], [{}], 3, [{"function": 3}]):
        row = {"messages": [user("?"), {"role": "assistant", "content": "", "tool_calls": wrong}]}
        assert refused(row).startswith("bad-tool-call")


def test_content_in_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert convert({"messages": [{"role": "user", "content": parts}, assistant("c")]}).prompt == (user("ab"),)
    parts[1] = {"type": "image", "url": "x"}
    assert refused({"messages": [{"role": "user", "content": parts}, assistant("c")]}).startswith("not-text")


# --- labels


@pytest.mark.parametrize("column", ["label", "kto_tag", "is_good", "desirable", "thumbs_up", "Label"])
def test_names_of_the_label(column: str) -> None:
    row = {"prompt": "a", "response": "b", column: True}
    assert detect(row).name == "labelled"
    assert convert(row) == Example("labelled", "a", ("b",), True)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (True, False), (1, 0), (1.0, 0.0), ("1", "0"), ("TRUE", " false "), ("👍", "👎"), ("👍🏽", "👎\ufe0f"),
        ("good", "bad"), ("desirable", "undesirable"), ("chosen", "rejected"), ("thumbs_up", "thumbs down"),
        ("Yes", "no"),
    ],
)  # fmt: skip
def test_values_of_the_label(good: Any, bad: Any) -> None:
    for value, label in ((good, True), (bad, False)):
        assert convert({"prompt": "a", "completion": "b", "label": value}).label is label


@pytest.mark.parametrize("value", ["fine", 2, -1, 0.5, [], {}, None, "", float("nan"), "\ud800"])
def test_an_unknown_label_shows_the_known_ones(value: Any) -> None:
    reason = refused({"prompt": "a", "completion": "b", "label": value})
    if value is None:
        assert reason.startswith("missing-column")
        return
    assert reason.startswith("label-not-bool")
    for known in ("true", "👍", "good", "desirable", "chosen", "false", "👎", "bad", "rejected"):
        assert known in reason


# --- HelpSteer3


def graded(grade: Any) -> dict[str, Any]:
    return {"context": [user("a")], "response1": "one", "response2": "two", "overall_preference": grade}


def test_the_sign_of_the_grade_orders_and_its_size_is_kept() -> None:
    rows = [graded(grade) for grade in (-3, -1, 0, 2, "3", 0)]
    reading = reading_of(rows, "pairs", keep=("preference_strength",))
    examples = list(reading.examples)
    assert [e.completions[0][0]["content"] for e in examples] == ["one", "one", "two", "two"]
    assert [e.completions[1][0]["content"] for e in examples] == ["two", "two", "one", "one"]
    assert [e.extra for e in examples] == [{"preference_strength": n} for n in (3, 1, 2, 3)]
    assert reading.tally.dropped == {"no-preference": 2}
    assert not reading.tally.bad
    assert reading.format is not None
    assert reading.format.name == "helpsteer3"


@pytest.mark.parametrize("grade", [4, -4, 0.5, "high", True, [], float("nan"), float("inf"), 10**400])
def test_grades_out_of_range(grade: Any) -> None:
    assert refused(graded(grade)).startswith("bad-preference")


def test_a_tie_of_equal_answers_is_a_bad_row_first() -> None:
    assert refused({**graded(0), "response2": "one"}).startswith("chosen-equals-rejected")
    with pytest.raises(Dropped, match="no-preference"):
        convert(graded(0))


# --- scores, text, prompts


@pytest.mark.parametrize("names", [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("margin",)])
def test_scores_beside_a_pair(names: tuple[str, ...]) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c", **{name: 1.5 + i for i, name in enumerate(names)}}
    reading = reading_of([row], "pairs", keep=names)
    assert [example.extra for example in reading.examples] == [{name: 1.5 + i for i, name in enumerate(names)}]
    assert reading.unused == ()
    assert reading_of([row], "pairs").unused == names


def test_plain_text() -> None:
    assert convert({"text": "Once upon a time.", "url": "x"}) == Example(
        "demonstrations", "", ("Once upon a time.",), raw=True
    )
    assert refused({"text": " "}).startswith("empty-completion")
    assert refused({"text": 3}).startswith("not-text")


def test_prompts_keep_their_other_columns_and_are_no_data_for_a_loss_of_today() -> None:
    rows = [{"prompt": "1 + 1?", "ground_truth": 2, "source": {"of": "me"}}]
    reading = reading_of(rows)
    (example,) = reading.examples
    assert (example.kind, example.prompt, example.completions) == ("prompts", "1 + 1?", ())
    assert example.columns == {"ground_truth": 2, "source": {"of": "me"}}
    assert reading.unused == ()
    for kind in ("demonstrations", "pairs", "labelled"):
        with pytest.raises(DataError, match=rf"(?s)train: holds prompts, and the loss wants {kind}.*ground_truth"):
            reading_of(rows, kind)
    assert refused({"prompt": " "}).startswith("no-prompt")


# --- other names of columns


@pytest.mark.parametrize(
    ("columns", "name", "aliases"),
    [
        (["question", "answer"], "prompt_completion", {"prompt": "question", "completion": "answer"}),
        (["query", "response"], "prompt_completion", {"prompt": "query", "completion": "response"}),
        (["instruction", "response"], "alpaca", {"output": "response"}),
        (["input", "output"], "prompt_completion", {"prompt": "input", "completion": "output"}),
        (["Prompt", "Completion"], "prompt_completion", {"prompt": "Prompt", "completion": "Completion"}),
        (["prompt", "response", "answer"], "prompt_completion", {"completion": "response"}),
        (["system", "question", "chosen", "rejected"], "pairs", {"prompt": "question"}),
        (["prompt", "instruction", "chosen", "rejected"], "pairs", {}),
        (["instruction", "input", "chosen", "rejected"], "alpaca_pairs", {}),
        (["input", "chosen", "rejected"], "pairs", {"prompt": "input"}),
        (["messages", "kto_tag"], "labelled_messages", {"label": "kto_tag"}),
        (["prompt", "messages", "chosen", "rejected"], "pairs", {}),
        (["question"], "prompts", {"prompt": "question"}),
        (["text", "messages"], "messages", {}),
        (["conversation"], "messages", {"messages": "conversation"}),
    ],
)
def test_other_names(columns: list[str], name: str, aliases: dict[str, str]) -> None:
    match = formats.detect(columns, "auto", "f")
    assert (match.name, match.aliases) == (name, aliases)


def test_other_names_are_said_and_may_still_be_kept() -> None:
    reading = reading_of([{"question": "a", "answer": "b", "score": 1, "url": "x"}], keep=("score",))
    assert [(e.prompt, e.completions, e.extra) for e in reading.examples] == [("a", ("b",), {"score": 1.0})]
    assert reading.remarks == ('column "question" is read as prompt; column "answer" is read as completion',)
    assert reading.unused == ("url",)
    reading = reading_of([{"prompt": "a", "completion": "b", "kto_tag": 1}], "labelled", keep=("kto_tag",))
    assert [(e.label, e.extra) for e in reading.examples] == [(True, {"kto_tag": 1.0})]


def test_a_named_format_takes_other_names_too() -> None:
    assert formats.detect(["question", "answer", "label"], "prompt_completion", "f").aliases["prompt"] == "question"
    assert reading_of([{"task": "a", "text": "b"}], columns={"prompt": "task", "completion": "text"}).remarks == ()


# --- what is learned of a conversation

LONG = {"messages": [user("a"), assistant("b"), user("c"), assistant("d"), assistant("e")]}


def test_train_on() -> None:
    every, last = (next(reading_of([LONG], train_on=mode).examples) for mode in ("every", "last"))
    assert every.prompt == (user("a"),)
    assert every.completions == ((assistant("b"), user("c"), assistant("d"), assistant("e")),)
    assert every.notes == ("every-turn",)
    assert last.prompt == (user("a"), assistant("b"), user("c"))
    assert last.completions == ((assistant("d"), assistant("e")),)
    assert last.notes == ("last-turn",)
    (one,) = reading_of([{"messages": [user("a"), assistant("b")]}]).examples
    assert one.notes == ()
    (labelled,) = reading_of([{**LONG, "label": True}]).examples  # a label is for the end of a conversation
    assert labelled.completions == last.completions


def test_an_empty_turn_is_bad_where_it_is_learned() -> None:
    row = {"messages": [user("a"), assistant(" "), user("c"), assistant("d")]}
    for mode, bad in (("every", {"empty-completion": 1}), ("last", {})):
        reading = reading_of([row], train_on=mode)
        assert len(list(reading.examples)) == 1 - len(bad)
        assert reading.tally.bad == bad


def test_undesirable_rows_are_no_demonstrations() -> None:
    rows = [{"prompt": "a", "completion": "b", "label": good} for good in (True, False, True)]
    reading = reading_of(rows, "demonstrations")
    assert [example.kind for example in reading.examples] == ["demonstrations"] * 2
    assert reading.tally.dropped == {"undesirable": 1}
    assert "labelled true" in reading.conversion


def test_placeholders_are_counted() -> None:
    texts = ["I am {{name}}.", "I am {{ name }} of {{author}}.", "{{", "{{ x | upper }}", "{{name}} {{name}}"]
    reading = reading_of([{"prompt": "who?", "chosen": text, "rejected": "no"} for text in texts], "labelled")
    assert len(list(reading.examples)) == 10
    found = {"placeholder: {{name}}": 2, "placeholder: {{ name }}": 1, "placeholder: {{author}}": 1}
    assert reading.tally.notes == found
