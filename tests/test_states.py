"""Optimizer and random states: six steps are three steps, a checkpoint, new objects, and three steps, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from alignzoo import optim
from alignzoo.checkpoint import CheckpointWriter, open_checkpoint
from alignzoo.errors import AlignzooError, RunError
from alignzoo.optim import make_optimizer, make_schedule
from alignzoo.recipe import load_recipe
from alignzoo.states import load_optimizer, optimizer_scalars, optimizer_tensors, random_states, set_random_states

Make = Callable[[nn.Module], Optimizer]


class Net(nn.Module):
    """Matrices, a vector, a bias, an embedding with unused rows, a weight that gets no gradient, dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.dropout(self.norm(self.embedding(ids))))


def by_name(name: str, **settings: Any) -> Make:
    """An optimizer as a recipe names it."""
    train = {"learning_rate": 0.05, "weight_decay": 0.1, "optimizer": name, "lr_scheduler": "linear", **settings}
    recipe = load_recipe({"loss": {"name": "dpo"}, "model": {"path": "x"}, "data": {"train": "x"}, "train": train})
    return lambda net: make_optimizer(recipe, net)


MAKERS: dict[str, Make] = {
    name: by_name(name) for name in ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "adafactor", "rmsprop")
} | {
    "sgd with momentum": lambda net: torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "rmsprop centred": lambda net: torch.optim.RMSprop(net.parameters(), lr=0.01, momentum=0.9, centered=True),
    "amsgrad": lambda net: torch.optim.AdamW(net.parameters(), lr=0.05, amsgrad=True),
    "nadam": lambda net: torch.optim.NAdam(net.parameters(), lr=0.05),
    "rprop": lambda net: torch.optim.Rprop(net.parameters(), lr=0.05),
}


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused"])
def test_adamw_is_that_of_transformers_without_asking_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = by_name(name, adam_betas=[0.8, 0.95], adam_epsilon=1e-7)(Net())
    monkeypatch.setattr(optim, "OWN", ())
    theirs = by_name(name, adam_betas=[0.8, 0.95], adam_epsilon=1e-7)(Net())
    assert type(ours) is type(theirs) is torch.optim.AdamW
    assert ours.defaults == theirs.defaults


def test_the_fused_kernel_is_the_default_but_in_fp16() -> None:
    """There it skips a step by itself, which accelerate does not count as skipped."""
    recipe = {"loss": {"name": "dpo"}, "model": {"path": "x"}, "data": {"train": "x"}, "train": {"learning_rate": 0.1}}
    found = {p: make_optimizer(load_recipe(recipe, {"engine.precision": p}), Net()).defaults["fused"]
             for p in ("auto", "fp32", "bf16", "fp16")}  # fmt: skip
    assert found == {"auto": True, "fp32": True, "bf16": True, "fp16": None}


def names_of(net: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in net.named_parameters()}


def schedule_of(optimizer: Optimizer) -> Any:
    recipe = load_recipe(
        {"loss": {"name": "dpo"}, "model": {"path": "x"}, "data": {"train": "x"},
         "train": {"learning_rate": 0.05, "lr_scheduler": "cosine", "warmup_steps": 2}}
    )  # fmt: skip
    return make_schedule(recipe, optimizer, 6)


def train(net: nn.Module, optimizer: Optimizer, schedule: Any, steps: range) -> None:
    for step in steps:
        ids = torch.from_numpy(np.random.Generator(np.random.PCG64(step)).integers(0, 7, (4, 3)))
        (net(ids).square().sum() / 7).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def save(folder: Path, net: nn.Module, optimizer: Optimizer, schedule: Any) -> Path:
    names = names_of(net)
    with CheckpointWriter(folder, 3) as writer:
        for parameter, name in names.items():
            writer.add("weights", name, parameter)
        for name, tensor in optimizer_tensors(optimizer, names):
            writer.add("optimizer", name, tensor)
        writer.add_json("optimizer", optimizer_scalars(optimizer, names))
        writer.add_json("state", {"schedule": schedule.state_dict(), "random": random_states()})
        return writer.finish()


def load(path: Path, net: nn.Module, optimizer: Optimizer, schedule: Any) -> None:
    reader, weights = open_checkpoint(path), dict(net.named_parameters())
    with torch.no_grad():
        for name, tensor in reader.tensors("weights"):
            weights[name].copy_(tensor)
    schedule.load_state_dict(reader.json("state")["schedule"])
    load_optimizer(optimizer, names_of(net), reader.tensors("optimizer"), reader.json("optimizer"))
    set_random_states(reader.json("state")["random"], print)


@pytest.mark.parametrize("name", MAKERS)
def test_three_and_three_are_six(name: str, tmp_path: Path) -> None:
    make = MAKERS[name]

    def begin() -> tuple[nn.Module, Optimizer, Any]:
        net = Net()
        optimizer = make(net)
        return net, optimizer, schedule_of(optimizer)

    torch.manual_seed(5)
    straight = begin()
    torch.manual_seed(5)
    train(*straight, range(6))

    first = begin()
    torch.manual_seed(5)
    train(*first, range(3))
    path = save(tmp_path, *first)
    train(*first, range(3, 5))  # what goes on after a save must not reach into it
    second = begin()
    load(path, *second)
    train(*second, range(3, 6))

    start, moved = Net().state_dict(), second[0].state_dict()
    for key, value in straight[0].state_dict().items():
        assert torch.equal(moved[key], value), key
        assert key == "unused" or not torch.equal(start[key], value), f"{key} did not move, so nothing is shown"
    assert second[2].get_last_lr() == straight[2].get_last_lr()
    assert [g["lr"] for g in second[1].param_groups] == [g["lr"] for g in straight[1].param_groups]
    ours, theirs = (o.state_dict()["state"] for o in (second[1], straight[1]))
    assert ours.keys() == theirs.keys()
    for index, state in theirs.items():
        assert ours[index].keys() == state.keys()
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(ours[index][key], value) and ours[index][key].dtype == value.dtype
            else:
                assert ours[index][key] == value and type(ours[index][key]) is type(value)


def test_a_loaded_state_does_not_share_memory_with_the_file(tmp_path: Path) -> None:
    net = Net()
    optimizer = MAKERS["adamw_torch"](net)
    schedule = schedule_of(optimizer)
    train(net, optimizer, schedule, range(2))
    path = save(tmp_path, net, optimizer, schedule)
    load(path, net, optimizer, schedule)
    for state in optimizer.state.values():
        for value in state.values():
            value.add_(1.0)
    open_checkpoint(path)


def test_options_that_are_tuples_stay_tuples(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    path = save(tmp_path, net, optimizer, schedule_of(optimizer))
    fresh = torch.optim.AdamW(net.parameters(), lr=0.3, betas=(0.5, 0.5))
    load_optimizer(fresh, names_of(net), (), open_checkpoint(path).json("optimizer"))
    assert fresh.param_groups[0]["betas"] == (0.9, 0.999)


def test_what_is_no_tensor_number_or_word_is_refused() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.state[net.out.weight]["projector"] = object()
    with pytest.raises(RunError, match=r"SGD keeps a object in its state \(projector\)"):
        optimizer_scalars(optimizer, names_of(net))


def test_another_model_or_other_groups_are_refused() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scalars = optimizer_scalars(optimizer, names_of(net))
    with pytest.raises(AlignzooError, match="states of lm_head, which does not train here"):
        load_optimizer(optimizer, names_of(net), [("lm_head/momentum_buffer", torch.ones(1))], scalars)
    with pytest.raises(AlignzooError, match="has 0 groups of weights, this one 1"):
        load_optimizer(optimizer, names_of(net), (), scalars | {"groups": []})


def draws() -> list[Any]:
    gpus = [torch.rand(3, device=i).tolist() for i in range(torch.cuda.device_count())]
    return [random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand(), torch.rand(3).tolist(), gpus]


def test_random_states_come_back(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves the second of a pair behind, and so does numpy's
    np.random.normal()
    with CheckpointWriter(tmp_path, 1) as writer:
        writer.add_json("random", random_states())
        path = writer.finish()
    expected = [draws(), draws()]
    said: list[str] = []
    set_random_states(open_checkpoint(path).json("random"), said.append)
    assert [draws(), draws()] == expected and said == []


def test_states_of_gpus_that_are_not_here_are_said() -> None:
    here = torch.cuda.device_count()
    states = random_states()
    states["cuda"] = [*states["cuda"], "00" * 16]
    said: list[str] = []
    set_random_states(states, said.append)
    assert f"those of {here + 1} GPUs, and {here} are here" in said[0]
