"""Judges of two answers: a language model behind an address, or a reward. It imports no torch.

A language model sees each pair twice, once in each order, and names the better one by every dimension and overall. A
reward sees one answer at a time, so there is no order; the answer with the higher value is the better one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignzoo.address import Answer
from alignzoo.asking import Asking, as_text, filled
from alignzoo.errors import AlignzooError, RunError
from alignzoo.plugins import Registry
from alignzoo.progress import Say
from alignzoo.recipe import Recipe, load_recipe
from alignzoo.rewards import Rewards, make_rewards
from alignzoo.schema import Problem, Raw, build

OVERALL = "overall"
A, B, TIE = "a", "b", "tie"
ONCE = "once"  # in the place of an order
REWARD_MODEL = "reward_model"  # the reward that takes a folder
_AT_ONCE = 16  # pairs that a reward gets in one call
_DIMENSION = re.compile(r"[^\W\d_][\w -]*")

PROMPT = """Compare two answers to a question. The order in which they stand means nothing.

Question:
{prompt}

Answer 1:
{first}

Answer 2:
{second}

Which answer is better by each of these: {dimensions}? And which is better overall?
You may think first. End with one line for each, in which you write 1, 2 or tie:
{lines}"""


@dataclass(frozen=True)
class Shown:
    """Two answers to one prompt, as a judge is to see them."""

    row: int
    order: str  # "ab", "ba": which answer stands first; or ONCE
    prompt: Any  # text or messages
    answers: Mapping[str, str]  # of A and B
    columns: Mapping[str, Any]  # the other columns of the prompt


@dataclass(frozen=True)
class Judged:
    """What a judge made of one. verdicts: A, B, TIE by dimension; None where none could be read."""

    verdicts: Mapping[str, str | None]
    said: Any  # the judge's text, or the values of a reward


Done = Callable[[Shown, Judged | Exception], None]


class ChatJudge:
    """A language model that compares."""

    orders: tuple[str, ...] = ("ab", "ba")

    def __init__(self, address: Asking, dimensions: Sequence[str]) -> None:
        self.address, self.dimensions = address, (*dimensions, OVERALL)

    @property
    def identity(self) -> dict[str, Any]:
        """All that a verdict depends on."""
        a = self.address
        return {"url": a.url, "model": a.model, "temperature": a.temperature, "max_tokens": a.max_tokens,
                "prompt": PROMPT}  # fmt: skip

    def describe(self) -> str:
        return f"{self.address.model} at {self.address.url}, each pair in both orders"

    def check(self, columns: Sequence[str]) -> None:
        """It reads no columns."""

    def start(self, device: Any) -> None:
        """Nothing is loaded here."""

    def run(self, pairs: Sequence[Shown], done: Done) -> None:
        """Gives each pair to `done` as its verdicts come. Raises RunError where nobody is at the address."""
        import httpx2

        def answered(number: int, answer: Answer | Exception) -> None:
            if isinstance(answer, httpx2.ConnectError):
                raise RunError(f"{self.address.url}: nobody answers there", why=str(answer) or type(answer).__name__,
                               fix="start the judge, and this command again: it goes on where it stopped")  # fmt: skip
            shown = pairs[number]
            done(shown, answer if isinstance(answer, Exception) else read(answer.text, shown.order, self.dimensions))

        asyncio.run(self.address.ask([question(shown, self.dimensions) for shown in pairs], answered))


def question(shown: Shown, dimensions: Sequence[str]) -> str:
    """What the judge is asked of a pair in an order."""
    first, second = (shown.answers[side] for side in shown.order)
    lines = "\n".join(f"{name}: <1, 2 or tie>" for name in dimensions)
    own = ", ".join(name for name in dimensions if name != OVERALL)
    values = {"prompt": as_text(shown.prompt), "first": first, "second": second, "dimensions": own, "lines": lines}
    return filled(PROMPT, values)


def read(text: str, order: str, dimensions: Sequence[str]) -> Judged:
    """The last line "NAME: 1", "NAME: 2" or "NAME: tie" of each dimension, whatever marks stand around it."""
    meaning = {"1": order[0], "2": order[1], "tie": TIE}
    verdicts: dict[str, str | None] = {}
    for name in dimensions:
        line = rf"^[^\w\n]*{re.escape(name)}[^\w\n]*:[^\w\n]*(?:answer\s+)?(1|2|tie)\b(?![^\S\n]*(?:,|or\b))"
        found = re.findall(line, text, re.IGNORECASE | re.MULTILINE)
        verdicts[name] = meaning[found[-1].lower()] if found else None
    return Judged(verdicts, text)


class RewardJudge:
    """A reward by its name in [[rewards]]: the answer with the higher value is the better one."""

    orders: tuple[str, ...] = (ONCE,)
    dimensions: tuple[str, ...] = (OVERALL,)

    def __init__(self, recipe: Recipe, registry: Registry, say: Say, content: str | None) -> None:
        """content: the hash of what it reads its weights from, where that is known"""
        self.rewards: Rewards = make_rewards(recipe, registry, say)
        self.content = content

    @property
    def identity(self) -> dict[str, Any]:
        (info,), (settings,) = self.rewards.infos, self.rewards.settings
        own = {key: value for key, value in settings.items() if self.content is None or key != "path"}
        return {"reward": info.name, "owner": f"{info.distribution} {info.version}", **own, "content": self.content}

    def describe(self) -> str:
        return f"reward {self.rewards.describe()[0]}; it sees one answer at a time, so there is no order"

    def check(self, columns: Sequence[str]) -> None:
        """Raises RecipeError for a column that it reads and the prompts have not."""
        self.rewards.check_columns(columns)

    def start(self, device: Any) -> None:
        self.rewards.start(device)

    def run(self, pairs: Sequence[Shown], done: Done) -> None:
        """As ChatJudge.run."""
        for start in range(0, len(pairs), _AT_ONCE):
            part = pairs[start : start + _AT_ONCE]
            twice = [shown for shown in part for _ in (A, B)]
            names = dict.fromkeys(name for shown in part for name in shown.columns)
            columns = {name: [shown.columns.get(name) for shown in twice] for name in names}
            texts = [shown.answers[side] for shown in part for side in (A, B)]
            scored = self.rewards.score([shown.prompt for shown in twice], texts, columns)
            message = next(iter(scored.messages.values()), "the reward has no value for this answer")
            values = iter(scored.total)
            for shown, a, b in zip(part, values, values, strict=True):
                done(shown, RuntimeError(message) if a is None or b is None else _compared(a, b))


def _compared(a: float, b: float) -> Judged:
    return Judged({OVERALL: A if a > b else B if b > a else TIE}, {A: a, B: b})


Judge = ChatJudge | RewardJudge


def make_judge(word: str, settings: Sequence[str], dimensions: str, registry: Registry, say: Say) -> Judge:
    """The judge that --judge names: an address, the folder of a reward model, or a reward.

    settings: KEY=VALUE of Asking, or of the reward. Raises AlignzooError for what cannot be.
    """
    if word.startswith(("http://", "https://")):
        return ChatJudge(_address(word, settings), _dimensions(dimensions))
    folder = Path(word).expanduser()
    table: dict[str, Any] = {"name": word, "max_failures": 1.0}  # failures are counted by who asks
    content = None
    if folder.is_dir():
        from alignzoo.fingerprint import fingerprint_of_files
        from alignzoo.model import locate

        table |= {"name": REWARD_MODEL, "path": str(folder)}
        content = fingerprint_of_files(locate(str(folder)))
    recipe = load_recipe(
        {"loss": {"name": "none"}, "model": {"path": "none"}, "data": {"train": "none"}, "rewards": [table],
         "train": {"learning_rate": 0.0}},
        [f"rewards.0.{text}" for text in settings],
    )  # fmt: skip
    say("dimensions: a reward is one number, so there is only the overall verdict")
    return RewardJudge(recipe, registry, say, content)


def _address(url: str, settings: Sequence[str]) -> Asking:
    table: dict[str, Any] = {"url": url}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise AlignzooError(f'--judge-set: "{text}" is not KEY=VALUE')
        table[key.strip()] = Raw(value.strip())
    problems: list[Problem] = []
    found = build(Asking, table, (), problems)
    if found is None:
        keys = ", ".join(field.name for field in dataclasses.fields(Asking) if field.name != "url")
        raise AlignzooError(
            "\n    ".join(["the judge cannot be asked:", *(problem.message for problem in problems)]),
            fix=f"--judge-set KEY=VALUE, with the keys {keys}",
        )
    found.check_key()
    return found


def _dimensions(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",") if name.strip()]
    odd = [name for name in found if not _DIMENSION.fullmatch(name) or name.lower() == OVERALL]
    if odd or len({name.lower() for name in found}) < len(found):
        raise AlignzooError(
            f"--dimensions {text}: " + (f'"{odd[0]}" cannot be one' if odd else "one stands there twice"),
            why=f'they are words or phrases; "{OVERALL}" is always asked for',
            fix='e.g. "helpful,accurate,clear,safe"; "" asks for the overall verdict alone',
        )
    return found
