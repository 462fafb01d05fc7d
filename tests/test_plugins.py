"""The plugin host: found by metadata, imported on need, the broken kept apart and named, names and blocking."""

from __future__ import annotations

import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugin_helpers import Install, distribution, installer, python, source_of, status

import alignzoo
from alignzoo.errors import PluginError
from alignzoo.plugins import BLOCK, discover, loss_table, plugin_table

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    yield from installer(tmp_path, monkeypatch)


# --- finding ----------------------------------------------------------------------------------------------------------


def test_nothing_here_imports_torch() -> None:
    """Neither the host, nor the built-in losses, nor the tables that `alignzoo losses` and `plugins` print."""
    code = """
    import json, sys
    def heavy(): return [m for m in ("torch", "transformers", "numpy") if m in sys.modules]
    seen = {}
    import alignzoo; seen["alignzoo"] = heavy()
    import alignzoo.plugins as p; seen["plugins"] = heavy()
    registry = p.discover()
    seen["discover"] = heavy() + [m for m in sys.modules if m.startswith(("alignzoo_losses", "alignzoo_rewards"))]
    rows = p.loss_table(registry) + p.reward_table(registry) + p.plugin_table(registry); seen["tables"] = heavy()
    seen["rows"] = len(rows)
    print(json.dumps(seen))
    """
    seen = python(textwrap.dedent(code))
    assert seen.pop("rows") >= 3
    assert seen == {"alignzoo": [], "plugins": [], "discover": [], "tables": []}


def test_discovery_imports_no_plugin(install: Install) -> None:
    install("lazy", source_of("lazy"))
    registry = discover()
    assert "zoo_lazy" not in sys.modules
    found = next(s for s in registry.statuses() if s.label == "lazy")
    assert (found.state, found.distribution, found.version, found.brings["losses"]) == (
        "found",
        "alignzoo-lazy",
        "1.0",
        (),
    )
    assert registry.get("lazy").cls.__module__ == "zoo_lazy"
    assert status(registry, "lazy").state == "loaded" and status(registry, "lazy").brings["losses"] == ("lazy",)


def test_the_built_in_losses_come_through_the_same_door(install: Install) -> None:
    info = discover().get("dpo")
    assert (info.distribution, info.version, info.label) == ("alignzoo", alignzoo.__version__, "builtin")
    assert info.origin == "alignzoo_losses"
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["project"]["entry-points"] == {
        "alignzoo": {
            "builtin": "alignzoo_losses",
            "builtin-callbacks": "alignzoo_callbacks",
            "builtin-formats": "alignzoo.data.formats",
            "builtin-rewards": "alignzoo_rewards",
        }
    }


def test_every_built_in_loss_documents_itself(install: Install) -> None:
    for info in discover().losses().values():
        assert info.cls.paper and info.cls.family
        text = sys.modules[info.cls.__module__].__doc__ or ""
        assert "arXiv:" in text + info.cls.paper and "Reduction:" in text


def test_a_damaged_distribution_stops_nobody(install: Install, tmp_path: Path) -> None:
    install("sound", source_of("sound"))
    distribution(tmp_path / "site", "alignzoo-damaged", "0.3", {"damaged": "zoo_damaged"})
    (tmp_path / "site" / "alignzoo_damaged-0.3.dist-info" / "entry_points.txt").write_text(
        "[alignzoo]\nno equals sign\n"
    )
    registry = discover()
    assert {"sound", "dpo"} <= set(registry.losses())
    damaged = next(s for s in registry.statuses() if s.distribution == "alignzoo-damaged")
    assert damaged.state == "broken" and damaged.version == "0.3" and "entry_points.txt" in damaged.error


# --- the broken -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "error", "line"),
    [
        (
            "import alignzoo\n\nimport no_such_module_at_all\n",
            "ModuleNotFoundError: No module named 'no_such_module",
            3,
        ),
        ("import alignzoo\nraise SystemExit('no GPU')\n", "SystemExit: no GPU", 2),
        ("import alignzoo\n\n\ndef f(:\n", "SyntaxError: ", 4),
        ("import alignzoo\nimport json\nx = json.loads('{')\n", "JSONDecodeError: ", 3),  # innermost line of its own
        ("import alignzoo\n@alignzoo.hookimpl\ndef alignzoo_losses():\n    return 1 / 0\n", "ZeroDivisionError: ", 4),
        (
            "import alignzoo\n@alignzoo.hookimpl\ndef alignzoo_losses():\n    [].pop()\n",
            "IndexError: pop from empty list",
            4,
        ),
    ],
)
def test_a_broken_plugin_is_named_and_stops_nobody(install: Install, source: str, error: str, line: int) -> None:
    file = install("bad", source, version="0.7.2")
    install("good", source_of("good"))
    registry = discover()
    assert {"good", "dpo", "sft"} <= set(registry.losses())
    found = status(registry, "bad")
    assert (found.state, found.distribution, found.version) == ("broken", "alignzoo-bad", "0.7.2")
    assert found.error.startswith(error) and found.error.endswith(f"({file}:{line})")
    assert "\n" not in found.error


def test_a_module_that_is_not_there(install: Install) -> None:
    install("gone", "").unlink()
    assert status(discover(), "gone").error == "ModuleNotFoundError: No module named 'zoo_gone'"


def test_a_package_is_located_by_its_innermost_own_line(install: Install, tmp_path: Path) -> None:
    package = tmp_path / "site" / "zoo_package"
    package.mkdir()
    (package / "__init__.py").write_text("from zoo_package import inner\n")
    (package / "inner.py").write_text("import fractions\n\nhalf = fractions.Fraction(1, 0)\n")
    distribution(tmp_path / "site", "alignzoo-package", "1.0", {"package": "zoo_package"})
    found = status(discover(), "package")
    assert found.error == f"ZeroDivisionError: Fraction(1, 0) ({package / 'inner.py'}:3)"


def test_an_interrupt_is_not_swallowed(install: Install) -> None:
    install("slow", "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        discover().losses()


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("def alignzoo_loses(): return [Mine]", 'unknown hook "alignzoo_loses" (did you mean "alignzoo_losses"?)'),
        ("def alingzoo_losses(): return []", 'did you mean "alignzoo_losses"?'),
        ("def alignzoo_losses(config): return []", "(config) has arguments that the hook has not: it takes no"),
        ("def alignzoo_losses(): [Mine]", "alignzoo_losses() returned None, not a list"),
        ("def alignzoo_losses(): return Mine", "alignzoo_losses() returned type, not a list"),
        ("def alignzoo_losses(): return [Mine()]", "is not a subclass of alignzoo.Loss"),
        ("def alignzoo_losses(): return [Mine, int]", "is not a subclass of alignzoo.Loss"),
        ("def alignzoo_losses(): return [Mine, type('M', (Mine,), dict(vars(Mine)))]", "two of its classes are named"),
        ("def unrelated(): pass", 'unknown hook "unrelated"'),
    ],
)
def test_hooks_are_compared_with_the_specs(install: Install, hook: str, message: str) -> None:
    source = source_of("hooked").split("@alignzoo.hookimpl")[0] + "@alignzoo.hookimpl\n" + hook + "\n"
    file = install("hooked", source)
    found = status(discover(), "hooked")
    assert found.state == "broken" and message in found.error
    if "hook " in message or "arguments" in message or "returned" in message:
        line = 1 + source.splitlines().index("@alignzoo.hookimpl")
        assert f"({file}:{line})" in found.error


def test_a_forgotten_mark_is_said(install: Install) -> None:
    install("unmarked", source_of("unmarked").replace("@alignzoo.hookimpl\n", ""))
    assert "marked with @alignzoo.hookimpl?" in status(discover(), "unmarked").error


def test_a_hook_of_another_project_is_none_of_ours(install: Install) -> None:
    body = "import pluggy\n@pluggy.HookimplMarker('pytest')\ndef alignzoo_loses(): pass\ndef alignzoo_helper(x): pass\n"
    install("friend", source_of("friend", body=body))
    assert status(discover(), "friend").state == "loaded"


def test_a_refused_class_makes_its_plugin_broken_with_the_line(install: Install) -> None:
    source = source_of("half").replace(', "pairs", False, alignzoo.NoSettings', "").replace(
        "name, data, needs_reference, Settings = ", "name = "
    )  # fmt: skip
    file = install("half", source)
    error = status(discover(), "half").error
    assert "does not declare data, Settings, needs_reference" in error
    line = 1 + source.splitlines().index("class Mine(alignzoo.Loss):")
    assert f"({file}:{line})" in error


# --- an unknown loss, duplicates, blocking ----------------------------------------------------------------------------


def test_an_unknown_loss_says_what_there_is(install: Install) -> None:
    with pytest.raises(PluginError) as caught:
        discover().get("dop")
    assert 'there is no loss "dop" (did you mean "dpo"?)' in caught.value.what
    assert "dpo" in caught.value.why and "sft" in caught.value.why and "broken" not in caught.value.why
    assert caught.value.fix and caught.value.exit_code == 2


def test_an_unknown_loss_lists_the_broken_likeliest_first(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("aardvark", "raise ValueError('first in the alphabet')\n", version="9.1")
    install("simpo", "raise ValueError('a near miss')\n")
    install("z", "raise ValueError('the one')\n", version="2.5", name="their-xpo-losses")
    install("shut", source_of("shut"))
    monkeypatch.setenv(BLOCK, "shut")
    with pytest.raises(PluginError) as caught:
        discover().get("xpo")
    why = caught.value.why
    assert why.index("the one") < why.index("a near miss") < why.index("first in the alphabet")
    assert '"z" (their-xpo-losses 2.5) is broken' in why and '"aardvark" (alignzoo-aardvark 9.1) is broken' in why
    assert f'"shut" (alignzoo-shut 1.0) is blocked by {BLOCK}' in why
    assert "alignzoo plugins" in caught.value.fix


def test_a_name_with_two_owners_is_refused_and_both_are_named(install: Install) -> None:
    install("one", source_of("twice"), version="1.1")
    install("two", source_of("twice"), version="2.2")
    registry = discover()
    assert "twice" not in registry.losses() and "dpo" in registry.losses()
    assert [info.label for info in registry.duplicates()["twice"]] == ["one", "two"]
    with pytest.raises(PluginError, match='2 losses are named "twice"') as caught:
        registry.get("twice")
    assert "alignzoo-one 1.1" in caught.value.why and "alignzoo-two 2.2" in caught.value.why
    assert f"{BLOCK}=one" in caught.value.fix and f"{BLOCK}=two" in caught.value.fix
    assert registry.get("dpo").label == "builtin"
    rows = [row for row in loss_table(registry) if row["name"] == "twice"]
    assert [(row["distribution"], row["duplicate"]) for row in rows] == [("alignzoo-one", True), ("alignzoo-two", True)]


def test_the_way_out_of_a_duplicate_works(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where both plugins chose the same label: then the distributions are named."""
    install("same", source_of("twice"), name="first-zoo")
    install("same", source_of("twice"), name="second-zoo")
    with pytest.raises(PluginError) as caught:
        discover().get("twice")
    assert f"{BLOCK}=first-zoo" in caught.value.fix
    monkeypatch.setenv(BLOCK, "first-zoo")
    assert discover().get("twice").distribution == "second-zoo"


def test_strangers_in_disorder_are_listed_and_harm_no_other(install: Install) -> None:
    """Two with one name, one that cannot be imported, one of a later contract."""
    install("one", source_of("twice"))
    install("two", source_of("twice"))
    install("lost", "import alignzoo_gone\n")
    install("later", source_of("later").replace("def __call__", "contract = 99\n\n    def __call__"))
    rows = {row["label"]: row for row in plugin_table(discover())}
    assert [rows[label]["state"] for label in ("one", "two", "lost", "later")] == [
        "loaded",
        "loaded",
        "broken",
        "broken",
    ]
    assert "alignzoo_gone" in rows["lost"]["error"] and "made for contract 99" in rows["later"]["error"]
    assert discover().get("dpo").label == "builtin"
    with pytest.raises(PluginError) as caught:
        discover().get("later")
    assert "made for contract 99 of alignzoo, and this alignzoo has contract 1" in str(caught.value)


def test_one_class_by_two_doors_is_no_duplicate(install: Install) -> None:
    install("mine", source_of("mine"))
    first = discover().get("mine")
    assert discover(losses=[first.cls]).get("mine").label == "mine"


@pytest.mark.parametrize("text", ["alpha,beta", "alpha beta", " alpha ,\n alignzoo-beta ", "Alignzoo_Alpha, beta"])
def test_blocking_by_label_or_distribution(install: Install, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    install("alpha", source_of("alpha"))
    install("beta", "raise AssertionError('a blocked plugin was imported')\n")
    install("gamma", source_of("gamma"))
    monkeypatch.setenv(BLOCK, text)
    registry = discover()
    assert "gamma" in registry.losses() and "alpha" not in registry.losses()
    assert [status(registry, label).state for label in ("alpha", "beta", "gamma")] == ["blocked", "blocked", "loaded"]
    assert "zoo_beta" not in sys.modules and registry.warnings == ()
    with pytest.raises(PluginError, match=f"is blocked by {BLOCK}"):
        registry.get("alpha")


def test_built_in_losses_can_be_blocked(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BLOCK, "builtin")
    assert discover().losses() == {}
    with pytest.raises(PluginError, match="the losses are none at all"):
        discover().get("dpo")


def test_an_unknown_name_among_the_blocked_is_said(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BLOCK, "bultin")
    (line,) = discover().warnings
    assert BLOCK in line and '"bultin" (did you mean "builtin"?)' in line
