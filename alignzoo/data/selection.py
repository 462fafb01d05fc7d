"""Choices that are made by content: which rows a weight takes, which are held out, which is mismatched with which.

All of them are functions of a sha256 of the content, so they depend neither on a seed nor on the order of the file.
What a weight or a limit takes of a source does not depend on the other sources. Held-out prompts are the first ones in
the order of their hashes: where rows are added, only prompts at the edge change sides.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from alignzoo.data.rows import Example, content_hash
from alignzoo.data.store import Keys, Numbers
from alignzoo.data.values import as_messages
from alignzoo.errors import DataError
from alignzoo.tree import Ids, Mask

MOST_ROWS = 1_000_000_000  # of a source under its weight: 8 GB of row numbers

# --- hashes of one row. 64 bits: among a million prompts, two have the same one in 1 of 37 million data sets


def short(digest: bytes) -> int:
    """The first 64 bits of a digest, as a number of the same order."""
    return int.from_bytes(digest[:8])


def prompt_key(prompt: str) -> bytes:
    """The same for two rows with the same prompt."""
    return content_hash(prompt)


def held_key(example: Example) -> int:
    """The place of a prompt in the order in which prompts are held out: of what is asked, whatever the template."""
    asked = as_messages(example.prompt, "user") if example.prompt else example.completions
    return short(content_hash(asked, salt="eval"))


def ids_key(ids: Ids) -> int:
    """The same for two prompts with the same tokens: cut at their start, two prompts may have become the same."""
    return short(hashlib.sha256(ids.tobytes()).digest())


def weight_key(example: Example) -> int:
    """What decides whether a fractional weight takes a row. example: of the kind that the source holds."""
    return short(content_hash(example.prompt, example.completions, example.label, salt="weight"))


def ring_key(prompt: bytes, ids: Sequence[Ids]) -> int:
    """The place of a row in the order in which rows give each other mismatched completions."""
    digest = hashlib.sha256(prompt)
    for part in ids:
        digest.update(len(part).to_bytes(8) + part.tobytes())
    return short(digest.digest())


# --- choices among all rows, from their hashes


def times(weight_keys: Keys, weight: float, name: str) -> Numbers:
    """How often each row counts under a weight: its whole part, and once more for the fraction that the hash picks.

    name: of the source. Raises DataError where that is more than MOST_ROWS.
    """
    if not weight * len(weight_keys) <= MOST_ROWS:
        raise DataError(
            f"{name}: weight = {weight:g}: {len(weight_keys)} rows cannot count so often",
            why=f"at most {MOST_ROWS:,} rows",
            fix="give a lower weight, and train.epochs for more passes over all rows",
        )
    whole = math.floor(weight)
    below = np.uint64(math.ceil((weight - whole) * 2**64))
    return np.asarray(whole + (weight_keys < below), np.int64)


def hold_out(prompt_keys: Keys, held_keys: Keys, fraction: float) -> Mask:
    """Which rows are held out, by prompt: all rows of a prompt are on one side. Each side has at least one row.

    A prompt has the lowest of the held_keys of its rows, since a template may write two prompts in the same way.
    Raises DataError where there is but one prompt.
    """
    keys, prompt_of, sizes = np.unique(prompt_keys, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise DataError(
            "data.eval_fraction: no rows can be held out, since all of them have the same prompt",
            fix="name held-out rows in data.eval, or set data.eval_fraction = 0",
        )
    target = max(1, round(fraction * len(prompt_keys)))
    places = np.full(len(keys), np.iinfo(np.uint64).max)
    np.minimum.at(places, prompt_of, held_keys)
    order = np.lexsort((keys, places)).tolist()
    held = _filled(order, sizes.tolist(), target) or [min(order, key=sizes.__getitem__)]
    side = np.zeros(len(sizes), np.bool_)
    side[held] = True
    return np.asarray(side[prompt_of])


def _filled(order: Sequence[int], sizes: Sequence[int], target: int) -> list[int]:
    """The first prompts of the order that fit into the target, but not all of them."""
    held: list[int] = []
    room = target
    for prompt in order:
        if room == 0 or len(held) == len(sizes) - 1:
            break
        if sizes[prompt] <= room:
            held.append(prompt)
            room -= sizes[prompt]
    return held


def partners(prompt_keys: Keys, ids_keys: Keys, ring_keys: Keys) -> Numbers:
    """For each row the one that follows it, in the order of content, with another prompt; -1 where there is none."""
    n = len(prompt_keys)
    order = np.argsort(ring_keys, kind="stable")
    prompts, ids = prompt_keys[order], ids_keys[order]
    past_prompt, past_ids = _steps_to_another(prompts), _steps_to_another(ids)
    start = np.arange(n)
    gone = past_prompt.copy()  # places from each row to the one that is tried
    unsure = start[gone < n]
    while len(unsure):
        tried = (unsure + gone[unsure]) % n
        same_prompt, same_ids = prompts[tried] == prompts[unsure], ids[tried] == ids[unsure]
        gone[unsure] += np.where(same_prompt, past_prompt[tried], np.where(same_ids, past_ids[tried], 0))
        unsure = unsure[(same_prompt | same_ids) & (gone[unsure] < n)]
    found = np.full(n, -1, np.int64)
    found[order] = np.where(gone < n, order[(start + gone) % max(n, 1)], -1)
    return found


def _steps_to_another(keys: Keys) -> Numbers:
    """For each place of a ring the number of steps to the next one with another key; n where all are the same."""
    n = len(keys)
    last = np.flatnonzero(keys != np.roll(keys, -1))  # the last places of runs of the same key
    if not len(last):
        return np.full(n, n, np.int64)
    following = np.searchsorted(last, np.arange(n))
    return np.asarray(np.append(last, last[0] + n)[following] + 1 - np.arange(n), np.int64)
