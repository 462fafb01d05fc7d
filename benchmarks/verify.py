"""Runs configurations of ranks, ZeRO and launchers on this machine, and notes what was found in docs/verified.json.

python benchmarks/verify.py all                          those that fit this machine; then python docs/generate.py
python benchmarks/verify.py "2 processes, ZeRO 3"        one or more of them

Each trains a tiny random model for five steps of plain SGD without clipping, in one process and in the configuration,
and compares the updates of the weights. What is further away than its tolerance fails and is not noted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from data_prepare import small_tokenizer
from safetensors.torch import load_file
from torch import Tensor

REPO = Path(__file__).resolve().parents[1]
RECORDS = REPO / "docs" / "verified.json"
LIBRARIES = ("torch", "deepspeed", "transformers", "accelerate", "peft")
BIN = Path(sys.executable).parent
PLAIN = ("engine.device=cpu", "engine.precision=fp32")  # the one process that all are compared with
LORA = ("model.lora={rank=8}", "output.merge=true", "train.learning_rate=0.3")
LAUNCHERS = {
    "alignzoo": "alignzoo run R --processes N",
    "torchrun": "torchrun --standalone --nproc_per_node N -m alignzoo run R",
    "deepspeed": "deepspeed --num_gpus N --module alignzoo run R",
    "accelerate": "accelerate launch --multi_gpu --num_processes N --num_machines 1 --mixed_precision no "
    "--dynamo_backend no -m alignzoo run R",
}
RECIPE = f"""
loss = {{ name = "dpo" }}
model = {{ path = "model" }}
data = {{ train = {json.dumps(str(REPO / "recipes/data/shop_train.jsonl"))}, max_length = 256 }}
checkpoint = {{ every_steps = 2 }}
[train]
batch_size = 6
max_steps = 5
learning_rate = 0.03
optimizer = "sgd"
lr_scheduler = "constant"
warmup_ratio = 0.0
max_grad_norm = 0.0
[engine]
tokens_per_device = 700
"""


@dataclass(frozen=True)
class Configuration:
    """processes: 0 for one to each GPU that is asked for. model: settings that the plain run has too.

    resumed: the plain run is taken to have been killed after step 2, and goes on like this
    by_hand: on several machines; nothing here starts it
    """

    processes: int = 1
    engine: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    launcher: str = "alignzoo"
    tolerance: float = 1e-4
    gpus: int = 0
    resumed: bool = False
    by_hand: bool = False


def zero(stage: int, *more: str) -> tuple[str, ...]:
    return (f"engine.zero={stage}", *more)


BF16 = "engine.precision=bf16"
CONFIGURATIONS = {
    "1 process": Configuration(),
    "1 process, ZeRO 3": Configuration(1, zero(3)),
    **{f"2 processes, ZeRO {n}": Configuration(2, zero(n)) for n in range(4)},
    "2 processes, ZeRO 3, LoRA": Configuration(2, zero(3), LORA),
    "2 processes, ZeRO 2, optimizer offloaded": Configuration(2, zero(2, "engine.offload_optimizer=cpu")),
    "2 processes, ZeRO 2, bf16": Configuration(2, zero(2, BF16), tolerance=0.1),
    "2 processes, ZeRO 3, bf16": Configuration(2, zero(3, BF16), tolerance=0.1),
    "4 processes, ZeRO 3": Configuration(4, zero(3)),
    **{f"{n}, 2 processes, ZeRO 2": Configuration(2, zero(2), launcher=n) for n in LAUNCHERS if n != "alignzoo"},
    "resumed by 2 processes, ZeRO 3": Configuration(2, zero(3), resumed=True),
    "1 GPU, bf16": Configuration(1, (BF16,), tolerance=0.1, gpus=1),
    "1 GPU, ZeRO 2, bf16": Configuration(1, zero(2, BF16), tolerance=0.1, gpus=1),
    "8 GPUs, ZeRO 3, bf16": Configuration(8, zero(3, BF16), tolerance=0.1, gpus=8),
    "2 nodes of 8 GPUs, ZeRO 3, bf16": Configuration(16, zero(3, BF16), tolerance=0.1, gpus=8, by_hand=True),
}


def make_inputs(folder: Path) -> None:
    """A tiny random model with its tokenizer, and the recipe, in `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")


def train(folder: Path, name: str, words: list[str], settings: tuple[str, ...]) -> Path:
    """Runs a command of alignzoo; its run directory. Raises RuntimeError with the end of what it said."""
    command = [str(BIN / words[0]), *words[1:]]
    for setting in (*settings, f"log.run_name={name}"):
        command += ["--set", setting]
    here = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=here, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(command)}\n{(done.stdout + done.stderr)[-3000:]}")
    return folder / "runs" / name


def weights(folder: Path) -> Tensor:
    state = load_file(folder / "model.safetensors")
    return torch.cat([state[name].flatten().double() for name in sorted(state)])


@cache
def plain_run(folder: Path, model: tuple[str, ...]) -> tuple[Path, Tensor]:
    """One process: its run directory, and the update of its weights."""
    run = train(folder, f"plain-{len(model)}", ["alignzoo", "run", "recipe.toml"], (*PLAIN, *model))
    return run, weights(run / "model") - weights(folder / "model")


def distance(folder: Path, number: int, one: Configuration) -> tuple[float, float]:
    """Of its update to that of one process, relative L2; and how far that moved the weights, relative to them."""
    plain, right = plain_run(folder, one.model)
    words = [{"N": str(one.processes), "R": "recipe.toml"}.get(word, word) for word in LAUNCHERS[one.launcher].split()]
    name, start = f"run-{number}", weights(folder / "model")
    if one.resumed:  # as if it had been killed while it saved the model
        name = f"killed-{number}"
        shutil.copytree(plain, folder / "runs" / name, ignore=shutil.ignore_patterns("model", "summary.json"))
        words += ["--resume", f"runs/{name}/checkpoints/step-2"]
    device = ("engine.device=cuda",) if one.gpus else PLAIN
    run = train(folder, name, words, (*device, *one.engine, *one.model))
    ranks = len(json.loads((run / "checkpoints/step-4/random.json").read_text(encoding="utf-8")))
    if ranks != one.processes:  # accelerate starts one process on a CPU, in silence, if it is not told otherwise
        raise RuntimeError(f"{ranks} processes trained, not {one.processes}: {' '.join(words)}")
    found = weights(run / "model") - start
    return float((found - right).norm() / right.norm()), float(right.norm() / start.norm())


def hardware(one: Configuration) -> str:
    """In words: '2 CPU cores', 'NVIDIA H100 80GB HBM3 x 8'."""
    if one.gpus:
        return f"{torch.cuda.get_device_name()} x {one.gpus}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores"


def note(name: str, one: Configuration, found: float) -> None:
    """A record of this configuration on this hardware, in the place of the one before."""
    record = {
        "configuration": name, "hardware": hardware(one), "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), **{n: metadata.version(n) for n in LIBRARIES}},
        "distance": float(f"{found:.2g}"), "tolerance": one.tolerance,
    }  # fmt: skip
    content = json.loads(RECORDS.read_text(encoding="utf-8"))
    same = (name, record["hardware"])
    kept = [r for r in content["records"] if (r["configuration"], r["hardware"]) != same]
    content |= {"configurations": list(CONFIGURATIONS), "records": [*kept, record]}
    RECORDS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=["all", *CONFIGURATIONS], metavar="CONFIGURATION")
    names, failed = parser.parse_args().names, 0
    with tempfile.TemporaryDirectory() as made:
        make_inputs(Path(made))
        for number, name in enumerate(CONFIGURATIONS if "all" in names else names):
            one = CONFIGURATIONS[name]
            if one.by_hand or one.gpus > torch.cuda.device_count():
                print(f"{name}: not run, {'it takes several machines' if one.by_hand else 'too few GPUs here'}")
                continue
            found, moved = distance(Path(made), number, one)
            good = found < one.tolerance and moved > 0.01
            print(f"{name}: {found:.2g} (tolerance {one.tolerance:g}), weights moved by {moved:.2%}", flush=True)
            if good:
                note(name, one, found)
            failed += not good
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
