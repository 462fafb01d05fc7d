"""The vLLM sampler against a stand-in for TRL's VLLMGeneration: vLLM itself needs a GPU, and was not run."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from test_rollout import completions_of, metrics_of, online, run
from trl.generation import vllm_generation

from alignzoo import vllm_sampler
from alignzoo.errors import RecipeError, RunError
from alignzoo.recipe import load_recipe
from alignzoo.sampling import Sampling, draw
from alignzoo.vllm_sampler import VllmSampler

REAL = vllm_generation.VLLMGeneration


class Fake:
    """Takes what VLLMGeneration takes, keeps what it is told, and draws with the weights of its last sync."""

    made: ClassVar[list[Fake]] = []
    too_high: ClassVar[float] = 0.0  # nats that its log-probs are too high by

    def __init__(self, *words: Any, **options: Any) -> None:
        self.options = inspect.signature(REAL).bind(*words, **options).arguments
        self.model, self.synced, self.asked = self.options["model"], list[dict[str, Any]](), list[Any]()
        Fake.made.append(self)

    def sync_weights(self) -> None:
        self.synced.append({name: p.detach().clone() for name, p in self.model.named_parameters()})

    def generate(self, prompts: list[list[int]], images: None, num_generations: int) -> tuple[Any, ...]:
        self.asked.append((len(self.synced), prompts, num_generations))
        own = tiny_llama(vocabulary=self.model.config.vocab_size)
        own.load_state_dict(self.synced[-1], strict=False)
        drawn = draw(
            own, [np.asarray(ids, np.int32) for ids in prompts], 1,
            Sampling(self.options["max_completion_length"], self.options["temperature"]),
            stops=self.options["generation_kwargs"]["stop_token_ids"], pad=0,
            seeds=[(len(self.asked), place) for place in range(len(prompts))],
        )  # fmt: skip
        flat = [one for (one,) in drawn]
        logps = [[[float(lp) + self.too_high] for lp in one.logps] for one in flat]
        return prompts, [one.ids.tolist() for one in flat], logps, None


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(vllm_generation, "VLLMGeneration", Fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: True if name == "vllm" else find(name, *rest))
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(Fake, "too_high", 0.0)
    torch.set_num_threads(1)


def test_a_run_draws_with_it_and_gives_it_the_weights_of_each_window(tiny_folder: Path, tmp_path: Path) -> None:
    file = online(
        tmp_path, tiny_folder, rollout__sampler="vllm", rollout__top_k=0, data__max_length=128,
        rollout__vllm={"memory": 0.2, "sleep": True}, rollout__refresh_every_steps=2, train__learning_rate=0.02,
        loss__sampler_correction="token",
    )  # fmt: skip
    found = run(file)
    (fake,) = Fake.made
    told = {name: value for name, value in fake.options.items() if name not in ("model", "accelerator")}
    stops = told.pop("generation_kwargs")["stop_token_ids"]
    assert told.pop("processing_class").decode(stops) and told == {
        "mode": "colocate", "server_base_url": "http://127.0.0.1:8000", "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.2, "enable_sleep_mode": True, "max_model_length": 128, "trust_remote_code": False,
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_completion_length": 6, "logprobs": 0,
    }  # fmt: skip
    assert [synced for synced, _, _ in fake.asked] == [1, 2, 3, 4, 5, 6]  # 3 windows and 3 evaluations
    assert [len(prompts) for _, prompts, _ in fake.asked] == [6 * 4, 8 * 4, 8 * 4, 6 * 4, 8 * 4, 6 * 4]
    assert all(prompts[:4] == [prompts[0]] * 4 and times == 4 for _, prompts, times in fake.asked)
    steps = [r for r in metrics_of(found.run_dir) if "loss" in r]
    for record in steps:  # the log-probs of the sampler are those of the policy at the window's first step
        assert record["sampler/logp_difference_max"] < 1e-4 and record["sampler/weight"] == pytest.approx(1, abs=1e-4)
    assert not torch.equal(*(fake.synced[i]["model.layers.0.mlp.up_proj.weight"] for i in (1, 4)))
    for line in completions_of(found.run_dir):
        assert line["truncated"] == (line["tokens"] == 6) or line["tokens"] == 6


def test_what_the_two_differ_by_is_corrected_and_logged(tiny_folder: Path, tmp_path: Path) -> None:
    Fake.too_high = 0.25
    for correction, weight in (("token", np.exp(-0.25)), ("none", None)):
        file = online(
            tmp_path / correction, tiny_folder, rollout__sampler="vllm", loss__sampler_correction=correction,
            train__max_steps=1,
        )  # fmt: skip
        (record,) = (r for r in metrics_of(run(file).run_dir) if "loss" in r)
        assert record["sampler/kl"] == record["sampler/logp_difference"] == pytest.approx(0.25, abs=1e-4)
        assert record.get("sampler/weight") == (None if weight is None else pytest.approx(weight, abs=1e-4))


class Accelerator:
    num_processes = 1


def sampler(model: Any) -> VllmSampler:
    table = {
        "loss": {"name": "grpo"}, "model": {"path": "m"}, "data": {"train": "t.jsonl"}, "train": {"learning_rate": 0.1},
        "rollout": {"max_new_tokens": 5, "sampler": "vllm", "vllm": {"mode": "server", "url": "http://gpu:1"}},
    }  # fmt: skip
    return VllmSampler(model, Accelerator(), None, load_recipe(table), [9, 2])


def test_ranks_ask_for_as_many_prompts_as_the_one_with_most(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sampler(model)
    assert (Fake.made[0].options["mode"], Fake.made[0].options["server_base_url"]) == ("server", "http://gpu:1")
    prompts = [np.array([5, 6], np.int32), np.array([7], np.int32)]
    monkeypatch.setattr(vllm_sampler, "of_all_ranks", lambda _, own: [own, 3])
    found = made.draw(prompts, 2)
    assert Fake.made[0].asked[0][1:] == ([[5, 6], [5, 6], [7], [7], [5, 6], [5, 6]], 2)
    assert [len(of_prompt) for of_prompt in found] == [2, 2]
    for one in (one for of_prompt in found for one in of_prompt):
        assert one.truncated == (int(one.ids[-1]) not in (2, 9)) and len(one.ids) == len(one.logps) <= 5
        assert one.ids.dtype == np.int32 and one.logps.dtype == np.float32
    assert made.draw([], 2) == [] and Fake.made[0].asked[1][1] == [[2]] * 6  # it keeps the others company
    monkeypatch.setattr(vllm_sampler, "of_all_ranks", lambda _, own: [own])
    assert made.draw([], 2) == [] and len(Fake.made[0].asked) == 2


@pytest.mark.parametrize(("logps", "words"), [(None, "no log-probs"), ([[[None]]], "no number")])
def test_no_log_probs_stop_the_run(
    logps: Any, words: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    made = sampler(model)
    monkeypatch.setattr(vllm_sampler, "of_all_ranks", lambda _, own: [own])
    monkeypatch.setattr(Fake, "generate", lambda *_: ([[5]], [[2]], logps, None))
    with pytest.raises(RunError, match=words):
        made.draw([np.array([5], np.int32)], 1)


def test_mistakes_are_told_before_a_model_is_loaded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignzoo.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(RecipeError, match=r'vllm.*without effect: rollout\.sampler is not "vllm"'):
        run(online(tmp_path, tiny_folder, rollout__vllm={"memory": 0.5}))
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(RecipeError, match=r"(?s)it is not installed.*pip install 'alignzoo\[vllm\]'"):
        run(online(tmp_path, tiny_folder, rollout__sampler="vllm"))
