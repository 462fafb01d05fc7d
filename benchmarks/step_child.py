"""One measuring process of benchmarks/step.py: reads what to do as JSON on stdin, writes what it found to a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

WHAT_LOGS = ("loss", "grad_norm", "nll_loss", "logps/chosen", "logps/rejected", "mean_logps/chosen")


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """The machine, the model as a folder, and how long each specification will take, in seconds."""
    import torch
    from step_data import plan_of
    from step_flops import size_of, step_flops
    from step_measure import hardware, load, matrix_peak, model_folder, versions

    from alignzoo.engine import TOKENS_PER_DEVICE

    folder = model_folder(request["model"], Path(request["work"]))
    model, tokenizer = load(folder)
    size, where = size_of(model), "cuda" if torch.cuda.is_available() else "cpu"
    peaks = {precision: matrix_peak(model, precision) for precision in ("fp32", "bf16")}
    seconds = []
    for spec in request["specs"]:
        plan = plan_of(spec, tokenizer)
        options = {"kto": spec["loss"] == "kto", "reference": spec["reference"] == "live"}
        options |= {"per_device": plan.per_device, "budget": TOKENS_PER_DEVICE[where]}
        layout = "trl" if spec["side"] == "trl" else spec["layout"]
        flops = sum(step_flops(step, size, **options)[layout] for step in plan.steps)
        filling = flops / 3 if spec["reference"] == "cached" else 0.0
        # seen on two cores: half of the peak in float32 and a quarter in bfloat16; TRL's checkpointing a third more
        speed = peaks[spec["precision"]] * (0.5 if spec["precision"] == "fp32" else 0.25)
        seconds.append(request["start_seconds"] + (flops * (4 / 3 if spec["defaults"] else 1) + filling) / speed)
    return {
        "folder": str(folder), "device": where, "hardware": hardware(), "versions": versions(), "seconds": seconds,
        "peaks": peaks,
    }  # fmt: skip


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """One specification."""
    import torch
    from step_data import plan_of, sequence_tokens
    from step_flops import size_of, step_flops
    from step_measure import Clock, Memory, hardware, load, matrix_peak, versions

    spec = request["spec"]
    if spec["side"] == "trl":
        from step_trl import train
    else:
        from step_ours import train
    model, tokenizer = load(Path(request["folder"]))
    plan = plan_of(spec, tokenizer)
    size, weights = size_of(model), sum(p.numel() for p in model.parameters())
    before = matrix_peak(model, spec["precision"])
    forwarded = _watch(model) if spec["side"] == "trl" else None
    clock, memory = Clock(), Memory()
    outcome = train(spec, model, tokenizer, plan, clock)
    peak = memory.peak()
    after = matrix_peak(model, spec["precision"])
    measured = plan.steps[spec["warmup"] :]
    options = {"kto": spec["loss"] == "kto", "reference": spec["reference"] == "live"}
    options |= {"per_device": plan.per_device, "budget": outcome.budget or 2048}
    flops = [step_flops(step, size, **options) for step in measured]
    if torch.cuda.is_available() and spec["loss"] != "orpo":  # there TRL's head is computed where it is needed
        flops = [{**found, "trl": found["trl_head"]} for found in flops]
    return {
        "spec": spec, "hardware": hardware(), "versions": versions(), "weights": weights,
        "seconds": clock.seconds()[spec["warmup"] :], "first_seconds": clock.seconds()[0],
        "tokens": [sequence_tokens(step) for step in measured],
        "all_tokens": sum(sequence_tokens(step) for step in plan.steps),
        "forwarded": forwarded, "flops": {name: sum(f[name] for f in flops) for name in flops[0]},
        "head_seconds": _measured(clock.seconds_in("head"), spec), "layout": outcome.layout,
        "reference_seconds": _measured(clock.seconds_in("reference"), spec), "fill_seconds": outcome.fill_seconds,
        "peak_flops": [before, after], "memory": {"loaded": memory.loaded, "peak": peak},
        "lines": [{name: line[name] for name in WHAT_LOGS if name in line} for line in outcome.lines],
    }  # fmt: skip


def _measured(seconds: list[float] | None, spec: dict[str, Any]) -> list[float] | None:
    return None if seconds is None else seconds[spec["warmup"] :]


def _watch(model: Any) -> dict[str, int]:
    """Counts what a trainer forwards with gradients: positions, and tokens that are not padding."""
    import torch

    counts = {"positions": 0, "tokens": 0}

    def look(_module: Any, _args: Any, options: dict[str, Any]) -> None:
        ids, mask = options.get("input_ids"), options.get("attention_mask")
        if torch.is_grad_enabled() and ids is not None:
            counts["positions"] += ids.numel()
            counts["tokens"] += ids.numel() if mask is None else int(mask.sum())

    model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    return counts


def main() -> None:
    request = json.load(sys.stdin)
    os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
    os.environ["ALIGNZOO_CACHE"] = request["cache"]
    import transformers

    transformers.utils.logging.disable_progress_bar()
    found = {"probe": probe, "measure": measure}[request["do"]](request)
    Path(request["into"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
