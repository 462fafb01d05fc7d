"""Token trees against the plain padded forward with all logits: models, shapes, losses, and what `auto` does."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, make_tree, make_trees, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_models import CONFIGS, LONGEST, chosen, make_engine, make_model, make_recipe
from layouts_of_models import EXPECTED
from layouts_of_models import TREES as TREES_IN_WORDS
from peft import LoraConfig, get_peft_model
from ranks_worker import LOSSES, case, train
from test_logprobs import plain
from test_parity import assert_same

from alignzoo import attention
from alignzoo.batch import PADDED, TREES, Layout, Way, packed_positions, padded_layout, plan_step, tree_layout
from alignzoo.errors import RecipeError
from alignzoo.loading import choose_layout
from alignzoo.logprobs import Scorer, is_mixture_of_experts
from alignzoo.tree import Completion, Tree

PACKED = Way(packed=True)
CAN = [name for name, words in EXPECTED.items() if words == TREES_IN_WORDS]


def of_sizes(prompt: int, *completions: int, row: int = 0) -> Tree:
    rng = np.random.default_rng([prompt, *completions, row])
    ids = [rng.integers(3, VOCABULARY, n).astype(np.int32) for n in (prompt, *completions)]
    return Tree(row, ids[0], tuple(Completion(c) for c in ids[1:]), where=f"made.jsonl:{row + 1}")


def packing_llama(**changes: Any) -> Any:
    model = tiny_llama(**changes).double()
    attention.enable(model)
    return model


def in_one_table(scores: torch.Tensor, layout: Layout) -> torch.Tensor:
    return scores.reshape(-1)[torch.from_numpy(layout.place)]


def alone(model: Any, trees: Sequence[Tree]) -> torch.Tensor:
    """Log-probs (N, T), each sequence forwarded by itself without any padding, from all logits."""
    single = [replace(t, completions=(c,)) for t in trees for c in t.completions]
    rows = [plain(model, padded_layout([one]))[0][0] for one in single]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


# --- the layout


def test_a_row_of_two_trees() -> None:
    one, two, three = (Completion(np.array(ids, np.int32)) for ids in ([20, 21], [30], [40, 41, 42]))
    three = replace(three, mask=np.array([False, True, True]))
    trees = [Tree(7, np.array([10, 11], np.int32), (one, two)), Tree(9, np.array([12], np.int32), (three,))]
    layout = tree_layout(trees)
    assert layout.input_ids.tolist() == [[10, 11, 20, 21, 30, 12, 40, 41, 42]]
    assert layout.position_ids is not None
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2, 3]]
    assert layout.nodes is not None
    assert layout.nodes.tolist() == [[2, -1], [2, 0], [1, 0], [1, -1], [3, 3]]
    assert layout.source.tolist() == [1, 2, 1, 5, 6, 7]  # the first token of each completion is the prompt's to predict
    assert layout.target.tolist() == [20, 21, 30, 40, 41, 42]
    assert layout.mask.tolist() == [[True, True, False], [True, False, False], [False, True, True]]
    assert layout.keys == ((7, 0), (7, 1), (9, 0))
    assert (layout.positions, layout.real_positions, layout.saved) == (9, 9, 2)
    alone = tree_layout(trees, shared=False)
    assert alone.input_ids.tolist() == [[10, 11, 20, 21, 10, 11, 30, 12, 40, 41, 42]]
    assert alone.position_ids is not None
    assert alone.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]]
    assert alone.nodes is not None
    assert alone.nodes.tolist() == [[4, -1], [3, -1], [4, -1]]
    assert alone.source.tolist() == [1, 2, 5, 7, 8, 9]
    assert alone.saved == 0


def test_a_mismatched_completion_goes_on_from_the_same_prompt() -> None:
    tree = replace(of_sizes(3, 2), mismatched=Completion(np.array([5, 6], np.int32)))
    layout = tree_layout([tree], mismatched=True)
    assert layout.keys == ((0, 0), (0, 1))
    assert layout.nodes is not None
    assert layout.nodes.tolist() == [[3, -1], [2, 0], [2, 0]]
    assert TREES.positions([tree], mismatched=True) == layout.positions == 7
    assert TREES.positions([tree]) == tree.tokens == 5


@pytest.mark.parametrize("way", [PADDED, PACKED, TREES])
def test_a_tree_without_a_prompt_token_is_refused(way: Way) -> None:
    with pytest.raises(ValueError, match=r"made\.jsonl:1"):
        way.layout([of_sizes(0, 3)])


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), ranks=st.integers(1, 4), budget=st.integers(1, 400), seed=st.integers(0, 99))
def test_a_packed_plan_fills_the_budget(n: int, ranks: int, budget: int, seed: int) -> None:
    trees = make_trees(n, seed)
    plan = plan_step(trees, ranks, budget, way=TREES)
    micro = [m for of_rank in plan for m in of_rank]
    assert sorted(i for m in micro for i in m) == list(range(n))
    costs = [packed_positions([trees[i] for i in m]) for m in micro]
    assert sum(costs) == sum(t.tokens for t in trees)  # no padding at all
    assert all(cost <= budget or len(m) == 1 for cost, m in zip(costs, micro, strict=True))
    if budget >= max(t.tokens for t in trees):  # first fit needs at most 1.7 times the fewest
        fewest = math.ceil(1.7 * sum(costs) / budget) + 1
        assert len(micro) <= math.ceil(fewest / ranks) * ranks
    counts = [len(of_rank) for of_rank in plan]
    assert max(counts) - min(counts) <= 1


def test_micro_batches_are_balanced() -> None:
    trees = make_trees(64, seed=1, longest=40)
    plan = plan_step(trees, 2, 500, way=TREES)
    costs = [packed_positions([trees[i] for i in m]) for of_rank in plan for m in of_rank]
    assert max(costs) < 1.05 * min(costs)
    assert len(costs) <= math.ceil(sum(costs) / 500) + 2


# --- exactness


@pytest.mark.parametrize("name", CAN)
def test_log_probs_and_gradients_are_the_plain_forwards(name: str) -> None:
    model = make_model(name)
    mixture = is_mixture_of_experts(model)
    if not mixture:  # the grouped matrix product of experts has no float64
        model = model.double()
    trees = make_trees(4, completions=3, longest=14)
    expected = alone(model, trees)
    (expected * torch.arange(1.0, 1 + len(expected))[:, None]).sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    attention.enable(model)
    for way in (TREES, PACKED):
        model.zero_grad()
        found = Scorer(model)(way.layout(trees))["logps"]
        assert (found - expected).abs().max() < (1e-3 if mixture else 1e-6)
        (found * torch.arange(1.0, 1 + len(found))[:, None]).sum().backward()
        error = sum((p.grad - wanted[n]).square().sum() for n, p in model.named_parameters() if p.grad is not None)
        assert error.sqrt() < (1e-3 if mixture else 1e-6) * sum(g.square().sum() for g in wanted.values()).sqrt()
    assert expected.abs().max() > 1


SHAPES = {
    "one completion": [of_sizes(5, 6), of_sizes(2, 9, row=1)],
    "16 completions": [of_sizes(7, *range(1, 17))],
    "single tokens": [of_sizes(4, 1, 1), of_sizes(3, 1, row=1)],
    "one-token prompts": [of_sizes(1, 3, 5), of_sizes(1, 1, row=1), of_sizes(1, 4, row=2)],
    "longer than the head's chunk": [of_sizes(9, 290, 40), of_sizes(3, 2, row=1)],
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    trees = SHAPES[name]
    model = packing_llama(max_position_embeddings=512)
    expected, _ = plain(model, padded_layout(trees))
    for way in (TREES, PACKED):
        assert (Scorer(model)(way.layout(trees))["logps"] - expected).abs().max() < 1e-9


def test_in_float32() -> None:
    """Both together in float32: log-probs within 1e-5, gradients within 1e-4 of the plain ones in float64."""
    trees, model = make_trees(5, longest=20), tiny_llama()
    exact = tiny_llama().double()
    expected, _ = plain(exact, padded_layout(trees))
    expected.sum().backward()
    attention.enable(model)
    found = Scorer(model)(TREES.layout(trees))["logps"]
    found.sum().backward()
    assert (found - expected).abs().max() < 1e-5
    ours, theirs = (torch.cat([p.grad.flatten().double() for p in m.parameters()]) for m in (model, exact))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("poisoned", [(0, 0), (0, 1), (1, 2)])
def test_a_poisoned_completion_moves_no_other(poisoned: tuple[int, int]) -> None:
    trees = make_trees(3, completions=3)
    scorer, (number, slot) = Scorer(packing_llama()), poisoned
    clean = scorer(TREES.layout(trees))["logps"]
    tree = trees[number]
    changed = [*tree.completions]
    changed[slot] = Completion((changed[slot].ids + 1) % VOCABULARY)
    trees[number] = replace(tree, completions=tuple(changed))
    after = scorer(TREES.layout(trees))["logps"]
    row = 3 * number + slot
    others = [n for n in range(9) if n != row]
    assert (after[others] - clean[others]).abs().max() < 1e-12
    assert (after[row] - clean[row]).abs().max() > 0.1


def test_gradient_checkpointing_changes_nothing() -> None:
    """The layers that run again in the backward pass see the layout too, also when another one came in between."""
    trees, gradients = make_trees(3), []
    for checkpointing in (False, True):
        model = packing_llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        scorer = Scorer(model)
        logps = scorer(TREES.layout(trees))["logps"]
        with torch.no_grad():
            scorer(PADDED.layout(make_trees(1, seed=9)))
        logps.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).abs().max() < 1e-10


def test_lora_and_its_base() -> None:
    trees = make_trees(4)
    model = tiny_llama().double()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    scorer = Scorer(adapted).eval()
    attention.enable(scorer.causal_lm)
    assert (scorer(TREES.layout(trees))["logps"] - scorer(padded_layout(trees))["logps"]).abs().max() < 1e-10
    with scorer.without_adapter():
        base = scorer(TREES.layout(trees))["logps"]
    expected, _ = plain(tiny_llama().double(), padded_layout(trees))
    assert (base - expected).abs().max() < 1e-10


def test_in_bf16() -> None:
    """As far from the exact log-probs as the padded rows are."""
    trees, model = make_trees(8, longest=20), tiny_llama()
    exact, _ = plain(tiny_llama().double(), padded_layout(trees))
    attention.enable(model)
    errors = []
    for way in (TREES, PADDED):
        with torch.autocast("cpu", torch.bfloat16):
            errors.append((Scorer(model)(way.layout(trees))["logps"] - exact).abs().mean().item())
    assert errors[0] < 1.5 * errors[1] + 1e-3
    assert errors[1] < 0.1


# --- losses through the engine


@pytest.fixture(scope="module")
def padded() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("options", [{}, {"engine__prefix_sharing": "off", "engine__tokens_per_device": 60}])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_moves_the_weights_as_with_padded_rows(
    loss: str, options: dict[str, Any], padded: dict[str, Any]
) -> None:
    if loss not in padded:
        padded[loss] = train(**case(loss))
    found = train(**case(loss, engine__packing="on", **options))
    assert_same(found, padded[loss], (loss, options), factor=10)  # sums of 300 tokens, rounded in another order
    last = found["records"][-2]
    assert last["padding_fraction"] == 0
    assert (last["shared_fraction"] > 0) == (not options and LOSSES[loss]().data == "pairs")


@pytest.mark.parametrize(
    "options",
    [{"engine__tokens_per_device": 1}, {"engine__tokens_per_device": 90}, {"engine__gradient_checkpointing": True}],
)
def test_budgets_and_checkpointing(options: dict[str, Any], padded: dict[str, Any]) -> None:
    if "dpo" not in padded:
        padded["dpo"] = train(**case("dpo"))
    assert_same(train(**case("dpo", engine__packing="on", **options)), padded["dpo"], options, factor=10)


# --- what `auto` does


@pytest.mark.parametrize("name", EXPECTED)
def test_auto(name: str) -> None:
    assert chosen(name) == EXPECTED[name]


def test_the_table_is_of_all_models() -> None:
    assert EXPECTED.keys() == CONFIGS.keys()


def choose(model: Any, frozen: Any = None, longest: int = LONGEST, **engine: Any) -> tuple[str, Any]:
    recipe = make_recipe(**engine)
    made = make_engine(model, recipe, frozen)
    return choose_layout(recipe, made, make_trees(1, longest=20)[0], longest), made


def test_what_the_recipe_asks_for() -> None:
    assert choose(tiny_llama())[1].way == TREES
    words, engine = choose(tiny_llama(), prefix_sharing="off")
    assert (words, engine.way) == ("layout: packed rows (no padding)", PACKED)
    words, engine = choose(tiny_llama(), packing="off")
    assert (words, engine.way) == ("layout: padded: engine.packing = off", PADDED)
    with pytest.raises(RecipeError, match="a packed row only"):
        make_recipe(packing="off", prefix_sharing="on")


@pytest.mark.parametrize("key", ["packing", "prefix_sharing"])
def test_a_recipe_that_insists_on_what_a_model_cannot(key: str) -> None:
    with pytest.raises(RecipeError, match=rf'engine\.{key} = "on", and the model cannot: it does not use'):
        choose(make_model("Bloom"), **{key: "on"})


def test_both_models_must_be_able() -> None:
    policy = tiny_llama()
    words, engine = choose(policy, make_model("Bloom"))
    assert words == "layout: padded: it does not use transformers' attention interface"
    assert engine.way == PADDED
    assert policy.config._attn_implementation == "sdpa"  # as it was


def test_a_model_that_computes_something_else_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention.tree_attention

    def causal(module: Any, query: Any, key: Any, value: Any, nodes: torch.Tensor, *rest: Any, **options: Any) -> Any:
        whole = torch.tensor([[[[query.shape[2], -1]]]], dtype=torch.int32)  # the row as one sequence
        return real(module, query, key, value, whole, *rest, **options)

    monkeypatch.setattr(attention, "tree_attention", causal)
    words, engine = choose(tiny_llama())
    assert words.startswith("layout: padded: its log-probs would differ by")
    assert engine.way == PADDED


def test_a_window_that_layers_keep_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "sliding_windows", lambda lm: [9, 9])
    assert choose(tiny_llama())[0] == "layout: padded: its layers do not tell their sliding window"
    assert choose(tiny_llama(), longest=9)[1].way == TREES


def test_generation_and_saving_are_as_before(tmp_path: Path) -> None:
    model, prompt = tiny_llama(), torch.tensor([[5, 6, 7], [0, 8, 9]])
    options = {"attention_mask": (prompt > 0).long(), "max_new_tokens": 8, "do_sample": False}
    before = model.generate(prompt, **options)
    attention.enable(model)
    assert torch.equal(model.generate(prompt, **options), before)
    model.save_pretrained(tmp_path)
    assert attention._PREFIX not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert (
        Scorer(model)(padded_layout(make_trees(3)))["logps"] - plain(tiny_llama(), padded_layout(make_trees(3)))[0]
    ).abs().max() < 1e-5


def test_eager_models_keep_their_own_attention_for_padded_rows() -> None:
    model = tiny_llama(attn_implementation="eager")
    expected, _ = plain(model, padded_layout(make_trees(3)))
    attention.enable(model)
    assert attention.original(model) == "eager"
    for way in (PADDED, TREES):
        assert (Scorer(model)(way.layout(make_trees(3)))["logps"] - expected).abs().max() < 1e-5


def completions_of(trees: Sequence[Tree]) -> int:
    return sum(len(t.completions) for t in trees)


def test_groups_of_many_sizes() -> None:
    rng = np.random.default_rng(3)
    trees = [make_tree(row, rng, completions=1 + row % 5) for row in range(9)]
    model = packing_llama()
    found = Scorer(model)(TREES.layout(trees))["logps"]
    assert len(found) == completions_of(trees)
    assert (found - plain(model, padded_layout(trees))[0]).abs().max() < 1e-9
