"""The reference's log-probs kept on disk: what a run finds again, and that it changes nothing."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_helpers import LINE, PLAIN, apart, cache, counts, recipe_file, records, run, weights, write_rows
from conftest import tiny_llama
from rich.console import Console
from transformers import AutoTokenizer

import alignzoo
from alignzoo import hashes, precompute, refstore
from alignzoo.errors import RecipeError, RunError
from alignzoo.fingerprint import fingerprint_of_files, fingerprint_of_model
from alignzoo.model import add_adapter, locate
from alignzoo.once import joined
from alignzoo.recipe import LoRA, load_recipe
from alignzoo.reference import plan_reference
from alignzoo.tree import Tree

# --- the same training


@pytest.mark.parametrize(
    "sets",
    [
        ("loss.name=dpo",), ("loss.name=ipo",), ("loss.name=kto", "train.learning_rate=0.3"),
        ("loss.name=dpo", "model.lora={rank=4}", "output.merge=true", "train.learning_rate=1"),
    ],
    ids=["dpo", "ipo", "kto", "lora"],
)  # fmt: skip
def test_the_cached_run_is_the_live_run(recipe_file: Path, tiny_folder: Path, sets: tuple[str, ...]) -> None:
    live, said = run(recipe_file, *sets, "reference.mode=live")
    assert not LINE.search(said)
    mode = "reference.mode=cache" if "lora" in str(sets) else "reference.mode=auto"
    for first in (True, False):
        cached, said = run(recipe_file, *sets, mode)
        found, all_of_them, computed = counts(said)
        assert (found, computed) == ((0, all_of_them) if first else (all_of_them, 0))
        assert apart(cached.model_path, live.model_path, tiny_folder) < 1e-5
        ours, theirs = records(cached), records(live)
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() - other.keys() <= {"reference/drift", "reference/drift_mean"}
            for name in other.keys() - {"tokens_per_second", "memory", "eval_runtime"}:
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name
        assert [n for n, r in enumerate(ours) if "reference/drift" in r] == [1]
        assert ours[1]["reference/drift_mean"] <= ours[1]["reference/drift"] < 1e-4


def test_a_model_of_its_own_is_loaded_for_what_is_missing_only(
    recipe_file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tiny_llama(seed=3, vocabulary=weights_vocabulary(tiny_folder)).save_pretrained(other)
    live, _ = run(recipe_file, f"reference.path={other}", "reference.mode=live")
    own, _ = run(recipe_file, "reference.mode=live")
    assert apart(own.model_path, live.model_path, tiny_folder) > 0.01
    first, said = run(recipe_file, f"reference.path={other}")
    assert "loading the reference" in said
    second, again = run(recipe_file, f"reference.path={other}", "loss.name=ipo")
    assert "loading the reference" not in again
    assert counts(again) == (counts(said)[1], counts(said)[1], 0)
    assert apart(first.model_path, live.model_path, tiny_folder) < 1e-5
    assert "reference/drift" not in records(first)[1]  # the policy is another model
    assert second.run_dir != first.run_dir


def weights_vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def alone(recipe: Path, *words: str, cache: Path, wait: bool = True) -> Any:
    """A run in processes of its own."""
    sets = [word for text in PLAIN for word in ("--set", text)]
    command = [sys.executable, "-m", "alignzoo", "run", str(recipe), *sets, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ALIGNZOO_CACHE": str(cache), "COLUMNS": "300"}
    started = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=recipe.parent
    )
    return finished(started) if wait else started


def finished(process: subprocess.Popen[str]) -> str:
    try:
        said = process.communicate(timeout=240)[0]
    finally:
        process.kill()
    assert process.returncode == 0, said
    return said


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("loss", "zero"),
    [("kto", 0), pytest.param("dpo", 3, marks=pytest.mark.slow), pytest.param("dpo", 0, marks=pytest.mark.slow)],
)
def test_two_ranks_fill_one_table(
    loss: str, zero: int, recipe_file: Path, tiny_folder: Path, cache: Path, tmp_path: Path
) -> None:
    rate = "train.learning_rate=0.3" if loss == "kto" else "train.learning_rate=0.1"
    live, _ = run(recipe_file, f"loss.name={loss}", rate, "reference.mode=live")
    words = ("--processes", "2", "--set", f"engine.zero={zero}", "--set", f"loss.name={loss}", "--set", rate)
    said = alone(recipe_file, *words, "--set", "log.run_name=two", cache=cache)
    assert counts(said)[0] == 0
    assert apart(tmp_path / "runs/two/model", live.model_path, tiny_folder) < 1e-5
    one, said = run(recipe_file, f"loss.name={loss}", rate)
    assert counts(said)[2] == 0
    assert apart(one.model_path, live.model_path, tiny_folder) < 1e-5


# --- what is found again


def test_what_is_no_part_of_the_key(recipe_file: Path, tmp_path: Path, tiny_folder: Path) -> None:
    """Another loss, rate, seed, batch, output and place of the model: nothing is computed."""
    _, said = run(recipe_file)
    everything = counts(said)[1]
    assert everything == 2 * (8 + 3)
    moved = tmp_path / "moved"
    shutil.copytree(tiny_folder, moved)
    elsewhere = tmp_path / "elsewhere"
    changes = ("loss.name=ipo", "train.learning_rate=1e-4", "train.seed=7", "train.batch_size=3",
               f"output.dir={elsewhere}", "engine.tokens_per_device=300", f"model.path={moved}")  # fmt: skip
    _, said = run(recipe_file, *changes)
    assert counts(said) == (everything, everything, 0)


def test_only_new_rows_are_computed(recipe_file: Path, tmp_path: Path) -> None:
    run(recipe_file)
    write_rows(tmp_path, 11, 2)
    _, said = run(recipe_file)
    assert counts(said) == (2 * (8 + 2), 2 * (11 + 2), 2 * 3)


def test_rows_that_are_not_trained_on_are_not_computed(recipe_file: Path) -> None:
    _, said = run(recipe_file, "train.max_steps=1")
    assert counts(said)[1] == 2 * (4 + 3)


def test_the_mismatched_completions_are_kept_too(recipe_file: Path) -> None:
    """KTO takes each pair as two labelled rows; the completions themselves are those of DPO."""
    run(recipe_file)
    _, said = run(recipe_file, "loss.name=kto")
    found, everything, computed = counts(said)
    assert found == 2 * (8 + 3) < everything
    assert computed == everything - found
    _, said = run(recipe_file, "loss.name=kto", "train.seed=3")
    assert counts(said)[2] == 0


def test_a_prompt_is_forwarded_once_for_its_completions(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both rows that a pair is made into, and the answers to other prompts that they are compared with."""
    made: list[list[Tree]] = []

    def spy(*args: Any, **options: Any) -> list[Tree]:
        made.append(joined(*args, **options))
        return made[-1]

    monkeypatch.setattr("alignzoo.precompute.joined", spy)
    _, said = run(recipe_file, "loss.name=kto")
    trees = made[0]
    assert len({tree.prompt.tobytes() for tree in trees}) == len(trees) == 8 + 3
    assert sum(len(tree.completions) for tree in trees) == counts(said)[2] > 3 * len(trees)


def test_other_weights_types_and_precisions_are_computed_again(
    recipe_file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tiny_llama(seed=5, vocabulary=weights_vocabulary(tiny_folder)).save_pretrained(other)
    short = "train.max_steps=1"
    for change in ("log.every_steps=1", f"model.path={other}", "model.dtype=bfloat16", "engine.precision=bf16",
                   "model.attention=eager"):  # fmt: skip
        _, said = run(recipe_file, short, change)
        assert counts(said)[0] == 0, change
        _, said = run(recipe_file, short, change)
        assert counts(said)[2] == 0, change
        assert not torch.is_autocast_enabled("cpu"), change


def test_a_model_from_python_is_told_by_its_weights(recipe_file: Path, tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    found = []
    for seed in (0, 0, 1):
        model = tiny_llama(seed=seed, vocabulary=len(tokenizer))
        _, said = run(recipe_file, "train.max_steps=1", model=model, tokenizer=tokenizer)
        found.append(counts(said)[2] > 0)
    assert found == [True, False, True]


def test_the_fingerprint_is_of_the_content(tiny_folder: Path, tmp_path: Path) -> None:
    def of(folder: Path) -> str | None:
        return fingerprint_of_files(locate(str(folder)))

    copied, changed = tmp_path / "a", tmp_path / "b"
    shutil.copytree(tiny_folder, copied)
    shutil.copytree(tiny_folder, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert of(tiny_folder) == of(copied) != of(changed)
    (copied / "config.json").write_text(json.dumps(config | {"transformers_version": "0.0", "_name_or_path": "x"}))
    assert of(tiny_folder) == of(copied)
    adapter = tmp_path / "adapter"
    made = add_adapter(tiny_llama(vocabulary=config["vocab_size"]), LoRA(rank=2), quantised=False)
    made.save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    prints = []
    for change in ({}, {"lora_alpha": 99}):
        new = settings | {"base_model_name_or_path": str(tiny_folder)} | change
        (adapter / "adapter_config.json").write_text(json.dumps(new))
        prints.append(of(adapter))
    assert len({*prints, of(tiny_folder)}) == 3


def test_the_fingerprint_of_a_model_in_memory() -> None:
    model = tiny_llama()
    before = fingerprint_of_model(model)
    assert before == fingerprint_of_model(tiny_llama())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert fingerprint_of_model(model) != before
    assert fingerprint_of_model(tiny_llama().bfloat16()) != before


def test_a_large_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = hashes.hash_file
    monkeypatch.setattr(hashes, "hash_file", lambda path: read.append(path) or real(path))
    monkeypatch.setattr(hashes, "SMALL", 10)
    monkeypatch.setattr(hashes, "_YOUNG", -1e9)
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"a" * 100)
    first = hashes.remembered_hash(file)
    assert hashes.remembered_hash(file) == first == real(file)
    assert len(read) == 1
    times = file.stat()
    file.write_bytes(b"b" * 100)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps dates
    assert hashes.remembered_hash(file) == real(file) != first
    (tmp_path / "cache" / hashes.FILE).write_bytes(b"no database at all, just text" * 100)
    assert hashes.remembered_hash(file) == real(file)


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "SMALL", 10)
    read: list[Path] = []
    real = hashes.hash_file
    monkeypatch.setattr(hashes, "hash_file", lambda path: read.append(path) or real(path))
    (tmp_path / "w").write_bytes(b"a" * 100)
    for _ in range(2):
        hashes.remembered_hash(tmp_path / "w")
    assert len(read) == 2


# --- which reference


def test_the_plan_in_words() -> None:
    def plan(**tables: Any) -> tuple[str, str]:
        table: dict[str, Any] = {
            "loss": {"name": "dpo"}, "model": {"path": "a/model"}, "data": {"train": "x"},
            "train": {"learning_rate": 1e-5},
        }  # fmt: skip
        for name, value in tables.items():
            table[name] = table.get(name, {}) | value
        from alignzoo_losses.dpo import DPO

        found = plan_reference(load_recipe(table), DPO())
        return found.kind, found.words

    assert plan()[0] == "cached"
    assert "the start model a/model" in plan()[1]
    assert plan(reference={"mode": "cache"})[0] == "cached"
    assert plan(reference={"mode": "live"}) == ("frozen", "a frozen copy of the start model a/model")
    assert plan(reference={"path": "b/model"})[0] == "cached"
    assert plan(reference={"path": "b/model", "mode": "live"}) == ("frozen", "a frozen model of its own: b/model")
    assert plan(reference={"sync_every_steps": 5})[0] == "frozen"
    assert plan(model={"lora": {}})[0] == "adapter_off"
    assert plan(model={"lora": {}}, reference={"mode": "cache"})[0] == "cached"
    assert plan(model={"lora": {}}, reference={"path": "b/model"})[0] == "cached"
    with pytest.raises(RecipeError, match="nothing of it can be kept"):
        plan(reference={"sync_every_steps": 5, "mode": "cache"})


# --- several at once, and one that is killed


@pytest.mark.xdist_group("ranks")
def test_two_runs_fill_the_same_store(recipe_file: Path, cache: Path, tmp_path: Path) -> None:
    small = ("--set", "engine.tokens_per_device=150")
    started = [alone(recipe_file, *small, "--set", f"log.run_name={i}", cache=cache, wait=False) for i in range(2)]
    said = [finished(process) for process in started]
    assert all(counts(text)[1] == 22 for text in said)
    assert sum(counts(text)[2] for text in said) >= 22
    assert torch.allclose(weights(tmp_path / "runs/0/model"), weights(tmp_path / "runs/1/model"), atol=1e-6)
    assert counts(run(recipe_file)[1]) == (22, 22, 0)


def test_a_second_run_shares_the_work_of_the_first(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another one fills, it begins at the other end, and takes what is there by then."""
    run(recipe_file)
    (path,) = refstore.reference_folder().glob("*.sqlite")
    (kept,) = refstore.kept_references()
    with sqlite3.connect(path) as db:
        rows = db.execute("SELECT key, length, checksum, logps FROM rows").fetchall()
        db.execute("DELETE FROM rows")
    db.close()
    score, calls = precompute.Precompute._score, list[int]()

    def with_company(self: Any, how: Any, numbers: Any, way: Any) -> Any:
        calls.append(len(numbers))
        if len(calls) == 1:  # meanwhile the other run has written all
            with sqlite3.connect(path) as db:
                db.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", rows)
            db.close()
        return score(self, how, numbers, way)

    monkeypatch.setattr(precompute.Precompute, "_score", with_company)
    with refstore._held(path.with_suffix(".filling")):
        _, said = run(recipe_file, "engine.tokens_per_device=100", "reference.mode=cache")
    assert kept.rows == 22
    assert "the work is shared" in said
    assert 0 < counts(said)[2] == calls[0] < 22
    assert len(calls) == 2  # the other call is for the drift


@pytest.mark.xdist_group("ranks")
def test_a_fill_that_is_killed_goes_on_where_it_was(recipe_file: Path, cache: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from alignzoo import precompute\n"
        "import alignzoo\n"
        "from alignzoo.recipe import load_recipe\n"
        "score, calls = precompute.Precompute._score, []\n"
        "def deadly(self, *rest):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return score(self, *rest)\n"
        "precompute.Precompute._score = deadly\n"
        "alignzoo.run(load_recipe(sys.argv[1], ['engine.tokens_per_device=100']))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, str(recipe_file)], env=environment, timeout=240)
    assert done.returncode == -signal.SIGKILL
    _, said = run(recipe_file)
    found, everything, computed = counts(said)
    assert 0 < found < everything == 22
    assert computed == everything - found
    assert "damaged" not in said


def test_a_resumed_run_needs_no_cache_from_before(
    recipe_file: Path, tiny_folder: Path, cache: Path, tmp_path: Path
) -> None:
    """The policy has moved when it goes on: the reference still is the start model, and no drift is looked for."""
    whole, _ = run(recipe_file, "checkpoint.every_steps=1", "eval.at_start=false")
    first = tmp_path / "first"
    shutil.move(whole.model_path, first)
    (whole.run_dir / "summary.json").unlink()  # as if it had been killed
    shutil.rmtree(cache / "reference")
    console = Console(file=io.StringIO(), width=300)
    recipe = load_recipe(recipe_file, [*PLAIN, "checkpoint.every_steps=1", "eval.at_start=false"])
    again = alignzoo.run(recipe, console=console, resume=whole.run_dir / "checkpoints/step-1")
    found, everything, computed = counts(console.file.getvalue())  # type: ignore[attr-defined]
    assert (found, everything) == (0, computed) == (0, 2 * (4 + 3))
    assert apart(again.model_path, first, tiny_folder) < 1e-5


# --- drift


def test_log_probs_of_something_else(recipe_file: Path, tiny_folder: Path, cache: Path) -> None:
    """A store that says it is of this reference, and is not: auto computes all again, cache stops."""
    live, _ = run(recipe_file, "reference.mode=live")
    run(recipe_file)
    (path,) = (cache / "reference").glob("*.sqlite")

    def spoil() -> None:
        with sqlite3.connect(path) as db:
            for key, length, content in db.execute("SELECT key, length, logps FROM rows").fetchall():
                wrong = np.frombuffer(content, "<f4") - 0.01
                db.execute(
                    "UPDATE rows SET checksum = ?, logps = ? WHERE key = ?", (*refstore._packed(key, wrong)[2:], key)
                )
                assert len(wrong) == length
        db.close()

    spoil()
    with pytest.raises(RunError, match=r"(?s)0\.01 nats.*cache clear"):
        run(recipe_file, "reference.mode=cache")
    result, said = run(recipe_file)
    assert "computed again" in said
    assert apart(result.model_path, live.model_path, tiny_folder) < 1e-5
    assert records(result)[1]["reference/drift"] < 1e-4
    result, said = run(recipe_file, "reference.mode=cache")
    assert counts(said)[2] == 0
