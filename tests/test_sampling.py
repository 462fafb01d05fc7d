"""The sampler: against generate() of transformers, plain forward passes, exact probabilities; and any batch alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, tiny_llama
from layout_models import CONFIGS, make_model
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from transformers import GenerationConfig

from alignzoo import attention, sampling
from alignzoo.errors import DataError
from alignzoo.logprobs import positions_of
from alignzoo.sampling import Drawn, Sampling, draw, gumbel, how

STOPS = [2, 5, 9]
SLOW = {
    "Bloom": "it takes no position_ids",
    "MPT": "it takes no position_ids",
    "Mamba": "it keeps a recurrent state",
    "LFM2": "its layers are of other kinds (conv)",
}


def made_prompts(*lengths: int, seed: int = 0) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(10, VOCABULARY, n).astype(np.int32) for n in lengths]


PROMPTS = made_prompts(1, 7, 13, 20, 4)


def drawn(model: Any, prompts: Any = PROMPTS, each: int = 1, seed: int = 0, **settings: Any) -> list[list[Drawn]]:
    stops, generate = settings.pop("stops", STOPS), settings.pop("generate", None)
    return draw(
        model, prompts, each, Sampling(**({"max_new_tokens": 24} | settings)), stops=stops, pad=0,
        seeds=[(seed, int(prompt.sum()), len(prompt)) for prompt in prompts], generate=generate,
    )  # fmt: skip


def of_generate(model: Any, prompt: NDArray[np.int32], most: int = 24) -> list[int]:
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, eos_token_id=STOPS,
        pad_token_id=0,
    )  # fmt: skip
    return made[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def plain_logits(model: Any, prompt: NDArray[np.int32], ids: NDArray[np.int32]) -> Tensor:
    """The logits (n, V) that each token of a completion is drawn from, by one pass without cache and padding."""
    whole = torch.from_numpy(np.concatenate([prompt, ids]).astype(np.int64))[None]
    with torch.no_grad():
        return model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].double()  # type: ignore[no-any-return]


def of_tokens(logits: Tensor, ids: NDArray[np.int32]) -> Tensor:
    return logits.log_softmax(-1)[torch.arange(len(ids)), torch.from_numpy(ids.astype(np.int64))]


def flat(made: list[list[Drawn]]) -> list[Drawn]:
    return [one for completions in made for one in completions]


def same(a: list[list[Drawn]], b: list[list[Drawn]], tolerance: float = 1e-5) -> bool:
    return [len(made) for made in a] == [len(made) for made in b] and all(
        x.ids.tolist() == y.ids.tolist() and x.truncated == y.truncated and abs(x.logps - y.logps).max() < tolerance
        for x, y in zip(flat(a), flat(b), strict=True)
    )


# --- against other ways to the same ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_and_log_probs_for_every_kind_of_model(name: str) -> None:
    """Greedy tokens are generate()'s; the log-probs of drawn ones are those of a plain pass over all tokens."""
    model = make_model(name)
    assert how(model) == SLOW.get(name, "")
    for prompt, made in zip(PROMPTS, drawn(model, each=2, temperature=0.0), strict=True):
        wanted = of_generate(model, prompt)
        assert [one.ids.tolist() for one in made] == [wanted, wanted]
        assert made[0].truncated == (wanted[-1] not in STOPS)
    for prompt, made in zip(PROMPTS, drawn(model, each=3, temperature=1.5), strict=True):
        assert len({tuple(one.ids.tolist()) for one in made}) == 3
        for one in made:
            wanted = of_tokens(plain_logits(model, prompt, one.ids) / 1.5, one.ids)
            assert np.abs(one.logps - wanted.numpy()).max() < 2e-4


@pytest.mark.parametrize("each", range(1, 9))
def test_any_number_of_completions(each: int, model: Any) -> None:
    for prompt, made in zip(PROMPTS, drawn(model, each=each, temperature=0.0), strict=True):
        assert [one.ids.tolist() for one in made] == [of_generate(model, prompt)] * each


def filtered(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Log-probs (n, V) after the filters, written out token by token."""
    found = torch.full_like(logits, float("-inf"))
    for row, values in enumerate(logits / temperature):
        kept = sorted(range(len(values)), key=lambda v: -values[v])
        if top_k:
            kept = kept[:top_k]
        mass, nucleus = 0.0, []
        for v, p in zip(kept, values[kept].softmax(-1).tolist(), strict=True):
            if mass < top_p:
                nucleus.append(v)
            mass += p
        p = values[nucleus].softmax(-1)
        last = [v for v, q in zip(nucleus, p.tolist(), strict=True) if q >= min_p * p[0].item()]
        found[row, last] = values[last].log_softmax(-1)
    return found


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(0.7, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.1), (2.0, 20, 0.9, 0.05)],
)
def test_kept_log_probs_are_those_of_what_was_drawn_from(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    model = tiny_llama().double()
    made = drawn(model, each=4, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for prompt, completions in zip(PROMPTS, made, strict=True):
        for one in completions:
            table = filtered(plain_logits(model, prompt, one.ids), temperature, top_k, top_p, min_p)
            wanted = table[torch.arange(len(one.ids)), torch.from_numpy(one.ids.astype(np.int64))]
            assert torch.isfinite(wanted).all()
            np.testing.assert_allclose(one.logps, wanted.numpy(), rtol=2e-7, atol=1e-7)


def test_greedy_log_probs_are_those_of_the_plain_softmax() -> None:
    model = tiny_llama().double()
    for prompt, (one,) in zip(PROMPTS, drawn(model, temperature=0.0, top_k=1, top_p=0.1), strict=True):
        wanted = of_tokens(plain_logits(model, prompt, one.ids), one.ids)
        np.testing.assert_allclose(one.logps, wanted.numpy(), rtol=2e-7, atol=1e-7)


# --- chance ----------------------------------------------------------------------------------------------------------


def chi_square(counts: NDArray[Any], probabilities: NDArray[Any]) -> float:
    """The p-value, with the rarest outcomes put together."""
    expected = probabilities * counts.sum()
    often = expected >= 5
    observed, wanted = (
        np.append(counts[often], counts[~often].sum()),
        np.append(expected[often], expected[~often].sum()),
    )
    keep = wanted > 0
    return float(stats.chisquare(observed[keep], wanted[keep]).pvalue)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.4, "top_k": 6, "top_p": 0.9}])
def test_tokens_come_as_often_as_their_probabilities(settings: dict[str, Any]) -> None:
    model, each = tiny_llama(vocabulary=11), 20_000
    prompt = np.array([4, 7, 3], np.int32)
    (made,) = drawn(model, [prompt], each, max_new_tokens=2, stops=[], batch_tokens=10**6, **settings)
    wanted = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    ids = np.stack([one.ids for one in made])
    first = filtered(plain_logits(model, prompt, ids[0, :1]), **wanted)[0].exp()
    pairs = torch.stack([
        first[v] * filtered(plain_logits(model, np.append(prompt, v), ids[0, :1]), **wanted)[0].exp() for v in range(11)
    ])  # (11, 11) probabilities of the two tokens  # fmt: skip
    assert chi_square(np.bincount(ids[:, 0], minlength=11), first.numpy()) > 1e-3
    assert chi_square(np.bincount(ids[:, 0] * 11 + ids[:, 1], minlength=121), pairs.flatten().numpy()) > 1e-3


def test_the_noise_is_gumbel_noise_without_a_pattern() -> None:
    raw = np.random.PCG64([3, 1]).random_raw(60).view(np.int32).reshape(-1, 2)
    noise = gumbel(torch.from_numpy(raw), 20_000).double().numpy()
    assert stats.kstest(noise.ravel(), "gumbel_r").pvalue > 1e-3
    uniform = np.exp(-np.exp(-noise))
    near = np.corrcoef(uniform) - np.eye(60)
    assert abs(near).max() * 20_000**0.5 < 5  # standard deviations, 1,770 pairs of rows
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(uniform[:, :-lag].ravel(), uniform[:, lag:].ravel())[0, 1]) * 1_200_000**0.5 < 4
    rare = (uniform > 1 - 1e-4).sum()
    assert abs(rare - 120) < 4 * 120**0.5


def test_the_noise_of_a_key_stays_what_it_is() -> None:
    """Rollouts of a run that goes on are those of the run that stopped."""
    found = gumbel(torch.tensor([[1, 2], [-5, 7]], dtype=torch.int32), 3)
    assert found.shape == (2, 3)
    assert torch.isfinite(found).all()
    key, ids = np.array([1, 2], np.uint32), np.arange(3, dtype=np.uint32)
    x = ids * np.uint32(0x9E3779B1) + key[0]
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD) + key[1]
    x = (x ^ (x >> 15)) * np.uint32(0x735A2D97)
    x = (x ^ (x >> 15)) & np.uint32(0x7FFFFFFF)
    wanted = -np.log(-np.log1p(-(x + 0.5) / 2**31))
    np.testing.assert_allclose(found[0].numpy(), wanted, rtol=1e-5)


# --- the batch does not matter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Llama", "GPT-2", "Gemma 3, sliding window of 9", "Mistral, sliding window of 7", "OPT"]
)
def test_a_row_is_the_same_in_any_batch(name: str) -> None:
    model, prompts = make_model(name).double(), made_prompts(30, 1, 5, 17, 2, 11, seed=1)
    settings: dict[str, Any] = {"max_new_tokens": 50, "temperature": 1.5}
    whole = drawn(model, prompts, 8, **settings)
    assert sum(len(one.ids) for one in flat(whole)) > 1000
    assert len({len(one.ids) for one in flat(whole)}) > 5  # rows end at many places
    for budget in (1, 700):
        assert same(drawn(model, prompts, 8, batch_tokens=budget, **settings), whole)
    assert same(drawn(model, prompts[::-1], 8, **settings)[::-1], whole)
    assert same([made[:3] for made in whole], drawn(model, prompts, 3, **settings))
    assert same(drawn(model, prompts, 8, generate=model.generate, **settings), whole)
    assert not same(drawn(model, prompts, 8, seed=1, **settings), whole)


def test_a_row_is_the_same_in_any_batch_in_single_precision(model: Any) -> None:
    whole = drawn(model, each=32, max_new_tokens=60)
    assert sum(len(one.ids) for one in flat(whole)) > 3000
    assert same(drawn(model, each=32, max_new_tokens=60, batch_tokens=400), whole)


def test_a_longer_limit_only_goes_on(model: Any) -> None:
    short, long = drawn(model, each=4, max_new_tokens=6), drawn(model, each=4, max_new_tokens=60)
    for a, b in zip(flat(short), flat(long), strict=True):
        assert a.ids.tolist() == b.ids[:6].tolist()
        assert a.truncated == (len(b.ids) > 6 or b.truncated)


def test_prompts_are_computed_once_and_finished_rows_not_at_all(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    plain = sampling._Forward.__call__

    def counted(self: Any, ids: Tensor, *rest: Any) -> Tensor:
        shapes.append((ids.shape[0], ids.shape[1]))
        return plain(self, ids, *rest)

    monkeypatch.setattr(sampling._Forward, "__call__", counted)
    made = drawn(model, each=8, max_new_tokens=50)
    lengths = [len(one.ids) for completions in made for one in completions]
    assert shapes[0] == (5, 20)
    assert shapes[1:] == [(rows, 1) for rows, _ in shapes[1:]]
    needed = sum(n - 1 for n in lengths)
    assert needed <= sum(rows for rows, _ in shapes[1:]) <= needed * 8 / 7 + 1
    assert len(shapes) == max(lengths)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_where_completions_end(model: Any) -> None:
    made = flat(drawn(model, each=8, max_new_tokens=30))
    assert {one.truncated for one in made} == {True, False}
    for one in made:
        assert (one.ids.dtype, one.logps.dtype, len(one.ids)) == (np.int32, np.float32, len(one.logps))
        assert not np.isin(one.ids[:-1], STOPS).any()
        assert one.truncated == (one.ids[-1] not in STOPS)
        assert len(one.ids) == 30 or not one.truncated
    free = flat(drawn(model, each=8, max_new_tokens=30, stops=[]))
    assert all(one.truncated and len(one.ids) == 30 for one in free)
    for one, other in zip(made, free, strict=True):
        assert one.ids.tolist() == other.ids[: len(one.ids)].tolist()


def test_one_token(model: Any) -> None:
    for made in drawn(model, each=5, max_new_tokens=1):
        assert [(len(one.ids), one.truncated) for one in made] == [(1, one.ids[0] not in STOPS) for one in made]


def test_no_prompts_and_no_completions(model: Any) -> None:
    assert drawn(model, []) == []
    assert drawn(model, each=0) == [[] for _ in PROMPTS]


def test_an_empty_prompt_is_an_error(model: Any) -> None:
    with pytest.raises(DataError, match="prompt 2 of 2 has no tokens"):
        drawn(model, [PROMPTS[0], np.array([], np.int32)])


# --- the settings of a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("generated", [False, True])
def test_the_models_own_generation_settings_are_not_applied(generated: bool) -> None:
    plain, strict = tiny_llama(), tiny_llama()
    strict.generation_config = GenerationConfig(
        repetition_penalty=3.0, top_k=2, temperature=0.1, do_sample=True, num_beams=3, max_length=9, eos_token_id=50
    )
    kept = strict.generation_config
    options = {"generate": strict.generate} if generated else {}
    assert same(drawn(strict, each=2, **options), drawn(plain, each=2))
    assert strict.generation_config is kept


def test_training_mode_checkpointing_and_dropout_are_as_before() -> None:
    calm, model = tiny_llama(attention_dropout=0.5), tiny_llama(attention_dropout=0.5)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    model.lm_head.eval()
    assert same(drawn(model, each=2), drawn(calm, each=2))
    assert model.training and model.model.layers[0].training and not model.lm_head.training
    assert not calm.training


@pytest.mark.parametrize(
    ("name", "base"),
    [("Llama", "sdpa"), ("Llama", "eager"), ("GPT-2", "sdpa"), ("Gemma 2, soft-capped, sliding window of 9", "eager")],
)
def test_attention_over_token_trees_leaves_it_alone(name: str, base: str) -> None:
    model = make_model(name)
    model.set_attn_implementation(base)
    plain = drawn(model, each=4, max_new_tokens=40)
    attention.enable(model)
    assert model.config._attn_implementation != base
    assert same(drawn(model, each=4, max_new_tokens=40), plain)
    assert same(drawn(model, each=4, max_new_tokens=40, generate=model.generate), plain)


def with_adapter(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["in_proj"] if model.config.model_type == "mamba" else "all-linear"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return adapted.eval()


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mamba"])
def test_adapters(name: str) -> None:
    adapted = with_adapter(make_model(name))
    assert how(adapted) == SLOW.get(name, "")
    made = drawn(adapted, each=2, temperature=1.5)
    merged = adapted.merge_and_unload()
    assert not same(made, drawn(make_model(name), each=2, temperature=1.5))
    assert same(made, drawn(merged, each=2, temperature=1.5), 1e-3)


def test_autocast() -> None:
    model = tiny_llama()
    with torch.autocast("cpu", torch.bfloat16):
        made = drawn(model, each=4)
    exact = [
        of_tokens(plain_logits(model, p, one.ids), one.ids) for p, c in zip(PROMPTS, made, strict=True) for one in c
    ]
    found = np.concatenate([one.logps for c in made for one in c])
    assert np.abs(found - torch.cat(exact).numpy()).mean() < 0.05


def test_rotary_angles_that_depend_on_the_batch_are_not_padded() -> None:
    model = tiny_llama(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, max_position_embeddings=8
    )
    assert how(model) == "its rotary angles depend on the longest row of a batch (dynamic)"
    ((one,),) = drawn(model, PROMPTS[:1], temperature=0.0)
    assert one.ids.tolist() == of_generate(model, PROMPTS[0])


# --- models that have a table of positions


@pytest.mark.parametrize("name", ["GPT-2", "OPT"])
def test_what_goes_beyond_the_table_of_positions_is_refused_before_it_is_computed(name: str) -> None:
    model, forwards = make_model(name), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    fits = made_prompts(3, 256 - 8)
    assert max(len(one.ids) for one in flat(drawn(model, fits, max_new_tokens=8, stops=[]))) == 8
    plain_logits(model, fits[1], made_prompts(8)[0])  # all 256 positions can be forwarded
    forwards.clear()
    with pytest.raises(DataError, match=r"249 tokens and max_new_tokens = 8 are more than 256"):
        drawn(model, made_prompts(3, 256 - 7), max_new_tokens=8)
    assert not forwards


@pytest.mark.parametrize(("name", "table"), [("GPT-2", 256), ("OPT", 256), ("Llama", None), ("Bloom", None)])
def test_which_models_have_such_a_table(name: str, table: int | None) -> None:
    assert positions_of(make_model(name)) == table
    assert table is None or positions_of(with_adapter(make_model(name)).get_base_model()) == table
