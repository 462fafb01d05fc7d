"""The run directory: nothing is overwritten, nothing is half-written, nothing is lost in silence."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tomllib
import warnings
from datetime import UTC, datetime, timedelta, timezone
from importlib import metadata
from pathlib import Path

import pytest

from alignzoo import rundir
from alignzoo.errors import AlignzooError, PluginError, RecipeError, RunError
from alignzoo.recipe import load_recipe, to_table
from alignzoo.rundir import RunDir, atomic_write, git_revision, hash_file, hash_folder, manifest, nulled, run_name

NOW = datetime(2026, 11, 21, 10, 15, 0)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "runs", "dpo")


def test_modules_import_neither_torch_nor_matplotlib():
    code = (
        "import sys, alignzoo.rundir, alignzoo.report\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize(
    ("recipe", "loss", "name"),
    [
        ("dpo", "dpo", "dpo-20261121-101500"),
        ("shop", "ipo", "shop-ipo-20261121-101500"),
        ("my shop", "lab/ipo", "my-shop-lab-ipo-20261121-101500"),
    ],
)
def test_run_name(recipe, loss, name):
    assert run_name(recipe, loss, NOW) == name


def test_a_taken_name_gets_a_number(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("kept")
    assert [RunDir.create(tmp_path, "a").path.name for _ in range(3)] == ["a-2", "a-3", "a-4"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["mine.txt"]


def test_a_file_of_that_name_is_not_replaced(tmp_path):
    (tmp_path / "a").write_text("kept")
    assert RunDir.create(tmp_path, "a").path.name == "a-2"
    assert (tmp_path / "a").read_text() == "kept"


def test_two_processes_never_share_a_directory(tmp_path):
    code = (
        "import sys, time, pathlib\n"
        "from alignzoo.rundir import RunDir\n"
        "base, go = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])\n"
        "print('ready', flush=True)\n"
        "while not go.exists(): pass\n"
        "print(' '.join(RunDir.create(base, 'dpo').path.name for _ in range(40)))\n"
    )
    go = tmp_path / "go"
    command = [sys.executable, "-c", code, str(tmp_path / "runs"), str(go)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    go.touch()
    names = " ".join(process.communicate(timeout=60)[0] for process in started).split()
    assert len(names) == 80
    assert sorted(names) == sorted(["dpo", *(f"dpo-{n}" for n in range(2, 81))])


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "a\\b", "a\0b"])
def test_a_name_that_is_no_folder_is_refused(tmp_path, name):
    with pytest.raises(AlignzooError, match=r"log\.run_name"):
        RunDir.create(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def test_a_base_that_is_a_file_names_the_way_out(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(AlignzooError, match=r"output\.dir") as caught:
        RunDir.create(tmp_path / "runs", "a")
    assert str(tmp_path / "runs") in caught.value.what and caught.value.exit_code == 2


def test_an_unwritable_base_names_the_way_out(tmp_path, monkeypatch):
    def refuse(self: Path, *words: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(AlignzooError, match=r"Permission denied[\s\S]*output\.dir"):
        RunDir.create(tmp_path, "a")


def test_json_is_strict_and_names_the_keys(run):
    run.write_json("ok.json", {"a": [1, 2.5, "ü"], "b": None})
    assert json.loads((run.path / "ok.json").read_text("utf-8")) == {"a": [1, 2.5, "ü"], "b": None}
    assert "ü" in (run.path / "ok.json").read_text("utf-8")
    with pytest.raises(RunError, match=r"a\.b\.1, c"):
        run.write_json("bad.json", {"a": {"b": [1.0, math.nan]}, "c": math.inf})
    assert [p.name for p in run.path.iterdir()] == ["ok.json"]


def test_nulled_says_which_keys():
    data = {"a": {"b": (1.0, math.nan)}, "c": -math.inf, "d": "nan", "e": True}
    assert nulled(data) == ({"a": {"b": [1.0, None]}, "c": None, "d": "nan", "e": True}, ["a.b.1", "c"])
    assert math.isnan(data["a"]["b"][1])  # type: ignore[index]


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(run, monkeypatch):
    run.write_text("a.txt", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rundir.os, "fsync", full)
    with pytest.raises(AlignzooError, match="No space left"):
        run.write_text("a.txt", "new")
    assert (run.path / "a.txt").read_text() == "old"
    assert [p.name for p in run.path.iterdir()] == ["a.txt"]


def test_a_reader_never_sees_half_a_file(run, monkeypatch):
    run.write_text("a.txt", "old")
    seen = []
    monkeypatch.setattr(rundir.os, "fsync", lambda _: seen.append((run.path / "a.txt").read_text()))
    with (run.path / "a.txt").open() as early:
        run.write_text("a.txt", "new")
        assert early.read() == "old"
    assert seen == ["old"] and (run.path / "a.txt").read_text() == "new"


def test_text_is_written_as_it_is_and_folders_are_made(run):
    path = run.write_text("deep/er/a.txt", "a\r\nb\n")
    assert path.read_bytes() == b"a\r\nb\n"


def test_a_file_is_as_readable_as_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        assert atomic_write(tmp_path / "a", b"").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_metrics_come_back_as_they_went(run):
    records = [{"step": 1, "epoch": 0.1, "loss": 0.1 + 0.2}, {"step": 1, "eval_loss": 1e-300, "note": "ü\n"}]
    assert run.read_metrics() == []
    for number, record in enumerate(records, start=1):
        run.append_metrics(record)
        assert len((run.path / "metrics.jsonl").read_bytes().splitlines()) == number
    assert run.read_metrics() == records


def test_a_non_finite_metric_is_null_and_named(run):
    run.append_metrics({"step": 1, "grad_norm": math.inf, "kl/chosen": math.nan, "loss": 1.0})
    assert run.read_metrics() == [
        {"step": 1, "grad_norm": None, "kl/chosen": None, "loss": 1.0, "non_finite": "grad_norm=inf, kl/chosen=nan"}
    ]


@pytest.mark.parametrize("kept", range(1, 20))
def test_a_cut_last_line_is_left_out_with_a_warning(run, kept):
    run.append_metrics({"step": 1})
    line = '{"step": 2, "x": "ü"}'.encode()
    path = run.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + line[:kept])
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:2: cut"):
        assert run.read_metrics() == [{"step": 1}]


def test_a_run_that_goes_on_does_not_lose_its_first_line_to_the_cut_one(run):
    run.append_metrics({"step": 1})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "lo')
    run.append_metrics({"step": 2})
    run.append_metrics({"step": 3})
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:2: cut") as caught:
        assert run.read_metrics() == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert len(caught) == 1


def test_a_whole_last_line_without_its_end_counts(run):
    (run.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run.read_metrics() == [{"step": 1}, {"step": 2}]


def test_the_recipe_reads_back_as_the_same(run, tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    file = tmp_path / "mine.toml"
    file.write_text(
        '[loss]\nname = "dpo"\nbeta = 0.05\n[model]\npath = "some/model"\nlora = {rank = 8}\n'
        '[data]\ntrain = [{path = "train.jsonl", weight = 0.5, columns = {chosen = "good one"}}]\neval_fraction = 0.1\n'
        'chat_template_kwargs = {enable_thinking = false}\nsystem = """two\nlines \\"quoted\\" ü"""\n'
        "[train]\nlearning_rate = 5e-7\nadam_betas = [0.9, 0.95]\n"
    )
    recipe = load_recipe(file, ["train.seed=7", "log.trackers=['tensorboard']"])
    path = run.write_recipe(to_table(recipe))
    assert load_recipe(path) == recipe
    assert tomllib.loads(path.read_text("utf-8"))["train"]["seed"] == 7
    assert load_recipe(path) != load_recipe(file)  # equality does see a changed seed


def test_a_null_in_a_recipe_is_an_error(run):
    with pytest.raises(RecipeError, match="no null"):
        run.write_recipe({"data": {"chat_template_kwargs": {"a": None}}})


def test_the_manifest_holds_what_the_run_was_made_from(run, tmp_path):
    started = datetime(2026, 11, 21, 10, 15, tzinfo=timezone(timedelta(hours=2)))
    found = manifest(
        command=["alignzoo", "run", "dpo.toml"],
        seed=7,
        started=started,
        plugins=[{"distribution": "alignzoo", "version": "0.1.0"}],
        data={"train.jsonl": "ab"},
        weights={"model": "cd"},
        recipe_folder=tmp_path,
    )
    assert found["command"] == ["alignzoo", "run", "dpo.toml"] and found["seed"] == 7
    assert found["started"] == "2026-11-21T08:15:00+00:00"
    assert found["data"] == {"train.jsonl": "ab"} and found["weights"] == {"model": "cd"}
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["git"]["recipe"] is None
    run.write_json("manifest.json", found)


def test_the_manifest_tells_nothing_of_the_machine_or_its_owner(monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "my-secret-host")
    monkeypatch.setenv("SOME_API_TOKEN", "hunter2-in-the-environment")
    text = json.dumps(manifest(command=[], seed=0, started=datetime.now(UTC)))
    assert "hunter2" not in text and "my-secret-host" not in text and str(Path.cwd()) not in text
    assert set(json.loads(text)) == {
        "command", "started", "seed", "alignzoo", "python", "platform", "versions", "plugins", "data", "weights",
        "live", "git",
    }  # fmt: skip


def test_absent_distributions_are_left_out():
    found = rundir.versions(("pluggy", "alignzoo-is-not-this"))
    assert found == {"pluggy": metadata.version("pluggy")}


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.toml").write_text("1")
    git(tmp_path, "add", "a.toml")
    git(tmp_path, "commit", "-qm", "one")
    return tmp_path


def test_git_revision_and_dirt(repository):
    head = git(repository, "rev-parse", "HEAD")
    (repository / "untracked").write_text("")
    assert git_revision(repository) == {"revision": head, "dirty": False}
    (repository / "a.toml").write_text("2")
    assert git_revision(repository) == {"revision": head, "dirty": True}


def test_git_variables_of_the_caller_do_not_mislead(repository, tmp_path_factory, monkeypatch):
    outside = tmp_path_factory.mktemp("outside")
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    assert git_revision(outside) is None


def test_no_git_is_no_failure(tmp_path, repository, monkeypatch):
    assert git_revision(tmp_path / "absent") is None

    def slow(*words: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("git", 5)

    with monkeypatch.context() as patch:
        patch.setattr(rundir.subprocess, "run", slow)
        assert git_revision(repository) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(repository) is None


def test_a_repository_without_a_commit(tmp_path):
    git(tmp_path, "init", "-q")
    assert git_revision(tmp_path) is None


def test_hash_file(tmp_path):
    content = b"0123456789" * 100_000
    (tmp_path / "a").write_bytes(content)
    assert hash_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    with pytest.raises(AlignzooError, match="absent"):
        hash_file(tmp_path / "absent")


def test_hash_folder_is_of_names_and_contents_not_of_the_place(tmp_path):
    def make(name: str, files: dict[str, str]) -> str:
        for file, content in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(content)
        return hash_folder(tmp_path / name, ("*.bin", "sub/*.bin", "**/*.bin"))

    one = make("one", {"a.bin": "1", "sub/b.bin": "2", "notes.txt": "x"})
    assert make("two", {"sub/b.bin": "2", "a.bin": "1", "notes.txt": "y"}) == one
    others = [
        make("three", {"a.bin": "2", "sub/b.bin": "1"}),
        make("four", {"a.bin": "1", "b.bin": "2"}),
        make("five", {"a.bin": "1"}),
    ]
    assert len({one, *others}) == 4


def test_hash_of_no_file_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(AlignzooError, match=r"\*\.safetensors"):
        hash_folder(tmp_path, ("*.safetensors",))


def test_plugins_are_copied_and_kept_apart(run, tmp_path):
    for folder, content in (("x", "one"), ("y", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ipo2.py").write_text(content)
    copies = [run.copy_plugin(tmp_path / folder / "ipo2.py") for folder in ("x", "y", "x", "y")]
    plugins = run.path / "plugins"
    assert copies == [plugins / name for name in ("ipo2.py", "ipo2-2.py", "ipo2.py", "ipo2-2.py")]
    assert [copy.read_text() for copy in copies] == ["one", "two", "one", "two"]
    with pytest.raises(PluginError, match=r"absent\.py"):
        run.copy_plugin(tmp_path / "absent.py")
