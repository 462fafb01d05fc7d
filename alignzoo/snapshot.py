"""All that a run needs to go on, from the engine into a checkpoint and back.

Weights and optimizer states are gathered whole, one at a time, and written under the names of the weights: so a
checkpoint does not know how many ranks wrote it, nor at which ZeRO stage. Every function here is called on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignzoo.checkpoint import CheckpointReader, CheckpointWriter
from alignzoo.engine import Engine
from alignzoo.errors import RunError
from alignzoo.progress import Say
from alignzoo.sharding import of_all_ranks, same_everywhere
from alignzoo.states import random_states, set_random_states


def trained_names(engine: Engine) -> dict[nn.Parameter, str]:
    """The weights that train, by their names in the model, in its order."""
    return {p: n for n, p in engine.bare.model.named_parameters() if p.requires_grad}


def save_snapshot(engine: Engine, folder: Path, step: int, extra: Mapping[str, Any], beat: Callable[[], None]) -> Path:
    """A checkpoint of `step` below `folder`. extra: JSON values of the run, kept under "run".

    beat: called now and then, as a sign that it goes on. Raises RunError on all ranks where rank 0 cannot write.
    """
    random = of_all_ranks(engine.accelerator, random_states())
    metrics = of_all_ranks(engine.accelerator, engine.tally.metrics.table())
    names = trained_names(engine)
    writer = CheckpointWriter(folder, step) if engine.rank == 0 else None
    for parameter, name in names.items():
        _add(writer, "weights", name, engine.holder.whole(parameter))
        beat()
    if synced(engine):
        for name, kept in _frozen(engine).items():
            _add(writer, "reference", name, engine.holder.whole(kept))
            beat()
    for path, tensor in engine.holder.states(names):
        _add(writer, "optimizer", path, tensor)
        beat()
    scalars = engine.holder.scalars(names)
    failed: RunError | None = None
    if writer is not None:
        for name, value in engine.state.items():
            writer.add("loss", name, value.cpu())
        writer.add_json("optimizer", scalars)
        writer.add_json("random", random)
        writer.add_json("schedule", _plain(engine.schedule.state_dict()))
        progress = {"tokens_seen": engine.tokens_seen, "tally": engine.tally.to_json(metrics)}
        writer.add_json("progress", progress | {"loss_settings": engine.steering.state})
        writer.add_json("run", dict(extra))
        try:
            writer.finish()
        except RunError as error:
            failed = error
    failed = same_everywhere(engine.accelerator, failed)
    if failed is not None:
        raise failed
    return folder / f"step-{step}"


def restore(engine: Engine, reader: CheckpointReader, total: int, say: Say) -> Mapping[str, Any]:
    """Puts an engine that was made anew into the state of a checkpoint. The value of `extra` that was saved.

    total: optimizer steps of the whole run
    """
    names = trained_names(engine)
    here, there = set(names.values()), set(reader.names("weights"))
    if here != there:
        odd = sorted(here ^ there)
        raise RunError(
            f"{reader.folder}: it holds other weights than train here: {', '.join(odd[:3])} and {len(odd)} in all",
            fix="resume with the recipe and the versions that the run began with",
        )
    engine.make_schedule(total)  # first, since it sets the rates of its step 0
    engine.holder.restore(
        names, reader.tensors("weights"), lambda: reader.tensors("optimizer"), reader.json("optimizer")
    )
    if synced(engine):
        frozen = _frozen(engine)
        for name, value in reader.tensors("reference"):
            engine.holder.blend(frozen[name], nn.Parameter(value.to(engine.device)), 1.0)
    engine.state = {name: value.clone().to(engine.device) for name, value in reader.tensors("loss")}
    engine.schedule.load_state_dict(reader.json("schedule"))
    progress = reader.json("progress")
    engine.tokens_seen = progress["tokens_seen"]
    engine.tally.load_json(progress["tally"], engine.rank)
    engine.steering.load_state(progress.get("loss_settings", {}))
    random = reader.json("random")
    if len(random) != engine.ranks:
        say(
            f"the checkpoint is of {len(random)} processes, and now there are {engine.ranks}: dropout differs from here"
        )
    set_random_states(random[min(engine.rank, len(random) - 1)], say if engine.rank == 0 else lambda _: None)
    return reader.json("run")  # type: ignore[no-any-return]


def synced(engine: Engine) -> bool:
    """Does the reference move, so that it belongs into a checkpoint?"""
    return engine.recipe.reference.sync_every_steps is not None and engine.frozen is not None


def _frozen(engine: Engine) -> dict[str, nn.Parameter]:
    assert engine.frozen is not None
    return dict(engine.frozen.model.named_parameters())


def _add(writer: CheckpointWriter | None, part: str, name: str, tensor: Tensor) -> None:
    if writer is not None:
        writer.add(part, name, tensor.detach().to("cpu", copy=True).contiguous())


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's state without its functions, which the recipe makes again."""
    plain = {k: v for k, v in state.items() if isinstance(v, int | float | str | list | None)}
    return plain | ({"lr_lambdas": [None] * len(state["lr_lambdas"])} if "lr_lambdas" in state else {})


def full_state(engine: Engine, beat: Callable[[], None]) -> dict[str, Tensor] | None:
    """The model's weights on rank 0 where no rank holds them all (under an adapter, those that train); else None."""
    if not engine.holder.sharded:
        return None
    model = engine.bare.model
    adapted = hasattr(model, "get_base_model")
    kept: dict[int, Tensor] = {}
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if adapted and not value.requires_grad:
            continue
        if id(value) not in kept:  # tied weights stay one tensor
            whole = engine.holder.whole(value) if isinstance(value, nn.Parameter) else value
            kept[id(value)] = whole.detach().to("cpu", value.dtype, copy=True) if engine.rank == 0 else torch.empty(0)
            beat()
        state[name] = kept[id(value)]
    return state
