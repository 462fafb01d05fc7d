"""Several losses in one recipe, each times its weight: one forward pass and one reference for all of them.

As in mixed preference optimisation (MPO, Wang et al. 2024, arXiv:2411.10442): a preference, a quality and a generation
loss on the same pairs. Each term is divided by its own units, as if its loss ran alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from alignzoo.api import Batch, Demonstrations, Loss, LossOutput, Metric, NoSettings, Pairs, Step, metric
from alignzoo.errors import PluginError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One loss of several."""

    loss: Loss
    weight: float
    label: str  # before its metrics: its name; of several with one name the later ones are name_2, name_3


class Mixture(Loss):
    """The weighted sum of several losses. A loss on demonstrations learns from the chosen side of pairs.

    Its metrics have the name of their loss before them, `NAME/loss` is the mean of its own value; rewards are those of
    the first loss that gives any.
    """

    Settings = NoSettings

    def __init__(self, losses: Sequence[Loss], weights: Sequence[float]) -> None:
        """Raises PluginError where the losses eat data that cannot be the same."""
        self.settings = NoSettings()
        names = [loss.name for loss in losses]
        self.parts = [
            Part(loss, weight, name if (n := names[:i].count(name)) == 0 else f"{name}_{n + 1}")
            for i, (loss, weight, name) in enumerate(zip(losses, weights, names, strict=True))
        ]
        kinds = {loss.data for loss in losses}
        if len(kinds) > 1 and kinds != {"pairs", "demonstrations"}:
            raise PluginError(
                "these losses cannot share their data: "
                + ", ".join(f"{loss.name} eats {loss.data}" for loss in losses),
                fix="combine losses on the same kind of data; one on demonstrations goes with pairs too",
            )
        if len({loss.needs_scores for loss in losses}) > 1:
            raise PluginError(
                "these losses cannot share a model: "
                + ", ".join(f"{loss.name} learns from {what_of(loss)}" for loss in losses),
                fix="combine losses of scores with each other, and losses of log-probs with each other",
            )
        self.needs_scores = losses[0].needs_scores  # type: ignore[misc]
        self.name, self.data = "+".join(names), "pairs" if len(kinds) > 1 else kinds.pop()
        self.token_stats = frozenset().union(*(loss.token_stats for loss in losses))  # type: ignore[misc]

    @property
    def needs_reference(self) -> bool:
        return any(part.loss.needs_reference for part in self.parts)

    @property
    def needs_mismatched(self) -> bool:
        return any(part.loss.needs_mismatched for part in self.parts)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for part in self.parts for column in part.loss.columns))

    @property
    def prepare_pass(self) -> bool:
        return any(part.loss.has_prepare and part.loss.prepare_pass for part in self.parts)

    @property
    def has_prepare(self) -> bool:
        return any(part.loss.has_prepare for part in self.parts)

    def init_state(self) -> dict[str, Tensor]:
        return {f"{part.label}.{key}": v for part in self.parts for key, v in part.loss.init_state().items()}

    def prepare(self, step: Step, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values, new_state = dict[str, "Tensor"](), dict[str, "Tensor"]()
        for part in self.parts:
            if not part.loss.has_prepare:
                continue
            own = replace(step, completion=step.chosen) if part.loss.data != self.data else step
            found, kept = part.loss.prepare(own, _of(part, state))
            values |= {f"{part.label}.{key}": value for key, value in found.items()}
            new_state |= {f"{part.label}.{key}": value for key, value in kept.items()}
        return values, new_state

    def __call__(self, batch: Any) -> LossOutput:
        outputs = [_named(part, part.loss(self._view(part, batch))) for part in self.parts]
        paid = next((i for i, output in enumerate(outputs) if output.rewards is not None), None)
        total: LossOutput | None = None
        for i, (part, output) in enumerate(zip(self.parts, outputs, strict=True)):
            weighted = part.weight * (output if i == paid else replace(output, rewards=None, threshold=None))
            total = weighted if total is None else total + weighted
        assert total is not None
        return total

    def _view(self, part: Part, batch: Batch) -> Batch:
        """The batch as this loss would have it."""
        own = replace(batch, step=_of(part, batch.step))
        if isinstance(batch, Pairs) and part.loss.data == "demonstrations":
            return Demonstrations(completion=batch.chosen, extra=own.extra, step=own.step)
        return own


def what_of(loss: Loss) -> str:
    """What a loss learns from, in words."""
    return "scores" if loss.needs_scores else "log-probs"


def _of(part: Part, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of this loss, under its own names."""
    prefix = f"{part.label}."
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _named(part: Part, output: LossOutput) -> LossOutput:
    """An output whose metrics tell whose they are, its own value among them."""
    own: dict[str, Tensor | Metric] = {f"{part.label}/{name}": value for name, value in output.metrics.items()}
    for i, term in enumerate(output.terms, start=1):
        name = f"{part.label}/loss" if i == 1 else f"{part.label}/loss_{i}"
        own[name] = metric(term.loss.detach(), where=term.mask)
    return replace(output, metrics=own)
