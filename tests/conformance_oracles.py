"""What a step of each built-in loss should give, for all settings: values from the tests of losses, and what is logged.

Plain floats and loops. A batch is a whole step, so that what `prepare` makes of a step is reckoned here anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import test_losses
from loss_helpers import tokens
from test_losses_grpo import advantages_by_hand, deviation
from zoo_cases import log_probs, log_ratios

Oracle = Callable[[Any, Any], dict[str, Any]]
VALUES = {case.loss.name: case.reference for case in test_losses.CASES.values()}


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def of_pairs(values: list[float], chosen: list[float], rejected: list[float], **metrics: float) -> dict[str, Any]:
    """The values of a step, and its metrics with those of the rewards."""
    logged = {"rewards/chosen": mean(chosen), "rewards/rejected": mean(rejected)}
    return {"values": values, "metrics": logged | metrics}


def scaled(values: list[float], factor: float) -> list[float]:
    return [factor * v for v in values]


def on_log_ratios(name: str, scale: Callable[[Any], float] = lambda s: s.beta) -> Oracle:
    """Rewards are a multiple of the summed log-ratios."""

    def oracle(batch: Any, s: Any) -> dict[str, Any]:
        sides = (scaled(log_ratios(side), scale(s)) for side in (batch.chosen, batch.rejected))
        return of_pairs(VALUES[name](batch, s), *sides)

    return oracle


def on_log_probs(name: str, weight: Callable[[Any], float], average: bool) -> Oracle:
    """Rewards are a multiple of the log-probs, summed or averaged."""

    def oracle(batch: Any, s: Any) -> dict[str, Any]:
        rows = (log_probs(side) for side in (batch.chosen, batch.rejected))
        sides = ([weight(s) * (mean(row) if average else sum(row)) for row in side] for side in rows)
        return of_pairs(VALUES[name](batch, s), *sides)

    return oracle


def with_rewards(reward: Callable[[Any, int, Any], float], name: str) -> Oracle:
    def oracle(batch: Any, s: Any) -> dict[str, Any]:
        sides = [[reward(side, i, s) for i in range(len(side.mask))] for side in (batch.chosen, batch.rejected)]
        return of_pairs(VALUES[name](batch, s), *sides)

    return oracle


def dpo_reward(side: Any, i: int, s: Any) -> float:
    return float(s.beta * test_losses.score(side, i, average=s.length_normalised, free=s.reference_free))


def ipo_reward(side: Any, i: int, s: Any) -> float:
    return float(s.tau * test_losses.score(side, i, average=s.reduction == "mean"))


def fdpo_reward(side: Any, i: int, s: Any) -> float:
    """beta f'(u), zoo_cases.fdpo's; fdpo-forward and alpha in closed form."""
    u = math.exp(test_losses.score(side, i))
    if s.divergence == "js":
        slope = math.log(2 * u / (1 + u))
    else:
        slope = 1 - 1 / u if s.divergence == "forward_kl" else (1 - u**-s.alpha) / s.alpha
    return float(s.beta * slope)


def alphapo_reward(side: Any, i: int, s: Any) -> float:
    """The reward of an average probability p: beta (1 - p^-alpha) / alpha, beta log p at alpha = 0."""
    p = math.exp(mean(log_probs(side)[i]))
    return float(s.beta * ((1 - p**-s.alpha) / s.alpha if s.alpha else math.log(p)))


def nll(batch: Any) -> float:
    """Of all chosen tokens, per token."""
    return -mean([v for row in log_probs(batch.chosen) for v in row])


def orpo(batch: Any, s: Any) -> dict[str, Any]:
    found = on_log_probs("orpo", lambda s: s.lambda_, True)(batch, s)
    sides = ([mean(row) for row in log_probs(side)] for side in (batch.chosen, batch.rejected))
    odds = ([math.log(math.exp(p) / (1 - math.exp(p))) for p in side] for side in sides)
    found["metrics"] |= {"nll_loss": nll(batch), "log_odds_chosen": mean([a - b for a, b in zip(*odds, strict=True)])}
    return found


def rpo(batch: Any, s: Any) -> dict[str, Any]:
    found = on_log_ratios("rpo")(batch, s)
    found["metrics"]["nll_loss"] = -mean([mean(row) for row in log_probs(batch.chosen)])
    return found


def cpo(batch: Any, s: Any) -> dict[str, Any]:
    found = on_log_probs("cpo", lambda s: s.beta, False)(batch, s)
    found["metrics"]["nll_loss"] = -mean([v for row in log_probs(batch.chosen) for v in row])
    return found


def sft(batch: Any, s: Any) -> dict[str, Any]:
    return {"values": VALUES["sft"](batch, s)}


def dft(batch: Any, s: Any) -> dict[str, Any]:
    values = [v for row in log_probs(batch.completion) for v in row]
    return {"values": [-math.exp(v) * v for v in values], "metrics": {"nll_loss": -mean(values)}}


def wpo(batch: Any, s: Any) -> dict[str, Any]:
    def log_weight(side: Any, i: int) -> float:
        squares = tokens(side.log_sum_sq_probs, side.mask)[i]
        return mean([p - q for p, q in zip(log_probs(side)[i], squares, strict=True)])

    n = range(len(batch.chosen.mask))
    weights = [math.exp(log_weight(batch.chosen, i) + log_weight(batch.rejected, i)) for i in n]
    chosen, rejected = (scaled(log_ratios(side), s.beta) for side in (batch.chosen, batch.rejected))
    values = [w * softplus(b - a) for w, a, b in zip(weights, chosen, rejected, strict=True)]
    return of_pairs(values, chosen, rejected, pair_weight=mean(weights))


def bco(batch: Any, s: Any) -> dict[str, Any]:
    chosen, rejected = (scaled(log_ratios(side), s.beta) for side in (batch.chosen, batch.rejected))
    shift = (mean(chosen) + mean(rejected)) / 2 if s.shift == "running" else 0.0
    values = [softplus(shift - a) + softplus(b - shift) for a, b in zip(chosen, rejected, strict=True)]
    return of_pairs(values, chosen, rejected, **({"shift": shift} if s.shift == "running" else {}))


def unpaired(batch: Any, rewards: list[float], shift: float) -> dict[str, float]:
    """What is logged of labelled rows; right is a reward beyond the shift, half right one within 1e-3 of it."""
    label = batch.label.tolist()
    sides = {side: [r for r, good in zip(rewards, label, strict=True) if good == (side == "chosen")]
             for side in ("chosen", "rejected")}  # fmt: skip
    lead = [r - shift if good else shift - r for r, good in zip(rewards, label, strict=True)]
    logged = {f"rewards/{side}": mean(values) for side, values in sides.items() if values}
    return logged | {"rewards/accuracies": mean([0.5 if abs(x) <= 1e-3 else float(x > 0) for x in lead])}


def bco_unpaired(batch: Any, s: Any) -> dict[str, Any]:
    rewards, label = scaled(log_ratios(batch.completion), s.beta), batch.label.tolist()
    sides = [[r for r, good in zip(rewards, label, strict=True) if good == side] for side in (True, False)]
    shift = mean([mean(side) for side in sides if side]) if s.shift == "running" else 0.0
    values = [softplus(shift - r if good else r - shift) for r, good in zip(rewards, label, strict=True)]
    logged = unpaired(batch, rewards, shift)
    return {"values": values, "metrics": logged | ({"shift": shift} if s.shift == "running" else {})}


def kto(batch: Any, s: Any) -> dict[str, Any]:
    """With the baseline that is in the batch; how it comes about is in the fixtures."""
    baseline = batch.step["baseline"].item() if s.baseline == "mismatched" else 0.0
    logged = unpaired(batch, scaled(log_ratios(batch.completion), s.beta), s.beta * baseline)
    logged |= {"baseline": baseline} if s.baseline == "mismatched" else {}
    return {"values": VALUES["kto"](batch, s), "metrics": logged}


def aot(batch: Any, s: Any) -> dict[str, Any]:
    """By its places in the sorted lists of the step: what the loss computes of each pair is f of one difference."""
    chosen, rejected = log_ratios(batch.chosen), log_ratios(batch.rejected)
    u, v = chosen, rejected
    if s.variant == "paired":
        u = [sum(a) - sum(b) for a, b in zip(log_probs(batch.chosen), log_probs(batch.rejected), strict=True)]
        v = [x - a + b for x, a, b in zip(u, chosen, rejected, strict=True)]
    place = {i: n for n, i in enumerate(sorted(range(len(u)), key=u.__getitem__))}
    differences = [s.beta * (x - sorted(v)[place[i]]) for i, x in enumerate(u)]
    eps = s.label_smoothing
    values = [(1 - eps) * softplus(-d) + eps * softplus(d) for d in differences]
    return of_pairs(values, scaled(chosen, s.beta), scaled(rejected, s.beta))


def grpo(batch: Any, s: Any) -> dict[str, Any]:
    """Unit by unit, what test_losses_grpo.loss_by_hand sums up; old is the policy where it is not given."""
    part, mask = batch.completion, batch.completion.mask
    policy = tokens(part.policy, mask)
    old, sampler = (policy if t is None else tokens(t, mask) for t in (batch.old, batch.sampler))
    advantages = advantages_by_hand(batch.rewards.tolist(), batch.group.tolist(), s.baseline, s.advantage_scale)
    reference = tokens(part.reference, mask) if s.beta else policy
    rewards = zip(batch.rewards.tolist(), batch.truncated.tolist(), strict=True)
    counted = [i for i, (r, cut) in enumerate(rewards) if not (math.isnan(r) or (s.mask_truncated and cut))]
    rows, seen = [], _Seen()
    for i in counted:
        moved = [p - o for p, o in zip(policy[i], old[i], strict=True)]
        drift = [o - q for o, q in zip(old[i], sampler[i], strict=True)]
        ratios = [math.exp(m) for m in moved] if s.importance == "token" else [math.exp(mean(moved))]
        gains = seen.gains(ratios, advantages[i], s) * (1 if s.importance == "token" else len(moved))
        weights = seen.weights(drift, s) * (len(moved) if s.sampler_correction != "token" else 1)
        apart = [reference[i][t] - p for t, p in enumerate(policy[i])]
        seen.kls += [math.exp(x) - x - 1 for x in apart]
        seen.drift += drift
        cispo = s.surrogate == "cispo"
        gains = [g * (p if cispo else 1.0) for g, p in zip(gains, policy[i], strict=True)]
        rows.append([-g * c + s.beta * (math.exp(x) - x - 1) for g, c, x in zip(gains, weights, apart, strict=True)])
    found = {"values": [v for row in rows for v in row]}
    if s.aggregation != "token":
        found["values"] = [sum(row) / (len(row) if s.aggregation == "sequence" else s.constant_length) for row in rows]
    flat = [deviation([q for q, h in zip(batch.rewards.tolist(), batch.group.tolist(), strict=True)
                       if h == g and not math.isnan(q)] or [0.0]) == 0 for g in batch.group.tolist()]  # fmt: skip
    logged = {"frac_masked": 1 - len(rows) / len(policy), "frac_reward_zero_std": mean(flat)}
    if rows:
        logged |= {f"clip_ratio/{name}": mean(cut) for name, cut in seen.cut.items()}
        logged["entropy"] = mean([v for i in counted for v in tokens(part.entropy, mask)[i]])
        logged |= {"kl": mean(seen.kls)} if s.beta else {}
        logged |= seen.of_sampler(s) if batch.sampler is not None else {}
    return {**found, "metrics": logged}


@dataclass
class _Seen:
    """What is logged of GRPO, collected completion after completion."""

    cut: dict[str, list[float]] = field(default_factory=lambda: {"low": [], "high": [], "region": []})
    kls: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    capped: list[float] = field(default_factory=list)

    def gains(self, ratios: list[float], advantage: float, s: Any) -> list[float]:
        """The clipped surrogate, or the detached weight of CISPO, of each ratio."""
        low, high = 1 - s.epsilon, 1 + (s.epsilon if s.epsilon_high is None else s.epsilon_high)
        for w in ratios:
            below = s.surrogate == "clipped" and w < low and advantage < 0
            above = w > high and advantage > 0
            for name, cut in (("low", below), ("high", above), ("region", below or above)):
                self.cut[name].append(float(cut))
        if s.surrogate == "cispo":
            return [min(w, high) * advantage for w in ratios]
        return [min(w * advantage, min(max(w, low), high) * advantage) for w in ratios]

    def weights(self, drift: list[float], s: Any) -> list[float]:
        """The correction for the sampler, of each token or of the completion."""
        if s.sampler_correction == "none":
            return [1.0]
        whole = [math.exp(d) for d in drift] if s.sampler_correction == "token" else [math.exp(sum(drift))]
        beyond = s.sampler_cap if s.sampler_excess == "truncate" else 0.0
        self.capped += [float(c > s.sampler_cap) for c in whole]
        self.weight += (cut := [c if c <= s.sampler_cap else beyond for c in whole])
        return cut

    def of_sampler(self, s: Any) -> dict[str, float]:
        gaps = [abs(d) for d in self.drift]
        found = {"kl": -mean(self.drift), "logp_difference": mean(gaps), "logp_difference_max": max(gaps)}
        if s.sampler_correction != "none":
            found |= {"weight": mean(self.weight), "capped": mean(self.capped)}
        return {f"sampler/{name}": value for name, value in found.items()}


def rrhf(batch: Any, s: Any) -> dict[str, Any]:
    """A loop over the pairs of completions of each prompt."""
    rows, rewards, group = log_probs(batch.completion), batch.rewards.tolist(), batch.group.tolist()
    p, values, ranks, surprises, right = [mean(row) for row in rows], [], [], [], []
    for prompt in sorted(set(group)):
        members = [i for i, g in enumerate(group) if g == prompt and not math.isnan(rewards[i])]
        if not members:
            continue
        ordered = [(i, j) for i in members for j in members if rewards[i] < rewards[j]]
        ranks.append(math.fsum(p[i] - p[j] for i, j in ordered if p[i] > p[j]))
        right += [float(p[j] > p[i]) for i, j in ordered]
        best = max(members, key=lambda i: (rewards[i], -i))
        surprises += [-v for v in rows[best]]
        values.append(ranks[-1] - s.nll_weight * sum(rows[best]))
    logged = {"rank_loss": mean(ranks), "nll_loss": mean(surprises)} if ranks else {}
    return {"values": values, "metrics": logged | ({"rank_accuracy": mean(right)} if right else {})}


def alpha_dpo(batch: Any, s: Any) -> dict[str, Any]:
    """A first step: mean and std are those of the batch."""
    p, q = ([[mean(row) for row in rows] for rows in sides] for sides in _policy_and_reference(batch))
    n = range(len(p[0]))
    ahead = [p[0][i] - q[0][i] - p[1][i] + q[1][i] for i in n] if s.alpha else [0.0 for _ in n]
    targets = [s.gamma + s.alpha * (m - mean(ahead)) / (deviation(ahead) + 1e-4) for m in ahead]
    values = [softplus(targets[i] - s.beta * (p[0][i] - p[1][i])) for i in n]
    return of_pairs(values, scaled(p[0], s.beta), scaled(p[1], s.beta), target_margin=mean(targets))


def _policy_and_reference(batch: Any) -> list[list[list[list[float]]]]:
    """The log-probs of chosen and rejected tokens, by the policy and by the reference, else the policy again."""
    sides = (batch.chosen, batch.rejected)
    against = [tokens(x.policy if x.reference is None else x.reference, x.mask) for x in sides]
    return [[log_probs(side) for side in sides], against]


def bradley_terry(batch: Any, s: Any) -> dict[str, Any]:
    chosen, rejected = batch.chosen.score.tolist(), batch.rejected.score.tolist()
    margins = [0.0] * len(chosen) if s.margin is None else batch.extra[s.margin].tolist()
    rows = zip(chosen, rejected, margins, strict=True)
    values = [softplus(m + x - w) + s.center_rewards_coefficient * (w + x) ** 2 for w, x, m in rows]
    return of_pairs(values, chosen, rejected)


ORACLES: dict[str, Oracle] = {
    "sft": sft, "dft": dft, "orpo": orpo, "rpo": rpo, "cpo": cpo, "wpo": wpo, "bco": bco, "bco_unpaired": bco_unpaired,
    "kto": kto, "aot": aot, "grpo": grpo, "rrhf": rrhf, "alpha_dpo": alpha_dpo, "bradley_terry": bradley_terry,
    "dpo": with_rewards(dpo_reward, "dpo"), "ipo": with_rewards(ipo_reward, "ipo"),
    "fdpo": with_rewards(fdpo_reward, "fdpo"), "alphapo": with_rewards(alphapo_reward, "alphapo"),
    **{name: on_log_ratios(name) for name in ("hinge", "robust", "apo", "sppo", "nca", "exo", "discopop")},
    "simpo": on_log_probs("simpo", lambda s: s.beta, True), "slic": on_log_probs("slic", lambda s: 1.0, False),
}  # fmt: skip
