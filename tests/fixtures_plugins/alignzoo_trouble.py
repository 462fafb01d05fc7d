"""A loss that gets into trouble on the second rank: its settings say which."""

import os
import time
from dataclasses import dataclass
from typing import Literal

import torch

import alignzoo


@dataclass(frozen=True)
class Settings:
    trouble: Literal["hangs", "raises"] = alignzoo.setting("raises", "what happens on rank 1")


class Trouble(alignzoo.Loss):
    name, data, needs_reference = "trouble", "pairs", False
    Settings = Settings

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        if os.environ.get("RANK") == "1" and torch.is_grad_enabled():
            if self.settings.trouble == "hangs":
                time.sleep(1e6)
            raise ArithmeticError("in trouble on purpose")
        return alignzoo.LossOutput(batch.rejected.mean() - batch.chosen.mean())


@alignzoo.hookimpl
def alignzoo_losses():
    return [Trouble]
