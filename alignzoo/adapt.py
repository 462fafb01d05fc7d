"""Settings of a loss that move while it trains: by a schedule over the steps, or by a metric. It imports no torch.

    beta = {schedule = "linear", from = 0.5, to = 0.1}
    beta = {adapt = "kl/chosen", high = 5, low = 0.1, up = 1.2, down = 0.8}

A schedule is a function of the step. A controller multiplies its setting after each record that has its metric, by what
is written there, which is the same on all ranks; so nothing depends on them, and a checkpoint keeps one number.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from alignzoo.api import Loss
from alignzoo.errors import PluginError
from alignzoo.recipe import LossChoice, Recipe
from alignzoo.records import Record, number
from alignzoo.schema import Path as Key
from alignzoo.schema import Problem, Raw, build, parse_raw, setting, show, spec_of, type_hints

REQUIRED: Any = MISSING
OF_THE_MACHINE = ("tokens_per_second", "memory", "eval_runtime", "seconds")


@dataclass(frozen=True)
class Schedule:
    """A setting that goes from one value at the first step to another at the last."""

    schedule: Literal["linear", "cosine"] = setting(REQUIRED, "the way between the two values")
    from_: float = setting(REQUIRED, "the value at the first step")  # `from` is no name in Python
    to: float = setting(REQUIRED, "the value at the last step")

    @property
    def start(self) -> float:
        return self.from_

    def at(self, step: int, total: int) -> float:
        """The value at a step, 1 to total."""
        part = (step - 1) / max(1, total - 1)
        if self.schedule == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        return self.from_ + part * (self.to - self.from_)

    @property
    def ends(self) -> tuple[float, ...]:
        return self.from_, self.to

    def __str__(self) -> str:
        return f"from {self.from_:g} to {self.to:g} over all steps, {self.schedule}"


@dataclass(frozen=True)
class Controller:
    """A setting that grows while a metric is above a band, and shrinks while it is below."""

    adapt: str = setting(REQUIRED, "a metric of the records, e.g. kl/chosen, or eval_kl/chosen")
    high: float = setting(REQUIRED, "above it the setting is multiplied by `up`")
    low: float = setting(REQUIRED, "below it by `down`")
    up: float = setting(1.2, "factor above the band", gt=0)
    down: float = setting(0.8, "factor below the band", gt=0)
    start: float | None = setting(None, "the first value; the setting's default if not given")
    min: float | None = setting(None, "it does not go below; the setting's own bound if not given")
    max: float | None = setting(None, "nor above")

    def moved(self, value: float, metric: float) -> float:
        """The next value after a record with this metric."""
        factor = self.up if metric > self.high else self.down if metric < self.low else 1.0
        lowest, highest = (-math.inf if self.min is None else self.min), (math.inf if self.max is None else self.max)
        return min(max(value * factor, lowest), highest)

    @property
    def ends(self) -> tuple[float, ...]:
        return tuple(value for value in (self.start, self.min, self.max) if value is not None)

    def __str__(self) -> str:
        start = "" if self.start is None else f"from {self.start:g}, "
        return f"{start}times {self.up:g} where {self.adapt} is above {self.high:g}, {self.down:g} below {self.low:g}"


Moving = Schedule | Controller


def split(
    settings: Mapping[str, Any], cls: type, path: Key, problems: list[Problem]
) -> tuple[dict[str, Any], dict[str, Moving]]:
    """The table of a loss's settings with numbers in the place of those that move, and these by name.

    cls: the loss's Settings
    """
    hints, fields = type_hints(cls), {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    plain, moving = dict(settings), dict[str, Moving]()
    for name, value in settings.items():
        table, here = _table(value), (*path, name)
        if name not in fields or table is None:
            continue
        if hints[name] not in (float, float | None):
            problems.append(Problem(here, f"{name} = {show(dict(table))}: only a setting that is a number can move"))
            del plain[name]
            continue
        default = fields[name].default
        found = _read(table, here, default if isinstance(default, float) else None, problems)
        if found is not None:
            moving[name] = found
            plain[name] = found.start
        else:
            del plain[name]
    return plain, moving


def _table(value: Any) -> Mapping[str, Any] | None:
    """The table that says how a setting moves, None where it is another value."""
    value = parse_raw(value, dict) if isinstance(value, Raw) else value
    return value if isinstance(value, Mapping) and value.keys() & {"adapt", "schedule"} else None


def _read(table: Mapping[str, Any], path: Key, default: float | None, problems: list[Problem]) -> Moving | None:
    if "adapt" in table:
        found = build(Controller, table, path, problems)
        if found is None:
            return None
        wrong = list(_controller_faults(found, default))
        problems += [Problem((*path, key), words) for key, words in wrong]
        return None if wrong else found if found.start is not None else dataclasses.replace(found, start=default)
    own: list[Problem] = []
    renamed = {"from_" if key == "from" else key: value for key, value in table.items()}
    schedule = build(Schedule, renamed, path, own)
    for problem in own:  # in the recipe's words
        key = str(problem.path[-1]).replace("from_", "from")
        problems.append(Problem((*path, key), problem.message.replace("from_", "from")))
    return schedule


def _controller_faults(found: Controller, default: float | None) -> Iterator[tuple[str, str]]:
    start = default if found.start is None else found.start
    if found.low >= found.high:
        yield "low", f"low = {found.low:g} is not below high = {found.high:g}"
    if start is None:
        yield "adapt", "the setting has no default to begin with: give start"
    elif start == 0:
        yield "start", "it begins with 0, and a factor never moves that"
    elif (found.min is not None and start < found.min) or (found.max is not None and start > found.max):
        yield "start", f"it begins with {start:g}, which is not between min and max"
    if any(word in found.adapt for word in OF_THE_MACHINE):
        yield "adapt", f'"{found.adapt}" depends on the machine, not on what is learned'


def check_moving(loss: Loss, moving: Mapping[str, Moving], path: Key) -> list[Problem]:
    """What is wrong with where the settings may go: out of bounds, or another need of the loss."""
    problems = []
    for name, how in moving.items():
        for value in how.ends:
            try:
                other = with_settings(loss, {name: value})
            except (PluginError, ValueError) as error:
                problems.append(Problem((*path, name), f"{name} = {value:g} is where it may go: {error}"))
                continue
            for need in ("needs_reference", "needs_mismatched", "prepare_pass"):
                if getattr(other, need) != getattr(loss, need):
                    what = (
                        f"{need} is {getattr(loss, need)} at first and {getattr(other, need)} with {name} = {value:g}"
                    )
                    problems.append(Problem((*path, name), f"{what}: it cannot change during a run"))
    return problems


def with_settings(loss: Loss, values: Mapping[str, float]) -> Loss:
    """The loss with other values of some settings. Raises PluginError where they are out of bounds."""
    return type(loss)(dataclasses.replace(loss.settings, **values))


def moving_settings(recipe: Recipe, loss: Loss) -> dict[str, Moving]:
    """The settings of the loss that move, of a recipe that was checked: of several losses none."""
    if len(recipe.losses) > 1:
        return {}
    choice: LossChoice = recipe.losses[0]
    return split(choice.settings, type(loss).Settings, choice.path, [])[1]


def as_tables(moving: Mapping[str, Moving]) -> dict[str, dict[str, Any]]:
    """As a recipe writes them."""
    return {
        name: {"from" if key == "from_" else key: value for key, value in vars(how).items() if value is not None}
        for name, how in moving.items()
    }


class Steering:
    """The loss of each step, where settings of it move."""

    def __init__(self, recipe: Recipe, loss: Loss) -> None:
        self.recipe, self.loss = recipe, loss
        self.moving = moving_settings(recipe, loss)
        self.values: dict[str, float] = {name: getattr(loss.settings, name) for name in self.moving}
        self._met: set[str] = set()  # metrics that were seen, without eval_

    def at(self, step: int, total: int) -> Loss:
        """The loss of a step, 1 to total."""
        for name, how in self.moving.items():
            if isinstance(how, Schedule):
                self.values[name] = how.at(step, total)
        if any(getattr(self.loss.settings, name) != value for name, value in self.values.items()):
            self.loss = with_settings(self.loss, self.values)
        return self.loss

    @property
    def line(self) -> dict[str, float]:
        """For a record: the values of its last step."""
        return {f"loss/{name}": getattr(self.loss.settings, name) for name in self.moving}

    def see(self, record: Record) -> None:
        """Moves what follows a metric of this record. Raises RecipeError where there is no such metric."""
        self._met |= {key.removeprefix("eval_") for key in record}
        for name, how in self.moving.items():
            if not isinstance(how, Controller):
                continue
            metric = number(record.get(how.adapt))
            if metric is not None:
                self.values[name] = self._allowed(name, how.moved(self.values[name], metric))
            elif "loss" in record and not self._met & set(_either_side(how.adapt)):
                raise self.recipe.error(
                    (*self.recipe.losses[0].path, name, "adapt"),
                    f'loss.{name} follows "{how.adapt}", and there is no such metric',
                    fix="one of " + ", ".join(sorted(key for key in record if number(record[key]) is not None)),
                )

    def _allowed(self, name: str, value: float) -> float:
        """The value, or the one before it where the setting's own bounds end between them."""
        spec = spec_of(next(f for f in dataclasses.fields(self.loss.settings) if f.name == name))
        return value if math.isfinite(value) and spec.allows(value) else self.values[name]

    @property
    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return dict(self.values)

    def load_state(self, state: Mapping[str, float]) -> None:
        self.values |= state


def _either_side(name: str) -> Sequence[str]:
    """A metric, and that of the other side: of labelled rows, a record may lack one of the two."""
    plain = name.removeprefix("eval_")
    return plain, plain.replace("chosen", "rejected"), plain.replace("rejected", "chosen")
