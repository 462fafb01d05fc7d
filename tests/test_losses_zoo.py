"""The losses of the zoo against TRL's own methods on the same log-probs, and by hand."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alignzoo_losses.alphapo import AlphaPO
from alignzoo_losses.aot import AOT
from alignzoo_losses.apo import APO
from alignzoo_losses.bco import BCO
from alignzoo_losses.bco_unpaired import UnpairedBCO
from alignzoo_losses.cpo import CPO
from alignzoo_losses.dft import DFT
from alignzoo_losses.discopop import DiscoPOP
from alignzoo_losses.exo import EXO
from alignzoo_losses.fdpo import FDPO
from alignzoo_losses.nca import NCA
from alignzoo_losses.robust import Robust
from alignzoo_losses.rpo import RPO
from alignzoo_losses.simpo import SimPO
from alignzoo_losses.sppo import SPPO
from alignzoo_losses.wpo import WPO
from conftest import make_trees
from loss_helpers import (
    POISON,
    completion,
    gradients,
    labelled_with_log_ratios,
    make_demonstrations,
    make_pairs,
    pairs_with_log_ratios,
    tokens,
    total,
    units,
)
from test_engine import error, labelled, update_of

import alignzoo
from alignzoo.api import SequenceStats
from alignzoo.objective import check_output


def stats(part: alignzoo.LogProbs) -> SequenceStats:
    """What `prepare` sees of some completions."""
    assert part.reference is not None
    reference = part.reference.masked_fill(~part.mask, 0.0).sum(-1)
    return SequenceStats(part.sum().detach(), part.lengths, reference, owner="test")


def prepared(loss: alignzoo.Loss, batch: alignzoo.Pairs) -> alignzoo.Pairs:
    """The batch as a whole step."""
    step = alignzoo.Step(
        rows=torch.arange(len(batch.chosen.mask)), chosen=stats(batch.chosen), rejected=stats(batch.rejected)
    )
    return dataclasses.replace(batch, step=loss.prepare(step, loss.init_state())[0])


def with_squares(batch: alignzoo.Pairs) -> alignzoo.Pairs:
    """The batch with made-up sums of squared probabilities."""

    def changed(part: alignzoo.LogProbs, seed: int) -> alignzoo.LogProbs:
        generator = torch.Generator().manual_seed(seed)
        squares = -torch.rand(part.mask.shape, generator=generator, dtype=torch.float64).to(part.policy.dtype)
        return dataclasses.replace(part, log_sum_sq_probs=squares.masked_fill(~part.mask, POISON))

    return alignzoo.Pairs(chosen=changed(batch.chosen, 1), rejected=changed(batch.rejected, 2))


# --- TRL's DPOTrainer -------------------------------------------------------------------------------------------------


def needs_trl() -> None:
    trl = pytest.importorskip("trl")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"written for private methods of TRL 1.16; this is {trl.__version__}")


def trl_dpo(batch: alignzoo.Pairs, kind: str | list[str], **settings: Any) -> torch.Tensor:
    """DPOTrainer._compute_loss of TRL 1.16 on these log-probs. Its rows are chosen ones, then rejected ones."""
    needs_trl()
    from trl import DPOTrainer

    sides = (batch.chosen, batch.rejected)
    width = max(s.mask.shape[1] for s in sides)

    def table(values: list[Any], fill: Any) -> torch.Tensor:
        rows = [
            torch.nn.functional.pad(v.masked_fill(~s.mask, fill), (0, width - v.shape[1]), value=fill)
            for v, s in zip(values, sides, strict=True)
        ]
        return torch.cat(rows)

    mask = table([s.mask for s in sides], False)
    before = torch.zeros(len(mask), 1, dtype=torch.long)  # the token that predicts the first one of the completion
    outputs = SimpleNamespace(
        log_probs=table([s.policy for s in sides], 0.0), entropy=torch.zeros(mask.shape),
        mean_logits=torch.zeros(mask.shape), is_top1=torch.zeros_like(mask),
    )  # fmt: skip
    if batch.chosen.log_sum_sq_probs is not None:
        outputs.log_sum_sq_probs = table([s.log_sum_sq_probs for s in sides], 0.0)
    kinds = [kind] if isinstance(kind, str) else kind
    this = SimpleNamespace(
        model=SimpleNamespace(training=False), aux_loss_enabled=False, precompute_ref_logps=True, loss_types=kinds,
        loss_weights=[1.0] * len(kinds), args=SimpleNamespace(discopop_tau=settings.pop("discopop_tau", 0.05)),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
        **{"beta": 0.1, "ld_alpha": None, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5,
           "label_smoothing": 0.0, "use_weighting": False, **settings},
    )  # fmt: skip
    reference = table([s.reference for s in sides], 0.0).sum(-1).chunk(2)
    inputs = {
        "input_ids": torch.zeros(len(mask), width + 1, dtype=torch.long), "attention_mask": torch.ones_like(mask),
        "completion_mask": torch.cat([before, mask.long()], dim=1),
        "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1],
    }  # fmt: skip
    found = DPOTrainer._compute_loss(this, lambda **_: outputs, inputs, False)
    assert isinstance(found, torch.Tensor)
    return found


def same_as(expected: torch.Tensor, loss: alignzoo.Loss, batch: alignzoo.Pairs, rel: float = 1e-9) -> None:
    """Value and gradient."""
    slopes = torch.autograd.grad(expected, [batch.chosen.policy, batch.rejected.policy])
    assert total(loss(batch)).item() == pytest.approx(expected.item(), rel=rel)
    found = gradients(loss, batch)
    for slope, mine in zip(slopes, found.values(), strict=True):
        assert torch.allclose(mine, slope, rtol=max(rel, 1e-9), atol=1e-9)


@pytest.mark.parametrize(
    ("loss", "kind", "settings"),
    [
        (Robust(beta=0.3, label_smoothing=0.2), "robust", {"beta": 0.3, "label_smoothing": 0.2}),
        (APO(beta=0.3), "apo_zero", {"beta": 0.3}),
        (APO(beta=0.3, variant="down"), "apo_down", {"beta": 0.3}),
        (SPPO(beta=0.01), "sppo_hard", {"beta": 0.01}),
        (NCA(beta=0.2), "nca_pair", {"beta": 0.2}),
        (EXO(beta=0.3, label_smoothing=0.01), "exo_pair", {"beta": 0.3, "label_smoothing": 0.01}),
        (BCO(beta=0.2, shift="none"), "bco_pair", {"beta": 0.2}),
        (DiscoPOP(beta=0.1, tau=0.05), "discopop", {"beta": 0.1, "discopop_tau": 0.05}),
        (AOT(beta=0.3, label_smoothing=0.1), "aot", {"beta": 0.3, "label_smoothing": 0.1}),
        (AOT(beta=0.3, variant="unpaired"), "aot_unpaired", {"beta": 0.3}),
        (FDPO(beta=0.3), "sigmoid", {"beta": 0.3, "f_divergence_type": "js_divergence"}),
        (FDPO(beta=0.3, divergence="forward_kl"), "sigmoid", {"beta": 0.3, "f_divergence_type": "forward_kl"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_equals_trls_dpo_trainer(loss: alignzoo.Loss, kind: str, settings: dict[str, Any]) -> None:
    for seed in (0, 1, 2):
        batch = make_pairs(seed, n=8, requires_grad=True)
        if isinstance(loss, AOT):
            batch = prepared(loss, batch)
        same_as(trl_dpo(batch, kind, **settings), loss, batch, rel=1e-6 if kind == "exo_pair" else 1e-9)


def test_fdpos_alpha_is_one_less_trls() -> None:
    """In float32, the only type in which TRL has this divergence."""
    batch = make_pairs(3, requires_grad=True, dtype=torch.float32)
    expected = trl_dpo(batch, "sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7)
    same_as(expected, FDPO(divergence="alpha", alpha=0.3), batch, rel=1e-5)


def test_wpo_is_trls_weighting() -> None:
    batch = with_squares(make_pairs(4, requires_grad=True))
    same_as(trl_dpo(batch, "sigmoid", beta=0.3, use_weighting=True), WPO(beta=0.3), batch)


def test_rpo_is_trls_sum_where_lengths_agree() -> None:
    """TRL averages over the tokens of the batch, the paper over those of each completion."""
    rows = [[[-1.0, -0.5, -2.0], [-0.1, -3.0, -0.7]], [[-0.2, -2.0, -1.0], [-1.5, -0.3, -0.4]]]
    sides = [completion(policy, policy[::-1], requires_grad=True) for policy in rows]
    batch = alignzoo.Pairs(chosen=sides[0], rejected=sides[1])
    same_as(trl_dpo(batch, ["sigmoid", "sft"], beta=0.3), RPO(beta=0.3), batch)
    assert total(RPO(beta=0.3)(make_pairs(0))).item() != pytest.approx(
        trl_dpo(make_pairs(0), ["sigmoid", "sft"], beta=0.3).item(), rel=1e-3
    )


# --- TRL's CPOTrainer and SFTTrainer ----------------------------------------------------------------------------------


def trl_cpo(batch: alignzoo.Pairs, kind: str, average: bool, **settings: Any) -> torch.Tensor:
    """CPOTrainer.cpo_loss of TRL 1.16, a mean over pairs."""
    needs_trl()
    from trl.experimental.cpo import CPOTrainer

    values = {"beta": 0.1, "alpha": 0.0, "simpo_gamma": 0.5, "label_smoothing": 0.0, **settings}
    this = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), loss_type=kind, **values)
    sides = [side.mean() if average else side.sum() for side in (batch.chosen, batch.rejected)]
    losses, _, _ = CPOTrainer.cpo_loss(this, *sides)
    assert isinstance(losses, torch.Tensor)
    return losses.mean()


@pytest.mark.parametrize(
    ("loss", "kind", "settings"),
    [
        (SimPO(beta=2.0, gamma=0.7), "simpo", {"beta": 2.0, "simpo_gamma": 0.7}),
        (AlphaPO(beta=2.5, alpha=0.25, gamma=0.1), "simpo", {"beta": 2.5, "alpha": 0.25, "simpo_gamma": 0.1}),
        (CPO(beta=0.3, nll_weight=0.0), "sigmoid", {"beta": 0.3}),
    ],
)
def test_equals_trls_cpo_trainer(loss: alignzoo.Loss, kind: str, settings: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    for seed in (0, 1):
        batch = make_pairs(seed, requires_grad=True)
        same_as(trl_cpo(batch, kind, average=kind == "simpo", **settings), loss, batch)


def test_dft_is_trls() -> None:
    """SFTTrainer.compute_loss of TRL 1.16 with loss_type "dft", whose rows keep zeros where no token counts."""
    needs_trl()
    from trl import SFTTrainer

    part = make_demonstrations(3, requires_grad=True).completion
    log_probs, nothing = part.policy.masked_fill(~part.mask, 0.0), torch.zeros(part.mask.shape)
    outputs = SimpleNamespace(log_probs=log_probs, label_mask=part.mask, entropy=nothing, is_top1=nothing)
    this = SimpleNamespace(
        model=SimpleNamespace(training=False), aux_loss_enabled=False, compute_loss_func=None, label_smoother=None,
        accelerator=SimpleNamespace(parallelism_config=None, num_processes=1, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(loss_type="dft", average_tokens_across_devices=False),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
    )  # fmt: skip
    expected = SFTTrainer.compute_loss(this, lambda **_: outputs, {})
    (slope,) = torch.autograd.grad(expected, part.policy)
    batch = alignzoo.Demonstrations(completion=part)
    assert total(DFT()(batch)).item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(gradients(DFT(), batch)["completion"], slope)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_dft_by_hand() -> None:
    """Tokens of probability 1/2 and 1/4: p log 1/p, slopes -p over 3 tokens; the certain one costs nothing."""
    half, quarter = math.log(0.5), math.log(0.25)
    batch = alignzoo.Demonstrations(completion=completion([[half, 0.0], [quarter]], requires_grad=True))
    assert units(DFT()(batch)) == pytest.approx([-half / 2, 0.0, -quarter / 4])
    found = gradients(DFT(), batch)["completion"]
    assert found[batch.completion.mask].tolist() == pytest.approx([-1 / 6, -1 / 3, -1 / 12])
    assert (found[~batch.completion.mask] == 0).all()
    other = make_demonstrations(2)
    expected = [math.exp(p) * -p for row in tokens(other.completion.policy, other.completion.mask) for p in row]
    assert units(DFT()(other)) == pytest.approx(expected)


def test_wpo_weighs_dpo_by_both_answers() -> None:
    """Per token 1 and 2 nats above the aligned level on one side, 3 below on the other: e^(3/2 - 3)."""
    chosen = dataclasses.replace(
        completion([[-1.0, -1.0]], [[-1.0, -1.0]]), log_sum_sq_probs=torch.tensor([[-2.0, -3.0, 9.0]])
    )
    rejected = dataclasses.replace(completion([[-4.0]], [[-4.0]]), log_sum_sq_probs=torch.tensor([[-1.0, 9.0]]))
    output = WPO()(alignzoo.Pairs(chosen=chosen, rejected=rejected))
    assert units(output) == pytest.approx([math.exp(1.5 - 3.0) * math.log(2)])
    assert output.metrics["pair_weight"].tolist() == pytest.approx([math.exp(-1.5)])  # type: ignore[union-attr]


def test_where_the_policy_is_the_reference() -> None:
    """The values that the pages name."""
    rows = [[-0.5, -3.0], [-1.0], [-2.0, 0.0]]
    batch = alignzoo.Pairs(chosen=completion(rows, rows), rejected=completion(rows[::-1], rows[::-1]))
    for loss, expected in (
        (Robust(), math.log(2)), (APO(), 1.0), (APO(variant="down"), 1.0), (SPPO(), 500000.0), (NCA(), 2 * math.log(2)),
        (EXO(), -math.log(2) - 0.5 * math.log(0.999) - 0.5 * math.log(0.001)), (BCO(shift="none"), 2 * math.log(2)),
        (DiscoPOP(), 0.5 * math.log(2) + 0.5), (FDPO(), math.log(2)), (prepared_aot := AOT(), math.log(2)),
    ):  # fmt: skip
        given = prepared(loss, batch) if loss is prepared_aot else batch
        assert units(loss(given)) == pytest.approx([expected] * 3, rel=1e-12), loss.name


def test_robust_is_unbiased_under_flipped_labels() -> None:
    """Of labels that are wrong with probability eps, the expectation is DPO's loss on the right ones."""
    batch = make_pairs(5)
    swapped = alignzoo.Pairs(chosen=batch.rejected, rejected=batch.chosen)
    loss, clean = Robust(beta=0.4, label_smoothing=0.2), Robust(beta=0.4, label_smoothing=0.0)
    mixture = [0.8 * r + 0.2 * w for r, w in zip(units(loss(batch)), units(loss(swapped)), strict=True)]
    assert mixture == pytest.approx(units(clean(batch)))


def test_discopop_has_the_optima_that_the_paper_names() -> None:
    """With beta and tau of 0.05: no slope at differences of -2.3714 and 1.44012 nats, downhill to the left of 0."""
    batch = pairs_with_log_ratios([-2.3714, 1.44012, 0.0], [0.0] * 3, requires_grad=True)
    slopes = gradients(DiscoPOP(), batch)["chosen"][:, 0].tolist()
    assert slopes[:2] == pytest.approx([0.0, 0.0], abs=1e-6) and slopes[2] > 1e-2


def test_discopop_far_on_the_wrong_side_is_logistic() -> None:
    """h = -1000: TRL's product of 0 and infinity is no number."""
    batch = pairs_with_log_ratios([-1e4], [0.0], dtype=torch.float32, requires_grad=True)
    assert units(DiscoPOP(beta=0.1)(batch)) == pytest.approx([1000.0])
    assert gradients(DiscoPOP(beta=0.1), batch)["chosen"][0, 0].item() == pytest.approx(-0.1)


@pytest.mark.parametrize(
    "make", [lambda: AlphaPO(alpha=0.0), lambda: EXO(label_smoothing=0.0), lambda: DiscoPOP(tau=0.0)]
)
def test_settings_have_bounds(make: Any) -> None:
    with pytest.raises((alignzoo.AlignzooError, ValueError)):
        make()


# --- aot: over the whole step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paired", "unpaired"])
def test_aot_in_parts_is_aot_as_a_whole(variant: str) -> None:
    """Parts of a step, each with its slice of what `prepare` gave, add up to value and gradient of the sort."""
    loss = AOT(beta=0.3, variant=variant)
    batch = prepared(loss, make_pairs(1, n=9, requires_grad=True))
    chosen, rejected = batch.chosen, batch.rejected
    if variant == "paired":
        u, v = chosen.sum() - rejected.sum(), chosen.sum() - rejected.sum() - chosen.log_ratio() + rejected.log_ratio()
        v = v.detach()
    else:
        u, v = chosen.log_ratio(), rejected.log_ratio()
    objective = -torch.nn.functional.logsigmoid(0.3 * (u.sort().values - v.sort().values)).sum()
    slopes = torch.autograd.grad(objective, [chosen.policy, rejected.policy])

    def part(rows: slice) -> alignzoo.Pairs:
        def cut(side: alignzoo.LogProbs) -> alignzoo.LogProbs:
            return dataclasses.replace(
                side, policy=side.policy[rows], mask=side.mask[rows], reference=side.reference[rows]
            )

        partner = batch.step["partner"].view(-1, 2)[rows].flatten()
        return alignzoo.Pairs(chosen=cut(chosen), rejected=cut(rejected), step={"partner": partner})

    found = sum(loss(part(rows)).loss.sum() for rows in (slice(0, 2), slice(2, 3), slice(3, 9)))
    assert isinstance(found, torch.Tensor)
    assert found.item() == pytest.approx(objective.item(), rel=1e-10)
    for mine, slope in zip(torch.autograd.grad(found, [chosen.policy, rejected.policy]), slopes, strict=True):
        assert torch.allclose(mine, slope, atol=1e-12)


# --- bco: the reward shift --------------------------------------------------------------------------------------------


def test_the_shift_of_bco_is_a_mean_over_all_steps() -> None:
    """beta 0.1; step one: chosen 30 and 10, rejected -10 and -20 nats; step two: chosen 40, rejected 0."""
    loss, state = BCO(beta=0.1), BCO().init_state()
    for chosen, rejected, expected in (([30.0, 10.0], [-10.0, -20.0], 0.25), ([40.0], [0.0], (8 / 3 - 1) / 2)):
        batch = pairs_with_log_ratios(chosen, rejected)
        step = alignzoo.Step(rows=torch.arange(len(chosen)), chosen=stats(batch.chosen), rejected=stats(batch.rejected))
        values, state = loss.prepare(step, state)
        assert values["shift"].item() == pytest.approx(expected)
        given = dataclasses.replace(batch, step=values)
        losses = [
            math.log1p(math.exp(expected - 0.1 * w)) + math.log1p(math.exp(0.1 * x - expected))
            for w, x in zip(chosen, rejected, strict=True)
        ]
        assert units(loss(given)) == pytest.approx(losses)
        check_output(loss, given, loss(given))


def test_the_shift_of_unpaired_bco_weighs_both_labels_alike() -> None:
    """Three desirable rows of 10 nats and one other of -20, beta 0.1: half of 1 and half of -2. Then one label only."""
    loss, state = UnpairedBCO(beta=0.1), UnpairedBCO().init_state()
    for ratios, labels, expected in (([10.0, 10.0], [True, True], 1.0), ([10.0, -20.0], [True, False], -0.5)):
        batch = labelled_with_log_ratios(ratios, labels)
        step = alignzoo.Step(rows=torch.arange(2), completion=stats(batch.completion), label=batch.label)
        values, state = loss.prepare(step, state)
        assert values["shift"].item() == pytest.approx(expected)
        output = loss(dataclasses.replace(batch, step=values))
        wrong = [0.1 * r - expected if not good else expected - 0.1 * r for r, good in zip(ratios, labels, strict=True)]
        assert units(output) == pytest.approx([math.log1p(math.exp(w)) for w in wrong])
        assert output.threshold is not None and output.threshold.item() == pytest.approx(expected)


# --- through the engine -----------------------------------------------------------------------------------------------

ENGINE = {
    "simpo": SimPO(), "alphapo": AlphaPO(), "cpo": CPO(), "robust": Robust(), "apo": APO(), "sppo": SPPO(beta=0.05),
    "nca": NCA(beta=0.05), "exo": EXO(), "rpo": RPO(), "discopop": DiscoPOP(), "wpo": WPO(), "fdpo": FDPO(),
    "aot": AOT(beta=0.05), "aot unpaired": AOT(beta=0.05, variant="unpaired"), "bco": BCO(),
    "bco unpaired": UnpairedBCO(beta=0.05), "dft": DFT(),
}  # fmt: skip


@pytest.mark.parametrize("name", ENGINE)
def test_a_step_does_not_depend_on_the_micro_batches(name: str) -> None:
    loss = ENGINE[name]
    trees = make_trees(7, 3, 1 if loss.data == "demonstrations" else 2)
    trees = labelled(trees) if loss.data == "labelled" else trees
    trees = [dataclasses.replace(t, mismatched=None) for t in trees]
    whole, metrics = update_of(loss, trees, engine__tokens_per_device=100_000, train__learning_rate=1.0)
    assert whole.norm() > 1e-2
    for budget in (1, 60):
        update, again = update_of(loss, trees, engine__tokens_per_device=budget, train__learning_rate=1.0)
        assert error(update, whole) < 1e-5
        for key in metrics.keys() - {"tokens_per_second", "memory", "padding_fraction", "shared_fraction"}:
            assert again[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-5), key
