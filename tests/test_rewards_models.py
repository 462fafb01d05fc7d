"""The rewards that ask a model: a reward model in this process, and a judge behind an address."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_helpers import SMALL
from server_helpers import Server

from alignzoo.errors import ModelError, RecipeError, RunError
from alignzoo.plugins import discover
from alignzoo.recipe import load_recipe
from alignzoo.rewards import Rewards, make_rewards

# --- a reward model ---------------------------------------------------------------------------------------------------


def classifier(folder: Path, tokenizer: Any, *, labels: int = 1, pad: bool = True, safe: bool = True) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, num_labels=labels,
        pad_token_id=tokenizer.pad_token_id if pad else None,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not safe:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def scorer(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("scorer"), tokenizer)


def started(path: Path, **settings: Any) -> Any:
    reward = discover().reward("reward_model").cls(path=str(path), **settings)
    reward.line = reward.start("cpu")
    return reward


PROMPTS: list[Any] = [
    "Where is my order?", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello é"}], "Hm", "",
]  # fmt: skip
COMPLETIONS = ["It left the house on Monday, and it should be there by now.", "Hello!", "", "日本 " * 12]


def by_hand(path: Path, prompt: Any, completion: str) -> float:
    """One text through plain transformers, without padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = [*turns, {"role": "assistant", "content": completion}]
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        return float(model.eval()(input_ids=ids).logits.item())


def test_values_are_those_of_plain_transformers_whatever_the_padding(scorer: Path) -> None:
    expected = [by_hand(scorer, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert max(expected) - min(expected) > 0.1
    for size in (1, 3, 16):
        reward = started(scorer, batch_size=size)
        assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert reward(PROMPTS[::-1], COMPLETIONS[::-1]) == pytest.approx(expected[::-1], abs=1e-5)
    assert reward([], []) == [] and not any(p.requires_grad for p in reward.model.parameters())
    assert "LlamaForSequenceClassification" in reward.line and "at most 256 tokens" in reward.line


def test_a_model_that_sees_the_padding_unless_it_is_masked(tokenizer: Any, tmp_path: Path) -> None:
    """Every position of BERT looks at every other; and this tokenizer adds a token, which the template has not."""
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForSequenceClassification

    own = copy.deepcopy(tokenizer)
    own._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", own.bos_token_id)])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(own), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, pad_token_id=own.pad_token_id, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    own.save_pretrained(tmp_path / "bert")
    expected = [by_hand(tmp_path / "bert", *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert max(expected) - min(expected) > 0.1
    assert started(tmp_path / "bert")(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)


def test_a_model_without_a_pad_token(tokenizer: Any, tmp_path: Path) -> None:
    folder = classifier(tmp_path / "m", tokenizer, pad=False)
    reward = started(folder)
    assert "one text at a time" in reward.line
    expected = [by_hand(folder, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)


def test_without_a_chat_template(scorer: Path) -> None:
    reward = started(scorer)
    ids = reward.tokenizer("Hello there")["input_ids"]
    reward.tokenizer.chat_template = None
    (value,) = reward(["Hello "], ["there"])
    assert value == pytest.approx(reward._forward([ids])[0], abs=1e-6)
    turns = [{"role": "user", "content": "Hello"}]
    assert reward([turns], ["there"])[0] == pytest.approx(
        reward._forward([reward.tokenizer("Hello\nthere")["input_ids"]])[0], abs=1e-6
    )


def test_a_text_that_is_too_long_fails_alone(scorer: Path) -> None:
    rewards = make_rewards(
        load_recipe({**SMALL, "rewards": [{"name": "reward_model", "path": str(scorer), "max_failures": 1.0}]}),
        discover(),
        lambda _: None,
    )
    rewards.start("cpu")
    scored = rewards.score(["a", "b"], ["x" * 1000, "y"], {})
    assert scored.total[0] is None and scored.total[1] == pytest.approx(by_hand(scorer, "b", "y"), abs=1e-5)
    assert scored.failed == {"reward_model": 1} and "the reward model takes 256" in scored.messages["reward_model"]


def test_models_that_are_none(scorer: Path, tokenizer: Any, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has 2 labels, not one"):
        started(classifier(tmp_path / "two", tokenizer, labels=2))
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        started(classifier(tmp_path / "pickled", tokenizer, safe=False))
    assert "safetensors" in str(caught.value)
    with pytest.raises(ModelError, match="cannot be loaded"):
        started(tmp_path / "nothing")
    language_model = tmp_path / "lm"
    language_model.mkdir()
    for file in tiny_folder.iterdir():
        (language_model / file.name).write_bytes(file.read_bytes())
    config = json.loads((language_model / "config.json").read_text())
    (language_model / "config.json").write_text(json.dumps({**config, "id2label": {"0": "LABEL_0"}, "num_labels": 1}))
    with pytest.raises(ModelError, match=r"lacks weights: .*score"):
        started(language_model)


# --- a judge ----------------------------------------------------------------------------------------------------------


def judge(server: Server, said: list[str] | None = None, **settings: Any) -> Rewards:
    table = {"name": "judge", "url": server.url, "model": "m", "max_failures": 1.0, **settings}
    return make_rewards(
        load_recipe({**SMALL, "rewards": [table]}), discover(), (said if said is not None else []).append
    )


def test_the_judge_is_asked_and_its_number_is_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "very-secret")
    server.answer = lambda text: "Score: 3\nno, rather\nScore: 8.5" if "due" in text else "Score: -1"
    rewards = judge(server, api_key_env="JUDGE_KEY", temperature=0.5, max_tokens=9)
    prompts = ["q {completion}", [{"role": "system", "content": "kind"}, {"role": "user", "content": "hi"}]]
    assert rewards.score(prompts, ["uno", "due {prompt}"], {}).total == pytest.approx([-0.1, 0.85])
    (first,) = [asked for asked in server.asked if "uno" in asked["messages"][0]["content"]]
    assert (first["path"], first["model"], first["temperature"], first["max_tokens"]) == (
        "/v1/chat/completions", "m", 0.5, 9,
    )  # fmt: skip
    texts = sorted(asked["messages"][0]["content"] for asked in server.asked)
    assert "Question:\nq {completion}\n\nAnswer:\nuno\n" in texts[0]  # what is filled in is not filled in again
    assert "Question:\nsystem:\nkind\n\nuser:\nhi\n\nAnswer:\ndue {prompt}\n" in texts[1]
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer very-secret"}


def test_a_prompt_of_ones_own_may_name_columns(server: Server) -> None:
    server.answer = lambda text: f"mark={text.count('x')}!"
    rewards = judge(server, prompt='{"a": 1} {answer} {completion}', score=r"mark=(\d+)(!)", scale=1)
    with pytest.raises(RecipeError, match='reads the column "answer", which the rows have not'):
        rewards.check_columns(["question"])
    assert rewards.score(["p"], ["xx"], {"answer": ["x"]}).total == [3.0]
    assert server.asked[0]["messages"][0]["content"] == '{"a": 1} x xx'
    assert "Authorization" not in server.headers[0]


def test_an_answer_without_a_number_is_a_failure_and_told(server: Server) -> None:
    server.answer = lambda text: "I would rather not." if "uno" in text else "Score: 10"
    said: list[str] = []
    scored = judge(server, said).score(["p", "p"], ["uno", "due"], {})
    assert scored.total == [None, 1.0] and scored.failed == {"judge": 1}
    assert "no score in the judge's answer: 'I would rather not.'" in said[0]


def test_what_may_pass_is_tried_again(server: Server) -> None:
    answers = iter([(429, "slow down"), (503, "not yet"), "Score: 5"])
    server.answer = lambda text: next(answers)
    assert judge(server).score(["p"], ["c"], {}).total == [0.5] and len(server.asked) == 3


def test_what_does_not_pass_is_not_tried_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "very-secret")
    server.answer = lambda text: (401, "the key very-secret is wrong")
    scored = judge(server, api_key_env="JUDGE_KEY").score(["p"], ["c"], {})
    assert scored.total == [None] and len(server.asked) == 1
    assert "answered 401" in scored.messages["judge"] and "secret" not in scored.messages["judge"]
    server.answer = lambda text: (500, "broken")
    assert "answered 500" in judge(server, retries=1).score(["p"], ["c"], {}).messages["judge"]
    assert len(server.asked) == 3


def test_a_judge_that_is_slow_or_gone(server: Server) -> None:
    server.answer = lambda text: time.sleep(2) or "Score: 5"
    scored = judge(server, seconds=0.2, retries=0).score(["p"], ["c"], {})
    assert scored.failed == {"judge": 1} and "Timeout" in scored.messages["judge"]
    scored = judge(server, timeout=0.3).score(["p"], ["c"], {})
    assert scored.messages["judge"] == "TimeoutError: no answer within 0.3 s"
    nobody = judge(server, url="http://127.0.0.1:9/v1", retries=0, max_failures=0.0)
    with pytest.raises(RunError, match="fails too often") as caught:
        nobody.score(["p"], ["c"], {})
    assert "ConnectError" in caught.value.why


def test_only_so_many_are_asked_at_once(server: Server) -> None:
    server.answer = lambda text: time.sleep(0.05) or "Score: 1"
    judge(server, concurrency=3).score(["p"] * 12, ["c"] * 12, {})
    assert len(server.asked) == 12 and 1 < server.most <= 3
    patient = judge(server, concurrency=1, seconds=0.5, retries=0)
    assert patient.score(["p"] * 15, ["c"] * 15, {}).failed == {
        "judge": 0
    }  # the time is that of a request, not of a queue


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "("}, "is no regular expression"), ({"score": "x"}, "has no group"),
        ({"url": "127.0.0.1:80"}, "does not begin with http"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(server: Server, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        judge(server, **settings)
