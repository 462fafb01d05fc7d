"""From the kind of data that a file holds to the kind that a loss wants, and to the turns that are learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from alignzoo.data.rows import BadRow, Dropped, Example, Turns
from alignzoo.data.values import begin_of_last_answer, says_something
from alignzoo.errors import DataError


def _same(example: Example) -> tuple[Example, ...]:
    return (example,)


def _chosen_side(example: Example) -> tuple[Example, ...]:
    return (replace(example, kind="demonstrations", completions=example.completions[:1]),)


def _both_sides(example: Example) -> tuple[Example, ...]:
    return tuple(
        replace(example, kind="labelled", completions=(completion,), label=label)
        for completion, label in zip(example.completions, (True, False), strict=True)
    )


def _desirable(example: Example) -> tuple[Example, ...]:
    if not example.label:
        raise Dropped("undesirable")
    return (replace(example, kind="demonstrations", label=None),)


def _prompt_only(example: Example) -> tuple[Example, ...]:
    """What is asked, up to the last answer."""
    if example.kind == "demonstrations":
        example = replace(choose_turns(example, "last"), notes=example.notes)
    if not says_something(example.prompt):
        raise BadRow("no-prompt")
    return (replace(example, kind="prompts", completions=(), label=None, rewards=None),)


CONVERSIONS: dict[tuple[str, str], tuple[Callable[[Example], tuple[Example, ...]], str]] = {
    ("pairs", "demonstrations"): (_chosen_side, "the chosen side of each pair"),
    ("pairs", "labelled"): (_both_sides, "chosen labelled true and rejected false, two examples of each pair"),
    ("labelled", "demonstrations"): (_desirable, "those labelled true; the others are dropped"),
    **{
        (kind, "prompts"): (_prompt_only, "the prompts, to be answered anew")
        for kind in ("demonstrations", "pairs", "labelled", "groups")
    },
}
SHAPES = {
    "demonstrations": "prompt and completion, or messages",
    "pairs": "prompt, chosen and rejected",
    "labelled": "prompt, completion and a label",
    "groups": "prompt, completions and the reward of each, or prompts and a recipe with [rollout] and [[rewards]]",
    "prompts": "prompts without an answer",
}


def converter(
    held: str, wanted: str, source: str, columns: Sequence[str] = ()
) -> tuple[Callable[[Example], tuple[Example, ...]], str]:
    """The function from one kind to another, and what it does in words ("" where nothing is to be done).

    columns: of the source, for the error. Raises DataError where no conversion makes sense.
    """
    if held == wanted:
        return _same, ""
    if (held, wanted) in CONVERSIONS:
        return CONVERSIONS[held, wanted]
    possible = [held, *(to for of, to in CONVERSIONS if of == held and to != "prompts")]
    found = f"; columns found: {', '.join(columns[:20])}" if columns else ""
    other = f", or take a loss for {' or '.join(possible)}: `alignzoo losses` lists the kind of each"
    raise DataError(
        f"{source}: holds {held}, and the loss wants {wanted}",
        why=f"{held} ({SHAPES[held]}) do not tell {wanted} ({SHAPES.get(wanted, 'another kind of data')}){found}",
        fix=f"give data with {SHAPES.get(wanted, wanted)}"
        + (", and name its columns in data.columns where they are called otherwise" if held == "prompts" else other),
    )


# --- the turns of a demonstration


def choose_turns(example: Example, train_on: str) -> Example:
    """A demonstration with the turns that data.train_on names. Raises BadRow where one that is learned is empty."""
    completion = example.completions[0]
    if isinstance(completion, str):
        return example
    several = any(turn["role"] != "assistant" for turn in completion)
    if several and train_on == "last":
        start = begin_of_last_answer(completion)
        prompt = (*example.prompt, *completion[:start])
        example = replace(example, prompt=prompt, completions=(completion[start:],))
    _check_said(example.completions[0])
    note = f"{train_on}-turn"
    return replace(example, notes=(*example.notes, note)) if several else example


def _check_said(completion: Turns) -> None:
    for turn in () if isinstance(completion, str) else completion:
        if turn["role"] == "assistant" and not says_something((turn,)):
            raise BadRow("empty-completion", "an assistant turn of the conversation is empty")
