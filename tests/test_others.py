"""Completions of others than the policy: from an address, from another model, from the reference."""

from __future__ import annotations

import copy
import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from rich.console import Console
from runs_helpers import assert_the_same_run, distance, finished, metrics_of
from server_helpers import Server
from test_offline import sample
from test_rollout import completions_of, online, run, without_clock

import alignzoo
from alignzoo.data.template import Template
from alignzoo.data.tokenise import Encoder
from alignzoo.errors import AlignzooError, ModelError, RecipeError, RunError
from alignzoo.making import Sampled, make_trees
from alignzoo.others import Others
from alignzoo.recipe import Other, Rollout, load_recipe
from alignzoo.runner import Enough
from alignzoo.sampling import Sampling, draw
from alignzoo.tree import Tree


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def strong(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the policy's tokenizer."""
    folder = tmp_path_factory.mktemp("strong")
    tiny_llama(seed=5, vocabulary=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def said(text: str) -> Any:
    return lambda body: text


def directed(server: Server, **keys: Any) -> dict[str, Any]:
    return {"source": server.url, "model": "teacher", "role": "chosen", **keys}


# --- what becomes of completions of which it is known which is better -------------------------------------------------

PROMPT = Tree(3, np.array([5, 6], np.int32), (), where="p.jsonl:4")
OWN = [Sampled(np.array([10 + i], np.int32), np.zeros(1, np.float32), False) for i in range(3)]
BETTER = [Sampled(np.array([i], np.int32), None, False, author="t", beats=k) for i, k in ((20, 0), (21, 2), (11, 1))]
DIRECTED = Rollout(others=(Other(source="reference", role="chosen"),))


def ids_of(trees: list[Tree]) -> list[list[int]]:
    return [[int(c.ids[0]) for c in tree.completions] for tree in trees]


def test_better_ones_stand_against_the_policy_s_whatever_the_rewards() -> None:
    rewarded = [Sampled(o.ids, o.logps, False, reward=9.0) for o in OWN]
    for own in (OWN, rewarded):
        assert ids_of(make_trees("pairs", PROMPT, [*own, *BETTER], DIRECTED)) == [[20, 10], [21, 12]]  # 11 is 11
    labelled = make_trees("labelled", PROMPT, [*OWN, *BETTER[:1]], DIRECTED)
    assert [(ids_of([t])[0], t.label) for t in labelled] == [([20], True), ([10], False)]
    assert ids_of(make_trees("demonstrations", PROMPT, [*OWN, *BETTER], DIRECTED)) == [[20], [21], [11]]
    assert make_trees("pairs", PROMPT, OWN, DIRECTED) == []  # the other one failed


def test_candidates_are_chosen_by_reward() -> None:
    own = [Sampled(np.array([i], np.int32), np.zeros(1, np.float32), False, reward=r) for i, r in ((1, 0.0), (2, 2.0))]
    best = Sampled(np.array([3], np.int32), None, False, reward=5.0, author="t")
    assert ids_of(make_trees("pairs", PROMPT, [*own, best], Rollout())) == [[3, 1]]
    assert ids_of(make_trees("demonstrations", PROMPT, [*own, best], Rollout())) == [[3]]


# --- an address ------------------------------------------------------------------------------------------------------


def others_of(tokenizer: Any, *tables: dict[str, Any], said: list[str] | None = None, **keys: Any) -> Others:
    table = {
        "loss": {"name": "dpo"}, "model": {"path": "m"}, "data": {"train": "t.jsonl", "system": "Be kind."},
        "train": {"learning_rate": 1e-3},
        "rollout": {"completions": 2, "max_new_tokens": 6, "others": list(tables), **keys},
    }  # fmt: skip
    lines: list[str] = [] if said is None else said
    return Others(load_recipe(table), tokenizer, [2], {}, nullcontext, lines.append)


def asked_of(tokenizer: Any, *questions: Any) -> list[tuple[int, Tree]]:
    def tree(row: int, question: Any) -> Tree:
        turns = question if isinstance(question, tuple) else ({"role": "user", "content": question},)
        ids = tokenizer.apply_chat_template(
            [{"role": "system", "content": "Be kind."}, *turns], add_generation_prompt=True, return_dict=False
        )
        return Tree(row, np.asarray(ids, np.int32), (), asked=question)

    return [(1, tree(row, question)) for row, question in enumerate(questions)]


def own_of(tokenizer: Any, *texts: str) -> list[Sampled]:
    return [Sampled(np.asarray(tokenizer(t)["input_ids"], np.int32), np.zeros(1, np.float32), False, t) for t in texts]


def test_an_address_is_asked_with_the_prompt_and_its_text_is_tokenised(
    server: Server, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "very-secret")
    server.respond = said("the fee")
    others = others_of(tokenizer, directed(server, temperature=0.5, api_key_env="TEACHER_KEY"))
    talk = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "and?"})
    asked = asked_of(tokenizer, "why?", talk)
    ((own, other), (_, second)) = others.answer(asked, [own_of(tokenizer, "mine")] * 2)
    assert (own.author, own.beats, other.author, other.beats, other.logps) == ("", None, "teacher", 0, None)
    assert other.text == second.text == "the fee" and not other.truncated
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert other.ids.tolist() == [*tokenizer("the fee")["input_ids"], end]
    whole = tokenizer.decode([*asked[0][1].prompt, *other.ids])
    turns = [("system", "Be kind."), ("user", "why?"), ("assistant", "the fee")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert whole + "\n" == tokenizer.apply_chat_template(messages, tokenize=False)
    bodies = sorted(server.asked, key=lambda body: len(body["messages"][0]["content"]))
    assert bodies[0] == {
        "path": "/v1/chat/completions", "model": "teacher", "messages": messages[:2], "temperature": 0.5,
        "max_tokens": 6,
    }  # fmt: skip
    assert bodies[1]["messages"] == list(talk)  # a system turn of its own stays
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer very-secret"}


def test_a_text_is_tokenised_where_it_stands_and_never_joined_to_the_prompt(server: Server, tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    spaced = copy.deepcopy(tokenizer)  # as sentencepiece has it: a space before a text by itself
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    server.respond = said("the fee")
    ((_, one),) = others_of(spaced, directed(server)).answer(asked_of(spaced, "why?"), [own_of(spaced, "mine")])
    assert spaced.decode(spaced("the fee")["input_ids"]) == " the fee" and one.text == "the fee"
    raw = others_of(tokenizer, directed(server))
    raw.template, raw.encoder = Template("raw", False), Encoder(tokenizer, Template("raw", False))
    before, after = "th", "e fee"
    ids = tokenizer(before)["input_ids"]
    assert tokenizer(before + after)["input_ids"][: len(ids)] != ids
    server.respond = said(after)
    asked = [(1, Tree(0, np.asarray(ids, np.int32), (), asked=before))]
    ((_, joined),) = raw.answer(asked, [own_of(tokenizer, "mine")])
    assert joined.ids[:-1].tolist() == tokenizer(after)["input_ids"]


def test_what_is_too_long_is_cut_and_what_broke_off_has_no_end(server: Server, tokenizer: Any) -> None:
    texts = iter(["a b c d e f g h i j", {"message": {"content": "so"}, "finish_reason": "length"}])
    server.respond = lambda body: next(texts)
    others = others_of(tokenizer, directed(server, concurrency=1))
    (_, long), (_, short) = others.answer(asked_of(tokenizer, "one", "two"), [own_of(tokenizer, "mine")] * 2)
    assert len(long.ids) == 6 and long.truncated and "a b c d e f g h i j".startswith(long.text)
    assert short.ids.tolist() == tokenizer("so")["input_ids"] and short.truncated


def test_a_revision_is_asked_for_with_the_policy_s_own_completion(server: Server, tokenizer: Any) -> None:
    server.respond = lambda body: f"better {body['messages'][-2]['content']}"
    table = directed(server, role="revision", completions=2, instruction="Mend it.")
    again = directed(server, role="revision", model="made/by/teacher")
    others = others_of(tokenizer, table, again, max_new_tokens=20)
    (found,) = others.answer(asked_of(tokenizer, "why?"), [own_of(tokenizer, "uno", "due")])
    assert [(one.text, one.author, one.beats) for one in found] == [
        ("uno", "", None), ("due", "", None), ("better uno", "teacher", 0), ("better due", "teacher", 1),
        ("better uno", "teacher_2", 0),
    ]  # fmt: skip
    told = {body["messages"][-1]["content"] for body in server.asked}
    assert told == {"Mend it.", Other(source="x").instruction}
    assert [turn["role"] for turn in server.asked[0]["messages"]] == ["system", "user", "assistant", "user"]


def test_a_failed_completion_is_left_out_counted_and_told(server: Server, tokenizer: Any) -> None:
    server.respond = lambda body: (401, "no") if "bad" in str(body) else " " if "empty" in str(body) else "yes"
    lines: list[str] = []
    others = others_of(tokenizer, directed(server, max_failures=1.0), said=lines)
    asked = asked_of(tokenizer, "good", "bad", "empty")
    found = others.answer(asked, [own_of(tokenizer, "mine")] * 3)
    assert [len(of_prompt) for of_prompt in found] == [2, 1, 1] and len(server.asked) == 3
    assert len(lines) == 1 and lines[0].startswith("WARNING: teacher: 2 of 3 completions failed: ")
    others.answer(asked[1:2], [own_of(tokenizer, "mine")])
    assert others.state() == {"teacher": {"failed": 3, "recent": [[3, 2], [1, 1]]}} and len(lines) == 1
    again = others_of(tokenizer, directed(server, max_failures=0.07))
    again.load_state(others.state())
    with pytest.raises(RunError, match=r"teacher of rollout\.others fails too often: 4 of 5 completions in its last 3"):
        again.answer(asked[1:2], [own_of(tokenizer, "mine")])


def test_what_may_pass_is_tried_again(server: Server, tokenizer: Any) -> None:
    answers = iter([(429, "slow down"), "yes"])
    server.respond = lambda body: next(answers)
    ((_, other),) = others_of(tokenizer, directed(server)).answer(
        asked_of(tokenizer, "why?"), [own_of(tokenizer, "mine")]
    )
    assert other.text == "yes" and len(server.asked) == 2


# --- a model ---------------------------------------------------------------------------------------------------------


def test_a_model_draws_with_seeds_of_its_own_and_revises_token_by_token(tokenizer: Any) -> None:
    model = tiny_llama(seed=5, vocabulary=len(tokenizer))
    others = others_of(tokenizer, {"source": "strong", "completions": 2}, {"source": "strong", "temperature": 0.0})
    others.held = {"strong": partial(nullcontext, model)}
    asked = asked_of(tokenizer, "why?", "how?")
    found = others.answer(asked, [own_of(tokenizer, "mine")] * 2)
    prompts, stops = [tree.prompt for _, tree in asked], [2]
    seeds = [(42, 1, row, 1, 0) for row in range(2)]
    wanted = draw(model, prompts, 2, Sampling(6), stops=stops, pad=0, seeds=seeds)
    greedy = draw(model, prompts, 1, Sampling(6, 0.0), stops=stops, pad=0, seeds=seeds)
    for of_prompt, drawn, most in zip(found, wanted, greedy, strict=True):
        assert [one.ids.tolist() for one in of_prompt[1:]] == [d.ids.tolist() for d in (*drawn, *most)]
        assert [one.beats for one in of_prompt] == [None] * 4
    policy = draw(model, prompts, 1, Sampling(6), stops=stops, pad=0, seeds=[(42, 1, row) for row in range(2)])
    assert policy[0][0].ids.tolist() != wanted[0][0].ids.tolist()
    reviser = others_of(tokenizer, {"source": "strong", "role": "revision", "instruction": "Mend it."})
    reviser.held = others.held
    ((_, revision),) = reviser.answer(asked[:1], [own_of(tokenizer, "uno", "due")[:1]])
    turns = [("system", "Be kind."), ("user", "why?"), ("assistant", "uno"), ("user", "Mend it.")]
    ids = tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in turns], add_generation_prompt=True, return_dict=False
    )
    ((made,),) = draw(model, [np.asarray(ids, np.int32)], 1, Sampling(6), stops=stops, pad=0, seeds=[(42, 1, 0, 1, 0)])
    assert revision.ids.tolist() == made.ids.tolist() and revision.beats == 0


def test_a_prompt_beyond_the_model_s_table_of_positions_fails_alone(tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=60))
    others = others_of(tokenizer, {"source": "strong", "max_failures": 1.0})
    others.held = {"strong": partial(nullcontext, model.eval())}
    asked = asked_of(tokenizer, "why?", "why? " * 40)
    found = others.answer(asked, [own_of(tokenizer, "mine")] * 2)
    assert [len(of_prompt) for of_prompt in found] == [2, 1] and "table of 60 positions" in others.authors[0].last


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dpo", "kto", "sft"])
def test_every_loss_learns_from_an_address_without_rewards(
    loss: str, server: Server, tiny_folder: Path, tmp_path: Path
) -> None:
    server.respond = said("the fee")
    file = online(
        tmp_path, tiny_folder, rewards="", loss__name=loss, rollout__completions=2, train__learning_rate=0.01,
        rollout__others=[directed(server, completions=2)],
    )  # fmt: skip
    found = run(file)
    records, lines = metrics_of(found.run_dir), completions_of(found.run_dir)
    steps = [r for r in records if "learning_rate" in r]
    assert len(steps) == 6 and all(r["rollout/others/teacher/failed"] == 0 for r in steps)
    assert all(r["rollout/rows_per_prompt"] == {"dpo": 2, "kto": 4, "sft": 2}[loss] for r in steps)
    assert not any("rollout/reward" in r or "rollout/unrewarded" in r for r in records)
    assert Counter(line["author"] for line in lines) == {"policy": len(lines) // 2, "teacher": len(lines) // 2}
    assert {line["completion"] for line in lines if line["author"] == "teacher"} == {"the fee"}
    if loss == "sft":  # imitates it
        assert records[-1]["eval_loss"] < 0.7 * records[0]["eval_loss"]
    else:
        first, last = (r for r in records if "eval_loss" in r and r["step"] in (0, 6))
        assert last["eval_rewards/margins"] > 0.3 and last["eval_logps/chosen"] > first["eval_logps/chosen"] + 5
    assert len(server.asked) == (6 * 4 + 3 * 6) * 2  # steps of 4 prompts, 3 evaluations of 6, 2 each


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_and_a_model_stand_beside_the_policy(
    lora: bool, tiny_folder: Path, strong: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"model__lora": {"rank": 4}} if lora else {}
    others = [{"source": "reference"}, {"source": str(strong), "completions": 2}]
    file = online(
        tmp_path, tiny_folder, loss__name="dpo", rollout__others=others, rollout__completions=2, rollout__keep=99,
        train__learning_rate=0.02, **changes,
    )  # fmt: skip
    found = run(file)
    lines = completions_of(found.run_dir)
    count = Counter(line["author"] for line in lines)
    assert count["reference"] * 2 == count[strong.name] == count["policy"]
    assert all(isinstance(line["reward"], float) for line in lines)
    records = metrics_of(found.run_dir)
    assert (
        f"rollout/others/{strong.name}/reward" in records[-1] or "eval_rollout/others/reference/reward" in records[-1]
    )
    both = (
        [line["completion"] for line in lines if line["held_out"] and line["author"] == author and line["step"] == step]
        for author in ("reference", "policy") for step in (0, 6)
    )  # fmt: skip
    start, end, policy, after = both
    assert start == end and policy != after  # held-out prompts have the same seeds: the reference stays as it was


def test_a_loss_without_a_reference_has_the_start_model_answer(tiny_folder: Path, tmp_path: Path) -> None:
    others = [{"source": "reference", "role": "chosen"}]
    file = online(tmp_path, tiny_folder, rewards="", loss__name="simpo", rollout__others=others, train__max_steps=1)
    assert {line["author"] for line in completions_of(run(file).run_dir)} == {"policy", "reference"}


def test_resumed_within_a_window_nothing_is_asked_again(server: Server, tiny_folder: Path, tmp_path: Path) -> None:
    server.respond = lambda body: f"{body['messages'][-2]['content']} the fee"  # of the policy's completion
    asked = []
    for name in ("straight", "stopped"):
        server.asked.clear()
        file = online(
            tmp_path / name, tiny_folder, rewards="", loss__name="dpo", rollout__refresh_every_steps=3,
            rollout__others=[directed(server, role="revision")], checkpoint__every_steps=1,
        )  # fmt: skip
        console = Console(file=io.StringIO(), width=200)
        if name == "stopped":
            with pytest.raises(Enough):
                alignzoo.run(file, console=console, stop_after=3)  # the last checkpoint is that of step 2
            alignzoo.run(file, console=console, resume=tmp_path / name / "runs" / "online")
        else:
            alignzoo.run(file, console=console)
        asked.append(len(server.asked))
    assert asked[0] == asked[1] == 24 + 3 * 6
    runs = [tmp_path / name / "runs" / "online" for name in ("straight", "stopped")]
    texts = [[c | {"row": ""} for c in completions_of(folder)] for folder in runs]
    assert texts[0] == texts[1]
    for folder in runs:  # compared above; names of files and seconds differ
        (folder / "completions.jsonl").write_text("")
        lines = [json.dumps(line) for line in without_clock(metrics_of(folder))]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert_the_same_run(runs[1], runs[0])


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("zero", [0, 3])
def test_two_ranks_share_the_asking(zero: int, server: Server, tiny_folder: Path, tmp_path: Path) -> None:
    server.respond = lambda body: f"{body['messages'][1]['content'][:9]} the fee"
    others = [directed(server), {"source": "reference", "role": "revision", "completions": 2}]
    changes: dict[str, Any] = {"loss__name": "dpo", "rollout__others": others, "data__system": "Be kind."}
    alone = run(online(tmp_path / "alone", tiny_folder, rewards="", **changes)).run_dir
    once = Counter(json.dumps(body) for body in server.asked)
    server.asked.clear()
    file = online(tmp_path / "both", tiny_folder, rewards="", engine__zero=zero, **changes)
    finished(tmp_path / "log", "run", file, "--processes", "2")
    assert Counter(json.dumps(body) for body in server.asked) == once
    ours = tmp_path / "both" / "runs" / "online"
    for mine, other in zip(completions_of(ours), completions_of(alone), strict=True):
        assert mine | {"row": ""} == other | {"row": ""}
    assert distance(ours / "model", alone / "model", tiny_folder) < 2e-3


def test_an_address_that_fails_stops_the_run_or_is_counted(server: Server, tiny_folder: Path, tmp_path: Path) -> None:
    server.respond = lambda body: (401, "the key is wrong")
    other = directed(server)
    with pytest.raises(RunError, match=r"teacher of rollout\.others fails too often") as caught:
        run(
            online(
                tmp_path, tiny_folder, rewards="", loss__name="dpo", rollout__others=[{**other, "max_failures": 0.0}]
            )
        )
    assert 'answered 401: "the key is wrong"' in caught.value.why
    file = online(
        tmp_path / "counted",
        tiny_folder,
        rewards="",
        loss__name="dpo",
        rollout__others=[{**other, "max_failures": 1.0}],
    )
    steps = [r for r in metrics_of(run(file).run_dir) if "learning_rate" in r]
    assert all(r["rollout/others/teacher/failed"] == r["rollout/empty_steps"] == 1 for r in steps)


def test_sampled_into_a_file(server: Server, tiny_folder: Path, strong: Path, tmp_path: Path) -> None:
    server.respond = lambda body: f"the {body['messages'][-2]['content']}"
    file = online(
        tmp_path, tiny_folder, rewards="", loss__name="dpo", rollout__others=[directed(server, role="revision")]
    )
    pairs = sample(file, tmp_path / "pairs.jsonl", "pairs")
    assert len(pairs) == 24 and all(row["chosen"].startswith("the ") for row in pairs)
    assert not any(row["rejected"].startswith("the ") for row in pairs)
    best = sample(file, tmp_path / "best.jsonl", "best")
    assert [row["completion"] for row in best] == [row["chosen"] for row in pairs]
    candidates = online(tmp_path, tiny_folder, rollout__others=[{"source": str(strong)}], loss__name="dpo")
    ranked = sample(candidates, tmp_path / "ranked.jsonl", "ranked")
    assert all(sorted(row["authors"]) == sorted([strong.name, *["policy"] * 4]) for row in ranked)
    changed = f"rollout.others=[{{source = '{strong}', temperature = 0.5}}]"
    with pytest.raises(AlignzooError, match="another recipe"):
        sample(candidates, tmp_path / "ranked.jsonl", "ranked", changed)


# --- mistakes --------------------------------------------------------------------------------------------------------

URL = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    ("other", "changes", "words"),
    [
        ({"source": URL}, {}, "an address needs the model's name"),
        ({"source": "reference", "model": "m"}, {}, r'"reference" is none'),
        ({"source": "reference", "role": "chosen", "completions": 5}, {}, "5 is more than rollout.completions = 4"),
        ({"source": "reference", "role": "chosen"}, {"rollout__min_gap": 0.1}, "min_gap.*without effect"),
        ({"source": "reference", "instruction": "x"}, {}, 'role is not "revision"'),
        ({"source": "reference", "role": "chose"}, {}, "is not among the choices"),
        ({"source": "reference"}, {"loss__name": "grpo"}, "(?s)how likely the policy was.*not the policy's"),
        ({"source": URL, "model": "m", "api_key_env": "NO_SUCH_KEY"}, {}, "NO_SUCH_KEY is not set"),
        ({"source": "./nowhere/at all"}, {}, r"rollout\.others|no folder ./nowhere/at all"),
        ({"source": "reference", "role": "revision"}, {"data__chat_template": "none"}, "needs a chat template"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    other: dict[str, Any], changes: dict[str, Any], words: str, tiny_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("alignzoo.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    settings: dict[str, Any] = {"loss__name": "dpo", "rollout__others": [other], **changes}
    with pytest.raises(RecipeError, match=words):
        run(online(tmp_path, tiny_folder, **settings))


def test_candidates_and_better_ones_do_not_mix_and_candidates_need_rewards(tiny_folder: Path, tmp_path: Path) -> None:
    both = [{"source": "reference"}, {"source": "reference", "role": "chosen"}]
    with pytest.raises(RecipeError, match="no reward decides then"):
        run(online(tmp_path, tiny_folder, loss__name="dpo", rollout__others=both))
    with pytest.raises(RecipeError, match="nothing says which of them are good"):
        run(online(tmp_path, tiny_folder, rewards="", loss__name="dpo", rollout__others=both[:1]))


def test_a_model_of_another_vocabulary_is_refused(tokenizer: Any, tiny_folder: Path, tmp_path: Path) -> None:
    larger, folder = copy.deepcopy(tokenizer), tmp_path / "larger"
    larger.add_tokens(["<new>"])
    tiny_llama(vocabulary=len(larger)).save_pretrained(folder)
    larger.save_pretrained(folder)
    with pytest.raises(RecipeError, match="another vocabulary than the policy"):
        run(online(tmp_path, tiny_folder, loss__name="dpo", rollout__others=[{"source": str(folder)}]))


def test_rows_beyond_the_policy_s_table_of_positions_are_refused_before_a_step(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    for name in ("dpo", "grpo"):
        file = online(tmp_path, tmp_path / "gpt2", loss__name=name)
        with pytest.raises(ModelError, match=r"(?s)rows have more than 64 tokens.*set data.max_length = 64"):
            run(file)
    found = run(online(tmp_path, tmp_path / "gpt2", data__max_length=64, train__max_steps=1))
    assert found.summary["steps"] == 1
