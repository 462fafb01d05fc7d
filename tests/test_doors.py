"""Formats of rows that plugins bring: read, checked, cached, found, refused; and the table of what plugins bring."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import REPO
from plugin_helpers import Install, installer, status
from runs_helpers import write_recipe
from test_data_tokenizers import chat_tokenizer

from alignzoo.cli import cli
from alignzoo.data.dataset import Prepared, prepare
from alignzoo.data.formats import FORMATS
from alignzoo.data.formats_found import check_formats
from alignzoo.errors import DataError, PluginError, RecipeError
from alignzoo.plugin_kinds import FormatInfo
from alignzoo.plugins import BLOCK, Registry, discover
from alignzoo.recipe import Data, Source, load_recipe
from alignzoo.resume import check_inputs
from alignzoo.rundir import RunDir
from alignzoo.runner import run

SHP = REPO / "tests/fixtures_plugins/alignzoo_shp.py"
POSTS: list[dict[str, Any]] = [
    {"history": "How long to boil an egg?", "human_ref_A": "Nine minutes.", "human_ref_B": "Yes.", "labels": 1},
    {"history": "Why is the sky blue?", "human_ref_A": "It is not.", "human_ref_B": "Scattering.", "labels": 0},
    {"history": "Tea or coffee?", "human_ref_A": "Tea.", "human_ref_B": "Coffee.", "labels": 0, "score_ratio": 1.1},
]
TOKENIZER = chat_tokenizer()
SMALL = {"loss": {"name": "dpo"}, "model": {"path": "m"}, "train": {"learning_rate": 1e-5}}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    yield from installer(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNZOO_CACHE", str(tmp_path / "cache"))


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: str, registry: Registry, format: str = "shp", kind: str = "pairs", **keys: Any) -> Any:
    """The prepared rows, and what was said."""
    said: list[str] = []
    data = Data(train=(Source(path, format=format),), **keys)
    made = prepare(data, kind, TOKENIZER, needs_mismatched=False, seed=0, say=said.append, registry=registry)
    return made, said


def texts(prepared: Prepared) -> list[tuple[str, ...]]:
    return [tuple(TOKENIZER.decode(c.ids.tolist()) for c in tree.completions) for tree in prepared.train]


def source_of(make: str, **fields: Any) -> str:
    """A plugin with the format "mine", whose function has this body."""
    fields = {"name": "mine", "kind": "pairs", "columns": ("q",), "description": "of a test", **fields}
    given = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    body = textwrap.indent(textwrap.dedent(make), "    ")
    hook = f"@alignzoo.hookimpl\ndef alignzoo_formats():\n    return [alignzoo.Format({given}, make=make)]\n"
    return f"import alignzoo\n\ndef make(row):\n{body}\n\n{hook}"


# --- reading ----------------------------------------------------------------------------------------------------------


def test_the_format_of_the_docs_reads_rows(tmp_path: Path) -> None:
    """The better comment is chosen, the one that is too close is left out and counted."""
    prepared, said = read(written(tmp_path, POSTS), discover([SHP]))
    answers = [tuple(words.replace("<|im_end|>", "").strip() for words in pair) for pair in texts(prepared)]
    assert answers == [("Nine minutes.", "Yes."), ("Scattering.", "It is not.")]
    assert list(prepared.train.asked) == [POSTS[0]["history"], POSTS[1]["history"]]
    report = "\n".join(said)
    assert "3 rows of format shp" in report and "score_ratio" not in report
    assert prepared.report.sources[0].dropped == {"left-out": 1} and "left out by the format of a plugin" in report


def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path) -> None:
    path = written(tmp_path, [POSTS[0], {**POSTS[1], "labels": 7}, {**POSTS[1], "history": None}])
    with pytest.raises(DataError) as caught:
        read(path, discover([SHP]))
    assert 'rows.jsonl:2: format "shp": labels = 7, not 0 or 1 [refused]' in str(caught.value)
    assert 'rows.jsonl:3: column "history" is null [missing-column]' in str(caught.value)
    prepared, _ = read(path, discover([SHP]), on_bad_row="skip")
    assert len(prepared.train) == 1
    assert prepared.report.sources[0].dropped == {"refused": 1, "missing-column": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("return row['nobody']", "format \"mine\": KeyError: 'nobody' ({file}:4) [format-failed]"),
        ("return [1]", 'format "mine" returned a list, not a row [format-failed]'),
        ("return {'prompt': 'a', 'best': 'b'}", "returned the columns prompt, best; pairs have prompt, chosen"),
        ("return {'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}", "chosen equals rejected"),
        ("return {'prompt': 'a', 'chosen': 'b', 'rejected': ''}", "[empty-completion]"),
        ("return {'prompt': 'a', 'chosen': 1, 'rejected': 'b'}", "[not-text]"),
    ],
)  # fmt: skip
def test_what_a_format_returns_is_checked(install: Install, tmp_path: Path, make: str, message: str) -> None:
    file = install("mine", source_of(make))
    with pytest.raises(DataError) as caught:
        read(written(tmp_path, [{"q": "x"}]), discover(), "mine")
    assert message.format(file=file) in str(caught.value) and "rows.jsonl:1: " in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        ("demonstrations", {"prompt": "a", "completion": "b"}),
        ("demonstrations", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ("demonstrations", {"text": "a b"}),
        ("labelled", {"prompt": "a", "completion": "b", "label": True}),
        ("prompts", {"prompt": "a"}),
    ],
)
def test_every_kind_of_rows(install: Install, tmp_path: Path, kind: str, made: dict[str, Any]) -> None:
    """They come out as the same rows do that are in the file itself."""
    install("mine", source_of(f"return {made!r}", kind=kind))
    found, _ = read(written(tmp_path, [{"q": "x"}]), discover(), "mine", kind)
    plain, _ = read(written(tmp_path, [made]), discover(), "auto", kind)
    assert found.train[0].prompt.tolist() == plain.train[0].prompt.tolist() and texts(found) == texts(plain)
    assert found.train[0].label == plain.train[0].label


def test_system_columns_and_conversions_are_as_for_any_row(install: Install, tmp_path: Path) -> None:
    install("mine", source_of("return {'prompt': row['q'], 'chosen': 'b', 'rejected': 'c', 'system': 'Be kind.'}"))
    path = written(tmp_path, [{"question": "x", "n": 2}])
    found, _ = read(path, discover(), "mine", columns={"q": "question"}, keep=("n",))
    assert "Be kind." in TOKENIZER.decode(found.train[0].prompt.tolist())
    assert dict(found.train[0].extra) == {"n": 2.0}
    labelled, _ = read(path, discover(), "mine", "labelled", columns={"q": "question"})
    assert [tree.label for tree in labelled.train] == [True, False]


def test_derived_columns_of_a_format(install: Install, tmp_path: Path) -> None:
    source = source_of("return {'prompt': row['q'], 'chosen': 'b', 'rejected': 'c'}", adds=("length",))
    source = source.replace("make=make", "make=make, derived=lambda row: {**row, 'length': len(row['q'])}")
    install("mine", source)
    found, _ = read(written(tmp_path, [{"q": "four"}]), discover(), "mine", keep=("length",))
    assert dict(found.train[0].extra) == {"length": 4.0}


def test_a_format_gets_a_row_of_its_own(install: Install, tmp_path: Path) -> None:
    install("mine", source_of("row['n'] = 9\nreturn {'prompt': row.pop('q'), 'chosen': 'b', 'rejected': 'c'}"))
    found, _ = read(written(tmp_path, [{"q": "x", "n": 1}]), discover(), "mine", keep=("n",))
    assert dict(found.train[0].extra) == {"n": 1.0}


def test_a_strangers_format_is_never_found_from_the_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no known format has the columns"):
        read(written(tmp_path, POSTS), discover([SHP]), "auto")


def test_columns_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match='format "shp" needs history, human_ref_A, human_ref_B, labels; missing: labels'
    ):
        read(written(tmp_path, [{k: v for k, v in POSTS[0].items() if k != "labels"}]), discover([SHP]))


# --- the cache --------------------------------------------------------------------------------------------------------


def test_another_version_or_another_source_reads_anew(install: Install, tmp_path: Path) -> None:
    """And the same one comes from the cache."""
    path = written(tmp_path, [{"q": "x"}])

    def cached(word: str, version: str) -> tuple[bool, str]:
        for old in (tmp_path / "site").glob("alignzoo_mine-*"):
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        make = f"return {{'prompt': row['q'], 'chosen': {word!r}, 'rejected': 'c'}}"
        file = install("mine", source_of(make), version=version)
        sys.modules.pop(file.stem, None)
        made, said = read(path, discover(), "mine")
        return any("from the cache" in line for line in said), texts(made)[0][0]

    assert cached("good", "1.0")[0] is False
    assert cached("good", "1.0")[0] is True
    again, answer = cached("fine", "1.0")
    assert again is False and "fine" in answer
    assert cached("fine", "1.1")[0] is False
    assert cached("fine", "1.0")[0] is True


def test_a_changed_file_reads_anew(tmp_path: Path) -> None:
    path, plugin = written(tmp_path, POSTS), tmp_path / "mine.py"
    plugin.write_text(SHP.read_text(encoding="utf-8"))
    first, _ = read(path, discover([plugin]))
    plugin.write_text(
        plugin.read_text().replace('("A", "B") if row["labels"] == 1', '("B", "A") if row["labels"] == 1')
    )
    second, said = read(path, discover([plugin]))
    assert not any("from the cache" in line for line in said)
    assert "Nine minutes." in texts(first)[0][0] and "Nine minutes." in texts(second)[0][1]


def test_a_run_keeps_the_plugin_of_its_format_and_goes_on_with_the_same_only(tiny_folder: Path, tmp_path: Path) -> None:
    path = written(tmp_path, [{**POSTS[0], "history": f"{POSTS[0]['history']} {i}"} for i in range(4)])
    file = write_recipe(
        tmp_path / "work", tiny_folder, data__train=[{"path": path, "format": "shp"}], train__max_steps=1,
        samples__prompts=[], samples__from_eval=0,
    )  # fmt: skip
    made = run(load_recipe(file), plugins=[SHP])
    assert (made.run_dir / "plugins/alignzoo_shp.py").read_bytes() == SHP.read_bytes()
    assert [s.format for s in load_recipe(made.run_dir / "recipe.toml").data.train] == ["shp"]
    before = RunDir(made.run_dir).read_manifest()
    own = before["plugins"][1]
    assert (own["format"], own["distribution"]) == ("shp", "file") and own["version"].startswith("sha256:")
    now = {**before, "plugins": [before["plugins"][0], {**own, "version": "sha256:other"}]}
    with pytest.raises(PluginError, match='the plugin file of the format "shp" was changed'):
        check_inputs(before, now, print)


# --- finding ----------------------------------------------------------------------------------------------------------


def test_the_built_in_formats_come_through_the_same_door() -> None:
    registry = discover()
    found = registry.all(FormatInfo)
    assert {name: info.cls for name, info in found.items()} == {known.name: known for known in FORMATS}
    assert {(info.distribution, info.label) for info in found.values()} == {("alignzoo", "builtin-formats")}


def test_a_recipe_names_it_for_all_sources_or_for_one(tmp_path: Path) -> None:
    path = written(tmp_path, POSTS)
    for data, key in (
        ({"train": path, "format": "shp"}, "data.format"),
        ({"train": [{"path": path, "format": "shp"}]}, "data.train.0.format"),
        ({"train": [{"path": path}], "eval": [{"path": path, "format": "pairs"}], "format": "shp"}, "data.format"),
    ):
        recipe = load_recipe({**SMALL, "data": data})
        assert [source.format for source in recipe.data.train] == ["shp"]
        check_formats(recipe, discover([SHP]))
        with pytest.raises(RecipeError, match='there is no format "shp"') as caught:
            check_formats(recipe, discover())
        assert "--plugin FILE" in caught.value.fix and "helpsteer3" in caught.value.why, key
    assert recipe.data.eval is not None and recipe.data.eval[0].format == "pairs"


def test_a_misspelt_format_has_its_place(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    file = tmp_path / "r.toml"
    file.write_text(
        '[loss]\nname = "dpo"\n[model]\npath = "m"\n[train]\nlearning_rate = 1\n'
        '[[data.train]]\npath = "rows.jsonl"\n[[data.train]]\npath = "rows.jsonl"\nformat = "piars"\n'
    )
    result = CliRunner().invoke(cli, ["run", str(file)])
    assert result.exit_code == 2
    assert 'r.toml:11: there is no format "piars" (did you mean "pairs"?)' in result.stderr


def test_two_owners_of_a_name_and_blocking(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one of them is alignzoo."""
    install("mine", source_of("return row", name="alpaca"))
    with pytest.raises(PluginError, match='2 formats are named "alpaca"') as caught:
        discover().one(FormatInfo, "alpaca")
    assert f"{BLOCK}=mine" in caught.value.fix and f"{BLOCK}=builtin-formats" in caught.value.fix
    monkeypatch.setenv(BLOCK, "mine")
    assert discover().one(FormatInfo, "alpaca").label == "builtin-formats"
    monkeypatch.setenv(BLOCK, "builtin-formats")
    assert discover().one(FormatInfo, "alpaca").label == "mine"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "Mine"}, "name = \"Mine\" (wanted: lower-case letters, digits, - and _"),
        ({"name": "auto"}, '"auto" is taken'),
        ({"kind": "pair"}, 'kind = "pair" (wanted: one of "demonstrations", "pairs", "labelled", "groups", "prompts")'),
        ({"columns": "q"}, 'columns = "q" (wanted: a tuple of one name or more)'),
        ({"columns": ()}, "columns = ()"),
        ({"description": " "}, "(wanted: a sentence)"),
        ({"derived": 3}, "derived = 3 (wanted: a function of a row, or None)"),
        ({"contract": 99}, "is made for contract 99 of alignzoo, and this alignzoo has contract 1"),
        ({"contract": "1"}, "contract = \"1\" (wanted: a whole number from 1)"),
    ],
)  # fmt: skip
def test_a_format_that_breaks_the_contract_is_named_with_its_line(
    install: Install, fields: dict[str, Any], message: str
) -> None:
    file = install("bad", source_of("return row", **fields), name="alignzoo-bad")
    found = status(discover(), "bad")
    assert found.state == "broken" and message in found.error
    assert f"({file}:3)" in found.error or "contract 99" in found.error
    assert "dpo" in discover().losses()


def test_what_is_no_format_is_refused(install: Install) -> None:
    install("bad", "import alignzoo\n@alignzoo.hookimpl\ndef alignzoo_formats(): return [dict]\n")
    assert "is no alignzoo.Format" in status(discover(), "bad").error


def test_the_commands_know_it(tmp_path: Path) -> None:
    path = written(tmp_path, POSTS)
    words = [path, "--plugin", str(SHP), "--format", "shp"]
    for command in (["data", "show"], ["data", "lint"], ["suggest"]):
        result = CliRunner().invoke(cli, [*command, *words])
        assert result.exit_code == 0 and "shp" in result.output, result.output
    result = CliRunner().invoke(cli, ["data", "show", path, "--format", "shp"])
    assert 'there is no format "shp"' in result.stderr
    rows = json.loads(CliRunner().invoke(cli, ["plugins", "--json"]).stdout)
    assert {row["label"]: row["formats"][:1] for row in rows if row["formats"]} == {"builtin-formats": ["labelled"]}
