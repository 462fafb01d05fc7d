"""What benchmarks/step.py measures: cases, each a list of specifications that are run one after the other.

A specification is a dictionary that goes to the measuring process as JSON, and into the record of what it found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from step_data import DEMO

Spec = dict[str, Any]
Lines = list[dict[str, float]]
COMPARED, GROWTH, OPTIONS = "compared", "growth", "options"
# Between sides and between layouts: of a loss, absolute; of log-probs and gradient norms, relative. In bfloat16 a sum
# of log-probs is off by tenths of a nat, as much as the first steps move it; its mean over rows is not.
TOLERANCE = {
    "fp32": {"loss": 1e-4, "logps": 1e-4, "grad_norm": 2e-3}, "bf16": {"loss": 0.1, "logps": 5e-3, "grad_norm": 0.2},
}  # fmt: skip
NO_REFERENCE = ("sft", "orpo", "grpo")
BOTH = ("live", "cached")


@dataclass(frozen=True)
class Case:
    """What is compared with each other."""

    part: str
    loss: str
    data: str
    precision: str
    specs: tuple[Spec, ...]

    @property
    def name(self) -> str:
        return f"{self.part}: {self.loss} {self.data} {self.precision}"


@dataclass(frozen=True)
class Wish:
    """What the command line asks for."""

    device: str
    warmup: int
    steps: int
    factor: int
    rounds: int
    full: bool = False  # TRL's defaults for every loss, every split, TRL's reference both ways on the demo
    small: bool = False  # tiny data, for a check of the script


def cases(wish: Wish) -> Iterator[Case]:
    """All cases for a device, the most wanted first."""
    if wish.small:
        yield from _tiny(wish)
        return
    precisions = ("fp32", "bf16") if wish.device == "cpu" else ("bf16",)
    for precision in precisions:
        main = precision == precisions[0]
        yield _compared(wish, "dpo", "std", precision, parts=BOTH if main or wish.full else (), defaults=main)
    first, full, every = precisions[0], wish.full, BOTH if wish.full else BOTH[:1]
    yield _compared(wish, "sft", "std", first, defaults=True)
    yield _compared(wish, "grpo", "groups", first, parts=BOTH, defaults=True)
    yield _compared(wish, "orpo", "std", first, defaults=full)
    yield _compared(wish, "kto", "std", first, defaults=full)
    yield _compared(wish, "dpo", "long", first, parts=every, defaults=full)
    if DEMO.exists():
        yield _compared(wish, "dpo", "demo", first, references=every)
    yield _growth(wish, "dpo", "tokens", (1, 2, 4, 8), first)
    yield _growth(wish, "grpo", "completions", (1, 2, 4, 8, 16), first)
    yield _options(wish, "tokens-4", first)


def _tiny(wish: Wish) -> Iterator[Case]:
    for loss, data in {"dpo": "tiny", "sft": "tiny", "orpo": "tiny", "kto": "tiny", "grpo": "tiny-groups"}.items():
        yield _compared(wish, loss, data, "fp32", parts=BOTH, defaults=True)
    yield _growth(wish, "dpo", "tokens", (1, 2), "fp32")
    yield _growth(wish, "grpo", "completions", (1, 2), "fp32")
    yield _options(wish, "tokens-2", "fp32")


def spec(wish: Wish, side: str, loss: str, data: str, precision: str, **more: Any) -> Spec:
    """A specification; what is not given has the value that most of them have."""
    reference = "none" if loss in NO_REFERENCE else "live"
    return {
        "side": side, "loss": loss, "data": data, "precision": precision, "reference": reference, "layout": "trees",
        "defaults": False, "set": {}, "compile": False, "seed": 7, "learning_rate": 1e-6, "factor": wish.factor,
        "warmup": wish.warmup, "steps": wish.steps, "round": 0, **more,
    }  # fmt: skip


def _compared(
    wish: Wish,
    loss: str,
    data: str,
    precision: str,
    *,
    parts: Sequence[str] = (),
    defaults: bool = False,
    references: Sequence[str] = BOTH,
) -> Case:
    """Ours and TRL's in turn.

    parts: the references with which ours is measured without shared prompts, and without packing, too
    defaults: TRL's defaults too
    """
    alone = loss in NO_REFERENCE
    references = ("none",) if alone else references
    ours = [{"reference": r, "layout": "trees"} for r in references]
    ours += [{"reference": r, "layout": n} for n in ("packed", "padded") for r in references if alone or r in parts]
    ours = ours if parts else ours[: len(references)]
    trl = [{"reference": r} for r in references]
    if defaults:
        trl.append({"reference": references[0], "defaults": True})
    specs: list[Spec] = []
    for number in range(wish.rounds):
        for i in range(max(len(ours), len(trl))):
            if i < len(ours):
                specs.append(spec(wish, "ours", loss, data, precision, round=number, **ours[i]))
            if i < len(trl):
                specs.append(spec(wish, "trl", loss, data, precision, round=number, **trl[i]))
    return Case(COMPARED, loss, data, precision, tuple(specs))


def _growth(wish: Wish, loss: str, what: str, sizes: tuple[int, ...], precision: str) -> Case:
    """Ours alone; the reference of a pair is cached."""
    more = {} if loss in NO_REFERENCE else {"reference": "cached"}
    made = tuple(spec(wish, "ours", loss, f"{what}-{n}", precision, **more) for n in sizes)
    return Case(GROWTH, loss, what, precision, made)


def _options(wish: Wish, data: str, precision: str) -> Case:
    """Ours alone: one thing changed at a time, on rows of one shape."""
    changes: tuple[Spec, ...] = (
        {}, {"compile": True}, {"set": {"train.optimizer": "adamw_torch_fused"}},
        {"set": {"engine.gradient_checkpointing": True}}, {"set": {"engine.tokens_per_device": 512}},
    )  # fmt: skip
    if wish.device == "cpu":
        changes = (*changes, {"precision": "bf16"})
    common = {"precision": precision, "reference": "cached"}
    return Case(OPTIONS, "dpo", data, precision, tuple(spec(wish, "ours", "dpo", data, **common | c) for c in changes))


def label(one: Spec) -> str:
    """A specification in words."""
    words = [{"ours": "alignzoo", "trl": "TRL"}[one["side"]]]
    words += {"live": ["live reference"], "cached": ["kept reference" if one["side"] == "ours" else "precomputed"]}.get(
        one["reference"], []
    )
    words += {"packed": ["prompts not shared"], "padded": ["padded"]}.get(one["layout"], [])
    words += ["its defaults (gradient checkpointing)"] if one["defaults"] else []
    words += ["compiled"] if one["compile"] else []
    words += [f"{key.split('.')[1]} = {value}" for key, value in one["set"].items()]
    return ", ".join(words)


# --- void ------------------------------------------------------------------------------------------------------------


def why_void(case: Case, records: list[dict[str, Any]]) -> str:
    """Why these records of a case are no comparison; "" where they are one.

    DPO and SFT have equal losses at every step, ORPO equal odds terms and KTO and GRPO equal losses at the first one,
    where their NLL, baseline and window still mean the same; gradient norms too where losses are the same function.
    """
    if case.part != COMPARED:
        return ""
    ours = [r for r in records if r["spec"]["side"] == "ours"]
    for one in records:
        first = one["lines"]
        for what, mine, theirs in _pairs(case.loss, ours[0]["lines"], first) if ours else ():
            limit = next((v for name, v in TOLERANCE[case.precision].items() if what.startswith(name)))
            relative = abs(theirs) if not what.startswith("loss") else 1.0
            if not abs(mine - theirs) <= limit * relative:
                return f"{what} is {mine:.7g} and, with {label(one['spec'])}, {theirs:.7g}"
        found = one["forwarded"]
        if found is not None and found["tokens"] != one["all_tokens"]:
            return f"TRL forwarded {found['tokens']} tokens of {one['all_tokens']}"
    return ""


def _pairs(loss: str, mine: Lines, theirs: Lines) -> Iterator[tuple[str, float, float]]:
    """What has to be equal, with its name."""
    every = loss in ("dpo", "sft")
    for step, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if step and not every:
            return
        names = {"loss": "loss", "grad_norm": "grad_norm", "logps/chosen": "logps/chosen"}
        if loss == "orpo":
            if "nll_loss" in a and "nll_loss" in b:
                yield f"loss: odds term at step {step}", a["loss"] - a["nll_loss"], b["loss"] - b["nll_loss"]
            continue
        for name in names:
            if name in a and name in b:
                yield f"{name} at step {step}", a[name], b[name]
