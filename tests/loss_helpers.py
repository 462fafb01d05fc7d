"""What tests of losses share: batches made from a seed or from lists, a plain reading of them, a gradient check.

Every batch is ragged, and what lies outside its masks is POISON: a loss that reads it gives a visibly wrong number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck

import alignzoo

POISON = 777.0


def completion(
    policy: Sequence[Sequence[float]],
    reference: Sequence[Sequence[float]] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
    owner: str = "test",
) -> alignzoo.LogProbs:
    """LogProbs from the log-probs of each completion's tokens; poison at the end and where one is short."""
    width = max(len(row) for row in policy) + 1
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in policy])

    def padded(rows: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([[*row, *[POISON] * (width - len(row))] for row in rows], dtype=dtype)

    return alignzoo.LogProbs(
        policy=padded(policy).requires_grad_(requires_grad),
        reference=None if reference is None else padded(reference),
        mask=mask,
        owner=owner,
    )


def random_completion(seed: int, n: int, longest: int, *, reference: bool = True, **options: Any) -> alignzoo.LogProbs:
    """n completions of 1 to `longest` tokens; the first has a token of log-prob 0, which counts."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [longest, *(1 + i % longest for i in range(n - 1))]

    def rows() -> list[list[float]]:
        return [(-2 * torch.rand(length, generator=generator, dtype=torch.float64)).tolist() for length in lengths]

    policy = rows()
    policy[0][0] = 0.0
    return completion(policy, rows() if reference else None, **options)


def make_demonstrations(seed: int = 0, n: int = 5, longest: int = 6, **options: Any) -> alignzoo.Demonstrations:
    """A batch of demonstrations; options as for `completion`."""
    return alignzoo.Demonstrations(completion=random_completion(seed, n, longest, reference=False, **options))


def make_pairs(seed: int = 0, n: int = 5, longest: tuple[int, int] = (6, 4), **options: Any) -> alignzoo.Pairs:
    """A batch of pairs whose chosen and rejected differ in width; options as for `completion`, and reference=False."""
    return alignzoo.Pairs(
        chosen=random_completion(seed, n, longest[0], **options),
        rejected=random_completion(seed + 1000, n, longest[1], **options),
    )


def pairs_with_log_ratios(
    chosen: Sequence[float], rejected: Sequence[float], reference: float = -2.0, **options: Any
) -> alignzoo.Pairs:
    """Pairs of two-token completions with these summed log-ratios; the reference gives each completion `reference`."""

    def side(ratios: Sequence[float]) -> alignzoo.LogProbs:
        policy = [[0.25 * reference + 0.75 * r, 0.75 * reference + 0.25 * r] for r in ratios]
        return completion(policy, [[0.25 * reference, 0.75 * reference]] * len(ratios), **options)

    return alignzoo.Pairs(chosen=side(chosen), rejected=side(rejected))


def make_labelled(
    seed: int = 0, n: int = 5, longest: int = 6, baseline: float = 0.7, **options: Any
) -> alignzoo.Labelled:
    """A batch of labelled rows, every other one desirable, with a baseline in `step`; options as for `completion`."""
    return batch_of("labelled", [random_completion(seed, n, longest, **options)], baseline)


def labelled_with_log_ratios(ratios: Sequence[float], labels: Sequence[bool], **options: Any) -> alignzoo.Labelled:
    """Labelled rows of two-token completions with these summed log-ratios."""
    side = pairs_with_log_ratios(ratios, ratios, **options).chosen
    return alignzoo.Labelled(completion=side, label=torch.tensor(labels))


def batch_of(kind: str, sides: Sequence[alignzoo.LogProbs], baseline: float = 0.0) -> Any:
    """A batch of any kind from one or two sides; of labelled rows every other one is desirable."""
    label = torch.arange(len(sides[0].mask)) % 2 == 0
    makers: dict[str, Callable[[], Any]] = {
        "demonstrations": lambda: alignzoo.Demonstrations(completion=sides[0]),
        "pairs": lambda: alignzoo.Pairs(chosen=sides[0], rejected=sides[1]),
        "labelled": lambda: alignzoo.Labelled(
            completion=sides[0], label=label, step={"baseline": torch.tensor(baseline, dtype=sides[0].policy.dtype)}
        ),
    }
    return makers[kind]()


def row_of(batch: Any, i: int) -> Any:
    """The batch with one row of it only."""

    def cut(part: alignzoo.LogProbs) -> alignzoo.LogProbs:
        reference = None if part.reference is None else part.reference[i : i + 1]
        return dataclasses.replace(part, policy=part.policy[i : i + 1], mask=part.mask[i : i + 1], reference=reference)

    rows: dict[str, Any] = {name: cut(part) for name, part in completions_of(batch).items()}
    if isinstance(batch, alignzoo.Labelled):
        rows["label"] = batch.label[i : i + 1]
    return dataclasses.replace(batch, **rows)


def completions_of(batch: Any) -> dict[str, alignzoo.LogProbs]:
    """The LogProbs of a batch by the name of their field."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {name: value for name, value in fields.items() if isinstance(value, alignzoo.LogProbs)}


def tokens(values: Tensor, mask: Tensor) -> list[list[float]]:
    """The values that count, per completion, as plain floats: what references written without torch start from."""
    return [
        [v for v, m in zip(vs, ms, strict=True) if m] for vs, ms in zip(values.tolist(), mask.tolist(), strict=True)
    ]


def units_by_term(output: alignzoo.LossOutput) -> list[list[float]]:
    """Of each term the values that count."""
    return [(t.loss.flatten() if t.mask is None else t.loss[t.mask]).tolist() for t in output.terms]


def units(output: alignzoo.LossOutput) -> list[float]:
    """The values that count, one term after the other."""
    return [value for term in units_by_term(output) for value in term]


def total(output: alignzoo.LossOutput) -> Tensor:
    """The number that the engine would differentiate if the batch were the whole step: each term by its own units."""
    result = torch.zeros((), dtype=output.loss.dtype)
    for term in output.terms:
        mask = torch.ones_like(term.loss, dtype=torch.bool) if term.mask is None else term.mask
        result = result + term.loss.masked_fill(~mask, 0.0).sum() / mask.sum()
    return result


def gradients(loss: alignzoo.Loss, batch: Any) -> dict[str, Tensor]:
    """d total / d policy of every completion of a batch that was made with requires_grad=True."""
    inputs = {name: value.policy for name, value in completions_of(batch).items()}
    found = torch.autograd.grad(total(loss(batch)), list(inputs.values()))
    return dict(zip(inputs, found, strict=True))


def gradcheck_loss(loss: alignzoo.Loss, batch: Any) -> None:
    """Compare the gradient of each term of a loss with finite differences, in float64, for a whole batch."""
    parts = completions_of(batch)
    leaves = tuple(part.policy.detach().double().requires_grad_() for part in parts.values())

    def units(*policies: Tensor) -> tuple[Tensor, ...]:
        changed = {n: dataclasses.replace(p, policy=x) for (n, p), x in zip(parts.items(), policies, strict=True)}
        terms = loss(dataclasses.replace(batch, **changed)).terms
        return tuple(t.loss if t.mask is None else t.loss.masked_fill(~t.mask, 0.0) for t in terms)

    assert gradcheck(units, leaves)
