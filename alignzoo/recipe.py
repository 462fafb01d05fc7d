"""A recipe: what `alignzoo run` reads, from TOML to typed sections (sections.py). It imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from alignzoo.errors import RecipeError
from alignzoo.recipe_file import Tables, read_tables, tables_from
from alignzoo.schema import Path as Key
from alignzoo.schema import Problem, Raw, build, convert, nearest, parse_raw, show
from alignzoo.schema import Spec as _Spec
from alignzoo.sections import (
    OPTIONAL,
    SECTIONS,
    VLLM,
    CallbackKeys,
    Checkpoint,
    Data,
    Engine,
    Eval,
    Log,
    LoRA,
    Model,
    Other,
    Output,
    Reference,
    RewardKeys,
    Rollout,
    Samples,
    Source,
    Train,
    Watch,
)

__all__ = [
    "KNOWN", "OPTIONAL", "SECTIONS", "VLLM", "CallbackChoice", "CallbackKeys", "Checkpoint", "Data", "Engine", "Eval",
    "LoRA", "Log", "LossChoice", "Model", "Other", "Output", "Recipe", "Reference", "RewardChoice", "RewardKeys",
    "Rollout", "Samples", "Source", "Train", "Watch", "load_recipe", "problems_error", "to_table",
]  # fmt: skip


@dataclass(frozen=True)
class LossChoice:
    """The [loss] table, or one of several [[loss]]: its settings are read when the plugin is known."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    path: Key = field(default=("loss",), compare=False)
    weight: float = 1.0


@dataclass(frozen=True)
class RewardChoice(RewardKeys):
    """A table of [[rewards]]: the settings of the reward itself are read when the plugin is known."""

    settings: dict[str, Any] = field(default_factory=dict)
    path: Key = field(default=("rewards",), compare=False)


@dataclass(frozen=True)
class CallbackChoice(CallbackKeys):
    """A table of [[callbacks]]; as RewardChoice."""

    settings: dict[str, Any] = field(default_factory=dict)
    path: Key = field(default=("callbacks",), compare=False)


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. `losses` holds one loss; `where(key)` tells file and line."""

    losses: tuple[LossChoice, ...]
    model: Model
    data: Data
    train: Train
    reference: Reference = Reference()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    watch: Watch = Watch()
    samples: Samples = Samples()
    rollout: Rollout | None = None
    log: Log = Log()
    output: Output = Output()
    rewards: tuple[RewardChoice, ...] = ()
    callbacks: tuple[CallbackChoice, ...] = ()
    tables: Tables = field(default_factory=Tables, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.tables.file.stem if self.tables.file else "recipe"

    def error(self, key: Key, what: str, *, why: str = "", fix: str = "") -> RecipeError:
        """An error that names the place of a key."""
        return RecipeError(f"{self.tables.locate(key)}: {what}", why=why, fix=fix)


Choice = TypeVar("Choice", RewardChoice, CallbackChoice)
KNOWN = (*SECTIONS, "loss", "rewards", "callbacks")


def load_recipe(path: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """A recipe from a TOML file, or from a dictionary of its sections.

    overrides: "key=value" strings as for --set, or {"train.seed": 3}. Raises RecipeError that lists all that is wrong.
    """
    tables = tables_from(path) if isinstance(path, Mapping) else read_tables(Path(path))
    tables.override(overrides)
    problems = list(tables.problems)
    sections = _build_sections(tables.content, problems)
    losses = _loss_choices(tables.content.get("loss"), problems)
    rewards = _choices("rewards", RewardChoice, RewardKeys, tables.content, problems)
    callbacks = _choices("callbacks", CallbackChoice, CallbackKeys, tables.content, problems)
    if problems:
        raise problems_error(tables, problems)
    recipe = _resolve_paths(Recipe(losses=losses, rewards=rewards, callbacks=callbacks, tables=tables, **sections))
    problems = list(_sense_problems(recipe))
    if problems:
        raise problems_error(tables, problems)
    return recipe


def problems_error(tables: Tables, problems: Sequence[Problem]) -> RecipeError:
    """One error for all problems, each with its place."""
    lines = [f"{tables.locate(p.path)}: [{p.key}] {p.message}" for p in problems]
    title = "the recipe has a mistake" if len(lines) == 1 else f"the recipe has {len(lines)} mistakes"
    return RecipeError("\n  ".join([title + ":", *lines]), fix="every key and its range: docs/recipes.md")


def _build_sections(content: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    problems.extend(Problem((key,), _unknown(key, content[key])) for key in content if key not in KNOWN)
    built: dict[str, Any] = {}
    for name, cls in SECTIONS.items():
        if name in OPTIONAL and name not in content:
            built[name] = None
            continue
        table = content.get(name, {})
        if isinstance(table, Raw):
            table = parse_raw(table, cls)
        if isinstance(table, Mapping):
            built[name] = build(cls, table, (name,), problems)
        else:
            problems.append(Problem((name,), f'"{name}" is a section: write [{name}]'))
    return built


def _unknown(key: str, value: Any) -> str:
    """What is wrong with a name at the top of a recipe, and which name may be meant."""
    if key == "extends":
        return "extends is read in a recipe file only: write it there"
    homes = [name for name, cls in SECTIONS.items() if key in {f.name for f in dataclasses.fields(cls)}]
    if homes and not isinstance(value, Mapping):
        meant = " or ".join(f"{name}.{key}" for name in homes)
        return f'"{key}" stands before any section (did you mean {meant}?)'
    kind = "section" if isinstance(value, Mapping) else "key"
    return f'unknown {kind} "{key}"{nearest(key, [*KNOWN, "extends"])}'


def _loss_choices(tables: Any, problems: list[Problem]) -> tuple[LossChoice, ...]:
    if isinstance(tables, Raw):
        tables = parse_raw(tables, dict)
    listed = tables if isinstance(tables, list) else [tables]
    if not listed:
        problems.append(Problem(("loss",), 'an empty list: add [[loss]] with name = "..."'))
    choices = []
    for i, table in enumerate(listed):
        path: Key = ("loss", i) if isinstance(tables, list) else ("loss",)
        if isinstance(table, Raw):
            table = parse_raw(table, dict)
        if table is not None and not isinstance(table, Mapping):
            problems.append(Problem(path, f'loss = {show(table)} is no table: write [loss] with name = "..."'))
        elif table is None or "name" not in table:
            problems.append(Problem(path, 'a [loss] section with a "name" is missing; `alignzoo losses` lists them'))
        else:
            name = convert(table["name"], str, (*path, "name"), problems, _Spec(""))
            weight = convert(table.get("weight", 1.0), float, (*path, "weight"), problems, _Spec(""))
            if "weight" in table and len(listed) == 1:
                problems.append(Problem((*path, "weight"), "there is one loss: weights are for several [[loss]]"))
            settings = {k: v for k, v in table.items() if k not in ("name", "weight")}
            choices.append(LossChoice(str(name), settings, path, weight))
    return tuple(choices)


def _choices(
    name: str, made: type[Choice], keys: type[Any], content: Mapping[str, Any], problems: list[Problem]
) -> tuple[Choice, ...]:
    """The tables of [[rewards]] or [[callbacks]]. keys: of the table itself; all others are settings."""
    tables = content.get(name, [])
    if isinstance(tables, Raw):
        tables = parse_raw(tables, dict)
    if not isinstance(tables, list):
        problems.append(Problem((name,), f'"{name}" is a list of tables: write [[{name}]]'))
        return ()
    choices, own = [], {f.name for f in dataclasses.fields(keys)}
    for i, table in enumerate(tables):
        path: Key = (name, i)
        table = parse_raw(table, dict) if isinstance(table, Raw) else table
        if not isinstance(table, Mapping):
            problems.append(Problem(path, f'{show(table)} is no table: write [[{name}]] with name = "..."'))
            continue
        found = build(keys, {k: v for k, v in table.items() if k in own}, path, problems)
        if found is not None:
            settings = {k: v for k, v in table.items() if k not in own}
            choices.append(made(**vars(found), settings=settings, path=path))
    return tuple(choices)


def _resolve_paths(recipe: Recipe) -> Recipe:
    """Relative data paths against the folder of the file that wrote them, else against the working directory.

    A name that is no file in either is left for the hub.
    """

    def resolve(value: str, key: Key) -> str:
        for folder in (recipe.tables.folder_of(key), Path()):
            with suppress(OSError, RuntimeError, ValueError):  # a name too long, ~nobody, a null byte: no file
                local = folder / Path(value).expanduser()
                if local.exists():
                    return str(local.resolve())
        return value

    def sources(key: Key, value: Any) -> tuple[Source, ...] | None:
        if value is None:
            return None
        if isinstance(value, str):
            return (Source(path=resolve(value, key), format=data.format),)
        return tuple(
            replace(s, path=resolve(s.path, (*key, i, "path")), format=data.format if s.format == "auto" else s.format)
            for i, s in enumerate(value)
        )

    data = recipe.data
    train, held_out = (sources(("data", key), getattr(data, key)) for key in ("train", "eval"))
    template = data.chat_template
    if template not in ("auto", "none"):
        template = resolve(template, ("data", "chat_template"))
    return replace(recipe, data=replace(data, train=train or (), eval=held_out, chat_template=template))


def _sense_problems(recipe: Recipe) -> Iterator[Problem]:
    """What no single key can tell."""
    data, model, train = recipe.data, recipe.model, recipe.train
    if data.eval is not None and data.eval_fraction > 0:
        yield Problem(("data", "eval_fraction"), "data.eval is given too: keep one of them")
    for key in ("train", "eval"):
        if getattr(data, key) == ():
            yield Problem(("data", key), "an empty list: name at least one file")
    if model.quantization and model.lora is None:
        yield Problem(("model", "quantization"), "quantised weights cannot be trained: add [model.lora]")
    if recipe.eval.patience is not None and recipe.eval.best_metric is None:
        yield Problem(("eval", "patience"), "patience for what? name eval.best_metric")
    if recipe.eval.patience is not None and recipe.eval.every_steps is None:
        yield Problem(("eval", "patience"), "there is one evaluation only: set eval.every_steps")
    if recipe.engine.prefix_sharing == "on" and recipe.engine.packing == "off":
        yield Problem(("engine", "prefix_sharing"), "a prompt is shared in a packed row only: packing is off")
    if recipe.reference.sync_every_steps is not None:
        if recipe.reference.mode == "cache":
            yield Problem(("reference", "mode"), "sync_every_steps moves the reference: nothing of it can be kept")
        if recipe.model.lora is not None:
            yield Problem(("reference", "sync_every_steps"), "needs whole weights to move: remove [model.lora]")
        if recipe.reference.path is not None:
            yield Problem(("reference", "sync_every_steps"), "moves a copy of the start model: remove reference.path")
    if recipe.rollout is not None:
        yield from _rollout_problems(recipe, recipe.rollout)
    if recipe.reference.revision is not None and recipe.reference.path is None:
        yield Problem(("reference", "revision"), "there is no reference.path that it could be a revision of")
    if train.warmup_steps is not None and train.max_steps is not None and train.warmup_steps > train.max_steps:
        yield Problem(("train", "warmup_steps"), f"{train.warmup_steps} is more than max_steps = {train.max_steps}")


def _rollout_problems(recipe: Recipe, rollout: Rollout) -> Iterator[Problem]:
    if recipe.reference.mode == "cache":
        yield Problem(("reference", "mode"), "completions are sampled during the run: nothing of them can be kept")
    if recipe.data.max_length <= rollout.max_new_tokens:
        yield Problem(
            ("rollout", "max_new_tokens"),
            f"{rollout.max_new_tokens} leaves no room for a prompt in data.max_length = {recipe.data.max_length}",
        )
    if rollout.sampler != "vllm" and rollout.vllm != VLLM():
        yield Problem(("rollout", "vllm"), 'without effect: rollout.sampler is not "vllm"')
    for i, other in enumerate(rollout.others):
        yield from _other_problems(("rollout", "others", i), other, rollout)
    for key in ("pairs_per_prompt", "min_gap", "threshold") if rollout.directed else ():
        if getattr(rollout, key) != getattr(Rollout, key):
            yield Problem(("rollout", key), "without effect: of rollout.others it is known which completion is better")


def _other_problems(path: Key, other: Other, rollout: Rollout) -> Iterator[Problem]:
    if other.remote and other.model is None:
        yield Problem((*path, "model"), "an address needs the model's name there")
    for key in ("model", "api_key_env") if not other.remote else ():
        if getattr(other, key) is not None:
            yield Problem((*path, key), f"that is of an address, and {show(other.source)} is none")
    if other.role == "candidate" and rollout.directed:
        yield Problem((*path, "role"), "another of rollout.others is chosen or a revision: no reward decides then")
    if other.role != "candidate" and other.completions > rollout.completions:
        more = f"{other.completions} is more than rollout.completions = {rollout.completions}"
        yield Problem((*path, "completions"), f"{more}: each stands against one of the policy's")
    if other.role != "revision" and other.instruction != Other.instruction:
        yield Problem((*path, "instruction"), 'without effect: role is not "revision"')


def to_table(
    recipe: Recipe,
    loss_settings: Sequence[Mapping[str, Any]] = (),
    reward_settings: Sequence[Mapping[str, Any]] = (),
    callback_settings: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The resolved recipe as a table that reads back as the same recipe; None is left out, as TOML has no null."""
    of_losses = loss_settings or [c.settings for c in recipe.losses]
    losses = [
        {"name": choice.name, "weight": choice.weight, **{k: v for k, v in settings.items() if v is not None}}
        for choice, settings in zip(recipe.losses, of_losses, strict=True)
    ]
    if len(losses) == 1:
        del losses[0]["weight"]
    table: dict[str, Any] = {"loss": losses if len(losses) > 1 else losses[0]}
    for name in SECTIONS:
        if (section := getattr(recipe, name)) is not None:
            table[name] = _plain(section)
    listed: tuple[tuple[str, type[Any], Any, Any], ...] = (
        ("rewards", RewardKeys, recipe.rewards, reward_settings),
        ("callbacks", CallbackKeys, recipe.callbacks, callback_settings),
    )
    for name, keys, choices, settings in listed:
        resolved, own = settings or [choice.settings for choice in choices], [f.name for f in dataclasses.fields(keys)]
        tables = [
            {**{key: getattr(choice, key) for key in own}, **{k: v for k, v in of_plugin.items() if v is not None}}
            for choice, of_plugin in zip(choices, resolved, strict=True)
        ]
        if tables:
            table[name] = tables
    return table


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(v) for f in dataclasses.fields(value) if (v := getattr(value, f.name)) is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
