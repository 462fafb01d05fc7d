"""Who else answers the prompts, [[rollout.others]]: the reference, another model, or an address.

What a model writes is kept as its tokens: it has the policy's tokenizer. What an address writes comes as text, and is
tokenised as the continuation of the prompt, with the end of turn behind it where it did not break off. The log-probs
that another author drew with are not kept: they are not the policy's.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alignzoo.address import Address, Answer
from alignzoo.check import Job
from alignzoo.data.rows import Messages
from alignzoo.data.template import choose_template, render_prompt
from alignzoo.data.tokenise import Encoder, prompt_ids
from alignzoo.data.values import as_messages
from alignzoo.errors import DataError
from alignzoo.logprobs import positions_of
from alignzoo.making import Sampled
from alignzoo.metrics import Accumulator
from alignzoo.model import load_model
from alignzoo.progress import Say
from alignzoo.recipe import Other, Recipe
from alignzoo.rewards import Failures
from alignzoo.sampling import Sampling, draw
from alignzoo.tree import Ids, Tree

Hold = Callable[[], AbstractContextManager[Any]]  # gives a model, its weights whole within
Asked = Sequence[tuple[int, Tree]]  # prompts, each with the number of its batch


def hold_others(job: Job, device: Any, reference: Hold | None, say: Say) -> dict[str, Hold]:
    """The models that others need, by source. reference: the run's own, where it has one; else it is loaded."""
    held: dict[str, Hold] = {}
    for other, where in zip(job.recipe.rollout.others if job.recipe.rollout else (), job.others, strict=True):
        if other.source == "reference" and reference is not None:
            held[other.source] = reference
        elif where is not None and other.source not in held:
            say(f"loading {where.path}, which answers prompts too")
            model = load_model(where, dataclasses.replace(job.recipe.model, lora=None), say).to(device)
            held[other.source] = partial(nullcontext, model.requires_grad_(False))
    return held


@dataclass
class _Author:
    """One of [[rollout.others]], and what has become of asking it."""

    number: int  # from 1; the policy is 0
    label: str
    other: Other
    failures: Failures = field(default_factory=Failures)
    last: str = "see the lines above"  # failure, in words

    def times(self, own: Sequence[Sampled]) -> int:
        """Completions of a prompt that the policy has given these."""
        return self.other.completions if self.other.role == "candidate" else min(self.other.completions, len(own))


class Others:
    """All of a recipe's [[rollout.others]]; there may be none. A rank asks for its own share of the prompts."""

    def __init__(
        self, recipe: Recipe, tokenizer: Any, stops: Sequence[int], held: Mapping[str, Hold],
        autocast: Callable[[], AbstractContextManager[Any]], say: Say, beat: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        assert recipe.rollout is not None
        self.recipe, self.settings, self.tokenizer, self.stops = recipe, recipe.rollout, tokenizer, list(stops)
        self.held, self.autocast, self.say, self.beat = held, autocast, say, beat
        self.template = choose_template(recipe.data, tokenizer)
        self.encoder = Encoder(tokenizer, self.template)
        self.end: int | None = tokenizer.get_vocab().get(self.template.does.end, tokenizer.eos_token_id)
        self.authors: list[_Author] = []
        for other in self.settings.others:
            name = Path(other.model or other.source).name
            same = sum(one.label == name or one.label.startswith(f"{name}_") for one in self.authors)
            label = f"{name}_{same + 1}" if same else name
            self.authors.append(_Author(len(self.authors) + 1, label, other))

    def answer(self, asked: Asked, drawn: Sequence[Sequence[Sampled]]) -> list[list[Sampled]]:
        """The policy's completions of each prompt, and behind them those of all others.

        A completion that an author failed to give is not there. All ranks call it, with their own prompts. Raises
        RunError where an author failed too often, after all of them were asked.
        """
        found = [list(own) for own in drawn]
        for author in self.authors:
            wanted = [(p, k) for p, own in enumerate(drawn) for k in range(author.times(own))]
            self.beat(f"completions of {author.label}")
            write = self._remote if author.other.remote else self._local
            failed: list[Exception] = []
            for (p, k), made in zip(wanted, write(author, asked, drawn, wanted), strict=True):
                if isinstance(made, Exception):
                    failed.append(made)
                else:
                    beats = None if author.other.role == "candidate" else k
                    found[p].append(dataclasses.replace(made, author=author.label, beats=beats))
            self._count(author, len(wanted), failed)
        for author in self.authors:
            limit = author.other.max_failures
            fix = f"mend what it depends on, or raise max_failures = {limit:g} of [[rollout.others]]"
            author.failures.stop_above(limit, f"{author.label} of rollout.others", "completions", author.last, fix)
        return found

    def _count(self, author: _Author, wanted: int, failed: Sequence[Exception]) -> None:
        if failed:
            author.last = f"{type(failed[-1]).__name__}: {failed[-1]}"
            if author.failures.failed == 0:
                self.say(f"WARNING: {author.label}: {len(failed)} of {wanted} completions failed: {author.last}")
        author.failures.count(wanted, len(failed))

    def record(self, metrics: Accumulator, rewarded: Sequence[Sequence[Sampled]]) -> None:
        """Rewards, lengths and failures of each author, of the completions that `answer` gave last."""
        for author in self.authors:
            own = [one for of_prompt in rewarded for one in of_prompt if one.author == author.label]
            values = [one.reward for one in own if one.reward is not None]
            name, (wanted, failed) = f"rollout/others/{author.label}", author.failures.recent[-1]
            metrics.share(f"{name}/failed", failed, wanted)
            metrics.share(f"{name}/length", sum(len(one.ids) for one in own), len(own))
            metrics.share(f"{name}/truncated", sum(one.truncated for one in own), len(own))
            if own and own[0].rewards:
                metrics.share(f"{name}/reward", sum(values), len(values))

    def state(self) -> dict[str, Any]:
        """The counts of failures, as plain JSON."""
        return {author.label: author.failures.state() for author in self.authors}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for author in self.authors:
            author.failures.load_state(state.get(author.label))

    # --- a model

    def _local(
        self, author: _Author, asked: Asked, drawn: Sequence[Sequence[Sampled]], wanted: Sequence[tuple[int, int]]
    ) -> Iterator[Sampled | Exception]:
        """Seeds differ from the policy's by the author's number."""
        settings, other = self.settings, author.other
        sampling = Sampling(
            settings.max_new_tokens, self._temperature(other), settings.top_p, settings.top_k, settings.min_p,
            settings.batch_tokens,
        )  # fmt: skip
        revised, seed = other.role == "revision", self.recipe.train.seed
        keys = list(wanted) if revised else list(dict.fromkeys((p, 0) for p, _ in wanted))
        with self.held[other.source]() as model, self.autocast():
            prompts = {(p, k): self._prompt(other, asked[p][1], drawn[p], k) for p, k in keys}
            table = positions_of(model)
            fits = [key for key in keys if table is None or len(prompts[key]) + settings.max_new_tokens <= table]
            made = draw(
                model, [prompts[key] for key in fits], len(wanted) // max(len(keys), 1), sampling, stops=self.stops,
                pad=0, seeds=[(seed, asked[p][0], asked[p][1].row, author.number, k) for p, k in fits],
                beat=lambda: self.beat(f"completions of {author.label}"),
            )  # fmt: skip
        done = {(p, k + j): one for (p, k), ones in zip(fits, made, strict=True) for j, one in enumerate(ones)}
        for p, k in wanted:
            if (p, k) not in done:
                room = f"{len(prompts[p, k if revised else 0])} tokens and rollout.max_new_tokens"
                yield DataError(f"{room} are more than the model's table of {table} positions")
            else:
                one = done[p, k]
                text = str(self.tokenizer.decode(one.ids.tolist(), skip_special_tokens=True))
                yield Sampled(one.ids, None, one.truncated, text)

    def _temperature(self, other: Other) -> float:
        return self.settings.temperature if other.temperature is None else other.temperature

    def _prompt(self, other: Other, tree: Tree, own: Sequence[Sampled], k: int) -> Ids:
        if other.role != "revision":
            return tree.prompt
        return np.asarray(prompt_ids(self._turns(other, tree, own, k), self.template, self.tokenizer), np.int32)

    def _turns(self, other: Other, tree: Tree, own: Sequence[Sampled], k: int) -> Messages:
        """What is asked, as messages; of a revision with the policy's completion number k, and what to do with it."""
        turns = as_messages(tree.asked, "user")
        if other.role != "revision":
            return turns
        said = {"role": "assistant", "content": own[k].text}
        return (*turns, said, {"role": "user", "content": other.instruction})

    # --- an address

    def _remote(
        self, author: _Author, asked: Asked, drawn: Sequence[Sequence[Sampled]], wanted: Sequence[tuple[int, int]]
    ) -> Iterator[Sampled | Exception]:
        other, system = author.other, self.recipe.data.system
        assert other.model is not None
        conversations = []
        for p, k in wanted:
            turns = self._turns(other, asked[p][1], drawn[p], k)
            lacks = system is not None and turns[0]["role"] not in ("system", "developer")
            conversations.append([{"role": "system", "content": system}, *turns] if lacks else turns)
        address = Address(other.source, other.model, other.api_key_env, other.concurrency, other.retries, other.seconds)
        talk = address.ask(
            conversations, lambda *_: self.beat(f"completions of {author.label}"),
            temperature=self._temperature(other), max_tokens=self.settings.max_new_tokens,
        )  # fmt: skip
        with ThreadPoolExecutor(1) as thread:  # a notebook has an event loop in this one
            answers = thread.submit(asyncio.run, talk).result()
        for (p, _), answer in zip(wanted, answers, strict=True):
            yield answer if isinstance(answer, Exception) else self._read(asked[p][1], answer)

    def _read(self, tree: Tree, answer: Answer) -> Sampled | Exception:
        """An answer as tokens of the policy, cut at max_new_tokens."""
        if not answer.text.strip():
            return ValueError("an empty answer")
        ids, most = self._ids(tree, answer.text), self.settings.max_new_tokens
        if not answer.truncated and self.end is not None:
            ids = [*ids, self.end]
        cut = np.asarray(ids[:most], np.int32)
        text = str(self.tokenizer.decode(cut.tolist(), skip_special_tokens=True))
        return Sampled(cut, None, answer.truncated or len(ids) > most, text)

    def _ids(self, tree: Tree, text: str) -> list[int]:
        """The tokens of a text after the prompt; by itself where the tokenizer would join the two."""
        prompt = render_prompt(tree.asked, self.template, self.tokenizer)
        before, whole = self.encoder.prompt(prompt), self.encoder.prompt(prompt + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
