"""Recipes: files, `extends`, --set, what is refused and with which place, and the resolved recipe read again."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import alignzoo
from alignzoo.errors import RecipeError
from alignzoo.plugins import discover
from alignzoo.recipe import SECTIONS, LoRA, Source, load_recipe, to_table

REPO = Path(__file__).resolve().parents[1]
Write = Callable[..., Path]

SMALL: dict[str, Any] = {
    "loss": {"name": "dpo"},
    "model": {"path": "a/model"},
    "data": {"train": "rows.jsonl"},
    "train": {"learning_rate": 1e-5},
}
TEXT = """\
# a recipe
[loss]
name = "dpo"
beta = 0.2

[model]
path = "a/model"
lora = {rank = 8}

[data]
train = "rows.jsonl"

[train]
learning_rate = 1e-5
batch_size = 8
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file below the working directory and gives its relative path, as people type it."""
    monkeypatch.chdir(tmp_path)

    def make(text: str = TEXT, name: str = "r.toml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return make


def refused(path: Any, overrides: Any = ()) -> list[str]:
    """The lines of the error, the title and the way out among them."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return [line.strip() for line in str(caught.value).splitlines()]


def changed(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_file_becomes_typed_sections(write: Write) -> None:
    recipe = alignzoo.load_recipe(write())
    assert isinstance(recipe, alignzoo.Recipe) and recipe.name == "r"
    assert (recipe.losses[0].name, recipe.losses[0].settings) == ("dpo", {"beta": 0.2})
    assert recipe.model.lora == LoRA(rank=8)
    assert recipe.train.learning_rate == 1e-5 and recipe.train.batch_size == 8
    assert recipe.data.train == (Source("rows.jsonl"),)
    assert recipe.engine == SECTIONS["engine"]()  # a section that is left out has its defaults


def test_a_dictionary_in_the_place_of_a_path() -> None:
    recipe = load_recipe(SMALL, {"train.seed": 3})
    assert recipe.train.seed == 3 and recipe.name == "recipe"
    assert "seed" not in SMALL["train"]  # the caller's own table is left as it was


def test_a_byte_order_mark_and_windows_line_ends(write: Write) -> None:
    path = write()
    path.write_bytes(b"\xef\xbb\xbf" + changed(TEXT, "batch_size", "batch_sise").replace("\n", "\r\n").encode())
    assert 'r.toml:15: [train.batch_sise] unknown key "batch_sise" (did you mean "batch_size"?)' in refused(path)


def test_recipes_are_frozen() -> None:
    recipe = load_recipe({**SMALL, "rollout": {}})
    for thing in (recipe, *(getattr(recipe, name) for name in SECTIONS)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            thing.name = "x"


# --- what is refused, and where --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("[train]", "[trian]", 'r.toml:13: [trian] unknown section "trian" (did you mean "train"?)'),
        ("batch_size = 8", "batch_sise = 8", 'r.toml:15: [train.batch_sise] unknown key "batch_sise" (did you'),
        ("batch_size = 8", 'batch_size = "8"', 'r.toml:15: [train.batch_size] batch_size = "8": has the wrong type'),
        ("batch_size = 8", "batch_size = 8.0", "r.toml:15: [train.batch_size] batch_size = 8.0: has the wrong type"),
        ("batch_size = 8", "batch_size = true", "r.toml:15: [train.batch_size] batch_size = true: has the wrong type"),
        ("batch_size = 8", "batch_size = 0", "r.toml:15: [train.batch_size] batch_size = 0 is out of range (allowed"),
        ("= 1e-5", "= nan", "r.toml:14: [train.learning_rate] learning_rate = nan: is not a finite number"),
        ("= 1e-5", "= inf", "r.toml:14: [train.learning_rate] learning_rate = inf: is not a finite number"),
        ("= 1e-5", "= -1e-5", "learning_rate = -1e-05 is out of range (allowed: >= 0)"),
        ("= 1e-5", "= 2024-01-01", "r.toml:14: [train.learning_rate] learning_rate = datetime.date(2024"),
        ("learning_rate = 1e-5", "", 'r.toml:13: [train.learning_rate] "learning_rate" is missing: peak learning rate'),
        ("{rank = 8}", "{rnak = 8}", 'r.toml:8: [model.lora.rnak] unknown key "rnak" (did you mean "rank"?)'),
        ("{rank = 8}", "8", "r.toml:8: [model.lora] lora = 8: is not a table"),
        (
            'path = "a/model"',
            'path = {a = "model"}',
            "r.toml:7: [model.path] path = {'a': 'model'}: has the wrong type",
        ),
        ('train = "rows.jsonl"', 'train = {path = "rows.jsonl"}', "r.toml:11: [data.train] train = {'path': 'rows"),
        ('name = "dpo"', "", 'r.toml:2: [loss] a [loss] section with a "name" is missing'),
        ('name = "dpo"', "name = 3", "r.toml:3: [loss.name] name = 3: has the wrong type (wanted: a string)"),
        ("[loss]", "[[loss]]\nname = 'a'\nweight = 'b'\n[[loss]]", 'r.toml:4: [loss.0.weight] weight = "b": has'),
        ("[model]", "[[model]]", 'r.toml:6: [model] "model" is a section: write [model]'),
        ("# a recipe", "seed = 3", 'r.toml:1: [seed] "seed" stands before any section (did you mean train.seed?)'),
        ("# a recipe", "path = 3", "stands before any section (did you mean model.path or reference.path?)"),
        ("# a recipe", "zzz = 3", 'r.toml:1: [zzz] unknown key "zzz"'),
        ("# a recipe", "train.seed = 'x'", "r.toml: not valid TOML: Cannot declare"),
    ],
)
def test_a_mistake_is_told_with_its_line(write: Write, old: str, new: str, line: str) -> None:
    lines = refused(write(changed(TEXT, old, new)))
    assert any(line in found for found in lines), lines


def test_all_mistakes_at_once(write: Write) -> None:
    text = TEXT + '[engin]\nprecision = "fp8"\n[log]\nevery_steps = 0\ntrackers = "wandb"\n'
    lines = refused(write(changed(text, "path =", "paht =")))
    assert lines[0] == "the recipe has 5 mistakes:"
    assert [re.sub(r" .*", "", line) for line in lines[1:-1]] == [
        "r.toml:16:", "r.toml:7:", "r.toml:6:", "r.toml:19:", "r.toml:20:"
    ]  # fmt: skip
    assert lines[-1].startswith("way out:") and "docs/recipes.md" in lines[-1]


def test_lines_past_strings_and_lists_of_many_lines(write: Write) -> None:
    text = '''\
[samples]
prompts = [
  "batch_size = 1",
  "[train]",
]
system = """
[train]
batch_size = 0
[[x]]
"""
from_eval = -1
'''
    lines = refused(write(text + changed(TEXT, "batch_size = 8", '"batch_size" = 0')))
    assert "r.toml:11: [samples.from_eval] from_eval = -1 is out of range (allowed: >= 0)" in lines
    assert any(line.startswith("r.toml:26: [train.batch_size]") for line in lines)


def test_tables_of_data(write: Write) -> None:
    tables = """\
[[data.train]]
path = "a.jsonl"
limit = 0

[[data.train]]
wieght = 2
path = "b.jsonl"
[data.train.columns]
chosen = 3

[[data.eval]]
path = "c.jsonl"
splitt = "x"
"""
    lines = refused(write(changed(TEXT, '[data]\ntrain = "rows.jsonl"\n', tables)))
    assert {line.split("] ")[0] for line in lines if line.startswith("r.toml")} == {
        "r.toml:12: [data.train.0.limit", "r.toml:15: [data.train.1.wieght", "r.toml:18: [data.train.1.columns.chosen",
        "r.toml:22: [data.eval.0.splitt",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"[train\n", "r.toml: not valid TOML: "),
        (b"a = 1\na = 2\n", "r.toml: not valid TOML: "),
        (b"a = True\n", "r.toml: not valid TOML: "),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "r.toml: not valid TOML: "),
        (b"a = " + b"9" * 5000, "r.toml: not valid TOML: "),
        (b"\xff\xfe", "r.toml: cannot be read"),
    ],
)
def test_files_that_are_no_toml(write: Write, content: bytes, what: str) -> None:
    path = write()
    path.write_bytes(content)
    assert refused(path)[0].startswith(what)


def test_paths_that_are_no_recipe(write: Write) -> None:
    assert refused("none.toml")[0] == "none.toml: no such recipe"
    assert refused(Path())[0] == ".: a folder, not a recipe"
    assert "no such recipe" in refused("~nobody-of-this-name/r.toml")[0]
    assert "cannot be read" in refused("a\0b")[0]
    Path("round.toml").symlink_to("round.toml")
    assert "round.toml" in refused("round.toml")[0]


@pytest.mark.parametrize(
    ("overrides", "place"),
    [
        ({"data.eval": "held.jsonl", "data.eval_fraction": 0.5}, "data.eval_fraction"),
        ({"train.max_steps": 10, "train.warmup_steps": 11}, "train.warmup_steps"),
        ({"model.quantization": "4bit"}, "model.quantization"),
        ({"data.train": []}, "data.train"),
        ({"data.eval": []}, "data.eval"),
        ({"reference.revision": "main"}, "reference.revision"),
    ],
)
def test_keys_that_do_not_go_together(overrides: dict[str, Any], place: str) -> None:
    assert any(line.startswith(f"overrides['{place}']: [{place}]") for line in refused(SMALL, overrides))


def test_keys_that_do(write: Write) -> None:
    load_recipe(SMALL, {"data.eval": "held.jsonl", "data.eval_fraction": 0})
    load_recipe(SMALL, {"train.max_steps": 10, "train.warmup_steps": 10})
    load_recipe(SMALL, {"model.quantization": "4bit", "model.lora": {}})
    load_recipe(SMALL, {"reference.path": "b/model", "reference.revision": "main"})


def test_senseless_keys_are_told_together() -> None:
    lines = refused(SMALL, {"model.quantization": "8bit", "data.eval": []})
    assert lines[0] == "the recipe has 2 mistakes:"


# --- paths -----------------------------------------------------------------------------------------------------------


def test_data_paths_start_at_the_recipes_folder(write: Write, tmp_path: Path) -> None:
    for name in ("recipes/rows.jsonl", "here.jsonl", "recipes/chat.jinja"):
        write("{}", name)
    path = write(changed(TEXT, "[train]", 'eval = [{path = "here.jsonl"}]\nchat_template = "chat.jinja"\n[train]'),
                 "recipes/r.toml")  # fmt: skip
    data = load_recipe(path).data
    assert data.train == (Source(str(tmp_path / "recipes/rows.jsonl")),)
    assert data.eval == (Source(str(tmp_path / "here.jsonl")),)  # the working directory, where the folder has none
    assert data.chat_template == str(tmp_path / "recipes/chat.jinja")
    hub = load_recipe(path, ["data.train=someone/set", "data.chat_template=none"]).data
    assert hub.train == (Source("someone/set"),) and hub.chat_template == "none"


def test_data_paths_of_a_base_start_at_its_own_folder(write: Write, tmp_path: Path) -> None:
    for name in ("shared/rows.jsonl", "mine/rows.jsonl", "mine/held.jsonl"):
        write("{}", name)
    write(name="shared/base.toml")
    top = write('extends = "../shared/base.toml"\n[data]\neval = "held.jsonl"\n', "mine/top.toml")
    data = load_recipe(top).data
    assert data.train == (Source(str(tmp_path / "shared/rows.jsonl")),)
    assert data.eval == (Source(str(tmp_path / "mine/held.jsonl")),)
    assert load_recipe(top, ["data.train=rows.jsonl"]).data.train == (Source(str(tmp_path / "mine/rows.jsonl")),)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "~nobody-of-this-name/rows.jsonl", "a/b", "..\\x"])
def test_names_that_can_be_no_file_are_left_alone(path: str) -> None:
    assert load_recipe(SMALL, {"data.train": path}).data.train == (Source(path),)


def test_output_and_model_paths_are_left_to_the_working_directory(write: Write) -> None:
    (Path("recipes") / "runs").mkdir(parents=True)
    recipe = load_recipe(write(name="recipes/r.toml"))
    assert recipe.output.dir == "runs" and recipe.model.path == "a/model"


# --- the resolved recipe ---------------------------------------------------------------------------------------------

EVERYTHING = {
    "loss": {"name": "dpo", "beta": 0.3},
    "model": {"path": "m", "revision": "main", "lora": {"target": ["q", "v"], "alpha": 8, "dora": True}},
    "reference": {"mode": "live", "path": "r", "revision": "v1"},
    "data": {
        "train": [{"path": "a", "weight": 0.5, "columns": {"chosen": "good"}}, {"path": "b", "split": "x", "limit": 9}],
        "eval": "c", "system": 'a "quoted"\nline \u2028 \u00e9', "chat_template_kwargs": {"a": {"b": [1, 2.5, False]}},
        "keep": ["score"], "columns": {"rejected": "bad"}, "max_prompt_length": 7,
    },
    "train": {"learning_rate": 5e-7, "max_steps": 3, "warmup_steps": 0, "adam_betas": [0, 0.95], "adam_epsilon": 1e-12},
    "samples": {"prompts": ["'''", '"""']},
    "checkpoint": {"every_steps": 2},
    "log": {"trackers": ["tensorboard"]},
}  # fmt: skip


@pytest.mark.parametrize("table", [SMALL, EVERYTHING, {**SMALL, "loss": [{"name": "dpo", "beta": 1}]}])
def test_the_resolved_recipe_reads_back_as_the_same(table: dict[str, Any], write: Write) -> None:
    recipe = load_recipe(table)
    again = load_recipe(write(tomli_w.dumps(to_table(recipe))))
    assert again == recipe
    assert tomllib.loads(tomli_w.dumps(to_table(again))) == to_table(recipe)


def test_the_resolved_recipe_writes_every_key_with_the_loss_settings(write: Write) -> None:
    from alignzoo.check import find_loss

    recipe = load_recipe(EVERYTHING, ["loss.label_smoothing=0.1"])
    _, loss = find_loss(recipe, discover())
    table = to_table(recipe, [dataclasses.asdict(loss.settings)])
    assert table["loss"] == {
        "name": "dpo", "beta": 0.3, "label_smoothing": 0.1, "length_normalised": False, "reference_free": False
    }  # fmt: skip
    assert set(table["train"]) == {f.name for f in dataclasses.fields(SECTIONS["train"])}
    again = load_recipe(write(tomli_w.dumps(table)))
    assert {"name": "dpo", **again.losses[0].settings} == table["loss"]


# --- the settings of a loss ------------------------------------------------------------------------------------------


def test_settings_of_a_loss_fail_with_their_lines(write: Write) -> None:
    from alignzoo.check import find_loss

    path = write(changed(TEXT, "beta = 0.2", 'beta = -1\nlable_smoothing = 0.1\nreference_free = "no"'))
    recipe = load_recipe(path)
    with pytest.raises(RecipeError) as caught:
        find_loss(recipe, discover())
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0] == "the recipe has 3 mistakes:"
    assert 'r.toml:5: [loss.lable_smoothing] unknown key "lable_smoothing" (did you mean "label_smoothing"?)' in lines
    assert "r.toml:4: [loss.beta] beta = -1 is out of range (allowed: > 0)" in lines
    assert any(line.startswith('r.toml:6: [loss.reference_free] reference_free = "no"') for line in lines)


def test_settings_of_a_loss_from_the_command_line(write: Write) -> None:
    from alignzoo.check import find_loss

    recipe = load_recipe(write(), ["loss.beta=1", "loss.reference_free=true"])
    _, loss = find_loss(recipe, discover())
    assert (loss.settings.beta, loss.settings.reference_free) == (1.0, True)
    with pytest.raises(RecipeError, match=r"--set loss.beta: \[loss.beta\] beta = 0 is out of range"):
        find_loss(load_recipe(write(), ["loss.beta=0"]), discover())


# --- the project's own recipes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((REPO / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_the_projects_recipes_load(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from alignzoo.check import find_loss

    monkeypatch.chdir(tmp_path)  # wherever they are started from
    recipe = load_recipe(path)
    for source in (*recipe.data.train, *(recipe.data.eval or ())):
        assert Path(source.path).is_file()
    find_loss(recipe, discover())
