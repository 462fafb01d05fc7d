"""The chat template that a recipe asks for: the tokenizer's own, a bundled one, or a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from alignzoo.data.abilities import find_abilities
from alignzoo.data.rendering import render, render_prompt
from alignzoo.data.sources import display
from alignzoo.data.writing import Template, Texts
from alignzoo.errors import DataError
from alignzoo.recipe import Data
from alignzoo.schema import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BUNDLED", "Template", "Texts", "choose_template", "render", "render_prompt"]

_OURS = ("tokenize", "add_generation_prompt", "continue_final_message", "chat_template", "return_dict", "tools")
_RAW = "raw text, prompt and completion joined as they are, then EOS"
_EOS = "EOS"  # stands for the tokenizer's own


BUNDLED: dict[str, tuple[str, ...]] = {  # in templates/; what the tokenizer must have as one token each, the end last
    "alpaca": (_EOS,),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (_EOS,),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "plain": (_EOS,),
    "zephyr": (_EOS,),
}


def choose_template(data: Data, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that data.chat_template asks for. Raises DataError where there is none, or it is none."""
    clash = sorted(set(data.chat_template_kwargs) & set(_OURS))
    if clash:
        raise DataError(f"data.chat_template_kwargs holds {', '.join(clash)}", why="alignzoo sets these itself")
    if data.chat_template == "none":
        return Template(f"{_RAW} (data.chat_template = none)", False)
    if data.chat_template != "auto":
        return _chat(data, tokenizer, *_given(data.chat_template, tokenizer))
    if not getattr(tokenizer, "chat_template", None):
        return Template(f"{_RAW} (the tokenizer has no chat template)", False)
    return _chat(data, tokenizer, None, "the tokenizer's chat template")


def _given(value: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text of a bundled template or of a file, and how messages call it."""
    if value in BUNDLED:
        return _bundled(value, tokenizer), f'the bundled chat template "{value}"'
    path = Path(value).expanduser()
    return _read(path, value), f"the chat template {display(path)}"


def _bundled(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template; it begins with BOS where the tokenizer puts one before text by itself."""
    lacking = _lacking(name, tokenizer)
    if lacking:
        able = [other for other in BUNDLED if not _lacking(other, tokenizer)]
        token, pieces = lacking[0], len(_ids(lacking[0], tokenizer))
        raise DataError(
            f'data.chat_template = "{name}": the tokenizer has no token {", ".join(lacking)}',
            why=f"{token} would be cut into {pieces} pieces, and no single token would end a turn" if token != _EOS
            else "no token would end a turn",
            fix=(f"take a template that it has the tokens for ({', '.join(able)}), or " if able else "")
            + "add the tokens to the tokenizer and resize the model's embeddings",
        )  # fmt: skip
    text = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return ("{{- bos_token -}}" if _adds_bos(tokenizer) else "") + text


def _lacking(name: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    missing = []
    for token in BUNDLED[name]:
        ids = _ids(token, tokenizer)
        single = len(ids) == 1 and ids[0] != tokenizer.unk_token_id
        if not (tokenizer.eos_token is not None if token == _EOS else single):
            missing.append(token)
    return missing


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _read(path: Path, value: str) -> str:
    if not path.is_file():
        raise DataError(
            f'data.chat_template = "{value}" is neither "auto" nor "none", no bundled template and no file'
            f"{nearest(value, BUNDLED)}",
            why=f"bundled are {', '.join(BUNDLED)}",
            fix="give one of these, or the path of a jinja file; relative paths start at the recipe's folder",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{display(path)}: the chat template cannot be read", why=str(error)) from error
    if not text.strip():
        raise DataError(f"{display(path)}: the chat template is empty")
    return text


def _chat(data: Data, tokenizer: PreTrainedTokenizerBase, text: str | None, source: str) -> Template:
    kwargs, ends = data.chat_template_kwargs, _special_texts(tokenizer)
    template = Template("", True, text, kwargs, data.system, source, ends)
    template = replace(template, does=find_abilities(template, tokenizer))
    return replace(template, name=_words(template, data, tokenizer))


def _words(template: Template, data: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    system = ", data.system before it" if data.system is not None else ""
    options = f", {dict(data.chat_template_kwargs)}" if data.chat_template_kwargs else ""
    head = f"{template.source} (a text prompt is a user turn{system}, a text completion the assistant's turn{options})"
    return "; ".join([head, *_remarks(template, data, tokenizer)])


def _remarks(template: Template, data: Data, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What people would not expect of a template."""
    does, chosen = template.does, template.text is not None
    eos = tokenizer.eos_token
    said = {
        f"rows without a system turn get its own: {does.own_system!r}": does.own_system and data.system is None,
        "it takes no system turn: the text of one goes before the first user turn": not does.system,
        f"the generation prompt that it leaves at the end is cut: {does.leftover!r}": does.leftover,
        "it writes today's date, so another day makes other tokens": does.dated
        and not {"date_string", "strftime_now"} & set(data.chat_template_kwargs),
        f"a turn ends with {does.end}, and the tokenizer's EOS is {eos}: other programs must stop at both": chosen
        and does.end and does.end != eos,
    }  # fmt: skip
    return [words for words, holds in said.items() if holds]


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple({*added, *([tokenizer.eos_token] if tokenizer.eos_token else [])})
