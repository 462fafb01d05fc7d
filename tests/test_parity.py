"""The maths does not depend on the machine: 1, 2 and 4 ranks, ZeRO 0 to 3, against one plain process.

Plain SGD without clipping and a rate that moves the weights by a percent: AdamW and clipping hide a constant factor.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_worker import LOSSES, STEPS, case

WORKER = Path(__file__).with_name("ranks_worker.py")
OF_THE_MACHINE = {"tokens_per_second", "memory", "padding_fraction", "shared_fraction", "eval_runtime"}
ACCURACIES = ("accuracies", "ties", "odd")  # of few rows: what is near a tie may fall on either side
TOLERANCES = {"loss": 5e-6, "eval_loss": 5e-6, "grad_norm": 1e-5}  # an AMD CPU came to 2.3e-6
REST = 2e-5  # sums of many log-probs, and their differences
Found = dict[str, Any]


def train(cases: Sequence[Found], ranks: int, folder: Path, mistake: str = "", seconds: int = 240) -> list[Found]:
    """What each case came to on so many ranks; one rank is a plain process without any launcher."""
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    out = folder / f"out-{ranks}.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        words = [sys.executable, str(WORKER), str(folder / "cases.json"), str(out), *([mistake] if mistake else [])]
        log = (folder / f"rank-{rank}.log").open("w")
        started.append(subprocess.Popen(words, env=here | own, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    logs = "\n".join((folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(ranks))
    assert codes == [0] * ranks, logs
    return torch.load(out, weights_only=True)  # type: ignore[no-any-return]


def with_zero(cases: Sequence[Found], **overrides: Any) -> list[Found]:
    return [one | {"overrides": one["overrides"] | overrides} for one in cases]


def distance(found: Found, plain: Found) -> float:
    """Of two updates, relative L2."""
    return float((found["update"] - plain["update"]).norm() / plain["update"].norm())


def assert_same(found: Found, plain: Found, what: Any, update: float = 1e-4, factor: float = 1.0) -> None:
    assert plain["update"].norm() > 0.01 * plain["start"], what
    assert len(plain["records"]) == STEPS + 3  # evaluations at the start, after step 3, and at the end
    assert distance(found, plain) < update, what
    for ours, theirs in zip(found["records"], plain["records"], strict=True):
        assert ours.keys() == theirs.keys(), what
        for name in ours.keys() - OF_THE_MACHINE:
            scale = max(1.0, abs(theirs[name]))
            tolerance = 0.2 if name.endswith(ACCURACIES) else factor * TOLERANCES.get(name, REST)
            assert abs(ours[name] - theirs[name]) < tolerance * scale, (what, ours["step"], name)


FAST = [
    case("dpo"), case("kto"), case("sft"), case("dpo", lora=True, tied=True),
    case("dpo", engine__tokens_per_device=60),  # several micro-batches on each rank, and not the same number of rows
    case("sft", rows=3, train__batch_size=1),  # one row in a step: a rank without any
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return train(FAST, 1, tmp_path_factory.mktemp("plain"))


@pytest.mark.xdist_group("ranks")
def test_two_ranks_at_every_stage_are_one_process(plain: list[Found], tmp_path: Path) -> None:
    stages = [with_zero(FAST, engine__zero=zero) for zero in (0, 1, 2, 3)]
    found = train([one for stage in stages for one in stage], 2, tmp_path)
    for i, one in enumerate(found):
        assert_same(one, plain[i % len(FAST)], (i // len(FAST), FAST[i % len(FAST)]))


@pytest.mark.xdist_group("ranks")
def test_two_ranks_with_token_trees_are_one_process_with_padded_rows(plain: list[Found], tmp_path: Path) -> None:
    stages = [with_zero(FAST, engine__zero=zero, engine__packing="on") for zero in (0, 3)]
    found = train([one for stage in stages for one in stage], 2, tmp_path)
    for i, one in enumerate(found):
        assert_same(one, plain[i % len(FAST)], (i // len(FAST), FAST[i % len(FAST)]))
        assert all(record["padding_fraction"] == 0 for record in one["records"] if "padding_fraction" in record)


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("mistake", ["world size", "accumulation"])
@pytest.mark.slow
def test_a_wrong_scale_is_seen(mistake: str, zero: int, plain: list[Found], tmp_path: Path) -> None:
    found = train(with_zero(FAST[:3], engine__zero=zero), 2, tmp_path, mistake)
    assert all(distance(one, right) > 0.1 for one, right in zip(found, plain, strict=False))


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_reward_model_on_two_ranks(tmp_path: Path) -> None:
    """With a head of its own, which an adapter trains whole; under ZeRO-3 in token trees too."""
    cases = [case("bradley_terry"), case("bradley_terry", lora=True, engine__tokens_per_device=60)]
    alone = train(cases, 1, tmp_path / "plain")
    stages = [with_zero(cases, engine__zero=0), with_zero(cases, engine__zero=3)]
    stages.append(with_zero(cases, engine__zero=3, engine__packing="on"))
    found = train([one for stage in stages for one in stage], 2, tmp_path / "two")
    for i, one in enumerate(found):
        assert_same(one, alone[i % 2], (i // 2, cases[i % 2]))


# --- the whole matrix


def matrix() -> list[Found]:
    cases = [case(loss) for loss in LOSSES]
    cases += [case(loss, lora=True) for loss in ("dpo", "kto", "sft")]
    cases += [case("dpo", engine__tokens_per_device=budget) for budget in (1, 50, 400)]
    cases += [case("dpo", tied=True), case("sft", rows=3, train__batch_size=2), case("kto", train__batch_size=5)]
    cases += [case("dpo", engine__gradient_checkpointing=True)]
    adam = {"train__optimizer": "adamw_torch_fused", "train__learning_rate": 1e-2, "train__max_grad_norm": 1.0}
    return [*cases, case("dpo", **adam), case("dpo", lora=True, **adam)]


def looser(what: Found) -> tuple[float, float]:
    """Tolerance of the update, and factor of the others, where rounding counts for more."""
    if "train__optimizer" in what["overrides"]:  # Adam divides by the gradient's size
        return 1e-3, 100
    return 1e-4, 5 if what["loss"] in ("ipo", "mixed") else 1  # they square a difference of sums


@pytest.fixture(scope="module")
def plain_matrix(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return train(matrix(), 1, tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_matrix(ranks: int, zero: int, plain_matrix: list[Found], tmp_path: Path) -> None:
    found = train(with_zero(matrix(), engine__zero=zero), ranks, tmp_path, seconds=900)
    for one, right, what in zip(found, plain_matrix, matrix(), strict=True):
        assert_same(one, right, what, *looser(what))


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"engine__zero": 1, "engine__offload_optimizer": "cpu"}),
        (2, {"engine__zero": 2, "engine__offload_optimizer": "cpu"}),
        (2, {"engine__zero": 3, "engine__offload_optimizer": "cpu", "engine__offload_parameters": "cpu"}),
        (4, {"engine__zero": 3, "engine__hpz": 2}),
    ],
)
def test_offload_and_hpz(ranks: int, settings: Found, plain_matrix: list[Found], tmp_path: Path) -> None:
    for one, right in zip(train(with_zero(matrix()[:3], **settings), ranks, tmp_path), plain_matrix, strict=False):
        assert_same(one, right, settings)


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bf16_is_near_fp32(zero: int, plain_matrix: list[Found], tmp_path: Path) -> None:
    found = train(with_zero(matrix()[:2], engine__zero=zero, engine__precision="bf16"), 2, tmp_path)
    for one, right in zip(found, plain_matrix, strict=False):
        assert distance(one, right) < 0.1
