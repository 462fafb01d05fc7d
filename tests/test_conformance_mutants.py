"""benchmarks/mutants.py: what it changes, what it counts as killed, and what its records say of the built-ins."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from conformance_oracles import ORACLES

REPO = Path(__file__).resolve().parents[1]
SOURCE = '''
class Some(Loss):
    needs_reference = True

    def __call__(self, batch):
        """Doc - string."""
        assert batch.chosen is not None
        margin = self.settings.beta * batch.chosen.log_ratio("sum").detach()
        return LossOutput(-margin if bool(margin) else margin, metrics={})
'''


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import mutants

    return mutants


def test_one_thing_is_changed_at_a_time(mutants: object) -> None:
    found = [(m.what.split(", in: ")[0], ast.unparse(m.tree)) for m in mutants.mutants(SOURCE)]  # type: ignore[attr-defined]
    changes = [change for change, _ in found]
    for wanted in (
        "True -> False",
        "batch.chosen -> batch.rejected",
        "'sum' -> 'mean'",
        "self.settings.beta -> self.settings.__class__().beta",
        "-margin -> margin",
        "batch.chosen.log_ratio('sum').detach() -> batch.chosen.log_ratio('sum')",
        "-margin if bool(margin) else margin -> margin if bool(margin) else -margin",
    ):
        assert wanted in changes, changes
    assert len({text for _, text in found}) == len(found) and ast.unparse(ast.parse(SOURCE)) not in dict(found).values()
    assert all("assert batch.chosen is not None" in text and "Doc - string" in text for _, text in found)


def test_a_killed_and_a_surviving_mutant(mutants: object) -> None:
    source = (REPO / "plugins/alignzoo_losses/sft.py").read_text()
    same = mutants.Mutant("nothing", ast.parse(source))  # type: ignore[attr-defined]
    turned = mutants.Mutant("sign", ast.parse(source.replace("(-batch", "(batch")))  # type: ignore[attr-defined]
    assert mutants.killer(same, "sft", ORACLES["sft"]) == ""  # type: ignore[attr-defined]
    assert mutants.killer(turned, "sft", None) == "direction"  # type: ignore[attr-defined]


def test_nineteen_of_twenty_are_killed() -> None:
    """Of every loss that has a record; the equivalent ones that it names are still those of the script."""
    records = json.loads((REPO / "docs/mutants.json").read_text())
    equivalent = json.loads((REPO / "benchmarks/equivalent_mutants.json").read_text())
    assert records
    for name, record in records.items():
        killed, whole = record["conform"] + record["oracle"], record["mutants"] - len(record["equivalent"])
        assert killed >= 0.95 * whole and killed + len(record["survivors"]) == whole, name
        assert record["equivalent"].items() <= equivalent.get(name, {}).items()
