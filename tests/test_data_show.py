"""What people see of rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_data_tokenizers import chat_tokenizer

from alignzoo.data.show import marked_example, rendered_row, show_rows
from alignzoo.errors import DataError
from alignzoo.tree import Completion, Tree


def ids(text: str) -> np.ndarray:
    return np.asarray(chat_tokenizer()(text).input_ids, np.int32)


def shown(path: str, **options: object) -> str:
    console = Console(width=100, record=True, quiet=False, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(show_rows(path, **options))  # type: ignore[arg-type]
    return console.export_text()


def test_a_pair_is_marked_without_colour() -> None:
    rejected = ids("not learned bad<|im_end|>")
    mask = np.arange(len(rejected)) >= len(ids("not learned"))
    tree = Tree(0, ids("question [bold]"), (Completion(ids("good<|im_end|>")), Completion(rejected, mask)), "f.jsonl:1")
    text = marked_example(tree, chat_tokenizer())
    assert "question [bold]" in text.plain  # brackets in the data are no markup
    assert "⟦good<|im_end|>⟧" in text.plain
    assert "not learned⟦ bad<|im_end|>⟧" in text.plain
    assert "f.jsonl:1" in text.plain
    assert f"rejected ({len(rejected)} tokens, {int(mask.sum())} learned)" in text.plain
    assert text.spans
    assert rendered_row(tree, chat_tokenizer()) == text.plain


def test_other_kinds_are_named() -> None:
    one, tokenizer = (Completion(ids("good")),), chat_tokenizer()
    labelled = Tree(0, ids("q"), one, label=False, mismatched=Completion(ids("other")))
    assert "undesirable" in rendered_row(labelled, tokenizer)
    assert "mismatched" in rendered_row(labelled, tokenizer)
    assert "reward 0.5" in rendered_row(Tree(0, ids("q"), one, rewards=(0.5,)), tokenizer)
    assert "--- completion (" in rendered_row(Tree(3, ids("q"), one), tokenizer)
    assert "row 3" in rendered_row(Tree(3, ids("q"), one), tokenizer)


def test_long_parts_lose_their_middle_and_say_so() -> None:
    tree = Tree(0, ids("start " + "x" * 500 + " end"), (Completion(ids("good")),))
    text = rendered_row(tree, chat_tokenizer(), limit=40)
    assert "[... 470 characters ...]" in text
    assert "start" in text
    assert "end" in text


def test_show_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad" if i else "good", "id": i} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    text = shown(str(path), limit=2)
    for words in ("pairs", "prompt, chosen, rejected, id", "6 read, 4 usable", "1 bad", "[chosen-equals-rejected]",
                  "[invalid-json]", "a.jsonl:6", "q1", "q2", "rejected"):  # fmt: skip
        assert words in text
    assert "q3" not in text
    assert "pairs (made into demonstrations or labelled or prompts where that is wanted)" in text
    renamed = shown(str(path), limit=1, columns={"completion": "chosen"}, format="prompt_completion")
    assert "demonstrations" in renamed


def test_show_conversations_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    turns = [{"role": "user", "content": "hi [red]"}, {"role": "assistant", "content": "hello"}]
    path.write_text(json.dumps([{"messages": turns, "label": True}]))
    text = shown(str(path))
    assert "user: hi [red]" in text
    assert "assistant: ⟦hello⟧" in text
    assert "true (desirable)" in text
    assert "1 desirable, 0 undesirable" in text


def test_show_tools_placeholders_and_every_learned_turn(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    said = [
        ("human", "rice?"),
        ("function_call", '{"name": "find", "arguments": {"what": "rice"}}'),
        ("observation", "yes"),
    ]
    turns = [{"from": speaker, "value": text} for speaker, text in [*said, ("gpt", "{{name}} has it")]]
    path.write_text(json.dumps([{"conversations": turns, "tools": '[{"name": "find"}]', "id": 7}]))
    text = shown(str(path))
    for words in ("sharegpt", "│ tools        │ find", 'assistant: ⟦find({"what": "rice"})⟧', "tool: yes",
                  "user: rice?", "assistant: ⟦{{name}} has it⟧", "{{name}} in 1 rows", "all of them learned",
                  "not used  id"):  # fmt: skip
        assert words in text


def test_show_prompts_text_and_dropped_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "1 + 1?", "truth": {"is": 2}}\n')
    text = shown(str(path))
    for words in ("kind     prompts", 'column "question" is read as prompt', 'truth: {"is": 2}'):
        assert words in text
    path.write_text('{"text": "Once upon a time"}\n')
    text = shown(str(path))
    assert "⟦Once upon a time⟧" in text
    assert "│ prompt" not in text
    tie = {"context": "q", "response1": "a", "response2": "b", "overall_preference": 0}
    path.write_text(json.dumps(tie) + "\n" + json.dumps({**tie, "overall_preference": 1}) + "\n")
    text = shown(str(path))
    assert "2 read, 1 usable" in text
    assert "1 dropped: neither answer is preferred [no-preference]" in text


def test_the_command_takes_a_format_and_columns(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from alignzoo.cli import cli

    path = tmp_path / "a.jsonl"
    path.write_text('{"task": "1 + 1?", "solved": "2", "other": "3"}\n')
    command = ["data", "show", str(path)]
    asked = ["--column", "prompt=task", "--column", "completion=solved"]
    result = CliRunner().invoke(cli, [*command, *asked])
    assert result.exit_code == 0
    assert "prompt_completion" in result.output
    result = CliRunner().invoke(cli, [*command, *asked, "--format", "prompts"])
    assert "kind     prompts" in result.output
    for wrong, words in ((["--format", "promts"], 'did you mean "prompts"'), (["--column", "prompt"], "OURS=THEIRS")):
        result = CliRunner().invoke(cli, [*command, *wrong])
        assert result.exit_code == 2
        assert words in result.output


def test_a_file_without_one_readable_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{broken\n")
    with pytest.raises(DataError, match=r"(?s)no row can be read.*a\.jsonl:1: broken JSON"):
        show_rows(str(path))
