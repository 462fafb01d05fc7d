"""`alignzoo suggest`: the losses that fit a data set, by what they declare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from conftest import REPO
from test_lint import clean, labelled, write

from alignzoo.cli import cli
from alignzoo.data.kinds import CONVERSIONS
from alignzoo.plugins import discover, loss_table

PLUGIN = """
from dataclasses import dataclass
import alignzoo

@dataclass(frozen=True)
class _Settings:
    strength: float = alignzoo.setting(1.0, "how much", gt=0)

class Sampler(alignzoo.Loss):
    name = "sampler"
    data = "groups"
    Settings = _Settings
    needs_reference = property(lambda self: self.settings.strength > 2)
    paper = "Nobody 2026, arXiv:0000.00000"
    def __call__(self, batch):
        return alignzoo.LossOutput(-batch.rewards)

@alignzoo.hookimpl
def alignzoo_losses():
    return [Sampler]
"""


def suggest(rows: list[dict[str, Any]], path: Path, *words: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["suggest", write(path / "a.jsonl", rows), "--json", *words])
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def fits(found: dict[str, Any]) -> dict[str, tuple[str, int]]:
    return {fit["loss"]: (fit["fits"], fit["examples"]) for fit in found["losses"]}


def wanted(kind: str, examples: dict[str, int]) -> dict[str, tuple[str, int]]:
    """What the declarations of all losses and the table of conversions say."""
    says: dict[str, tuple[str, int]] = {}
    for row in loss_table(discover()):
        to = row["data"]
        word = "yes" if to == kind else "converted" if (kind, to) in CONVERSIONS else "online"
        says[row["name"]] = (word, examples.get(to, 300))
    if says["bradley_terry"][0] == "online":
        says["bradley_terry"] = ("no", 0)  # a reward model answers nothing
    return says


def why(found: dict[str, Any], loss: str) -> str:
    return " | ".join(next(fit["why"] for fit in found["losses"] if fit["loss"] == loss))


def test_pairs(tmp_path: Path) -> None:
    found = suggest(clean(300), tmp_path)
    assert fits(found) == wanted("pairs", {"pairs": 300, "labelled": 600, "demonstrations": 300})
    order = [fit["fits"] for fit in found["losses"]]
    assert order == sorted(order, key=["yes", "converted", "online", "no"].index)
    assert found["facts"]["prompts"] == 300 and found["remarks"] == []
    assert "log-probs of a reference" in why(found, "dpo") and "label_smoothing" in why(found, "dpo")
    assert "trains a reward model" in why(found, "bradley_terry") and "reward model" not in why(found, "dpo")
    assert "no reference" in why(found, "orpo") and "both labels have as many rows" in why(found, "kto")


def test_labels_and_their_balance(tmp_path: Path) -> None:
    found = suggest(labelled(300, 60), tmp_path)
    assert fits(found) == wanted("labelled", {"labelled": 300, "demonstrations": 60})
    assert "60 desirable and 240 undesirable rows: desirable_weight = 4 balances them" in why(found, "kto")
    assert "undesirable_weight = 4 " in why(suggest(labelled(300, 240), tmp_path), "kto")
    assert "balanced with weights of 1" in why(suggest(labelled(300, 170), tmp_path), "kto")
    only = suggest(labelled(250, 250), tmp_path)
    assert "all rows have the same label" in only["remarks"][0]
    none = suggest(labelled(250, 0), tmp_path)
    assert fits(none)["sft"][0] == "online"  # nothing is labelled true


def test_what_stands_out(tmp_path: Path) -> None:
    rows = labelled(50, 25)
    rows[40]["prompt"] = rows[3]["prompt"]
    rows[7]["completion"] = ""
    said = " | ".join(suggest(rows, tmp_path)["remarks"])
    for words in ("1 of 50 rows cannot be used", "49 rows are few", "1 prompt(s) have an answer labelled true"):
        assert words in said
    long = [{**row, "chosen": row["chosen"] * 3} for row in clean(300)]
    assert "the longer answer is chosen in 100%" in suggest(long, tmp_path)["remarks"][0]
    rated = [{"prompt": row["prompt"], "completion": row["chosen"], "Quality_Score": 3} for row in clean(300)]
    found = suggest(rated, tmp_path)
    assert fits(found) == wanted("demonstrations", {"demonstrations": 300})
    assert "may judge the answers: Quality_Score" in found["remarks"][0]


def test_one_prompt_is_too_few_where_answers_to_others_are_needed(tmp_path: Path) -> None:
    rows = [{**row, "prompt": "Why?"} for row in labelled(300, 150)]
    assert "but one prompt: a run refuses that" in why(suggest(rows, tmp_path), "kto")


def test_prompts_alone_can_be_answered_and_plugins_are_asked_too(tmp_path: Path) -> None:
    plugin = tmp_path / "sampler.py"
    plugin.write_text(PLUGIN)
    found = suggest([{"prompt": row["prompt"], "truth": 1} for row in clean(300)], tmp_path, "--plugin", str(plugin))
    answering = {name: fit for name, fit in fits(found).items() if name != "bradley_terry"}
    assert set(answering.values()) == {("online", 300)} and "sampler" in answering
    assert "the data holds prompts | it trains a reward model" in why(found, "bradley_terry")
    assert "groups are made of its answers" in why(found, "sampler")
    text = suggest([{"text": row["chosen"]} for row in clean(10)], tmp_path, "--plugin", str(plugin))
    assert fits(text)["sft"] == ("yes", 10)
    assert fits(text)["sampler"] == ("no", 0) and "the data holds demonstrations" in why(text, "sampler")


def test_what_the_terminal_shows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", clean(300))
    result = CliRunner().invoke(cli, ["suggest", path], env={"COLUMNS": "160"})
    for words in ("300 of 300 rows usable, format pairs", "arXiv:2305.18290", "converted", "docs/choosing.md",
                  "grpo, rrhf: online, with [rollout]"):  # fmt: skip
        assert words in result.output


def test_mistakes(tmp_path: Path) -> None:
    assert CliRunner().invoke(cli, ["suggest", "nowhere.jsonl"]).exit_code == 2
    (tmp_path / "a.jsonl").write_text("{broken\n")
    result = CliRunner().invoke(cli, ["suggest", str(tmp_path / "a.jsonl")])
    assert result.exit_code == 2 and "no row can be read" in result.output


def test_the_guide_speaks_of_every_loss() -> None:
    text = (REPO / "docs/choosing.md").read_text(encoding="utf-8")
    for row in loss_table(discover()):
        if row["distribution"] == "alignzoo":
            assert f"`{row['name']}`" in text or f"[{row['name']}](" in text, row["name"]
