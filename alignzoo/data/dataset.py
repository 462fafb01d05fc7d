"""From the [data] section of a recipe to token trees and a report of what happened on the way.

Each source is one lazy pipeline: rows -> examples -> texts -> token trees, in batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from alignzoo.data.reading import Reading, read
from alignzoo.data.report import Report, SourceReport, lengths_of
from alignzoo.data.rows import REASONS, BadRow, Dropped, Example, Tally, bad_rows_error, content_hash, note_lines
from alignzoo.data.selection import Kept, hold_out, numbered, times, with_mismatched
from alignzoo.data.sources import Opened, open_live, open_source
from alignzoo.data.template import Template, Texts, choose_template, render
from alignzoo.data.tokenise import Encoder, Limits, Pieces, fit
from alignzoo.errors import DataError
from alignzoo.recipe import Data, Source
from alignzoo.tree import Tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 256  # examples in one call of the tokenizer


@dataclass(frozen=True)
class Prepared:
    """The rows of a run."""

    train: list[Tree]
    eval: list[Tree]  # empty where nothing is held out
    report: Report
    asked: tuple[str, ...] = ()  # the last turn of each held-out row's prompt, for people to read


@dataclass(frozen=True)
class Loaded:
    """One source after its pipeline ran."""

    role: str  # train or eval
    opened: Opened
    reading: Reading
    rows: list[Kept]


@dataclass(frozen=True)
class _Pipeline:
    """What the pipelines of all sources share."""

    data: Data
    kind: str
    tokenizer: PreTrainedTokenizerBase
    template: Template
    encoder: Encoder
    limits: Limits


@dataclass(frozen=True, slots=True)
class _Rendered:
    example: Example
    texts: Texts
    times: int


def prepare(
    data: Data,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    needs_mismatched: bool,
    train: Any = None,
    eval: Any = None,
    seed: int,
    say: Callable[[str], None],
) -> Prepared:
    """All rows of a run as token trees.

    kind: what the loss wants: "demonstrations", "pairs" or "labelled".
    needs_mismatched: each tree also gets the completion of another prompt.
    train, eval: live data in place of what the recipe names: a list of dictionaries, or one split of a data set.
    seed: of the run. Held-out and mismatched rows are chosen by content, so nothing here depends on it.
    say: gets the report line by line.

    Raises DataError: a source that cannot be read, rows that cannot be used (data.on_bad_row = "fail"), nothing kept.
    """
    del seed
    template = choose_template(data, tokenizer)
    pipeline = _Pipeline(data, kind, tokenizer, template, Encoder(tokenizer, template), Limits.of(data, tokenizer))
    loaded = [_load(pipeline, *found) for found in _sources(data, train, eval)]
    tallies = [one.reading.tally for one in loaded]
    if data.on_bad_row == "fail" and any(tally.bad for tally in tallies):
        raise bad_rows_error(tallies)
    train_rows, eval_rows, held_out = _sides(data, loaded)
    warnings = [*_warnings(pipeline, tallies), *_shared_prompts(train_rows, eval_rows)]
    cut: Counter[str] = Counter()
    if needs_mismatched:
        train_rows = with_mismatched(train_rows, data.max_length, "training rows", cut)
        eval_rows = with_mismatched(eval_rows, data.max_length, "held-out rows", cut)
    trees, held = numbered(train_rows), numbered(eval_rows)
    sources = tuple(_source_report(one) for one in loaded)
    lengths = lengths_of([*trees, *held])
    report = Report(sources, template.name, len(trees), len(held), held_out, lengths, cut, tuple(warnings))
    for line in report.lines():
        say(line)
    return Prepared(trees, held, report, tuple(row.asked for row in eval_rows for _ in range(row.times)))


def _sources(data: Data, train: Any, eval: Any) -> Iterator[tuple[str, Source, Opened]]:
    for role, live, named in (("train", train, data.train), ("eval", eval, data.eval)):
        if live is not None:
            yield role, Source(path=role), open_live(live, role)
            continue
        for source in (Source(path=named),) if isinstance(named, str) else named or ():
            yield role, source, open_source(source)


# --- one source


def _load(pipeline: _Pipeline, role: str, source: Source, opened: Opened) -> Loaded:
    reading = read(opened, source, pipeline.data, pipeline.kind)
    rendered = _render_all(pipeline, reading, source.weight)
    rows = [kept for batch in _batches(rendered) for kept in _tokenise(pipeline, batch, reading.tally)]
    return Loaded(role, opened, reading, rows)


def _render_all(pipeline: _Pipeline, reading: Reading, weight: float) -> Iterator[_Rendered]:
    """Examples as text. Once a bad row will stop the run anyway, the others are only counted."""
    tally, stops = reading.tally, pipeline.data.on_bad_row == "fail"
    for example in reading.examples:
        count = times(example, weight)
        if not count:
            tally.dropped["weight"] += 1
        elif not (stops and tally.bad):
            try:
                yield _Rendered(example, render(example, pipeline.template, pipeline.tokenizer), count)
            except BadRow as problem:
                tally.add_bad(example.where, problem)


def _batches(rendered: Iterator[_Rendered]) -> Iterator[list[_Rendered]]:
    while batch := list(islice(rendered, _BATCH)):
        yield batch


def _tokenise(pipeline: _Pipeline, batch: list[_Rendered], tally: Tally) -> Iterator[Kept]:
    encoded = pipeline.encoder.encode([one.texts for one in batch])
    for one, pieces in zip(batch, encoded, strict=True):
        try:
            yield _kept(pipeline, one, pieces, tally)
        except BadRow as problem:
            tally.add_bad(one.example.where, problem)
        except Dropped as too_long:
            tally.dropped[too_long.reason] += 1


def _kept(pipeline: _Pipeline, one: _Rendered, pieces: Pieces | BadRow, tally: Tally) -> Kept:
    if isinstance(pieces, BadRow):
        raise pieces
    fitted, cuts = fit(pieces, pipeline.limits)
    tally.cut.update(cuts)
    tally.kept += 1
    tally.counted += one.times
    tally.notes.update(
        note
        for note, holds in (
            ("joined", pieces.joined and one.texts.prefix),
            ("other-prompt", not one.texts.prefix),
            ("open-end", not one.texts.closed),
        )
        if holds
    )
    tally.notes.update(one.texts.notes)
    example = one.example
    tree = Tree(0, fitted.prompt, fitted.completions, example.where, example.label, extra=example.extra)
    asked = example.prompt if isinstance(example.prompt, str) else "".join(t["content"] for t in example.prompt[-1:])
    return Kept(tree, content_hash(one.texts.key), one.times, asked)


# --- all of them


def _sides(data: Data, loaded: Iterable[Loaded]) -> tuple[list[Kept], list[Kept], str]:
    """Training rows, held-out rows, and in words where those come from."""
    by_role: dict[str, list[Kept]] = {"train": [], "eval": []}
    given = {one.role for one in loaded}
    for one in loaded:
        by_role[one.role] += one.rows
    for role in ("train", "eval"):
        if role in given and not by_role[role]:
            raise _nothing_kept(role, [one for one in loaded if one.role == role])
    if "eval" in given:
        return by_role["train"], by_role["eval"], "data.eval"
    if not data.eval_fraction:
        return by_role["train"], [], "neither data.eval nor data.eval_fraction is given"
    train, held = hold_out(by_role["train"], data.eval_fraction)
    return train, held, f"by prompt, data.eval_fraction = {data.eval_fraction:g}"


def _nothing_kept(role: str, loaded: list[Loaded]) -> DataError:
    counts: Counter[str] = Counter()
    for one in loaded:
        counts += one.reading.tally.bad + one.reading.tally.dropped
    names = ", ".join(one.opened.name for one in loaded)
    shown = [line for one in loaded for line in one.reading.tally.shown]
    what = f"{names}: no row is left of {sum(one.reading.tally.read for one in loaded)}"
    return DataError(
        "\n    ".join([what, *shown[:5]]),
        why="; ".join(f"{n} x {reason}: {REASONS[reason]}" for reason, n in counts.most_common()),
        fix=f"mend the rows of data.{role}, or change the key that dropped them",
    )


def _warnings(pipeline: _Pipeline, tallies: list[Tally]) -> Iterator[str]:
    notes: Counter[str] = Counter()
    for tally in tallies:
        notes += tally.notes
    template, n = pipeline.template, sum(tally.kept for tally in tallies)
    if notes["joined"]:
        yield (
            f"in {notes['joined']} of {n} rows the tokenizer joins the prompt's end with the start of a completion; "
            "the joined token is learned with the completion"
        )
    if notes["other-prompt"]:
        yield (
            f"in {notes['other-prompt']} of {n} rows the template ends the prompt in another way when a completion "
            "follows; the completion begins where the two part"
        )
    if notes["open-end"]:
        yield (
            f"{notes['open-end']} of {n} rendered conversations do not end with an end-of-turn token: the model does "
            "not learn to stop"
        )
    if not template.chat and pipeline.encoder.eos is None:
        yield "the tokenizer has no EOS token: the model does not learn to stop"
    if not template.chat and pipeline.data.system is not None:
        yield "data.system is not used: raw text has no turns"


def _shared_prompts(train: list[Kept], held: list[Kept]) -> Iterator[str]:
    prompts = {row.prompt_key for row in train}
    shared = sum(row.prompt_key in prompts for row in held)
    if shared:
        yield f"{shared} of {len(held)} held-out rows have a prompt that is also trained on"


def _source_report(loaded: Loaded) -> SourceReport:
    reading, tally = loaded.reading, loaded.reading.tally
    return SourceReport(
        role=loaded.role,
        path=reading.name,
        format=reading.format.name if reading.format else "unknown",
        kind=reading.format.kind if reading.format else "unknown",
        rows=tally.read,
        kept=tally.kept,
        counted=tally.counted,
        dropped=dict(tally.bad + tally.dropped),
        cut=dict(tally.cut),
        conversion=_conversion_line(reading),
        unused=reading.unused,
        sha256=loaded.opened.digest(),
        said=(*reading.remarks, *note_lines(tally.notes)),
    )


def _conversion_line(reading: Reading) -> str:
    if not reading.conversion or reading.format is None:
        return ""
    usable = reading.tally.read - sum(reading.tally.bad.values())
    return f"{usable} {reading.format.kind} -> {reading.tally.examples} examples: {reading.conversion}"
