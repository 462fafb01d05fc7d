"""The scorer against the plain forward pass with all logits, for many model classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import VOCABULARY, make_trees, tiny_llama

from alignzoo.batch import Layout, padded_layout
from alignzoo.errors import ModelError
from alignzoo.head import HEAD_CHUNK
from alignzoo.logprobs import Scorer, check_scorer, is_mixture_of_experts
from alignzoo.model import set_dropout
from alignzoo.tree import Completion, Tree

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
OPT = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
       "max_position_embeddings": 64, "word_embed_proj_dim": 32}  # fmt: skip
CONFIGS = {
    "llama": tf.LlamaConfig(**BASE),
    "tied llama": tf.LlamaConfig(**BASE, tie_word_embeddings=True),
    "gemma": tf.GemmaConfig(**BASE),
    "gemma2, soft-capped": tf.Gemma2Config(**BASE, final_logit_softcapping=5.0),
    "gemma3": tf.Gemma3TextConfig(**BASE),
    "qwen2": tf.Qwen2Config(**BASE),
    "qwen3": tf.Qwen3Config(**BASE),
    "mistral": tf.MistralConfig(**BASE),
    "phi, head bias": tf.PhiConfig(**BASE),
    "phi3": tf.Phi3Config(**BASE),
    "cohere, scaled": tf.CohereConfig(**BASE),
    "granite, scaled": tf.GraniteConfig(**BASE, logits_scaling=3.0),
    "gpt-neox": tf.GPTNeoXConfig(**BASE),
    "gpt2": tf.GPT2Config(**GPT2, eos_token_id=2),
    "opt": tf.OPTConfig(**OPT),
    "bloom": tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "mixtral": tf.MixtralConfig(**BASE, num_local_experts=4),
    "qwen3-moe": tf.Qwen3MoeConfig(**BASE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}


def plain(model: Any, layout: Layout, **options: Any) -> tuple[torch.Tensor, Any]:
    """Log-probs (N, T) from one forward with all logits, written without the layout's indices."""
    found = model(
        input_ids=torch.from_numpy(layout.input_ids), attention_mask=torch.from_numpy(layout.attention_mask), **options
    )
    logps = found.logits.log_softmax(-1)
    rows = []
    for n, length in enumerate(layout.attention_mask.sum(1)):
        size = int(layout.mask[n].sum())
        ids = torch.from_numpy(layout.input_ids[n])
        row = [logps[n, t - 1, ids[t]] for t in range(int(length) - size, int(length))]
        rows.append(torch.stack([*row, *[logps.new_zeros(())] * (layout.mask.shape[1] - size)]))
    return torch.stack(rows), found


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_and_gradients_are_the_plain_forwards(name: str) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name])
    mixture = is_mixture_of_experts(model)
    if not mixture:  # the grouped matrix product of experts has no float64
        model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    set_dropout(model, 0.0)
    layout = padded_layout(make_trees(5))
    scorer = Scorer(model, router_loss=mixture)
    check_scorer(scorer, layout)
    ours = scorer(layout)
    ours["logps"].sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    theirs, found = plain(model, layout, **({"output_router_logits": True} if mixture else {}))
    theirs.sum().backward()
    tolerance = 1e-4 if mixture else 1e-10
    assert (ours["logps"] - theirs).abs().max() < tolerance
    assert theirs.abs().max() > 1
    reference = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == reference.keys()
    error = sum((gradients[n] - g).square().sum() for n, g in reference.items())
    assert error.sqrt() < tolerance * sum(g.square().sum() for g in reference.values()).sqrt()
    if mixture:
        assert abs(ours["router_loss"] - found.aux_loss) < 1e-5


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(tiny_llama().double())
    layout = padded_layout(make_trees(6, longest=20))
    assert len(layout.target) < HEAD_CHUNK
    whole = scorer(layout)["logps"]
    for name in ("head", "logprobs"):
        monkeypatch.setattr(f"alignzoo.{name}.HEAD_CHUNK", 7)
    assert (scorer(layout)["logps"] - whole).abs().max() < 1e-12


def test_token_statistics() -> None:
    model = tiny_llama()
    layout = padded_layout(make_trees(4))
    scores = Scorer(model)(layout, ("entropy", "log_sum_sq_probs", "is_top1"))
    logits = model(torch.from_numpy(layout.input_ids), attention_mask=torch.from_numpy(layout.attention_mask)).logits
    p = logits.double().softmax(-1).reshape(-1, VOCABULARY)[torch.from_numpy(layout.source)]
    place = torch.from_numpy(layout.place)
    flat = {name: value.reshape(-1)[place] for name, value in scores.items()}
    assert torch.allclose(flat["entropy"].double(), torch.distributions.Categorical(p).entropy(), atol=1e-5)
    assert torch.allclose(flat["log_sum_sq_probs"].double(), p.square().sum(-1).log(), atol=1e-5)
    assert flat["is_top1"].tolist() == (p.argmax(-1) == torch.from_numpy(layout.target)).tolist()
    assert flat["is_top1"].dtype == torch.bool
    assert not flat["entropy"].requires_grad
    assert flat["logps"].requires_grad


def test_padding_and_neighbours_move_nothing() -> None:
    """The log-probs of a tree alone are those of the tree beside a longer one, whatever its tokens are."""
    scorer = Scorer(tiny_llama().double())
    short, long = make_trees(1, seed=1)[0], make_trees(1, seed=2, longest=40)[0]
    alone = scorer(padded_layout([short]))["logps"]
    beside = scorer(padded_layout([short, long]))["logps"][:2, : alone.shape[1]]
    assert (alone - beside).abs().max() < 1e-12
    poisoned = Tree(long.row, (long.prompt + 1) % VOCABULARY, long.completions)
    again = scorer(padded_layout([short, poisoned]))["logps"][:2, : alone.shape[1]]
    assert torch.equal(again, scorer(padded_layout([short, long]))["logps"][:2, : alone.shape[1]])


def test_a_completion_of_one_token_and_lora_on_the_head() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_llama()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tree = Tree(0, np.array([5], np.int32), (Completion(np.array([9], np.int32)),))
    layout = padded_layout([tree])
    scorer = Scorer(adapted).eval()
    with_adapter = scorer(layout)["logps"].item()
    expected = adapted(torch.tensor([[5]])).logits[0, 0].log_softmax(-1)[9].item()
    assert with_adapter == pytest.approx(expected, abs=1e-6)
    with scorer.without_adapter():
        without = scorer(layout)["logps"].item()
    assert abs(with_adapter - without) > 0.01


def test_gradient_checkpointing_changes_nothing() -> None:
    layout, gradients = padded_layout(make_trees(3)), []
    for checkpointing in (False, True):
        model = tiny_llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        Scorer(model)(layout)["logps"].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, atol=1e-6)


def test_a_model_that_is_misread_is_refused() -> None:
    model = tiny_llama()
    original = type(model).forward

    class Odd(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, **options: Any) -> Any:
            found = original(self, input_ids=input_ids, **options)
            if input_ids is not None:  # a class that treats its logits in a way the head alone does not show
                found.logits = found.logits * 2
            return found

    model.__class__ = Odd
    with pytest.raises(ModelError, match="differ from the model's own logits"):
        check_scorer(Scorer(model), padded_layout(make_trees(2)))
