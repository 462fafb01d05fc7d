"""The contract between alignzoo and a loss: what a loss gets, what it gives back, what it must declare.

And those of the other things that a plugin may bring: rewards, formats of rows, callbacks.

A loss is pure: it turns log-probabilities into numbers per example or per token. It sees no model, no padding, no
ranks and no micro-batches, and it never divides by a number of examples: the engine divides the sum of each term by the
number of its units in the whole optimizer step. This module imports no torch.

Shapes: B examples, N completions, T tokens of the longest completion. B = N for all kinds of data but `groups`, where B
counts prompts and N all their completions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from alignzoo.errors import PluginError
from alignzoo.schema import check_instance, setting

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CONTRACT", "INVARIANCES", "KINDS", "TOKEN_STATS", "Batch", "Callback", "CompletionScores", "Demonstrations",
    "Format", "Groups", "Labelled", "LogProbs", "Loss", "LossOutput", "Metric", "NoSettings", "Pairs", "Reward",
    "ScoredPairs", "SequenceStats", "Step", "Term", "metric", "setting",
]  # fmt: skip

CONTRACT = 1
TOKEN_STATS = frozenset({"entropy", "log_sum_sq_probs", "is_top1"})
INVARIANCES = {  # what a loss may declare of itself, and what the conformance kit tests then
    "prompt_length": "longer prompts change nothing",
    "shift": "the same constant added to every log-prob of policy and reference changes nothing",
    "token_order": "the order of the tokens within a completion changes nothing",
    "reward_shift": "groups: a constant added to all rewards changes nothing",
    "reward_scale": "groups: all rewards times a positive constant change nothing",
    "forgets": "the other direction: what the loss is given becomes less likely",
}
Reduce = Literal["sum", "mean"]


class _HasSums:
    """`sum`, `mean` and `log_ratio` per completion; the same names on LogProbs and on SequenceStats."""

    owner: str
    lengths: Tensor

    def _sums(self) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def sum(self) -> Tensor:
        """The policy's log-probability of each completion, (N,), nats."""
        return self._sums()[0]

    def mean(self) -> Tensor:
        """The policy's log-probability per completion token, (N,), nats per token."""
        return self._sums()[0] / self.lengths

    def log_ratio(self, reduce: Reduce = "sum") -> Tensor:
        """log policy - log reference of each completion, summed or averaged over its tokens, (N,), nats.

        Raises PluginError where there is no reference: the loss did not declare that it needs one.
        """
        if reduce not in ("sum", "mean"):
            raise ValueError(f'log_ratio(reduce={reduce!r}): "sum" or "mean"')
        policy, reference = self._sums()
        if reference is None:
            raise PluginError(
                f'loss "{self.owner}" asked for log_ratio(), and there is no reference',
                why=f'"{self.owner}" declares needs_reference = False (with these settings)',
                fix="declare needs_reference = True, or use sum() or mean()",
            )
        ratio = policy - reference
        return ratio if reduce == "sum" else ratio / self.lengths


@dataclass(frozen=True, eq=False)
class LogProbs(_HasSums):
    """Per-token log-probabilities of N completions.

    Float32 in training. Values outside the mask are finite and mean nothing. `policy` has a gradient in training only.
    Every completion has at least one True in its mask. `reference` never has a gradient.
    """

    policy: Tensor  # (N, T) log pi(token | prompt, tokens before), nats
    mask: Tensor  # (N, T) bool, True at the completion tokens that count
    reference: Tensor | None = None  # (N, T) nats; None unless the loss declares needs_reference
    entropy: Tensor | None = None  # (N, T) nats, with token_stats = {"entropy"}; detached
    log_sum_sq_probs: Tensor | None = None  # (N, T) log of the sum of squared probabilities; detached
    is_top1: Tensor | None = None  # (N, T) bool, is the token the most probable one
    owner: str = "?"  # the loss that this was made for, named in errors

    @cached_property
    def lengths(self) -> Tensor:  # type: ignore[override]
        """Completion tokens that count, (N,)."""
        return self.mask.sum(-1)

    def _sums(self) -> tuple[Tensor, Tensor | None]:
        policy = self.policy.masked_fill(~self.mask, 0.0).sum(-1)  # (N,)
        reference = None if self.reference is None else self.reference.masked_fill(~self.mask, 0.0).sum(-1)
        return policy, reference


@dataclass(frozen=True, eq=False)
class SequenceStats(_HasSums):
    """What `prepare` sees of N completions: sums over their tokens, detached, float32."""

    policy: Tensor  # (N,) nats
    lengths: Tensor  # (N,)
    reference: Tensor | None = None  # (N,) nats
    owner: str = "?"

    def _sums(self) -> tuple[Tensor, Tensor | None]:
        return self.policy, self.reference


@dataclass(frozen=True, eq=False)
class CompletionScores:
    """What a model with a scalar head makes of N completions, in the place of log-probs. Float32 in training."""

    score: Tensor  # (N,) the head's output at the last token of each completion; it has a gradient in training only
    lengths: Tensor  # (N,) completion tokens that count


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """What every kind of batch carries beside its completions."""

    extra: Mapping[str, Tensor] = field(default_factory=dict)  # data.keep's columns, (B,) float32, detached
    step: Mapping[str, Tensor] = field(default_factory=dict)  # what `prepare` returned; per-row results are sliced


@dataclass(frozen=True, eq=False, kw_only=True)
class Demonstrations(Batch):
    completion: LogProbs  # N = B


@dataclass(frozen=True, eq=False, kw_only=True)
class Pairs(Batch):
    chosen: LogProbs  # N = B
    rejected: LogProbs  # N = B; its T may differ from chosen's


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoredPairs(Batch):
    """Pairs, for a loss that declares needs_scores."""

    chosen: CompletionScores  # N = B
    rejected: CompletionScores  # N = B


@dataclass(frozen=True, eq=False, kw_only=True)
class Labelled(Batch):
    completion: LogProbs  # N = B
    label: Tensor  # (B,) bool, True for desirable


@dataclass(frozen=True, eq=False, kw_only=True)
class Groups(Batch):
    completion: LogProbs  # N completions of B prompts
    rewards: Tensor  # (N,) float32
    group: Tensor  # (N,) int64, the prompt of each completion, 0..B-1
    truncated: Tensor  # (N,) bool, the sampler stopped before the end of turn
    old: Tensor | None = None  # (N, T) log-probs of the policy that the rollout was made with
    sampler: Tensor | None = None  # (N, T) log-probs as the sampler computed them
    advantages: Tensor | None = None  # (N,) or (N, T)


KINDS: dict[str, type[Batch]] = {
    "demonstrations": Demonstrations,
    "pairs": Pairs,
    "labelled": Labelled,
    "groups": Groups,
}


@dataclass(frozen=True, eq=False)
class Step:
    """All rows of one optimizer step, in data order and the same on every rank: what `prepare` reads.

    Completions are there by the name that the batch has (`completion`, or `chosen` and `rejected`); `mismatched` with
    needs_mismatched. They are None where the loss declares prepare_pass = False.
    """

    rows: Tensor  # (B,) int64, the row of the data set
    completion: SequenceStats | None = None
    chosen: SequenceStats | None = None
    rejected: SequenceStats | None = None
    mismatched: SequenceStats | None = None
    label: Tensor | None = None  # (B,) bool
    rewards: Tensor | None = None  # (N,)
    group: Tensor | None = None  # (N,)
    truncated: Tensor | None = None  # (N,)
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # (B,)


@dataclass(frozen=True, eq=False)
class Metric:
    """Values to be reduced by the engine over the whole step; made by `metric`."""

    values: Tensor
    where: Tensor | None  # bool, the shape of values
    reduce: Literal["mean", "min", "max"]


def metric(values: Tensor, *, where: Tensor | None = None, reduce: Literal["mean", "min", "max"] = "mean") -> Metric:
    """A metric over those values where `where` is True; the engine reduces it over micro-batches and ranks."""
    if reduce not in ("mean", "min", "max"):
        raise ValueError(f'metric(reduce={reduce!r}): "mean", "min" or "max"')
    if values.ndim == 0:
        raise ValueError("metric: a scalar, not one value per row: a mean of means depends on the micro-batches")
    if where is not None and where.shape != values.shape:
        raise ValueError(f"metric: values have shape {tuple(values.shape)} and where {tuple(where.shape)}")
    return Metric(values, where, reduce)


@dataclass(frozen=True, eq=False)
class Term:
    """One summand of a loss: the engine divides the sum of it by the number of its units in the whole step."""

    loss: Tensor  # (B,) per example, (N, T) per token
    per: Literal["example", "token"]
    mask: Tensor | None  # the shape of loss; None: every example is a unit


@dataclass(frozen=True, eq=False)
class LossOutput:
    """What a loss gives back: values per example or per token, and what to log.

    The units of a term are `mask.sum()` (without a mask the examples) over the whole optimizer step. The mask may
    depend on the data and on `batch.step`, never on the log-probs. `a + b` and `2.0 * a` make a loss of several terms,
    each divided by its own units.
    """

    loss: Tensor  # (B,), or (N, T) with per="token"
    per: Literal["example", "token"] = "example"
    mask: Tensor | None = None  # (B,), or (N, T) and required with per="token"
    metrics: Mapping[str, Tensor | Metric] = field(default_factory=dict)  # (B,) or (N,) detached, or metric(...)
    rewards: Tensor | tuple[Tensor, Tensor] | None = None  # (chosen (B,), rejected (B,)), or (N,); detached
    threshold: Tensor | None = None  # () or (N,), labelled rows: the reward that tells good from bad; 0 if not given
    more: tuple[Term, ...] = ()  # the terms that `+` added

    @property
    def terms(self) -> tuple[Term, ...]:
        return (Term(self.loss, self.per, self.mask), *self.more)

    def __add__(self, other: LossOutput) -> LossOutput:
        if not isinstance(other, LossOutput):
            return NotImplemented
        twice = sorted(set(self.metrics) & set(other.metrics))
        if twice:
            raise PluginError(f"two terms of a loss log the same metric: {', '.join(twice)}", fix="rename one of them")
        if self.rewards is not None and other.rewards is not None:
            raise PluginError("two terms of a loss carry rewards", fix="give rewards to one of them")
        return replace(
            self,
            metrics={**self.metrics, **other.metrics},
            rewards=other.rewards if self.rewards is None else self.rewards,
            threshold=other.threshold if self.rewards is None else self.threshold,
            more=(*self.more, *other.terms),
        )

    def __mul__(self, factor: float) -> LossOutput:
        if not isinstance(factor, int | float):
            return NotImplemented
        return replace(self, loss=self.loss * factor, more=tuple(replace(t, loss=t.loss * factor) for t in self.more))

    __rmul__ = __mul__


@dataclass(frozen=True)
class NoSettings:
    """For a loss without settings."""


class _Configured:
    """What losses, rewards and callbacks share: they are made from their settings, which are checked then."""

    name: str
    Settings: type[Any]
    settings: Any
    _kind: ClassVar[str]

    def __init__(self, settings: Any = None, /, **values: Any) -> None:
        """From a Settings instance, or from its fields by name. Out of bounds raises PluginError."""
        if settings is not None and values:
            raise TypeError("give a Settings instance or its fields by name, not both")
        who = f'{self._kind} "{self.name}"'
        try:
            self.settings = type(self).Settings(**values) if settings is None else settings
        except TypeError as error:
            raise PluginError(f"{who}: {error}") from error
        if not isinstance(self.settings, type(self).Settings):
            raise PluginError(f"{who}: settings are a {type(self.settings).__name__}, not its Settings")
        problems = check_instance(self.settings)
        if problems:
            raise PluginError(f"{who}: " + "; ".join(p.message for p in problems))


class Loss(_Configured):
    """An alignment loss. Subclass it, declare the four attributes below, write `__call__`.

    Declared by every class for itself, nothing of it is inherited:
      name             the name in recipes, e.g. "dpo"
      data             "demonstrations" | "pairs" | "labelled" | "groups"
      Settings         a frozen dataclass of `setting(...)` fields, or NoSettings
      needs_reference  a bool, or a property that reads self.settings

    Optional:
      paper            a citation or address; "" if there is none
      family           the group in `alignzoo losses`
      contract         the version of this contract that the class was written for
      invariances      names out of INVARIANCES, which the conformance kit tests
      columns          names of columns that must stand in data.keep; or a property that reads self.settings
      token_stats      subset of {"entropy", "log_sum_sq_probs", "is_top1"}: fields of LogProbs to be computed
      needs_scores     True: learns from a scalar head's scores (model.head = "scalar"), and its batch is ScoredPairs;
                       with data = "pairs" and needs_reference = False only
      needs_mismatched True: `prepare` also gets, for each row, the completion of another prompt; or a property
      prepare_pass     False: `prepare` reads no log-probs, and the no-grad pass is saved; or a property
      prepare          see below; None: not used
    """

    data: str
    _kind = "loss"

    if TYPE_CHECKING:  # read-only, so that a class may declare a bool or a property

        @property
        def needs_reference(self) -> bool: ...

        @property
        def needs_mismatched(self) -> bool: ...

        @property
        def prepare_pass(self) -> bool: ...

        @property
        def columns(self) -> Sequence[str]: ...

    else:
        needs_mismatched = False
        prepare_pass = True
        columns = ()

    paper: ClassVar[str] = ""
    family: ClassVar[str] = ""
    contract: ClassVar[int] = 1
    invariances: ClassVar[frozenset[str]] = frozenset()
    token_stats: ClassVar[frozenset[str] | set[str]] = frozenset()
    needs_scores: ClassVar[bool] = False

    def __call__(self, batch: Any) -> LossOutput:
        """The loss of a batch of the declared kind. Pure: no state, no model, no division by a batch size."""
        raise NotImplementedError

    def prepare(self, step: Step, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the loss needs of the whole optimizer step, computed once before its first backward.

        Pure, and the same on every rank. Returns detached tensors, which arrive as `batch.step[name]`: those of 0
        dimensions whole, all others with one row per completion (their first size is N; of pairs 2 B, chosen and
        rejected in turn) and sliced; and the new state.
        Override it only where it is needed: it costs a forward pass without gradients (see prepare_pass).
        """
        raise NotImplementedError

    def init_state(self) -> dict[str, Tensor]:
        """Small tensors that `prepare` carries from step to step and checkpoints keep."""
        return {}

    @property
    def has_prepare(self) -> bool:
        return type(self).prepare is not Loss.prepare


Values = Sequence[float | Exception | None]


class Reward(_Configured):
    """Tells how good completions are. Subclass it, declare `name` and `Settings`, write `__call__`.

    Declared by every class for itself:
      name      the name in recipes, e.g. "exact"
      Settings  a frozen dataclass of `setting(...)` fields, or NoSettings

    Optional:
      columns   names of the columns of the rows that it cannot do without; or a property that reads self.settings
      start     loads what it needs, e.g. a model

    A plain function serves too: its keyword-only parameters with defaults are its settings, and the parameters after
    the first two are columns that it cannot do without.
    """

    _kind = "reward"

    if TYPE_CHECKING:  # read-only, so that a class may declare a tuple or a property

        @property
        def columns(self) -> Sequence[str]: ...

    else:
        columns = ()

    def start(self, device: Any) -> str | None:
        """Called once, on every rank, before the first call. What it returns is a line for the user."""

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Values | Awaitable[Values]:
        """One value for each completion; it may be `async`.

        prompts: N strings or lists of messages; completions: N decoded answers; columns: all other columns of the
        rows, N values each. A value is a number; None where the reward does not apply; or an exception where it failed.
        It must not depend on the other completions of the call: calls are cut by prompt and by rank.
        """
        raise NotImplementedError


class Callback(_Configured):
    """Is told what happens in a run. Subclass it, declare `name` and `Settings`, write the methods that are wanted.

    Declared by every class for itself:
      name      the name in recipes, e.g. "webhook"
      Settings  a frozen dataclass of `setting(...)` fields, or NoSettings

    Optional:
      contract  the version of this contract that the class was written for

    It is called on the first rank only, with plain data of its own: nothing that it does to it changes the training.
    """

    _kind = "callback"
    contract: ClassVar[int] = 1

    def run_started(self, run: Mapping[str, Any]) -> None:
        """Before the weights are loaded. run: directory, recipe, loss, steps, rows, held_out, resumed (bool)."""

    def step_ended(self, metrics: Mapping[str, float]) -> None:
        """After a step that a line of metrics was written for (log.every_steps): that line."""

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """After an evaluation: its line of metrics."""

    def checkpoint_saved(self, path: str) -> None:
        """After a checkpoint: its folder, complete."""

    def run_ended(self, end: Mapping[str, Any]) -> None:
        """When the run is over.

        end: status "finished", "interrupted" or "failed"; error, "" where there was none; directory; model, its folder,
        "" unless finished; metrics, the last of each name; seconds
        """


CALLS = ("run_started", "step_ended", "evaluated", "checkpoint_saved", "run_ended")


@dataclass(frozen=True)
class Format:
    """A shape of rows, as a recipe names it in data.format.

    Where a plugin brings it, `make` gives the same row with alignzoo's own columns, which are those of its kind:
      demonstrations  prompt and completion, or messages, or text
      pairs           prompt, chosen and rejected
      labelled        prompt, completion and label, or messages and label
      groups          prompt, completions and rewards
      prompts         prompt
    Each of these may have `system` and `tools` beside it. It returns None for a row that is left out, and raises
    ValueError, with words for the user, for one that cannot be used.
    """

    name: str
    kind: str  # demonstrations, pairs, labelled, groups or prompts
    columns: tuple[str, ...]  # all of them must be there
    description: str
    make: Callable[[Mapping[str, Any]], Any]
    optional: tuple[str, ...] = ()  # read where they are there
    looks: Callable[[Mapping[str, Any]], bool] | None = None  # whether a row of these columns can be of this format
    derived: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None  # adds columns for data.keep
    adds: tuple[str, ...] = ()  # the columns that `derived` adds
    contract: int = 1  # the version of this contract that it was written for
