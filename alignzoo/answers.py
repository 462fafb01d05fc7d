"""Prompts of a file, and what a run, a model or a file of answers says to them, kept line by line.

A folder of answers is gone on with: a line that an interruption cut is removed, and the rows that are there are not
made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from alignzoo.data.reading import read
from alignzoo.data.rows import Example, bad_rows_error
from alignzoo.data.sources import open_source
from alignzoo.data.template import Template, choose_template
from alignzoo.data.tokenise import prompt_ids
from alignzoo.errors import AlignzooError, DataError
from alignzoo.fingerprint import fingerprint_of_files
from alignzoo.model import Location, load_model, load_tokenizer, locate
from alignzoo.progress import Say, StepProgress, sayer
from alignzoo.recipe import Data, Model, Source, load_recipe
from alignzoo.rundir import hash_file
from alignzoo.samples import stop_tokens
from alignzoo.sampling import Sampling, draw, how

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
ENDINGS = (".jsonl", ".json", ".csv", ".parquet")  # of files of answers
_PROMPTS, _ANSWERS = ("prompt", "instruction"), ("answer", "output", "completion", "response")
_AT_ONCE = 32  # prompts between two writes


@dataclass(frozen=True)
class Line:
    """A file that grows by lines of JSON."""

    path: Path

    def read(self) -> list[dict[str, Any]]:
        """Its lines; what an interruption left of the last one is cut off."""
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, *rows: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# --- prompts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """What is asked."""

    name: str
    digest: str  # sha256 of the file
    asked: list[Any]  # text or messages
    columns: list[Mapping[str, Any]]  # the other columns of each row

    def __len__(self) -> int:
        return len(self.asked)


def read_prompts(path: str, columns: Mapping[str, str], limit: int | None, say: Say) -> Prompts:
    """The prompts of a file of prompts, pairs or demonstrations. Raises DataError where a row has none."""
    source = Source(path=path, columns=dict(columns), limit=limit)
    opened = open_source(source)
    reading = read(opened, source, Data(train=path), "prompts")
    examples: list[Example] = list(reading.examples)
    if reading.tally.bad:
        raise bad_rows_error([reading.tally])
    for remark in (*reading.remarks, reading.conversion):
        if remark:
            say(f"{opened.name}: {remark}")
    return Prompts(opened.name, opened.digest(), [one.prompt for one in examples], [one.columns for one in examples])


def plain(prompt: Any) -> Any:
    """A prompt for comparing: one user turn is its text."""
    if isinstance(prompt, str):
        return prompt
    turns = [(turn["role"], turn["content"]) for turn in prompt]
    return turns[0][1] if len(turns) == 1 and turns[0][0] == "user" else tuple(turns)


# --- who answers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """A file of answers."""

    name: str
    answers: list[str]
    digest: str

    @property
    def identity(self) -> dict[str, Any]:
        return {"answers": self.digest}


@dataclass(frozen=True)
class Candidate:
    """A model that is to answer, as its run has trained it: with its template and its data.system."""

    name: str
    where: Location
    settings: Model
    tokenizer: Any
    template: Template
    identity: dict[str, Any]  # all that the answers depend on, beside the sampling


def open_side(word: str, prompts: Prompts, dtype: Dtype | None, say: Say) -> Answered | Candidate:
    """A run directory, what model.path of a recipe takes, or a file of answers. Raises AlignzooError.

    dtype: of the weights; None: as the run has it, or float32
    """
    path = Path(word).expanduser()
    if path.suffix in ENDINGS:
        return _answered(path, prompts)
    run = path if (path / "recipe.toml").is_file() else None
    where = locate(f"run:{path}" if run else word)
    settings, data = Model(path=word), Data(train="")
    if run:
        recipe = load_recipe(run / "recipe.toml")
        settings = replace(recipe.model, lora=None, quantization=None, head="lm")
        raw = "none" if recipe.data.chat_template == "none" else "auto"  # the tokenizer carries any other template
        data = replace(data, chat_template=raw, chat_template_kwargs=recipe.data.chat_template_kwargs,
                       system=recipe.data.system)  # fmt: skip
    settings = replace(settings, dtype=dtype or settings.dtype)
    tokenizer = load_tokenizer(where, trust_remote_code=settings.trust_remote_code)
    template = choose_template(data, tokenizer)
    say(f"{word}: {template.name}")
    text = template.text or tokenizer.chat_template or ""
    identity = {
        "weights": fingerprint_of_files(where) or f"{where.path} {where.revision or ''}".strip(),
        "dtype": settings.dtype, "chat_template": hashlib.sha256(text.encode()).hexdigest() if template.chat else None,
        "template_settings": dict(data.chat_template_kwargs), "system": data.system,
    }  # fmt: skip
    return Candidate(path.name if path.exists() else word, where, settings, tokenizer, template, identity)


def _answered(path: Path, prompts: Prompts) -> Answered:
    """The answers of a file, by prompt where it has them, else by their order."""
    if not path.is_file():
        raise DataError(f"{path}: no such file of answers")
    rows = []
    for row in open_source(Source(path=str(path))).rows:
        if row.problem is not None:
            raise DataError(f"{row.where}: {row.problem.text}")
        rows.append(row)
    answers = [_column(row.where, row.values, _ANSWERS) for row in rows]
    if odd := [row.where for row, text in zip(rows, answers, strict=True) if not isinstance(text, str)]:
        raise DataError(f"{odd[0]}: the answer is no text", why=f"{len(odd)} rows")
    if rows and not any(name in rows[0].values for name in _PROMPTS):
        if len(rows) != len(prompts):
            raise DataError(f"{path}: {len(rows)} answers to {len(prompts)} prompts",
                            fix=f"give each row its prompt, in a column {' or '.join(_PROMPTS)}")  # fmt: skip
        return Answered(path.name, answers, hash_file(path))
    said = [plain(_column(row.where, row.values, _PROMPTS)) for row in rows]
    asked = [plain(prompt) for prompt in prompts.asked]
    if said == asked:
        return Answered(path.name, answers, hash_file(path))
    found = dict(zip(said, answers, strict=True))
    missing = [i for i, prompt in enumerate(asked) if prompt not in found]
    if missing:
        raise DataError(
            f"{path}: no answer to {len(missing)} of {len(asked)} prompts, the first of them prompt {missing[0] + 1}",
            why=str(asked[missing[0]])[:100], fix="give the file that was made for these prompts",
        )  # fmt: skip
    return Answered(path.name, [found[prompt] for prompt in asked], hash_file(path))


def _column(where: str, row: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise DataError(f"{where}: no column {' or '.join(names)}", why=f"its columns are {', '.join(row) or 'none'}")


# --- answering -------------------------------------------------------------------------------------------------------


def answer(
    side: Answered | Candidate, prompts: Prompts, sampling: Sampling, seed: int, out: Line, console: Console
) -> list[dict[str, Any]]:
    """A row for each prompt: its number, the answer, and whether max_new_tokens cut it. What `out` has is kept."""
    done = out.read()
    if len(done) == len(prompts):
        return done
    if isinstance(side, Answered):
        texts = side.answers[len(done) :]
        out.append(*({"row": row, "answer": text} for row, text in enumerate(texts, start=len(done))))
        return out.read()
    say = sayer(console)
    ids = [np.asarray(prompt_ids(asked, side.template, side.tokenizer), np.int32) for asked in prompts.asked]
    say(f"loading {side.where.path} ({side.settings.dtype})")
    model = load_model(side.where, side.settings, say).to(device())
    if reason := how(model):
        say(f"{side.name} answers one prompt at a time: {reason}")
    _check_room(model, ids, sampling, side.name)
    stops = stop_tokens(model, side.tokenizer, side.template.does.end)
    with StepProgress(console, len(prompts), f"answers of {side.name}", len(done)) as progress:
        for rows in _blocks(len(done), len(prompts)):
            drawn = draw(model, [ids[row] for row in rows], 1, sampling, stops=stops, pad=0,
                         seeds=[(seed, row) for row in rows])  # fmt: skip
            texts = [str(side.tokenizer.decode(one.ids.tolist(), skip_special_tokens=True)).strip() for (one,) in drawn]
            out.append(*({"row": row, "answer": text, "truncated": one.truncated}
                         for row, text, (one,) in zip(rows, texts, drawn, strict=True)))  # fmt: skip
            progress.advance(rows[-1] + 1)
    return out.read()


def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _blocks(start: int, end: int) -> Iterator[list[int]]:
    for first in range(start, end, _AT_ONCE):
        yield list(range(first, min(first + _AT_ONCE, end)))


def _check_room(model: Any, ids: Sequence[np.ndarray[Any, Any]], sampling: Sampling, name: str) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    long = [row for row, prompt in enumerate(ids) if most and len(prompt) + sampling.max_new_tokens > most]
    if long:
        raise AlignzooError(
            f"{name} takes {most} tokens, and {len(long)} prompts (the first of them prompt {long[0] + 1}, "
            f"{len(ids[long[0]])} tokens) leave no room for {sampling.max_new_tokens} new ones",
            fix="lower --max-new-tokens, or leave these prompts out of the file",
        )
