"""Plugins from a file, from Python, and from strangers' distributions; losses from a recipe's table; the tables."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from loss_helpers import completion
from plugin_helpers import Install, distribution, installer, python, source_of

import alignzoo
from alignzoo import schema
from alignzoo.errors import PluginError
from alignzoo.plugins import BLOCK, discover, loss_table, make_loss, plugin_table

ROOT = Path(__file__).resolve().parents[1]
IPO2 = ROOT / "tests" / "fixtures_plugins" / "alignzoo_ipo2.py"
EXAMPLE = ROOT / "plugins" / "alignzoo-example"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    yield from installer(tmp_path, monkeypatch)


# --- files and classes ------------------------------------------------------------------------------------------------


FUTURE_FILE = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import alignzoo


@dataclass(frozen=True)
class Settings:
    """Its types are strings until somebody resolves them in the module."""

    kind: Kind = alignzoo.setting("a", "one of two")
    beta: float | None = alignzoo.setting(None, "a number", gt=0)


Kind = Literal["a", "b"]


class Mine(alignzoo.Loss):
    name, data, needs_reference = "future", "demonstrations", False
    Settings = Settings

    def __call__(self, batch: alignzoo.Demonstrations) -> alignzoo.LossOutput:
        return alignzoo.LossOutput(-batch.completion.sum())


@alignzoo.hookimpl
def alignzoo_losses() -> list[type[alignzoo.Loss]]:
    return [Mine]
'''


def test_a_file_with_postponed_annotations(install: Install, tmp_path: Path) -> None:
    file = tmp_path / "my-loss.py"
    file.write_text(FUTURE_FILE)
    info = discover([file]).get("future")
    assert (info.distribution, info.label, info.origin) == ("file", "my-loss", str(file))
    assert info.version.startswith("sha256:")
    assert info.cls(kind="b", beta=0.5).settings.beta == 0.5
    with pytest.raises(PluginError, match="kind"):
        info.cls(kind="c")
    assert not (tmp_path / "__pycache__").exists()


def test_a_file_that_was_edited_is_read_again(install: Install, tmp_path: Path) -> None:
    """At once, and at the same size: what runs is what the version's hash says."""
    file = tmp_path / "mine.py"
    file.write_text(source_of("aaa"))
    first = discover([file]).get("aaa")
    assert discover([file]).get("aaa").cls is first.cls  # unchanged: the same classes
    file.write_text(source_of("bbb"))
    second = discover([file]).get("bbb")
    assert second.version != first.version


def test_two_files_of_one_name(install: Install, tmp_path: Path) -> None:
    files = [tmp_path / folder / "loss.py" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text(source_of(f"of-{file.parent.name}"))
    assert {"of-a", "of-b"} <= set(discover([*files, files[0]]).losses())


@pytest.mark.parametrize(
    ("source", "error", "line"),
    [
        ("import alignzoo\n\nx = 1 / 0\n", "ZeroDivisionError: division by zero", 3),
        ("import alignzoo\nx = (\n", "SyntaxError: '(' was never closed", 2),
    ],
)
def test_a_broken_file_is_an_error_with_its_line(
    install: Install, tmp_path: Path, source: str, error: str, line: int
) -> None:
    """The user named it, so it is not passed over; the list of plugins still shows it."""
    file = tmp_path / "torn.py"
    file.write_text(source)
    registry = discover([file])
    for ask in (registry.losses, lambda: registry.get("dpo")):
        with pytest.raises(PluginError) as caught:
            ask()
        assert str(file) in caught.value.what and caught.value.why == f"{error} ({file}:{line})"
    row = next(row for row in plugin_table(registry) if row["label"] == "torn")
    assert row["state"] == "broken" and error in row["error"]
    assert not [name for name in sys.modules if name.startswith("alignzoo_plugin_torn")]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"mine.py cannot be read: No such file"):
        discover([tmp_path / "mine.py"])
    with pytest.raises(PluginError, match="Is a directory"):
        discover([tmp_path])


def test_a_file_and_an_installed_plugin_of_one_name(install: Install, tmp_path: Path) -> None:
    install("mine", source_of("mine"))
    file = tmp_path / "mine.py"
    file.write_text(source_of("mine"))
    with pytest.raises(PluginError, match='2 losses are named "mine"') as caught:
        discover([file]).get("mine")
    assert f"{BLOCK}=mine" in caught.value.fix and f"leave out --plugin {file}" in caught.value.fix


def test_a_class_given_from_python(install: Install) -> None:
    class Here(alignzoo.Loss):
        name, data, needs_reference, Settings = "here", "pairs", True, alignzoo.NoSettings

        def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
            return alignzoo.LossOutput(batch.chosen.log_ratio())

    info = discover(losses=[Here]).get("here")
    assert info.cls is Here and (info.distribution, info.version) == ("python", "")
    Here.name = "dpo"
    with pytest.raises(PluginError, match='2 losses are named "dpo"') as caught:
        discover(losses=[Here]).get("dpo")
    assert "rename" in caught.value.fix
    with pytest.raises(PluginError, match="is not a subclass"):
        discover(losses=[int])  # type: ignore[list-item]


# --- building and listing ---------------------------------------------------------------------------------------------


def test_a_loss_is_made_from_the_table_of_a_recipe(install: Install) -> None:
    problems: list[schema.Problem] = []
    loss = make_loss(discover().get("dpo"), {"beta": schema.Raw("0.5"), "reference_free": True}, problems, ("loss",))
    assert loss is not None and not problems
    assert (loss.settings.beta, loss.settings.reference_free, loss.needs_reference) == (0.5, True, False)


def test_everything_wrong_with_a_table_is_a_problem_with_its_key(install: Install) -> None:
    problems: list[schema.Problem] = []
    table = {"betta": 1.0, "label_smoothing": 0.5, "reference_free": "yes"}
    assert make_loss(discover().get("dpo"), table, problems, ("loss",)) is None
    assert {p.key: p.message for p in problems} == {
        "loss.betta": 'unknown key "betta" (did you mean "beta"?)',
        "loss.label_smoothing": "label_smoothing = 0.5 is out of range (allowed: >= 0 and < 0.5)",
        "loss.reference_free": 'reference_free = "yes": has the wrong type (wanted: true or false)',
    }


def test_the_tables_are_json(install: Install, tmp_path: Path) -> None:
    install("bad", "raise ValueError('no')\n", version="3.4")
    registry = discover()
    losses = {row["name"]: row for row in json.loads(json.dumps(loss_table(registry)))}
    assert losses["sft"]["needs_reference"] is False and losses["sft"]["needs_reference_by_default"] is False
    assert losses["sft"]["settings"] == [] and losses["sft"]["data"] == "demonstrations"
    dpo = losses["dpo"]
    assert dpo["needs_reference"] == "depends on settings" and dpo["needs_reference_by_default"] is True
    assert dpo["settings"][0] == {
        "name": "beta",
        "type": "a number",
        "default": "0.1",
        "range": "> 0",
        "help": "strength of the pull towards the reference",
    }
    assert dpo["distribution"] == "alignzoo" and dpo["version"] == alignzoo.__version__ and not dpo["duplicate"]
    rows = {row["label"]: row for row in json.loads(json.dumps(plugin_table(registry)))}
    assert rows["builtin"]["state"] == "loaded" and {"sft", "dpo"} <= set(rows["builtin"]["losses"])
    assert (rows["bad"]["state"], rows["bad"]["version"]) == ("broken", "3.4") and "ValueError: no" in rows["bad"][
        "error"
    ]


# --- strangers' plugins as they stand ---------------------------------------------------------------------------------


def test_ipo2_as_a_file(install: Install) -> None:
    info = discover([IPO2]).get("ipo2")
    chosen = completion([[-1.0, -1.0]], [[-2.0, -3.0]])  # gains 1.5 nats per token
    rejected = completion([[-4.0]], [[-3.5]])  # loses half a nat
    output = info.cls(tau=0.25)(alignzoo.Pairs(chosen=chosen, rejected=rejected))
    assert output.loss.tolist() == [0.0]  # the margin is 2, the target 1 / (2 tau) = 2
    assert info.cls.Settings.__annotations__ == {"tau": float}  # compiled with no __future__ but its own
    with pytest.raises(PluginError, match="tau = 0"):
        info.cls(tau=0.0)


STRANGERS = """
import json
from pathlib import Path
import torch
import alignzoo
from alignzoo.plugins import discover

registry = discover()
one = torch.ones(1, 1)
def side(ratio): return alignzoo.LogProbs(policy=ratio * one, reference=0 * one, mask=one.bool())
pairs = alignzoo.Pairs(chosen=side(1.0), rejected=side(-1.0))
found = {}
for name in ("ipo2", "fdpo-js"):
    info = registry.get(name)
    found[name] = [info.distribution, info.version, info.label, info.cls()(pairs).loss.item()]
print(json.dumps(found))
"""


def test_strangers_are_found_by_their_metadata(tmp_path: Path) -> None:
    """In a fresh interpreter that knows PYTHONPATH alone; the example with its own pyproject's entry points."""
    shutil.copy(IPO2, tmp_path)
    distribution(tmp_path, "alignzoo-ipo2", "0.0.1", {"ipo2": "alignzoo_ipo2"})
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    (shipped,) = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    shutil.copy(EXAMPLE / shipped, tmp_path)
    meta = project["project"]
    distribution(tmp_path, meta["name"], meta["version"], meta["entry-points"]["alignzoo"])
    found = python(STRANGERS, tmp_path)
    assert found["ipo2"] == ["alignzoo-ipo2", "0.0.1", "ipo2", pytest.approx((2 - 5) ** 2)]
    # h = 0.1 (log sigmoid(1) - log sigmoid(-1)) = 0.1, and the loss log(1 + exp(-0.1))
    assert found["fdpo-js"] == ["alignzoo-example", "0.1.0", "fdpo-js", pytest.approx(0.644397, abs=1e-6)]
