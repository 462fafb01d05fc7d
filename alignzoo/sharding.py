"""Several processes and who holds what: the seam to accelerate and DeepSpeed.

`Everything` holds all of the model on every rank and averages gradients (accelerate's DDP); `Shards` shares optimizer
states, gradients and weights out over the ranks (DeepSpeed's ZeRO). The engine uses either through `Holder`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn

from alignzoo.errors import AlignzooError, RunError
from alignzoo.recipe import Recipe
from alignzoo.states import Names, load_optimizer, load_options, optimizer_scalars, optimizer_tensors
from alignzoo.zero import additions_in_words, check_zero, compiled_ops, deepspeed_config

Tensors = Iterable[tuple[str, Tensor]]  # by name
_NEVER = timedelta(days=30)  # a rank that hangs is the watchdog's business; preparing data may take hours

# --- the machine -----------------------------------------------------------------------------------------------------


def world_size() -> int:
    """Processes of this run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_machine(recipe: Recipe) -> None:
    """Raises RecipeError where this machine lacks the device, the precision or a tracker that the recipe asks for."""
    choose_precision(recipe)
    check_zero(recipe, ranks=world_size())
    installed = {str(getattr(t, "value", t)) for t in get_available_trackers()}
    for tracker in recipe.log.trackers:
        if tracker not in installed:
            known = tracker in LOGGER_TYPE_TO_CLASS
            raise recipe.error(
                ("log", "trackers"),
                f'log.trackers: "{tracker}" is {"not installed" if known else "no tracker that accelerate knows"}',
                fix=f"pip install {tracker}" if known else "one of " + ", ".join(sorted(LOGGER_TYPE_TO_CLASS)),
            )


def on_cpu(recipe: Recipe) -> bool:
    """Whether the recipe computes on the CPU here."""
    if recipe.engine.device == "cuda" and not torch.cuda.is_available():
        raise recipe.error(("engine", "device"), 'engine.device = "cuda", and torch sees no GPU here')
    return recipe.engine.device == "cpu" or not torch.cuda.is_available()


def choose_precision(recipe: Recipe) -> str:
    """engine.precision on this machine: "fp32", "bf16" or "fp16"."""
    wanted, cpu = recipe.engine.precision, on_cpu(recipe)
    if wanted == "auto":
        return "bf16" if not cpu and torch.cuda.is_bf16_supported() else "fp32"
    if wanted == "fp16" and cpu:
        raise recipe.error(
            ("engine", "precision"), 'engine.precision = "fp16" needs a GPU', fix='use "fp32" or "bf16" on a CPU'
        )
    return wanted


def make_accelerator(recipe: Recipe) -> Accelerator:
    """An accelerator for the device and precision of the recipe; with several processes it joins them.

    Raises RecipeError where the machine does not fit the recipe.
    """
    check_machine(recipe)
    AcceleratorState._reset_state(reset_partial_state=True)  # a second run in one process may want another precision
    precision, cpu = choose_precision(recipe), on_cpu(recipe)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true", "yes"):
        raise AlignzooError(
            "accelerate launch --use_deepspeed: the recipe decides on DeepSpeed, and alignzoo sets it up itself",
            fix="start it without --use_deepspeed (or with a configuration that has none), and set engine.zero",
        )
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares the search for another, and a warning that it failed
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(recipe.log.trackers) or None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_NEVER)],
    )
    if accelerator.num_processes != world_size():
        raise RunError(
            f"the launcher started {world_size()} processes, and accelerate joined {accelerator.num_processes}",
            fix="start them with `alignzoo run RECIPE --processes N`",
        )
    return accelerator


def same_everywhere(accelerator: Accelerator, value: Any) -> Any:
    """Rank 0's value, on all ranks."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def of_all_ranks(accelerator: Accelerator, value: Any) -> list[Any]:
    """The value of each rank, on all ranks. Small values only: they travel as objects."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def end_trackers(accelerator: Accelerator) -> None:
    """Lets the trackers write what they hold. The processes stay together, for the next recipe of a chain."""
    for tracker in accelerator.trackers:
        tracker.finish()


def leave() -> None:
    """Ends the company of the processes."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# --- who holds what --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """What became of a step's gradient. Where it was not applied, the weights are as they were."""

    norm: Tensor  # (), of the whole gradient before clipping
    applied: bool


class Holder(Protocol):
    """Holds the policy that is trained. Every method is called on all ranks, equally often and in the same order.

    accumulate: around forward and backward of a micro-batch; backward: of a loss that DDP and ZeRO average over ranks
    update: moves the weights; whole: all of a weight; gathered: around what needs all of them on every rank
    blend: moves one weight towards another
    states, scalars, restore: the optimizer as checkpoints have it, by the names of the weights; close: the end
    """

    policy: Callable[..., Any]  # a Scorer's forward, wrapped
    optimizer: Any  # the one that the schedule steps
    sharded: bool  # no rank holds all weights

    def accumulate(self, last: bool) -> AbstractContextManager[Any]: ...

    def backward(self, loss: Tensor) -> None: ...

    def update(self) -> Update: ...

    def whole(self, parameter: nn.Parameter) -> Tensor: ...

    def gathered(self) -> AbstractContextManager[Any]: ...

    def blend(self, kept: nn.Parameter, trained: nn.Parameter, alpha: float) -> None: ...

    def states(self, names: Names) -> Iterator[tuple[str, Tensor]]: ...

    def scalars(self, names: Names) -> dict[str, Any]: ...

    def restore(
        self, names: Names, weights: Tensors, states: Callable[[], Tensors], scalars: Mapping[str, Any]
    ) -> None: ...

    def close(self) -> None: ...


class Everything:
    """All of the model on every rank."""

    sharded = False

    def __init__(
        self, accelerator: Accelerator, policy: nn.Module, optimizer: Any, limit: float, *, sparse: bool
    ) -> None:
        """limit: of the gradient's norm, 0 for none. sparse: some weights may have no part in a step (experts)."""
        self.accelerator, self.limit = accelerator, limit
        accelerator.ddp_handler = DistributedDataParallelKwargs(
            find_unused_parameters=sparse, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        with warnings.catch_warnings():  # torch has another name for broadcast_buffers, accelerate not yet
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            self.policy, self.optimizer = accelerator.prepare(policy.to(accelerator.device), optimizer)
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(self.policy)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def update(self) -> Update:
        norm = self.accelerator.clip_grad_norm_(self.trained, self.limit if self.limit > 0 else float("inf"))
        if not torch.isfinite(norm) and self.accelerator.scaler is None:
            return Update(norm, applied=False)
        self.optimizer.step()
        applied = not self.optimizer.step_was_skipped  # fp16: the loss scale was too large
        self.optimizer.zero_grad()
        return Update(norm, applied)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def gathered(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @torch.no_grad()
    def blend(self, kept: nn.Parameter, trained: nn.Parameter, alpha: float) -> None:
        kept.lerp_(trained.to(kept.dtype), alpha)

    def states(self, names: Names) -> Iterator[tuple[str, Tensor]]:
        return optimizer_tensors(self.optimizer.optimizer, names)

    def scalars(self, names: Names) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return optimizer_scalars(self.optimizer.optimizer, names) | {"scaler": scaler.state_dict() if scaler else {}}

    @torch.no_grad()
    def restore(
        self, names: Names, weights: Tensors, states: Callable[[], Tensors], scalars: Mapping[str, Any]
    ) -> None:
        parameters = {name: parameter for parameter, name in names.items()}
        for name, value in weights:
            parameters[name].copy_(value)
        load_optimizer(self.optimizer.optimizer, names, states(), scalars)
        if self.accelerator.scaler is not None and scalars["scaler"]:
            self.accelerator.scaler.load_state_dict(scalars["scaler"])

    def close(self) -> None:
        self.accelerator.free_memory()


class Shards:
    """ZeRO: the ranks share out optimizer states (stage 1), gradients (2) and weights (3)."""

    def __init__(self, policy: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]) -> None:
        self.sharded = config["zero_optimization"]["stage"] == 3
        self.engine = _start(policy, dict(config), optimizer)
        self.policy: Callable[..., Any] = self.engine
        self.optimizer = optimizer
        self.fp16 = self.engine.fp16_enabled()

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def update(self) -> Update:
        self.engine.step()  # skips a gradient that is not finite
        norm = self.engine.get_global_grad_norm()
        applied = not self.engine.optimizer.overflow
        return Update(torch.as_tensor(norm, dtype=torch.float32), applied)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """All of a weight, on every rank; of a trained one in the precision that is trained."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if full is not None:
            return full  # type: ignore[no-any-return]
        with deepspeed.zero.GatheredParameters([parameter], enabled=self.sharded):
            return parameter.detach().clone()

    def gathered(self) -> AbstractContextManager[Any]:
        return gathered(self.engine) if self.sharded else nullcontext()

    @torch.no_grad()
    def blend(self, kept: nn.Parameter, trained: nn.Parameter, alpha: float) -> None:
        import deepspeed

        with deepspeed.zero.GatheredParameters([kept, trained], modifier_rank=0, enabled=self.sharded):
            if not self.sharded or torch.distributed.get_rank() == 0:
                kept.lerp_(trained.to(kept.dtype), alpha)

    def _parts(self) -> list[tuple[list[nn.Parameter], nn.Parameter]]:
        """The weights that are flattened together, each with this rank's part of them, which the optimizer trains."""
        zero = self.engine.optimizer
        if self.sharded:
            return list(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True))
        return list(zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True))

    def _link(self) -> None:
        """Lets DeepSpeed find each weight's states. It looks after the first group's first step, and never again."""
        if not self.sharded:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def states(self, names: Names) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        flat = {parameter: part for group, part in self._parts() for parameter in group}
        for parameter, name in names.items():
            for key, value in self.optimizer.state.get(flat[parameter], {}).items():
                if isinstance(value, Tensor):
                    whole = safe_get_full_optimizer_state(parameter, key) if value.dim() else value
                    yield f"{name}/{key}", whole

    def scalars(self, names: Names) -> dict[str, Any]:
        del names  # elementwise optimizers keep tensors only
        scaler = {k: v for k, v in vars(self.engine.optimizer.loss_scaler).items() if isinstance(v, int | float)}
        return optimizer_scalars(self.optimizer, {}) | {"scaler": scaler}

    @torch.no_grad()
    def restore(
        self, names: Names, weights: Tensors, states: Callable[[], Tensors], scalars: Mapping[str, Any]
    ) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameters = {name: parameter for parameter, name in names.items()}
        for name, value in weights:
            safe_set_full_fp32_param(parameters[name], value)
            with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0, enabled=self.sharded):
                parameters[name].copy_(value)
        flat = {parameter: part for group, part in self._parts() for parameter in group}
        for path, value in states():  # room for all of them first: DeepSpeed links states to weights once
            name, _, key = path.rpartition("/")
            part = flat[parameters[name]]
            if key not in self.optimizer.state[part]:
                self.optimizer.state[part][key] = torch.zeros_like(part) if value.dim() else value.clone()
        self._link()
        for path, value in states():
            name, _, key = path.rpartition("/")
            if value.dim():
                safe_set_full_optimizer_state(parameters[name], value, key)
        load_options(self.optimizer, scalars["groups"])
        for key, number in scalars["scaler"].items():
            if hasattr(self.engine.optimizer.loss_scaler, key):
                setattr(self.engine.optimizer.loss_scaler, key, number)

    def close(self) -> None:
        self.engine.destroy()


@contextmanager
def gathered(engine: Any) -> Iterator[None]:
    """The weights of a DeepSpeed engine of stage 3 whole on every rank; all ranks enter it."""
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        remove_hooks(engine)  # they would share the weights out again after each layer
        try:
            yield
        finally:
            add_hooks(engine)


def hold(recipe: Recipe, accelerator: Accelerator, policy: nn.Module, optimizer: Any, *, sparse: bool) -> Holder:
    """The policy and its optimizer on this rank, as engine.zero wants them."""
    if recipe.engine.zero == 0:
        return Everything(accelerator, policy, optimizer, recipe.train.max_grad_norm, sparse=sparse)
    return Shards(policy, optimizer, _config(recipe, accelerator))


def hold_frozen(recipe: Recipe, accelerator: Accelerator, scorer: nn.Module) -> Callable[..., Any]:
    """The forward of a model that is not trained; sharded where the policy is."""
    if recipe.engine.zero == 3:
        return _start(scorer, _config(recipe, accelerator, trained=False), None)  # type: ignore[no-any-return]

    scorer.to(accelerator.device)

    def forward(*args: Any) -> Any:
        with accelerator.autocast():
            return scorer(*args)

    return forward


def _config(recipe: Recipe, accelerator: Accelerator, trained: bool = True) -> dict[str, Any]:
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return deepspeed_config(
        recipe, precision=precision, ranks=accelerator.num_processes, model_dtype=recipe.model.dtype, trained=trained
    )


def zero_in_words(recipe: Recipe, accelerator: Accelerator) -> list[str]:
    """What DeepSpeed is told by the user's own file, and what it will compile first."""
    if recipe.engine.zero == 0:
        return []
    ops = compiled_ops(_config(recipe, accelerator))
    compiled = [f"DeepSpeed compiles {', '.join(ops)} now: a minute or two each, the first time"] if ops else []
    return [*additions_in_words(recipe), *compiled]


def _start(module: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None) -> Any:
    """A DeepSpeed engine."""
    import deepspeed

    _join_alone()
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def _join_alone() -> None:
    """DeepSpeed wants a process group, also of one process."""
    import deepspeed
    import deepspeed.ops
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    deepspeed.ops.__compatible_ops__ = {**deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm": False}
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of a weight, of which this rank may hold a share only."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def sharded_loading(recipe: Recipe, accelerator: Accelerator, trained: bool = True) -> Iterator[None]:
    """Models that from_pretrained loads in here are shared out over the ranks as they come (engine.zero = 3)."""
    from transformers.integrations import HfDeepSpeedConfig

    _join_alone()
    alive = HfDeepSpeedConfig(_config(recipe, accelerator, trained))
    yield
    del alive
