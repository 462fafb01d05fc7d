"""Log-probs from hidden states where a model's head is one matrix, and nothing more.

Some positions at a time; only the log-sum-exp and the target's logit of each are kept, and the backward pass makes the
logits again. So logits of all positions never exist, and no graph is kept over them.

Shapes: M positions, H channels, V the vocabulary; m positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

HEAD_CHUNK = 256  # predicting positions per call of the head: 256 x V float32 logits is 50 MB for V = 49,152

Scores = dict[str, Tensor]


@torch.no_grad()
def is_linear(head: Callable[[Tensor], Tensor], matrix: Any, rows: Tensor) -> bool:
    """Whether a class's own logits are, to the last bit, its matrix applied to the rows (plus a bias)."""
    if type(matrix) is not nn.Linear or hasattr(matrix.weight, "ds_id"):  # adapted, quantised, or in shares
        return False
    plain = functional.linear(rows.unsqueeze(0), matrix.weight, matrix.bias)[0]
    return torch.equal(head(rows).float(), plain.float())


def linear_scores(rows: Tensor, matrix: nn.Linear, target: Tensor, stats: Collection[str]) -> Scores:
    """Log-prob of each target, (M,), and the statistics asked for, from (M, H) hidden states."""
    names = tuple(stats)
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    with torch.autocast(device, enabled=False):
        logps, *found = _LinearLogProbs.apply(rows, matrix.weight, matrix.bias, target, names, dtype)
    return {"logps": logps, **dict(zip(names, found, strict=True))}


class _LinearLogProbs(torch.autograd.Function):
    """rows (M, H), weight (V, H), bias (V,) or None, target (M,) -> log-probs and statistics, (M,) each."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, names: tuple[str, ...], dtype: Any
    ) -> Any:
        exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
        logps, normaliser = (rows.new_empty(len(rows), dtype=exact) for _ in range(2))
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        make = _Logits(rows, weight, bias, dtype)
        for part in make.parts:
            logits = make(part).to(exact)  # (m, V)
            normaliser[part] = logits.logsumexp(-1)
            logps[part] = logits.gather(-1, target[part, None]).squeeze(-1) - normaliser[part]
            for name, values in token_stats(logits, normaliser[part], target[part], names).items():
                found[name].append(values)
        ctx.save_for_backward(rows, weight, bias, target, normaliser)
        ctx.dtype = dtype
        columns = [torch.cat(values) for values in found.values()]
        ctx.mark_non_differentiable(*columns)
        return logps, *columns

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        rows, weight, bias, target, normaliser = ctx.saved_tensors
        given = gradients[0]  # (M,)
        make = _Logits(rows, weight, bias, ctx.dtype)
        d_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=normaliser.dtype) if ctx.needs_input_grad[1] else None
        d_bias = (
            torch.zeros_like(bias, dtype=normaliser.dtype) if bias is not None and ctx.needs_input_grad[2] else None
        )
        for part in make.parts:
            slope = make(part).to(normaliser.dtype)  # (m, V), d logp / d logits = [target] - probabilities
            slope.sub_(normaliser[part, None]).exp_().mul_(-given[part, None])
            slope.scatter_add_(1, target[part, None], given[part, None])
            if d_bias is not None:
                d_bias += slope.sum(0)
            slope = slope.to(ctx.dtype)
            if d_rows is not None:
                d_rows[part] = slope @ make.weight
            if d_weight is not None:
                _add_product(d_weight, slope.t(), make.rows[part])
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_rows, d_weight, None if d_bias is None else d_bias.to(bias.dtype), None, None, None


class _Logits:
    """The logits of a part of the rows, in the precision of the computation."""

    def __init__(self, rows: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.rows, self.weight = rows.detach().to(dtype), weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.parts = [slice(i, min(i + HEAD_CHUNK, len(rows))) for i in range(0, len(rows), HEAD_CHUNK)]

    def __call__(self, part: slice) -> Tensor:
        return functional.linear(self.rows[part], self.weight, self.bias)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


# --- statistics ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_stats(logits: Tensor, normaliser: Tensor, target: Tensor, names: Collection[str]) -> Scores:
    """Each statistic that is asked for, (m,), from (m, V) logits and their log-sum-exp (m,)."""
    if not names:
        return {}
    logps = logits - normaliser.unsqueeze(-1)  # (m, V)
    return {name: _STATS[name](logps, target) for name in names}


def _entropy(logps: Tensor, _: Tensor) -> Tensor:
    return -(logps.exp() * logps).sum(-1)


def _log_sum_sq_probs(logps: Tensor, _: Tensor) -> Tensor:
    return (2 * logps).logsumexp(-1)


def _is_top1(logps: Tensor, target: Tensor) -> Tensor:
    return logps.argmax(-1) == target


_STATS = {"entropy": _entropy, "log_sum_sq_probs": _log_sum_sq_probs, "is_top1": _is_top1}
