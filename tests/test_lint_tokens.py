"""`alignzoo data lint --recipe`: what template, tokenizer and lengths do to rows; the held-out rows of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from test_data_tokenizers import chat_tokenizer, make_tokenizer
from test_lint import clean, labelled, lines, lint, write

from alignzoo.cli import cli
from alignzoo.data.dataset import Prepared, make_pipeline, prepare
from alignzoo.data.lint import LintReport
from alignzoo.data.lint import lint as look
from alignzoo.data.lint_rules import Finding, Thresholds
from alignzoo.data.watch import Watch
from alignzoo.errors import DataError
from alignzoo.recipe import Data, Source


def looked(path: str, tokenizer: Any, kind: str = "pairs", **keys: Any) -> LintReport:
    data = Data(train=path, **keys)
    pipeline = make_pipeline(data, kind, tokenizer)
    watch = Watch(lambda _: None, Console())
    return look([Source(path=path)], [], data, Thresholds(rows=50), watch, pipeline=pipeline)


def prepared(data: Data) -> Prepared:
    """What a run would train on."""
    return prepare(data, "pairs", chat_tokenizer(), needs_mismatched=False, seed=0, say=lambda _: None)


def tokens(rows: list[dict[str, Any]], tmp_path: Path, tokenizer: Any, **keys: Any) -> dict[str, Finding]:
    report = looked(write(tmp_path / "a.jsonl", rows), tokenizer, **keys)
    return {finding.id: finding for finding in report.findings}


def places(finding: Finding) -> list[int]:
    return sorted(int(row.where.rpartition(":")[2]) for row in finding.rows)


BOS_TWICE = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
BOS_ONCE = BOS_TWICE.removeprefix("{{ bos_token }}")
OPEN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def test_clean_rows_have_no_finding_about_tokens(tmp_path: Path) -> None:
    assert set(tokens(clean(30), tmp_path, chat_tokenizer())) <= {"lengths", "languages"}


def test_doubled_bos(tmp_path: Path) -> None:
    """By the template; by text that begins with it; and by others who tokenise what the template wrote."""
    adds = make_tokenizer(bos=True)
    (tmp_path / "twice.jinja").write_text(BOS_TWICE)
    found = tokens(clean(12), tmp_path, adds, chat_template=str(tmp_path / "twice.jinja"))
    assert (found["doubled-bos"].severity, found["doubled-bos"].count) == ("error", 12)
    (tmp_path / "once.jinja").write_text(BOS_ONCE)
    rows = clean(12)
    rows[4]["prompt"] = "<s>" + rows[4]["prompt"]
    found = tokens(rows, tmp_path, adds, chat_template=str(tmp_path / "once.jinja"))
    assert places(found["doubled-bos"]) == [5]
    found = tokens(clean(12), tmp_path, adds, chat_template=str(tmp_path / "once.jinja"))
    assert "doubled-bos" not in found and found["bos-elsewhere"].severity == "note"
    found = tokens(clean(12), tmp_path, make_tokenizer(), chat_template=str(tmp_path / "once.jinja"))
    assert "bos-elsewhere" not in found
    raw = tokens(rows, tmp_path, adds, chat_template="none")
    assert "doubled-bos" not in raw  # raw text gets no second one


def test_missing_end_of_turn(tmp_path: Path) -> None:
    (tmp_path / "open.jinja").write_text(OPEN)
    found = tokens(clean(12), tmp_path, chat_tokenizer(), chat_template=str(tmp_path / "open.jinja"))
    assert (found["open-end"].severity, found["open-end"].count) == ("error", 12)
    assert "open-end" not in tokens(clean(12), tmp_path, chat_tokenizer(), chat_template="none")
    no_eos = make_tokenizer.__wrapped__(eos=None)
    assert tokens(clean(12), tmp_path, no_eos, chat_template="none")["open-end"].count == 12


@pytest.mark.parametrize(
    ("truncation", "finding"),
    [("drop", "too-long"), ("prompt_left", "prompt-left"), ("completion_right", "completion-right")],
)
def test_truncation_is_that_of_a_run(truncation: str, finding: str, tmp_path: Path) -> None:
    rows = clean(40)
    for i in range(10):
        rows[i]["prompt" if truncation == "prompt_left" else "chosen"] += " river" * (100 + i)
    keys: dict[str, Any] = {"truncation": truncation, "max_length": 400}
    found = tokens(rows, tmp_path, chat_tokenizer(), **keys)[finding]
    data = Data(train=str(tmp_path / "a.jsonl"), **keys)
    run = prepared(data).report.sources[0]
    assert found.count == {**run.dropped, **run.cut}[finding] == 10 and found.severity == "warning"
    assert found.rows[0].where.endswith(":10") and "data.max_length is 400" in found.rows[0].detail


def test_a_row_that_becomes_two_examples_counts_once(tmp_path: Path) -> None:
    rows = clean(20)
    rows[2] = {key: text + " river" * 200 for key, text in rows[2].items()}
    found = tokens(rows, tmp_path, chat_tokenizer(), kind="labelled", max_length=300)
    assert found["too-long"].count == 1
    undesirable = tokens(labelled(20, 15), tmp_path, chat_tokenizer(), kind="demonstrations")["undesirable"]
    assert (undesirable.severity, undesirable.count) == ("note", 5)


def test_rows_are_held_out_as_a_run_does_it(tmp_path: Path) -> None:
    """Near copies of what a run of the same recipe holds out are found, and those alone."""
    rows = clean(100)
    path = write(tmp_path / "a.jsonl", rows)
    keys: dict[str, Any] = {"eval_fraction": 0.2}
    run = prepared(Data(train=path, **keys))
    held = sorted(int(tree.where.rpartition(":")[2]) for tree in run.eval)
    report = looked(path, chat_tokenizer(), **keys)
    assert f"{len(held)} rows held out by prompt" in report.held_out
    near = [{**row, "prompt": row["prompt"] + " Why?"} for row in rows]
    both = tokens([*rows, *near], tmp_path, chat_tokenizer(), **keys)
    path = str(tmp_path / "a.jsonl")
    run = prepared(Data(train=path, **keys))
    held = {int(tree.where.rpartition(":")[2]) for tree in run.eval}
    alone = {row for row in held if (row + 100 if row <= 100 else row - 100) not in held}
    assert len(alone) > 10 and set(places(both["leaked-near"])) == alone


def test_a_recipe(tiny_folder: Path, tmp_path: Path) -> None:
    train, held = clean(60), clean(20, seed=1)
    train[5] = held[3]
    train[6]["chosen"] += " river" * 300
    write(tmp_path / "train.jsonl", train), write(tmp_path / "eval.jsonl", held)
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'[loss]\nname = "dpo"\n[model]\npath = "{tiny_folder}"\n[data]\ntrain = "train.jsonl"\neval = "eval.jsonl"\n'
        "[train]\nlearning_rate = 0.1\n"
    )
    found = lint("--recipe", recipe, code=1)
    assert lines(found["leaked-prompt"]) == [4] and lines(found["too-long"]) == [7]
    assert "too-long" not in lint("--recipe", recipe, "--set", "data.max_length=4000", code=1)
    result = CliRunner().invoke(cli, ["data", "lint", "--recipe", str(recipe), "--set", "loss.name=nothing"])
    assert result.exit_code == 2 and 'there is no loss "nothing"' in result.output


def test_bad_rows_are_warnings_where_the_recipe_skips_them(tmp_path: Path) -> None:
    rows = clean(20)
    rows[3]["chosen"] = ""
    assert tokens(rows, tmp_path, chat_tokenizer())["empty-completion"].severity == "error"
    assert tokens(rows, tmp_path, chat_tokenizer(), on_bad_row="skip")["empty-completion"].severity == "warning"
    conversation = [{"messages": [{"role": "assistant", "content": "Hello."}]}, {"messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}]  # fmt: skip
    found = tokens(conversation, tmp_path, chat_tokenizer(), kind="demonstrations")
    assert places(found["no-prompt"]) == [1]  # only the template finds it


def test_prompts_that_are_answered_during_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "truth": 1} for row in clean(30)]
    rows[2]["prompt"] += " river" * 60
    write(tmp_path / "train.jsonl", rows)
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'[loss]\nname = "grpo"\n[model]\npath = "{tiny_folder}"\n[data]\ntrain = "train.jsonl"\nmax_length = 300\n'
        '[train]\nlearning_rate = 0.1\n[rollout]\nmax_new_tokens = 100\n[[rewards]]\nname = "length"\n'
    )
    assert lines(lint("--recipe", recipe)["prompt-too-long"]) == [3]
    assert "prompt-too-long" not in lint("--recipe", recipe, "--set", "rollout.max_new_tokens=2")


def test_what_the_loss_cannot_eat_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match="holds demonstrations, and the loss wants pairs"):
        looked(path, chat_tokenizer())
    assert json.loads(Path(path).read_text())
