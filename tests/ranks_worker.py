"""One rank of a group that trains many small cases, one after the other: `python ranks_worker.py CASES.json OUT.pt`.

Run alone, without a launcher's environment, it is the plain process that the others are compared with.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alignzoo_losses.bradley_terry import BradleyTerry
from alignzoo_losses.dpo import DPO
from alignzoo_losses.hinge import Hinge
from alignzoo_losses.ipo import IPO
from alignzoo_losses.kto import KTO
from alignzoo_losses.orpo import ORPO
from alignzoo_losses.sft import SFT
from conftest import tiny_llama
from rich.console import Console
from test_engine import Centred, Mixed, make_recipe
from test_engine import trees_for as plain_trees
from test_losses_steps import labelled_trees

import alignzoo
from alignzoo import sharding
from alignzoo.engine import Engine
from alignzoo.head import HEAD_CHUNK
from alignzoo.loading import choose_layout
from alignzoo.logprobs import Scorer
from alignzoo.model import add_adapter, with_scalar_head
from alignzoo.recipe import LoRA
from alignzoo.reference import ReferencePlan
from alignzoo.tree import Completion, Tree

LOSSES: Mapping[str, Any] = {
    "sft": SFT, "dpo": DPO, "ipo": lambda: IPO(tau=0.3), "hinge": lambda: Hinge(beta=0.05),
    "orpo": lambda: ORPO(lambda_=0.7), "kto": lambda: KTO(beta=0.05), "mixed": Mixed, "centred": Centred,
    "bradley_terry": lambda: BradleyTerry(center_rewards_coefficient=0.1),
}  # fmt: skip
STEPS = 5
RATES = {
    "dpo": 0.01,
    "centred": 0.002,
    "mixed": 1e-3,
    "kto": 1.0,
    "ipo": 0.01,
    "hinge": 0.1,
}  # each moves the weights by 1 % or more


def rows_for(loss: alignzoo.Loss, n: int) -> list[Tree]:
    """Of uneven lengths, two of them with more tokens than the head takes at once."""
    if isinstance(loss, KTO):
        return labelled_trees([i % 3 != 0 for i in range(n)])
    trees = plain_trees(type(loss), n)
    for i in (i for i in (2, 7) if i < n):
        long = [Completion(np.resize(c.ids, HEAD_CHUNK + 40 + 20 * k)) for k, c in enumerate(trees[i].completions)]
        trees[i] = replace(trees[i], completions=tuple(long))
    return trees


def case(loss: str, *, lora: bool = False, rows: int = 17, tied: bool = False, **overrides: Any) -> dict[str, Any]:
    """17 rows in steps of 6: uneven over any ranks, and the third step has 5 rows."""
    return {"loss": loss, "lora": lora, "rows": rows, "tied": tied, "overrides": overrides}


def train(loss: str, lora: bool, rows: int, tied: bool, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The update of the weights after STEPS steps, and the metrics on the way."""
    rate = {"train__learning_rate": RATES.get(loss, 0.1)}
    recipe = make_recipe(**{**rate, "train__epochs": 3, "train__max_steps": STEPS, "eval__every_steps": 3, **overrides})
    made = LOSSES[loss]()
    trees = rows_for(made, rows)
    accelerator = sharding.make_accelerator(recipe)
    options = {"tie_word_embeddings": tied, "max_position_embeddings": 512}
    model, records = tiny_llama(**options), list[dict[str, float]]()
    if made.needs_scores:
        model = with_scalar_head(model, 0, lambda _: None)
    frozen = Scorer(tiny_llama(seed=1, **options))
    if lora:
        torch.manual_seed(0)
        model = add_adapter(model, LoRA(rank=4), quantised=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.1)
    kind = "none" if not made.needs_reference else "adapter_off" if lora else "frozen"
    scorer = Scorer(model)
    before = {n: p.detach().clone() for n, p in scorer.named_parameters() if p.requires_grad}
    engine = Engine(
        recipe, made, scorer, ReferencePlan(kind, ""), frozen if kind == "frozen" else None, accelerator,
        console=Console(file=io.StringIO()), sink=records.append,
    )  # fmt: skip
    if recipe.engine.packing == "on":
        choose_layout(recipe, engine, trees[0], 512)
    held_out = [replace(t, row=1000 + t.row) for t in trees[:7]]
    engine.fit(trees, held_out)
    parts = [
        (engine.holder.whole(p).detach().cpu() - before[n]).flatten()
        for n, p in engine.bare.named_parameters()
        if n in before
    ]
    start = torch.cat([p.flatten() for p in before.values()])
    engine.holder.close()
    return {"update": torch.cat(parts), "start": float(start.norm()), "records": records}


def _world_size_forgotten() -> None:
    """The gradient averaged over the ranks, and the loss not multiplied by them."""
    for cls in (sharding.Everything, sharding.Shards):
        real = cls.backward
        cls.backward = lambda self, loss, real=real: real(self, loss / sharding.world_size())  # type: ignore[method-assign]


def _accumulation_averaged() -> None:
    """Each micro-batch divided by their number, as accumulation is often averaged."""
    real = Engine._forward

    def wrong(self: Engine, round: Any, *rest: Any) -> Any:
        loss, router = real(self, round, *rest)
        return loss / 3, router

    Engine._forward = wrong  # type: ignore[method-assign]


MISTAKES = {"world size": _world_size_forgotten, "accumulation": _accumulation_averaged}


def main(arguments: Sequence[str]) -> None:
    cases, out = json.loads(Path(arguments[0]).read_text()), Path(arguments[1])
    torch.set_num_threads(1)
    if len(arguments) > 2:
        MISTAKES[arguments[2]]()
    found = [train(**one) for one in cases]
    if sharding.world_size() == 1 or torch.distributed.get_rank() == 0:
        torch.save(found, out)


if __name__ == "__main__":
    main(sys.argv[1:])
