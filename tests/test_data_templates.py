"""Chat templates: the bundled ones, those of many models, what they refuse, and which tokens of a turn are learned."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data_tokenizers import CHATML, make_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from alignzoo.data.formats import detect
from alignzoo.data.rendering import render, render_prompt
from alignzoo.data.rows import BadRow, Example, note_lines
from alignzoo.data.template import BUNDLED, choose_template
from alignzoo.data.tokenise import Encoder, Pieces, prompt_ids
from alignzoo.data.writing import Template, Texts
from alignzoo.errors import DataError
from alignzoo.recipe import Data

TRL = Path(str(files("trl"))) / "chat_templates"
TURNS = [
    {"role": "system", "content": "the shop"},
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "fine thanks"},
    {"role": "user", "content": "is the shop open"},
    {"role": "assistant", "content": "today at nine"},
    {"role": "user", "content": "good"},
    {"role": "assistant", "content": "good bye"},
]
ALONE = [{"role": "user", "content": "how are you"}, {"role": "assistant", "content": "fine thanks"}]
TOOLS = [{"name": "find", "description": "Finds.", "parameters": {"type": "object", "properties": {}}}]


def example_of(turns: list[dict[str, Any]], **columns: Any) -> Example:
    row = {"messages": turns, **columns}
    return detect(list(row), "auto", "f").convert(row)


def chosen(tokenizer: Any, template: str | Path = "auto", **data: Any) -> Template:
    return choose_template(Data(train="x", chat_template=str(template), **data), tokenizer)


def rendered(turns: list[dict[str, Any]], tokenizer: Any, template: str | Path = "auto", **data: Any) -> Texts:
    return render(example_of(turns), chosen(tokenizer, template, **data), tokenizer)


def pieces_of(example: Example, tokenizer: Any, template: str | Path = "auto", **data: Any) -> Pieces:
    used = chosen(tokenizer, template, **data)
    found = Encoder(tokenizer, used).encode([render(example, used, tokenizer)])[0]
    if isinstance(found, BadRow):
        raise found
    return found


def all_ids(pieces: Pieces) -> list[int]:
    return [*pieces.prompt.tolist(), *pieces.completions[0].ids.tolist()]


def mask_of(pieces: Pieces) -> list[bool]:
    completion = pieces.completions[0]
    mask = np.ones(len(completion.ids), bool) if completion.mask is None else completion.mask
    return [False] * len(pieces.prompt) + mask.tolist()


def learned_texts(pieces: Pieces, tokenizer: Any) -> list[str]:
    """What is learned, one text for each stretch of it."""
    stretches: list[list[int]] = []
    before = False
    for token, learned in zip(all_ids(pieces), mask_of(pieces), strict=True):
        if learned and not before:
            stretches.append([])
        if learned:
            stretches[-1].append(token)
        before = learned
    return [str(tokenizer.decode(stretch)) for stretch in stretches]


# --- every assistant turn, against the masks of transformers

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAME_MASK = (  # templates that TRL has marked for training, and that mark no more than what the model has to say
    "cohere", "cohere2", "gemma", "gemma3", "glm4moe", "lfm2", "lfm2_v2", "llama3", "phi3", "phi3_5", "qwen2_5_vl",
    "qwen3", "qwen3_instruct_2507", "qwen3_vl",
)  # fmt: skip


def their_mask(turns: list[dict[str, Any]], tokenizer: Any, template: str) -> tuple[list[int], list[bool]]:
    found = tokenizer.apply_chat_template(
        turns, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(found["input_ids"]), [bool(token) for token in found["assistant_masks"]]


@pytest.mark.parametrize("turns", [TURNS, TURNS[1:], TURNS[:3]], ids=["system", "plain", "one"])
def test_the_mask_is_that_of_a_template_with_generation_markers(turns: list[dict[str, Any]]) -> None:
    tokenizer = make_tokenizer(template=MARKED, eos="<|im_end|>")
    ours = pieces_of(example_of(turns), tokenizer)
    assert (all_ids(ours), mask_of(ours)) == their_mask(turns, tokenizer, MARKED)
    assert sum(mask_of(ours)) < len(mask_of(ours))


@pytest.mark.parametrize("name", SAME_MASK)
def test_the_mask_is_that_of_the_templates_of_many_models(name: str) -> None:
    file = TRL / f"{name}_training.jinja"
    if not file.exists():
        pytest.skip(f"this version of TRL has no {file.name}")
    tokenizer = make_tokenizer(bos=True)
    turns = TURNS if chosen(tokenizer, file).does.system else TURNS[1:]
    ours = pieces_of(example_of(turns), tokenizer, file)
    assert (all_ids(ours), mask_of(ours)) == their_mask(turns, tokenizer, file.read_text())


@pytest.mark.parametrize("file", sorted(TRL.glob("*.jinja")), ids=lambda file: file.stem)
def test_real_templates_learn_what_the_assistant_says_or_are_refused(file: Path) -> None:
    tokenizer = make_tokenizer(bos=True)
    last = learned_texts(pieces_of(example_of(ALONE), tokenizer, file), tokenizer)
    assert len(last) == 1
    assert "fine thanks" in last[0]
    assert "how are you" not in last[0]
    try:
        every = learned_texts(pieces_of(example_of(TURNS), tokenizer, file), tokenizer)
    except BadRow as problem:
        assert problem.reason == "turn-rewritten"
        assert 'data.train_on = "last"' in problem.text
        return
    said = [turn["content"] for turn in TURNS if turn["role"] == "assistant"]
    assert len(every) == len(said)
    assert all(text in stretch for text, stretch in zip(said, every, strict=True))
    assert not any(turn["content"] in stretch for turn in TURNS[:2] for stretch in every)


def test_every_turn_of_plain_text_and_what_is_between() -> None:
    tokenizer = make_tokenizer()
    assert learned_texts(pieces_of(example_of(TURNS), tokenizer, "plain"), tokenizer) == [
        " fine thanks</s>", " today at nine</s>", " good bye</s>"
    ]  # fmt: skip
    several = [*TURNS[:3], {"role": "assistant", "content": "and you"}, *TURNS[3:5]]
    assert learned_texts(pieces_of(example_of(several), tokenizer, "chatml"), tokenizer) == [
        "fine thanks<|im_end|>\n<|im_start|>assistant\nand you<|im_end|>\n", "today at nine<|im_end|>\n"
    ]  # fmt: skip


FORGETS = (  # as reasoning models do: the thinking of earlier turns is left out
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_both_texts() -> None:
    tokenizer = make_tokenizer(template=FORGETS)
    with pytest.raises(BadRow, match="turn-rewritten") as problem:
        rendered(TURNS, tokenizer)
    assert "assistant\\n<think></think>fine thanks" in problem.value.text
    assert "assistant\\nfine thanks" in problem.value.text
    assert 'data.train_on = "last"' in problem.value.text
    assert not rendered(ALONE, tokenizer).cuts  # with one assistant turn there is nothing to rewrite


def test_an_end_that_only_the_last_turn_has() -> None:
    closes = (
        "{% for m in messages %}{{ '<|im_start|>' + m.content }}{% if loop.last %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    tokenizer = make_tokenizer(
        template=closes.replace("{% if loop.last %}", "{% if m.role == 'assistant' and loop.last %}")
    )
    texts = rendered(TURNS, tokenizer)
    assert texts.notes == ("other-end",)
    assert learned_texts(pieces_of(example_of(TURNS), tokenizer), tokenizer) == [
        "fine thanks", "today at nine", "good bye</s>"
    ]  # fmt: skip


# --- the bundled templates

SPECIALS = ["<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>",
            "<|assistant|>", "<|system|>", "<|end|>"]  # fmt: skip
WRITTEN = {
    "alpaca": "### Instruction:\nhow are you\n\n### Response:\nfine thanks</s>",
    "chatml": "<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\nfine thanks<|im_end|>\n",
    "gemma": "<start_of_turn>user\nhow are you<end_of_turn>\n<start_of_turn>model\nfine thanks<end_of_turn>\n",
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\nhow are you<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nfine thanks<|eot_id|>",
    "mistral": "[INST] how are you [/INST] fine thanks</s>",
    "phi3": "<|user|>\nhow are you<|end|>\n<|assistant|>\nfine thanks<|end|>\n",
    "plain": "User: how are you\n\nAssistant: fine thanks</s>",
    "zephyr": "<|user|>\nhow are you</s>\n<|assistant|>\nfine thanks</s>\n",
}


def able_tokenizer(**options: Any) -> Any:
    """A tokenizer with the special tokens of every bundled template."""
    tokenizer = make_tokenizer.__wrapped__(**options)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    return tokenizer


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_templates(name: str) -> None:
    tokenizer = able_tokenizer()
    texts = rendered(ALONE, tokenizer, name)
    assert texts.wholes == (WRITTEN[name],)
    assert (texts.prefix, texts.closed, texts.notes) == (True, True, ())
    pieces = pieces_of(example_of(TURNS[1:]), tokenizer, name)
    end = tokenizer.eos_token if BUNDLED[name][-1] == "EOS" else BUNDLED[name][-1]
    stretches = learned_texts(pieces, tokenizer)
    assert [text.strip() for text in stretches] == [
        f"{said}{end}" for said in ("fine thanks", "today at nine", "good bye")
    ]
    with_bos = rendered(ALONE, able_tokenizer(bos=True), name)
    assert with_bos.wholes == (f"<s>{WRITTEN[name]}",)
    assert with_bos.prompt == f"<s>{texts.prompt}"


@pytest.mark.parametrize("name", ["gemma", "llama3", "phi3"])
def test_bundled_templates_write_what_those_models_have(name: str) -> None:
    tokenizer = able_tokenizer(bos=True)
    theirs = tokenizer.apply_chat_template(
        TURNS[1:], chat_template=(TRL / f"{name}.jinja").read_text(), tokenize=False
    ).removeprefix("<s>").removesuffix("</s>")  # fmt: skip
    assert rendered(TURNS[1:], tokenizer, name).wholes == (f"<s>{theirs}",)


@pytest.mark.parametrize(
    ("name", "token"), [("gemma", "<start_of_turn>"), ("llama3", "<|eot_id|>"), ("phi3", "<|end|>")]
)
def test_a_token_that_the_tokenizer_lacks_is_an_error_with_the_way_out(name: str, token: str) -> None:
    with pytest.raises(DataError) as error:
        chosen(make_tokenizer(), name)
    for words in (f'"{name}": the tokenizer has no token', token, "pieces", "(alpaca, chatml, mistral, plain, zephyr)"):
        assert words in str(error.value)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    unknown = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="a")
    with pytest.raises(DataError, match=r"no token <\|im_start\|>, <\|im_end\|>"):
        chosen(unknown, "chatml")
    with pytest.raises(DataError, match="no token EOS"):
        chosen(make_tokenizer(eos=None), "plain")
    with pytest.raises(DataError, match='did you mean "zephyr"'):
        chosen(make_tokenizer(), "zephir")


def test_the_end_of_a_turn_that_is_not_eos_is_said() -> None:
    assert "a turn ends with <|im_end|>, and the tokenizer's EOS is </s>" in chosen(make_tokenizer(), "chatml").name
    assert "ends with" not in chosen(make_tokenizer(eos="<|im_end|>"), "chatml").name
    assert "ends with" not in chosen(make_tokenizer(), "plain").name


def test_the_templates_are_part_of_the_package() -> None:
    folder = files("alignzoo.data") / "templates"
    assert sorted(file.name for file in folder.iterdir()) == sorted(f"{name}.jinja" for name in BUNDLED)


# --- system turns


@pytest.mark.parametrize("template", [TRL / "gemma.jinja", "mistral"], ids=["gemma", "mistral"])
def test_a_template_without_system_turns_gets_the_text_in_the_first_user_turn(template: str | Path) -> None:
    tokenizer = make_tokenizer()
    texts = rendered(TURNS, tokenizer, template)
    assert texts.prompt.count("the shop\n\nhow are you") == 1
    assert texts.notes == ("system-merged",)
    assert "it takes no system turn" in chosen(tokenizer, template).name
    given = rendered(TURNS[1:], tokenizer, template, system="the shop")
    assert given == texts
    assert rendered(TURNS[1:], tokenizer, template).notes == ()
    words = render_prompt("how are you", chosen(tokenizer, template), tokenizer, "the shop")
    assert words == texts.prompt


def test_a_template_that_leaves_out_system_turns_without_a_word() -> None:
    silent = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    texts = rendered(TURNS[:3], make_tokenizer(template=silent))
    assert texts.prompt == "<|im_start|>the shop\n\nhow are you<|im_end|>"
    only_system = render(example_of([TURNS[0], TURNS[2]]), chosen(make_tokenizer(), "mistral"), make_tokenizer())
    assert only_system.prompt == "[INST] the shop [/INST]"


def test_a_system_text_of_the_templates_own_is_said() -> None:
    tokenizer = make_tokenizer()
    for name, words in (("qwen2_5", "You are Qwen, created by Alibaba Cloud."), ("qwen3", None), ("llama3", None)):
        template = chosen(tokenizer, TRL / f"{name}.jinja")
        assert (f"rows without a system turn get its own: '{words}" in template.name) == (words is not None)
    assert "its own" not in chosen(tokenizer, TRL / "qwen2_5.jinja", system="the shop").name


def test_developer_turns() -> None:
    turns = [{"role": "developer", "content": "the shop"}, *ALONE]
    texts = rendered(turns, make_tokenizer(), TRL / "qwen2_5.jinja")
    assert texts.prompt.startswith("<|im_start|>system\nthe shop<|im_end|>")
    assert texts.notes == ("developer-as-system",)
    kept = rendered(turns, make_tokenizer(), "chatml")
    assert kept.prompt.startswith("<|im_start|>developer\nthe shop<|im_end|>")
    assert kept.notes == ()


# --- what else templates do


def test_options_of_the_template() -> None:
    tokenizer = make_tokenizer()
    prompts = [
        render_prompt(
            "how", chosen(tokenizer, TRL / "qwen3.jinja", chat_template_kwargs={"enable_thinking": on}), tokenizer
        )
        for on in (True, False)
    ]
    assert not prompts[0].endswith("</think>\n\n")
    assert prompts[1].endswith("<think>\n\n</think>\n\n")


LEAVES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def test_a_generation_prompt_that_is_left_after_the_last_turn_is_cut() -> None:
    tokenizer = make_tokenizer(template=LEAVES, eos="<|im_end|>")
    texts = rendered(TURNS, tokenizer)
    assert texts.wholes[0].endswith("good bye<|im_end|>")
    assert texts.closed
    assert texts.prompt.endswith("<|im_start|>assistant\n")
    assert learned_texts(pieces_of(example_of(TURNS), tokenizer), tokenizer)[-1] == "good bye<|im_end|>"
    assert r"is cut: '\n<|im_start|>assistant\n'" in chosen(tokenizer).name
    assert "is cut" not in chosen(make_tokenizer(template=CHATML)).name
    for_each = "{% for m in messages %}{{ m.content }}|{% endfor %}"  # an end of turn that is no token, and no header
    assert chosen(make_tokenizer(template=for_each)).does.leftover == ""
    bare = make_tokenizer(template=LEAVES.replace("<|im_start|>", "## ").replace("<|im_end|>", ""))
    with pytest.raises(DataError, match=r"(?s)leaves a generation prompt.*no special token.*add_generation_prompt"):
        chosen(bare)


def test_a_template_for_lists_of_parts() -> None:
    texts = rendered(ALONE, make_tokenizer(), TRL / "smolvlm.jinja")
    assert "how are you" in texts.prompt
    assert "fine thanks" in texts.wholes[0]


def test_text_that_a_template_leaves_out_is_noted() -> None:
    thinks = [ALONE[0], {"role": "assistant", "content": "<think>hm</think>fine thanks"}]
    texts = rendered([*thinks, *ALONE], make_tokenizer(), TRL / "deepseek_r1_distill.jinja")
    assert texts.notes == ("text-changed",)
    assert rendered(ALONE, make_tokenizer(), TRL / "deepseek_r1_distill.jinja").notes == ()


def test_a_template_that_writes_the_date_says_so() -> None:
    assert "today's date" in chosen(make_tokenizer(), TRL / "llama3_2.jinja").name
    fixed = chosen(make_tokenizer(), TRL / "llama3_2.jinja", chat_template_kwargs={"date_string": "1 Jan 2025"})
    assert "today's date" not in fixed.name


# --- tools


CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "find", "arguments": {"what": "bücher"}}]}
CALLS = [ALONE[0], CALL, {"role": "tool", "content": "two"}, {"role": "tool", "content": "three"}, ALONE[1]]


def test_tools_are_passed_to_a_template_that_knows_them() -> None:
    tokenizer = make_tokenizer()
    example = example_of(CALLS, tools=TOOLS)
    template = chosen(tokenizer, TRL / "qwen3_instruct_2507.jinja")
    texts = render(example, template, tokenizer)
    turns = [dict(turn) for turn in (*example.prompt, *example.completions[0])]  # type: ignore[arg-type]
    theirs = tokenizer.apply_chat_template(
        turns, tools=list(example.tools), chat_template=template.text, tokenize=False
    )
    assert texts.wholes == (theirs,)
    assert texts.notes == ()
    assert '"description": "Finds."' in texts.prompt
    learned = learned_texts(pieces_of(example, tokenizer, TRL / "qwen3_instruct_2507.jinja"), tokenizer)
    assert ["bücher" in learned[0], "fine thanks" in learned[1], len(learned)] == [True, True, 2]
    assert "two" not in "".join(learned)


@pytest.mark.parametrize("template", ["chatml", "mistral", "plain", TRL / "gemma.jinja"], ids=str)
def test_tools_are_text_where_the_template_knows_none(template: str | Path) -> None:
    tokenizer = make_tokenizer()
    example = example_of(CALLS, tools=TOOLS)
    used = chosen(tokenizer, template)
    texts = render(example, used, tokenizer)
    assert {"tools-as-text", "calls-as-text"} <= set(texts.notes)
    assert '"description": "Finds."' in texts.prompt
    learned = learned_texts(pieces_of(example, tokenizer, template), tokenizer)
    assert len(learned) == 2
    assert '<tool_call>\n{"name": "find", "arguments": {"what": "bücher"}}\n</tool_call>' in learned[0]
    results = "<tool_response>\ntwo\n</tool_response>\n<tool_response>\nthree\n</tool_response>"
    assert results in texts.wholes[0]
    assert "two" not in "".join(learned)
    lines = note_lines(dict.fromkeys(texts.notes, 3))
    assert any("knows no tools" in line and line.endswith("in 3 rows") for line in lines)


def test_arguments_as_text_for_a_template_that_joins_them() -> None:
    texts = rendered(CALLS, make_tokenizer(), TRL / "deepseekv3.jinja")
    assert 'find\n```json\n{"what": "bücher"}\n```' in texts.wholes[0]
    assert texts.notes == ()


# --- text without a template


def test_plain_text_meets_no_template() -> None:
    tokenizer = make_tokenizer(bos=True, template=CHATML)
    example = detect(["text"], "auto", "f").convert({"text": "how are you"})
    ids = [
        tokenizer.bos_token_id,
        *tokenizer("how are you", add_special_tokens=False).input_ids,
        tokenizer.eos_token_id,
    ]
    pieces = pieces_of(example, tokenizer)
    assert all_ids(pieces) == ids
    assert pieces.prompt.tolist() == ids[:1]
    assert pieces.completions[0].mask is None
    bare = pieces_of(example, make_tokenizer())  # without BOS the first token is context
    assert bare.prompt.tolist() == ids[1:2]
    assert all_ids(bare) == ids[1:]
    open_end = render(example, chosen(make_tokenizer(template=CHATML, eos=None)), make_tokenizer(eos=None))
    assert open_end.notes == ("no-eos",)
    assert (
        prompt_ids("how", chosen(tokenizer), tokenizer)[0] != tokenizer.bos_token_id
    )  # of the template, which has none
    assert (
        render(example, chosen(tokenizer), tokenizer).key
        != render(detect(["text"], "auto", "f").convert({"text": "other"}), chosen(tokenizer), tokenizer).key
    )
