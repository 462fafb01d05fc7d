"""Tiny models of the classes that docs/layout.md lists, and what `auto` makes of each."""

from __future__ import annotations

import io
from typing import Any

import torch
import transformers as tf
from conftest import VOCABULARY, make_trees
from rich.console import Console

from alignzoo.engine import Engine
from alignzoo.loading import choose_layout
from alignzoo.logprobs import Scorer
from alignzoo.model import set_dropout
from alignzoo.recipe import Recipe, load_recipe
from alignzoo.reference import ReferencePlan
from alignzoo.sharding import make_accelerator

LONGEST = 40  # tokens of the longest sequence that the models are asked for
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}


CONFIGS = {
    "Llama": (tf.LlamaConfig(**BASE)),
    "Qwen2": (tf.Qwen2Config(**BASE)),
    "Qwen3": (tf.Qwen3Config(**BASE)),
    "Gemma": (tf.GemmaConfig(**BASE)),
    "Gemma 2, soft-capped, sliding window of 9": (
        tf.Gemma2Config(**BASE, sliding_window=9, attn_logit_softcapping=3.0, final_logit_softcapping=5.0)
    ),
    "Gemma 3, sliding window of 9": (
        tf.Gemma3TextConfig(**BASE, sliding_window=9, layer_types=["sliding_attention", "full_attention"])
    ),
    "Mistral": (tf.MistralConfig(**BASE, sliding_window=None)),
    "Mistral, sliding window of 7": (tf.MistralConfig(**BASE, sliding_window=7)),
    "Phi": (tf.PhiConfig(**BASE)),
    "Phi-3": (tf.Phi3Config(**BASE)),
    "Cohere": (tf.CohereConfig(**BASE)),
    "Granite": (tf.GraniteConfig(**BASE, logits_scaling=3.0)),
    "OLMo 2": (tf.Olmo2Config(**BASE)),
    "SmolLM3": (tf.SmolLM3Config(**BASE)),
    "GPT-NeoX": (tf.GPTNeoXConfig(**BASE)),
    "GPT-2": (tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1)),
    "OPT": (
        tf.OPTConfig(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                     max_position_embeddings=256, word_embed_proj_dim=32)
    ),
    "Mixtral": (tf.MixtralConfig(**BASE, num_local_experts=4)),
    "Qwen3-MoE": (tf.Qwen3MoeConfig(**BASE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)),
    "gpt-oss": (tf.GptOssConfig(**BASE, num_local_experts=4, num_experts_per_tok=2, sliding_window=9)),
    "Bloom": (tf.BloomConfig(**SMALL)),
    "MPT": (tf.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4)),
    "Mamba": (
        tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    "LFM2": (tf.Lfm2Config(**(BASE | {"layer_types": ["conv", "full_attention"]}))),
}  # fmt: skip


def make_model(name: str) -> Any:
    """A random model whose weights are large enough that log-probs differ by nats."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = tf.AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    set_dropout(model, 0.0)
    return model.eval()


def make_recipe(**engine: Any) -> Recipe:
    table = {
        "loss": {"name": "sft"}, "model": {"path": "none"}, "data": {"train": "none"},
        "train": {"learning_rate": 0.1}, "engine": {"device": "cpu", **engine},
    }  # fmt: skip
    return load_recipe(table)


def make_engine(model: Any, recipe: Recipe, frozen: Any = None) -> Engine:
    from alignzoo_losses.dpo import DPO
    from alignzoo_losses.sft import SFT

    loss = SFT() if frozen is None else DPO()
    plan = ReferencePlan("none" if frozen is None else "frozen", "")
    return Engine(
        recipe, loss, Scorer(model), plan, None if frozen is None else Scorer(frozen), make_accelerator(recipe),
        console=Console(file=io.StringIO()), sink=lambda _: None,
    )  # fmt: skip


def chosen(name: str) -> str:
    """What `auto` says of a model."""
    recipe = make_recipe()
    engine = make_engine(make_model(name), recipe)
    return choose_layout(recipe, engine, make_trees(1, longest=20)[0], LONGEST).removeprefix("layout: ")
