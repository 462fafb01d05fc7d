"""Small tokenizers for the tests of alignzoo.data, trained here, and what is done to a tokenizer itself."""

from __future__ import annotations

import functools

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from alignzoo.data.tokenise import ensure_pad_token

SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "foo bar foobar how are you today fine thanks the shop is open at nine good bad answer question hello there"


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS, f" {WORDS}", "foobar " * 50] * 20, trainer)
    return tokenizer.to_str()


@functools.cache
def make_tokenizer(
    bos: bool = False, closes: bool = False, template: str | None = None, eos: str | None = "</s>", **special: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE. bos: puts <s> before each text; closes: puts </s> after each. Do not change what comes out."""
    inner = Tokenizer.from_str(_trained())
    if bos or closes:
        single = " ".join([*(["<s>"] if bos else []), "$A", *(["</s>"] if closes else [])])
        ids = [(token, inner.token_to_id(token)) for token in ("<s>", "</s>")]
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokens = {"eos_token": eos, **({"bos_token": "<s>"} if bos else {}), **special}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=template, **{k: v for k, v in tokens.items() if v is not None}
    )


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML, with the end of turn as EOS and as pad token, as SmolLM2 has it."""
    return make_tokenizer(template=CHATML, eos="<|im_end|>", pad_token="<|im_end|>")


def test_the_helper_makes_what_it_says() -> None:
    assert make_tokenizer(bos=True)("foo").input_ids[0] == SPECIAL.index("<s>")
    assert make_tokenizer()("foobar").input_ids != make_tokenizer()("foo").input_ids + make_tokenizer()("bar").input_ids
    assert chat_tokenizer().pad_token_id == chat_tokenizer().eos_token_id


@pytest.mark.parametrize(
    ("special", "eos", "pad", "says"),
    [
        ({"pad_token": "<unk>"}, "</s>", "<unk>", "own"),
        ({}, "</s>", "<pad>", "vocabulary"),
    ],
)
def test_pad_token(special: dict[str, str], eos: str, pad: str, says: str) -> None:
    tokenizer = make_tokenizer.__wrapped__(eos=eos, **special)
    line = ensure_pad_token(tokenizer)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (pad, eos)
    assert pad in line
    assert says in line


def _bare(tokens: list[str], **special: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*tokens, "a"])}, unk_token=tokens[-1]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def test_pad_token_falls_back_to_unknown_then_to_eos_which_stays() -> None:
    unknown = _bare(["</s>", "<unk>"], eos_token="</s>", unk_token="<unk>")
    assert "unknown" in ensure_pad_token(unknown)
    assert unknown.pad_token == "<unk>"
    shared = _bare(["</s>"], eos_token="</s>")
    size, eos_id = len(shared), shared.eos_token_id
    assert "shared with EOS" in ensure_pad_token(shared)
    assert (shared.pad_token_id, shared.eos_token_id, len(shared)) == (eos_id, eos_id, size)
    assert "none" in ensure_pad_token(_bare(["x"]))
