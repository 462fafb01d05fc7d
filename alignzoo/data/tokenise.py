"""Texts -> token trees: where a completion starts, what is learned of it, and what is cut.

A completion starts at the end of the common prefix of the ids of the prompt and of prompt + completion, since a
tokenizer may join characters across the boundary. The prompt of a tree is the common prefix over all completions; where
one of them starts later, its first tokens are masked. Where a completion holds turns that are not the assistant's, the
ends of its learned turns are found in the same way, and what lies between them is masked. Masks are made from lengths,
never from ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from alignzoo.data.rows import BadRow, Dropped, Turns
from alignzoo.data.template import Template, Texts, render_prompt
from alignzoo.errors import DataError
from alignzoo.recipe import Data
from alignzoo.tree import Completion, Ids, Mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|padding|>", "<PAD>")


@dataclass(frozen=True, slots=True)
class Pieces:
    """The ids of an example."""

    prompt: Ids  # (P,)
    completions: tuple[Completion, ...]
    joined: bool = False  # the tokenizer joined the end of the prompt with the start of a completion

    @property
    def longest(self) -> int:
        """Tokens of the longest completion."""
        return max((len(completion.ids) for completion in self.completions), default=0)


@dataclass(frozen=True)
class Limits:
    """The lengths that the recipe allows, in tokens, and what to do beyond them."""

    total: int
    prompt: int | None
    completion: int | None
    mode: str  # drop, prompt_left or completion_right
    bos: int | None = None  # kept where a prompt is cut at its start
    differ: bool = True  # two completions are chosen and rejected

    @classmethod
    def of(cls, data: Data, tokenizer: PreTrainedTokenizerBase, kind: str) -> Limits:
        lengths = (data.max_length, data.max_prompt_length, data.max_completion_length)
        return cls(*lengths, data.truncation, tokenizer.bos_token_id, kind == "pairs")


class Encoder:
    """Texts to ids, many at once; raw text with the BOS that the tokenizer adds and one EOS after it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, kind: str = "pairs") -> None:
        self.tokenizer, self.raw, self.differ = tokenizer, not template.chat, kind == "pairs"
        self.before = _added_before(tokenizer)
        self.eos: int | None = tokenizer.eos_token_id

    def encode(self, texts: Sequence[Texts]) -> list[Pieces | BadRow]:
        """The pieces of each example, or what is wrong with it."""
        flat = [text for example in texts for text in _flat(example)]
        ids = iter(_ids(self.tokenizer, flat))
        return [self._pieces(example, [next(ids) for _ in _flat(example)]) for example in texts]

    def prompt(self, text: str) -> list[int]:
        """The ids of a prompt alone, with the BOS."""
        ids = _ids(self.tokenizer, [text])[0]
        return self._opened(ids) if self.raw else ids

    def _opened(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self.before)] == self.before else [*self.before, *ids]

    def _closed(self, ids: list[int]) -> list[int]:
        closed = self.eos is None or (ids and ids[-1] == self.eos)
        return ids if closed else [*ids, self.eos]  # type: ignore[list-item]

    def _pieces(self, texts: Texts, ids: list[list[int]]) -> Pieces | BadRow:
        if texts.raw:
            ids = [self._opened(ids[0]), *(self._closed(self._opened(whole)) for whole in ids[1:])]
        prompt, *others = (np.asarray(one, np.int32) for one in ids)
        wholes, cuts = others[: len(texts.wholes)], others[len(texts.wholes) :]
        try:
            return split(prompt, wholes, [common_prefix(cut, wholes[0]) for cut in cuts], self.differ)
        except BadRow as problem:
            return problem


def _flat(texts: Texts) -> tuple[str, ...]:
    return (texts.prompt, *texts.wholes, *(cut for pair in texts.cuts for cut in pair))


def split(prompt: Ids, wholes: Sequence[Ids], cuts: Sequence[int] = (), differ: bool = True) -> Pieces:
    """Prompt and completions from the ids of the prompt and of prompt + completion. Raises BadRow.

    cuts: places in the first whole where a learned turn ends, the next begins, and so on.
    differ: two completions are chosen and rejected, and must not be the same.
    """
    if not wholes:
        if not len(prompt):
            raise BadRow("no-context", "the prompt has no tokens")
        return Pieces(prompt, ())
    shared = [common_prefix(prompt, whole) for whole in wholes]
    starts = [max(n, 1) for n in shared]  # nothing predicts the first token of a text: it is context
    for start, whole in zip(starts, wholes, strict=True):
        if start >= len(whole):
            raise BadRow("empty-completion" if len(prompt) else "no-context")
    first = min(starts)
    for whole in wholes[1:]:
        first = min(first, common_prefix(wholes[0], whole))
    if first == 0:
        raise BadRow("no-context", "chosen and rejected differ from the first token on, without a prompt or BOS before")
    completions = tuple(
        Completion(whole[first:].copy(), _mask(first, start, len(whole), cuts if i == 0 else ()))
        for i, (start, whole) in enumerate(zip(starts, wholes, strict=True))
    )
    if differ and len(completions) == 2 and np.array_equal(completions[0].ids, completions[1].ids):
        raise BadRow("chosen-equals-rejected", "chosen and rejected have the same tokens")
    return Pieces(wholes[0][:first].copy(), completions, joined=min(shared) < len(prompt))


def _mask(first: int, start: int, end: int, cuts: Sequence[int]) -> Mask | None:
    """What is learned of the ids from `first` to `end`: all from `start` on, but for what lies between two cuts."""
    if start == first and not cuts:
        return None
    places = np.arange(first, end)
    learned = places >= start
    for stop, again in zip(cuts[::2], cuts[1::2], strict=True):
        learned &= (places < stop) | (places >= again)
    return learned


def common_prefix(a: Ids, b: Ids) -> int:
    """How many ids the two begin with in common."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def fit(pieces: Pieces, limits: Limits) -> tuple[Pieces, tuple[str, ...]]:
    """The pieces within the limits, and the reasons of what was cut. Raises Dropped."""
    return _FITS[limits.mode](pieces, limits)


def _within(pieces: Pieces, limits: Limits) -> None:
    """Raises Dropped for the first limit that the pieces break."""
    if limits.prompt is not None and len(pieces.prompt) > limits.prompt:
        raise Dropped("prompt-too-long")
    if limits.completion is not None and pieces.longest > limits.completion:
        raise Dropped("completion-too-long")
    if len(pieces.prompt) + pieces.longest > limits.total:
        raise Dropped("too-long")


def _drop(pieces: Pieces, limits: Limits) -> tuple[Pieces, tuple[str, ...]]:
    _within(pieces, limits)
    return pieces, ()


def _cut_prompt(pieces: Pieces, limits: Limits) -> tuple[Pieces, tuple[str, ...]]:
    most = limits.total - pieces.longest
    room = most if limits.prompt is None else min(most, limits.prompt)
    prompt = pieces.prompt
    cuts: tuple[str, ...] = ()
    if len(prompt) > room:
        keeps_bos = limits.bos is not None and len(prompt) > 0 and bool(prompt[0] == limits.bos)
        if room < 1 + keeps_bos:
            raise Dropped("no-room-for-prompt")
        tail = prompt[len(prompt) - room + keeps_bos :]
        prompt, cuts = np.concatenate([prompt[: int(keeps_bos)], tail]), ("prompt-left",)
    cut = replace(pieces, prompt=prompt)
    _within(cut, limits)
    return cut, cuts


def _cut_completions(pieces: Pieces, limits: Limits) -> tuple[Pieces, tuple[str, ...]]:
    most = limits.total - len(pieces.prompt)
    room = most if limits.completion is None else min(most, limits.completion)
    if pieces.longest <= room:
        _within(pieces, limits)
        return pieces, ()
    completions = tuple(shortened(completion, room) for completion in pieces.completions)
    kept = tuple(completion for completion in completions if completion is not None)
    if len(kept) < len(completions):
        raise Dropped("no-room-for-completion")
    if limits.differ and len(kept) == 2 and np.array_equal(kept[0].ids, kept[1].ids):
        raise Dropped("equal-after-cut")
    cut = replace(pieces, completions=kept)
    _within(cut, limits)
    return cut, ("completion-right",)


_Fit = Callable[[Pieces, Limits], tuple[Pieces, tuple[str, ...]]]
_FITS: dict[str, _Fit] = {"drop": _drop, "prompt_left": _cut_prompt, "completion_right": _cut_completions}


def shortened(completion: Completion, room: int) -> Completion | None:
    """The first `room` tokens of a completion; None where none of them counts."""
    if len(completion.ids) <= room:
        return completion
    mask = None if completion.mask is None else completion.mask[: max(room, 0)].copy()
    if room < 1 or (mask is not None and not mask.any()):
        return None
    return Completion(completion.ids[:room].copy(), mask)


def prompt_ids(
    prompt: Turns, template: Template, tokenizer: PreTrainedTokenizerBase, system: str | None = None
) -> list[int]:
    """The ids to sample from: the prompt as it is in training. system: takes the place of data.system.

    Raises DataError where the template refuses the prompt, and where there is nothing to continue.
    """
    try:
        text = render_prompt(prompt, template, tokenizer, system)
    except BadRow as problem:
        raise DataError(f"a prompt to sample from cannot be written: {problem.text}") from problem
    ids = Encoder(tokenizer, template).prompt(text)
    if not ids:
        raise DataError("a prompt to sample from is empty", why="this tokenizer puts no BOS before it")
    return ids


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return encoded["input_ids"]  # type: ignore[no-any-return]


def _added_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before a text by itself, usually BOS or nothing."""
    plain, added = _ids(tokenizer, ["a"])[0], list(tokenizer("a", add_special_tokens=True)["input_ids"])
    for start in range(len(added) - len(plain) + 1):
        if added[start : start + len(plain)] == plain:
            return added[:start]
    return []


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Gives a tokenizer without a pad token one, never a new token and never another EOS. A line that says what it did.

    alignzoo itself needs none, since its masks come from lengths; other programs that load the saved model do.
    """
    if tokenizer.pad_token is not None:
        return f"pad token: {tokenizer.pad_token} (the tokenizer's own)"
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    named = next((name for name in _PAD_NAMES if name in known), None)
    for token, source in ((named, "found in the vocabulary"), (tokenizer.unk_token, "the unknown token")):
        if token is not None and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            return f"pad token: {token} ({source}; the tokenizer had none)"
    if tokenizer.eos_token is None:
        return "pad token: none (the tokenizer has neither a pad, an unknown nor an EOS token; none is needed)"
    tokenizer.pad_token = tokenizer.eos_token
    return f"pad token: {tokenizer.eos_token} (shared with EOS, which stays learned; the tokenizer had none)"
