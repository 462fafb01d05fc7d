"""Scalar heads: where scores are read, in every layout; the loss bradley_terry; whole runs to a reward model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alignzoo_losses.bradley_terry import BradleyTerry
from conftest import make_trees, tiny_llama
from runs_helpers import write_recipe
from test_engine import make_engine, make_recipe
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import alignzoo
from alignzoo.batch import PADDED, TREES, Way
from alignzoo.check import make_job
from alignzoo.declared import check_loss_class
from alignzoo.errors import AlignzooError, ModelError, PluginError, RecipeError
from alignzoo.export import export
from alignzoo.loading import make_packed
from alignzoo.logprobs import Scorer, check_scorer, read_at
from alignzoo.metrics import Accumulator, record
from alignzoo.mixture import Mixture
from alignzoo.model import add_adapter, labels_of, load_model, locate, with_scalar_head
from alignzoo.objective import Objective, Scored
from alignzoo.plugins import discover
from alignzoo.recipe import LoRA, Model, load_recipe
from alignzoo.runner import Enough
from alignzoo.testing import make_batch
from alignzoo.tree import Tree

PAD, WAYS = 0, [PADDED, Way(packed=True), TREES]


def scalar_llama(seed: int = 0, *, pad: int | None = PAD, **changes: Any) -> Any:
    """A tiny Llama with a scalar head, its scores some units apart."""
    model = with_scalar_head(tiny_llama(seed, **changes), seed, lambda _: None)
    model.config.pad_token_id = pad
    with torch.no_grad():
        model.score.weight.mul_(20)
    return model


def packable(model: Any) -> Scorer:
    """A scorer whose model computes packed rows."""
    scorer = Scorer(model)
    recipe, engine = make_recipe(), SimpleNamespace(accelerator=SimpleNamespace(mixed_precision="no"))
    assert make_packed(recipe, engine, scorer, scorer, TREES, make_trees(1)[0], 64) == ""  # type: ignore[arg-type]
    return scorer


def by_transformers(model: Any, trees: list[Tree]) -> torch.Tensor:
    """(N,) of the class's own forward, padded on the right with its pad token."""
    rows = [[*t.prompt.tolist(), *c.ids.tolist()] for t in trees for c in t.completions]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return model(input_ids=ids, attention_mask=mask).logits[:, 0]  # type: ignore[no-any-return]


# --- where it is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_scores_are_those_of_transformers_at_the_last_token(way: Way) -> None:
    model, trees = scalar_llama().double(), make_trees(5)
    expected = by_transformers(model, trees)
    found = packable(model)(way.layout(trees))
    assert found.keys() == {"score"} and found["score"].shape == (10,)
    assert (found["score"] - expected).abs().max() < 1e-6
    assert expected.std() > 0.5


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("tokens", [1, 2, 99])
def test_a_pad_token_at_the_end_of_a_completion_is_passed_over_as_transformers_does(way: Way, tokens: int) -> None:
    """The pad token may be EOS too; where a completion holds nothing else, the score is read at the prompt's end."""
    model, trees = scalar_llama().double(), make_trees(3)
    for completion in trees[1].completions:
        completion.ids[-min(tokens, len(completion.ids)) :] = PAD
    found = packable(model)(way.layout(trees))["score"]
    assert (found - by_transformers(model, trees)).abs().max() < 1e-6
    layout = way.layout(trees)
    moved = read_at(layout, PAD) - layout.ends
    assert (moved[[0, 1, 4, 5]] == 0).all() and (moved[2:4] < 0).all()
    assert read_at(layout, None) is layout.ends


@pytest.mark.parametrize("way", WAYS[1:], ids=lambda way: way.name)
def test_gradients_in_packed_rows_are_those_of_the_plain_padded_form(way: Way) -> None:
    trees, loss = make_trees(6), BradleyTerry(center_rewards_coefficient=0.1)
    model = scalar_llama().double()
    scorer, layout = packable(model), way.layout(trees)
    batch = Objective(loss).batch(Scored(trees, layout, scorer(layout), None))
    found = torch.autograd.grad(Objective(loss)(batch).loss.sum(), list(model.parameters()))
    plain = scalar_llama().double()
    scores = by_transformers(plain, trees)
    chosen, rejected = scores[::2], scores[1::2]
    total = (-torch.nn.functional.logsigmoid(chosen - rejected) + 0.1 * (chosen + rejected) ** 2).sum()
    for ours, theirs in zip(found, torch.autograd.grad(total, list(plain.parameters())), strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * max(1.0, theirs.abs().max().item())


def test_a_head_that_is_misread_is_refused() -> None:
    model, layout = scalar_llama(), PADDED.layout(make_trees(2))
    check_scorer(Scorer(model), layout)
    model.forward = lambda **options: SimpleNamespace(logits=type(model).forward(model, **options).logits + 1)
    with pytest.raises(ModelError, match="scores differ from the model's own logits by 1"):
        check_scorer(Scorer(model), layout)


# --- the head ---------------------------------------------------------------------------------------------------------


def test_a_fresh_head_depends_on_the_seed_alone() -> None:
    heads = []
    for seed, before in ((1, 0), (1, 99), (2, 0)):
        lm = tiny_llama()
        torch.manual_seed(before)
        state = torch.get_rng_state()
        heads.append(with_scalar_head(lm, seed, lambda _: None).score)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    assert heads[0].weight.shape == (1, 32) and heads[0].bias is None and heads[0].weight.requires_grad


def test_gpt2_and_a_family_without_such_a_class(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

    small = {"vocab_size": 97, "num_hidden_layers": 2, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64}
    model = with_scalar_head(GPT2LMHeadModel(GPT2Config(**small, pad_token_id=PAD)).eval(), 0, lambda _: None)
    trees = make_trees(3)
    assert (Scorer(model)(PADDED.layout(trees))["score"] - by_transformers(model, trees)).abs().max() < 1e-5
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(ModelError, match="no sequence classifier on the body of MambaForCausalLM"):
        with_scalar_head(MambaForCausalLM(config), 0, lambda _: None)


def test_an_adapter_trains_the_head_whole_and_saves_it(tiny_folder: Path, tmp_path: Path) -> None:
    settings = Model(path=str(tiny_folder), head="scalar")
    base = load_model(locate(str(tiny_folder)), settings, lambda _: None, seed=3)
    model = add_adapter(copy.deepcopy(base), LoRA(rank=4), quantised=False)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "base_model.model.score.modules_to_save.default.weight" in trained and len(trained) == 29
    tokens = make_trees(2)
    before = Scorer(base)(PADDED.layout(tokens))["score"]
    scorer = Scorer(model)
    assert torch.equal(scorer(PADDED.layout(tokens))["score"], before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    expected = scorer(PADDED.layout(tokens))["score"]
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tiny_folder)})
    )
    assert labels_of(locate(str(tmp_path / "adapter"))) == 1
    merged = load_model(locate(str(tmp_path / "adapter")), settings, lambda _: None)
    assert (Scorer(merged)(PADDED.layout(tokens))["score"] - expected).abs().max() < 1e-4


# --- the loss ---------------------------------------------------------------------------------------------------------


def by_trl(monkeypatch: pytest.MonkeyPatch, chosen: torch.Tensor, rejected: torch.Tensor, **settings: Any) -> Any:
    """TRL's loss of these scores, and its metrics."""
    from trl import RewardTrainer

    monkeypatch.setattr(RewardTrainer, "__del__", lambda _: None, raising=False)
    trainer, metrics = RewardTrainer.__new__(RewardTrainer), {"eval": {}}
    alike = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    names = ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")
    metrics["eval"] = {name: [] for name in names}
    margin = settings.pop("margin", None)
    trainer.__dict__.update(
        model=SimpleNamespace(training=False), accelerator=alike, _metrics=metrics, _total_train_tokens=0,
        args=SimpleNamespace(center_rewards_coefficient=settings.get("center_rewards_coefficient")),
    )  # fmt: skip
    logits = torch.cat([chosen, rejected]).unsqueeze(-1)
    inputs = {} if margin is None else {"margin": margin}
    loss = trainer.compute_loss(lambda **_: SimpleNamespace(logits=logits), inputs)
    return loss, metrics["eval"]


@pytest.mark.parametrize("settings", [{}, {"center_rewards_coefficient": 0.3}, {"margin": "gap"},
                                      {"center_rewards_coefficient": 0.01, "margin": "gap"}])  # fmt: skip
def test_value_gradient_and_metrics_are_those_of_trl(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = BradleyTerry(**settings)
    batch = make_batch(loss, rows=7, dtype=torch.float64, columns=loss.columns)
    scores = (batch.chosen.score, batch.rejected.score)
    margin = {"margin": batch.extra["gap"]} if "margin" in settings else {}
    theirs, metrics = by_trl(monkeypatch, *scores, **{**settings, **margin})
    output = Objective(loss)(batch)
    assert output.loss.mean().item() == pytest.approx(theirs.item(), abs=1e-12)
    ours, other = (torch.autograd.grad(value, scores, retain_graph=True) for value in (output.loss.mean(), theirs))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(ours, other, strict=True))
    logged = Accumulator()
    record(logged, loss.name, batch, output)
    found = logged.result()
    assert found["rewards/margins"] == pytest.approx(metrics["margin"][0], abs=1e-6)
    assert found["rewards/accuracies"] == pytest.approx(metrics["accuracy"][0], abs=1e-6)


def pair_of(chosen: float, rejected: float, **extra: float) -> alignzoo.ScoredPairs:
    sides = (alignzoo.CompletionScores(torch.tensor([s], dtype=torch.float64), torch.tensor([3]))
             for s in (chosen, rejected))  # fmt: skip
    columns = {name: torch.tensor([value], dtype=torch.float64) for name, value in extra.items()}
    return alignzoo.ScoredPairs(**dict(zip(("chosen", "rejected"), sides, strict=True)), extra=columns)


def test_numbers_by_hand() -> None:
    """sigmoid(log 3) = 3/4. A margin of 1 takes one off the lead; the sum of the two squared is 9."""
    log = torch.log(torch.tensor(3.0, dtype=torch.float64)).item()
    assert BradleyTerry()(pair_of(log, 0.0)).loss.item() == pytest.approx(0.2876820724517809, abs=1e-15)
    assert BradleyTerry(margin="m")(pair_of(1 + log, 0.0, m=1.0)).loss.item() == pytest.approx(0.28768207245, abs=1e-10)
    centred = BradleyTerry(center_rewards_coefficient=0.01)(pair_of(1.5, 1.5)).loss.item()
    assert centred == pytest.approx(0.6931471805599453 + 0.09, abs=1e-15)


# --- what is declared -------------------------------------------------------------------------------------------------


def test_a_loss_of_scores_cannot_ask_for_log_probs() -> None:
    def loss(**attributes: Any) -> type[alignzoo.Loss]:
        own = {"name": "x", "data": "pairs", "Settings": alignzoo.NoSettings, "needs_reference": False,
               "needs_scores": True, "__call__": lambda self, batch: None}  # fmt: skip
        return type("X", (alignzoo.Loss,), own | attributes)

    check_loss_class(loss())
    check_loss_class(loss(prepare=lambda self, step, state: ({}, state), prepare_pass=False))
    for wrong, what in (
        ({"data": "labelled"}, 'data = "pairs"'), ({"needs_reference": True}, "needs_reference = false"),
        ({"token_stats": {"entropy"}}, "token_stats"), ({"needs_mismatched": True}, "needs_mismatched"),
        ({"prepare": lambda self, step, state: ({}, state)}, "prepare_pass = false"),
    ):  # fmt: skip
        with pytest.raises(PluginError, match=f"needs_scores = True goes with {what}"):
            check_loss_class(loss(**wrong))
    with pytest.raises(PluginError, match=r"needs_scores = 1 \(wanted: True or False\)"):
        check_loss_class(loss(needs_scores=1))


def test_several_losses_learn_from_the_same() -> None:
    from alignzoo_losses.orpo import ORPO

    both = Mixture([BradleyTerry(margin="a"), BradleyTerry(margin="b")], [1.0, 0.5])
    assert both.needs_scores and both.columns == ("a", "b")
    with pytest.raises(PluginError, match="bradley_terry learns from scores, orpo learns from log-probs"):
        Mixture([BradleyTerry(), ORPO()], [1.0, 1.0])


# --- the engine -------------------------------------------------------------------------------------------------------


def test_a_step_is_that_of_plain_torch_whatever_the_micro_batches() -> None:
    trees, plain = make_trees(6), scalar_llama()
    scores = by_transformers(plain, trees)
    torch.nn.functional.logsigmoid(scores[::2] - scores[1::2]).mean().neg().backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter -= 0.05 * parameter.grad
    for budget, packing in ((60, "off"), (4096, "off"), (60, "on")):
        recipe = make_recipe(engine__tokens_per_device=budget, engine__packing=packing, model__head="scalar")
        engine, records = make_engine(BradleyTerry(), scalar_llama(), recipe)
        if packing == "on":
            engine.way = TREES
            assert make_packed(recipe, engine, engine.bare, engine.policy, TREES, trees[0], 64) == ""
        engine.fit(trees, [replace(t, row=50 + t.row) for t in trees[:3]])
        for ours, theirs in zip(engine.bare.model.parameters(), plain.parameters(), strict=True):
            assert (ours - theirs).abs().max() < 1e-5
        (first, line, last) = records
        assert line["loss"] == pytest.approx(-torch.nn.functional.logsigmoid(scores[::2] - scores[1::2]).mean().item())
        assert first.keys() >= {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_rewards/chosen"}
        assert not any("logps" in name for name in line | last)


def test_a_score_that_is_not_finite_stops_the_run() -> None:
    model = scalar_llama()
    with torch.no_grad():
        model.score.weight[0, 0] = float("inf")
    engine, _ = make_engine(BradleyTerry(), model, make_recipe(model__head="scalar"))
    with pytest.raises(AlignzooError, match="a score is not finite"):
        engine.fit(make_trees(6), [])


# --- whole runs -------------------------------------------------------------------------------------------------------

SCALAR = {"loss__name": "bradley_terry", "model__head": "scalar", "train__learning_rate": 1e-3}


def scores_of(folder: Path, rows: Path) -> list[list[float]]:
    """What the built-in reward makes of the pairs in a file."""
    reward = discover().reward("reward_model").cls(path=str(folder))
    reward.start("cpu")
    pairs = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    both = [reward([r["prompt"], r["prompt"]], [r["chosen"], r["rejected"]]) for r in pairs]
    assert all(isinstance(value, float) for pair in both for value in pair)
    return both


def test_a_run_makes_a_reward_model_that_the_reward_and_transformers_load(tiny_folder: Path, tmp_path: Path) -> None:
    file = write_recipe(tmp_path, tiny_folder, **SCALAR, eval__best_metric="eval_rewards/accuracies")
    result = alignzoo.run(file)
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in records if "eval_loss" in r][-1]
    found = scores_of(result.model_path, tmp_path / "eval.jsonl")
    chosen, rejected = (torch.tensor(side, dtype=torch.float64) for side in zip(*found, strict=True))
    assert chosen.mean().item() == pytest.approx(last["eval_rewards/chosen"], abs=1e-5)
    assert rejected.mean().item() == pytest.approx(last["eval_rewards/rejected"], abs=1e-5)
    assert (chosen > rejected).double().mean().item() == pytest.approx(last["eval_rewards/accuracies"], abs=1e-9)
    assert -torch.nn.functional.logsigmoid(chosen - rejected).mean().item() == pytest.approx(
        last["eval_loss"], abs=1e-5
    )
    assert abs(last["eval_loss"] - records[0]["eval_loss"]) > 1e-3

    config = json.loads((result.model_path / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(result.model_path)
    assert config["architectures"] == ["LlamaForSequenceClassification"] and list(config["id2label"]) == ["0"]
    assert config["pad_token_id"] == tokenizer.pad_token_id and (result.model_path / "model.safetensors").is_file()
    model, report = AutoModelForSequenceClassification.from_pretrained(result.model_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    row = json.loads((tmp_path / "eval.jsonl").read_text(encoding="utf-8").splitlines()[0])
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}], tokenize=False
        )
        for side in ("chosen", "rejected")
    ]
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)).logits
    assert logits[:, 0].tolist() == pytest.approx(found[0], abs=1e-5)
    said = (result.run_dir / "log.txt").read_text()
    assert 'no sample answers: model.head = "scalar" gives scores, and answers nothing' in said
    assert not (result.run_dir / "eval_rows.json").exists() and (result.run_dir / "report.html").is_file()
    assert (result.run_dir / "best/config.json").is_file()


def test_the_margin_comes_from_the_rows(tiny_folder: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 the loss is that of the fresh head, under a margin of 2 in every row."""
    changes = {"loss__margin": "gap", "data__keep": ["gap"], "train__max_steps": 1, "train__learning_rate": 0.0}
    file = write_recipe(tmp_path, tiny_folder, **(SCALAR | changes))
    for path in (tmp_path / "train.jsonl", tmp_path / "eval.jsonl"):
        rows = [json.loads(line) | {"gap": 2.0} for line in path.read_text(encoding="utf-8").splitlines()]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    result = alignzoo.run(file)
    leads = torch.tensor([a - b for a, b in scores_of(result.model_path, path)], dtype=torch.float64)
    expected = -torch.nn.functional.logsigmoid(leads - 2.0).mean().item()
    assert result.metrics["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert expected > 1.5


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_model(tiny_folder: Path, tmp_path: Path) -> None:
    model = {}
    for name in ("whole", "again"):
        file = write_recipe(tmp_path / name, tiny_folder, **SCALAR, checkpoint__every_steps=3)
        if name == "again":
            with pytest.raises(Enough):
                alignzoo.run(load_recipe(file), stop_after=5)
        result = alignzoo.run(load_recipe(file), resume=name == "again")
        model[name] = AutoModelForSequenceClassification.from_pretrained(result.model_path).state_dict()
    assert model["whole"].keys() == model["again"].keys()
    assert all(torch.equal(model["whole"][name], tensor) for name, tensor in model["again"].items())


@pytest.mark.slow
def test_an_adapter_is_merged_or_exported_as_a_reward_model(tiny_folder: Path, tmp_path: Path) -> None:
    found = {}
    for name, merge in (("adapter", False), ("merged", True)):
        file = write_recipe(
            tmp_path / name, tiny_folder, **SCALAR, model__lora={"rank": 4}, output__merge=merge,
            checkpoint__every_steps=11,
        )  # fmt: skip
        result = alignzoo.run(file)
        folder = result.model_path if merge else export(
            result.run_dir, tmp_path / "exported", merge=True, dtype=None, say=lambda _: None
        )  # fmt: skip
        found[name] = scores_of(folder, tmp_path / name / "eval.jsonl")
        assert sum(a for a, _ in found[name]) / 6 == pytest.approx(result.metrics["eval_rewards/chosen"], abs=1e-4)
    assert torch.allclose(torch.tensor(found["adapter"]), torch.tensor(found["merged"]), atol=1e-4)
    step = export(result.run_dir / "checkpoints/step-11", tmp_path / "step", merge=True, dtype=None, say=print)
    assert json.loads((step / "config.json").read_text())["pad_token_id"] is not None
    assert scores_of(step, tmp_path / name / "eval.jsonl")[0] == pytest.approx(found["merged"][0], abs=0.2)


@pytest.mark.slow
def test_a_saved_reward_model_is_trained_further_with_its_own_head(tiny_folder: Path, tmp_path: Path) -> None:
    first = alignzoo.run(write_recipe(tmp_path / "one", tiny_folder, **SCALAR, train__max_steps=3))
    again = write_recipe(tmp_path / "two", tiny_folder, **SCALAR, train__max_steps=1)
    second = alignzoo.run(load_recipe(again, [f"model.path=run:{first.run_dir}"]))
    begun = json.loads((second.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert begun["eval_loss"] == pytest.approx(first.metrics["eval_loss"], abs=1e-6)
    with pytest.raises(RecipeError, match=r'holds a reward model, and model\.head = "lm"'):
        alignzoo.run(load_recipe(again, [f"model.path=run:{first.run_dir}", "model.head=lm", "loss.name=dpo"]))


def test_a_model_given_from_python_has_the_head_of_the_recipe(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tiny_folder, **SCALAR, train__max_steps=1))
    with pytest.raises(RecipeError, match='head = "scalar", and the model is a LlamaForCausalLM'):
        alignzoo.run(recipe, model=tiny_llama(vocabulary=len(tokenizer)), tokenizer=tokenizer)
    model = scalar_llama(vocabulary=len(tokenizer), pad=None)
    result = alignzoo.run(recipe, model=model, tokenizer=tokenizer)
    assert scores_of(result.model_path, tmp_path / "eval.jsonl")
    assert model.config.pad_token_id == tokenizer.pad_token_id


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model__head": "lm"}, r'model\.head = "lm", and loss "bradley_terry" learns from scores'),
    ({"loss__name": "dpo"}, r'model\.head = "scalar", and loss "dpo" learns from log-probs'),
    ({"loss__margin": "gap"}, r'reads the column "gap", and data\.keep does not have it'),
    ({"model__router_loss": 0.1}, r"model\.router_loss is set, and model\.head"),
    ({"rollout__completions": 2}, r"rollout is set, and model\.head"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_a_recipe_with_the_wrong_head_costs_nothing(
    changes: Any, message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    file = write_recipe(tmp_path, tiny_folder, **(SCALAR | changes))
    with pytest.raises(RecipeError, match=message) as caught:
        make_job(load_recipe(file), lambda line: pytest.fail(line) if "tokenizer of" in line else None)
    assert caught.value.fix and caught.value.exit_code == 2


def test_a_classifier_with_more_outputs_is_no_start(tokenizer: Any, tiny_folder: Path, tmp_path: Path) -> None:
    from test_rewards_models import classifier

    folder = classifier(tmp_path / "two", tokenizer, labels=2)
    with pytest.raises(RecipeError, match="holds a classifier with 2 outputs"):
        make_job(load_recipe(write_recipe(tmp_path, folder, **SCALAR)), lambda _: None)


def test_a_reward_model_is_not_asked_for_answers(tokenizer: Any, tmp_path: Path) -> None:
    """transformers would give it a head for the vocabulary, drawn at random, and a warning."""
    from test_rewards_models import classifier

    from alignzoo.chat import load_speaker

    folder = classifier(tmp_path / "one", tokenizer)
    with pytest.raises(ModelError, match="holds a reward model, which answers nothing"):
        load_speaker(str(folder), lambda _: None)


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_two_ranks_that_share_the_weights_out_begin_with_the_same_head(tiny_folder: Path, tmp_path: Path) -> None:
    """The body is loaded in shares, the head is drawn whole on every rank; under LoRA it is saved with the adapter."""
    for lora in ({}, {"model__lora": {"rank": 4}, "output__merge": True}):
        name = "adapter" if lora else "whole"
        file = write_recipe(tmp_path / name, tiny_folder, **SCALAR, **lora, train__max_steps=3, train__optimizer="sgd")
        alone = alignzoo.run(load_recipe(file, ["log.run_name=alone"]))
        words = ["run", str(file), "--processes", "2", "--set", "engine.zero=3"]
        done = subprocess.run([sys.executable, "-m", "alignzoo", *words], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        shared = file.parent / "runs/tiny"
        lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (alone.run_dir, shared)]
        for one, two in zip(*(map(json.loads, part) for part in lines), strict=True):
            for key in ("loss", "eval_loss", "eval_rewards/chosen", "grad_norm"):
                assert one.get(key) == pytest.approx(two.get(key), abs=1e-5), key
        found = [scores_of(run / "model", file.parent / "eval.jsonl") for run in (alone.run_dir, shared)]
        assert torch.allclose(*map(torch.tensor, found), atol=1e-5)
