"""A recipe's [engine] section as a DeepSpeed configuration. It imports neither torch nor DeepSpeed.

The engine cuts micro-batches by tokens and sets the boundary of a step itself, so DeepSpeed is told one row per
micro-batch and no accumulation. What the recipe decides, the user's own JSON may repeat but not contradict.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alignzoo.recipe import Recipe
from alignzoo.schema import Path as Key
from alignzoo.schema import dotted, nearest, show

AUTO = "auto"
# ZeRO does not use it, yet on a CPU DeepSpeed compiles it when the process group is made: a minute, and a crash where
# there is no compiler. Before that these are to be set to False in `deepspeed.ops.__compatible_ops__`.
NEEDLESS_OPS = ("deepspeed_shm_comm",)
_BUCKET = 100_000_000  # elements reduced at once: 400 MB in float32, twice where communication overlaps
_QUIET = 1_000_000_000  # steps between DeepSpeed's own reports: never

# An update of these looks at one weight at a time, so it is the same on any part of the flattened weights.
ELEMENTWISE = (
    "adagrad", "adamw_anyprecision", "adamw_torch", "adamw_torch_fused", "adamw_torch_npu_fused", "adamw_torch_xla",
    "lion_32bit", "paged_adamw_32bit", "paged_lion_32bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit", "sgd",
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A DeepSpeed key that the recipe decides: by which of its keys, and with what value."""

    key: Key
    value: Any
    words: str = ""  # why the value is what it is, where it is not simply the recipe's

    def says(self, recipe: Recipe) -> str:
        """'engine.zero = 3 (dpo.toml:30)'"""
        value = _recipe_value(recipe, self.key)
        stands = "is not set" if value is None else f"= {show(value)}"
        said = f"{dotted(self.key)} {stands} ({recipe.tables.locate(self.key)})"
        return f"{said}: {self.words}" if self.words else said


@dataclass(frozen=True)
class Theirs:
    """What the user's JSON says: its keys by their dotted names; "auto" and null are left out, for us to fill."""

    file: Path
    values: Mapping[str, Any]


# --- what makes no sense ---------------------------------------------------------------------------------------------


def check_zero(recipe: Recipe, *, ranks: int | None = None) -> None:
    """Raises RecipeError where [engine] asks for what ZeRO cannot do, or its JSON contradicts the recipe.

    ranks: how many processes train, where that is known.
    """
    for key, what, why, fix in _problems(recipe, ranks):
        raise recipe.error(("engine", key), what, why=why, fix=fix)
    if recipe.engine.zero and recipe.train.optimizer not in ELEMENTWISE:
        raise recipe.error(
            ("train", "optimizer"),
            f'train.optimizer = "{recipe.train.optimizer}" cannot run with engine.zero = {recipe.engine.zero}',
            why="ZeRO flattens the weights and gives each rank a part; this optimizer looks at whole matrices or "
            "blocks, so its result would depend on the number of ranks",
            fix=f"engine.zero = 0, or one of {', '.join(ELEMENTWISE)}",
        )
    theirs = read_json(recipe)
    if theirs is not None:
        _check_theirs(recipe, theirs)


def _problems(recipe: Recipe, ranks: int | None) -> Iterator[tuple[str, str, str, str]]:
    """(key of [engine], what, why, way out) of each setting that does not fit the others."""
    engine, model = recipe.engine, recipe.model
    yield from _stage_problems(recipe)
    nvme = "nvme" in (engine.offload_optimizer, engine.offload_parameters)
    if nvme and engine.nvme_path is None:
        yield "nvme_path", "engine.nvme_path is missing", "something is offloaded to nvme", "name a folder on the disk"
    if not nvme and engine.nvme_path is not None:
        yield "nvme_path", "engine.nvme_path has no effect", "nothing is offloaded to nvme", "remove it"
    if ranks is not None and ranks % engine.hpz:
        yield "hpz", f"engine.hpz = {engine.hpz} does not divide {ranks} processes", "", "use the GPUs of one node"
    if engine.zero == 3 and model.quantization:
        what = f'engine.zero = 3 cannot run with model.quantization = "{model.quantization}"'
        why = "the weights of bitsandbytes cannot be shared out: each rank needs them whole"
        yield "zero", what, why, "engine.zero = 2, which shares out the adapter's gradients and optimizer states"
    if engine.zero and find_spec("deepspeed") is None:
        yield "zero", f"engine.zero = {engine.zero}: DeepSpeed is not installed", "", "pip install deepspeed (Linux)"


def _stage_problems(recipe: Recipe) -> Iterator[tuple[str, str, str, str]]:
    """Settings that need a higher ZeRO stage."""
    engine = recipe.engine
    needs: tuple[tuple[str, Any, bool, int], ...] = (
        ("offload_optimizer", engine.offload_optimizer, engine.offload_optimizer == "cpu", 1),
        ("offload_optimizer", engine.offload_optimizer, engine.offload_optimizer == "nvme", 3),
        ("offload_parameters", engine.offload_parameters, engine.offload_parameters != "none", 3),
        ("hpz", engine.hpz, engine.hpz > 1, 3),
        ("config", engine.config, engine.config is not None, 1),
    )
    for key, value, asked, stage in needs:
        if asked and engine.zero < stage:
            what = f"engine.{key} = {show(value)} needs ZeRO stage {stage}{'' if stage == 3 else ' or higher'}"
            yield key, what, f"engine.zero = {engine.zero}", f"engine.zero = {stage}, or remove engine.{key}"


# --- the configuration -----------------------------------------------------------------------------------------------


def deepspeed_config(
    recipe: Recipe, *, precision: str, ranks: int, model_dtype: str, trained: bool = True
) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize` at engine.zero = 1, 2 or 3; every call gives a new one.

    precision: "fp32", "bf16" or "fp16"
    model_dtype: of the weights as they are loaded: "float32", "bfloat16" or "float16"
    trained: False for a frozen reference: the weights are shared out at stage 3, at a lower stage nothing is
    Raises RecipeError for what `check_zero` refuses and for a precision that does not fit the weights.
    """
    check_zero(recipe, ranks=ranks)
    theirs = read_json(recipe)
    if theirs is not None:
        _check_theirs(recipe, theirs, precision)
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # an absent key means clipping at 1.0
        "gradient_clipping": recipe.train.max_grad_norm if trained else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own optimizer on the CPU: nothing is compiled
        "zero_optimization": _stage(recipe, trained),
        "steps_per_print": _QUIET,
        "wall_clock_breakdown": False,
        **_precision(recipe, precision, model_dtype),
    }
    for name, value in additions(recipe).items():
        if trained or not name.startswith(_of_training(recipe)):
            _put(ours, name.split("."), value)
    return ours


def _of_training(recipe: Recipe) -> str:
    """The start of those keys that a frozen model has no use for."""
    return "zero_optimization.offload_optimizer" if recipe.engine.zero == 3 else "zero_optimization"


def _stage(recipe: Recipe, trained: bool) -> dict[str, Any]:
    engine = recipe.engine
    if not trained and engine.zero < 3:
        return {"stage": 0}
    block: dict[str, Any] = {
        "stage": engine.zero,
        "contiguous_gradients": True,
        "overlap_comm": engine.zero == 3,  # DeepSpeed's own choice; written down so that a release cannot change it
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
    }
    if engine.hpz > 1 and trained:  # DeepSpeed makes its groups for one model only
        block["zero_hpz_partition_size"] = engine.hpz
    if engine.offload_optimizer != "none" and trained:
        block["offload_optimizer"] = _offload(engine.offload_optimizer, engine.nvme_path)
    if engine.offload_parameters != "none":
        block["offload_param"] = _offload(engine.offload_parameters, engine.nvme_path)
    return block


def _offload(device: str, nvme_path: str | None) -> dict[str, Any]:
    where = {"nvme_path": str(Path(nvme_path).expanduser())} if device == "nvme" and nvme_path else {}
    return {"device": device, "pin_memory": True, **where}


_OFF: dict[str, Any] = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}  # else accelerate fills them in
# Sums over micro-batches in float32, so that the cut of a step into micro-batches changes nothing but rounding.
_SUMS: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}


def _precision(recipe: Recipe, precision: str, model_dtype: str) -> dict[str, Any]:
    """The blocks that make DeepSpeed compute as one process does: float32 weights under torch.autocast.

    An adapter's weights are float32 whatever its base is. Below stage 3 DeepSpeed holds only what trains; at stage 3 it
    holds the base too, and the base's type decides.
    """
    if model_dtype == AUTO:
        raise recipe.error(
            ("model", "dtype"),
            f'model.dtype = "auto" cannot run with engine.zero = {recipe.engine.zero}',
            why="DeepSpeed is told the type of the weights before they are loaded",
            fix='write the type, e.g. model.dtype = "float32"',
        )
    trains = "float32" if recipe.model.lora is not None and recipe.engine.zero < 3 else model_dtype
    builders = {
        ("fp32", "float32"): lambda: {**_OFF},
        ("fp32", "bfloat16"): _bfloat16,  # without autocast the weights' type is that of the computation
        ("bf16", "float32"): _autocast,
        ("bf16", "bfloat16"): _bfloat16,
        ("fp16", "float32"): _float16,
        ("fp16", "float16"): _float16,
    }
    if (precision, trains) not in builders:
        raise recipe.error(
            ("model", "dtype"),
            f"{trains} weights cannot train in {precision} with engine.zero = {recipe.engine.zero}",
            why="the one type does not hold the other's range",
            fix='model.dtype = "float32", which goes with every precision',
        )
    return builders[precision, trains]()


def _autocast() -> dict[str, Any]:
    """bf16 over float32 weights. No module is named as safe, so weights and gradients travel in float32."""
    return {**_OFF, "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}}


def _bfloat16() -> dict[str, Any]:
    return {"bf16": {"enabled": True}, "fp16": {"enabled": False}, **_SUMS}


def _float16() -> dict[str, Any]:
    """Half weights beside float32 ones. An overflow on one rank skips the step on all; the loss scale is torch's own.

    torch_autocast would not do: DeepSpeed clips before it takes the scale away, and a step that overflows leaves the
    scale as it is, so that every later step overflows too.
    """
    scale = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1}  # 0: dynamic
    return {"bf16": {"enabled": False}, "fp16": {"enabled": True, **scale}, **_SUMS}


# --- the user's JSON -------------------------------------------------------------------------------------------------


def additions(recipe: Recipe) -> dict[str, Any]:
    """What the user's JSON adds to the configuration: dotted DeepSpeed keys and values; {} where there is none.

    Keys that repeat what the recipe says and those that are "auto" are not among them. Raises RecipeError.
    """
    theirs = read_json(recipe)
    if theirs is None:
        return {}
    _check_theirs(recipe, theirs)
    claims = _claims(recipe)
    return {name: value for name, value in theirs.values.items() if name not in claims}


def additions_in_words(recipe: Recipe) -> list[str]:
    """A line for each key that the user's JSON adds, to be said before a run; one that looks misspelt says so."""
    lines = []
    for name, value in additions(recipe).items():
        top = name.partition(".")[0]
        known = "" if top in _KNOWN else f": unknown here, and DeepSpeed ignores unknown keys{nearest(top, _KNOWN)}"
        lines.append(f"DeepSpeed: {name} = {show(value)} ({recipe.engine.config}){known}")
    return lines


def read_json(recipe: Recipe) -> Theirs | None:
    """engine.config, relative to the recipe that names it or to the working directory. Raises RecipeError."""
    if recipe.engine.config is None:
        return None
    name = Path(recipe.engine.config).expanduser()
    folders = (recipe.tables.folder_of(("engine", "config")), Path())
    file = next((folder / name for folder in folders if (folder / name).is_file()), name)

    def fail(why: str, fix: str = "engine.config names a DeepSpeed JSON file") -> Any:
        return recipe.error(("engine", "config"), f"{file}: cannot be read", why=why, fix=fix)

    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
    except (OSError, ValueError) as error:
        raise fail(str(error)) from error
    if not isinstance(content, dict):
        raise fail("it holds no object", "DeepSpeed's configuration is an object: { ... }")
    return Theirs(file, dict(_leaves(content)))


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'"{next(n for n in names if names.count(n) > 1)}" is there twice')
    return table


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        elif value is not None and value != AUTO:
            yield f"{prefix}{name}", value


def _claims(recipe: Recipe, precision: str = AUTO) -> dict[str, Claim]:
    """Of each DeepSpeed key that the recipe decides, its value. precision: that of the machine, once it is known."""
    engine, train, zero = recipe.engine, recipe.train, "zero_optimization"
    by_tokens = "micro-batches are cut by tokens, and the engine accumulates them"
    claims = {
        **_precision_claims(recipe, engine.precision if engine.precision != AUTO else precision),
        "train_batch_size": Claim(("train", "batch_size"), train.batch_size),
        "train_micro_batch_size_per_gpu": Claim(("engine", "tokens_per_device"), 1, by_tokens),
        "gradient_accumulation_steps": Claim(("engine", "tokens_per_device"), 1, by_tokens),
        "managed_gradient_accumulation": Claim(("engine", "tokens_per_device"), True, by_tokens),
        "gradient_allreduce_op": Claim(("train", "batch_size"), "mean", "the engine counts on the mean over ranks"),
        "sequence_parallel_size": Claim(("engine", "zero"), 1, "the ranks share out examples, no sequences"),
        "gradient_clipping": Claim(("train", "max_grad_norm"), train.max_grad_norm),
        "zero_allow_untested_optimizer": Claim(("train", "optimizer"), True, "it is made outside of DeepSpeed"),
        f"{zero}.stage": Claim(("engine", "zero"), engine.zero),
        f"{zero}.cpu_offload": Claim(("engine", "offload_optimizer"), engine.offload_optimizer == "cpu"),
        f"{zero}.cpu_offload_param": Claim(("engine", "offload_parameters"), engine.offload_parameters == "cpu"),
        f"{zero}.zero_hpz_partition_size": Claim(("engine", "hpz"), engine.hpz),
    }
    for block, key in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        claims[f"{zero}.{block}.device"] = Claim(("engine", key), getattr(engine, key))
        claims[f"{zero}.{block}.nvme_path"] = Claim(("engine", "nvme_path"), engine.nvme_path)
    return claims


def _precision_claims(recipe: Recipe, precision: str) -> dict[str, Claim]:
    words = f"{precision} on this machine" if recipe.engine.precision == AUTO else ""
    values: dict[str, Any] = {
        "bf16.enabled": precision == "bf16",
        "bfloat16.enabled": precision == "bf16",
        "fp16.enabled": precision == "fp16",
        "torch_autocast.enabled": precision == "bf16",
        "torch_autocast.dtype": "bfloat16",
    }
    key: Key = ("engine", "precision")
    return {name: Claim(key, _ANY if precision == AUTO else value, words) for name, value in values.items()}


# Blocks that would take over what the recipe decides, and the key that decides it.
_REFUSED: dict[str, Key] = {
    "optimizer": ("train", "optimizer"),
    "scheduler": ("train", "lr_scheduler"),
    "amp": ("engine", "precision"),
    "compression_training": ("engine", "precision"),
    "curriculum_learning": ("data", "train"),
    "data_efficiency": ("data", "train"),
    "elasticity": ("train", "batch_size"),
    "pipeline": ("engine", "zero"),
    "tensor_parallel": ("engine", "zero"),
    "expert_parallel": ("engine", "zero"),
    "zero_optimization.zenflow": ("engine", "zero"),
}


def _check_theirs(recipe: Recipe, theirs: Theirs, precision: str = AUTO) -> None:
    """Raises one RecipeError for all contradictions, each with both values and both places."""
    claims, wrong = _claims(recipe, precision), []
    for name, value in theirs.values.items():
        claim = claims.get(name) or _refusal(theirs, name)
        if claim is not None and claim.value is not _ANY and claim.value != value:
            wrong.append(f"{name} = {show(value)} ({theirs.file}), but {claim.says(recipe)}")
        if name in _BLOCKS:
            wrong.append(f"{name} = {show(value)} ({theirs.file}), but it is an object: {{ ... }}")
    if wrong:
        raise recipe.error(
            ("engine", "config"),
            "\n  ".join([f"{theirs.file} contradicts the recipe:", *wrong]),
            why="what a run depends on stands in one place, the recipe",
            fix='remove these keys from the JSON file, or write "auto" for their values',
        )


def _refusal(theirs: Theirs, name: str) -> Claim | None:
    """The claim that a key of a refused block runs into; a block that is switched off runs into none."""
    block = next((b for b in _REFUSED if name == b or name.startswith(f"{b}.")), None)
    if block is None or False in (theirs.values.get(f"{block}.enabled"), theirs.values[name]):
        return None
    return Claim(_REFUSED[block], _NEVER, "that decides it")


_ANY = object()  # it is not known yet what the recipe says
_NEVER = object()  # equal to no value of a JSON file
_BLOCKS = ("zero_optimization", "fp16", "bf16", "torch_autocast", "data_types", "aio", "compile")


def _recipe_value(recipe: Recipe, key: Key) -> Any:
    value: Any = recipe
    for part in key:
        value = getattr(value, str(part))
    return value


def _put(table: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        table = table.setdefault(part, {})
    table[path[-1]] = value


# Top-level keys of DeepSpeed, for telling a misspelt one.
_KNOWN = (
    "activation_checkpointing", "aio", "autotuning", "bf16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_types", "dataloader_drop_last", "disable_allgather",
    "disable_python_gc", "dump_state", "flops_profiler", "fp16", "gradient_clipping", "gradient_predivide_factor",
    "hybrid_engine", "log_level", "memory_breakdown", "monitor", "prescale_gradients", "sparse_gradients",
    "steps_per_print", "tensorboard", "timers", "torch_autocast", "use_data_before_expert_parallelism",
    "vocabulary_size", "wall_clock_breakdown", "wandb", "weight_quantization", "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)  # fmt: skip


# --- what is compiled ------------------------------------------------------------------------------------------------


def compiled_ops(config: Mapping[str, Any]) -> list[str]:
    """The DeepSpeed ops that a configuration compiles when it starts, sorted; none by default.

    A compiler has to be there for them and takes a minute or two each, the first time. NEEDLESS_OPS are not counted:
    they are to be switched off.
    """
    zero = config.get("zero_optimization", {})
    offload = [zero.get(name, {}) for name in ("offload_optimizer", "offload_param")]
    to = [block.get("device", "none") for block in offload]
    quantised = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
    own_adam = to[0] != "none" and config.get("zero_force_ds_cpu_optimizer", True)
    wanted = {
        "async_io": "nvme" in to,
        "gds": "nvme" in to and config.get("aio", {}).get("use_gds", False),
        "cpu_adam": own_adam or offload[0].get("super_offload", False),
        "quantizer": any(zero.get(name, False) for name in quantised),
        "dc": config.get("compile", {}).get("deepcompile", False),
    }
    return sorted(name for name, needed in wanted.items() if needed)
