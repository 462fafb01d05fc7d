"""`alignzoo lm-eval`: the words that the harness is started with, its results, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from runs_helpers import write_recipe

import alignzoo
from alignzoo import lmeval
from alignzoo.cli import cli
from alignzoo.errors import AlignzooError
from alignzoo.model import Location

FAKE = """#!{python}
import json, os, pathlib, sys
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--output_path") + 1])
if not os.environ.get("FAKE_SILENT"):
    (out / "model").mkdir()
    (out / "model" / "results_now.json").write_text(json.dumps(words))
sys.exit(int(os.environ.get("FAKE_CODE", "0")))
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An lm_eval on PATH that writes down its words."""
    file = tmp_path / "bin/lm_eval"
    file.parent.mkdir()
    file.write_text(FAKE.format(python=sys.executable))
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(file.parent))
    return file


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for name, changes in (("full", {}), ("lora", {"model__lora": {}, "model__dtype": "bfloat16"})):
        recipe = write_recipe(folder / name, tiny_folder, name, train__max_steps=1, eval__at_start=False, **changes)
        found[name] = alignzoo.run(recipe, console=Console(file=io.StringIO())).run_dir
    return found


def call(*words: Any) -> Result:
    return CliRunner().invoke(cli, ["lm-eval", *map(str, words)])


def test_a_run_of_all_weights(program: Path, runs: dict[str, Path]) -> None:
    done = call(runs["full"], "--tasks", "a,b", "--limit", "7", "--", "--apply_chat_template", "--batch_size", "4")
    assert done.exit_code == 0, done.output
    (file,) = (runs["full"] / "lm-eval").rglob("results_now.json")
    out = file.parent.parent
    assert json.loads(file.read_text()) == [
        "--model", "hf", "--model_args", f"pretrained={runs['full'] / 'model'},dtype=float32", "--tasks", "a,b",
        "--output_path", str(out), "--limit", "7", "--apply_chat_template", "--batch_size", "4",
    ]  # fmt: skip
    assert f"results: {file}" in done.output and str(program) in done.output
    assert call(runs["full"], "--tasks", "a").exit_code == 0
    assert len(list((runs["full"] / "lm-eval").iterdir())) == 2  # nothing is overwritten


def test_an_adapter_with_its_base(program: Path, runs: dict[str, Path], tiny_folder: Path) -> None:
    assert call(runs["lora"], "--tasks", "a").exit_code == 0
    (file,) = (runs["lora"] / "lm-eval").rglob("results_now.json")
    words = json.loads(file.read_text())
    model = runs["lora"] / "model"
    assert words[3] == f"pretrained={tiny_folder},peft={model},tokenizer={model},dtype=bfloat16"
    assert "--limit" not in words


def test_of_other_places() -> None:
    args = lmeval.model_args(Location("folder", gguf="m.gguf"), "float32", False)
    assert args == "pretrained=folder,gguf_file=m.gguf,dtype=float32"
    args = lmeval.model_args(Location("run/model", base=Location("a/b", revision="main")), "auto", True)
    assert args == (
        "pretrained=a/b,revision=main,peft=run/model,tokenizer=run/model,dtype=auto,trust_remote_code=True"
    )  # fmt: skip
    with pytest.raises(AlignzooError, match="adapter over an adapter"):
        lmeval.model_args(Location("a", base=Location("b", base=Location("c"))), "float32", False)
    with pytest.raises(AlignzooError, match="comma"):
        lmeval.model_args(Location("a,b"), "float32", False)


def test_what_is_refused(
    program: Path, runs: dict[str, Path], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = call(tiny_folder, "--tasks", "a")
    assert none.exit_code == 2 and "no run directory" in none.output
    before = list((runs["lora"] / "lm-eval").iterdir()) if (runs["lora"] / "lm-eval").exists() else []
    monkeypatch.setenv("FAKE_CODE", "3")
    monkeypatch.setenv("FAKE_SILENT", "1")
    failed = call(runs["lora"], "--tasks", "a")
    assert failed.exit_code == 1 and "exit code 3 and wrote no results" in failed.output
    monkeypatch.setenv("FAKE_CODE", "0")
    assert call(runs["lora"], "--tasks", "a").exit_code == 1
    assert list((runs["lora"] / "lm-eval").iterdir()) == before
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(lmeval.importlib.util, "find_spec", lambda name: None)
    absent = call(runs["lora"], "--tasks", "a")
    assert absent.exit_code == 2 and "pip install 'alignzoo[lm-eval]'" in absent.output
    assert list((runs["lora"] / "lm-eval").iterdir()) == before
    monkeypatch.setattr(lmeval.importlib.util, "find_spec", lambda name: object())
    assert lmeval.find_program() == [sys.executable, "-m", "lm_eval"]
