"""Rewards found: plugins of functions and classes, [[rewards]] in recipes, what the command line tells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from reward_helpers import BREVITY, SMALL, Case, case, plugin

from alignzoo.errors import PluginError, RecipeError
from alignzoo.plugins import discover
from alignzoo.recipe import load_recipe, to_table
from alignzoo.rewards import make_rewards

__all__ = ["case", "plugin"]  # fixtures


# --- the recipe -------------------------------------------------------------------------------------------------------


TEXT = """
[loss]
name = "sft"
[model]
path = "m"
[data]
train = "rows.jsonl"
[train]
learning_rate = 1e-5
[[rewards]]
name = "constant"
weight = 0.5
value = 3
[[rewards]]
name = "factor"
kind = "b"
"""


def refused(case: Case, text: str, tmp_path: Path, *overrides: str) -> str:
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        make_rewards(load_recipe(file, overrides), case.registry)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(tmp_path) + "/", "")


def test_settings_of_classes_and_of_functions(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(TEXT)
    recipe = load_recipe(file)
    rewards = make_rewards(recipe, case.registry)
    assert rewards.settings == [{"value": 3.0, "column": "answer"}, {"by": 2.0, "kind": "b"}]
    assert rewards.labels == ["constant", "factor"] and len(rewards) == 2
    table = to_table(recipe, reward_settings=rewards.settings)
    assert table["rewards"][1] == {
        "name": "factor", "weight": 1.0, "timeout": 120.0, "max_failures": 0.1, "by": 2.0, "kind": "b",
    }  # fmt: skip
    file.write_text(tomli_w.dumps(table))
    again = load_recipe(file)
    assert make_rewards(again, case.registry).settings == rewards.settings
    assert to_table(again) == table and load_recipe(to_table(recipe)) == recipe
    assert "rewards" not in to_table(load_recipe(SMALL))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("constant", "constnat"), 'a.toml:11: there is no reward "constnat" (did you mean "constant"?)'),
        (TEXT.replace("value = 3", "value = -1"), "a.toml:13: [rewards.0.value] value = -1 is out of range"),
        (TEXT.replace("value = 3", "vlaue = 3"), 'a.toml:13: [rewards.0.vlaue] unknown key "vlaue" (did you mean "va'),
        (TEXT.replace('"b"', '"c"'), 'a.toml:16: [rewards.1.kind] kind = "c": is not among the choices'),
        (TEXT.replace('weight = 0.5', 'weight = "x"'), 'a.toml:12: [rewards.0.weight] weight = "x": has the wrong'),
        (TEXT + "timeout = 0\n", "a.toml:17: [rewards.1.timeout] timeout = 0 is out of range (allowed: > 0)"),
        (TEXT + "max_failures = 2\n", "max_failures = 2 is out of range (allowed: >= 0 and <= 1)"),
        (TEXT.replace('name = "factor"', ""), 'a.toml:14: [rewards.1.name] "name" is missing: one of those'),
        ('[rewards]\nname = "ones"\n' + TEXT.split("[[")[0], '"rewards" is a list of tables: write [[rewards]]'),
        ("rewards = [1]\n" + TEXT.split("[[")[0], '[rewards.0] 1 is no table: write [[rewards]] with name = "..."'),
        ('[[reward]]\nname = "ones"\n' + TEXT.split("[[")[0], 'unknown key "reward" (did you mean "rewards"?)'),
    ],
)  # fmt: skip
def test_mistakes_have_their_place(case: Case, tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(case, text, tmp_path)


def test_set_reaches_into_the_tables(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(TEXT)
    recipe = load_recipe(file, ["rewards.0.weight=2", "rewards.1.by=7", "rewards.1.timeout=5"])
    assert recipe.rewards[0].weight == 2.0 and recipe.rewards[1].timeout == 5.0
    assert make_rewards(recipe, case.registry).settings[1] == {"by": 7.0, "kind": "b"}
    (one,) = load_recipe(file, ['rewards=[{name = "ones", weight = 3}]']).rewards
    assert (one.name, one.weight) == ("ones", 3.0)
    assert load_recipe(file, ["rewards=[]"]).rewards == ()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards.weight=2", '"rewards" is a list of 2: write rewards.0 for its first'),
        ("rewards.2.weight=2", '"rewards" is a list of 2: write rewards.0 for its first'),
        ("rewards.0.weight=heavy", '--set rewards.0.weight: [rewards.0.weight] weight = "heavy": has the wrong type'),
        ("rewards.0.value=x", '--set rewards.0.value: [rewards.0.value] value = "x": has the wrong type'),
        ("rewards=ones", '"rewards" is a list of tables: write [[rewards]]'),
    ],
)
def test_what_set_cannot_do_is_told(case: Case, tmp_path: Path, override: str, message: str) -> None:
    assert message in refused(case, TEXT, tmp_path, override)


def test_an_override_without_a_table_to_go_to() -> None:
    with pytest.raises(RecipeError, match=r'"rewards" is a list of tables: write \[\[rewards\]\]'):
        load_recipe(SMALL, ["rewards.0.weight=2"])


# --- plugins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(completions, **columns): pass", "its first two parameters are not prompts and completions"),
        ("def F(prompts, completions): pass", "name = \"F\" (wanted: lower-case letters, digits, - and _)"),
        ("def f(prompts, completions, *, weight=1.0): pass", "setting weight: the names name, weight, timeout and"),
        ("def f(prompts, completions, *, x=object()): pass", "setting x: the type object cannot be read from a recipe"),
        ("def f(prompts, completions, *, x: int = 1.5): pass", "setting x: its default breaks its own rules"),
        ("def f(prompts, completions, *, x: 'Missing' = 1): pass", "cannot be settings: NameError"),
        ("def f(prompts, completions, *, x=[]): pass", "cannot be settings: ValueError: mutable default"),
        ("f = 3", "3 is neither a function nor a subclass of alignzoo.Reward"),
        ("class f(alignzoo.Reward): pass", "does not declare name, Settings in the class itself; has no __call__"),
        ("class f(alignzoo.Reward):\n    name, Settings = 'f', int\n    def __call__(self, a, b): pass", "Settings is"),
        ("class f(alignzoo.Reward):\n    name, Settings = 'f', alignzoo.NoSettings\n    def __call__(self, **k): pass",
         "__call__ takes (self, prompts, completions, **columns)"),
        ("class f(alignzoo.Loss): pass", "is neither a function nor a subclass of alignzoo.Reward"),
    ],
)  # fmt: skip
def test_a_reward_that_breaks_the_contract_breaks_its_plugin(tmp_path: Path, source: str, message: str) -> None:
    file = tmp_path / "mine.py"
    name = "F" if "F(" in source else "f"
    file.write_text(f"import alignzoo\n{source}\n@alignzoo.hookimpl\ndef alignzoo_rewards(): return [{name}]\n")
    with pytest.raises(PluginError) as caught:
        discover([file]).rewards()
    assert message in caught.value.why
    if source.startswith("def "):
        assert f"({file}:2)" in caught.value.why


def test_one_plugin_may_bring_losses_and_rewards(tmp_path: Path) -> None:
    file = tmp_path / "both.py"
    file.write_text(BREVITY.read_text() + "\n@alignzoo.hookimpl\ndef alignzoo_losses(): return []\n")
    registry = discover([file])
    assert "brevity" in registry.rewards() and "dpo" in registry.losses() and "brevity" not in registry.losses()
    file.write_text(BREVITY.read_text().replace("return [brevity]", "return brevity"))
    with pytest.raises(PluginError) as caught:
        discover([file]).reward("brevity")
    assert "alignzoo_rewards() returned function, not a list" in caught.value.why


def test_doubled_and_blocked_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text(BREVITY.read_text().replace("brevity", "exact"))
    with pytest.raises(PluginError, match='2 rewards are named "exact"') as caught:
        discover([file]).reward("exact")
    assert f"leave out --plugin {file}" in caught.value.fix and "builtin-rewards" in caught.value.fix
    monkeypatch.setenv("ALIGNZOO_BLOCK_PLUGINS", "builtin-rewards")
    registry = discover([file])
    assert registry.reward("exact").distribution == "file" and list(registry.rewards()) == ["exact"]
    with pytest.raises(PluginError, match='there is no reward "judge"') as caught:
        registry.reward("judge")
    assert "is blocked by ALIGNZOO_BLOCK_PLUGINS" in caught.value.why and "the rewards are exact" in caught.value.why


def test_the_names_of_functions(case: Case) -> None:
    assert "another-name" in case.registry.rewards() and "renamed" not in case.registry.rewards()
    assert case.score("another-name").total == [5.0, 5.0]


# --- the command line -------------------------------------------------------------------------------------------------


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alignzoo", *words], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_command_lists_them(plugin: Path) -> None:
    done = command("rewards", "--json", "--plugin", str(plugin))
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["constant"]["summary"] == "Always the same." and rows["constant"]["distribution"] == "file"
    assert rows["factor"]["settings"][1]["type"] == 'one of "a", "b"'
    assert rows["exact"]["distribution"] == "alignzoo" and rows["exact"]["label"] == "builtin-rewards"
    shown = command("rewards", "--plugin", str(plugin)).stdout
    assert "Always the same." in shown and "value = 1.0 (>= 0)" in shown
    plugins = {row["label"]: row for row in json.loads(command("plugins", "--json").stdout)}
    assert "exact" in plugins["builtin-rewards"]["rewards"] and plugins["builtin-rewards"]["losses"] == []


@pytest.mark.parametrize("words", ["check", "run"])
def test_a_misspelt_reward_is_told_before_torch_is_imported(words: str, tmp_path: Path) -> None:
    recipe = tmp_path / "a.toml"
    recipe.write_text(TEXT.replace('"constant"', '"exatc"'))
    code = (
        "import sys\nfrom alignzoo.cli import cli\n"
        "try: cli(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code)\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, words, str(recipe)], capture_output=True, text=True, timeout=60, check=False
    )
    assert 'a.toml:11: there is no reward "exatc" (did you mean "exact"?)' in done.stderr
    assert done.stdout.splitlines()[-2:] == ["2", "[]"]


def test_a_loss_that_learns_from_data_has_no_use_for_rewards(tiny_folder: Path, tmp_path: Path) -> None:
    from alignzoo.check import make_job

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"p {i}", "completion": f"c {i}"}) + "\n" for i in range(4)))
    table = {**SMALL, "model": {"path": str(tiny_folder)}, "data": {"train": str(rows)}, "rewards": [{"name": "think"}]}
    said: list[str] = []
    job = make_job(load_recipe(table), said.append)
    assert job.rewards.labels == ["think"] and any(line.startswith("reward: think (alignzoo") for line in said)
    assert any(line.startswith("WARNING: [[rewards]] is without effect: ") for line in said)
