"""How much memory a run takes, by part, computed from the model's configuration: no weight is loaded.

What the ranks share out: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 3), with the types that zero.py and
the engine really use: float32 weights have a float32 copy in DeepSpeed's optimizer too, gradients are added up in
float32. What autograd keeps: after Korthikanti et al. 2022 (arXiv:2205.05198, section 4), who count 34 bytes a token
and channel for a GPT layer in 16 bits. Adapted: the sizes come from the configuration (grouped keys, gated MLPs, RMS
norms, which keep a float32 copy), the type from the recipe; there is no dropout, and attention keeps no scores (5 a s
/ h of the paper) unless model.attention = "eager".

Letters: h channels, i inner channels of the MLP, q heads and k key heads of d channels, V tokens of the vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from alignzoo.errors import ModelError
from alignzoo.head import HEAD_CHUNK
from alignzoo.model import DTYPES, Location, add_adapter, gguf_once
from alignzoo.recipe import Model

GIB = 2**30
BUCKET = 100_000_000  # elements of DeepSpeed's buffer, as zero.py sets it
LIVE = 1_000_000_000  # weights that stage 3 may hold gathered: DeepSpeed's stage3_max_live_parameters
CUDA = 2 * GIB  # assumed, not measured: CUDA's context, the libraries, what the allocator cannot use
_UNFUSED = ("gelu_new", "gelu_fast", "quick_gelu")  # written as several operations, each of which keeps its input
_NF4 = 0.5 + 4 / 64  # bytes a weight: four bits, and a float32 scale for each block of 64
_INT8 = 1.0
# Numbers that an optimizer keeps of each weight, and the bytes of each where it is not the weight's type.
_STATES = {
    "sgd": (0, None), "adagrad": (1, None), "rmsprop": (1, None), "lion_32bit": (1, None),
    "paged_lion_32bit": (1, None), "adamw_8bit": (2, 1), "adamw_bnb_8bit": (2, 1), "paged_adamw_8bit": (2, 1),
    "lion_8bit": (1, 1), "paged_lion_8bit": (1, 1), "rmsprop_bnb_8bit": (1, 1),
}  # fmt: skip
_ADAM = (2, None)


@dataclass(frozen=True)
class Shape:
    """A model's counts, all exact, tied weights once. Of quantised weights the bytes as bitsandbytes stores them."""

    trained: int
    trained_bytes: int
    frozen: int  # not quantised
    frozen_bytes: int
    quantised: int
    quantised_bytes: int
    matrices: int  # weights of the layers' matrices that are not quantised: what autocast copies
    head: int  # weights of the output matrix
    head_trained: bool
    layers: int
    hidden: int
    inner: int  # of all experts that see a token
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    gated: bool
    rms: bool
    unfused: bool
    head_norms: bool  # of queries and keys
    adapted: bool
    dtype: str

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen + self.quantised

    @property
    def weight_bytes(self) -> int:
        return self.trained_bytes + self.frozen_bytes + self.quantised_bytes


# --- from the configuration ------------------------------------------------------------------------------------------


def read_config(where: Location, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, of an adapter's base. Raises ModelError where there is none."""
    while where.base is not None:
        where = where.base
    try:
        with gguf_once(where):
            return AutoConfig.from_pretrained(where.path, trust_remote_code=trust_remote_code, **where.tokenizer_kwargs)
    except Exception as error:
        raise ModelError(f"model {where.path}: its configuration cannot be read", why=str(error)) from error


def shape_of(config: Any, settings: Model) -> Shape:
    """What `settings` make of a configuration. The model is built without memory, on torch's meta device."""
    dtype = DTYPES[settings.dtype]
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)
        embeddings = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e}
        head = model.get_output_embeddings()
        quantised = _quantised(model, head) if settings.quantization else {}
        if settings.lora is not None:
            with warnings.catch_warnings():  # what peft sets right by itself
                warnings.filterwarnings("ignore", ".*fan_in_fan_out")
                model = add_adapter(model, settings.lora, quantised=False)
    own = list({id(p): p for p in model.parameters()}.values())
    trained = [p for p in own if p.requires_grad]
    plain = [p for p in own if not p.requires_grad and id(p) not in quantised]
    size = _INT8 if settings.quantization == "8bit" else _NF4
    text = config.get_text_config()
    names = [name for name, _ in model.named_parameters()]
    heads = text.num_attention_heads
    hidden = text.hidden_size
    return Shape(
        trained=_count(trained), trained_bytes=_bytes(trained), frozen=_count(plain), frozen_bytes=_bytes(plain),
        quantised=sum(quantised.values()), quantised_bytes=round(sum(quantised.values()) * size),
        matrices=_count([p for p in own if p.dim() > 1 and id(p) not in embeddings and id(p) not in quantised]),
        head=0 if head is None else head.weight.numel(),
        head_trained=head is not None and head.weight.requires_grad,
        layers=text.num_hidden_layers, hidden=hidden, inner=_inner(text), heads=heads,
        key_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads, vocabulary=text.vocab_size,
        gated=any("gate_proj" in name or "gate_up_proj" in name for name in names),
        rms=not any(isinstance(module, nn.LayerNorm) for module in model.modules()),
        unfused=getattr(text, "hidden_act", getattr(text, "activation_function", "")) in _UNFUSED,
        head_norms=any("q_norm" in name for name in names),
        adapted=settings.lora is not None, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip


def _quantised(model: Any, head: Any) -> dict[int, int]:
    """The weights that bitsandbytes takes: all matrices but the output's."""
    found = [m.weight for m in model.modules() if type(m) is nn.Linear and m is not head]
    return {id(weight): weight.numel() for weight in found}


def _inner(config: Any) -> int:
    names = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner")
    found = next((value for name in names if (value := getattr(config, name, None))), 4 * config.hidden_size)
    return int(found) * int(getattr(config, "num_experts_per_tok", None) or 1)


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


# --- what it takes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """How a run is spread over a machine."""

    device: Literal["cpu", "cuda"]
    precision: str  # fp32, bf16, fp16
    ranks: int = 1
    zero: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    checkpointing: bool = False
    eager: bool = False
    optimizer: str = "adamw_torch_fused"


@dataclass(frozen=True)
class Load:
    """What goes through the model at once, on one rank."""

    positions: int  # of the largest micro-batch
    longest: int  # positions of the longest row
    sampled: int = 0  # positions that [rollout] samples at once
    reference: Shape | None = None  # a frozen model beside the policy


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device when it holds most, by part, and those of the machine's memory for each rank."""

    parts: Mapping[str, int]
    when: str
    host: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def is_known(optimizer: str) -> bool:
    """Whether it is known what the optimizer keeps; of another one two numbers a weight are counted, as of Adam."""
    return optimizer in _STATES or optimizer.startswith(("adamw", "paged_adamw"))


def estimate(shape: Shape, setup: Setup, load: Load, libraries: int = 0) -> Estimate:
    """The moment of a step that takes most: a micro-batch, the update, or the sampling of completions."""
    states, host = model_states(shape, setup)
    if load.reference is not None:
        frozen = load.reference.weight_bytes
        states["reference"] = frozen // setup.ranks if setup.zero == 3 else frozen
    at_all_times = states | {"libraries": libraries}
    width = _compute_bytes(shape, setup)
    foreach = setup.device == "cuda" and (setup.precision == "fp16" or not setup.optimizer.endswith("fused"))
    moments = {
        "micro-batch": {
            "activations": activation_bytes(shape, setup, load),
            "temporary": _temporary(shape, setup, load),
        },
        "update": {"temporary": states["gradients"] if foreach else 0},
    }
    if load.sampled:
        cache = load.sampled * shape.layers * 2 * shape.key_heads * shape.head_dim * width
        moments["sampling"] = {"temporary": cache, "gradients": 0}
    when = max(moments, key=lambda name: sum((at_all_times | moments[name]).values()))
    parts = {"activations": 0, "temporary": 0} | at_all_times | moments[when]
    order = ("weights", "gradients", "optimizer", "buffers", "reference", "activations", "temporary", "libraries")
    return Estimate({name: parts.get(name, 0) for name in order}, when, host)


def model_states(shape: Shape, setup: Setup) -> tuple[dict[str, int], int]:
    """Bytes of weights, gradients, optimizer and DeepSpeed's buffers on a device, and of the machine's memory.

    ZeRO's section 3 with T trained weights on N ranks: stage 1 shares out the optimizer's states with DeepSpeed's
    float32 copy, (4 + 4 s) T / N for s states a weight, stage 2 the gradients, stage 3 the weights. The paper counts
    16 T bytes in 16 bits, gradients in 16; here they are added up in float32, so it is 18 T, as in DeepSpeed's own
    estimate.
    """
    count, size = _STATES.get(setup.optimizer, _ADAM)
    n, trained = setup.ranks, shape.trained
    if setup.zero == 0:
        own = shape.trained_bytes if size is None else trained * size
        states = {"weights": shape.weight_bytes, "gradients": shape.trained_bytes, "optimizer": own * count}
        return states | {"buffers": 0}, 0
    half = _half(shape, setup)
    weights = shape.quantised_bytes + 2 * (shape.frozen + trained) if half else shape.weight_bytes
    optimizer = (4 + 4 * count) * trained // n
    gradients = 4 * trained + (4 * trained // n if half else 0) if setup.zero == 1 else 4 * trained // n
    buffers = BUCKET * (2 if half and setup.zero > 1 else 4)
    host = 0
    if setup.zero == 3:
        each = weights / max(shape.parameters, 1)
        buffers += round(min(shape.parameters, LIVE) * each)
        weights //= n
    if setup.offload_optimizer:
        host += optimizer + 4 * trained // n
        optimizer = 0
        gradients = 0 if setup.zero > 1 else gradients
    if setup.offload_parameters:
        host, weights = host + weights, 0
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "buffers": buffers}, host


def _half(shape: Shape, setup: Setup) -> bool:
    """Whether DeepSpeed holds the weights in 16 bits, see zero._precision."""
    trains = "float32" if shape.adapted and setup.zero < 3 else shape.dtype
    return setup.precision == "fp16" or trains != "float32"


def _compute_bytes(shape: Shape, setup: Setup) -> int:
    """Of one number within the layers."""
    return 2 if setup.precision != "fp32" or shape.dtype != "float32" else 4


def activation_bytes(shape: Shape, setup: Setup, load: Load) -> int:
    """What autograd keeps of a micro-batch: of each layer, or with checkpointing its input and one layer."""
    c, w = _compute_bytes(shape, setup), 4 if shape.dtype == "float32" else 2
    norm = ((4 if shape.rms else 0) + w + c) * shape.hidden
    q, k = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
    attention = c * (3 * q + 4 * k)  # queries, the result, and it as one row; keys and values, again for completions
    if shape.head_norms:
        attention += (4 + w) * (q + k)
    if setup.eager:
        attention += (4 + c) * shape.heads * load.longest
    mlp = c * shape.inner * (4 if shape.gated else 5 if shape.unfused else 2)
    layer = 2 * norm + attention + mlp
    if c != w or (shape.adapted and w != 4):  # queries, keys, values, gate and up: a copy of the input for each
        layer += 3 * c * shape.hidden
    kept = shape.layers * w * shape.hidden + layer if setup.checkpointing else shape.layers * layer
    return load.positions * (kept + norm)


def _temporary(shape: Shape, setup: Setup, load: Load) -> int:
    """The head's logits, some hundred at a time, its gradient, and the copies of the weights that autocast makes."""
    c, w = _compute_bytes(shape, setup), 4 if shape.dtype == "float32" else 2
    rows = min(HEAD_CHUNK, load.positions)
    logits = rows * shape.vocabulary * (8 + (c if c != 4 else 0))
    head = shape.head * ((4 if shape.head_trained else 0) + (c if c != w else 0))
    casts = c * shape.matrices if c < w and not (setup.zero and _half(shape, setup)) else 0
    return logits + head + casts
