"""benchmarks/step.py: its data, its operations, what makes a case void, its page; and one tiny case."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPO, make_trees, tiny_llama

from alignzoo.batch import PADDED, TREES, Way

WISH = {"device": "cpu", "warmup": 0, "steps": 1, "factor": 1, "rounds": 1, "small": True}


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    yield


# --- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("completions", [1, 2, 5])
def test_packed_positions_and_pairs_are_those_of_the_layout(completions: int) -> None:
    """Counted one query at a time, from the nodes of the engine's own layout."""
    from step_flops import packed_pass

    trees = make_trees(5, completions=completions)
    for way, shared in ((TREES, True), (Way(packed=True), False)):
        layout, found = way.layout(trees), packed_pass(trees, "completions", shared=shared)
        assert layout.nodes is not None
        lengths = layout.nodes[:, 0]
        pairs = sum(
            (lengths[before] if before >= 0 else 0) + seen
            for length, before in layout.nodes.tolist()
            for seen in range(1, length + 1)
        )
        assert (found.positions, found.pairs, found.scored) == (layout.positions, pairs, len(layout.target))


def test_padded_positions_and_pairs_are_those_of_the_layout() -> None:
    from step_flops import padded_pass

    trees = make_trees(5)
    layout = PADDED.layout(trees)
    rows, length = layout.input_ids.shape
    found, everywhere = (padded_pass([trees], "completions", all_scored=every) for every in (False, True))
    assert (found.positions, found.scored) == (layout.positions, len(layout.target))
    assert found.pairs == rows * sum(range(1, length + 1)) and everywhere.scored == rows * (length - 1)


def test_operations_of_a_model_are_those_that_torch_counts() -> None:
    """Of a forward pass with eager attention, which also computes the pairs that are masked."""
    import torch
    from step_flops import Pass, size_of
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_llama(attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(3, 23)[None])
    assert counter.get_total_flops() == Pass(20, 20 * 20, 20).flops(size_of(model))


@pytest.mark.parametrize("kto", [False, True])
def test_a_step_is_three_forward_passes_and_those_without_gradients(kto: bool) -> None:
    import dataclasses

    from step_flops import Size, packed_pass, padded_pass, step_flops

    trees = [dataclasses.replace(t, mismatched=t.completions[0]) for t in make_trees(4, completions=1)]
    size = Size(1000, 10, 100)
    found = {r: step_flops(trees, size, kto=kto, reference=r, per_device=2, budget=50) for r in (False, True)}
    graded = packed_pass(trees, "completions", shared=True).flops(size)
    both = packed_pass(trees, "branches", shared=True).flops(size)
    assert found[False]["trees"] == 3 * graded + (both if kto else 0)
    assert found[True]["trees"] == 3 * graded + (2 * both if kto else graded)
    theirs, other = (
        sum(padded_pass([trees[i : i + 2]], which, all_scored=True).flops(size) for i in (0, 2))
        for which in ("completions", "mismatched")
    )
    assert found[True]["trl"] == 4 * theirs + (2 * other if kto else 0)
    assert found[True]["trl"] > found[True]["trl_head"]


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dpo", "sft", "kto", "grpo"])
def test_both_sides_get_the_same_ids(loss: str, tokenizer: Any) -> None:
    from step_data import make_plan, read_trees, trl_rows

    trees = read_trees("tiny", tokenizer, 7)
    again = read_trees("tiny", tokenizer, 7)
    assert all(np.array_equal(a.prompt, b.prompt) for a, b in zip(trees, again, strict=True))
    plan = make_plan(loss, trees, 4, 2, seed=7)
    for tree, row in zip(plan.steps[1], trl_rows(loss, plan.steps[1]), strict=True):
        prompt, own = tree.prompt.tolist(), [c.ids.tolist() for c in tree.completions]
        if loss == "dpo":
            assert row == {"prompt_ids": prompt, "chosen_ids": own[0], "rejected_ids": own[1]}
        elif loss == "sft":
            assert row["input_ids"] == prompt + own[0] and row["labels"] == [-100] * len(prompt) + own[0]
        elif loss == "kto":
            assert (row["prompt_ids"], row["completion_ids"]) == (prompt, own[0])
            assert tree.mismatched is not None and row["KL_completion_ids"] == tree.mismatched.ids.tolist()
        else:
            assert row == {"prompt": str(tree.row)} and len(tree.rewards or ()) == 2


def test_too_few_rows_are_told(tokenizer: Any) -> None:
    from step_data import make_plan, read_trees

    with pytest.raises(ValueError, match="8 rows are too few for 3 steps of 4"):
        make_plan("dpo", read_trees("tiny", tokenizer, 7), 4, 3, seed=7)


# --- void ------------------------------------------------------------------------------------------------------------


def a_record(side: str, losses: list[float], **more: Any) -> dict[str, Any]:
    spec = {"side": side, "reference": "live", "layout": "trees", "defaults": False, "compile": False, "set": {}}
    return {"spec": spec, "lines": [{"loss": loss} for loss in losses], "forwarded": None, "all_tokens": 9, **more}


@pytest.mark.parametrize(
    ("loss", "theirs", "void"),
    [
        ("dpo", [0.6931, 0.61], False), ("dpo", [0.6931, 0.6103], True), ("dpo", [0.69, 0.61], True),
        ("kto", [0.6931, 0.7], False), ("kto", [0.7, 0.61], True), ("dpo", [0.6931, math.nan], True),
    ],
)  # fmt: skip
def test_a_case_with_other_losses_is_void(loss: str, theirs: list[float], void: bool) -> None:
    from step_cases import Case, why_void

    case = Case("compared", loss, "std", "fp32", ())
    assert bool(why_void(case, [a_record("ours", [0.6931, 0.61]), a_record("trl", theirs)])) is void


@pytest.mark.parametrize(
    ("precision", "name", "theirs", "void"),
    [
        ("fp32", "logps/chosen", -300.02, False), ("fp32", "logps/chosen", -300.04, True),
        ("fp32", "grad_norm", 30.05, False), ("fp32", "grad_norm", 30.07, True), ("bf16", "grad_norm", 31.0, False),
        ("bf16", "logps/chosen", -299.0, False), ("bf16", "logps/chosen", -297.0, True),
    ],
)  # fmt: skip
def test_log_probs_and_gradients_are_compared_too(precision: str, name: str, theirs: float, void: bool) -> None:
    from step_cases import Case, why_void

    records = [a_record(side, [0.69]) for side in ("ours", "trl")]
    for record, value in zip(records, (-300.0 if "logps" in name else 30.0, theirs), strict=True):
        record["lines"][0][name] = value
    assert bool(why_void(Case("compared", "dpo", "std", precision, ()), records)) is void


def test_a_case_with_other_tokens_is_void() -> None:
    from step_cases import Case, why_void

    case, mine = Case("compared", "dpo", "std", "fp32", ()), a_record("ours", [0.6931])
    assert why_void(case, [mine, a_record("trl", [0.6931], forwarded={"tokens": 9})]) == ""
    assert "8 tokens of 9" in why_void(case, [mine, a_record("trl", [0.6931], forwarded={"tokens": 8})])


def test_the_odds_terms_are_compared_for_orpo() -> None:
    from step_cases import Case, why_void

    case = Case("compared", "orpo", "std", "fp32", ())
    mine, theirs = a_record("ours", [2.5]), a_record("trl", [3.0])
    mine["lines"][0]["nll_loss"], theirs["lines"][0]["nll_loss"] = 2.0, 2.5
    assert why_void(case, [mine, theirs]) == ""
    theirs["lines"][0]["nll_loss"] = 2.4
    assert "odds term" in why_void(case, [mine, theirs])


# --- a case and its page ---------------------------------------------------------------------------------------------


def test_a_tiny_case_is_measured_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    import step
    import step_report
    from step_cases import Case, Wish, spec
    from step_measure import hardware, model_folder, versions

    wish = Wish(**WISH)
    specs = tuple(spec(wish, side, "dpo", "tiny", "fp32") for side in ("ours", "trl"))
    case = Case("compared", "dpo", "tiny", "fp32", specs)
    machine = {"folder": str(model_folder("random:tiny", tmp_path)), "model": "random:tiny", "hardware": hardware(),
               "versions": versions()}  # fmt: skip
    file = tmp_path / "performance.json"
    results = step.Results(file)
    options = argparse.Namespace(again=False, work=tmp_path, timeout=300)
    assert step.run_case(case, machine, results, options), capsys.readouterr().out
    ours, theirs = json.loads(file.read_text())["records"]
    assert (ours["void"], theirs["void"]) == ("", "")
    assert ours["lines"][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert ours["lines"][0]["grad_norm"] == pytest.approx(theirs["lines"][0]["grad_norm"], rel=1e-4)
    assert theirs["forwarded"]["tokens"] == ours["all_tokens"] == sum(ours["tokens"])
    for one in (ours, theirs):
        assert len(one["seconds"]) == 1 and 0 < one["head_seconds"][0] < one["seconds"][0]
        assert one["memory"]["peak"] > one["memory"]["loaded"] > 100
    assert 0 < ours["reference_seconds"][0] < ours["seconds"][0]

    capsys.readouterr()
    assert step.run_case(case, machine, step.Results(file), options) and capsys.readouterr().out == ""  # all there
    page = tmp_path / "performance.md"
    page.write_text("before\n<!-- measured -->\nold\n<!-- end measured -->\nafter\n", encoding="utf-8")
    step_report.write(file)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    ratio = theirs["seconds"][0] / ours["seconds"][0]
    bound = ours["flops"]["trl"] / ours["flops"]["trees"]
    assert f"| dpo | tiny, 4 pairs | fp32 | live against live | {ratio:.2f} | {bound:.2f} |" in text


def test_a_measurement_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import step
    from step_cases import Case, Wish, spec

    wish = Wish(**WISH)
    specs = tuple(spec(wish, "ours", "dpo", f"tokens-{n}", "fp32") for n in (1, 2))
    flops = dict.fromkeys(("trl", "trl_head", "padded", "packed", "trees"), 1.0)

    def found(request: dict[str, Any], *_: Any) -> dict[str, Any]:
        if request["spec"]["data"] == "tokens-1":
            raise step.Failed("no memory left")
        return {**measured("trees", "ours", 2.0, 1.0, flops), "spec": request["spec"]}

    monkeypatch.setattr(step, "child", found)
    file = tmp_path / "performance.json"
    options = argparse.Namespace(again=False, work=tmp_path, timeout=1)
    machine = {"folder": "m", "model": "m", "hardware": "a CPU", "versions": {"torch": "2"}}
    assert not step.run_case(Case("growth", "dpo", "tokens", "fp32", specs), machine, step.Results(file), options)
    said = capsys.readouterr().out
    assert "tokens-1 fp32" in said and "FAILED: no memory left" in said and "2.00 s a step" in said
    (kept,) = json.loads(file.read_text())["records"]
    assert (kept["spec"]["data"], kept["void"]) == ("tokens-2", "")


def measured(layout: str, side: str, seconds: float, head: float, flops: dict[str, float]) -> dict[str, Any]:
    from step_cases import Wish, spec

    one = spec(Wish(**WISH), side, "dpo", "std", "fp32", layout=layout)
    return {
        "spec": one, "seconds": [seconds], "head_seconds": [head], "reference_seconds": None, "tokens": [1000],
        "flops": flops, "peak_flops": [1e9, 1e9], "memory": {"loaded": 100.0, "peak": 150.0}, "void": "",
        "hardware": "a CPU", "model": "m", "versions": {"torch": "2"}, "date": "2026-01-01",
    }  # fmt: skip


def test_the_parts_of_a_ratio_multiply_to_it(tmp_path: Path) -> None:
    from step_report import Row, report, split_of

    flops = {"trl": 8e8, "trl_head": 6e8, "padded": 5e8, "packed": 4e8, "trees": 2e8}
    records = [
        measured("trees", "trl", 12.0, 3.0, flops), measured("padded", "ours", 8.0, 1.0, flops),
        measured("packed", "ours", 5.0, 1.0, flops), measured("trees", "ours", 4.0, 1.0, flops),
    ]  # fmt: skip
    parts = split_of(*(Row((record,)) for record in records))
    assert {name: found for name, found, _ in parts} == {
        "head": 12 / 10, "padding": 8 / 5, "sharing": 5 / 4, "the rest": 10 / 8
    }  # fmt: skip
    assert math.prod(found for _, found, _ in parts if found) == pytest.approx(12 / 4)
    assert math.prod(bound for *_, bound in parts) == pytest.approx(8 / 2)
    text = "\n".join(report({"records": records, "startup": []}, tmp_path / "plots"))
    assert "| 1.20 (1.33) | 1.60 (1.25) | 1.25 (2.00) | 1.25 (1.20) | 3.00 |" in text
    void = copy.deepcopy(records)
    void[0]["void"] = "other losses"
    text = "\n".join(report({"records": void, "startup": []}, tmp_path / "plots"))
    assert "live against live" not in text and "other losses" in text


def test_the_page_is_current(tmp_path: Path) -> None:
    from step_report import report

    file, text = REPO / "docs/performance.json", (REPO / "docs/performance.md").read_text(encoding="utf-8")
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"records": [], "startup": []}
    lines = "\n".join(report(content, tmp_path / "performance"))
    assert text.split("<!-- measured -->\n")[1].split("<!-- end measured -->")[0].strip() == lines.strip()
