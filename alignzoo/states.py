"""What of an optimizer and of the random generators goes into a checkpoint, and back, bit for bit, without pickle."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from alignzoo.errors import AlignzooError, RunError
from alignzoo.progress import Say

Names = Mapping[Parameter, str]

# --- optimizer -------------------------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: Optimizer, names: Names) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an optimizer's state as "name of the weight/key", e.g. "lm_head.weight/exp_avg"."""
    for parameter, name in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{name}/{key}", value.detach()


def optimizer_scalars(optimizer: Optimizer, names: Names) -> dict[str, Any]:
    """The rest of the state, for JSON.

    {"state": {name of the weight: {key: number or None}}, "groups": [the numbers among a group's options]}
    The options hold what the schedule, or the optimizer itself, has made of the recipe's numbers: the current lr.
    Raises RunError for an optimizer that keeps something else than tensors, numbers and words.
    """
    state = {}
    for parameter, name in names.items():
        rest = {k: v for k, v in optimizer.state.get(parameter, {}).items() if not isinstance(v, Tensor)}
        wrong = [key for key, value in rest.items() if not _is_plain(value)]
        if wrong:
            raise RunError(
                f"{type(optimizer).__name__} keeps a {type(rest[wrong[0]]).__name__} in its state ({wrong[0]})",
                why="a checkpoint holds tensors, numbers and words",
                fix="train with another train.optimizer, or without checkpoints",
            )
        if rest:
            state[name] = rest
    return {"state": state, "groups": [_options(group) for group in optimizer.param_groups]}


def load_optimizer(
    optimizer: Optimizer, names: Names, tensors: Iterable[tuple[str, Tensor]], scalars: Mapping[str, Any]
) -> None:
    """Puts back what `optimizer_tensors` and `optimizer_scalars` gave, into a new optimizer of the same recipe.

    Make the schedule first: making one sets the learning rate of its first step, and this puts back the current one.
    Raises AlignzooError where the weights or the groups are others.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    load_options(optimizer, scalars["groups"])
    optimizer.state.clear()
    for path, value in tensors:
        name, _, key = path.rpartition("/")
        parameter = _known(parameters, name)
        optimizer.state[parameter][key] = value.to(_device_of(key, parameter, groups.get(parameter, {})), copy=True)
    for name, rest in scalars["state"].items():
        optimizer.state[_known(parameters, name)].update(rest)


def _known(parameters: Mapping[str, Parameter], name: str) -> Parameter:
    if name not in parameters:
        raise AlignzooError(
            f"the checkpoint has optimizer states of {name}, which does not train here",
            fix="resume with the recipe and the model that the run began with",
        )
    return parameters[name]


def _device_of(key: str, parameter: Parameter, group: Mapping[str, Any]) -> torch.device:
    """torch's rule: a state lies beside its weight, but for counts of steps, which stay on the CPU."""
    on_cpu = key == "step" and not (group.get("capturable") or group.get("fused"))
    return torch.device("cpu") if on_cpu else parameter.device


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params" and _is_plain(value)}


def load_options(optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    """The options alone, the "groups" of `optimizer_scalars`; after the schedule was made, see `load_optimizer`.

    Raises AlignzooError where the groups are others.
    """
    if len(saved) != len(optimizer.param_groups):
        raise AlignzooError(
            f"the checkpoint's optimizer has {len(saved)} groups of weights, this one {len(optimizer.param_groups)}",
            fix="resume with the recipe and the model that the run began with",
        )
    for group, options in zip(optimizer.param_groups, saved, strict=True):
        for key, value in options.items():
            group[key] = tuple(value) if isinstance(value, list) and isinstance(group.get(key), tuple) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


# --- random generators -----------------------------------------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """The states of the generators of python, numpy, torch and every GPU that this process sees, for JSON."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in gpus],
    }


def set_random_states(states: Mapping[str, Any], say: Say) -> None:
    """Puts back what `random_states` gave, also after JSON. What cannot be put back on this machine is said."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(states["torch"]))
    gpus, there = states["cuda"], torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, state in enumerate(gpus[:there]):
        torch.cuda.set_rng_state(_bytes(state), index)
    if len(gpus) != there:
        say(f"random states: the checkpoint has those of {len(gpus)} GPUs, and {there} are here: dropout may differ")


def _hex(state: Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
