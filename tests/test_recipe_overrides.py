"""Recipes: --set, overrides from Python, and `extends`."""

from __future__ import annotations

from typing import Any

import pytest
from test_recipe import SMALL, TEXT, Write, changed, refused, write

from alignzoo.recipe import SECTIONS, LoRA, Source, load_recipe

__all__ = ["write"]  # the fixture


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
