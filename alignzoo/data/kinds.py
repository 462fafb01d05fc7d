"""From the kind of data that a file holds to the kind that a loss wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from alignzoo.data.rows import Example
from alignzoo.errors import DataError


def _chosen_side(example: Example) -> tuple[Example, ...]:
    return (replace(example, kind="demonstrations", completions=example.completions[:1]),)


def _both_sides(example: Example) -> tuple[Example, ...]:
    return tuple(
        replace(example, kind="labelled", completions=(completion,), label=label)
        for completion, label in zip(example.completions, (True, False), strict=True)
    )


CONVERSIONS: dict[tuple[str, str], tuple[Callable[[Example], tuple[Example, ...]], str]] = {
    ("pairs", "demonstrations"): (_chosen_side, "the chosen side of each pair"),
    ("pairs", "labelled"): (_both_sides, "chosen labelled true and rejected false, two examples of each pair"),
}
_SHAPES = {
    "demonstrations": "prompt and completion, or messages",
    "pairs": "prompt, chosen and rejected",
    "labelled": "prompt, completion and a label",
    "groups": "prompts whose completions are sampled and rewarded during the run",
}


def converter(held: str, wanted: str, source: str) -> tuple[Callable[[Example], tuple[Example, ...]], str]:
    """The function from one kind to another, and what it does in words ("" where nothing is to be done).

    Raises DataError where no conversion makes sense.
    """
    if held == wanted:
        return (lambda example: (example,)), ""
    if (held, wanted) in CONVERSIONS:
        return CONVERSIONS[held, wanted]
    possible = [held, *(to for of, to in CONVERSIONS if of == held)]
    raise DataError(
        f"{source}: holds {held}, and the loss wants {wanted}",
        why=f"{held} ({_SHAPES[held]}) do not tell {wanted} ({_SHAPES.get(wanted, 'another kind of data')})",
        fix=f"give data with {_SHAPES.get(wanted, wanted)}, or take a loss for {' or '.join(possible)}: "
        "`alignzoo losses` lists the kind of each",
    )
