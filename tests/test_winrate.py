"""`alignzoo winrate`: judges behind real addresses whose rule is known, rewards, answers drawn, resumed, refused."""

from __future__ import annotations

import io
import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from server_helpers import Server
from test_rewards_models import classifier

from alignzoo import answers
from alignzoo.cli import cli
from alignzoo.errors import AlignzooError, DataError, RecipeError, RunError
from alignzoo.judging import ONCE, OVERALL, read
from alignzoo.lengthcontrol import length_controlled
from alignzoo.plugins import discover
from alignzoo.sampling import Sampling
from alignzoo.winning import Results
from alignzoo.winrate import Asked, winrate

QUESTIONS = [f"What is {i} + {i}?" for i in range(30)]
PARTS = re.compile(r"Question:\n(.*)\n\nAnswer 1:\n(.*)\n\nAnswer 2:\n(.*)\n\nWhich answer", re.DOTALL)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Prompts, and two files of answers: A's is longer in 20 of 30, as long in 2, shorter in 8."""
    lengths = [5] * 20 + [0] * 2 + [-4] * 8
    rng = np.random.default_rng(0)
    rng.shuffle(lengths)
    rows_a = [{"prompt": q, "answer": "a" * (25 + d * (1 + i % 5))} for i, (q, d) in enumerate(zip(QUESTIONS, lengths, strict=True))]  # fmt: skip  # noqa: E501
    rows_b = [{"instruction": q, "output": "b" * 25} for q in QUESTIONS]
    return {
        "prompts": jsonl(tmp_path / "p.jsonl", [{"prompt": q} for q in QUESTIONS]),
        "a": jsonl(tmp_path / "a.jsonl", rows_a), "b": jsonl(tmp_path / "b.jsonl", rows_b[::-1]),
    }  # fmt: skip


def compare(
    out: Path, files: dict[str, str], judge: str, *settings: str, said: io.StringIO | None = None, **more: Any
) -> Results:
    asked = Asked(files["a"], files["b"], files["prompts"], judge, settings, **more)
    return winrate(asked, out, Console(file=said or io.StringIO(), width=250))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def says(verdict: str, *dimensions: str) -> str:
    names = dimensions or ("helpful", "accurate", "clear", "safe", "overall")
    return "Let me think.\n" + "\n".join(f"{name}: {verdict}" for name in names)


def longer(text: str) -> str:
    _, first, second = PARTS.findall(text)[0]
    return says("tie" if len(first) == len(second) else "1" if len(first) > len(second) else "2")


# --- judges with a rule that is known --------------------------------------------------------------------------------


def test_a_judge_that_prefers_the_longer(server: Server, files: dict[str, str], tmp_path: Path) -> None:
    server.answer = longer
    found = compare(tmp_path / "out", files, server.url, "model=m")
    assert [one.name for one in found.dimensions] == ["overall", "helpful", "accurate", "clear", "safe"]
    for one in found.dimensions:
        assert (one.pairs, one.wins, one.ties, one.losses, one.missing) == (30, 20, 2, 8, 0)
        assert one.rate is not None and one.rate.mean == 21 / 30 and one.bias == 0 and one.to_first == 0
        assert one.controlled is not None and abs(one.controlled.mean - 0.5) < 0.13  # of 30 pairs; nearer below
    assert found.overall.rate.low == pytest.approx(0.53, abs=0.03)  # type: ignore[union-attr]
    assert "A = a.jsonl wins 0.700" in found.verdict and found.verdict.endswith("A is better")
    assert len(server.asked) == 60
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written["dimensions"]["overall"]["rate"]["mean"] == 0.7 and written["prompts"] == 30
    verdicts = lines(tmp_path / "out/verdicts.jsonl")
    assert {(line["row"], line["order"]) for line in verdicts} == {(i, o) for i in range(30) for o in ("ab", "ba")}
    assert verdicts[0]["said"].startswith("Let me think.")
    by_prompt = {line["row"]: line["answer"] for line in lines(tmp_path / "out/answers_b.jsonl")}
    assert by_prompt == dict.fromkeys(range(30), "b" * 25)


def test_a_judge_that_always_says_the_first(server: Server, files: dict[str, str], tmp_path: Path) -> None:
    server.answer = lambda text: says("1", "kind", "overall")
    found = compare(tmp_path / "out", files, server.url, "model=m", dimensions="kind")
    for one in found.dimensions:
        assert (one.wins, one.ties, one.losses, one.flips, one.to_first, one.bias) == (0, 30, 0, 30, 30, 1.0)
        assert one.rate is not None and (one.rate.mean, one.rate.low, one.rate.high) == (0.5, 0.5, 0.5)
        assert one.controlled is not None and one.controlled.mean == pytest.approx(0.5)
    assert found.verdict.endswith("no difference is shown")


def test_one_order_with_a_tie_is_a_tie_and_no_flip(server: Server, files: dict[str, str], tmp_path: Path) -> None:
    server.answer = lambda text: says("tie" if PARTS.findall(text)[0][1].startswith("a") else "2", "overall")
    one = compare(tmp_path / "out", files, server.url, "model=m", dimensions="").overall
    assert (one.wins, one.ties, one.losses, one.flips) == (0, 30, 0, 0)
    server.answer = lambda text: says("2", "overall")
    one = compare(tmp_path / "second", files, server.url, "model=m", dimensions="").overall
    assert (one.ties, one.flips, one.to_first) == (30, 30, 0)


def test_dimensions_are_judged_apart(server: Server, files: dict[str, str], tmp_path: Path) -> None:
    def answer(text: str) -> str:
        first = PARTS.findall(text)[0][1]
        return f"**Short and clear: {2 if first[0] == 'a' else 1}**\nOverall: Answer {1 if first[0] == 'a' else 2}."

    server.answer = answer
    found = compare(tmp_path / "out", files, server.url, "model=m", dimensions="short and clear")
    assert [(one.name, one.wins, one.losses) for one in found.dimensions] == [
        ("overall", 30, 0), ("short and clear", 0, 30),
    ]  # fmt: skip
    assert "better by each of these: short and clear?" in server.asked[0]["messages"][0]["content"]


def test_a_real_model_behind_the_address(
    server: Server, files: dict[str, str], tiny_folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    """It says 1, 2 or tie, whichever a tiny transformers model finds most probable after the question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("1", "2", "t")]
    lock, chosen = threading.Lock(), dict[str, int]()

    def choice(text: str) -> int:
        ids = tokenizer(text[-700:], return_tensors="pt")["input_ids"][:, -200:]
        with lock, torch.no_grad():
            return int(model(input_ids=ids).logits[0, -1][words].argmax())

    def answer(text: str) -> str:
        chosen[text] = choice(text)
        return says(["1", "2", "tie"][chosen[text]])

    server.answer = answer
    one = compare(tmp_path / "out", files, server.url, "model=tiny").overall
    by_pair: dict[str, dict[str, str]] = {}
    for text in chosen:
        prompt, first, _ = PARTS.findall(text)[0]
        order = "ab" if first.startswith("a") else "ba"
        by_pair.setdefault(prompt, {})[order] = (order + "t")[choice(text)]
    verdicts = [both["ab"] if both["ab"] == both["ba"] else "t" for both in by_pair.values()]
    assert (one.wins, one.ties, one.losses) == tuple(map(verdicts.count, "atb")) and len(verdicts) == 30
    assert one.flips == sum(set(both.values()) == {"a", "b"} for both in by_pair.values())


def test_a_real_model_that_babbles_is_stopped(
    server: Server, files: dict[str, str], tiny_folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    from transformers import pipeline

    talk, lock = pipeline("text-generation", str(tiny_folder)), threading.Lock()

    def answer(text: str) -> str:
        with lock:
            return str(talk(text[:50], max_new_tokens=5, return_full_text=False)[0]["generated_text"])

    server.answer = answer
    with pytest.raises(RunError, match=r"3 answers have no verdict that can be read[\s\S]*it said"):
        compare(tmp_path / "out", files, server.url, "model=tiny", "concurrency=1")
    assert len(lines(tmp_path / "out/verdicts.jsonl")) == 3 and not (tmp_path / "out/results.json").exists()


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_judge_that_dies_is_gone_on_with(server: Server, files: dict[str, str], tmp_path: Path) -> None:
    mortal, whole = Server(), compare_with_longer(server, files, tmp_path / "whole")
    port = mortal.server.server_port

    def answer(text: str) -> str:
        if len(mortal.asked) == 25:
            mortal.server.socket.close()  # nobody is let in any more
            threading.Thread(target=mortal.server.shutdown).start()
        return longer(text)

    mortal.answer = answer
    with pytest.raises(RunError, match=r"nobody answers there[\s\S]*goes on where it stopped"):
        compare(tmp_path / "out", files, mortal.url, "model=m", "retries=0", "concurrency=1")
    first = lines(tmp_path / "out/verdicts.jsonl")
    assert len(first) == 25
    with (tmp_path / "out/verdicts.jsonl").open("a") as torn:
        torn.write('{"row": 3, "ord')
    again = Server(port)
    again.answer = longer
    said = io.StringIO()
    found = compare(tmp_path / "out", files, again.url, "model=m", said=said)
    assert len(again.asked) == 35 and "going on with what is there" in said.getvalue()
    asked = [one["messages"][0]["content"] for one in (*mortal.asked[:25], *again.asked)]
    assert len(set(asked)) == 60
    assert found.overall == whole.overall and lines(tmp_path / "out/verdicts.jsonl")[:25] == first
    assert compare(tmp_path / "out", files, again.url, "model=m").overall == whole.overall
    assert len(again.asked) == 35
    again.server.shutdown()
    again.server.server_close()


def compare_with_longer(server: Server, files: dict[str, str], out: Path) -> Results:
    server.answer = longer
    return compare(out, files, server.url, "model=m")


def test_what_cannot_be_read_is_counted_and_told(server: Server, files: dict[str, str], tmp_path: Path) -> None:
    odd = (QUESTIONS[3], QUESTIONS[7])
    server.answer = lambda text: "I cannot." if text.split("\n")[3] in odd else longer(text)
    said = io.StringIO()
    found = compare(tmp_path / "out", files, server.url, "model=m", said=said, max_failures=0.5)
    assert (found.overall.pairs, found.overall.missing) == (28, 2)
    assert "overall: 2 of 30 pairs have no verdict and are left out" in said.getvalue()
    with pytest.raises(RunError, match="the judge fails too often"):
        compare(tmp_path / "strict", files, server.url, "model=m", "concurrency=1", max_failures=0.05)


def test_a_request_that_failed_is_told_and_asked_again(server: Server, files: dict[str, str], tmp_path: Path) -> None:
    server.answer = lambda text: (400, "too long") if QUESTIONS[3] in text else longer(text)
    said = io.StringIO()
    found = compare(tmp_path / "out", files, server.url, "model=m", said=said, max_failures=0.5)
    assert found.overall.missing == 1 and "answered 400" in said.getvalue() and "too long" in said.getvalue()
    server.answer = longer
    server.asked.clear()
    assert compare(tmp_path / "out", files, server.url, "model=m").overall.missing == 0
    assert len(server.asked) == 2


def test_another_comparison_is_refused_with_what_differs(server: Server, files: dict[str, str], tmp_path: Path) -> None:
    server.answer = longer
    out = tmp_path / "out"
    compare(out, files, server.url, "model=m")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for change, words in (
        ({"settings": ("model=other",)}, 'judge.model: "m" there, "other" now'),
        ({"a": files["b"]}, "a.answers: "), ({"dimensions": "kind"}, "dimensions.names: "),
        ({"limit": 12}, "prompts.rows: 30 there, 12 now"),
        ({"settings": ("model=m", "temperature=1")}, "judge.temperature: 0.0 there, 1.0 now"),
    ):  # fmt: skip
        changed: dict[str, Any] = dict(change)
        settings = changed.pop("settings", ("model=m",))
        own = {**files, **({"a": changed.pop("a")} if "a" in changed else {})}
        with pytest.raises(AlignzooError, match="holds another comparison") as caught:
            compare(out, own, server.url, *settings, **changed)
        assert words in str(caught.value)
    assert compare(out, files, server.url, "model=m", "concurrency=2", "seconds=9").overall.pairs == 30
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.txt").write_text("x")
    with pytest.raises(AlignzooError, match="this command did not make it"):
        compare(tmp_path / "mine", files, server.url, "model=m")


def test_mistakes_are_told_before_anything_is_asked(
    server: Server, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    out = tmp_path / "out"
    short = jsonl(tmp_path / "short.jsonl", [{"answer": "x"}] * 3)
    other = jsonl(tmp_path / "other.jsonl", [{"prompt": "Who?", "answer": "x"}])
    none = jsonl(tmp_path / "none.jsonl", [{"prompt": "Who?", "text": "x"}])
    empty = jsonl(tmp_path / "empty.jsonl", [{"prompt": "", "x": 1}])
    for settings, changes, more, words in (
        ((), {}, {}, r'"model" is missing'), (("modle=m",), {}, {}, 'did you mean "model"'),
        (("m",), {}, {}, "KEY=VALUE"),
        (("model=m", "api_key_env=NOT_THERE"), {}, {}, "NOT_THERE is not set"),
        (("model=m",), {}, {"dimensions": "a,A"}, "stands there twice"),
        (("model=m",), {}, {"dimensions": "overall"}, "cannot be one"),
        (("model=m",), {"a": short}, {}, "3 answers to 30 prompts"),
        (("model=m",), {"b": other}, {}, "no answer to 30 of 30 prompts"),
        (("model=m",), {"b": none}, {}, "no column answer or output"),
        (("model=m",), {"b": "nothing.jsonl"}, {}, "no such file"),
        (("model=m",), {"prompts": empty}, {}, "rows cannot be used"),
        (("model=m",), {"a": str(tmp_path)}, {}, "holds no config.json"),
    ):  # fmt: skip
        with pytest.raises(AlignzooError, match=words):
            compare(out, {**files, **changes}, server.url, *settings, **more)
    with pytest.raises(AlignzooError, match="nothing_of_the_kind"):
        compare(out, files, "nothing_of_the_kind")
    assert not out.exists() and not server.asked


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_a_reward_model_in_a_folder(files: dict[str, str], tokenizer: Any, tmp_path: Path) -> None:
    folder = classifier(tmp_path / "scorer", tokenizer)
    said = io.StringIO()
    found = compare(tmp_path / "out", files, str(folder), "batch_size=4", said=said)
    reward = discover().reward("reward_model").cls(path=str(folder))
    reward.start("cpu")
    rows = {side: [line["answer"] for line in lines(tmp_path / f"out/answers_{side}.jsonl")] for side in "ab"}
    values = [np.array(reward(QUESTIONS, rows[side])) for side in "ab"]
    one = found.overall
    assert (one.wins, one.losses, one.pairs) == (
        int((values[0] > values[1]).sum()), int((values[0] < values[1]).sum()), 30,
    )  # fmt: skip
    assert 0 < one.wins < 30 and one.bias is None and [d.name for d in found.dimensions] == [OVERALL]
    kept = sorted(lines(tmp_path / "out/verdicts.jsonl"), key=lambda line: line["row"])
    assert [line["order"] for line in kept] == [ONCE] * 30
    assert [line["said"]["a"] for line in kept] == pytest.approx(values[0].tolist(), abs=1e-5)
    assert "there is only the overall verdict" in said.getvalue()
    other = classifier(tmp_path / "other", tokenizer)
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes() + b"")
    moved = folder.rename(tmp_path / "moved")
    assert compare(tmp_path / "out", files, str(moved), "batch_size=4").overall == one  # the same content
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    with pytest.raises(AlignzooError, match=r"judge\.content"):
        compare(tmp_path / "out", files, str(moved), "batch_size=4")


def test_a_reward_by_name_reads_the_columns_of_the_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": q, "answer": str(2 * i)} for i, q in enumerate(QUESTIONS)]
    files = {
        "prompts": jsonl(tmp_path / "p.jsonl", rows),
        "a": jsonl(tmp_path / "a.jsonl", [{"answer": str(2 * i) if i % 3 else "no"} for i in range(30)]),
        "b": jsonl(tmp_path / "b.jsonl", [{"answer": str(2 * i) if i % 2 else "no"} for i in range(30)]),
    }
    one = compare(tmp_path / "out", files, "exact").overall
    expected = [(i % 3 > 0) - (i % 2 > 0) for i in range(30)]
    assert (one.wins, one.ties, one.losses) == (expected.count(1), expected.count(0), expected.count(-1))
    files["prompts"] = jsonl(tmp_path / "bare.jsonl", [{"prompt": q} for q in QUESTIONS])
    with pytest.raises(RecipeError, match='reads the column "answer"'):
        compare(tmp_path / "bare", files, "exact")
    assert not (tmp_path / "bare").exists()


# --- answers that are drawn ------------------------------------------------------------------------------------------


def greedy(folder: Path, prompts: list[str], new: int) -> list[str]:
    """By generate() of transformers, one at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**ids, max_new_tokens=new, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        found.append(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def test_a_model_answers_greedily_and_goes_on(
    server: Server, files: dict[str, str], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    server.answer = longer
    monkeypatch.setattr(answers, "_AT_ONCE", 8)
    own, calls, draw = {**files, "a": str(tiny_folder)}, [0], answers.draw

    def dies(*words: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return draw(*words, **more)

    monkeypatch.setattr(answers, "draw", dies)
    asked = {"sampling": Sampling(6, temperature=0.0)}
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "out", own, server.url, "model=m", **asked)
    assert len(lines(tmp_path / "out/answers_a.jsonl")) == 16
    said = io.StringIO()
    found = compare(tmp_path / "out", own, server.url, "model=m", said=said, **asked)
    rows = lines(tmp_path / "out/answers_a.jsonl")
    assert [row["answer"] for row in rows] == greedy(tiny_folder, QUESTIONS, 6) and calls[0] == 5
    cut = sum(row["truncated"] for row in rows)
    assert cut and f"{cut} of 30 answers of A were cut at --max-new-tokens" in said.getvalue()
    assert found.overall.pairs == 30
    with pytest.raises(AlignzooError, match=r"sampling\.max_new_tokens: 6 there, 7 now"):
        compare(tmp_path / "out", own, server.url, "model=m", sampling=Sampling(7, temperature=0.0))
    with pytest.raises(AlignzooError, match="leave no room for 250 new ones"):
        compare(tmp_path / "big", own, server.url, "model=m", sampling=Sampling(250, temperature=0.0))


def test_a_run_answers_as_it_was_trained(
    server: Server, files: dict[str, str], tiny_folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    from runs_helpers import write_recipe

    import alignzoo

    recipe = write_recipe(tmp_path / "r", tiny_folder, train__max_steps=2, data__system="Be kind.", model__lora={})
    run = alignzoo.run(recipe, console=Console(file=io.StringIO())).run_dir
    server.answer = longer
    asked = {"sampling": Sampling(6, temperature=0.0), "limit": 4}
    compare(tmp_path / "out", {**files, "a": str(run), "b": str(tiny_folder)}, server.url, "model=m", **asked)
    merged = tmp_path / "merged"
    from alignzoo.export import export

    export(run, merged, merge=True, dtype=None, say=lambda _: None)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(merged), AutoModelForCausalLM.from_pretrained(merged)
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": QUESTIONS[0]}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    expected = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert lines(tmp_path / "out/answers_a.jsonl")[0]["answer"] == expected
    note = json.loads((tmp_path / "out/winrate.json").read_text())
    assert note["a"]["system"] == "Be kind." and note["b"]["system"] is None
    with pytest.raises(AlignzooError, match="run did not finish"):
        (run / "model").rename(run / "gone")
        compare(tmp_path / "unfinished", {**files, "a": str(run)}, server.url, "model=m")


def test_pairs_and_conversations_as_prompts(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hello"}]
    path = jsonl(tmp_path / "pairs.jsonl", [{"prompt": turns, "chosen": "a", "rejected": "b"}] * 2)
    prompts = answers.read_prompts(path, {}, None, lambda _: None)
    assert list(map(answers.plain, prompts.asked)) == ["Hello", "Hello"]
    by_text = jsonl(tmp_path / "a.jsonl", [{"prompt": "Hello", "answer": "x"}])
    found = answers.open_side(by_text, prompts, None, lambda _: None)
    assert isinstance(found, answers.Answered) and found.answers == ["x", "x"]
    two = answers.Prompts("p", "", ["one", "two"], [{}, {}])
    turned = jsonl(tmp_path / "b.jsonl", [{"instruction": "two", "output": "2"}, {"instruction": "one", "output": "1"}])
    by_prompt = answers.open_side(turned, two, None, lambda _: None)
    assert isinstance(by_prompt, answers.Answered) and by_prompt.answers == ["1", "2"]
    with pytest.raises(DataError):
        answers.read_prompts(jsonl(tmp_path / "odd.jsonl", [{"q": 1}]), {}, None, lambda _: None)


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("overall: 1", "a"), ("Overall: 2", "b"), ("- **Overall:** TIE", "tie"), ("overall: 1\noverall: 2", "b"),
        ("overall: Answer 2.", "b"), ("**overall**: **1**", "a"), ("overall: <1>", "a"), ("overall: 12", None),
        ("overall: both", None), ("not overall: 1", None), ("overall: 1, 2 or tie", None), ("overall: 1 or 2", None),
        ("", None), ("overall: 1 (it is clearer)", "a"), ("| overall: tie |", "tie"), ("overall:\n1", None),
    ],
)  # fmt: skip
def test_verdicts_are_read(text: str, verdict: str | None) -> None:
    assert read(text, "ab", [OVERALL]).verdicts == {OVERALL: verdict}
    turned = {"a": "b", "b": "a", "tie": "tie", None: None}[verdict]
    assert read(text, "ba", [OVERALL]).verdicts == {OVERALL: turned}


def test_the_length_controlled_rate_is_that_of_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    difference = rng.normal(30, 80, 300)
    x = np.tanh(difference / difference.std())
    won = (rng.random(300) < 1 / (1 + np.exp(-(0.4 + 1.2 * x)))).astype(float)
    won[:40] = 0.5
    rows, target = np.concatenate([x, x])[:, None], np.repeat([1, 0], 300)  # a tie is half a win and half a loss
    model = linear.LogisticRegression(C=10, tol=1e-12, max_iter=10_000)  # penalty 0.05 phi^2, none on theta
    model.fit(rows, target, sample_weight=np.concatenate([won, 1 - won]))
    found = length_controlled(won, difference, resamples=300)
    assert found.mean == pytest.approx(1 / (1 + np.exp(-model.intercept_[0])), abs=1e-5)
    assert found.low is not None and found.high is not None and found.low < found.mean < found.high
    assert 0.05 < found.high - found.low < 0.2
    assert length_controlled(won, np.zeros(300), 10).mean == pytest.approx(won.mean(), abs=1e-5)
    assert length_controlled([1.0], [3.0]).low is None


def test_where_length_alone_decides_the_controlled_rate_is_near_one_half() -> None:
    for seed in range(4):
        difference = np.random.default_rng(seed).normal(40, 80, 400)
        won = (difference > 0).astype(float)
        assert won.mean() > 0.65 and abs(length_controlled(won, difference, resamples=10).mean - 0.5) < 0.08


def test_the_interval_of_the_length_controlled_rate_covers() -> None:
    """Of 40 data sets, about 95 % of the intervals hold the rate that they were made with."""
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        difference = rng.normal(40, 80, 200)
        p = 1 / (1 + np.exp(-(0.5 + 1.0 * np.tanh(difference / difference.std()))))
        found = length_controlled((rng.random(200) < p).astype(float), difference, resamples=300)
        covered += bool(found.low is not None and found.high is not None and found.low <= 0.6225 <= found.high)
    assert covered >= 33


def test_the_command_and_its_page(server: Server, files: dict[str, str], tmp_path: Path) -> None:
    rows = lines(Path(files["a"]))
    rows[0]["answer"] = "<script>alert(1)</script>" + "a" * 40
    words = ["winrate", jsonl(Path(files["a"]), rows), files["b"], "--prompts", files["prompts"], "--judge", server.url,
             "--judge-set", "model=m", "--out", str(tmp_path / "out"), "--dimensions", "kind,helpful"]  # fmt: skip
    server.answer = lambda text: longer(text).replace("accurate", "kind")
    done = CliRunner().invoke(cli, words, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "position bias" in done.stdout and "length-controlled" in done.stdout and "page: " in done.stdout
    page = (tmp_path / "out/results.html").read_text()
    assert "&lt;script&gt;alert" in page and "<script" not in page and QUESTIONS[29] in page and "kind: A" in page
    assert done.stdout.count("verdicts ") > 2
    again = CliRunner().invoke(cli, [*words, "--limit", "3"])
    assert again.exit_code == 2 and "prompts.rows: 30 there, 3 now" in again.stderr
