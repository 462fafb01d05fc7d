"""The reference's log-probs kept on disk: what a run finds again, that it changes nothing, and what may go wrong."""

from __future__ import annotations

import io
import json
import os
import re
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
from click.testing import CliRunner
from conftest import REPO, tiny_llama
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignzoo
from alignzoo import hashes, precompute, refstore
from alignzoo.cli import cli
from alignzoo.errors import RecipeError, RunError
from alignzoo.fingerprint import fingerprint_of_files, fingerprint_of_model
from alignzoo.model import add_adapter, locate
from alignzoo.recipe import LoRA, load_recipe
from alignzoo.reference import plan_reference
from alignzoo.refstore import Identity, ReferenceStore, row_key

LINE = re.compile(
    r"reference log-probs: (\d+) of (\d+) completions from the cache, (\d+) computed in [\d.]+ s \((.*)\)"
)
PLAIN = ("train.optimizer=sgd", "train.max_grad_norm=0", "train.lr_scheduler=constant", "samples.from_eval=0")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def recipe_file(tiny_folder: Path, tmp_path: Path) -> Path:
    """A recipe on the tiny model: 8 training and 3 held-out rows, two steps."""
    write_rows(tmp_path, 8, 3)
    (tmp_path / "dpo.toml").write_text(
        f'[loss]\nname = "dpo"\n[model]\npath = "{tiny_folder}"\n[data]\ntrain = "train.jsonl"\neval = "eval.jsonl"\n'
        f'[train]\nlearning_rate = 0.1\nbatch_size = 4\nwarmup_ratio = 0.0\n[output]\ndir = "{tmp_path / "runs"}"\n'
        '[engine]\ndevice = "cpu"\n'
    )
    return tmp_path / "dpo.toml"


def write_rows(folder: Path, train: int, held_out: int) -> None:
    for name, count in (("train", train), ("eval", held_out)):
        lines = (REPO / f"recipes/data/shop_{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(recipe: Path, *sets: str, **live: Any) -> tuple[Any, str]:
    """A run, and what it said."""
    console = Console(file=io.StringIO(), width=300)
    result = alignzoo.run(load_recipe(recipe, [*PLAIN, *sets]), console=console, **live)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def counts(said: str) -> tuple[int, int, int]:
    """Completions from the cache, all of them, computed."""
    found = LINE.findall(said)
    assert len(found) == 1, said
    return int(found[0][0]), int(found[0][1]), int(found[0][2])


def weights(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def apart(one: Path, other: Path, start: Path) -> float:
    """Of two updates, relative L2."""
    a, b, s = weights(one), weights(other), weights(start)
    assert (b - s).norm() / s.norm() > 1e-5
    return float((a - b).norm() / (b - s).norm())


def records(result: Any) -> list[dict[str, float]]:
    return [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]


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


# --- what goes wrong with a file


def store_of(name: str = "one", said: list[str] | None = None) -> ReferenceStore:
    identity = Identity(name, {"precision": "no"}, f"model {name}")
    return ReferenceStore(identity, ([] if said is None else said).append)


def some_rows(n: int, seed: int = 0) -> dict[bytes, Any]:
    rng = np.random.default_rng(seed)
    return {row_key(ids(i, 1), ids(i, 2)): rng.normal(size=3 + i).astype(np.float32) for i in range(n)}


def ids(*tokens: int) -> Any:
    return np.array(tokens, np.int32)


def lengths(rows: dict[bytes, Any]) -> dict[bytes, int]:
    return {key: len(value) for key, value in rows.items()}


def assert_holds(store: ReferenceStore, rows: dict[bytes, Any]) -> None:
    found = store.find(lengths(rows))
    assert found.keys() == rows.keys()
    assert all(np.array_equal(found[key], rows[key]) and found[key].dtype == np.float32 for key in rows)


def test_rows_are_found_again_as_they_were() -> None:
    rows = some_rows(1203)  # more than are asked for at once
    store = store_of()
    store.keep(rows)
    store.close()
    again = store_of()
    assert_holds(again, rows)
    assert again.find({b"x" * 16: 3}) == {}
    assert store_of("two").find(lengths(rows)) == {}
    assert not again.bad


def test_the_key_tells_prompt_from_completion() -> None:
    keys = {
        row_key(ids(1, 2), ids(3)),
        row_key(ids(1), ids(2, 3)),
        row_key(ids(1, 2, 3), ids()),
        row_key(ids(3), ids(1, 2)),
    }
    assert len(keys) == 4
    assert row_key(ids(1), ids(2)) == row_key(ids(1).astype(np.int64), ids(2))


def test_what_is_not_finite_is_not_kept() -> None:
    rows = some_rows(2)
    bad = next(iter(rows))
    rows[bad][1] = np.nan
    store = store_of()
    store.keep(rows)
    assert store.find(lengths(rows)).keys() == rows.keys() - {bad}
    assert not store.bad


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE rows SET logps = substr(logps, 1, length(logps) - 4)",
        "UPDATE rows SET logps = CAST(x'00000000' || substr(logps, 5) AS BLOB)",
        "UPDATE rows SET checksum = checksum + 1",
        "UPDATE rows SET length = length + 1",
        "UPDATE rows SET logps = 'text'",
        "UPDATE rows SET logps = (SELECT logps FROM rows LIMIT 1)",
    ],
)
def test_a_row_that_is_not_as_it_was_written(change: str) -> None:
    rows = some_rows(4)
    store = store_of()
    store.keep(rows)
    path = store.path
    store.close()
    with sqlite3.connect(path) as db:
        db.execute(f"{change} WHERE rowid > 2")
    db.close()
    store = store_of()
    assert len(store.find(lengths(rows))) == 2
    assert store.bad == 2
    store.keep(rows)
    assert_holds(store, rows)


def test_a_row_of_another_length_is_not_taken() -> None:
    rows = some_rows(1)
    store = store_of()
    store.keep(rows)
    assert store.find(dict.fromkeys(rows, 1)) == {}
    assert store.bad == 1


def test_a_run_over_a_damaged_row_says_so_and_is_the_same(recipe_file: Path, cache: Path) -> None:
    first, _ = run(recipe_file)
    (path,) = (cache / "reference").glob("*.sqlite")
    with sqlite3.connect(path) as db:
        db.execute("UPDATE rows SET logps = CAST(x'00000000' || substr(logps, 5) AS BLOB) WHERE rowid <= 3")
    db.close()
    second, said = run(recipe_file)
    assert "3 rows of" in said and "not as they had been written" in said
    assert counts(said)[2] == 3
    assert torch.allclose(weights(second.model_path), weights(first.model_path), atol=1e-6)
    assert counts(run(recipe_file)[1])[2] == 0


@pytest.mark.parametrize("how", ["text", "half", "empty", "middle"])
def test_a_damaged_file_is_begun_anew(how: str) -> None:
    rows, said = some_rows(600), list[str]()
    store = store_of()
    store.keep(rows)
    path = store.path
    store.close()
    content = path.read_bytes()
    middle = content[:4096] + b"\x55" * (len(content) - 4096)
    path.write_bytes(
        {"text": b"no database " * 999, "half": content[: len(content) // 2], "empty": b"", "middle": middle}[how]
    )
    store = store_of(said=said)
    assert len(store.find(lengths(rows))) < len(rows)
    store.keep(rows)
    store.close()
    store = store_of()
    assert_holds(store, rows)
    assert not store.off
    assert how == "empty" or any("damaged" in line for line in said), said


def test_a_locked_file_is_said_and_the_run_goes_on(
    recipe_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refstore, "WAIT", 0.2)
    first, _ = run(recipe_file)
    (path,) = (cache / "reference").glob("*.sqlite")
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")  # somebody writes and does not end
    write_rows(recipe_file.parent, 9, 3)
    _, said = run(recipe_file)
    assert counts(said) == (22, 24, 2)
    assert "not kept" in said and "locked" in said
    holder.execute("ROLLBACK")
    holder.close()
    _, said = run(recipe_file)
    assert counts(said) == (22, 24, 2)
    assert counts(run(recipe_file)[1]) == (24, 24, 0)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    write_rows(recipe_file.parent, 8, 3)
    second, _ = run(recipe_file)
    holder.close()
    assert torch.allclose(weights(second.model_path), weights(first.model_path), atol=1e-6)


def test_without_a_place_to_keep_it(recipe_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNZOO_CACHE_GB", "0")
    _, said = run(recipe_file, "train.max_steps=1")
    assert "not kept: ALIGNZOO_CACHE_GB = 0" in said
    assert not (cache / "reference").exists()
    monkeypatch.delenv("ALIGNZOO_CACHE_GB")
    cache.mkdir(exist_ok=True)
    (cache / "reference").write_text("a file")
    _, said = run(recipe_file, "train.max_steps=1")
    assert "not kept: the cache" in said


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


# --- the commands


def call(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["cache", *words])
    return done.exit_code, done.output


def test_ls_verify_gc_and_clear(recipe_file: Path, cache: Path) -> None:
    run(recipe_file, "train.max_steps=1")
    code, text = call("ls", "--json")
    kinds = {row["kind"]: row for row in json.loads(text)}
    assert code == 0
    assert kinds["reference"]["rows"] == 14
    assert kinds["data"]["rows"] > 0
    size = sum(p.stat().st_size for p in (cache / "reference").glob("*.sqlite*"))
    assert kinds["reference"]["bytes"] == size > 14 * 4
    assert kinds["reference"]["numerics"]["precision"] == "no"
    assert "float32" in call("ls")[1]
    code, text = call("verify")
    assert (code, "14 rows are whole" in text) == (0, True), text
    (path,) = (cache / "reference").glob("*.sqlite")
    with sqlite3.connect(path) as db:
        db.execute("UPDATE rows SET checksum = 0 WHERE rowid = 1")
    db.close()
    code, text = call("verify")
    assert (code, "13 rows are whole, 1 were not" in text) == (2, True), text
    assert call("verify")[0] == 0
    path.write_bytes(b"nothing" * 1000)
    assert "damaged" in call("ls")[1]
    assert call("verify")[0] == 2
    assert not path.exists()
    for file in (cache / "data").glob("*/tokens.bin"):
        file.write_bytes(b"x" * file.stat().st_size)
    assert call("verify")[0] == 2
    assert json.loads(call("ls", "--json")[1]) == []
    run(recipe_file, "train.max_steps=1")
    assert call("clear", "--only", "reference")[0] == 0
    assert {row["kind"] for row in json.loads(call("ls", "--json")[1])} == {"data"}
    assert call("clear")[0] == 0
    assert json.loads(call("ls", "--json")[1]) == []


def test_gc_removes_what_was_not_used_for_the_longest_time() -> None:
    paths = []
    for number, name in enumerate(("old", "middle", "new")):
        store = store_of(name)
        store.keep(some_rows(600, number))
        paths.append(store.path)
        store.close()
    for number, path in enumerate(paths):
        os.utime(path, (1e9 + number, 1e9 + number))
    size = refstore._size(paths[0])
    code, text = call("gc", "--max-gb", str(2.5 * size / 1e9))
    assert code == 0
    assert [path.exists() for path in paths] == [False, True, True]
    assert "removed reference log-probs last used on 2001" in text
    user = store_of("middle")
    os.utime(paths[1], (1e9, 1e9))
    code, text = call("gc", "--max-gb", "0")
    assert [path.exists() for path in paths] == [False, True, False]  # one is in use
    assert "in use" not in text
    assert_holds(user, some_rows(600, 1))
    assert "it stays" in call("clear")[1]
    user.close()
    call("clear")
    assert not list(refstore.reference_folder().iterdir())


def test_a_run_keeps_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    first = store_of("first")
    first.keep(some_rows(600))
    path, size = first.path, refstore._size(first.path)
    first.close()
    os.utime(path, (1e9, 1e9))
    monkeypatch.setenv("ALIGNZOO_CACHE_GB", str(1.5 * size / 1e9))
    said: list[str] = []
    second = store_of("second", said)
    second.keep(some_rows(600, 1))
    second.close()
    assert not path.exists() and second.path.exists()
    assert any("removed reference log-probs" in line for line in said)
    third = store_of("third", said)
    for seed in range(3):
        third.keep({key + bytes([seed]): value for key, value in some_rows(600, seed).items()})
    assert "allows no more" in third.off
    assert refstore._size(third.path) < 3 * size
    third.close()
