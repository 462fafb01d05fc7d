"""What a loss class must declare, and what becomes of its settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import pytest

import alignzoo
from alignzoo import schema
from alignzoo.declared import check_loss_class
from alignzoo.errors import PluginError
from alignzoo.plugins import discover, loss_table, make_loss


@dataclass(frozen=True)
class Good:
    beta: float = alignzoo.setting(0.1, "a number", gt=0)
    many: tuple[int, ...] = alignzoo.setting((1,), "numbers")
    kind: Literal["a", "b"] = alignzoo.setting("a", "a choice")
    maybe: str | None = alignzoo.setting(None, "a string or nothing")
    must: float = alignzoo.setting(1, "a whole number is a number")


def loss_class(**changes: Any) -> type[alignzoo.Loss]:
    """A class that is in order but for the changes; None leaves an attribute out."""
    body: dict[str, Any] = {"name": "made", "data": "pairs", "needs_reference": True, "Settings": Good}
    body["__call__"] = lambda self, batch: None
    body.update(changes)
    return type("Made", (alignzoo.Loss,), {k: v for k, v in body.items() if v is not None})


def fault(cls: Any) -> str:
    with pytest.raises(PluginError) as caught:
        check_loss_class(cls)
    return str(caught.value)


def test_a_class_in_order_passes() -> None:
    check_loss_class(loss_class())
    check_loss_class(loss_class(needs_reference=property(lambda self: True), token_stats={"entropy"}, contract=1))
    check_loss_class(loss_class(Settings=alignzoo.NoSettings, needs_mismatched=True, prepare_pass=False))
    by_settings = property(lambda self: self.settings.beta > 0.5)
    made = loss_class(needs_mismatched=by_settings, prepare_pass=by_settings)
    check_loss_class(made)
    assert [made(beta=beta).needs_mismatched for beta in (0.1, 0.9)] == [False, True]


@pytest.mark.parametrize("missing", ["name", "data", "Settings", "needs_reference"])
def test_each_declaration_is_demanded(missing: str) -> None:
    assert f"does not declare {missing} in the class itself" in fault(loss_class(**{missing: None}))


def test_everything_missing_is_named_at_once_and_nothing_is_inherited() -> None:
    parent = loss_class()
    child = type("Child", (parent,), {"paper": 3})
    text = fault(child)
    assert "loss class Child" in text and "does not declare name, data, Settings, needs_reference" in text
    assert "paper = 3 (wanted: a string)" in text
    bare = type("Bare", (alignzoo.Loss,), {"name": "bare"})
    assert 'loss "bare"' in fault(bare) and "data, Settings, needs_reference" in fault(bare)
    assert "has no __call__" in fault(bare)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "My Loss"}, 'name = "My Loss" (wanted: lower-case letters, digits, - and _)'),
        ({"name": "-x"}, "name = "),
        ({"name": ""}, "name = "),
        ({"name": 3}, "name = 3"),
        ({"data": "pair"}, 'data = "pair" (wanted: one of "demonstrations", "pairs", "labelled", "groups")'),
        ({"data": ["pairs"]}, "data = "),
        ({"needs_reference": "auto"}, 'needs_reference = "auto" (wanted: True, False, or a property)'),
        ({"needs_reference": 1}, "needs_reference = 1"),
        ({"needs_reference": lambda self: True}, "needs_reference = "),
        ({"contract": 0}, "contract = 0 (wanted: a whole number from 1)"),
        ({"contract": "1"}, 'contract = "1"'),
        ({"contract": True}, "contract = true"),
        ({"token_stats": {"entropy", "kurtosis"}}, "(wanted: a set out of entropy, is_top1, log_sum_sq_probs)"),
        ({"token_stats": "entropy"}, 'token_stats = "entropy"'),
        ({"token_stats": ["entropy"]}, "token_stats = "),
        ({"needs_mismatched": 1}, "needs_mismatched = 1 (wanted: True, False, or a property)"),
        ({"prepare_pass": "no"}, 'prepare_pass = "no"'),
        ({"invariances": "shift"}, "invariances = "),
        ({"family": 7}, "family = 7"),
        ({"__call__": None}, "has no __call__"),
        ({"Settings": dict}, "Settings is not a frozen dataclass"),
        ({"Settings": Good()}, "Settings is not a frozen dataclass"),
        ({"Settings": dataclass(type("Thawed", (), {}))}, "Settings is not a frozen dataclass"),
        ({"Settings": type("Undecorated", (Good,), {})}, "Settings is not a frozen dataclass"),
    ],
)  # fmt: skip
def test_wrong_declarations_are_refused(changes: dict[str, Any], message: str) -> None:
    assert message in fault(loss_class(**changes))


def settings_with(**fields: tuple[Any, Any]) -> type[Any]:
    body: dict[str, Any] = {name: default for name, (_, default) in fields.items()}
    body["__annotations__"] = {name: annotation for name, (annotation, _) in fields.items()}
    return dataclass(frozen=True)(type("Settings", (), body))


@pytest.mark.parametrize(
    ("annotation", "default", "message"),
    [
        (float, 0.1, "setting it: is not made with alignzoo.setting(...)"),
        (float, alignzoo.setting(-1.0, "a number", gt=0), "setting it: its default breaks its own rules: it = -1.0"),
        (int, alignzoo.setting(1.5, "a number"), "its default breaks its own rules: it = 1.5"),
        (float, alignzoo.setting(float("nan"), "a number"), "is not a finite number"),
        (list[float], alignzoo.setting(None, "numbers"), "the type list[float] cannot be read from a recipe"),
        (set, alignzoo.setting(None, "numbers"), "the type set cannot be read from a recipe"),
        (tuple, alignzoo.setting((), "numbers"), "the type tuple cannot be read"),
        (float | complex, alignzoo.setting(1.0, "numbers"), "cannot be read from a recipe"),
        ("Nowhere", alignzoo.setting(1.0, "a number"), "cannot be resolved: NameError: name 'Nowhere'"),
    ],
)
def test_settings_that_a_recipe_cannot_give_are_refused(annotation: Any, default: Any, message: str) -> None:
    assert message in fault(loss_class(Settings=settings_with(it=(annotation, default))))


@pytest.mark.parametrize("name", ["name", "weight"])
def test_two_names_of_settings_are_reserved(name: str) -> None:
    settings = settings_with(**{name: (float, alignzoo.setting(1.0, "a number"))})
    assert f"setting {name}: the names name and weight are kept for [loss]" in fault(loss_class(Settings=settings))


def test_settings_without_a_default_and_nested_ones_are_in_order() -> None:
    must = settings_with(tau=(float, alignzoo.setting(dataclasses.MISSING, "must be given", gt=0)))
    check_loss_class(loss_class(Settings=must))
    check_loss_class(loss_class(Settings=settings_with(inner=(must | None, alignzoo.setting(None, "a table")))))


def test_a_later_contract_asks_for_an_upgrade() -> None:
    """And for nothing else: what the later contract calls its declarations is not known here."""
    with pytest.raises(PluginError) as caught:
        check_loss_class(loss_class(contract=2, data="conversations"))
    assert 'loss "made" is made for contract 2 of alignzoo, and this alignzoo has contract 1' in caught.value.what
    assert "pip install -U alignzoo" in caught.value.fix and "data" not in str(caught.value)


def test_an_earlier_contract_asks_for_another_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignzoo.declared.CONTRACT", 2)
    with pytest.raises(
        PluginError, match="is made for contract 1 of alignzoo, and this alignzoo has contract 2"
    ) as caught:
        check_loss_class(loss_class())
    assert "upgrade the plugin" in caught.value.fix
    check_loss_class(loss_class(contract=2))
    assert "a whole number from 1" in fault(loss_class(contract=0))


def test_settings_that_refuse_each_other_are_a_problem() -> None:
    @dataclass(frozen=True)
    class Both:
        low: float = alignzoo.setting(0.0, "lower end")
        high: float = alignzoo.setting(1.0, "upper end")

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError("low is above high")

    info = discover(losses=[loss_class(Settings=Both)]).get("made")
    problems: list[schema.Problem] = []
    assert make_loss(info, {"low": 2.0}, problems, ("loss", 0)) is None
    assert [(p.key, p.message) for p in problems] == [("loss.0", 'loss "made": low is above high')]


def test_a_reference_that_hangs_on_a_setting_without_default_is_open() -> None:
    must = settings_with(tau=(float, alignzoo.setting(dataclasses.MISSING, "must be given")))
    made = loss_class(Settings=must, needs_reference=property(lambda self: self.settings.tau > 0))
    row = next(row for row in loss_table(discover(losses=[made])) if row["name"] == "made")
    assert (row["needs_reference"], row["needs_reference_by_default"]) == ("depends on settings", None)
    assert row["settings"][0]["default"] == "required"
