"""Rewards at work: found by a recipe, started, called with a time limit, their failures counted, their values summed.

A reward that raises, hangs or says so failed: its values are None, counted, and the first message is told. Above
`max_failures` the run stops. A wrong number of values, and a value that is no finite number, are the plugin's errors
and stop the run at once; so does an AlignzooError that a reward raises. It imports no torch.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from alignzoo.api import Reward, Values
from alignzoo.choices import make_chosen
from alignzoo.declared_rewards import is_async, takes
from alignzoo.errors import AlignzooError, PluginError, RunError
from alignzoo.plugin_kinds import RewardInfo
from alignzoo.plugins import Registry
from alignzoo.progress import Say
from alignzoo.recipe import Recipe, RewardChoice
from alignzoo.schema import nearest, show

WINDOW = 20  # calls that the share of failures is taken over
GRACE = 1.0  # seconds that an async reward gets to end after its time, before its thread is left behind


@dataclass(frozen=True)
class Scored:
    """What the rewards say of N completions."""

    total: list[float | None]  # N: the weighted sum of those that gave a value; None where none did
    each: dict[str, list[float | None]]  # by the reward's label, N, not weighted
    failed: dict[str, int]  # by label: values of this call that are None because the reward failed
    messages: dict[str, str]  # by label: the first of these failures


@dataclass
class Failures:
    """How often something failed of late, and since the run began."""

    failed: int = 0
    recent: list[list[int]] = field(default_factory=list)  # [values, failed] of each of the last WINDOW calls

    def count(self, values: int, failed: int) -> None:
        self.failed += failed
        self.recent = [*self.recent, [values, failed]][-WINDOW:]

    def stop_above(self, most: float, who: str, what: str, message: str, fix: str) -> None:
        """Raises RunError above this share; calls that were not made yet count as good. message: the last failure."""
        values, failed = (sum(column) for column in zip(*self.recent, strict=True)) if self.recent else (0, 0)
        if values and failed / values * len(self.recent) / WINDOW > most:
            raise RunError(
                f"{who} fails too often: {failed} of {values} {what} in its last {len(self.recent)} calls",
                why=f"the last failure: {message}", fix=fix,
            )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"failed": self.failed, "recent": self.recent}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """None: begins at none."""
        self.failed, self.recent = (state["failed"], [list(pair) for pair in state["recent"]]) if state else (0, [])


@dataclass
class _Entry:
    """One table of [[rewards]], its reward, and what has become of its calls."""

    label: str  # its name; of several with one name, the later ones are name_2, name_3
    choice: RewardChoice
    info: RewardInfo
    reward: Reward
    failures: Failures = field(default_factory=Failures)

    def __str__(self) -> str:
        return f'reward "{self.label}"'


class Rewards:
    """The rewards of a recipe. Made by `make_rewards`; `start` before the first `score`."""

    def __init__(self, recipe: Recipe, entries: Sequence[_Entry], say: Say) -> None:
        self._recipe, self._entries, self._say = recipe, tuple(entries), say
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def labels(self) -> list[str]:
        """The names under which `score` tells the values."""
        return [entry.label for entry in self._entries]

    @property
    def infos(self) -> list[RewardInfo]:
        """Who brought each."""
        return [entry.info for entry in self._entries]

    @property
    def settings(self) -> list[dict[str, Any]]:
        """The settings of each, as recipe.to_table takes them."""
        return [dataclasses.asdict(entry.reward.settings) for entry in self._entries]

    def describe(self) -> list[str]:
        """A line for each: 'exact (alignzoo 0.1.0), weight 1: answer = "answer"'."""
        lines = []
        for e in self._entries:
            settings = ", ".join(f"{k} = {show(v)}" for k, v in dataclasses.asdict(e.reward.settings).items())
            owner = f"{e.info.distribution} {e.info.version}".strip()
            lines.append(f"{e.label} ({owner}), weight {e.choice.weight:g}: {settings or 'no settings'}")
        return lines

    def check_columns(self, there: Sequence[str]) -> None:
        """Raises RecipeError for a reward that reads a column which the rows have not."""
        for entry in self._entries:
            for column in entry.reward.columns:
                if column not in there:
                    raise self._recipe.error(
                        entry.choice.path,
                        f'{entry} reads the column "{column}", which the rows have not{nearest(column, there)}',
                        why="their columns are " + (", ".join(there) or "none beside the prompt"),
                        fix="name the right column in the settings of the reward, or add it to the data",
                    )

    def start(self, device: Any) -> None:
        """Loads what the rewards need, whole on every rank: call it outside of sharding.sharded_loading.

        Raises AlignzooError, PluginError where a reward fails in any other way.
        """
        for entry in self._entries:
            try:
                line = entry.reward.start(device)
            except AlignzooError:
                raise
            except Exception as error:
                raise PluginError(f"{entry} cannot start: {_words(error)}", why=f"from {entry.info.owner}") from error
            if line:
                self._say(f"{entry}: {line}")

    def score(self, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> Scored:
        """The rewards of N completions. prompts: N strings or lists of messages; columns: N values by name.

        Async rewards run at the same time, all others one after another meanwhile. Raises PluginError where a reward
        breaks its contract, RecipeError for a column that is missing, RunError above `max_failures`.
        """
        sizes = {"prompts": len(prompts)} | {name: len(values) for name, values in columns.items()}
        wrong = [f"{name} has {size}" for name, size in sizes.items() if size != len(completions)]
        if wrong:
            raise ValueError(f"{len(completions)} completions, and {', '.join(wrong)}")
        self.check_columns(list(columns))
        calls = [self._call(entry, prompts, completions, columns) for entry in self._entries]
        for call in (call for call in calls if is_async(call.entry.reward)):
            call.begin()
        for call in (call for call in calls if not is_async(call.entry.reward)):
            call.begin()
            call.wait()
        read = {call.entry.label: _values(call.entry, call.wait(), len(completions)) for call in calls}
        return self._sum_up(read, len(completions))

    def state(self) -> dict[str, Any]:
        """The counts of failures, as plain JSON."""
        return {e.label: e.failures.state() for e in self._entries}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on counting from what `state` gave; rewards that were not there begin at none."""
        for entry in self._entries:
            entry.failures.load_state(state.get(entry.label))

    def _call(
        self, entry: _Entry, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> _Call:
        given, hidden = takes(entry.reward, list(columns))
        if hidden:
            self._tell(f"{entry} does not get the columns {', '.join(hidden)}: these names mean something else to it")
        return _Call(entry, list(prompts), list(completions), {name: list(columns[name]) for name in given})

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._say(f"WARNING: {line}")

    def _sum_up(self, read: Mapping[str, Sequence[float | Exception | None]], n: int) -> Scored:
        total: list[float | None] = [None] * n
        each, failed, messages = {}, {}, {}
        for entry in self._entries:
            values = read[entry.label]
            errors = [value for value in values if isinstance(value, Exception)]
            each[entry.label] = [None if isinstance(value, Exception) else value for value in values]
            failed[entry.label] = len(errors)
            if errors:
                messages[entry.label] = _words(errors[0])
                if entry.failures.failed == 0 or isinstance(errors[0], _LeftBehindError):
                    self._say(f"WARNING: {entry}: {len(errors)} of {n} values failed: {_words(errors[0])}")
            entry.failures.count(n, len(errors))
            for i, value in enumerate(each[entry.label]):
                if value is not None and entry.choice.weight != 0:
                    total[i] = (total[i] or 0.0) + entry.choice.weight * value
        for entry in self._entries:
            limit, last = entry.choice.max_failures, messages.get(entry.label, "see the lines above")
            fix = f"mend what it depends on, or raise max_failures = {limit:g} of [[rewards]]"
            entry.failures.stop_above(limit, str(entry), "values", last, fix)
        return Scored(total, each, failed, messages)


def make_rewards(recipe: Recipe, registry: Registry, say: Say = print) -> Rewards:
    """The rewards of a recipe with their settings. Raises RecipeError that names the place; loads nothing."""
    chosen = make_chosen(recipe, registry, RewardInfo, recipe.rewards)
    entries = [_Entry(one.label, one.choice, one.info, one.thing) for one in chosen]
    return Rewards(recipe, entries, say)


class _LeftBehindError(TimeoutError):
    """A call that did not come back."""


class _Call:
    """One call of one reward, in a thread of its own: one that hangs cannot be ended, and is left behind."""

    def __init__(
        self, entry: _Entry, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]
    ) -> None:
        self.entry = entry
        self._arguments = (prompts, completions)
        self._columns = columns
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outcome: Any = None
        self._waited = False

    def begin(self) -> None:
        threading.Thread(target=self._work, daemon=True, name=f"reward-{self.entry.label}").start()

    def wait(self) -> Any:
        """What the reward returned, or the exception."""
        if not self._waited:
            self._waited = True
            limit = self.entry.choice.timeout
            try:
                self._outcome = self._done.get(timeout=limit + (GRACE if is_async(self.entry.reward) else 0))
            except queue.Empty:
                self._outcome = _LeftBehindError(f"no answer within {limit:g} s; its thread was left behind")
        return self._outcome

    def _work(self) -> None:
        limit = self.entry.choice.timeout
        try:
            returned: Any = self.entry.reward(*self._arguments, **self._columns)
            self._done.put(asyncio.run(_within(returned, limit)) if is_async(self.entry.reward) else returned)
        except TimeoutError as error:
            self._done.put(error if str(error) else TimeoutError(f"no answer within {limit:g} s"))
        except BaseException as error:  # whatever it raises, it must not pass for a hanging one
            self._done.put(error)


async def _within(returned: Any, limit: float) -> Any:
    return await asyncio.wait_for(returned, limit)


def _values(entry: _Entry, outcome: Any, n: int) -> Values:
    """N numbers, None or exceptions, out of what a reward returned. Raises PluginError."""
    if isinstance(outcome, AlignzooError):
        raise outcome
    if isinstance(outcome, BaseException):
        return [outcome if isinstance(outcome, Exception) else RuntimeError(_words(outcome))] * n
    found = outcome.tolist() if hasattr(outcome, "tolist") else outcome  # tensors and arrays
    if not isinstance(found, list | tuple):
        raise PluginError(f"{entry} returned {type(outcome).__name__}, not a list", why=f"from {entry.info.owner}")
    if len(found) != n:
        raise PluginError(
            f"{entry} returned {len(found)} values for {n} completions", why=f"from {entry.info.owner}",
            fix="one value for each completion, None where it does not apply",
        )  # fmt: skip
    return [_value(entry, value) for value in found]


def _value(entry: _Entry, value: Any) -> float | Exception | None:
    if value is None or isinstance(value, Exception):
        return value
    if not isinstance(value, Real) or not math.isfinite(value):
        raise PluginError(
            f"{entry} returned {show(value)}, which is no finite number", why=f"from {entry.info.owner}",
            fix="return None where it does not apply",
        )  # fmt: skip
    return float(value)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
