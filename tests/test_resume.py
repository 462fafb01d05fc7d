"""Which run goes on, and whether it is still the same one."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from alignzoo.errors import AlignzooError, DataError, ModelError, PluginError, RecipeError
from alignzoo.recipe import Recipe, load_recipe, to_table
from alignzoo.resume import ABSENT, Change, check_inputs, find_run, make_ready, note_resume, recipe_changes, table_of
from alignzoo.rundir import RunDir, manifest, run_name


def recipe_of(
    base: Path, overrides: Mapping[str, Any] | None = None, file: str = "shop.toml", loss: str = "dpo"
) -> Recipe:
    path = base / file
    path.write_text(
        f'[loss]\nname = "{loss}"\nbeta = 0.1\n[model]\npath = "some/model"\n[data]\ntrain = "rows.jsonl"\n'
        f'[train]\nlearning_rate = 1e-5\n[output]\ndir = "{base / "runs"}"\n'
    )
    return load_recipe(path, overrides or {})


def run_of(recipe: Recipe, second: int = 0, finished: bool = False) -> RunDir:
    """A run directory as `alignzoo run` makes it."""
    started = datetime(2026, 11, 21, 10, 15, second, tzinfo=UTC)
    name = recipe.log.run_name or run_name(recipe.name, recipe.losses[0].name, started)
    run_dir = RunDir.create(Path(recipe.output.dir), name)
    run_dir.write_recipe(to_table(recipe))
    run_dir.write_json("manifest.json", manifest(command=["alignzoo"], seed=1, started=started))
    if finished:
        (run_dir.path / "model").mkdir()
        run_dir.write_json("summary.json", {})
    return run_dir


# --- which run -------------------------------------------------------------------------------------------------------


def test_the_newest_unfinished_run_of_the_recipe(tmp_path: Path) -> None:
    recipe, said = recipe_of(tmp_path), []
    runs = [run_of(recipe, second) for second in (3, 5, 4)]
    run_of(recipe, 9, finished=True)
    run_of(recipe_of(tmp_path, file="shop-dpo.toml"), 10)  # another recipe whose runs' names begin alike
    run_of(recipe_of(tmp_path, loss="ipo"), 11)
    (Path(recipe.output.dir) / "shop-dpo-20261121-101559").mkdir()  # killed before its manifest was written
    found = find_run(recipe, None, said.append)
    assert found.run_dir == runs[1] and found.checkpoint is None
    assert said == ["3 runs of shop did not come to their end: the newest goes on"]


def test_of_runs_in_the_same_second_the_last_made(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    runs = [run_of(recipe) for _ in range(11)]
    assert runs[-1].path.name.endswith("-11")
    assert find_run(recipe, None, print).run_dir == runs[-1]


def test_a_named_run_is_found_by_its_name(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"log.run_name": "mine.1"})
    run = run_of(recipe)
    run_of(recipe_of(tmp_path), 50)
    run_of(recipe_of(tmp_path, {"log.run_name": "mineX1"}), 50)
    assert find_run(recipe, None, print).run_dir == run


@pytest.mark.parametrize("made", ["nothing", "another", "finished"])
def test_where_none_can_go_on_it_says_why(tmp_path: Path, made: str) -> None:
    recipe = recipe_of(tmp_path)
    if made == "another":
        run_of(recipe_of(tmp_path, file="other.toml"))
    if made == "finished":
        run_of(recipe, finished=True)
    words = "all 1 came to their end" if made == "finished" else "no shop-dpo-DATE-TIME is there"
    with pytest.raises(AlignzooError, match=rf"{words}[\s\S]*--resume DIR"):
        find_run(recipe, None, print)


def test_a_directory_or_a_checkpoint_in_it_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path)
    run = run_of(recipe)
    step = run.checkpoints / "step-4"
    step.mkdir(parents=True)
    assert find_run(recipe, run.path, print).run_dir == run
    assert find_run(recipe, step, print).run_dir.path.samefile(run.path)
    assert find_run(recipe, step, print).checkpoint == step
    monkeypatch.chdir(run.checkpoints)
    assert find_run(recipe, Path("step-4"), print).run_dir.path.samefile(run.path)
    for wrong in (tmp_path, tmp_path / "absent", run.checkpoints / "step-5"):
        with pytest.raises(AlignzooError, match="no run directory"):
            find_run(recipe, wrong, print)


def test_a_finished_run_is_refused_with_the_way_on(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    run = run_of(recipe, finished=True)
    with pytest.raises(AlignzooError, match=r"came to its end[\s\S]*model\.path=\"run:"):
        find_run(recipe, run.path, print)
    (run.path / "summary.json").unlink()  # killed between the model and the closing figures
    assert find_run(recipe, run.path, print).run_dir == run


def test_the_recipe_in_a_run_directory_means_that_run(tmp_path: Path) -> None:
    run = run_of(recipe_of(tmp_path))
    assert find_run(load_recipe(run.path / "recipe.toml"), None, print).run_dir == run


def test_a_directory_in_use_is_refused_until_its_process_ends(tmp_path: Path) -> None:
    run = run_of(recipe_of(tmp_path))
    code = (
        "import sys, pathlib\n"
        "from alignzoo.rundir import RunDir\n"
        "with RunDir(pathlib.Path(sys.argv[1])).held():\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(run.path)], **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(AlignzooError, match="a run is writing there"), run.held():
            pass
        process.kill()
        process.wait()
    for _ in range(2):
        with run.held():
            pass


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["R", "--resume"], True), (["--resume", "R"], True), (["--resume", "D", "R"], "D"), (["R", "--resume=D"], "D"),
        (["R", "--resume", "--set", "train.seed=1"], True), (["R"], False),
    ],
)  # fmt: skip
def test_resume_takes_a_directory_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str | bool
) -> None:
    from alignzoo import runner
    from alignzoo.cli import cli

    run = run_of(recipe_of(tmp_path))
    given: list[Any] = []
    monkeypatch.setattr(runner, "run_chain", lambda *args, resume, **more: given.extend((args[0], resume)))
    places = {"R": str(tmp_path / "shop.toml"), "D": str(run.path)}
    spelt = [places.get(w) or w.replace("=D", f"={run.path}") for w in words]
    done = CliRunner().invoke(cli, ["run", *spelt])
    assert (done.exit_code, done.stderr) == (0, "")
    assert given == [(tmp_path / "shop.toml",), run.path if expected == "D" else expected]


def test_a_run_that_cannot_go_on_is_told_at_once(tmp_path: Path) -> None:
    recipe_of(tmp_path)
    code = (
        "import sys; from alignzoo.cli import cli; from click.testing import CliRunner\n"
        "done = CliRunner().invoke(cli, ['run', sys.argv[1], '--resume'])\n"
        "print(done.exit_code, done.stderr.splitlines()[0], 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "shop.toml")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out == f"2 error: {tmp_path / 'runs'}: no run of shop that could go on False\n"


# --- the same recipe -------------------------------------------------------------------------------------------------


def changed(before: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """The table with keys section__key set, or taken away by None."""
    table = copy.deepcopy(dict(before))
    for name, value in overrides.items():
        section, key = name.split("__")
        table[section].pop(key, None)
        if value is not None:
            table[section][key] = value
    return table


def test_the_same_recipe_has_no_changes(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"model.lora.rank": 4, "data.train": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]})
    run = run_of(recipe)
    assert recipe_changes(table_of(run), to_table(recipe)) == []
    assert recipe_changes(to_table(recipe), to_table(load_recipe(run.path / "recipe.toml"))) == []


def test_keys_that_a_run_of_an_older_version_lacks_have_their_defaults(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    run, table = run_of(recipe), to_table(recipe)
    del table["train"]["optimizer"], table["engine"]
    run.write_recipe(table)
    assert recipe_changes(table_of(run), to_table(recipe)) == []


def test_what_the_machine_needs_may_change_and_is_shown(tmp_path: Path) -> None:
    before = to_table(recipe_of(tmp_path))
    now = changed(
        before, engine__zero=3, engine__tokens_per_device=99, checkpoint__keep=7, eval__at_start=False,
        samples__from_eval=2, log__trackers=["tensorboard"], output__merge=True,
    )  # fmt: skip
    assert [str(c) for c in recipe_changes(before, now)] == [
        "engine.zero: 0 -> 3",
        "checkpoint.keep: 2 -> 7",
        "eval.at_start: true -> false",
        "samples.from_eval: 0 -> 2",
        "log.trackers: [] -> ['tensorboard']",
        "output.merge: false -> true",
        "engine.tokens_per_device: not given -> 99",
    ]


def test_all_else_is_an_error_that_lists_every_difference(tmp_path: Path) -> None:
    before = to_table(recipe_of(tmp_path))
    now = changed(before, train__learning_rate=1e-3, loss__beta=0.5, model__dtype="bfloat16", engine__zero=1)
    now["model"]["lora"] = {"rank": 8}
    with pytest.raises(RecipeError, match="is not the one that the run began with") as caught:
        recipe_changes(before, now)
    assert caught.value.what.splitlines()[1:] == [
        "  loss.beta: 0.1 -> 0.5",
        '  model.dtype: "float32" -> "bfloat16"',
        "  train.learning_rate: 1e-05 -> 0.001",
        "  model.lora.rank: not given -> 8",
    ]
    assert "engine.zero" not in str(caught.value) and "alignzoo export" in caught.value.fix


SCHEDULES = [
    ("constant", {}, True), ("constant_with_warmup", {"train__warmup_steps": 3}, True),
    ("inverse_sqrt", {"train__warmup_steps": 3}, True), ("constant_with_warmup", {}, False), ("cosine", {}, False),
    ("linear", {"train__warmup_steps": 3}, False),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "more", "may"), SCHEDULES)
@pytest.mark.parametrize(("key", "old", "new"), [("epochs", 1, 2), ("max_steps", 10, 20), ("max_steps", 10, None)])
def test_a_run_may_become_longer_where_no_rate_depends_on_it(
    tmp_path: Path, schedule: str, more: dict[str, Any], may: bool, key: str, old: int, new: int | None
) -> None:
    before = changed(to_table(recipe_of(tmp_path)), train__lr_scheduler=schedule, **more, **{f"train__{key}": old})
    now = changed(before, **{f"train__{key}": new})
    if may:
        assert recipe_changes(before, now) == [Change(f"train.{key}", old, ABSENT if new is None else new)]
    else:
        with pytest.raises(RecipeError, match="other schedules depend on the total"):
            recipe_changes(before, now)
    with pytest.raises(RecipeError):  # shorter it never becomes
        recipe_changes(now, before)


def test_the_schedules_said_to_be_free_of_the_total_are(tmp_path: Path) -> None:
    import torch

    from alignzoo.optim import make_schedule

    def rates(name: str, more: Mapping[str, Any], total: int) -> list[float]:
        settings = {"train.lr_scheduler": name} | {k.replace("__", "."): v for k, v in more.items()}
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        schedule = make_schedule(recipe_of(tmp_path, settings), optimizer, total)
        found = []
        for _ in range(8):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found

    for name, more, may in SCHEDULES:
        assert (rates(name, more, 12) == rates(name, more, 100)) == may, name


# --- the same data, start model and plugin ---------------------------------------------------------------------------

MADE_FROM: dict[str, Any] = {
    "data": {"train: a.jsonl": "1", "eval: b.jsonl": "2"}, "weights": {"model.safetensors": "3"},
    "plugins": [{"loss": "dpo", "distribution": "alignzoo", "version": "0.1", "label": "builtin"}],
    "alignzoo": "0.1", "python": "CPython 3.11", "versions": {"torch": "2.13"},
}  # fmt: skip
PLUGIN = MADE_FROM["plugins"][0]


def inputs(**changes: Any) -> dict[str, Any]:
    return {**MADE_FROM, **changes}


def test_the_same_inputs_say_nothing() -> None:
    said: list[str] = []
    check_inputs(MADE_FROM, copy.deepcopy(MADE_FROM), said.append)
    assert said == []


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"data": {"train: a.jsonl": "1", "eval: b.jsonl": "x"}}, DataError, r"began with: eval: b\.jsonl$"),
        ({"data": {"train: a.jsonl": "1"}}, DataError, r"eval: b\.jsonl \(no longer used\)$"),
        ({"data": {**MADE_FROM["data"], "train: c": "1"}}, DataError, r"train: c \(new\)$"),
        ({"weights": {"model.safetensors": "x"}}, ModelError, r"began with: model\.safetensors$"),
        ({"plugins": [{**PLUGIN, "distribution": "other"}]}, PluginError, r"alignzoo 0\.1, and now comes from other"),
    ],
)
def test_other_inputs_are_named(changes: dict[str, Any], error: type[AlignzooError], words: str) -> None:
    with pytest.raises(error) as caught:
        check_inputs(MADE_FROM, inputs(**changes), print)
    assert re.search(words, caught.value.what)


def test_a_changed_plugin_file_is_refused_and_another_version_said() -> None:
    file = {**PLUGIN, "distribution": "file", "version": "sha256:aa"}
    check_inputs(inputs(plugins=[file]), inputs(plugins=[dict(file)]), print)
    with pytest.raises(PluginError, match=r"sha256:aa -> sha256:bb[\s\S]*plugins/"):
        check_inputs(inputs(plugins=[file]), inputs(plugins=[{**file, "version": "sha256:bb"}]), print)
    said: list[str] = []
    check_inputs(MADE_FROM, inputs(plugins=[{**PLUGIN, "version": "0.2"}]), said.append)
    assert said == ['WARNING: the plugin of the loss "dpo" is alignzoo 0.2, the run began with 0.1']


def test_what_cannot_be_compared_is_said() -> None:
    said: list[str] = []
    python = [{**PLUGIN, "distribution": "python", "version": ""}]
    check_inputs(inputs(weights={}, plugins=python), inputs(plugins=python), said.append)
    assert [("start model" in s, "comes from Python" in s) for s in said] == [(True, False), (False, True)]


def test_other_versions_of_libraries_are_said() -> None:
    said: list[str] = []
    check_inputs(MADE_FROM, inputs(versions={"torch": "2.14", "triton": "3"}, alignzoo="0.2"), said.append)
    assert said[0].endswith("rounding: alignzoo 0.1 -> 0.2, torch 2.13 -> 2.14, triton absent -> 3")


# --- the directory made ready ----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return run_of(recipe_of(tmp_path))


def test_lines_after_the_checkpoint_are_cut(run: RunDir) -> None:
    run.append_metrics({"step": 1})
    size = run.sync_metrics()
    first = (run.path / "metrics.jsonl").read_bytes()
    assert size == len(first)
    run.append_metrics({"step": 2})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "lo')
    said: list[str] = []
    make_ready(run, size, said.append)
    assert (run.path / "metrics.jsonl").read_bytes() == first
    assert said == ["metrics.jsonl: 2 lines after the checkpoint are cut, the run writes them again"]
    make_ready(run, size, said.append)
    assert len(said) == 1
    run.append_metrics({"step": 2})
    assert [r["step"] for r in run.read_metrics()] == [1, 2]


@pytest.mark.parametrize(
    "spoil", [lambda p: p.write_bytes(b'{"step": 1}\n{"s'), Path.unlink, lambda p: p.write_text("x" * 99)]
)
def test_metrics_that_are_not_those_of_the_checkpoint_are_refused(run: RunDir, spoil: Callable[[Path], None]) -> None:
    for step in (1, 2):
        run.append_metrics({"step": step})
    size = run.sync_metrics()
    spoil(run.path / "metrics.jsonl")
    with pytest.raises(AlignzooError, match="not the file that the checkpoint was made with"):
        make_ready(run, size, print)


def test_a_run_without_a_checkpoint_begins_with_an_empty_file(run: RunDir) -> None:
    make_ready(run, 0, print)
    assert run.sync_metrics() == 0
    run.append_metrics({"step": 1})
    make_ready(run, 0, print)
    assert run.read_metrics() == []


def test_an_end_that_was_begun_is_taken_back(run: RunDir) -> None:
    for name in ("model", "adapter", "plugins"):
        (run.path / name).mkdir()
    said: list[str] = []
    make_ready(run, 0, said.append)
    assert not (run.path / "model").exists() and not (run.path / "adapter").exists() and (run.path / "plugins").exists()
    assert len(said) == 2


def test_a_resume_is_noted(run: RunDir) -> None:
    before = json.loads((run.path / "manifest.json").read_text())
    table = changed(table_of(run), engine__zero=2)
    for step in (4, 6):
        changes = recipe_changes(table_of(run), table)
        note_resume(run, step=step, command=["alignzoo", "run"], table=table, changes=changes)
    after = json.loads((run.path / "manifest.json").read_text())
    resumed = after.pop("resumed")
    assert after == before
    assert [(r["step"], r["changes"]) for r in resumed] == [(4, ["engine.zero: 0 -> 2"]), (6, [])]
    assert load_recipe(run.path / "recipe.toml").engine.zero == 2
