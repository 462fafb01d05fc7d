"""`alignzoo winrate`: two sets of answers compared by a judge, pair by pair, and the rate at which the first one wins.

The folder that it writes:

    winrate.json     what is compared and by whom; a command with anything else is refused
    prompts.jsonl    the prompts
    answers_a.jsonl, answers_b.jsonl   the answers, as they are made
    verdicts.jsonl   a line for each time that the judge was asked, with what it said, as it comes
    results.json, results.html   made anew from these whenever the command comes to its end
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from alignzoo.answers import Answered, Candidate, Dtype, Line, Prompts, answer, device, open_side, read_prompts
from alignzoo.errors import AlignzooError, RunError
from alignzoo.judging import A, B, Judge, Judged, Shown, make_judge
from alignzoo.plugins import discover
from alignzoo.progress import Say, StepProgress, sayer
from alignzoo.rundir import RunDir, atomic_write
from alignzoo.sampling import Sampling
from alignzoo.schema import show
from alignzoo.winning import Pair, Results, results

_FEW = 20  # verdicts that the share of bad ones is taken over, at least
_NOTE = "winrate.json"


@dataclass(frozen=True)
class Asked:
    """What is compared."""

    a: str
    b: str
    prompts: str
    judge: str
    judge_settings: tuple[str, ...] = ()
    dimensions: str = "helpful,accurate,clear,safe"
    columns: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None  # of the prompts, the first ones
    sampling: Sampling = Sampling(512, temperature=0.0)
    dtype: Dtype | None = None
    seed: int = 0
    max_failures: float = 0.1  # share of what the judge is asked that may come to nothing
    plugins: tuple[Path, ...] = ()


def winrate(asked: Asked, out: Path, console: Console) -> Results:
    """Answers, judges, and writes the folder `out`; one that the same command began is gone on with.

    Raises AlignzooError; RunError where the judge fails too often.
    """
    from alignzoo.winratepage import as_json, html, terminal_table

    say = sayer(console)
    registry = discover(asked.plugins)
    for warning in registry.warnings:
        say(f"WARNING: {warning}")
    judge = make_judge(asked.judge, asked.judge_settings, asked.dimensions, registry, say)
    say(f"judge: {judge.describe()}")
    prompts = read_prompts(asked.prompts, asked.columns, asked.limit, say)
    judge.check(list(dict.fromkeys(name for row in prompts.columns for name in row)))
    sides = {A: open_side(asked.a, prompts, asked.dtype, say), B: open_side(asked.b, prompts, asked.dtype, say)}
    _begin(out, _identity(asked, prompts, judge, sides), say)
    with RunDir(out).held():
        lines = (json.dumps({"prompt": prompt, **columns}, ensure_ascii=False, default=str) for prompt, columns in
                 zip(prompts.asked, prompts.columns, strict=True))  # fmt: skip
        atomic_write(out / "prompts.jsonl", "".join(f"{line}\n" for line in lines).encode())
        answers = _answers(asked, sides, prompts, out, console)
        pairs, failed = _judge(asked, judge, prompts, answers, out, console)
        found = results(judge, {side: one.name for side, one in sides.items()}, pairs, failed)
        atomic_write(out / "results.json", as_json(found).encode())
        page = atomic_write(out / "results.html", html(found).encode())
    for note in found.notes:
        say(f"NOTE: {note}")
    console.print(terminal_table(found))
    say(found.verdict)
    say(f"page: {page}")
    return found


# --- the folder ------------------------------------------------------------------------------------------------------


def _identity(
    asked: Asked, prompts: Prompts, judge: Judge, sides: Mapping[str, Answered | Candidate]
) -> dict[str, dict[str, Any]]:
    """Of all that the verdicts depend on."""
    drawn = asked.sampling
    sampling = {"max_new_tokens": drawn.max_new_tokens, "temperature": drawn.temperature, "seed": asked.seed}
    made = any(isinstance(side, Candidate) for side in sides.values())
    return {
        "a": sides[A].identity, "b": sides[B].identity, "prompts": {"sha256": prompts.digest, "rows": len(prompts)},
        "sampling": sampling if made else {}, "judge": judge.identity, "dimensions": {"names": list(judge.dimensions)},
    }  # fmt: skip


def _begin(out: Path, identity: Mapping[str, Mapping[str, Any]], say: Say) -> None:
    """A new folder, or one that this command began. Raises AlignzooError for any other, with what differs."""
    note = out / _NOTE
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        atomic_write(note, (json.dumps(identity, indent=2, ensure_ascii=False) + "\n").encode())
        return
    try:
        saved = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AlignzooError(f"{out} is there already, and this command did not make it", why=f"no {_NOTE} in it",
                            fix="give another name") from error  # fmt: skip
    differing = [
        f"{part}.{key}: {show(saved.get(part, {}).get(key))} there, {show(now.get(key))} now"
        for part, now in json.loads(json.dumps(identity)).items()
        for key in dict.fromkeys([*saved.get(part, {}), *now])
        if saved.get(part, {}).get(key) != now.get(key)
    ]
    if differing:
        raise AlignzooError(
            "\n    ".join([f"{out} holds another comparison:", *differing]),
            why="verdicts of two comparisons would be mixed", fix="give another --out, or ask for the same again",
        )  # fmt: skip
    say(f"{out}: going on with what is there")


def _answers(
    asked: Asked, sides: Mapping[str, Answered | Candidate], prompts: Prompts, out: Path, console: Console
) -> list[dict[str, dict[str, Any]]]:
    """For each prompt the rows of both answers."""
    rows = {
        side: answer(one, prompts, asked.sampling, asked.seed, Line(out / f"answers_{side}.jsonl"), console)
        for side, one in sides.items()
    }
    return [{A: a, B: b} for a, b in zip(rows[A], rows[B], strict=True)]


# --- judging ---------------------------------------------------------------------------------------------------------


class _Count:
    """What came of asking, over all that `out` tells of and of this command. Raises RunError above the share."""

    def __init__(self, lines: Sequence[Mapping[str, Any]], total: int, share: float) -> None:
        self.asked, self.unread = len(lines), sum(None in line["verdicts"].values() for line in lines)
        self.failed, self.total, self.share = 0, total, share

    def add(self, judged: Judged | Exception) -> None:
        self.asked += 1
        self.failed += isinstance(judged, Exception)
        self.unread += isinstance(judged, Judged) and None in judged.verdicts.values()
        if self.failed + self.unread > self.share * max(self.asked, min(self.total, _FEW)):
            last = str(judged) if isinstance(judged, Exception) else f"it said: ...{judged.said[-200:]!r}"
            raise RunError(
                f"the judge fails too often: of {self.asked} times it was asked, {self.failed} requests failed and "
                f"{self.unread} answers have no verdict that can be read",
                why=f"the last one: {last}",
                fix=f"take another judge, or raise --max-failures {self.share:g}; what was judged is kept",
            )


def _judge(
    asked: Asked, judge: Judge, prompts: Prompts, answers: Sequence[Mapping[str, Mapping[str, Any]]], out: Path,
    console: Console,
) -> tuple[list[Pair], str]:  # fmt: skip
    """The pairs with their verdicts, and the first failure in words."""
    file, failures = Line(out / "verdicts.jsonl"), list[str]()
    known = file.read()
    there = {(line["row"], line["order"]) for line in known}
    shown = [
        Shown(row, order, prompts.asked[row], {side: one["answer"] for side, one in both.items()}, prompts.columns[row])
        for row, both in enumerate(answers)
        for order in judge.orders
        if (row, order) not in there
    ]
    total = len(answers) * len(judge.orders)
    count = _Count(known, total, asked.max_failures)
    if shown:
        judge.start(device())
    with StepProgress(console, total, "verdicts", len(known)) as progress:

        def done(one: Shown, judged: Judged | Exception) -> None:
            if isinstance(judged, Judged):
                file.append({"row": one.row, "order": one.order, "verdicts": judged.verdicts, "said": judged.said})
            else:
                failures.append(f"{type(judged).__name__}: {judged}")
            count.add(judged)
            progress.advance(count.asked)

        judge.run(shown, done)
    verdicts: dict[int, dict[str, Any]] = {}
    for line in file.read():
        verdicts.setdefault(line["row"], {})[line["order"]] = line["verdicts"]
    pairs = [
        Pair(row, prompts.asked[row], {side: one["answer"] for side, one in both.items()},
             {side: bool(one.get("truncated")) for side, one in both.items()}, verdicts.get(row, {}))
        for row, both in enumerate(answers)
    ]  # fmt: skip
    return pairs, failures[0] if failures else ""
