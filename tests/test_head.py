"""The head as one matrix: against plain log-softmax, and which heads it is not used for."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCABULARY, make_trees, tiny_llama
from layout_models import make_model
from peft import LoraConfig, get_peft_model
from torch import nn

from alignzoo.batch import padded_layout
from alignzoo.head import HEAD_CHUNK, linear_scores
from alignzoo.logprobs import Scorer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [1, HEAD_CHUNK, 2 * HEAD_CHUNK + 3])
def test_values_and_gradients(bias: bool, frozen: bool, rows: int) -> None:
    torch.manual_seed(0)
    matrix = nn.Linear(8, VOCABULARY, bias=bias).double().requires_grad_(not frozen)
    hidden = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randint(0, VOCABULARY, (rows,)), torch.randn(rows, dtype=torch.float64)
    inputs = [hidden, *(p for p in matrix.parameters() if p.requires_grad)]
    plain = matrix(hidden).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    wanted = torch.autograd.grad((plain * weight).sum(), inputs)
    found = linear_scores(hidden, matrix, target, ("entropy", "is_top1"))
    assert (found["logps"] - plain).abs().max() < 1e-12
    got = torch.autograd.grad((found["logps"] * weight).sum(), inputs)
    assert all((a - b).abs().max() < 1e-11 for a, b in zip(got, wanted, strict=True))
    assert torch.allclose(found["entropy"], torch.distributions.Categorical(logits=matrix(hidden)).entropy())
    assert not found["entropy"].requires_grad
    assert found["is_top1"].dtype == torch.bool


def test_in_bf16_the_gradient_is_summed_in_float32() -> None:
    torch.manual_seed(0)
    matrix, target = nn.Linear(64, VOCABULARY), torch.randint(0, VOCABULARY, (1000,))
    hidden = torch.randn(1000, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_scores(hidden, matrix, target, ())["logps"]
    assert found.dtype == torch.float32
    found.sum().backward()
    plain = matrix(hidden).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    expected = torch.autograd.grad(plain.sum(), matrix.weight)[0]
    assert (found - plain).abs().max() < 0.05
    assert (matrix.weight.grad - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(
    ("name", "linear"),
    [("Llama", True), ("GPT-2", True), ("Phi", True), ("Granite", False), ("Cohere", False),
     ("Gemma 2, soft-capped, sliding window of 9", False)],
)  # fmt: skip
def test_only_a_plain_matrix_is_taken_for_one(name: str, linear: bool) -> None:
    scorer = Scorer(make_model(name))
    scorer(padded_layout(make_trees(2)))
    assert scorer.linear is linear


def test_an_adapter_on_the_head_is_honoured() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    scorer = Scorer(model)
    scorer(padded_layout(make_trees(2)))
    assert scorer.linear is False
