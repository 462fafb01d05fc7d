"""`alignzoo conform`: which losses it takes, what it prints, how it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from alignzoo.cli import cli

TESTS = Path(__file__).parent
IPO2 = str(TESTS / "fixtures_plugins/alignzoo_ipo2.py")
FLIPPED = """
import alignzoo

class Flipped(alignzoo.Loss):
    name, data, needs_reference, Settings = "flipped", "pairs", False, alignzoo.NoSettings

    def __call__(self, batch):
        return alignzoo.LossOutput(batch.chosen.mean() - batch.rejected.mean())

@alignzoo.hookimpl
def alignzoo_losses():
    return [Flipped]
"""


def conform(*words: str) -> Result:
    return CliRunner().invoke(cli, ["conform", *words])


@pytest.fixture
def flipped(tmp_path: Path) -> str:
    path = tmp_path / "flipped.py"
    path.write_text(FLIPPED)
    return str(path)


def test_a_loss_that_conforms() -> None:
    done = conform("sft")
    assert done.exit_code == 0, done.output
    assert "conformance of sft" in done.output and "see below" not in done.output


def test_a_file_that_does_not(flipped: str) -> None:
    done = conform("--plugin", flipped)
    assert done.exit_code == 1
    words = " ".join(done.output.split())
    assert 'loss "flipped", direction: after a gradient step the margin of chosen over rejected' in words
    assert "smallest case: 1 row of up to 1 token" in words and "way out: turn the sign" in words


def test_several_losses_and_json(flipped: str) -> None:
    done = conform("sft", "flipped", "--plugin", flipped)
    assert done.exit_code == 1 and "not tested" in done.output and "direction" in done.output
    found = json.loads(conform("sft", "flipped", "--plugin", flipped, "--json").stdout)
    assert {(r["loss"], r["check"]) for r in found if r["state"] == "fails"} == {("flipped", "direction")}
    assert {r["loss"] for r in found} == {"sft", "flipped"}


def test_oracles_from_files(tmp_path: Path) -> None:
    reference = tmp_path / "mine.py"
    reference.write_text("def reference(batch, settings):\n    return [0.0] * len(batch.chosen.mask)\n")
    done = conform("ipo2", "--plugin", IPO2, "--reference", str(reference), "--json")
    failed = [r["check"] for r in json.loads(done.stdout) if r["state"] == "fails"]
    assert (done.exit_code, failed) == (1, ["reference function"])
    fixtures = str(TESTS / "fixtures_conformance/sft.json")
    states = {r["check"]: r["state"] for r in json.loads(conform("sft", "--fixtures", fixtures, "--json").stdout)}
    assert states["fixtures"] == "holds"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ddpo"], 'there is no loss "ddpo" (did you mean "dpo"?)'),
        ([], "conform: which losses?"),
        (["dpo", "--all"], "conform: which losses?"),
        (["sft", "dpo", "--fixtures", "x.json"], "are for one loss"),
        (["sft", "--fixtures", "x.json"], "the fixtures x.json cannot be read"),
        (["sft", "--reference", IPO2], "has no function reference(batch, settings)"),
        (["sft", "--reference", "x.py"], "the file x.py cannot be run: FileNotFoundError"),
        (["--plugin", "x.py"], "the plugin file"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    done = conform(*words)
    assert done.exit_code == 2 and message in done.output
