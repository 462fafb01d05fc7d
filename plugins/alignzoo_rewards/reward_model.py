"""A reward model: a sequence classifier with one output, such as the Bradley-Terry models that alignzoo trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal

import alignzoo
from alignzoo.errors import ModelError

REQUIRED: Any = MISSING


@dataclass(frozen=True)
class Settings:
    path: str = alignzoo.setting(
        REQUIRED, "a local folder with safetensors, relative to the working directory, or a hub id"
    )
    revision: str | None = alignzoo.setting(None, "branch, tag or commit on the hub")
    dtype: Literal["float32", "bfloat16", "float16"] = alignzoo.setting("float32", "type of the weights")
    batch_size: int = alignzoo.setting(16, "texts in one forward pass; it changes nothing but rounding", ge=1)
    max_length: int | None = alignzoo.setting(
        None, "tokens of prompt and completion; a longer text counts as failed; the model's own if not given",
        ge=1,
    )  # fmt: skip


class RewardModel(alignzoo.Reward):
    """The output of a sequence classifier with one label, not normalised.

    The text is the tokenizer's chat template over the prompt and the completion as an assistant turn; without a
    template it is the prompt and the completion, one after the other. Weights are read from safetensors only, and no
    code that comes with the model is run.
    """

    name = "reward_model"
    Settings = Settings

    def start(self, device: Any) -> str:
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        s = self.settings
        where = {"revision": s.revision, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(s.path, **where)
            if config.num_labels != 1:
                raise ModelError(
                    f'reward model "{s.path}" has {config.num_labels} labels, not one', fix="name a reward model"
                )
            self.tokenizer = AutoTokenizer.from_pretrained(s.path, **where)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                s.path, use_safetensors=True, dtype=getattr(torch, s.dtype), output_loading_info=True, **where
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f'reward model "{s.path}" cannot be loaded', why=str(error).splitlines()[0],
                fix="name a folder or hub id with a sequence classifier in safetensors",
            ) from error  # fmt: skip
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"]))
            raise ModelError(
                f'reward model "{s.path}" lacks weights: {missing}', why="they would be random numbers",
                fix="name a model that was trained as a reward model",
            )  # fmt: skip
        self.model = model.requires_grad_(False).eval().to(device)
        self.tokenizer.padding_side = "right"
        limits = (getattr(config, "max_position_embeddings", None), self.tokenizer.model_max_length)
        self.longest: int = s.max_length or min(limit for limit in limits if limit)
        self.pad = config.get_text_config().pad_token_id
        alone = ", one text at a time, since it has no pad token" if self.pad is None else ""
        form = "its chat template" if self.tokenizer.chat_template else "prompt and completion joined"
        return f"{type(model).__name__} of {s.path}, {form}, at most {self.longest} tokens{alone}"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | Exception | None]:
        ids = [self._ids(*pair) for pair in zip(prompts, completions, strict=True)]
        values: list[float | Exception | None] = [
            ValueError(f"{len(row)} tokens, and the reward model takes {self.longest}") for row in ids
        ]
        fitting = sorted((i for i, row in enumerate(ids) if len(row) <= self.longest), key=lambda i: len(ids[i]))
        size = 1 if self.pad is None else self.settings.batch_size
        for start in range(0, len(fitting), size):
            part = fitting[start : start + size]
            for i, value in zip(part, self._forward([ids[i] for i in part]), strict=True):
                values[i] = value
        return values

    def _ids(self, prompt: Any, completion: str) -> list[int]:
        if not self.tokenizer.chat_template:
            text = prompt if isinstance(prompt, str) else "\n".join(_content(turn) for turn in prompt) + "\n"
            return list(self.tokenizer(text + completion)["input_ids"])
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = self.tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": completion}], tokenize=False
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _forward(self, rows: Sequence[Sequence[int]]) -> list[float]:
        import torch

        longest = max(map(len, rows))
        pad = self.pad or 0
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        with torch.no_grad():
            device = self.model.device
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits  # (n, 1)
        found: list[float] = logits[:, 0].float().tolist()
        return found


def _content(turn: Mapping[str, Any]) -> str:
    return str(turn["content"])
