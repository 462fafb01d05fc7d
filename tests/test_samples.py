"""Answers before and after training: those of generate(), made in batches."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from rich.console import Console

from alignzoo.recipe import Samples
from alignzoo.samples import answer

TEXTS = [
    "Where is my order?",
    "Hi",
    "The blue lamp that I bought last week does not work. What can I do about it?",
    "Why",
]
MOST = 20


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return tiny_llama(vocabulary=len(tokenizer))


def answers(model: Any, tokenizer: Any, console: Console | None = None, **options: Any) -> list[str]:
    prompts = [tokenizer(text)["input_ids"] for text in options.pop("texts", TEXTS)]
    settings = Samples(max_new_tokens=MOST, temperature=options.pop("temperature", 0.0))
    return answer(model, tokenizer, prompts, settings, 3, console or Console(file=io.StringIO()), "answers", **options)


def of_generate(model: Any, tokenizer: Any, text: str, stops: list[int]) -> str:
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=MOST, do_sample=False, eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_greedy_answers_are_those_of_generate(model: Any, tokenizer: Any) -> None:
    model.train()
    found = answers(model, tokenizer)
    assert model.training
    model.eval()
    assert found == [of_generate(model, tokenizer, text, [tokenizer.eos_token_id]) for text in TEXTS]
    assert len(set(found)) == len(TEXTS)


def test_the_end_of_a_turn_ends_an_answer(model: Any, tokenizer: Any) -> None:
    free = answers(model, tokenizer)
    end = "\u0120you"
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)]
    found = answers(model, tokenizer, end=end)
    assert found == [of_generate(model, tokenizer, text, stops) for text in TEXTS]
    assert len(found[0]) < len(free[0])
    assert answers(model, tokenizer, end="no such token") == free


def test_drawn_answers_depend_on_the_seed_and_the_place_alone(model: Any, tokenizer: Any) -> None:
    found = answers(model, tokenizer, temperature=1.0)
    assert found != answers(model, tokenizer)
    assert found == answers(model, tokenizer, temperature=1.0)
    assert found[:2] == answers(model, tokenizer, temperature=1.0, texts=TEXTS[:2])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_in_place_of_the_models_own(model: Any, tokenizer: Any, temperature: float) -> None:
    """As under ZeRO-3 where the weights are not gathered: one prompt at a time, so that all ranks do the same."""
    shapes, beats = [], []

    def generate(**options: Any) -> torch.Tensor:
        shapes.append(options["input_ids"].shape[0])
        return model.generate(**options)  # type: ignore[no-any-return]

    found = answers(model, tokenizer, generate=generate, beat=lambda: beats.append(1), temperature=temperature)
    assert found == answers(model, tokenizer, temperature=temperature)
    assert shapes == [1] * len(TEXTS)
    assert len(beats) >= max(len(tokenizer(text)["input_ids"]) for text in found)


def test_a_model_that_cannot_share_prompts_is_told_of(tokenizer: Any) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)).eval()
    out = io.StringIO()
    found = answers(bloom, tokenizer, Console(file=out, width=200))
    assert "answers: one prompt at a time, it takes no position_ids\n" in out.getvalue()
    assert found == [of_generate(bloom, tokenizer, text, [tokenizer.eos_token_id]) for text in TEXTS]


def test_no_prompts(model: Any, tokenizer: Any) -> None:
    assert answers(model, tokenizer, texts=[]) == []
