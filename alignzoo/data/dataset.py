"""From the [data] section of a recipe to token trees and a report of what happened on the way.

Each source becomes a store on disk, from rows over examples and texts to tokens, batch by batch; or it comes from the
cache. What counts how often, what is held out and what is mismatched with what is then chosen among stored rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from alignzoo.data.cache import DataCache, settings_key, store_key
from alignzoo.data.encode import CUT, Pipeline
from alignzoo.data.filling import Facts, StoppedByBadRows, fill
from alignzoo.data.formats_found import strangers
from alignzoo.data.reading import read
from alignzoo.data.report import Report, SourceReport, lengths_of
from alignzoo.data.rows import REASONS, bad_rows_error, note_lines
from alignzoo.data.selection import hold_out, partners, times
from alignzoo.data.sources import Opened, open_live, open_source
from alignzoo.data.store import Numbers, Store, StoreWriter, Trees, joined
from alignzoo.data.template import choose_template
from alignzoo.data.tokenise import Encoder, Limits
from alignzoo.data.watch import Watch
from alignzoo.errors import DataError
from alignzoo.plugins import Registry
from alignzoo.recipe import Data, Source
from alignzoo.tree import Mask, Tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_MANY = 0.1  # part of the examples whose loss is worth a warning
_LENGTHS = ("too-long", "prompt-too-long", "completion-too-long", "no-room-for-prompt", "no-room-for-completion")


@dataclass(frozen=True)
class Prepared:
    """The rows of a run. Trees are on disk, and built when they are asked for."""

    train: Trees
    eval: Trees  # empty where nothing is held out
    report: Report

    @property
    def asked(self) -> Sequence[str]:
        """The last turn of each held-out row's prompt, for people to read."""
        return self.eval.asked

    @property
    def highest_token(self) -> int:
        """The highest token id of all rows."""
        return max(self.train.highest_token, self.eval.highest_token)

    @property
    def lengths(self) -> Numbers:
        """Tokens of each row's prompt and longest completion, first of the training rows, (rows,)."""
        return np.concatenate([t.prompt_lengths + t.column("longest") for t in (self.train, self.eval)])

    @property
    def shortest(self) -> Tree:
        """A training row with as few tokens as any."""
        return self.train[self.train.shortest]

    def rows_over(self, positions: int, *, packed: bool = False, shared: bool = False) -> int:
        """How many rows forward more positions than that where they run alone, laid out in this way."""
        found = (t.packed_positions(shared) if packed else t.positions for t in (self.train, self.eval))
        return sum(int((of_rows > positions).sum()) for of_rows in found)


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
    watch: Watch | None = None,
    registry: Registry | None = None,
) -> Prepared:
    """All rows of a run as token trees.

    kind: what the loss wants: "demonstrations", "pairs", "labelled" or "groups".
    needs_mismatched: each tree also gets the completion of another prompt.
    train, eval: live data in place of what the recipe names: a list of dictionaries, or one split of a data set.
    seed: of the run. Held-out and mismatched rows are chosen by content, so nothing here depends on it.
    say: gets the report line by line, and what the cache has to tell.
    watch: is told how far it is; lines by `say` if not given.
    registry: where a format that the recipe names is looked for; alignzoo's own if not given.

    Raises DataError: a source that cannot be read, rows that cannot be used (data.on_bad_row = "fail"), nothing kept.
    """
    del seed
    pipeline = make_pipeline(data, kind, tokenizer)
    loaded = _load(pipeline, _open(data, train, eval, registry), say, watch or Watch(say))
    train_side, eval_side, held_out = _sides(data, loaded)
    warnings = [*_warnings(pipeline, loaded), *_shared_prompts(train_side, eval_side)]
    cut: Counter[str] = Counter()
    views = []
    for side, name in ((train_side, "training rows"), (eval_side, "held-out rows")):
        matched = _partners(side, data.max_length, name, cut) if needs_mismatched else None
        views.append(side.view(matched, data.max_length))
    trees, held = views
    sources = tuple(one.report for one in loaded)
    lengths = lengths_of(trees, held)
    report = Report(sources, pipeline.template.name, len(trees), len(held), held_out, lengths, cut, tuple(warnings))
    for line in report.lines():
        say(line)
    return Prepared(trees, held, report)


def held_out(
    prepared: Prepared,
    data: Data,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: Any = None,
    eval: Any = None,
    say: Callable[[str], None],
    watch: Watch | None = None,
    registry: Registry | None = None,
) -> Trees:
    """The held-out prompts of `prepared`, from the same sources, with their rows as another kind of data, each once.

    say: gets no report, but what the cache has to tell. Raises DataError as `prepare` does.
    """
    pipeline = make_pipeline(data, kind, tokenizer)
    found = _open(data, train, eval, registry)
    chosen = [one for one in found if one.role == "eval"] or found
    side = _Side.of(_load(pipeline, chosen, say, watch or Watch(say)))
    there = np.isin(side.column("prompt_key"), prepared.eval.column("prompt_key"))
    return side.once(there).view(None, data.max_length)


def make_pipeline(data: Data, kind: str, tokenizer: PreTrainedTokenizerBase) -> Pipeline:
    """What all sources of a run share. Raises DataError where there is no such template."""
    template = choose_template(data, tokenizer)
    return Pipeline(
        data, kind, tokenizer, template, Encoder(tokenizer, template, kind), Limits.of(data, tokenizer, kind)
    )


# --- sources


@dataclass(frozen=True)
class _Found:
    """A source that is there."""

    role: str  # train or eval
    source: Source
    opened: Opened
    stamp: object  # of its content before it was hashed
    registry: Registry | None  # where its format is looked for


def _open(data: Data, train: Any, eval: Any, registry: Registry | None) -> list[_Found]:
    found = []
    for role, live, named in (("train", train, data.train), ("eval", eval, data.eval)):
        if live is not None:
            opened = open_live(live, role)
            found.append(_Found(role, Source(path=role, format=data.format), opened, opened.stamp(), registry))
            continue
        for source in (Source(path=named, format=data.format),) if isinstance(named, str) else named or ():
            opened = open_source(source)
            found.append(_Found(role, source, opened, opened.stamp(), registry))
    return found


@dataclass(frozen=True)
class _Loaded:
    """A source that was prepared, now or in an earlier run."""

    role: str
    opened: Opened
    store: Store
    facts: Facts
    times: Numbers  # how often each stored row counts

    @property
    def kept(self) -> int:
        """Examples that count at all."""
        return int((self.times > 0).sum())

    @cached_property
    def marks(self) -> Counter[str]:
        """How many of these have which mark."""
        return +Counter({mark: int((self.store.marked(mark) & (self.times > 0)).sum()) for mark in self.store.marks})

    @property
    def notes(self) -> Counter[str]:
        """What is worth knowing of the rows."""
        return self.facts.tally.notes + Counter({k: n for k, n in self.marks.items() if not k.startswith(CUT)})

    @property
    def dropped(self) -> Counter[str]:
        """What was left out, by reason."""
        tally = self.facts.tally
        return tally.bad + tally.dropped + Counter(weight=len(self.store) - self.kept)

    @property
    def report(self) -> SourceReport:
        facts, cuts = self.facts, {k.removeprefix(CUT): n for k, n in self.marks.items() if k.startswith(CUT)}
        return SourceReport(
            role=self.role,
            path=self.opened.name,
            format=facts.format,
            kind=facts.kind,
            rows=facts.tally.read,
            kept=self.kept,
            counted=int(self.times.sum()),
            dropped=dict(self.dropped),
            cut=cuts,
            conversion=facts.converted,
            unused=facts.unused,
            sha256=self.opened.digest(),
            said=(*facts.remarks, *note_lines(self.notes)),
        )


def _load(pipeline: Pipeline, found: Sequence[_Found], say: Callable[[str], None], watch: Watch) -> list[_Loaded]:
    """All sources, each from the cache or prepared now. What is wrong with the start of one is told before that."""
    cache = DataCache(say)
    keys = _keys(pipeline, found, say)
    stores = [cache.find(key, one.opened.name) if key else None for one, key in zip(found, keys, strict=True)]
    rows = sum(len(store) for store in stores if store is not None)
    if rows:
        say(f"prepared data: {rows} rows from the cache {cache.folder}")
    jobs = [None if store is not None else _job(pipeline, one, watch) for one, store in zip(found, stores, strict=True)]
    tallies, loaded = [], []
    for one, key, store, job in zip(found, keys, stores, jobs, strict=True):
        try:
            if store is None and job is not None:
                store = cache.make(key, one.opened.name, job)
        except StoppedByBadRows as stopped:
            tallies.append(stopped.tally)
            continue
        finally:
            watch.close()
        assert store is not None
        loaded.append(_loaded(one, store))
        tallies.append(loaded[-1].facts.tally)
    if any(tally.bad for tally in tallies) and pipeline.data.on_bad_row == "fail":
        raise bad_rows_error(tallies)
    return loaded


def _job(pipeline: Pipeline, found: _Found, watch: Watch) -> Callable[[StoreWriter], Mapping[str, Any]]:
    """What fills the store of a source; its format is found now."""
    opened = found.opened
    reading = read(opened, found.source, pipeline.data, pipeline.kind, registry=found.registry)
    return lambda writer: fill(writer, pipeline, opened, reading, found.stamp, watch).table(opened.name)


def _loaded(found: _Found, store: Store) -> _Loaded:
    counts = times(store.column("weight_key"), found.source.weight, found.opened.name)
    return _Loaded(found.role, found.opened, store, Facts.from_table(store.facts, found.opened.name), counts)


def _keys(pipeline: Pipeline, found: Sequence[_Found], say: Callable[[str], None]) -> list[str | None]:
    """None for what cannot be cached."""
    keys: list[str | None] = [None] * len(found)
    if not any(one.opened.reader for one in found):
        return keys
    settings = settings_key(pipeline.data, pipeline.kind, pipeline.tokenizer, pipeline.template)
    if settings is None:
        say(f"prepared data is not kept: the content of a {type(pipeline.tokenizer).__name__} cannot be hashed")
        return keys
    for i, one in enumerate(found):
        if one.opened.reader:
            formats = strangers([one.source], one.registry) if one.registry else []
            made_by = [[info.distribution, info.version, info.source_hash()] for info in formats]
            keys[i] = store_key(settings, one.source, one.opened.reader, one.opened.digest(), made_by)
    return keys


# --- rows


@dataclass(frozen=True)
class _Side:
    """The rows to train on, or the held-out ones, among all that are stored in some sources."""

    stores: Sequence[Store]
    rows: Numbers  # counted through over all stores
    times: Numbers  # how often each of `rows` counts

    @classmethod
    def of(cls, loaded: Sequence[_Loaded]) -> _Side:
        counts = np.concatenate([np.empty(0, np.int64), *(one.times for one in loaded)])
        rows = np.flatnonzero(counts)
        return cls([one.store for one in loaded], rows, counts[rows])

    def once(self, chosen: Mask) -> _Side:
        """Some of the rows, each of them once."""
        rows = self.rows[chosen]
        return _Side(self.stores, rows, np.ones_like(rows))

    def column(self, name: str) -> Any:
        """A column of these rows, (rows,)."""
        return joined(self.stores, name)[self.rows]

    def view(self, matched: Numbers | None, max_length: int) -> Trees:
        """The trees. matched: for each of `rows` the row of its mismatched completion."""
        partners = None if matched is None else np.repeat(matched, self.times)
        return Trees(self.stores, np.repeat(self.rows, self.times), partners, max_length)


def _sides(data: Data, loaded: Sequence[_Loaded]) -> tuple[_Side, _Side, str]:
    """Training rows, held-out rows, and in words where those come from."""
    by_role = {role: [one for one in loaded if one.role == role] for role in ("train", "eval")}
    sides = {role: _Side.of(ones) for role, ones in by_role.items()}
    for role, ones in by_role.items():
        if ones and not len(sides[role].rows):
            raise _nothing_kept(role, ones)
    train = sides["train"]
    if by_role["eval"]:
        return train, sides["eval"], "data.eval"
    if not data.eval_fraction:
        return train, sides["eval"], "neither data.eval nor data.eval_fraction is given"
    held = hold_out(train.column("prompt_key"), train.column("held_key"), data.eval_fraction)
    stay = _Side(train.stores, train.rows[~held], train.times[~held])
    return stay, train.once(held), f"by prompt, data.eval_fraction = {data.eval_fraction:g}"


def _nothing_kept(role: str, loaded: Sequence[_Loaded]) -> DataError:
    counts: Counter[str] = sum((one.dropped for one in loaded), Counter())
    names = ", ".join(one.opened.name for one in loaded)
    shown = [line for one in loaded for line in one.facts.tally.shown]
    what = f"{names}: no row is left of {sum(one.facts.tally.read for one in loaded)}"
    return DataError(
        "\n    ".join([what, *shown[:5]]),
        why="; ".join(f"{n} x {reason}: {REASONS[reason]}" for reason, n in counts.most_common()),
        fix=f"mend the rows of data.{role}, or change the key that dropped them",
    )


def _partners(side: _Side, max_length: int, name: str, cut: Counter[str]) -> Numbers:
    """For each row the one whose first completion is its mismatched one.

    One that would not fit into max_length after the row's prompt is counted in `cut`, and cut at its end when it is
    read. Raises DataError where there are fewer than two prompts.
    """
    found = partners(*(side.column(key) for key in ("prompt_key", "ids_key", "ring_key")))
    alone = np.flatnonzero(found < 0)
    if len(alone):
        where = Trees(side.stores, side.rows).stored(int(alone[0]), Store.where)
        raise DataError(
            f"{name}: {where} has no row with another prompt to take a mismatched completion from",
            why="the loss compares each row with the completion of another prompt",
            fix="use data with at least two prompts",
        )
    too_long = int((side.column("own")[found] > max_length - side.column("prompt")).sum())
    if too_long:
        cut["mismatched-right"] += too_long
    return np.asarray(side.rows[found])


def _warnings(pipeline: Pipeline, loaded: Sequence[_Loaded]) -> Iterator[str]:
    notes: Counter[str] = sum((one.notes for one in loaded), Counter())
    template, n = pipeline.template, sum(one.kept for one in loaded)
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
    long, examples = _too_long(loaded), sum(one.facts.tally.examples for one in loaded)
    if long > _MANY * examples:
        yield (
            f"{long} of {examples} examples are left out since they are too long: a higher data.max_length = "
            f"{pipeline.data.max_length} (or the limit that is named above) keeps them, data.truncation cuts them"
        )
    if not template.chat and pipeline.encoder.eos is None:
        yield "the tokenizer has no EOS token: the model does not learn to stop"
    if not template.chat and pipeline.data.system is not None:
        yield "data.system is not used: raw text has no turns"


def _too_long(loaded: Sequence[_Loaded]) -> int:
    return sum(one.facts.tally.dropped[reason] for one in loaded for reason in _LENGTHS)


def _shared_prompts(train: _Side, held: _Side) -> Iterator[str]:
    shared = int(np.isin(held.column("prompt_key"), train.column("prompt_key")).sum())
    if shared:
        yield f"{shared} of {len(held.rows)} held-out rows have a prompt that is also trained on"
