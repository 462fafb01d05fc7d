"""The engine: one step's gradient whatever the micro-batches, the contract of units, what stops a run."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from alignzoo_losses.dpo import DPO
from alignzoo_losses.sft import SFT
from conftest import make_trees, tiny_llama
from rich.console import Console

import alignzoo
from alignzoo.engine import Engine
from alignzoo.errors import PluginError, RunError
from alignzoo.logprobs import Scorer
from alignzoo.micro import Whole
from alignzoo.model import add_adapter
from alignzoo.recipe import LoRA, Recipe, load_recipe
from alignzoo.reference import ReferencePlan
from alignzoo.sharding import make_accelerator
from alignzoo.tree import Completion, Tree


def make_recipe(**overrides: Any) -> Recipe:
    """Plain SGD without clipping: AdamW would hide a loss that is wrong by a constant factor."""
    table = {
        "loss": {"name": "dpo"}, "model": {"path": "none"}, "data": {"train": "none"},
        "train": {"learning_rate": 0.05, "batch_size": 6, "optimizer": "sgd", "max_grad_norm": 0.0,
                  "lr_scheduler": "constant", "warmup_ratio": 0.0},
        "engine": {"device": "cpu"},
    }  # fmt: skip
    return load_recipe(table, {key.replace("__", "."): value for key, value in overrides.items()})


def make_engine(
    loss: alignzoo.Loss, model: Any, recipe: Recipe, kind: str = "frozen", reference: Any = None
) -> tuple[Engine, list[dict[str, float]]]:
    records: list[dict[str, float]] = []
    plan = ReferencePlan(kind if loss.needs_reference else "none", "")  # type: ignore[arg-type]
    frozen = Scorer(reference if reference is not None else copy.deepcopy(model)) if plan.kind == "frozen" else None
    engine = Engine(
        recipe, loss, Scorer(model), plan, frozen, make_accelerator(recipe),
        console=Console(file=io.StringIO()), sink=records.append,
    )  # fmt: skip
    return engine, records


class Mixed(alignzoo.Loss):
    """Two terms with different units, one of them masked by the data: per-token and per-example parts together."""

    name, data, needs_reference = "mixed", "pairs", True
    Settings = alignzoo.NoSettings

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        margin = batch.chosen.log_ratio() - batch.rejected.log_ratio()
        odd = batch.chosen.lengths % 2 == 1
        pair = alignzoo.LossOutput((margin - 3) ** 2, mask=odd, metrics={"odd": odd.float()})
        nll = alignzoo.LossOutput(-batch.chosen.policy, per="token", mask=batch.chosen.mask)
        return pair + 0.5 * nll


class Centred(alignzoo.Loss):
    """Uses the mean of the whole step, a state, and mismatched completions."""

    name, data, needs_reference = "centred", "labelled", True
    Settings = alignzoo.NoSettings
    needs_mismatched = True

    def init_state(self) -> dict[str, torch.Tensor]:
        return {"count": torch.zeros(())}

    def prepare(self, step: alignzoo.Step, state: dict[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        assert step.completion is not None
        assert step.mismatched is not None
        baseline = step.mismatched.log_ratio().mean() + step.mismatched.sum().mean() / 100
        rank = step.completion.sum().argsort().argsort().float()
        return {"baseline": baseline, "rank": rank}, {"count": state["count"] + 1}

    def __call__(self, batch: alignzoo.Labelled) -> alignzoo.LossOutput:
        sign = torch.where(batch.label, 1.0, -1.0)
        value = (batch.completion.log_ratio() - batch.step["baseline"]) * sign
        return alignzoo.LossOutput(
            torch.nn.functional.softplus(-value) * (1 + batch.step["rank"]), rewards=value.detach()
        )


def labelled(trees: Sequence[Tree]) -> list[Tree]:
    """One completion each with a label, the second one as the mismatched one."""
    return [replace(t, completions=t.completions[:1], mismatched=t.completions[1], label=t.row % 3 != 0) for t in trees]


def update_of(loss: alignzoo.Loss, trees: Sequence[Tree], **overrides: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """How far one SGD step on all trees moves the weights, and its metrics."""
    model, reference = tiny_llama(), tiny_llama(seed=1)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    recipe = make_recipe(**{"train__batch_size": len(trees), "train__max_steps": 1, **overrides})
    engine, records = make_engine(loss, model, recipe, reference=reference)
    engine.fit(trees, [])
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return after - before, records[-1]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


LOSSES = {"dpo": DPO, "sft": SFT, "mixed": Mixed, "centred": Centred}


def trees_for(loss: type[alignzoo.Loss], n: int = 7) -> list[Tree]:
    trees = make_trees(n, seed=3)
    return labelled(trees) if loss.data == "labelled" else trees if loss.data == "pairs" else make_trees(n, 3, 1)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_does_not_depend_on_the_micro_batches(name: str) -> None:
    loss = LOSSES[name]
    trees = trees_for(loss)
    whole, metrics = update_of(loss(), trees, engine__tokens_per_device=100_000)
    assert whole.norm() > 0.05
    for budget in (1, 40, 90):
        update, again = update_of(loss(), trees, engine__tokens_per_device=budget)
        assert error(update, whole) < 1e-5, budget
        for key in set(metrics) - {"tokens_per_second", "memory", "padding_fraction", "shared_fraction"}:
            assert again[key] == pytest.approx(metrics[key], rel=1e-5, abs=1e-6), key
    for seed in (1, 2):  # another order of the rows of the step
        update, _ = update_of(loss(), trees, engine__tokens_per_device=60, train__seed=seed)
        assert error(update, whole) < 1e-5


@pytest.mark.parametrize("name", ["sft", "mixed"])
def test_a_wrong_normalisation_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same test with every micro-batch divided by its own units, as peers did, must fail by far."""
    trees = trees_for(LOSSES[name])
    right, _ = update_of(LOSSES[name](), trees, engine__tokens_per_device=90)
    real = Engine._forward

    def wrong(self: Engine, round: Any, whole: Whole, *rest: Any) -> Any:
        return real(self, round, Whole(tuple(u * 3 for u in round.mine.units), whole.counted), *rest)

    monkeypatch.setattr(Engine, "_forward", wrong)
    update, _ = update_of(LOSSES[name](), trees, engine__tokens_per_device=90)
    assert error(update, right) > 1e-2


def test_the_gradient_is_that_of_the_loss_by_hand() -> None:
    """DPO over two micro-batches against one plain backward of the mean loss, from the plain model."""
    trees = make_trees(5, seed=3)
    update, metrics = update_of(DPO(beta=0.3), trees, engine__tokens_per_device=60)
    model, reference = tiny_llama(), tiny_llama(seed=1)

    def logp(lm: Any, tree: Tree, k: int) -> torch.Tensor:
        ids = torch.tensor([[*tree.prompt.tolist(), *tree.completions[k].ids.tolist()]])
        table = lm(ids).logits[0].log_softmax(-1)
        start = len(tree.prompt)
        return torch.stack([table[start + i - 1, ids[0, start + i]] for i in range(ids.shape[1] - start)]).sum()

    losses, margins = [], []
    for tree in trees:
        ratios = [logp(model, tree, k) - logp(reference, tree, k).detach() for k in (0, 1)]
        margins.append(0.3 * (ratios[0] - ratios[1]))
        losses.append(torch.log1p(torch.exp(-margins[-1])))
    loss = torch.stack(losses).mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert error(update, -0.05 * gradient) < 1e-5
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(torch.stack(margins).mean().item(), rel=1e-5)
    assert metrics["rewards/accuracies"] == sum(m > 0 for m in margins) / 5
    assert metrics["num_tokens"] == sum(t.tokens for t in trees)


def test_clipping_and_its_norm() -> None:
    free, metrics = update_of(DPO(), make_trees(4), train__max_grad_norm=0.0)
    clipped, same = update_of(DPO(), make_trees(4), train__max_grad_norm=0.1)
    assert metrics["grad_norm"] > 0.2
    assert same["grad_norm"] == pytest.approx(metrics["grad_norm"])
    assert clipped.norm() == pytest.approx(0.05 * 0.1, rel=1e-3)
    assert free.norm() == pytest.approx(0.05 * metrics["grad_norm"], rel=1e-4)


def test_a_short_last_step_is_divided_by_its_own_units() -> None:
    trees = make_trees(5)
    _, records = _fit(DPO(), trees, train__batch_size=4)
    assert [r["step"] for r in records] == [1, 2]
    assert [r["epoch"] for r in records] == [0.5, 1.0]
    assert records[1]["num_tokens"] == sum(t.tokens for t in trees)


def _fit(
    loss: alignzoo.Loss, trees: Sequence[Tree], held_out: Sequence[Tree] = (), **overrides: Any
) -> tuple[Engine, list[dict[str, float]]]:
    engine, records = make_engine(loss, tiny_llama(), make_recipe(**overrides), reference=tiny_llama(seed=1))
    engine.fit(trees, held_out)
    return engine, records


def test_evaluation_is_over_all_rows_and_leaves_no_trace() -> None:
    """Several blocks and micro-batches give the figures of one; neither weights nor state move; prepare sees blocks."""
    train, held_out = trees_for(Centred, 6), trees_for(Centred, 9)
    records = {}
    for budget in (30, 100_000):
        engine, found = _fit(
            Centred(), train, held_out, engine__tokens_per_device=budget, train__batch_size=4, eval__every_steps=1
        )
        records[budget] = found
        assert engine.state["count"] == 2  # two training steps, and no evaluation
    for one, other in zip(*records.values(), strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"tokens_per_second", "memory", "padding_fraction", "shared_fraction", "eval_runtime"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
    evaluations = [r for r in records[30] if "eval_loss" in r]
    assert [r["step"] for r in evaluations] == [0, 1, 2]
    assert evaluations[0]["eval_loss"] != pytest.approx(evaluations[1]["eval_loss"], rel=1e-3)


def test_the_reference_of_held_out_rows_is_computed_once() -> None:
    calls = []
    engine, _ = make_engine(DPO(), tiny_llama(), make_recipe(train__batch_size=3, eval__every_steps=1))
    assert engine.step_reference is not None
    inner: Any = engine.step_reference.inner
    score = inner.score
    inner.score = lambda layout: calls.append(layout.keys) or score(layout)
    trees = make_trees(6)
    engine.fit(trees, make_trees(4, seed=9))
    assert len(calls) == 2 + 2  # two held-out blocks once, two training steps


def test_policy_equal_to_reference_is_a_tie() -> None:
    engine, records = make_engine(DPO(), tiny_llama(), make_recipe())
    engine.evaluate(make_trees(5), 0, 0.0)
    assert records[0]["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert records[0]["eval_rewards/accuracies"] == 0.5
    assert records[0]["eval_rewards/ties"] == 1.0
    assert records[0]["eval_kl/chosen"] == pytest.approx(0, abs=1e-5)


def test_adapter_off_is_the_base_model() -> None:
    """LoRA with the adapter switched off against a frozen copy of the base: the same losses and updates."""
    updates = []
    for kind in ("adapter_off", "frozen"):
        base = tiny_llama()
        reference = copy.deepcopy(base)
        model = add_adapter(base, LoRA(rank=4), quantised=False)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        recipe = make_recipe(train__batch_size=4, train__max_steps=2)
        engine, records = make_engine(DPO(), model, recipe, kind=kind, reference=reference)
        engine.fit(make_trees(8), [])
        assert abs(records[0]["kl/chosen"]) > 0.05
        updates.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.allclose(*updates, atol=1e-6)


def test_a_nan_stops_the_run_before_the_weights_move() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = float("nan")
    trees = [
        Tree(i, np.array([4], np.int32), (Completion(np.array([7], np.int32)),) * 2, where=f"f:{i}") for i in range(4)
    ]
    trees[2] = Tree(2, np.array([50], np.int32), trees[2].completions, where="f:bad")
    before = copy.deepcopy(model.state_dict())
    engine, _ = make_engine(DPO(), model, make_recipe(train__batch_size=4, engine__tokens_per_device=4))
    with pytest.raises(RunError, match=r"step 1: .* not finite(.|\n)*f:bad"):
        engine.fit(trees, [])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or name == "model.embed_tokens.weight"


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    class Kink(alignzoo.Loss):
        name, data, needs_reference = "kink", "pairs", False
        Settings = alignzoo.NoSettings

        def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
            zero = (batch.chosen.sum() - batch.chosen.sum().detach()).abs()
            return alignzoo.LossOutput(zero.sqrt())  # 0, with an infinite slope

    engine, _ = make_engine(Kink(), tiny_llama(), make_recipe())
    before = engine.bare.model.lm_head.weight.detach().clone()
    with pytest.raises(RunError, match="gradient is not finite"):
        engine.fit(make_trees(3), [])
    assert torch.equal(engine.bare.model.lm_head.weight, before)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda b: b.chosen.sum(), "not a LossOutput"),
        (lambda b: alignzoo.LossOutput(b.chosen.sum().mean()), r"wanted \(3,\)"),
        (lambda b: alignzoo.LossOutput(-b.chosen.policy, per="token"), "needs its mask"),
        (lambda b: alignzoo.LossOutput(-b.chosen.policy[:, :1], per="token", mask=b.chosen.mask[:, :1]), "wanted"),
        (lambda b: alignzoo.LossOutput(b.chosen.sum(), mask=b.chosen.sum()), "wanted bool"),
        (lambda b: alignzoo.LossOutput(b.chosen.sum(), metrics={"x": b.chosen.sum().mean().detach()}), "scalar"),
        (lambda b: alignzoo.LossOutput(b.chosen.sum(), metrics={"x": b.chosen.sum()}), "detached"),
        (lambda b: alignzoo.LossOutput(b.chosen.sum(), metrics={"loss": b.chosen.lengths}), "own"),
        (lambda b: alignzoo.LossOutput(b.chosen.sum(), metrics={"rewards/x": b.chosen.lengths}), "own"),
        (lambda b: alignzoo.LossOutput(b.chosen.sum(), rewards=(b.chosen.sum().detach(),)), "rewards"),
        (lambda b: alignzoo.LossOutput(b.chosen.sum(), rewards=b.chosen.sum().detach()), "rewards"),
        (lambda b: alignzoo.LossOutput(b.chosen.sum(), mask=b.chosen.mean() < -2), "units"),
    ],
)
def test_a_loss_that_breaks_the_contract_is_named(returned: Any, message: str) -> None:
    class Broken(alignzoo.Loss):
        name, data, needs_reference = "broken", "pairs", False
        Settings = alignzoo.NoSettings

        def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
            return returned(batch)  # type: ignore[no-any-return]

    with pytest.raises(PluginError, match=f'"broken"(.|\n)*{message}'):
        _fit(Broken(), make_trees(3))


def test_rewards_are_what_the_loss_says_they_are() -> None:
    """Without rewards the log-ratios are logged, or the log-probs per token; never under the name of rewards."""
    _, records = _fit(Mixed(), make_trees(4))
    assert "log_ratios/margins" in records[0]
    assert not [name for name in records[0] if name.startswith("rewards/")]
    _, records = _fit(DPO(reference_free=True), make_trees(4))
    assert "rewards/margins" in records[0]
    assert "kl/chosen" not in records[0]


def test_bf16_on_a_cpu_is_near_fp32() -> None:
    exact, metrics = update_of(DPO(), make_trees(6))
    rough, near = update_of(DPO(), make_trees(6), engine__precision="bf16")
    assert 1e-5 < error(rough, exact) < 0.1
    assert near["loss"] == pytest.approx(metrics["loss"], rel=0.05)


def test_the_router_loss_of_experts_is_added_and_logged() -> None:
    import transformers as tf

    def fit(weight: float) -> tuple[torch.Tensor, dict[str, float]]:
        torch.manual_seed(0)
        config = tf.MixtralConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
        )  # fmt: skip
        model = tf.MixtralForCausalLM(config)
        start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        recipe = make_recipe(train__batch_size=4, train__max_steps=1, model__router_loss=weight)
        records: list[dict[str, float]] = []
        engine = Engine(
            recipe, SFT(), Scorer(model, router_loss=weight > 0), ReferencePlan("none", ""), None,
            make_accelerator(recipe), console=Console(file=io.StringIO()), sink=records.append,
        )  # fmt: skip
        engine.fit(make_trees(4, completions=1), [])
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - start, records[-1]

    (without, _), (with_it, metrics) = fit(0.0), fit(10.0)
    assert 1 < metrics["router_loss"] < 4  # 2 for two experts of a token and an even spread
    assert error(with_it, without) > 0.01


def test_token_statistics_and_kept_columns_reach_the_loss() -> None:
    seen: dict[str, torch.Tensor] = {}

    class Curious(alignzoo.Loss):
        name, data, needs_reference = "curious", "demonstrations", False
        Settings = alignzoo.NoSettings
        token_stats = frozenset({"entropy", "is_top1"})

        def __call__(self, batch: alignzoo.Demonstrations) -> alignzoo.LossOutput:
            assert batch.completion.entropy is not None
            assert batch.completion.is_top1 is not None
            assert batch.completion.log_sum_sq_probs is None
            if batch.completion.policy.requires_grad:
                seen["entropy"], seen["score"] = batch.completion.entropy, batch.extra["score"]
            return alignzoo.LossOutput(-batch.completion.sum() * batch.extra["score"])

    trees = [replace(t, extra={"score": 0.5 + t.row}) for t in make_trees(3, completions=1)]
    _fit(Curious(), trees, engine__tokens_per_device=100_000)
    assert sorted(seen["score"].tolist()) == [0.5, 1.5, 2.5]
    assert seen["score"].dtype == torch.float32
    assert not seen["entropy"].requires_grad
    assert seen["entropy"].max() > 1
