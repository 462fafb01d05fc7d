"""`alignzoo chat`: the answers are those of generate(), with the conversation before them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import REPO
from peft import PeftModel
from rich.console import Console
from runs_helpers import write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignzoo
from alignzoo import chat as module
from alignzoo.chat import Chat, Manner, converse, load_speaker
from alignzoo.cli import cli
from alignzoo.errors import AlignzooError, DataError
from alignzoo.pages import visible
from alignzoo.recipe import load_recipe
from alignzoo.runner import Enough

MOST = 12
FIRST, SECOND = "Where is my order?", "And the lamp?"


@pytest.fixture(scope="module")
def run_dir(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has moved its weights far, with sample answers."""
    return trained(tiny_folder, tmp_path_factory.mktemp("chat"), train__learning_rate=0.05)


@pytest.fixture(scope="module")
def lora_dir(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_folder, tmp_path_factory.mktemp("lora"), train__learning_rate=0.5, model__lora={"rank": 4})


def trained(model: Path, folder: Path, **changes: Any) -> Path:
    recipe = write_recipe(folder, model, samples__max_new_tokens=MOST, train__max_steps=4, **changes)
    return alignzoo.run(load_recipe(recipe), console=Console(quiet=True)).run_dir


def talk(lines: list[str], *words: str | Path) -> Result:
    return CliRunner().invoke(cli, ["chat", *map(str, words)], input="".join(f"{line}\n" for line in lines))


def of_generate(model: Any, tokenizer: Any, messages: list[dict[str, str]], most: int = MOST) -> str:
    """transformers' own template and greedy search."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def conversation(model: Any, tokenizer: Any, *questions: str, system: str | None = None) -> list[str]:
    """The answers as they are shown: a random model says control characters too."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        answers.append(of_generate(model, tokenizer, messages))
        messages.append({"role": "assistant", "content": answers[-1]})
    return [visible(answer) for answer in answers]


def plain(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_greedy_answers_with_history_are_those_of_generate(run_dir: Path) -> None:
    done = talk([FIRST, SECOND, "/reset", SECOND], run_dir)
    assert done.exit_code == 0, done.output
    model, tokenizer = plain(run_dir / "model")
    first, second = conversation(model, tokenizer, FIRST, SECOND)
    (alone,) = conversation(model, tokenizer, SECOND)
    assert len({first, second, alone}) == 3  # the history makes a difference
    assert done.stdout == f"{first}\n{second}\n{alone}\n"
    assert f"at most {MOST} tokens, greedy" in done.stderr and "/model (float32)" in done.stderr


def test_the_first_answer_is_the_sample_of_the_run(run_dir: Path) -> None:
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    done = talk([samples[0]["prompt"]], run_dir)
    assert done.stdout.strip() == visible(samples[0]["after"])


def test_an_adapter_on_its_base_beside_the_base(lora_dir: Path, tiny_folder: Path) -> None:
    done = talk([FIRST, SECOND], lora_dir, "--against", "reference")
    assert done.exit_code == 0, done.output
    base, tokenizer = plain(tiny_folder)
    of_base = conversation(base, tokenizer, FIRST, SECOND)
    adapted = conversation(PeftModel.from_pretrained(base, lora_dir / "model"), tokenizer, FIRST, SECOND)
    assert of_base[0] != adapted[0]
    told = [f"{lora_dir}:\n{a}\nreference:\n{b}\n" for a, b in zip(adapted, of_base, strict=True)]
    assert done.stdout == "".join(told)
    assert "the adapter switched off" in done.stderr


def test_the_reference_of_a_whole_run_and_another_run(run_dir: Path, lora_dir: Path, tiny_folder: Path) -> None:
    (before,) = conversation(*plain(tiny_folder), FIRST)
    (after,) = conversation(*plain(run_dir / "model"), FIRST)
    assert talk([FIRST], run_dir, "--against", "reference").stdout == f"{run_dir}:\n{after}\nreference:\n{before}\n"
    found = talk([FIRST], tiny_folder, "--max-new-tokens", str(MOST), "--against", run_dir)
    assert found.stdout == f"{tiny_folder}:\n{before}\n{run_dir}:\n{after}\n"


def test_a_checkpoint_speaks_before_its_run_has_ended(tiny_folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpoint__every_steps": 2, "train__learning_rate": 0.05, "samples__prompts": []}
    recipe = load_recipe(write_recipe(tmp_path, tiny_folder, **changes))
    with pytest.raises(Enough):
        alignzoo.runner.run(recipe, console=Console(quiet=True), stop_after=3)
    run_dir, base = tmp_path / "runs/tiny", plain(tiny_folder)
    of_run = talk([FIRST], run_dir, "--max-new-tokens", str(MOST))
    assert of_run.exit_code == 0, of_run.output
    assert of_run.stdout == talk([FIRST], run_dir / "checkpoints/step-2", "--max-new-tokens", str(MOST)).stdout
    assert of_run.stdout.strip() != conversation(*base, FIRST)[0]


def test_the_system_turn(run_dir: Path) -> None:
    model, tokenizer = plain(run_dir / "model")
    (told,) = conversation(model, tokenizer, FIRST, system="Be short.")
    assert talk([FIRST], run_dir, "--system", "Be short.").stdout.strip() == told
    later = talk([SECOND, "/reset", "/system Be short.", FIRST], run_dir).stdout.splitlines()
    assert later[-1] == told


def test_sampling_is_seeded(run_dir: Path) -> None:
    def answer(seed: int) -> str:
        return talk([FIRST], run_dir, "--temperature", "3", "--seed", str(seed)).stdout

    assert answer(1) == answer(1) != answer(2)


def test_a_saved_conversation_is_a_row_of_messages(run_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    done = talk([FIRST, f"/save {file}", "/quit", SECOND], run_dir, "--system", "Be kind.")
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
    assert visible(row["messages"][2]["content"]) == done.stdout.strip()
    again = talk([f"/save {file}"], run_dir)
    assert again.exit_code == 2 and "is there already" in again.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [(["no/such/folder/here"], "no folder"), (["{tiny}", "--against", "reference"], "is no run"),
     (["{here}"], "neither a run directory")],
)  # fmt: skip
def test_mistakes(words: list[str], message: str, tiny_folder: Path, tmp_path: Path) -> None:
    done = talk([FIRST], *(word.format(tiny=tiny_folder, here=tmp_path) for word in words))
    assert done.exit_code == 2 and message in done.stderr and "way out" in done.stderr


def test_no_room_is_told(run_dir: Path) -> None:
    done = talk([FIRST], run_dir, "--max-new-tokens", "250")
    assert done.exit_code == 2 and "256 places" in done.stderr


# --- at a terminal ---------------------------------------------------------------------------------------------------


@pytest.fixture
def make(run_dir: Path) -> Callable[..., tuple[Chat, io.StringIO, list[str]]]:
    def chat(width: int = 120, speakers: int = 1) -> tuple[Chat, io.StringIO, list[str]]:
        out, said = io.StringIO(), list[str]()
        console = Console(file=out, force_terminal=True, width=width, color_system=None)
        loaded = [load_speaker(str(run_dir), lambda _: None)[0] for _ in range(speakers)]
        for number, one in enumerate(loaded):
            one.name = f"model {number + 1}"
        return Chat(loaded, Manner(MOST, 0.0, 1, None), console, said.append), out, said

    return chat


def test_pieces_make_the_answer(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What streams is the answer, in more than one piece, and no character comes in halves."""
    chat, _, _ = make()
    pieces: list[str] = []
    chat.speakers[0].answer("Grüße aus Köln \N{GRINNING FACE}", chat.manner, pieces.append)
    assert len(pieces) > 1 and "".join(pieces).rstrip() == chat.speakers[0].messages[1]["content"]
    ids = chat.speakers[0].tokenizer("Köln \N{GRINNING FACE}!")["input_ids"]
    assert len(ids) > 6
    parts: list[str] = []
    of = module._Pieces(chat.speakers[0].tokenizer, parts.append)
    for one in ids:
        of.see(torch.tensor([one]))
    assert "".join(parts) == "Köln \N{GRINNING FACE}!" and not any("\N{REPLACEMENT CHARACTER}" in p for p in parts)


@pytest.mark.parametrize(("width", "beside"), [(120, True), (99, False)])
def test_two_answers_stand_side_by_side_where_there_is_room(width: int, beside: bool, make: Any) -> None:
    chat, out, _ = make(width, 2)
    assert chat.take(FIRST)
    lines = [line for line in out.getvalue().splitlines() if "model 1" in line or "model 2" in line]
    assert any("model 1" in line and "model 2" in line for line in lines) == beside


def test_ctrl_c_stops_an_answer_and_twice_leaves(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _, said = make()
    speaker, answer, left = chat.speakers[0], module.Speaker.answer, 3

    def interrupted(self: Any, question: str, manner: Any, emit: Any) -> bool:
        def count(piece: str) -> None:
            nonlocal left
            emit(piece)
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        return answer(self, question, manner, count)

    monkeypatch.setattr(module.Speaker, "answer", interrupted)

    def stop() -> str:
        raise KeyboardInterrupt

    def never() -> str:
        raise AssertionError("it went on")

    converse(chat, [lambda: FIRST, lambda: "/none", stop, lambda: SECOND, stop, stop, never])
    turns = [turn["content"] for turn in speaker.messages if turn["role"] == "user"]
    assert turns == [FIRST, SECOND]
    assert said.count("Ctrl-C once more, or /quit, leaves") == 3 and any("is no command" in line for line in said)


def test_an_error_does_not_end_a_conversation(make: Any) -> None:
    chat, _, said = make()
    converse(chat, [lambda: "/save", lambda: "/quit"])
    assert "error: /save needs a name" in said[0]
    chat.manner = Manner(10_000, 0.0, 1, None)
    with pytest.raises(DataError, match="places"):
        chat.take(FIRST)
    with pytest.raises(AlignzooError, match="is there already"):
        chat.take(f"/save {REPO / 'README.md'}")
