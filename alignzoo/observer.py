"""The watch over a run: findings of symptoms.py told, written and counted while the run goes on.

All ranks get the same records and hold the same state; only the first one speaks and writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from alignzoo.adapt import moving_settings
from alignzoo.api import Loss
from alignzoo.check import Job
from alignzoo.optim import warmup_steps
from alignzoo.progress import Say
from alignzoo.recipe import Recipe
from alignzoo.rundir import RunDir
from alignzoo.sharding import same_everywhere
from alignzoo.symptoms import Finding, Known, Symptoms
from alignzoo.theory import loss_at_reference

if TYPE_CHECKING:
    from accelerate import Accelerator


def known_of(recipe: Recipe, loss: Loss, total: int) -> Known:
    """What the rules need to know of a run of `total` optimizer steps."""
    return Known(
        settings=recipe.watch,
        data=loss.data,
        total=total,
        warmup=warmup_steps(recipe, total),
        expected=loss_at_reference(loss, recipe.data.keep),
        other_reference=recipe.reference.path is not None,
        dropout=recipe.model.dropout > 0 or (recipe.model.lora is not None and recipe.model.lora.dropout > 0),
        moving=bool(moving_settings(recipe, loss)),
    )


class Observer:
    """Sees every line of metrics. Made on all ranks, after the run directory is there."""

    def __init__(self, job: Job, run_dir: RunDir, accelerator: Accelerator, say: Say, resumed: bool) -> None:
        self.recipe, self.run_dir, self.say = job.recipe, run_dir, say
        self.accelerator, self.first = accelerator, accelerator.is_main_process
        self.symptoms = Symptoms(known_of(job.recipe, job.loss, job.steps))
        expected = self.symptoms.known.expected
        if expected is not None:
            say(f"watch: where policy and reference are the same, the loss is {expected:.4g}")
        before = run_dir.read_metrics() if resumed and self.first else []
        for record in same_everywhere(accelerator, before):
            self.symptoms.see(record)
        self.fresh: list[Finding] = []  # since `reason` was asked

    def see(self, line: Mapping[str, Any]) -> None:
        """The engine's sink: writes the line, and below it what is wrong."""
        found = self.symptoms.see(line)
        self.fresh += found
        if self.first:
            for record in (line, *(one.record() for one in found)):
                self.run_dir.append_metrics(record)
        for one in found:
            self.say(f"WARNING: {one}")

    def reason(self) -> str:
        """Why the run ends here, by watch.stop; "" where it goes on. The first rank's word, on all of them."""
        stop = self.recipe.watch.stop
        if not stop:
            return ""
        held = [one for one in self.fresh if one.rule in stop]
        self.fresh = []
        words: str = same_everywhere(self.accelerator, f"{held[0].what} (watch.stop)" if held else "")
        return words
