"""TRL's side of benchmarks/step.py: its trainers as they are installed, given the same model and token ids.

Only the way of the ids into a trainer is ours: its preparation of texts is passed over, GRPO's through its own door for
rollouts. What is measured, from the collator to the optimizer, is theirs.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # before it is imported

import torch
from datasets import Dataset
from step_data import Plan, trl_rows
from step_measure import Clock
from step_ours import Outcome
from transformers import TrainerCallback

from alignzoo.tree import Tree


class _Steps(TrainerCallback):
    """Tells the clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.step()


def train(spec: dict[str, Any], model: Any, tokenizer: Any, plan: Plan, clock: Clock) -> Outcome:
    """All steps of a specification of a case."""
    from trl.trainer import utils

    clock.time_function("head", utils._ChunkedLogProbFunction)
    trees = [tree for step in plan.steps for tree in step]
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder, "per_device_train_batch_size": plan.per_device,
            "gradient_accumulation_steps": len(plan.steps[0]) // plan.per_device, "max_steps": len(plan.steps),
            "learning_rate": spec["learning_rate"], "lr_scheduler_type": "constant", "warmup_steps": 0,
            "bf16": spec["precision"] == "bf16", "use_cpu": not torch.cuda.is_available(), "seed": spec["seed"],
            "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "optim": "adamw_torch",
        }  # fmt: skip
        if not spec["defaults"]:
            options["gradient_checkpointing"] = False
        if spec["reference"] == "cached":
            options["precompute_ref_log_probs"] = True
        if spec["loss"] != "grpo":  # it has a sampler of its own
            options["train_sampling_strategy"] = "sequential"
        began = time.perf_counter()
        trainer = _TRAINERS[spec["loss"]](model, tokenizer, trees, options)
        fill_seconds = time.perf_counter() - began if spec["reference"] == "cached" else 0.0
        trainer.add_callback(_Steps(clock))
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return Outcome(lines, fill_seconds, 0, "padded")


def _longest(trees: Sequence[Tree]) -> int:
    return max(len(t.prompt) + len(c.ids) for t in trees for c in t.branches)


def _with_ids(trainer: type) -> type:
    """The trainer, given rows of ids in the place of texts."""

    class GivenIds(trainer):  # type: ignore[misc,valid-type]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return GivenIds


def _dpo(model: Any, tokenizer: Any, trees: Sequence[Tree], options: dict[str, Any]) -> Any:
    from trl import DPOConfig, DPOTrainer

    return _with_ids(DPOTrainer)(
        model=model, args=DPOConfig(max_length=_longest(trees), **options), processing_class=tokenizer,
        train_dataset=Dataset.from_list(trl_rows("dpo", trees)),
    )  # fmt: skip


def _kto(model: Any, tokenizer: Any, trees: Sequence[Tree], options: dict[str, Any]) -> Any:
    from trl import KTOConfig, KTOTrainer

    return _with_ids(KTOTrainer)(
        model=model, args=KTOConfig(max_length=_longest(trees), **options), processing_class=tokenizer,
        train_dataset=Dataset.from_list(trl_rows("kto", trees)),
    )  # fmt: skip


def _sft(model: Any, tokenizer: Any, trees: Sequence[Tree], options: dict[str, Any]) -> Any:
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=model, args=SFTConfig(max_length=_longest(trees), **options), processing_class=tokenizer,
        train_dataset=Dataset.from_list(trl_rows("sft", trees)),
    )  # fmt: skip


def _orpo(model: Any, tokenizer: Any, trees: Sequence[Tree], options: dict[str, Any]) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class GivenIds(ORPOTrainer):  # type: ignore[misc]
        def tokenize_row(self, feature: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
            prompt, made = feature["prompt_ids"], {}
            for name, own in {"prompt": None, "chosen": "chosen_ids", "rejected": "rejected_ids"}.items():
                ids = prompt + (feature[own] if own else [])
                made[f"{name}_input_ids"], made[f"{name}_attention_mask"] = ids, [1] * len(ids)
                if own:
                    made[f"{name}_labels"] = [-100] * len(prompt) + feature[own]
            return made

    return GivenIds(
        model=model, args=ORPOConfig(max_length=_longest(trees), **options), processing_class=tokenizer,
        train_dataset=Dataset.from_list(trl_rows("orpo", trees)),
    )  # fmt: skip


def _grpo(model: Any, tokenizer: Any, trees: Sequence[Tree], options: dict[str, Any]) -> Any:
    """Fixed completions and rewards: what is measured is the training on them."""
    from trl import GRPOConfig, GRPOTrainer

    by_row, size = {str(tree.row): tree for tree in trees}, len(trees[0].completions)

    def slots(prompts: Sequence[str]) -> list[tuple[Tree, int]]:
        """The tree of each prompt, and how often it came before."""
        seen: Counter[str] = Counter()
        found = []
        for prompt in prompts:
            found.append((by_row[prompt], seen[prompt]))
            seen[prompt] += 1
        return found

    def rollout(prompts: Sequence[str], _trainer: Any) -> dict[str, Any]:
        chosen = slots(prompts)
        return {
            "prompt_ids": [tree.prompt.tolist() for tree, _ in chosen],
            "completion_ids": [tree.completions[slot].ids.tolist() for tree, slot in chosen],
            "logprobs": None,
        }

    def reward(prompts: Sequence[str], **_: Any) -> list[float]:
        return [(tree.rewards or ())[slot] for tree, slot in slots(prompts)]

    groups = options["per_device_train_batch_size"]
    config = GRPOConfig(
        **{**options, "per_device_train_batch_size": groups * size}, num_generations=size, shuffle_dataset=False,
        max_completion_length=max(len(c.ids) for t in trees for c in t.completions),
    )  # fmt: skip
    return GRPOTrainer(
        model=model, args=config, processing_class=tokenizer, reward_funcs=[reward], rollout_func=rollout,
        train_dataset=Dataset.from_list(trl_rows("grpo", trees)),
    )  # fmt: skip


_TRAINERS = {"dpo": _dpo, "kto": _kto, "sft": _sft, "orpo": _orpo, "grpo": _grpo}
