"""The conformance kit: wrong losses are caught by the check meant for them, right ones and the built-ins pass all."""

from __future__ import annotations

import dataclasses
import json
import time
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from alignzoo_losses.dpo import DPO
from alignzoo_losses.kto import KTO
from conformance_losses import RIGHT, WRONG, Clipped, Kind, loss_class, margin
from conformance_oracles import ORACLES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import dpo_reference

import alignzoo
from alignzoo import schema
from alignzoo.api import INVARIANCES, KINDS, LogProbs
from alignzoo.objective import check_output, log_probs_of
from alignzoo.plugins import discover
from alignzoo.testing import CHECKS, conformance, examine, make_batch
from alignzoo.testing import choices as chosen_values
from alignzoo.testing.changes import _CHANGES
from alignzoo.testing.rows import ABOUT, DRAWS, QUANTUM, Case, draw
from alignzoo.testing.step import How, compare, run
from alignzoo.testing.suite import Result, subject_of, verdict_of

FIXTURES = Path(__file__).parent / "fixtures_conformance"
BUILT_IN = {name: info.cls for name, info in discover().losses().items() if info.distribution == "alignzoo"}


@cache
def results(cls: Any) -> list[Result]:
    return examine(cls)


def failures(found: list[Result]) -> list[str]:
    return [result.message() for result in found if result.verdict.state == "fails"]


# --- wrong losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("check", "cls"), WRONG.values(), ids=WRONG)
def test_a_wrong_loss_is_caught(check: str, cls: Any) -> None:
    verdict = verdict_of(CHECKS[check], subject_of(cls))
    assert verdict.state == "fails" and verdict.what
    assert verdict.case or check in ("reference", "settings", "requests", "bounds")


def test_every_check_has_a_wrong_loss() -> None:
    assert {check for check, _ in WRONG.values()} == CHECKS.keys() - {"reference function", "fixtures"}


def test_the_smallest_case_is_small() -> None:
    """Two rows to see a mean over the micro-batch, one token each; of two settings the one at fault is left."""
    verdict = verdict_of(CHECKS["micro-batches"], subject_of(WRONG["mean over the micro-batch"][1]))
    assert verdict.case == '2 rows of up to 1 token, draw="plain", seed=0, settings: the defaults'
    assert len(verdict.rows) == 4 and "completion 1: policy [-2.559], reference [-1.201]" in verdict.rows[1]

    def broken(self: Any, batch: Any) -> alignzoo.LossOutput:
        loss = (1 - self.settings.beta * margin(batch)).relu()
        return alignzoo.LossOutput(loss / len(loss) if self.settings.kind == "robust" else loss + self.settings.gamma)

    verdict = verdict_of(CHECKS["micro-batches"], subject_of(loss_class("two", broken, Settings=Kind)))
    assert verdict.case.startswith("2 rows of up to 1 token") and verdict.case.endswith("settings: kind='robust'")


def test_a_failure_can_be_had_in_python() -> None:
    """The rows that it prints are those of make_batch."""
    verdict = verdict_of(CHECKS["finite"], subject_of(WRONG["log(1 - exp)"][1]))
    assert verdict.case.startswith('1 row of up to 1 token, draw="zero", seed=0')
    batch = make_batch(WRONG["log(1 - exp)"][1](), rows=1, tokens=1, draw_as="zero", seed=0)
    assert not torch.isfinite(WRONG["log(1 - exp)"][1]()(batch).loss).any()


def test_a_loss_that_does_not_run_fails_once() -> None:
    def crash(self: Any, batch: Any) -> Any:
        raise ZeroDivisionError("on purpose")

    found = examine(loss_class("crash", crash))
    assert [r.check.name for r in found if r.verdict.state == "fails"] == ["contract"]
    assert f"raised ZeroDivisionError: on purpose ({__file__}:" in found[0].verdict.what


def test_a_setting_that_is_not_read_is_named_with_what_was_tried() -> None:
    def two(self: Any, batch: Any) -> Any:
        return alignzoo.LossOutput(-self.settings.beta * margin(batch) + (self.settings.kind == "down"))

    verdict = verdict_of(CHECKS["settings"], subject_of(loss_class("two", two, Settings=Kind)))
    assert "of gamma, flip (tried gamma: 0.0" in verdict.what and "flip: 0.1" in verdict.what


# --- right losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", RIGHT.values(), ids=RIGHT)
def test_no_false_alarm(cls: Any) -> None:
    assert failures(results(cls)) == []


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_ins_conform(name: str) -> None:
    """The oracle and the settings for all variants; the rest quickly, for three: `alignzoo conform --all` has all."""
    fixtures = FIXTURES / f"{name}.json"
    subject = subject_of(BUILT_IN[name], reference=ORACLES[name], fixtures=fixtures if fixtures.exists() else None)
    thorough = {"settings", "reference function", "fixtures"}
    assert [verdict_of(CHECKS[c], subject) for c in thorough if verdict_of(CHECKS[c], subject).state == "fails"] == []
    vars(subject)["variants"] = subject.variants[:3]
    found = [Result(name, check, verdict_of(check, subject)) for check in CHECKS.values() if check.name not in thorough]
    assert failures(found) == []


@pytest.mark.slow
def test_all_conform_in_two_minutes() -> None:
    started = time.process_time()
    for cls in BUILT_IN.values():
        assert failures(examine(cls)) == []
    assert time.process_time() - started < 120


def test_what_was_tested_of_a_loss_with_everything() -> None:
    found = {result.check.name: result.verdict for result in results(RIGHT["clipped"])}
    assert found["invariances"].what == "prompt_length, reward_shift"
    assert found["settings"].what == "epsilon, beta, scale, mask_truncated, max_length"
    assert {name for name, v in found.items() if v.state == "not tested"} == {
        "requests",
        "reference function",
        "fixtures",
    }


# --- oracles ---------------------------------------------------------------------------------------------------------


def verdicts(check: str, cls: Any, **options: Any) -> Any:
    return verdict_of(CHECKS[check], subject_of(cls, **options))


def test_the_reference_function() -> None:
    assert verdicts("reference function", DPO, reference=dpo_reference).state == "holds"

    def of_defaults(batch: Any) -> list[float]:
        return dpo_reference(batch, DPO().settings)

    assert verdicts("reference function", DPO, reference=of_defaults).state == "holds"
    doubled = verdicts("reference function", DPO, reference=lambda b, s: [2 * v for v in dpo_reference(b, s)])
    assert doubled.state == "fails" and doubled.case.startswith("1 row of up to 1 token")
    assert doubled.what == "unit 0 is 0.64202049 and the reference gives 1.28404098"
    assert (
        "it has 1 units and the reference gives 0" in verdicts("reference function", DPO, reference=lambda b: []).what
    )


def test_fixtures(tmp_path: Path) -> None:
    assert verdicts("fixtures", DPO, fixtures=FIXTURES / "dpo.json").what == "5 cases"
    cases = json.loads((FIXTURES / "dpo.json").read_text())
    path = tmp_path / "mine.json"
    for change, message in (
        ({"values": [1.0, 2.0]}, "values of unit 0 is "),
        ({"values": [1.0]}, "it has 2 units and the fixture 1 values"),
        ({"metrics": {"rewards/chosen": 7}}, "metric rewards/chosen is 0.0625 and the fixture has 7"),
        ({"loss": 7}, "the loss is "),
        ({"gradient": [0.0]}, "it has 9 tokens and the fixture 1 gradient"),
        ({"gradient": [0.0] * 9}, "gradient of token 0 is -0.0"),
        ({"settings": {"beta": -1.0}}, "it refuses the settings"),
    ):
        path.write_text(json.dumps([{**cases[0], **change}]))
        verdict = verdicts("fixtures", DPO, fixtures=path)
        assert verdict.state == "fails" and message in verdict.what and verdict.case == f"{path}, case 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "are not a list of cases"),
        ('[{"rows": [1], "value": []}]', 'unknown key "value" (did you mean "values"?)'),
        ('[{"rows": []}]', 'it needs "rows"'),
        (
            '[{"rows": [{"chosen": {}, "rejectd": {}}], "values": []}]',
            'unknown key "rejectd" (did you mean "rejected"?)',
        ),
        ('[{"rows": [{"chosen": {"policy": [-1]}}], "values": []}]', "KeyError: 'rejected'"),
    ],
)
def test_fixtures_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(alignzoo.AlignzooError) as caught:
        examine(DPO, fixtures=path)
    assert message in str(caught.value)


def test_a_check_is_left_out_with_its_reason() -> None:
    found = verdicts("direction", WRONG["sign flipped"][1], skip={"direction": "it unlearns"})
    assert found.state == "not tested" and found.what == "left out: it unlearns"
    with pytest.raises(alignzoo.AlignzooError, match=r'no check "directions" .did you mean "direction"'):
        examine(DPO, skip={"directions": "x"})
    with pytest.raises(alignzoo.AlignzooError, match="does not declare name"):
        examine(type("Bare", (alignzoo.Loss,), {}))


# --- as a pytest test ------------------------------------------------------------------------------------------------

test_kto = conformance(KTO, fixtures=FIXTURES / "kto.json")


def test_each_check_has_an_id_of_its_own() -> None:
    mark = test_kto.pytestmark[0]  # type: ignore[attr-defined]
    assert (mark.name, list(mark.args[1])) == ("parametrize", list(CHECKS))
    with pytest.raises(pytest.fail.Exception) as failed:
        conformance(WRONG["sign flipped"][1])("direction")
    text = str(failed.value)
    assert all(
        word in text for word in ('loss "flipped", direction: ', "smallest case: ", "usual cause: ", "way out: ")
    )
    with pytest.raises(pytest.skip.Exception, match="no fixtures were given"):
        conformance(DPO)("fixtures")


# --- rows and settings -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(sorted(DRAWS)),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 50),
)
def test_rows_keep_the_contract(kind: str, name: str, rows: int, tokens: int, seed: int) -> None:
    """Log-probs at or below 0 and exact in sums, a token that counts in each completion, what the kind carries."""
    loss = loss_class("any", lambda s, b: None, kind, prepare=lambda *_: None, needs_mismatched=kind == "labelled")()
    case = Case((), name, rows, tokens, seed)
    made, fewer = draw(loss, case, ("score",)), draw(loss, dataclasses.replace(case, rows=1), ("score",))
    for values in (made.policy, made.reference):
        assert (values <= 0).all()
        assert name == "certain" or torch.equal(values / QUANTUM, (values / QUANTUM).round())
    assert all(c.counted for t in made.trees for c in t.branches)
    assert all(
        (t.label is None) != (kind == "labelled") and (t.rewards is None) != (kind == "groups") for t in made.trees
    )
    assert torch.equal(fewer.policy, made.policy[: len(fewer.policy)])
    assert fewer.trees[0].extra == made.trees[0].extra
    batch = make_batch(kind, rows=rows, tokens=tokens, draw_as=name, seed=seed)
    n = len(next(iter(log_probs_of(batch).values())).mask)
    check_output(loss, batch, alignzoo.LossOutput(torch.zeros(n)))


def test_rewards_are_missing_only_where_that_is_asked_for() -> None:
    for name, missing in (("plain", False), ("nothing counts", True)):
        assert make_batch("groups", draw_as=name).rewards.isnan().all() == missing


@settings(max_examples=60, deadline=None)
@given(st.none() | st.integers(-3, 2), st.none() | st.integers(4, 9), st.booleans(), st.booleans())
def test_values_of_settings_keep_their_bounds(low: int | None, high: int | None, open_: bool, whole: bool) -> None:
    bounds: dict[str, Any] = {"gt": low, "lt": high} if open_ else {"ge": low, "le": high}
    type_ = int if whole else float
    body = {"x": alignzoo.setting(type_(3), "a number", **bounds), "__annotations__": {"x": type_}}
    cls: Any = loss_class("any", lambda s, b: None, Settings=dataclasses.dataclass(frozen=True)(type("S", (), body)))
    field, spec = dataclasses.fields(cls.Settings)[0], schema.Spec("", **bounds)
    for value in [*chosen_values.values(cls, field), *chosen_values.edges(cls, field)]:
        assert spec.allows(value) and type(value) is type_
    forbidden = chosen_values.beyond(cls, field)
    assert not any(spec.allows(value) for value in forbidden)
    assert len(forbidden) == (low is not None) + (high is not None)


def test_what_a_loss_refuses_is_tried_with_another_setting_or_told() -> None:
    @dataclasses.dataclass(frozen=True)
    class Together:
        divisor: Literal["length", "constant"] = alignzoo.setting("length", "what a sum is divided by")
        constant: int | None = alignzoo.setting(None, "the constant", ge=1)
        power: float = alignzoo.setting(1.0, "of the divisor", ge=0)

        def __post_init__(self) -> None:
            if (self.divisor == "constant") != (self.constant is not None) or self.power == 0.5:
                raise ValueError("give both or neither")

    def divided(self: Any, batch: Any) -> alignzoo.LossOutput:
        divisor = self.settings.constant or batch.completion.lengths
        return alignzoo.LossOutput(-batch.completion.sum() / divisor**self.settings.power)

    cls = loss_class("together", divided, "demonstrations", False, Together)
    assert {"divisor": "constant", "constant": 1} in map(dict, chosen_values.variants(cls))
    verdict = verdicts("settings", cls)
    assert verdict.state == "holds" and verdict.what.startswith(
        "constant, power; changed together with others only: divisor"
    )
    assert chosen_values.refused(cls, [()]) and "0.5" not in verdict.what


def test_variants_take_every_choice() -> None:
    found = chosen_values.variants(RIGHT["many kinds"])
    assert found[0] == ()
    assert {v for s in found for n, v in s if n == "kind"} >= {"down", "robust", "squared"}
    assert all(chosen_values.make(RIGHT["many kinds"], s) for s in found)


# --- batches by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_by_hand(kind: str) -> None:
    batch = make_batch(kind, rows=3, tokens=5, seed=1)
    assert type(batch) is KINDS[kind]
    part = next(iter(log_probs_of(batch).values()))
    assert isinstance(part, LogProbs) and part.policy.requires_grad and part.policy.dtype == torch.float32
    assert part.mask.shape[1] == 5 and part.reference is not None


def test_a_batch_for_a_loss_has_what_its_prepare_gives() -> None:
    batch = make_batch(KTO())
    assert batch.step["baseline"].shape == () and KTO()(batch).loss.shape == (4,)
    assert make_batch(DPO(reference_free=True)).chosen.reference is None
    assert make_batch("pairs", columns=("score",)).extra["score"].shape == (4,)
    for words, message in ((("pair",), 'did you mean "pairs"'), (("pairs", "plane"), 'did you mean "plain"')):
        with pytest.raises(alignzoo.AlignzooError, match=message):
            make_batch(words[0], draw_as=words[1] if len(words) > 1 else "plain")


# --- one vocabulary --------------------------------------------------------------------------------------------------


def test_what_can_be_declared_is_checked() -> None:
    assert _CHANGES.keys() | {"forgets"} == INVARIANCES.keys()
    cls = loss_class("typo", lambda s, b: None, invariances=frozenset({"shfit"}))
    with pytest.raises(alignzoo.AlignzooError, match=r'a set out of prompt_length, .* \(did you mean "shift"\?\)'):
        examine(cls)


def test_draws_and_checks_are_documented() -> None:
    text = (Path(__file__).parents[1] / "docs/conformance.md").read_text()
    for name in [*CHECKS, *INVARIANCES, *ABOUT]:
        assert f"| `{name}` |" in text, name


# --- the step is the engine's ----------------------------------------------------------------------------------------


def test_a_step_divides_by_its_units() -> None:
    """By hand: each term's sum by the units of the whole step, whatever the micro-batches."""
    from alignzoo_losses.orpo import ORPO

    loss = ORPO()
    rows = draw(loss, Case(rows=3))
    whole, parts = run(loss, rows), run(loss, rows, How(parts=[[0], [2, 1]]))
    output = whole.outputs[0]
    tokens, examples = output.terms
    expected = tokens.loss[tokens.mask].mean() + examples.loss.mean()
    assert whole.loss.item() == pytest.approx(expected.item()) and compare(whole, parts) == ""
    assert Clipped().beta == 0.0


def test_a_result_as_json() -> None:
    result = Result("dpo", CHECKS["gradient"], verdicts("gradient", DPO))
    assert json.loads(json.dumps(result.to_json())) == {
        "loss": "dpo", "check": "gradient", "holds": CHECKS["gradient"].holds, "state": "holds", "what": "", "case": "",
        "rows": [],
    }  # fmt: skip
