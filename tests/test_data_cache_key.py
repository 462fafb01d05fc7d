"""The key of prepared data: it changes with all that the rows depend on, and with nothing else."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from test_data_cache import entries, from_cache, pair, run, same, write
from test_data_tokenizers import CHATML, chat_tokenizer, make_tokenizer

import alignzoo.data.cache as cache_module
from alignzoo.data.cache import settings_key, store_key
from alignzoo.data.sources import open_source
from alignzoo.data.template import choose_template
from alignzoo.recipe import Data, Source


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the entries, not made yet."""
    monkeypatch.setenv("ALIGNZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write(tmp_path / "rows.jsonl", [pair(i) for i in range(9)])


def key_of(data: Data, source: Source, kind: str = "pairs", tokenizer: Any = None) -> str:
    tokenizer = tokenizer or chat_tokenizer()
    settings, opened = settings_key(data, kind, tokenizer, choose_template(data, tokenizer)), open_source(source)
    assert settings is not None
    return store_key(settings, source, opened.reader, opened.digest())


@pytest.mark.parametrize(
    "change",
    [
        {"train_on": "last"},
        {"max_length": 512},
        {"max_prompt_length": 100},
        {"max_completion_length": 100},
        {"truncation": "prompt_left"},
        {"chat_template": "chatml"},
        {"chat_template": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"system": "be kind"},
        {"columns": {"chosen": "prompt"}},
        {"keep": ("score",)},
        {"on_bad_row": "skip"},
    ],
)
def test_what_changes_the_rows_changes_the_key(rows: str, change: dict[str, Any]) -> None:
    source = Source(rows)
    data = Data(train=(source,))
    assert key_of(data, source) == key_of(copy.deepcopy(data), Source(rows))
    assert key_of(data, source) != key_of(replace(data, **change), source)


@pytest.mark.parametrize(
    "change", [{"limit": 3}, {"format": "pairs"}, {"columns": {"chosen": "prompt"}}], ids=lambda c: next(iter(c))
)
def test_what_changes_the_source_changes_the_key(rows: str, change: dict[str, Any]) -> None:
    source = Source(rows)
    data = Data(train=(source,))
    assert key_of(data, source) != key_of(data, replace(source, **change))


def test_what_chooses_among_rows_does_not_change_the_key(rows: str, tmp_path: Path) -> None:
    source = Source(rows)
    key = key_of(Data(train=(source,)), source)
    assert key == key_of(Data(train=(source,), eval=(source,)), replace(source, weight=0.3))
    assert key == key_of(Data(train=(source, source), eval_fraction=0.5), source)
    moved = shutil.copy(rows, tmp_path / "moved.jsonl")
    assert key == key_of(Data(train=str(moved)), Source(str(moved)))


def test_kind_content_and_reader_change_the_key(rows: str, tmp_path: Path) -> None:
    source = Source(rows)
    data = Data(train=(source,))
    keys = {key_of(data, source), key_of(data, source, "labelled"), key_of(data, source, "demonstrations")}
    for name in ("a.json", "a.csv"):
        keys.add(key_of(data, Source(shutil.copy(rows, tmp_path / name))))
    assert len(keys) == 4  # .jsonl and .json are read in the same way
    Path(rows).write_text(Path(rows).read_text().replace("good answer 7", "good answer 8"))
    assert key_of(data, source) not in keys


def test_the_tokenizer_changes_the_key(rows: str) -> None:
    source = Source(rows)
    data = Data(train=(source,))
    added = make_tokenizer.__wrapped__(template=CHATML, eos="<|im_end|>")
    made = [key_of(data, source, tokenizer=tokenizer) for tokenizer in (
        make_tokenizer(template=CHATML, eos="<|im_end|>"), make_tokenizer(template=CHATML),
        make_tokenizer(template=CHATML, eos="<|im_end|>", bos=True), make_tokenizer(template=CHATML + " "), added,
    )]  # fmt: skip
    assert len(set(made)) == 4
    assert made[0] == made[4]
    added.add_tokens(["question"])
    assert key_of(data, source, tokenizer=added) not in made


def test_a_tokenizer_that_was_used_and_reloaded_has_the_same_key(rows: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = Source(rows)
    data = Data(train=(source,))
    tokenizer = make_tokenizer.__wrapped__(template=CHATML, eos="<|im_end|>", pad_token="<pad>")
    before = run((source,), tokenizer=tokenizer)[0]
    tokenizer(["foo", "how are you"], padding=True, truncation=True, max_length=3)
    again, said = run((source,), tokenizer=tokenizer)
    assert from_cache(said)
    assert same(before, again)
    tokenizer.save_pretrained(tmp_path / "one")
    loaded = [AutoTokenizer.from_pretrained(tmp_path / "one") for _ in range(2)]
    assert key_of(data, source, tokenizer=loaded[0]) == key_of(data, source, tokenizer=loaded[1])


def test_a_template_file_counts_by_its_text(rows: str, tmp_path: Path) -> None:
    source = Source(rows)

    def key(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return key_of(Data(train=(source,), chat_template=str(tmp_path / name)), source)

    assert key("a.jinja", CHATML) == key("b.jinja", CHATML)
    assert key("a.jinja", CHATML) != key("a.jinja", CHATML.replace("\n", " "))


def test_a_dated_template_is_of_a_day(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date(2031, 5, 4)

    source = Source(rows)
    dated = make_tokenizer(template="{{ strftime_now('%d %b %Y') }}" + CHATML, eos="<|im_end|>")
    before = [key_of(Data(train=(source,)), source, tokenizer=t) for t in (dated, chat_tokenizer())]
    monkeypatch.setattr(cache_module, "date", Tomorrow)
    after = [key_of(Data(train=(source,)), source, tokenizer=t) for t in (dated, chat_tokenizer())]
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_versions_and_code_are_in_the_key(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(rows)
    data = Data(train=(source,))
    keys = {key_of(data, source)}
    for name in ("_code_digest", "_versions"):
        with monkeypatch.context() as patch:
            patch.setattr(cache_module, name, lambda: "other")
            keys.add(key_of(data, source))
    assert len(keys) == 3


def test_every_setting_of_the_data_has_its_place() -> None:
    """A key that is added to [data] or to a source changes the rows, or is named as one that chooses among them."""
    left_out = {"train", "eval", "eval_fraction", "format", "chat_template"}  # format: each source has its own
    assert {*cache_module._CHOICES, "chat_template"} == left_out
    assert left_out <= set(Data.__dataclass_fields__)


@pytest.mark.parametrize("module", ["transformers_modules.some.tokenizer", "mine"])
def test_a_tokenizer_of_unknown_code_is_not_trusted(
    rows: str, cache: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(type(chat_tokenizer())):  # type: ignore[misc]
        pass

    monkeypatch.setattr(Own, "__module__", module)
    inner = chat_tokenizer()
    own = Own(tokenizer_object=inner.backend_tokenizer, eos_token="<|im_end|>", chat_template=CHATML)
    _, said = run(rows, tokenizer=own)
    assert any("is not kept: the content of a Own cannot be hashed" in line for line in said)
    assert not entries(cache)
