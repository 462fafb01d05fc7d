"""`alignzoo chat`: a conversation with a model, and with a second one beside it.

Answers are drawn as sample answers are (sampling.py), and of a run with its [samples] settings, so that a first
question has the answer that stands in the run's samples.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor

from alignzoo.data.template import Template, choose_template
from alignzoo.data.tokenise import ensure_pad_token, prompt_ids
from alignzoo.errors import AlignzooError, DataError
from alignzoo.export import checkpoint_of, load_checkpoint
from alignzoo.logprobs import is_scalar
from alignzoo.model import load_model, load_tokenizer, locate
from alignzoo.pages import visible
from alignzoo.progress import Say
from alignzoo.recipe import Data, Model, Recipe, Samples, Train, load_recipe
from alignzoo.rundir import atomic_write
from alignzoo.samples import stop_tokens
from alignzoo.sampling import Sampling, draw

WIDE = 100  # columns of a terminal from which two answers stand side by side
HELP = "/reset: begin again   /system TEXT: another system turn   /save FILE: write the conversation   /quit"
Emit = Callable[[str], object]


@dataclass(frozen=True)
class Manner:
    """How answers are drawn. system: None for the one that the model was trained with."""

    max_new_tokens: int
    temperature: float
    seed: int
    system: str | None


@dataclass
class Speaker:
    """A model that answers, and the conversation as it had it."""

    name: str
    model: Any
    tokenizer: Any
    template: Template
    off: bool = False  # with its adapter switched off
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, question: str, manner: Manner, emit: Emit) -> bool:
        """Hands out an answer piece by piece, and keeps it with the question; True where it was cut.

        What a KeyboardInterrupt leaves of it is kept too. Raises DataError where the model has no room for it.
        """
        turn = {"role": "user", "content": question}
        asked: Any = (*self.messages, turn) if self.template.chat else question
        ids = prompt_ids(asked, self.template, self.tokenizer, manner.system)
        self._check_room(len(ids), manner.max_new_tokens)
        pieces = _Pieces(self.tokenizer, emit)
        try:
            with self.model.disable_adapter() if self.off else nullcontext():
                ((drawn,),) = draw(
                    self.model, [np.asarray(ids, np.int32)], 1, Sampling(manner.max_new_tokens, manner.temperature),
                    stops=stop_tokens(self.model, self.tokenizer, self.template.does.end),
                    pad=self.tokenizer.pad_token_id or 0, seeds=[(manner.seed, len(self.messages) // 2)],
                    see=pieces.see,
                )  # fmt: skip
        finally:
            if pieces.ids:
                self.messages += [turn, {"role": "assistant", "content": pieces.end()}]
        return drawn.truncated

    def _check_room(self, tokens: int, new: int) -> None:
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and tokens + new > room:
            raise DataError(
                f"{self.name}: {tokens} tokens of conversation and {new} of an answer exceed its {room} places",
                fix="/reset, or a smaller --max-new-tokens",
            )


class _Pieces:
    """Tokens as they come, handed on as text. A character that is not complete yet waits for its end."""

    def __init__(self, tokenizer: Any, emit: Emit) -> None:
        self.tokenizer, self.emit = tokenizer, emit
        self.ids: list[int] = []
        self.text = ""

    def see(self, tokens: Tensor) -> None:
        self.ids += tokens.tolist()
        text = self._decoded()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._hand_on(text)

    def end(self) -> str:
        """The whole answer, what waited handed on."""
        self._hand_on(self._decoded())
        return self.text.rstrip()

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True)).lstrip()

    def _hand_on(self, text: str) -> None:
        new, self.text = text[len(self.text) :], text
        if new:
            self.emit(new)


# --- who speaks ------------------------------------------------------------------------------------------------------


def load_speaker(source: str, say: Say) -> tuple[Speaker, Recipe | None]:
    """The model of a run, of a checkpoint, or of what model.path of a recipe may name; with the recipe of the run.

    A finished run speaks with its last model, an interrupted one with its newest checkpoint. Raises AlignzooError.
    """
    folder = Path(source.removeprefix("run:")).expanduser()
    reader = checkpoint_of(folder, say) if folder.is_dir() else None
    if reader is not None:
        model, tokenizer, recipe, _where = load_checkpoint(reader, say)
        if is_scalar(model):
            raise AlignzooError(f"{source} is a reward model, which answers nothing", fix="name a language model")
        return _speaker(source, model, tokenizer, recipe.data), recipe
    saved = folder / "model" if (folder / "model").is_dir() else folder
    written = saved.resolve().parent / "recipe.toml"
    of_run = load_recipe(written) if saved.is_dir() and written.is_file() else None
    where = locate(str(saved) if saved.is_dir() else source)
    settings = replace(of_run.model, lora=None, head="lm") if of_run else Model(path=source)
    say(f"loading {where.path} ({settings.dtype})")
    tokenizer = load_tokenizer(where, trust_remote_code=settings.trust_remote_code)
    model = load_model(where, settings, say, merge=False)
    return _speaker(source, model, tokenizer, of_run.data if of_run else Data(train="")), of_run


def _speaker(name: str, model: Any, tokenizer: Any, data: Data) -> Speaker:
    """On the GPU if there is one. The template is the saved tokenizer's: a run saves the one that it trained with."""
    ensure_pad_token(tokenizer)
    raw = data.chat_template == "none"
    template = choose_template(replace(data, chat_template="none" if raw else "auto"), tokenizer)
    if not hasattr(model, "hf_device_map"):  # bitsandbytes has placed what it quantised
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return Speaker(name, model.eval(), tokenizer, template)


def load_other(against: str, speaker: Speaker, recipe: Recipe | None, say: Say) -> Speaker:
    """The second model: a run's reference, or whatever `load_speaker` takes.

    The reference is reference.path, else the start model: the first model with its adapter off, where it has one. It
    gets the same tokens as the policy, as in training.
    """
    if against != "reference":
        return load_speaker(against, say)[0]
    if recipe is None:
        raise AlignzooError(f"{speaker.name} is no run, so it has no reference", fix="name a model: --against MODEL")
    own, start = recipe.reference, recipe.model
    if own.path is None and hasattr(speaker.model, "disable_adapter"):
        say(f"reference: the start model {start.path}, the adapter switched off")
        return replace(speaker, name="reference", off=True, messages=[])
    path, revision = (own.path, own.revision) if own.path else (start.path, start.revision)
    say(f"reference: {'reference.path' if own.path else 'the start model'} {path}")
    model = load_model(locate(path, revision), replace(start, lora=None), say)
    return replace(speaker, name="reference", model=model.to(speaker.model.device).eval(), messages=[])


# --- the conversation ------------------------------------------------------------------------------------------------


class Chat:
    """One or two models that are asked the same. Answers go to the console, all else to `say`."""

    def __init__(self, speakers: list[Speaker], manner: Manner, console: Console, say: Say) -> None:
        self.speakers, self.manner, self.console, self.say = speakers, manner, console, say
        self.commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset, "/system": self._system, "/save": self._save,
        }  # fmt: skip

    def take(self, line: str) -> bool:
        """A question or a command; False where it ends the conversation. Raises AlignzooError."""
        word, _, rest = line.strip().partition(" ")
        if word in ("/quit", "/exit"):
            return False
        if word in self.commands:
            self.commands[word](rest.strip())
        elif word.startswith("/"):
            self.say(f"{word} is no command. {HELP}")
        elif word:
            self._ask(line.strip())
        return True

    def _reset(self, _rest: str) -> None:
        for speaker in self.speakers:
            speaker.messages.clear()
        self.say("a new conversation")

    def _system(self, text: str) -> None:
        self.manner = replace(self.manner, system=text or None)
        self.say(f"system turn: {text or 'as in training'}")

    def _save(self, name: str) -> None:
        """A row of messages for each model, as data files have them."""
        path = Path(name).expanduser()
        if not name or path.exists():
            raise AlignzooError(f"{name} is there already" if name else "/save needs a name", fix="/save NEW_FILE")
        rows = []
        for speaker in self.speakers:
            system = speaker.template.system if self.manner.system is None else self.manner.system
            before = [] if system is None else [{"role": "system", "content": system}]
            rows.append({"model": speaker.name, "messages": [*before, *speaker.messages]})
        atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self.say(f"saved {path}")

    def _ask(self, question: str) -> None:
        if len(self.speakers) > 1 and self.console.is_terminal and self.console.width >= WIDE:
            self._side_by_side(question)
            return
        for speaker in self.speakers:
            if len(self.speakers) > 1:
                self.console.print(Text(f"{speaker.name}:", "bold"))
            said: list[str] = []
            emit: Emit = self._stream if self.console.is_terminal else said.append
            try:
                cut = speaker.answer(question, self.manner, emit)
            finally:  # the line ends also where Ctrl-C ends the answer
                self.console.print(Text(visible("".join(said).strip()) if said else ""), soft_wrap=True)
            self._tell_cut(speaker, cut)

    def _stream(self, piece: str) -> None:
        self.console.print(Text(visible(piece)), end="", soft_wrap=True)

    def _side_by_side(self, question: str) -> None:
        texts = ["" for _ in self.speakers]
        cuts = []

        def columns() -> Table:
            table = Table(*(speaker.name for speaker in self.speakers), expand=True, box=None, padding=(0, 1))
            for column in table.columns:
                column.ratio = 1
            table.add_row(*(Text(visible(text.strip())) if text else Text("...") for text in texts))
            return table

        try:
            with Live(columns(), console=self.console, transient=True, refresh_per_second=8) as live:
                for i, speaker in enumerate(self.speakers):

                    def emit(piece: str, i: int = i) -> None:
                        texts[i] += piece
                        live.update(columns())

                    cuts.append(speaker.answer(question, self.manner, emit))
        finally:
            self.console.print(columns())
        for speaker, cut in zip(self.speakers, cuts, strict=True):
            self._tell_cut(speaker, cut)

    def _tell_cut(self, speaker: Speaker, cut: bool) -> None:
        if cut:
            self.say(f"({speaker.name}: cut at {self.manner.max_new_tokens} tokens, see --max-new-tokens)")


def converse(chat: Chat, lines: Iterable[Callable[[], str]]) -> None:
    """A person at a terminal. Ctrl-C stops an answer; twice, or /quit, or the end of the input, leaves.

    lines: each asks for the next line when it is called
    """
    strikes = 0
    for read in lines:
        going = True
        try:
            going = chat.take(read())
            strikes = 0
        except EOFError:
            return
        except KeyboardInterrupt:
            strikes, going = strikes + 1, strikes < 1
            if going:
                chat.say("Ctrl-C once more, or /quit, leaves")
        except AlignzooError as error:
            chat.say(f"error: {error}")
        if not going:
            return


@dataclass(frozen=True)
class Asked:
    """The words of the command; None where the run, or else the default, decides."""

    source: str
    against: str | None
    system: str | None
    temperature: float | None
    max_new_tokens: int | None
    seed: int | None


def start(asked: Asked, console: Console, say: Say) -> None:
    """Loads the models, and talks: with a terminal in turns, else one line of stdin after the other."""
    speaker, recipe = load_speaker(asked.source, say)
    speakers = [speaker]
    if asked.against is not None:
        speakers.append(load_other(asked.against, speaker, recipe, say))
    samples = recipe.samples if recipe else Samples()
    chosen = (
        samples.max_new_tokens if asked.max_new_tokens is None else asked.max_new_tokens,
        samples.temperature if asked.temperature is None else asked.temperature,
        (recipe.train if recipe else Train(learning_rate=0.0)).seed if asked.seed is None else asked.seed,
        samples.system if asked.system is None else asked.system,
    )
    chat = Chat(speakers, Manner(*chosen), console, say)
    how = "greedy" if chosen[1] == 0 else f"temperature {chosen[1]:g}, seed {chosen[2]}"
    say(f"answers of at most {chosen[0]} tokens, {how}")
    for one in speakers:
        if not one.template.chat:
            say(f"{one.name}: no chat template: each question stands alone, as {one.template.name}")
    if console.is_terminal and sys.stdin.isatty():
        say(HELP)
        converse(chat, _typed())
        return
    for line in sys.stdin:
        if not chat.take(line):
            return


def _typed() -> Iterator[Callable[[], str]]:
    import readline  # noqa: F401  # the line can be edited, and those before it come again

    while True:
        yield lambda: input("> ")
