"""What is wrong with a run by its metrics: rules over the records of metrics.jsonl, with causes and what to change.

Pure: the same records give the same findings, while the run goes on, after a resume, on every rank, and years later
(`alignzoo doctor`). A rule looks at held-out metrics where there are some, at the last evaluations; else at the mean
over the last logged lines of training. It imports no torch. (data/watch.py shows how far the preparation of the data
is, watchdog.py ends a run in which nothing moves: neither reads metrics.)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, get_args

from alignzoo.records import ACCURACIES, PREFIXES, Record, is_eval, number
from alignzoo.rundir import WARNING
from alignzoo.sections import Rule, Watch

FEW_STEPS = 10  # in so many nothing can be expected of a model
NATS = 10  # of log-ratios to one of rewards, in a margin: 1 / beta with beta = 0.1
WORSE = 2.0  # times as far from the limit as when it was told: told again,
LEAST = 0.25  # where "as far" is at least this part of the limit


@dataclass(frozen=True)
class Known:
    """What is known of a run beside its records."""

    settings: Watch
    data: str  # the kind that its loss eats
    total: int  # optimizer steps
    warmup: int  # of them
    expected: float | None = None  # the loss where policy and reference are the same, see theory.py
    other_reference: bool = False  # reference.path is given
    dropout: bool = False  # in training, so that the first step's loss is not that of the model as it is
    moving: bool = False  # a setting of the loss moves (adapt.py), and the loss's scale with it

    @property
    def after(self) -> int:
        return max(self.warmup, FEW_STEPS) if self.settings.after is None else self.settings.after


@dataclass(frozen=True)
class Finding:
    """One rule that held at one record."""

    rule: str
    step: int
    metric: str
    value: float
    limit: float
    what: str  # the rule in words, with the value
    causes: tuple[str, ...]  # the likely ones
    change: str  # the settings to change

    def record(self) -> dict[str, Any]:
        """A line of metrics.jsonl; those who read records leave it out."""
        return {
            "step": self.step, WARNING: self.rule, "metric": self.metric, "value": self.value, "limit": self.limit,
            "what": self.what, "causes": list(self.causes), "change": self.change,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"step {self.step}: [{self.rule}] {self.what}. Likely: {'; '.join(self.causes)}. Change: {self.change}"


@dataclass
class History:
    """The records so far."""

    training: list[Record] = field(default_factory=list)
    held_out: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        (self.held_out if is_eval(record) else self.training).append(record)

    def held_out_points(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of an eval_ metric."""
        return list(_points(self.held_out, f"eval_{name}"))

    def is_held_out(self, name: str) -> bool:
        """Do evaluations have this metric?"""
        return bool(self.held_out) and f"eval_{name}" in self.held_out[-1]


@dataclass(frozen=True)
class Look:
    """One record, and what came before it."""

    known: Known
    history: History
    record: Record

    @property
    def settings(self) -> Watch:
        return self.known.settings

    @property
    def step(self) -> int:
        return int(self.record["step"])

    @property
    def over(self) -> bool:
        return self.step >= self.known.total

    def recent(self, name: str, patience: int | None = None) -> tuple[str, list[float]] | None:
        """The name of a metric and its values to judge by: of the last evaluations, or one mean over training lines.

        None where it is not the time: within the warm-up, with too few of them, or where this record lacks it.
        """
        wanted = patience or self.settings.patience
        if not is_eval(self.record):
            mean = None if self.history.is_held_out(name) else self.training_mean(name)
            return None if mean is None else (name, [mean])
        points = self.history.held_out_points(name) if f"eval_{name}" in self.record else []
        values = [value for step, value in points if step > self.known.after][-wanted:]
        return (f"eval_{name}", values) if values and (len(values) == wanted or self.over) else None

    def training_mean(self, name: str) -> float | None:
        """The mean over the last `window` lines after the warm-up; None while there are fewer."""
        values: list[float] = []
        for record in reversed(self.history.training):
            if record["step"] <= self.known.after or len(values) == self.settings.window:
                break
            if (value := number(record.get(name))) is not None:
                values.append(value)
        return statistics.fmean(values) if len(values) == self.settings.window else None

    def change(self, name: str) -> tuple[str, float, float] | None:
        """A metric's name, its first value and the present one: of evaluations, or means over training lines."""
        if is_eval(self.record):
            points = self.history.held_out_points(name) if f"eval_{name}" in self.record else []
            late = self.step > self.known.after and len(points) > 1
            return (f"eval_{name}", points[0][1], points[-1][1]) if late else None
        last = None if self.history.is_held_out(name) else self.training_mean(name)
        if last is None:
            return None
        first = islice(_points(self.history.training, name), self.settings.window)
        return name, statistics.fmean(value for _, value in first), last

    def found(self, rule: Rule, metric: str, value: float, limit: float, what: str) -> Finding:
        causes, change = ADVICE[rule]
        return Finding(rule, self.step, metric, value, limit, what, causes, change)


def _points(records: Sequence[Record], key: str) -> Iterator[tuple[int, float]]:
    return ((int(r["step"]), value) for r in records if (value := number(r.get(key))) is not None)


def _first(look: Look, names: Sequence[str]) -> tuple[str, list[float]] | None:
    """`recent` of the first of these metrics that this record has."""
    prefix = "eval_" if is_eval(look.record) else ""
    name = next((name for name in names if prefix + name in look.record), None)
    return None if name is None else look.recent(name)


# --- rules -----------------------------------------------------------------------------------------------------------


def _start(look: Look) -> Finding | None:
    """Before the first step policy and reference are the same: the loss is what theory says, and no log-ratio is."""
    known, settings, record = look.known, look.settings, look.record
    first_step = look.step == 1 and not look.history.held_out and not known.dropout
    if not (is_eval(record) and look.step == 0) and not (first_step and not is_eval(record)):
        return None
    prefix = "eval_" if is_eval(record) else ""
    loss = number(record.get(f"{prefix}loss"))
    ratios = {key: value for side in ("chosen", "rejected", "completion")
              if (value := number(record.get(key := f"{prefix}kl/{side}"))) is not None}  # fmt: skip
    furthest = max(ratios, key=lambda key: abs(ratios[key]), default="")
    words = [f"{prefix}loss is {loss:.4g} before the first step"] if loss is not None else []
    words += [f"theory says {known.expected:.4g}"] if known.expected is not None else []
    words += [f"{furthest} is {ratios[furthest]:.4g}"] if furthest else []
    what = ", ".join(words)
    if known.other_reference:
        what += ": the reference is not the start model; expected where reference.path names another one on purpose"
    if loss is not None and known.expected is not None:
        limit = settings.start_loss * max(1.0, abs(known.expected))
        if abs(loss - known.expected) > limit:
            return look.found("start", f"{prefix}loss", loss, known.expected, what)
    if furthest and abs(ratios[furthest]) > settings.start_kl:
        return look.found("start", furthest, ratios[furthest], settings.start_kl, what)
    return None


def _margin(look: Look) -> Finding | None:
    """Rewards have the scale that the loss gives them, beta = 0.001 with some; so log-ratios have a word in it too."""
    found, limit = _first(look, [f"{prefix}/margins" for prefix in PREFIXES]), look.settings.min_margin
    if found is None or not all(abs(value) < limit for value in found[1]):
        return None
    metric, values = found
    prefix = "eval_" if is_eval(look.record) else ""
    chosen, rejected = (number(look.record.get(f"{prefix}kl/{side}")) for side in ("chosen", "rejected"))
    if chosen is not None and rejected is not None and abs(chosen - rejected) >= NATS * limit:
        return None
    return look.found("margin", metric, values[-1], limit, f"{metric} is {values[-1]:.4g}: |margin| below {limit:g}")


def _accuracy(look: Look) -> Finding | None:
    """Not of the policy's own answers: new ones are paired each time, and their reward tells what it has learned."""
    if look.known.data == "demonstrations":  # held-out pairs may be measured too, but are not what it learns
        return None
    if "rollout/reward" in look.record or "eval_rollout/reward" in look.record:
        return None
    found, limit = _first(look, [f"{prefix}/accuracies" for prefix in ACCURACIES]), look.settings.min_accuracy
    if found is None or not all(value < limit for value in found[1]):
        return None
    metric, values = found
    return look.found("accuracy", metric, values[-1], limit, f"{metric} is {values[-1]:.3f}, below {limit:g}")


def _kl(look: Look) -> Finding | None:
    limit = look.settings.max_kl
    for name in ("kl/chosen", "kl/completion"):
        found = look.recent(name, patience=1)
        if found is not None and found[1][-1] > limit:
            metric, values = found
            return look.found("kl", metric, values[-1], limit, f"{metric} is {values[-1]:.4g} nats, above {limit:g}")
    return None


def _loss(look: Look) -> Finding | None:
    """Not for online data, where a step's loss is that of other completions, nor where the loss itself moves."""
    size, patience, known = look.settings.loss_steps, look.settings.patience, look.known
    if is_eval(look.record) or known.data == "groups" or known.moving or "rollout/length" in look.record:
        return None
    start = look.step - (patience + 1) * size
    windows = _windows(look.history.training, look.step, size, patience + 1)
    if start < known.after or min(map(len, windows)) < 5:
        return None
    means = [statistics.fmean(values) for values in windows]  # the last steps first
    if not all(late >= early for late, early in pairwise(means)) or _still_falls(look, start):
        return None
    what = f"the loss of the last {size} steps is {means[0]:.4g}, not below the {means[1]:.4g} of the {size} before"
    what += f", and that {patience} times in a row" * (patience > 1)
    return look.found("loss", "loss", means[0], means[1], what)


def _windows(records: Sequence[Record], step: int, size: int, count: int) -> list[list[float]]:
    """The losses of the last `size` steps, of as many before, and so on."""
    windows: list[list[float]] = [[] for _ in range(count)]
    for record in reversed(records):
        place = (step - record["step"]) // size
        if place >= count:
            break
        if (value := number(record.get("loss"))) is not None:
            windows[place].append(value)
    return windows


def _still_falls(look: Look, start: int) -> bool:
    """Is the held-out loss lower than it was at step `start`? Then the rest is noise."""
    points = look.history.held_out_points("loss")
    before = [value for step, value in points if step <= start] or [value for _, value in points]
    return bool(points) and points[-1][1] < before[-1]


def _chosen_logps(look: Look) -> Finding | None:
    found, limit = look.change("mean_logps/chosen"), look.settings.max_logp_drop
    if found is None or found[1] - found[2] <= limit:
        return None
    metric, first, last = found
    what = f"{metric} fell from {first:.3f} to {last:.3f} nats per token, by more than {limit:g}"
    return look.found("chosen_logps", metric, last - first, -limit, what)


def _saturated(look: Look) -> Finding | None:
    """Of training, since the held-out accuracy may be high to the end of a good run."""
    limit = look.settings.max_accuracy
    name = next((f"{p}/accuracies" for p in PREFIXES if f"{p}/accuracies" in look.record), "")
    mean = look.training_mean(name) if name and not look.over else None
    if mean is None or mean < limit:
        return None
    left = look.known.total - look.step
    what = f"{name} was {mean:.3f} over the last {look.settings.window} lines, and {left} steps are left"
    return look.found("saturated", name, mean, limit, what)


def _length(look: Look) -> Finding | None:
    found, limit = look.change("rollout/length"), look.settings.max_length_ratio
    if found is None or min(found[1:]) <= 0 or max(found[2] / found[1], found[1] / found[2]) <= limit:
        return None
    metric, first, last = found
    what = f"{metric} went from {first:.1f} to {last:.1f} tokens, by a factor of more than {limit:g}"
    return look.found("length", metric, last / first, limit if last > first else 1 / limit, what)


def _share(rule: Rule, name: str, limit_of: Callable[[Watch], float], words: str) -> Callable[[Look], Finding | None]:
    """A rule that a share of what is sampled stays below a limit."""

    def look_at(look: Look) -> Finding | None:
        found, limit = look.recent(name), limit_of(look.settings)
        if found is None or not all(value > limit for value in found[1]):
            return None
        metric, values = found
        return look.found(rule, metric, values[-1], limit, f"{values[-1]:.0%} of {words} ({metric}), above {limit:.0%}")

    return look_at


RULES: dict[str, Callable[[Look], Finding | None]] = {
    "start": _start,
    "margin": _margin,
    "accuracy": _accuracy,
    "kl": _kl,
    "loss": _loss,
    "chosen_logps": _chosen_logps,
    "saturated": _saturated,
    "length": _length,
    "zero_spread": _share(
        "zero_spread", "rollout/zero_spread", lambda s: s.max_zero_spread,
        "prompts have completions of equal reward, and nothing is learned from those",
    ),
    "truncated": _share(
        "truncated", "rollout/truncated", lambda s: s.max_truncated, "sampled completions were cut at their limit"
    ),
}  # fmt: skip
assert tuple(RULES) == get_args(Rule)

ADVICE: Mapping[str, tuple[tuple[str, ...], str]] = {
    "start": (
        ("the reference is another model than the start model", "log-probs kept for another model, tokenizer or mask",
         "a loss plugin whose two sides are masked differently"),
        "reference.path and model.path; or reference.mode = \"live\", which computes all of it anew",
    ),
    "margin": (
        ("the learning rate is too low", "chosen and rejected are the same or nearly", "beta is so large or small that "
         "the loss has no slope", "weights are frozen: a LoRA target that matches nothing of use"),
        "train.learning_rate (try three times as much), then the data: alignzoo data lint",
    ),
    "accuracy": (
        ("the learning rate is too low, or so high that it diverges", "chosen and rejected are swapped in some rows",
         "labels that contradict each other"),
        "data.columns (which column is chosen), train.learning_rate, and the data: alignzoo data lint",
    ),
    "kl": (
        ("the learning rate is too high", "beta is too small to hold the policy", "too many epochs",
         "long completions: the log-ratio is summed over their tokens, and so is the limit to be read"),
        "train.learning_rate down, loss.beta up (or {adapt = \"kl/chosen\", ...}), fewer epochs; or watch.max_kl",
    ),
    "loss": (
        ("it has converged, and more steps only overfit", "the learning rate is too high and it oscillates, or so low "
         "that nothing moves", "labels that contradict each other set a floor"),
        "train.learning_rate or train.epochs; eval.every_steps with eval.best_metric keeps the best model",
    ),
    "chosen_logps": (
        ("normal within bounds: a preference loss widens the difference of the two sides, and may do it by lowering "
         "both, the rejected one further", "the learning rate is too high", "chosen and rejected share most of their "
         "words, so that what lowers one lowers the other"),
        "look at samples.md first; then train.learning_rate down, loss.beta up, a run on the chosen side alone before "
        "this one, or a loss with a term that holds the chosen side (docs/losses.md)",
    ),
    "saturated": (
        ("the pairs are too easy: length or style tells them apart", "it learned the training rows by heart, see the "
         "held-out accuracy", "too many epochs"),
        "train.epochs or train.max_steps down, harder pairs (alignzoo data lint), or label_smoothing",
    ),
    "length": (
        ("the reward grows with length, or falls with it", "the end of turn is not rewarded or is cut off",
         "a loss that sums over tokens or divides by length favours one side"),
        "the rewards (a penalty on length), loss.aggregation, rollout.max_new_tokens",
    ),
    "zero_spread": (
        ("the prompts are too hard or too easy for the model", "the reward has few values, or fails",
         "the temperature is so low that all completions are the same"),
        "rollout.completions or rollout.temperature up, other prompts, or a reward with more grades",
    ),
    "truncated": (
        ("rollout.max_new_tokens is too small for such answers", "the model never ends: a base model, or a chat "
         "template without an end of turn"),
        "rollout.max_new_tokens up, data.chat_template, or loss.mask_truncated",
    ),
}  # fmt: skip


class Symptoms:
    """The rules over a growing list of records."""

    def __init__(self, known: Known) -> None:
        self.known, self.history = known, History()
        self.told: dict[str, list[Finding]] = {}

    @property
    def findings(self) -> list[Finding]:
        """All that was told, in the order of the steps."""
        return sorted((one for told in self.told.values() for one in told), key=lambda one: one.step)

    def see(self, record: Record) -> list[Finding]:
        """What is to be told at this record: a rule for the first time, or where it got much worse."""
        self.history.add(record)
        new = [found for found in self._found(Look(self.known, self.history, record)) if self._is_news(found)]
        for found in new:
            self.told.setdefault(found.rule, []).append(found)
        return new

    def _found(self, look: Look) -> Iterator[Finding]:
        for name, rule in RULES.items():
            found = None if name in self.known.settings.off else rule(look)
            if found is not None:
                yield found

    def _is_news(self, found: Finding) -> bool:
        told = self.told.get(found.rule, [])
        if not told:
            return True
        before = max(abs(told[-1].value - told[-1].limit), LEAST * abs(told[-1].limit))
        worse = abs(found.value - found.limit) > WORSE * before
        return worse and len(told) < self.known.settings.repeat
