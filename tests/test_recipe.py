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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import alignzoo
from alignzoo.errors import RecipeError
from alignzoo.plugins import discover
from alignzoo.recipe import SECTIONS, LoRA, Recipe, Source, load_recipe, to_table
from alignzoo.recipe_file import read_tables

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
    recipe = load_recipe(SMALL)
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
        ("[loss]", "[[loss]]\nname = 'a'\n[[loss]]", "r.toml:2: [loss] 2 losses: a recipe has one [loss]"),
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


# --- --set -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=3", "train.learning_rate", 3.0),
        ("train.learning_rate = 3e-4", "train.learning_rate", 3e-4),
        ("train.seed=7", "train.seed", 7),
        ("data.system=3", "data.system", "3"),
        ("data.system=", "data.system", ""),
        ("data.system= Be kind. ", "data.system", " Be kind. "),
        ("data.system=a=b", "data.system", "a=b"),
        ('data.system="quoted"', "data.system", '"quoted"'),
        ("log.run_name=2024-01-01", "log.run_name", "2024-01-01"),
        ("engine.precision=bf16", "engine.precision", "bf16"),
        ("model.quantization=4bit", "model.quantization", "4bit"),
        ("engine.gradient_checkpointing=true", "engine.gradient_checkpointing", True),
        ("train.adam_betas=[0.8, 0.95]", "train.adam_betas", (0.8, 0.95)),
        ("train.adam_betas.1=0.95", "train.adam_betas", (0.9, 0.95)),
        ('data.train=["a"]', "data.train", None),
        ("data.train=2024", "data.train", (Source("2024"),)),
        ('data.train=[{path = "a", weight = 2}]', "data.train", (Source("a", weight=2.0),)),
        ("data.chat_template_kwargs.enable_thinking=false", "data.chat_template_kwargs", {"enable_thinking": False}),
        ("data.columns.chosen=1", "data.columns", {"chosen": "1"}),
        ("model.lora.rank=16", "model.lora", LoRA(rank=16, alpha=4.0)),
        ("model.lora={rank = 4}", "model.lora", LoRA(rank=4)),
        ("model.lora={}", "model.lora", LoRA()),
        ("samples={max_new_tokens = 5}", "samples", SECTIONS["samples"](max_new_tokens=5)),
    ],
)
def test_set_is_parsed_by_the_fields_type(override: str, key: str, value: Any) -> None:
    base = {**SMALL, "model": {"path": "m", "lora": {"rank": 8, "alpha": 4}}, "samples": {"from_eval": 3}}
    base["train"] = {"learning_rate": 1e-5, "adam_betas": [0.9, 0.999]}
    if value is None:
        assert any(f"--set {key}: " in line for line in refused(base, [override]))
        return
    found: Any = load_recipe(base, [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


def test_one_table_of_a_list_by_its_index() -> None:
    base = {**SMALL, "data": {"train": [{"path": "a"}, {"path": "b", "limit": 3}]}}
    found = load_recipe(base, ["data.train.1.limit=5", "data.train.0.weight=0.5"]).data.train
    assert found == (Source("a", weight=0.5), Source("b", limit=5))
    whole = load_recipe(base, ['data.train.0={path="c"}']).data.train
    assert whole == (Source("c"), Source("b", limit=3))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trian.learning_rate=1", '--set trian.learning_rate: [trian] unknown section "trian" (did you mean "train"?)'),
        ("train.seeed=1", '--set train.seeed: [train.seeed] unknown key "seeed" (did you mean "seed"?)'),
        ("train.seed=x", '--set train.seed: [train.seed] seed = "x": has the wrong type (wanted: a whole number >= 0)'),
        ("train.seed=1\nbatch_size = 2", "--set train.seed: [train.seed] seed ="),
        ("train.seed=-1", "--set train.seed: [train.seed] seed = -1 is out of range (allowed: >= 0)"),
        ("train.learning_rate.x=1", '"train.learning_rate" is no table, it has no "x"'),
        ("train.learning_rate.x.y=1", '"train.learning_rate" is no table, it has no "x"'),
        ("data.train.path=x", '"data.train" is a list of 2: write data.train.0 for its first'),
        ("data.train.2.path=x", '"data.train" is a list of 2: write data.train.0 for its first'),
        ("data.train.\u00b2.path=x", '"data.train" is a list of 2: write data.train.0 for its first'),
        ("train=5", '--set train: [train] "train" is a section: write [train]'),
        ("loss=dpo", '--set loss: [loss] loss = "dpo" is no table: write [loss] with name = "..."'),
        ("loss={beta=1}", '--set loss: [loss] a [loss] section with a "name" is missing'),
        ("extends=base.toml", "--set extends: [extends] extends is read in a recipe file only: write it there"),
        ("learning_rate=1", '"learning_rate" stands before any section (did you mean train.learning_rate?)'),
        ("train..seed=1", '--set train..seed: [train.] unknown key ""'),
    ],
)
def test_an_override_that_cannot_be(override: str, line: str) -> None:
    base = {**SMALL, "data": {"train": [{"path": "a"}, {"path": "b"}]}}
    lines = refused(base, [override])
    assert any(line in found for found in lines), lines


@pytest.mark.parametrize("text", ["train.seed", "=3", " =3", ""])
def test_an_override_without_key_or_value(text: str) -> None:
    assert "not of the form key=value" in refused(SMALL, [text])[0]


def test_one_string_of_overrides_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match="list of strings"):
        load_recipe(SMALL, "train.seed=1")


def test_a_table_replaces_a_table_whole(write: Write) -> None:
    recipe = load_recipe(write(), ['loss={name="ipo2", tau=0.2}', "loss.tau=0.3", "model.lora={dora = true}"])
    assert recipe.losses[0].name == "ipo2" and list(recipe.losses[0].settings) == ["tau"]
    assert recipe.model.lora == LoRA(dora=True)


def test_overrides_from_python() -> None:
    table = {"rank": 2}
    recipe = load_recipe(
        SMALL, {"model.lora": table, "model.lora.alpha": 3, "train.max_steps": None, "data.system": "3"}
    )
    assert recipe.model.lora == LoRA(rank=2, alpha=3.0) and recipe.train.max_steps is None
    assert recipe.data.system == "3" and table == {"rank": 2}
    assert refused(SMALL, {"data.system": 3})[1].startswith("overrides['data.system']: [data.system] system = 3")


def test_the_last_override_wins() -> None:
    assert load_recipe(SMALL, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_a_mistake_that_an_override_mends(write: Write) -> None:
    assert load_recipe(write(changed(TEXT, "= 1e-5", "= -1")), ["train.learning_rate=1"]).train.learning_rate == 1


# --- extends ---------------------------------------------------------------------------------------------------------


def test_extends_merges_tables_and_replaces_values(write: Write) -> None:
    write(TEXT + "[samples]\nprompts = ['a', 'b']\n[data.columns]\nchosen = 'good'\n", "base/base.toml")
    top = write(
        "extends = 'base/base.toml'\n[train]\nbatch_size = 2\n[model.lora]\nalpha = 1\n[samples]\nprompts = ['c']\n"
        "[data.columns]\nrejected = 'bad'\n",
        "top.toml",
    )
    recipe = load_recipe(top)
    assert (recipe.train.batch_size, recipe.train.learning_rate) == (2, 1e-5)
    assert recipe.model.lora == LoRA(rank=8, alpha=1.0)
    assert recipe.samples.prompts == ("c",)
    assert recipe.data.columns == {"chosen": "good", "rejected": "bad"}
    assert recipe.losses[0].settings == {"beta": 0.2}  # the same loss: its settings stay
    assert recipe.name == "top"


def test_another_loss_does_not_inherit_settings(write: Write) -> None:
    write(name="base.toml")
    recipe = load_recipe(write('extends = "base.toml"\n[loss]\nname = "sft"\n', "top.toml"))
    assert (recipe.losses[0].name, recipe.losses[0].settings) == ("sft", {})
    kept = load_recipe(write('extends = "base.toml"\n[loss]\nlabel_smoothing = 0.1\n', "top.toml"))
    assert (kept.losses[0].name, kept.losses[0].settings) == ("dpo", {"beta": 0.2, "label_smoothing": 0.1})


def test_places_in_both_files(write: Write) -> None:
    base = changed(changed(TEXT, "batch_size = 8", "batch_size = 0"), "1e-5", "-1")
    write(base, "base.toml")
    lines = refused(write('extends = "base.toml"\n[engine]\ndevice = "tpu"\n[train]\nlearning_rate = -2\n', "top.toml"))
    places = [line.split("] ")[0] for line in lines if ".toml:" in line]
    assert places == [
        "top.toml:5: [train.learning_rate",
        "base.toml:15: [train.batch_size",
        "top.toml:3: [engine.device",
    ]


def test_a_list_that_is_replaced_leaves_no_places_behind(write: Write) -> None:
    base = changed(TEXT, '[data]\ntrain = "rows.jsonl"\n', '[[data.train]]\npath = "a"\nlimit = 0\n')
    write(base, "base.toml")
    lines = refused(write('extends = "base.toml"\n[data]\ntrain = [{limit = 0}]\n', "top.toml"))
    assert [line.split("] ")[0] for line in lines[1:3]] == [
        "top.toml:3: [data.train.0.path", "top.toml:3: [data.train.0.limit"
    ]  # fmt: skip


def test_extends_of_extends_and_circles(write: Write) -> None:
    write(name="a/base.toml")
    write('extends = "../a/base.toml"\n[train]\nseed = 1\n', "b/middle.toml")
    recipe = load_recipe(write('extends = "b/middle.toml"\n[train]\nbatch_size = 1\n', "top.toml"))
    assert (recipe.train.seed, recipe.train.batch_size, recipe.model.path) == (1, 1, "a/model")
    write('extends = "../top.toml"\n', "a/base.toml")
    lines = refused("top.toml")
    assert "extends itself" in lines[0] and "top.toml -> middle.toml -> base.toml -> top.toml" in lines[1]
    assert "extends itself" in refused(write('extends = "r.toml"'))[0]


def test_extends_that_leads_nowhere(write: Write) -> None:
    lines = refused(write('\nextends = "none.toml"\n'))
    assert lines[:2] == ["none.toml: no such recipe", "why: r.toml:2 extends it"]
    assert refused(write("extends = 3\n"))[0].startswith("r.toml:1: extends is a string")
    assert refused({**SMALL, "extends": "base.toml"})[1].startswith(
        "recipe: [extends] extends is read in a recipe file"
    )


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


# --- anything at all -------------------------------------------------------------------------------------------------

KEYS = [
    *SECTIONS, "loss", "name", "extends", *{f.name for cls in SECTIONS.values() for f in dataclasses.fields(cls)},
    "rank", "target", "limit", "0", "", "x",
]  # fmt: skip
SCALARS = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.text(max_size=8), st.dates(), st.none(),
    st.sampled_from([10**400, "auto", "4bit", "sft", "~x/y", "a\0b", "x" * 300]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)
FIELDS = {name: [f.name for f in dataclasses.fields(cls)] for name, cls in SECTIONS.items()} | {
    "loss": ["name", "beta"]
}


@st.composite
def recipe_tables(draw: st.DrawFn) -> dict[str, Any]:
    """Tables that look like a recipe here and there."""
    table: dict[str, Any] = draw(st.sampled_from([{}, SMALL, EVERYTHING]))
    table = {section: dict(content) for section, content in table.items()}
    for _ in range(draw(st.integers(0, 4))):
        section = draw(st.sampled_from([*FIELDS, "x"]))
        if draw(st.integers(0, 3)):
            table.setdefault(section, {})[draw(st.sampled_from(FIELDS.get(section, KEYS)))] = draw(VALUES)
        else:
            return {**table, section: draw(VALUES)}
    return table


OVERRIDES = st.tuples(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4).map(".".join), st.text(max_size=12))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(recipe_tables(), st.lists(OVERRIDES, max_size=2))
def test_whatever_is_written_is_read_or_refused(table: dict[str, Any], overrides: list[tuple[str, str]]) -> None:
    try:
        recipe = load_recipe(table, [f"{key}={text}" for key, text in overrides])
    except RecipeError as error:
        assert str(error)
        return
    assert isinstance(recipe, Recipe)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(recipe_tables(), st.dictionaries(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3).map(".".join), VALUES))
def test_the_same_for_overrides_from_python(table: dict[str, Any], overrides: dict[str, Any]) -> None:
    try:
        recipe = load_recipe(table, overrides)
    except RecipeError:
        return
    assert load_recipe(to_table(recipe)) == recipe


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(recipe_tables())
def test_lines_are_found_in_whatever_tomli_w_writes(tmp_path: Path, table: dict[str, Any]) -> None:
    """Every key of a file has a place, and the line that it names holds the last part of the key."""
    try:
        text = tomli_w.dumps(table)
    except (TypeError, UnicodeEncodeError, ValueError):
        return
    path = tmp_path / "any.toml"
    try:
        path.write_text(text, encoding="utf-8", newline="")
        tables = read_tables(path)
    except (UnicodeEncodeError, RecipeError):
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    for section, content in tables.content.items():
        for key in content if isinstance(content, dict) else ():
            place = tables.locate((section, key))
            number = int(place.rpartition(":")[2])
            assert place.startswith(str(path)) and (key in lines[number - 1])
