"""What `auto` makes of the rows of a model, by its class: docs/layout.md shows it, test_tree_layout.py holds it."""

from __future__ import annotations

TREES = "token trees (prompts shared, no padding)"
EXPECTED = {
    "Llama": TREES,
    "Qwen2": TREES,
    "Qwen3": TREES,
    "Gemma": TREES,
    "Gemma 2, soft-capped, sliding window of 9": TREES,
    "Gemma 3, sliding window of 9": TREES,
    "Mistral": TREES,
    "Mistral, sliding window of 7": TREES,
    "Phi": TREES,
    "Phi-3": TREES,
    "Cohere": TREES,
    "Granite": TREES,
    "OLMo 2": TREES,
    "SmolLM3": TREES,
    "GPT-NeoX": TREES,
    "GPT-2": TREES,
    "OPT": TREES,
    "Mixtral": TREES,
    "Qwen3-MoE": TREES,
    "gpt-oss": "padded: its attention has attention sinks",
    "Bloom": "padded: it does not use transformers' attention interface",
    "MPT": "padded: it does not use transformers' attention interface",
    "Mamba": "padded: its layers are of other kinds (linear_attention)",
    "LFM2": "padded: its layers are of other kinds (conv)",
}
