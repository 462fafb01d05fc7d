"""Examples -> texts -> ids: the boundary, BOS and EOS, templates, truncation; compared with TRL's public functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data_tokenizers import CHATML, chat_tokenizer, make_tokenizer

from alignzoo.data.rows import BadRow, Dropped, Example
from alignzoo.data.template import choose_template, render
from alignzoo.data.tokenise import Encoder, Limits, Pieces, fit, prompt_ids, split
from alignzoo.errors import DataError
from alignzoo.recipe import Data
from alignzoo.tree import Completion

PAIR = Example("pairs", "how are you", ("fine thanks", "bad"), where="f:1")
U = {"role": "user", "content": "how are you"}
CHAT_PAIR = Example(
    "pairs", (U,), (({"role": "assistant", "content": "fine thanks"},), ({"role": "assistant", "content": "bad"},))
)


def pieces_of(example: Example, tokenizer: Any, **data: Any) -> Pieces:
    template = choose_template(Data(train="x", **data), tokenizer)
    found = Encoder(tokenizer, template).encode([render(example, template, tokenizer)])[0]
    if isinstance(found, BadRow):
        raise found
    return found


def wholes(pieces: Pieces) -> list[list[int]]:
    return [[*pieces.prompt.tolist(), *completion.ids.tolist()] for completion in pieces.completions]


def learned(pieces: Pieces) -> list[list[int]]:
    return [
        (c.ids if c.mask is None else c.ids[c.mask]).tolist()  # what the loss sees
        for c in pieces.completions
    ]


# --- the boundary


def test_raw_text_has_one_eos_and_it_is_learned() -> None:
    tokenizer = make_tokenizer()
    pieces = pieces_of(PAIR, tokenizer)
    assert wholes(pieces) == [
        [*tokenizer("how are youfine thanks").input_ids, tokenizer.eos_token_id],
        [*tokenizer("how are youbad").input_ids, tokenizer.eos_token_id],
    ]
    assert [ids[-1] for ids in learned(pieces)] == [tokenizer.eos_token_id] * 2


def test_merges_across_the_boundary() -> None:
    tokenizer = make_tokenizer()
    example = Example("pairs", "hello foo", ("bar", " today"))
    joined, apart = tokenizer("hello foobar").input_ids, tokenizer("hello foo today").input_ids
    assert joined[-1] != apart[len(joined) - 1]  # "foobar" is one token, so the first completion starts before "foo"
    pieces = pieces_of(example, tokenizer)
    eos = tokenizer.eos_token_id
    assert wholes(pieces) == [[*joined, eos], [*apart, eos]]
    assert learned(pieces) == [[joined[-1], eos], [*tokenizer(" today").input_ids, eos]]
    assert pieces.completions[0].mask is None
    assert pieces.completions[1].mask is not None
    assert pieces.completions[1].mask[0] == np.False_
    assert pieces.joined
    assert not pieces_of(Example("pairs", "hello", (" bar", " today")), tokenizer).joined


@pytest.mark.parametrize("closes", [False, True])
def test_bos_once_and_eos_once(closes: bool) -> None:
    tokenizer = make_tokenizer(bos=True, closes=closes)
    for prompt, completion in (("how are you", " fine"), ("<s>how are you", " fine"), ("how are you", " fine</s>")):
        whole = wholes(pieces_of(Example("demonstrations", prompt, (completion,)), tokenizer))[0]
        assert whole.count(tokenizer.bos_token_id) == 1
        assert whole[0] == tokenizer.bos_token_id
        assert whole.count(tokenizer.eos_token_id) == 1
        assert whole[-1] == tokenizer.eos_token_id


def test_templated_text_gets_no_second_bos() -> None:
    tokenizer = make_tokenizer(bos=True, closes=True, template="{{ bos_token }}" + CHATML)
    pieces = pieces_of(CHAT_PAIR, tokenizer)
    assert [whole.count(tokenizer.bos_token_id) for whole in wholes(pieces)] == [1, 1]
    assert [whole.count(tokenizer.eos_token_id) for whole in wholes(pieces)] == [0, 0]
    bare = make_tokenizer(bos=True, closes=True, template=CHATML)  # a template that writes no BOS is taken at its word
    assert [whole.count(bare.bos_token_id) for whole in wholes(pieces_of(CHAT_PAIR, bare))] == [0, 0]


def test_an_empty_prompt() -> None:
    with_bos = pieces_of(Example("demonstrations", "", ("fine",)), make_tokenizer(bos=True))
    assert with_bos.prompt.tolist() == [make_tokenizer(bos=True).bos_token_id]
    tokenizer = make_tokenizer()
    ids = [*tokenizer("fine thanks").input_ids, tokenizer.eos_token_id]
    without = pieces_of(Example("demonstrations", "", ("fine thanks",)), tokenizer)
    assert without.prompt.tolist() == ids[:1]  # nothing predicts the first token
    assert without.completions[0].ids.tolist() == ids[1:]
    pair = pieces_of(Example("pairs", "", ("fine thanks", "fine")), tokenizer)
    assert pair.prompt.tolist() == ids[:1]
    assert learned(pair) == [ids[1:], [tokenizer.eos_token_id]]
    with pytest.raises(BadRow, match="no-context"):  # a tree has one prompt, and these have no token in common
        pieces_of(Example("pairs", "", ("fine thanks", "bad")), tokenizer)
    assert pieces_of(Example("pairs", "", ("fine thanks", "bad")), make_tokenizer(bos=True)).completions[0].mask is None


def test_a_tokenizer_without_eos() -> None:
    tokenizer = make_tokenizer(eos=None)
    assert wholes(pieces_of(PAIR, tokenizer))[0] == tokenizer("how are youfine thanks").input_ids
    with pytest.raises(BadRow, match="no-context"):
        pieces_of(Example("demonstrations", "", ("foobar",)), tokenizer)


def test_split_refuses_what_cannot_be_learned() -> None:
    prompt = np.array([1, 2], np.int32)
    with pytest.raises(BadRow, match="empty-completion"):
        split(prompt, [prompt])
    with pytest.raises(BadRow, match="chosen-equals-rejected"):
        split(prompt, [np.array([1, 2, 3], np.int32)] * 2)


def test_every_tree_gives_back_the_ids_of_prompt_and_completion() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        prompt = rng.integers(0, 3, rng.integers(0, 5)).astype(np.int32)
        tails = [rng.integers(0, 3, rng.integers(1, 5)).astype(np.int32) for _ in range(3)]
        given = [np.concatenate([prompt[: rng.integers(0, len(prompt) + 1)], tail]) for tail in tails]
        try:
            pieces = split(prompt, given)
        except BadRow:
            continue
        for whole, found, completion in zip(given, wholes(pieces), pieces.completions, strict=True):
            assert whole.tolist() == found
            same = [i for i in range(min(len(whole), len(prompt))) if (whole[: i + 1] == prompt[: i + 1]).all()]
            mask = np.ones(len(completion.ids), bool) if completion.mask is None else completion.mask
            assert mask.any()
            assert len(pieces.prompt) >= 1
            assert len(pieces.prompt) + int(np.argmax(mask)) == max(1, len(same))


# --- templates and TRL


def test_parity_with_trl_on_a_conversation_and_on_the_same_strings() -> None:
    from trl import apply_chat_template
    from trl.data_utils import common_prefix_length

    tokenizer = chat_tokenizer()
    row = {"prompt": [U], "chosen": list(CHAT_PAIR.completions[0]), "rejected": list(CHAT_PAIR.completions[1])}
    theirs = apply_chat_template(row, tokenizer)
    prompt = tokenizer(theirs["prompt"]).input_ids
    expected = [tokenizer(theirs["prompt"] + theirs[side]).input_ids for side in ("chosen", "rejected")]
    start = min(common_prefix_length(prompt, whole) for whole in expected)
    for example in (CHAT_PAIR, PAIR):
        ours = pieces_of(example, tokenizer)
        assert ours.prompt.tolist() == prompt[:start]
        assert [c.ids.tolist() for c in ours.completions] == [whole[start:] for whole in expected]
        assert tokenizer.eos_token_id in learned(ours)[0]  # also where it is the pad token


def test_parity_with_trl_on_raw_strings() -> None:
    from trl.data_utils import common_prefix_length

    tokenizer = make_tokenizer(bos=True)  # as DPOTrainer: text + the EOS text, the tokenizer's BOS
    expected = [tokenizer(f"{PAIR.prompt}{side}{tokenizer.eos_token}").input_ids for side in PAIR.completions]
    start = min(common_prefix_length(tokenizer(PAIR.prompt).input_ids, whole) for whole in expected)
    ours = pieces_of(PAIR, tokenizer)
    assert wholes(ours) == expected
    assert len(ours.prompt) == start


def test_templates_own_ids_are_an_independent_reference() -> None:
    tokenizer = chat_tokenizer()
    turns = [U, {"role": "assistant", "content": "fine thanks"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert wholes(pieces_of(PAIR, tokenizer))[0] == whole
    ready = tokenizer.apply_chat_template([U], tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    template = choose_template(Data(train="x"), tokenizer)
    assert prompt_ids("how are you", template, tokenizer) == ready
    assert pieces_of(PAIR, tokenizer).prompt.tolist() == ready


def test_prompts_that_cannot_be_sampled_from() -> None:
    bare = make_tokenizer()
    raw = choose_template(Data(train="x"), bare)
    assert prompt_ids("how", raw, bare) == bare("how").input_ids
    assert prompt_ids("", raw, make_tokenizer(bos=True)) == [make_tokenizer(bos=True).bos_token_id]
    with pytest.raises(DataError, match="is empty"):
        prompt_ids("", raw, bare)
    with pytest.raises(DataError, match="no chat template"):
        prompt_ids((U,), raw, bare)
    refuses = make_tokenizer(template="{{ raise_exception('no') }}")
    with pytest.raises(DataError, match="cannot be written"):
        prompt_ids("how", choose_template(Data(train="x"), refuses), refuses)


def test_system_text() -> None:
    tokenizer = chat_tokenizer()
    data = Data(train="x", system="the shop")
    template = choose_template(data, tokenizer)
    assert "data.system" in template.name
    own = Example("demonstrations", ({"role": "system", "content": "own"}, U), CHAT_PAIR.completions[:1])
    for example, text in ((PAIR, "the shop"), (CHAT_PAIR, "the shop"), (own, "own")):
        assert render(example, template, tokenizer).prompt.startswith(f"<|im_start|>system\n{text}<|im_end|>")
    assert "other" in tokenizer.decode(prompt_ids("how are you", template, tokenizer, "other"))


def test_choice_of_template(tmp_path: Path) -> None:
    chat, bare = chat_tokenizer(), make_tokenizer()
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}[{{ m['content'] }}]{{ mark }}{% endfor %}")
    assert choose_template(Data(train="x"), chat).chat
    assert not choose_template(Data(train="x"), bare).chat
    assert not choose_template(Data(train="x", chat_template="none"), chat).chat
    chosen = choose_template(Data(train="x", chat_template=str(file), chat_template_kwargs={"mark": "!"}), bare)
    assert render(PAIR, chosen, bare).wholes == ("[how are you]![fine thanks]!", "[how are you]![bad]!")
    assert not render(PAIR, chosen, bare).closed
    assert render(PAIR, choose_template(Data(train="x"), chat), chat).closed
    with pytest.raises(DataError, match=r'(?s)"chatlm" is neither.*did you mean "chatml".*bundled are alpaca'):
        choose_template(Data(train="x", chat_template="chatlm"), chat)
    with pytest.raises(DataError, match="tokenize"):
        choose_template(Data(train="x", chat_template_kwargs={"tokenize": True}), chat)
    for tokenizer, data in ((bare, Data(train="x")), (chat, Data(train="x", chat_template="none"))):
        with pytest.raises(DataError, match=r"(?s)no chat template.*jinja"):
            render(CHAT_PAIR, choose_template(data, tokenizer), tokenizer)


def test_a_file_that_is_no_template(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}")
    with pytest.raises(DataError, match=r"t\.jinja, line 1: not a jinja template"):
        choose_template(Data(train="x", chat_template=str(file)), make_tokenizer())


def test_a_template_that_refuses_a_row() -> None:
    tokenizer = make_tokenizer(
        template="{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    )
    with pytest.raises(BadRow, match="template-error") as problem:
        pieces_of(PAIR, tokenizer, system="s")
    assert "no system" in problem.value.text


THINKS = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}")
TURNS_OVER = "{% if add_generation_prompt %}{{ messages[0].content }}?{% else %}{{ messages[1].content }}{% endif %}"


def test_a_prompt_that_is_no_prefix_is_handled_by_the_common_prefix() -> None:
    tokenizer = make_tokenizer(template=THINKS)
    template = choose_template(Data(train="x"), tokenizer)
    texts = render(PAIR, template, tokenizer)
    assert not texts.prefix
    pieces = pieces_of(PAIR, tokenizer)
    assert tokenizer.decode(pieces.prompt) == texts.prompt.removesuffix("<think>")
    assert tokenizer.decode(pieces.completions[0].ids) == "fine thanks<|im_end|>\n"


def test_a_prompt_that_is_written_in_another_way_is_refused_with_both_texts() -> None:
    with pytest.raises(BadRow, match="prompt-not-prefix") as problem:
        pieces_of(PAIR, make_tokenizer(template=TURNS_OVER))
    assert "'how are you?'" in problem.value.text
    assert "'fine thanks'" in problem.value.text
    begins = Example("demonstrations", (), CHAT_PAIR.completions[:1])
    with pytest.raises(BadRow, match="no-prompt"):
        pieces_of(begins, chat_tokenizer())
    with_default = "{% if messages[0].role != 'system' %}a default{% endif %}" + THINKS
    only_system = Example("demonstrations", ({"role": "system", "content": ""},), CHAT_PAIR.completions[:1])
    with pytest.raises(BadRow, match="prompt-not-prefix"):
        pieces_of(only_system, make_tokenizer(template=with_default))


# --- truncation


def tree(prompt: int, *completions: int, bos: int = 100) -> Pieces:
    ids = [Completion(np.arange(10 * k, 10 * k + n, dtype=np.int32)) for k, n in enumerate(completions, start=1)]
    return Pieces(np.arange(bos, bos + prompt, dtype=np.int32), tuple(ids))


def sizes(pieces: Pieces) -> list[int]:
    return [len(pieces.prompt), *(len(c.ids) for c in pieces.completions)]


@pytest.mark.parametrize(
    ("mode", "limits", "lengths", "expected"),
    [
        ("drop", (8, None, None), (5, 3, 2), ([5, 3, 2], ())),
        ("drop", (7, None, None), (5, 3, 2), "too-long"),
        ("drop", (99, 4, None), (5, 3), "prompt-too-long"),
        ("drop", (99, None, 2), (5, 3, 1), "completion-too-long"),
        ("prompt_left", (8, None, None), (5, 3, 2), ([5, 3, 2], ())),
        ("prompt_left", (6, None, None), (5, 3, 2), ([3, 3, 2], ("prompt-left",))),
        ("prompt_left", (99, 2, None), (5, 3, 2), ([2, 3, 2], ("prompt-left",))),
        ("prompt_left", (3, None, None), (5, 3, 2), "no-room-for-prompt"),
        ("prompt_left", (99, None, 2), (5, 3, 2), "completion-too-long"),
        ("prompt_left", (2, None, None), (0, 3, 2), "no-room-for-prompt"),
        ("completion_right", (7, None, None), (5, 3, 1), ([5, 2, 1], ("completion-right",))),
        ("completion_right", (99, None, 1), (5, 3, 2), ([5, 1, 1], ("completion-right",))),
        ("completion_right", (5, None, None), (5, 3, 2), "no-room-for-completion"),
        ("completion_right", (3, None, None), (5, 3, 2), "no-room-for-completion"),
        ("completion_right", (99, 4, None), (5, 3, 2), "prompt-too-long"),
        ("completion_right", (99, 4, 1), (5, 3, 2), "prompt-too-long"),
    ],
)
def test_truncation(mode: str, limits: tuple[int, Any, Any], lengths: tuple[int, ...], expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(Dropped, match=expected):
            fit(tree(*lengths), Limits(*limits, mode))
        return
    before = tree(*lengths)
    pieces, cuts = fit(before, Limits(*limits, mode))
    assert (sizes(pieces), cuts) == expected
    for old, new in zip(before.completions, pieces.completions, strict=True):
        assert new.ids.tolist() == old.ids[: len(new.ids)].tolist()
    assert pieces.prompt.tolist() == before.prompt[len(before.prompt) - len(pieces.prompt) :].tolist()


def test_a_cut_prompt_keeps_its_bos() -> None:
    pieces, _ = fit(tree(6, 2), Limits(5, None, None, "prompt_left", bos=100))
    assert pieces.prompt.tolist() == [100, 104, 105]
    pieces, _ = fit(tree(6, 2), Limits(5, None, None, "prompt_left", bos=104))
    assert pieces.prompt.tolist() == [103, 104, 105]
    with pytest.raises(Dropped, match="no-room-for-prompt"):
        fit(tree(6, 2), Limits(3, None, None, "prompt_left", bos=100))


def test_a_cut_never_makes_the_sides_equal_or_leaves_nothing_to_learn() -> None:
    prompt = np.array([1], np.int32)
    same = (Completion(np.array([7, 8], np.int32)), Completion(np.array([7, 9], np.int32)))
    with pytest.raises(Dropped, match="equal-after-cut"):
        fit(Pieces(prompt, same), Limits(2, None, None, "completion_right"))
    masked = (Completion(np.array([7, 8, 9], np.int32), np.array([False, False, True])), same[1])
    with pytest.raises(Dropped, match="no-room-for-completion"):
        fit(Pieces(prompt, masked), Limits(3, None, None, "completion_right"))
