"""Runs of several processes from recipe to run directory, and runs that die and go on."""

from __future__ import annotations

import io
import random
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO
from rich.console import Console
from runs_helpers import (
    Command,
    Kill,
    Moment,
    after_lines,
    assert_the_same_run,
    distance,
    end_early,
    files_of,
    finished,
    kill_all,
    kill_rank,
    lines_of,
    metrics_of,
    send,
    sets,
    within_checkpoint,
    write_recipe,
)

import alignzoo
from alignzoo.evalrows import read_eval_rows
from alignzoo.recipe import load_recipe
from alignzoo.runner import run_chain

pytestmark = pytest.mark.xdist_group("ranks")
CHAIN: dict[str, dict[str, Any]] = {
    "z0": {},
    "z2": {"engine__zero": 2},
    "z3": {"engine__zero": 3, "reference__sync_every_steps": 5},
    "lora": {"engine__zero": 3, "model__lora": {"rank": 4}, "train__max_steps": 3, "samples__gather": False},
    "merged": {"engine__zero": 3, "model__lora": {"rank": 4}, "output__merge": True, "train__max_steps": 2},
}
BEFORE = dict(zip(list(CHAIN)[1:], CHAIN, strict=False))  # of each recipe, the one whose model it starts from


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    """As the processes have: another number of threads sums up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- two processes and one -------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """The chain, trained by one process and by two. ends: the interrupted runs that `interrupt` made of it."""

    folder: Path
    start: Path
    recipes: dict[str, Path]
    out: str = ""
    err: str = ""
    ends: dict[str, Path] = field(default_factory=dict)

    def run(self, processes: int, name: str) -> Path:
        return self.folder / f"by-{processes}" / name

    def start_of(self, processes: int, name: str) -> Path:
        """The folder of the model that a run started from."""
        return self.run(processes, BEFORE[name]) / "model" if name in BEFORE else self.start


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """All five recipes, each from the model of the one before, at ZeRO 0, 2 and 3; by one process without ZeRO."""
    folder = tmp_path_factory.mktemp("many")
    recipes = {name: write_recipe(folder, tiny_folder, name, **changes) for name, changes in CHAIN.items()}
    found = Trained(folder, tiny_folder, recipes)
    found.out, found.err = finished(
        folder / "log", "run", *recipes.values(), "--processes", "2", *sets(output__dir=folder / "by-2")
    )
    run_chain(list(recipes.values()), [f"output.dir={folder / 'by-1'}", "engine.zero=0"], [], command=[])
    return found


@pytest.mark.parametrize("name", CHAIN)
def test_two_processes_leave_what_one_leaves(name: str, trained: Trained) -> None:
    one, two = trained.run(1, name), trained.run(2, name)
    beside = {f for f in files_of(two) if f.startswith("adapter/")}  # merged from there, where no rank holds it whole
    assert files_of(one) == files_of(two) - beside and bool(beside) == (name == "merged")
    assert (one / "samples.md").read_text() == (two / "samples.md").read_text()
    for ours, theirs in zip(metrics_of(two), metrics_of(one), strict=True):
        assert ours.keys() == theirs.keys()
        if "warning" in ours:  # in words, with figures of the two in them
            assert (ours["step"], ours["warning"]) == (theirs["step"], theirs["warning"])
            continue
        for key in ours.keys() - {"padding_fraction"}:  # depends on how a step is cut
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4), (ours["step"], key)
    rows = [read_eval_rows(path) for path in (two, one)]
    assert rows[0] is not None and rows[1] is not None and rows[0].names == rows[1].names
    for step, table in rows[1].policy.items():
        assert np.allclose(rows[0].policy[step], table, atol=1e-3)
    assert distance(two / "model", one / "model") < 1e-5


def test_what_two_processes_save_loads_elsewhere(trained: Trained) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 40)[None]

    def logits(processes: int, name: str) -> torch.Tensor:
        cls = AutoPeftModelForCausalLM if name == "lora" else AutoModelForCausalLM
        return cls.from_pretrained(trained.run(processes, name) / "model")(ids).logits.detach()  # type: ignore[no-any-return]

    for name in CHAIN:
        assert torch.allclose(logits(2, name), logits(1, name), atol=2e-4), name
        moved = "model" if name == "lora" else "model/model.safetensors"
        assert (trained.run(2, name) / moved).exists()
    assert (trained.run(2, "lora") / "model/adapter_model.safetensors").is_file()
    assert (logits(2, "lora") - logits(2, "z3")).abs().max() > 1e-3
    assert (logits(2, "merged") - logits(2, "lora")).abs().max() > 1e-3


def test_only_the_first_rank_speaks(trained: Trained) -> None:
    said = trained.out.splitlines()
    for line in ("run directory:", "loading the tokenizer", "held-out, step 0:", "model: ", "engine: 2 processes"):
        assert len([one for one in said if one.startswith(line)]) == len(CHAIN), line
    assert said[0].startswith("starting 2 processes as torchrun does: ")
    assert "rank" not in trained.err.lower()


# --- killed and resumed ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """How a run of one of the chain's recipes is ended early."""

    processes: int
    moment: Moment
    how: Callable[[Command], None]
    code: int
    said: str = ""


ENDS = {
    "z0": End(1, within_checkpoint(6), kill_all, -9),
    "z2": End(2, after_lines(7), kill_rank(1), 137, "rank 1 was killed by SIGKILL"),
    "z3": End(2, after_lines(9), send(signal.SIGTERM), 143, "of 12 by SIGTERM"),
}


def words_for(trained: Trained, name: str, processes: int) -> list[str | Path]:
    """A recipe of the chain by itself, with checkpoints."""
    changes = {"model__path": f"run:{trained.run(processes, BEFORE[name])}"} if name in BEFORE else {}
    many = ["--processes", str(processes)] if processes > 1 else []
    return ["run", trained.recipes[name], *many, *sets(**changes, checkpoint__every_steps=3)]


@pytest.fixture
def interrupt(trained: Trained, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the directory of an interrupted run, by the name of its recipe."""

    def found(name: str) -> Path:
        if name not in trained.ends:
            end, base = ENDS[name], trained.folder / "ended"
            words = [*words_for(trained, name, end.processes), *sets(output__dir=base)]
            code, err = end_early(trained.folder / f"log-{name}", base / name, words, end.moment, end.how)
            assert code == end.code and end.said in err, err
            trained.ends[name] = base / name
        return Path(shutil.copytree(trained.ends[name], tmp_path / name))

    return found


def resumed_here(recipe: Path, run_dir: Path, *changes: str) -> str:
    """Goes on in one process, without ZeRO: what it says."""
    console = Console(file=io.StringIO(), width=200)
    alignzoo.run(load_recipe(recipe, ["engine.zero=0", *changes]), resume=run_dir, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ENDS)
def test_a_killed_run_ends_as_if_it_had_never_been_stopped(
    name: str, interrupt: Callable[[str], Path], trained: Trained, tmp_path: Path
) -> None:
    run_dir, processes = interrupt(name), ENDS[name].processes
    assert 0 < lines_of(run_dir) < lines_of(trained.run(processes, name))
    if processes == 1:  # in this process: it has imported everything already
        out = resumed_here(trained.recipes[name], run_dir, "checkpoint.every_steps=3")
    else:
        out, _ = finished(tmp_path / "log", *words_for(trained, name, processes), "--resume", run_dir)
    assert re.search(r"^going on after step \d+ of 12: ", out, re.MULTILINE)
    assert_the_same_run(run_dir, trained.run(processes, name))


def test_a_signal_saves_the_step_that_was_under_way(interrupt: Callable[[str], Path]) -> None:
    run_dir = interrupt("z3")
    steps = sorted(int(p.name.removeprefix("step-")) for p in (run_dir / "checkpoints").iterdir())
    assert steps[-1] == metrics_of(run_dir)[-1]["step"]


def test_one_process_goes_on_with_what_two_began_at_stage_3(interrupt: Callable[[str], Path], trained: Trained) -> None:
    run_dir = interrupt("z3")
    said = resumed_here(trained.recipes["z3"], run_dir, f"model.path=run:{trained.run(2, 'z2')}")
    assert "changed: engine.zero: 3 -> 0\n" in said
    straight, start = trained.run(2, "z3") / "model", trained.start_of(2, "z3")
    assert distance(run_dir / "model", straight, start) < 1e-5
    assert distance(start, straight, start) == 1  # the run has moved the weights


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero"), [("z0", 2), ("z2", 3), ("z3", 1), ("z0", 3), ("z2", 0)])
def test_two_processes_go_on_at_another_stage(
    name: str, zero: int, interrupt: Callable[[str], Path], trained: Trained, tmp_path: Path
) -> None:
    """What one process began, and what two began."""
    run_dir, began = interrupt(name), ENDS[name].processes
    words = [*words_for(trained, name, began), *(["--processes", "2"] if began == 1 else [])]
    out, _ = finished(tmp_path / "log", *words, *sets(engine__zero=zero), "--resume", run_dir)
    assert "changed: engine.zero: " in out
    straight, start = trained.run(began, name) / "model", trained.start_of(began, name)
    assert distance(run_dir / "model", straight, start) < 1e-5


# --- a rank in trouble -----------------------------------------------------------------------------------------------

TROUBLE = REPO / "tests/fixtures_plugins/alignzoo_trouble.py"


def in_trouble(kind: str, tiny_folder: Path, folder: Path, **changes: Any) -> tuple[Path, str]:
    """The directory of a run whose second rank gets into trouble in step 1, and what it says on stderr."""
    none = {"samples__prompts": [], "samples__from_eval": 0}
    recipe = write_recipe(folder, tiny_folder, loss__name="trouble", loss__trouble=kind, **none, **changes)
    _, err = finished(folder / "log", "run", recipe, "--processes", "2", "--plugin", TROUBLE, code=1)
    return folder / "runs/tiny", err


def test_the_rank_that_failed_has_the_word(tiny_folder: Path, tmp_path: Path) -> None:
    run_dir, err = in_trouble("raises", tiny_folder, tmp_path)
    said = [line for line in err.splitlines() if "warn" not in line.lower()]
    assert said[:2] == ["error: rank 1:", "Traceback (most recent call last):"], err
    assert said[-1] == "ArithmeticError: in trouble on purpose" and err.count("Traceback") == 1
    assert [line["step"] for line in metrics_of(run_dir)] == [0]


def test_a_rank_that_hangs_ends_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    run_dir, err = in_trouble("hangs", tiny_folder, tmp_path, engine__hang_timeout=8)
    stacks = {name: (run_dir / "stacks" / name).read_text() for name in ("rank-0.txt", "rank-1.txt")}
    assert "alignzoo_trouble.py" in stacks["rank-1.txt"] and " in __call__" in stacks["rank-1.txt"]
    assert "alignzoo_trouble.py" not in stacks["rank-0.txt"] and "_step" in stacks["rank-0.txt"]
    for rank, text in enumerate(stacks.values()):
        assert f"rank {rank}: nothing moved for 8 s (engine.hang_timeout), last at: step 1, micro-batch " in text
    last = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(last) == 1 and f"stacks: {run_dir / 'stacks'}" in last[0], err


# --- fifty kills -----------------------------------------------------------------------------------------------------

LONG: dict[str, tuple[int, int, dict[str, Any]]] = {  # processes, kills, recipe
    "adamw": (1, 10, {}),
    "kto": (1, 8, {"loss__name": "kto", "model__dropout": 0.1}),
    "log-3": (1, 8, {"log__every_steps": 3, "checkpoint__every_steps": 4}),
    "zero-0": (2, 6, {"model__dropout": 0.1}),
    "zero-2": (2, 9, {"engine__zero": 2}),
    "zero-3": (2, 9, {"engine__zero": 3, "reference__sync_every_steps": 4, "model__dropout": 0.1}),
}
assert sum(kills for _, kills, _ in LONG.values()) == 50


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_killed_again_and_again(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    processes, kills, changes = LONG[name]
    rates = {"train__adam_epsilon": 1e-8, "train__learning_rate": 1e-3, "train__epochs": 8, "eval__every_steps": 9}
    recipe = write_recipe(tmp_path, tiny_folder, name, **rates, **{"checkpoint__every_steps": 3, **changes})
    words: list[str | Path] = ["run", recipe, *(["--processes", str(processes)] if processes > 1 else [])]
    finished(tmp_path / "log", *words, *sets(output__dir=tmp_path / "straight"))
    straight, run_dir = tmp_path / "straight" / name, tmp_path / "runs" / name
    rng, resume, told = random.Random(name), list[str | Path](), []
    for _ in range(kills):
        kill = Kill.draw(rng, processes, lines_of(run_dir), lines_of(straight) - 6)
        code, err = end_early(tmp_path / "log", run_dir, [*words, *resume], kill.moment, kill.how)
        told.append(kill.name)
        assert code in kill.codes, (told, err)
        resume = ["--resume", run_dir]
    finished(tmp_path / "log", *words, *resume)
    assert_the_same_run(run_dir, straight)
