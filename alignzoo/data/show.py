"""What people see of data: one row with prompt, completions and mask marked, and the first rows of a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from alignzoo.data.kinds import CONVERSIONS
from alignzoo.data.reading import Reading, read
from alignzoo.data.rows import REASONS, Example, Turns, describe, note_lines
from alignzoo.data.sources import open_source
from alignzoo.errors import DataError
from alignzoo.plugins import Registry
from alignzoo.recipe import Data, Source
from alignzoo.tree import Completion, Ids, Tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"  # around what is learned
NAMES = {
    "pairs": ("chosen", "rejected"), "demonstrations": ("completion",), "labelled": ("completion",), "prompts": (),
}  # fmt: skip
LABELS = {True: "desirable", False: "undesirable"}


def marked_example(tree: Tree, tokenizer: PreTrainedTokenizerBase, limit: int = 2000) -> Text:
    """Prompt, completions and mask of a tree, readable without colour: brackets stand around what is learned.

    limit: characters of each part; the middle of a longer one is left out.
    """
    text = Text()
    _section(text, f"prompt ({len(tree.prompt)} tokens, not learned)")
    text.append(shortened(_decoded(tree.prompt, tokenizer), limit) + "\n", style="dim")
    for name, completion in _named_branches(tree):
        _section(text, f"{name} ({len(completion.ids)} tokens, {completion.counted} learned)")
        _marked(text, completion, tokenizer, limit)
    text.append(f"{OPEN} {CLOSE} what is learned; from {tree.where or 'row ' + str(tree.row)}", style="italic")
    return text


def rendered_row(tree: Tree, tokenizer: PreTrainedTokenizerBase, limit: int = 600) -> str:
    """The same as plain text, for logs."""
    return marked_example(tree, tokenizer, limit).plain


def _named_branches(tree: Tree) -> Iterator[tuple[str, Completion]]:
    if tree.label is not None:
        names = [f"completion, {LABELS[tree.label]}"]
    elif tree.rewards is not None:
        names = [f"completion {i}, reward {reward:g}" for i, reward in enumerate(tree.rewards, start=1)]
    else:
        names = ["chosen", "rejected"] if len(tree.completions) == 2 else ["completion"] * len(tree.completions)
    yield from zip(names, tree.completions, strict=True)
    if tree.mismatched is not None:
        yield "mismatched, of another prompt and never learned", tree.mismatched


def names_of(example: Example) -> Sequence[str]:
    """What the completions of an example are called."""
    if example.rewards is not None:
        return [f"completion {i}, reward {reward:g}" for i, reward in enumerate(example.rewards, start=1)]
    return NAMES[example.kind]


def _section(text: Text, title: str) -> None:
    text.append(f"--- {title}\n", style="bold")


def _marked(text: Text, completion: Completion, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
    mask = [True] * len(completion.ids) if completion.mask is None else completion.mask.tolist()
    start = 0
    for learned, run in groupby(mask):
        end = start + len(list(run))
        part = shortened(_decoded(completion.ids[start:end], tokenizer), limit)
        text.append(f"{OPEN}{part}{CLOSE}" if learned else part, style="green" if learned else "dim")
        start = end
    text.append("\n")


def _decoded(ids: Ids, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def shortened(text: str, limit: int) -> str:
    """The text, of a longer one start and end with the number of characters between them."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


# --- alignzoo data show


def show_rows(
    path: str,
    limit: int = 3,
    *,
    split: str | None = None,
    format: str = "auto",
    columns: dict[str, str] | None = None,
    width: int = 500,
    registry: Registry | None = None,
) -> RenderableType:
    """What a source holds: format, kind, columns, all rows counted by reason, and the first `limit` rows.

    columns: ours = theirs, as data.columns. width: characters shown of each turn. registry: as for `read`. Raises
    DataError as `prepare` does, but for single bad rows.
    """
    source = Source(path=path, split=split, format=format, columns=columns or {})
    reading = read(open_source(source), source, Data(train=path, on_bad_row="skip"), registry=registry)
    first: list[Example] = []
    labels: Counter[bool | None] = Counter()
    for example in reading.examples:
        labels[example.label] += 1
        if len(first) < limit:
            first.append(example)
    if reading.format is None:
        raise DataError("\n    ".join([f"{reading.name}: no row can be read", *reading.tally.shown]))
    return Group(_summary(reading, labels), *(_example_table(example, width) for example in first))


def _summary(reading: Reading, labels: Counter[bool | None]) -> Table:
    tally, known = reading.tally, reading.format
    table = Table.grid(padding=(0, 2))
    table.add_row(Text("source", style="bold"), Text(reading.name))
    if known is not None:
        table.add_row(Text("format", style="bold"), Text(f"{known.name}: {known.description}"))
        others = [to for of, to in CONVERSIONS if of == known.kind]
        also = f" (made into {' or '.join(others)} where that is wanted)" if others else ""
        table.add_row(Text("kind", style="bold"), Text(known.kind + also))
    table.add_row(Text("columns", style="bold"), Text(", ".join(reading.columns)))
    for line in reading.remarks:
        table.add_row("", Text(line))
    if reading.unused:
        table.add_row(Text("not used", style="bold"), Text(", ".join(reading.unused)))
    table.add_row(Text("rows", style="bold"), Text(f"{tally.read} read, {tally.examples} usable"))
    if reading.format is not None and reading.format.kind == "labelled":
        table.add_row("", Text(f"{labels[True]} desirable, {labels[False]} undesirable"))
    for line in note_lines(tally.notes):
        table.add_row("", Text(line, style="yellow"))
    for reason, count in (*tally.bad.most_common(), *tally.dropped.most_common()):
        what = "bad" if reason in tally.bad else "dropped"
        table.add_row("", Text(f"{count} {what}: {REASONS[reason]} [{reason}]", style="red"))
    for line in tally.shown:
        table.add_row("", Text(line, style="red"))
    return table


def _example_table(example: Example, width: int) -> Table:
    table = Table(title=Text(example.where), title_justify="left", show_header=False, expand=True)
    table.add_column(width=12)
    table.add_column(ratio=1, overflow="fold")
    for name, text in _parts(example, width):
        table.add_row(Text(name, style="bold"), text)
    return table


def _parts(example: Example, width: int) -> Iterator[tuple[str, Text]]:
    if example.tools:
        names = [str(tool.get("function", tool).get("name", "?")) for tool in example.tools]
        yield "tools", Text(shortened(", ".join(names), width))
    if example.prompt:
        yield from _turn_rows("prompt", example.prompt, width)
    for name, turns in zip(names_of(example), example.completions, strict=True):
        yield from _turn_rows(name, turns, width, learned=True)
    if example.label is not None:
        yield "label", Text(f"{str(example.label).lower()} ({LABELS[example.label]})")
    if example.columns:
        yield "columns", Text(shortened(", ".join(f"{k}: {_plain(v)}" for k, v in example.columns.items()), width))


def _turn_rows(name: str, turns: Turns, width: int, learned: bool = False) -> Iterator[tuple[str, Text]]:
    """A row for each turn, the name beside the first of them."""
    if isinstance(turns, str):
        yield name, _row_text(turns, width, learned)
        return
    for i, turn in enumerate(turns):
        said = turn["content"] + "".join(f"\n{_plain(call)}" for call in turn.get("tool_calls", ()))
        text = _row_text(said.lstrip("\n"), width, learned and turn["role"] == "assistant")
        yield "" if i else name, Text.assemble((f"{turn['role']}: ", "italic"), text)


def _row_text(text: str, width: int, learned: bool) -> Text:
    shown = shortened(text, width)
    return Text(f"{OPEN}{shown}{CLOSE}" if learned else shown, style="green" if learned else "")


def _plain(value: object) -> str:
    """A value of a row in a few words; a function call as name and arguments."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        return f"{value['function'].get('name')}({_plain(value['function'].get('arguments'))})"
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):  # keys of several types, cycles, deep nesting
        text = describe(value)
    return text.encode("utf-8", "backslashreplace").decode()  # a row may hold what no terminal prints
