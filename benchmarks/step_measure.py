"""What a measuring process of benchmarks/step.py uses on both sides: clocks, memory, matrix peak, models."""

from __future__ import annotations

import functools
import gc
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "trl", "accelerate")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# hidden size, intermediate size, layers, heads, key heads, vocabulary: random models of about so many weights
RANDOM = {
    "tiny": (64, 96, 2, 4, 2, 0), "0.1b": (576, 1536, 30, 9, 3, 49152), "0.5b": (1024, 4096, 26, 16, 4, 49152),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
}  # fmt: skip


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hardware() -> str:
    """In words: "AMD EPYC, 2 CPU cores, 2 threads", "NVIDIA H100 80GB HBM3"."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} CPU threads"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


# --- time ------------------------------------------------------------------------------------------------------------


def now() -> float:
    """After everything that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Clock:
    """Time at the end of each step, and seconds spent in parts of the steps before."""

    ends: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    at_end: list[dict[str, float]] = field(default_factory=list)

    def start(self) -> None:
        """The steps begin now."""
        self.parts = dict.fromkeys(self.parts, 0.0)
        self.ends, self.at_end = [now()], [dict(self.parts)]

    def step(self) -> None:
        self.ends.append(now())
        self.at_end.append(dict(self.parts))

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to a part. On a GPU, which runs behind, it is left as it is."""
        if torch.cuda.is_available():
            return function
        self.parts[part] = 0.0

        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.parts[part] += time.perf_counter() - began

        return run

    def time_function(self, part: str, function: type[torch.autograd.Function]) -> None:
        """Times forward and backward of an autograd function."""
        for name in ("forward", "backward"):
            setattr(function, name, staticmethod(self.timed(part, getattr(function, name))))

    def seconds(self) -> list[float]:
        """Of each step."""
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]

    def seconds_in(self, part: str) -> list[float] | None:
        if part not in self.parts:
            return None
        return [b[part] - a[part] for a, b in zip(self.at_end, self.at_end[1:], strict=False)]


# --- memory ----------------------------------------------------------------------------------------------------------


class Memory:
    """Peak memory of this process, or on the GPU, above what is there when it is made: the loaded model. MiB."""

    def __init__(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.loaded = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self.loaded = _status("VmRSS")

    def peak(self) -> float:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20
        return _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024


# --- the machine's peak ----------------------------------------------------------------------------------------------


def matrix_peak(model: Any, precision: str, seconds: float = 0.4) -> float:
    """The most operations per second that this machine does in a product of the model's shapes.

    rows x hidden by hidden x intermediate, and back, as many rows as a micro-batch has positions; the fastest single
    product of all in that time counts.
    """
    from alignzoo.engine import TOKENS_PER_DEVICE

    rows = TOKENS_PER_DEVICE[device().type]
    config = model.config.get_text_config()
    hidden = config.hidden_size
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    best = 0.0
    for inner, outer in ((hidden, wide), (wide, hidden)):
        left = torch.randn(rows, inner, device=device()).to(DTYPES[precision])
        right = torch.randn(inner, outer, device=device()).to(DTYPES[precision])
        until = now() + seconds / 2
        while True:
            began = now()
            left @ right
            ended = now()
            best = max(best, 2 * rows * inner * outer / (ended - began))
            if ended > until:
                break
    return best


# --- models ----------------------------------------------------------------------------------------------------------


def model_folder(name: str, work: Path) -> Path:
    """A model as a plain folder, made once: a recipe's model.path, or "random:SIZE"."""
    from alignzoo.model import load_model, load_tokenizer, locate, save_model
    from alignzoo.recipe import Model

    if not name.startswith("random:"):
        where = locate(name)
        if where.gguf is None and not where.is_hub and where.base is None:
            return Path(where.path)
        folder = work / "models" / "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
        if not folder.exists():
            model = load_model(where, Model(path=name), print)
            save_model(model, load_tokenizer(where), folder, base=name, merge=False)
        return folder
    folder = work / "models" / name.replace(":", "-")
    if not folder.exists():
        _save_random(name.removeprefix("random:"), folder)
    return folder


def _save_random(size: str, folder: Path) -> None:
    from data_prepare import small_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, wide, layers, heads, key_heads, vocabulary = RANDOM[size]
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary or len(tokenizer), max_position_embeddings=8192,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    LlamaForCausalLM(config).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(folder)


def load(folder: Path) -> tuple[Any, Any]:
    """Model in float32 on the device, and tokenizer. Its weights are memory of this process, not pages of a file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device())
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model, AutoTokenizer.from_pretrained(folder)
