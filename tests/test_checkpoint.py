"""Checkpoints as files: bit for bit, complete or not there, damage named, one good one always left."""

from __future__ import annotations

import errno
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignzoo import checkpoint
from alignzoo.checkpoint import (
    CheckpointReader,
    CheckpointWriter,
    DamagedCheckpoint,
    checkpoints_in,
    latest_checkpoint,
    open_checkpoint,
    prune,
    remove_after,
    remove_left_overs,
)
from alignzoo.errors import AlignzooError, RunError

FILES = {"weights-00001.safetensors", "optimizer-00001.safetensors", "state.json", "manifest.json"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def write(folder: Path, step: int) -> Path:
    """A small checkpoint whose content tells its step."""
    with CheckpointWriter(folder, step) as writer:
        for i in range(3):
            writer.add("weights", f"layer.{i}", torch.full((4, 5), float(step + i)))
        writer.add("optimizer", "layer.0/exp_avg", torch.full((20,), float(step)))
        writer.add_json("state", {"step": step})
        return writer.finish()


def assert_is(reader: CheckpointReader | None, step: int) -> None:
    assert reader is not None and reader.step == step and reader.json("state") == {"step": step}
    weights = dict(reader.tensors("weights"))
    assert [w.unique().tolist() for w in weights.values()] == [[step], [step + 1], [step + 2]]
    assert reader.tensor("optimizer", "layer.0/exp_avg").unique().tolist() == [step]


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def samples() -> dict[str, Tensor]:
    """Every type, shape and layout that an optimizer or a model has."""
    torch.manual_seed(0)
    types = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    found = {str(t): torch.randn(7, 3).to(t) for t in types}
    found |= {"nan": torch.tensor([math.nan, math.inf, -0.0]), "scalar": torch.tensor(3.5), "none": torch.zeros(0, 4)}
    found |= {"int": torch.tensor([2**62, -1]), "bool": torch.tensor([True, False]), "byte": torch.arange(9).byte()}
    whole = torch.randn(6, 6)
    return found | {"transposed": whole.t(), "slice": whole[1:3, ::2], "parameter": torch.nn.Parameter(whole)}


# --- what was written comes back -------------------------------------------------------------------------------------


def test_tensors_come_back_bit_for_bit_in_their_order(folder: Path) -> None:
    given = samples()
    with CheckpointWriter(folder, 7) as writer:
        for name, tensor in given.items():
            writer.add("weights", name, tensor)
        path = writer.finish()
    assert path == folder / "step-7"
    reader = open_checkpoint(path)
    assert reader.step == 7
    assert reader.names("weights") == list(given)
    for name, tensor in reader.tensors("weights"):
        assert tensor.dtype == given[name].dtype and tensor.shape == given[name].shape
        assert bits(tensor) == bits(given[name].detach()) == bits(reader.tensor("weights", name))
    assert reader.names("optimizer") == [] and list(reader.tensors("optimizer")) == []


def test_a_tensor_may_change_once_it_was_added(folder: Path) -> None:
    buffer = torch.ones(5)
    with CheckpointWriter(folder, 1) as writer:
        writer.add("weights", "a", buffer)
        buffer.fill_(2.0)
        writer.add("weights", "b", buffer)
        buffer.fill_(3.0)
        reader = open_checkpoint(writer.finish())
    assert [t.unique().tolist() for _, t in reader.tensors("weights")] == [[1.0], [2.0]]


def test_files_hold_at_most_so_many_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1000)
    sizes = [100, 100, 100, 500, 10, 249, 1, 0]  # of float32: 400, 400, 400, 2000, 40, 996, 4, 0 bytes
    with CheckpointWriter(folder, 1) as writer:
        for i, size in enumerate(sizes):
            writer.add("weights", f"w{i}", torch.full((size,), float(i)))
            assert sum(s.size for s in writer._shards.values()) <= max(1000, 4 * max(sizes))
        reader = open_checkpoint(writer.finish())
    files = [entry["file"] for entry in reader.manifest["tensors"]["weights"].values()]
    assert [int(f[8:13]) for f in files] == [1, 1, 2, 3, 4, 5, 5, 5]
    assert {p.name for p in reader.folder.iterdir()} == {*files, "manifest.json"}
    assert [t.numel() for _, t in reader.tensors("weights")] == sizes


def test_json_keeps_every_float_and_refuses_what_it_would_change(folder: Path) -> None:
    data = {"a": [0.1, 1e-320, -0.0, math.inf, 2**70, None, True], "ü": {"b": "c"}}
    with CheckpointWriter(folder, 1) as writer:
        writer.add_json("state", data)
        with pytest.raises(TypeError, match="the key 3 is no string"):
            writer.add_json("other", {"a": [{3: "x"}]})
        reader = open_checkpoint(writer.finish())
    assert repr(reader.json("state")) == repr(data)
    with pytest.raises(AlignzooError, match=r"holds no ranks\.json"):
        reader.json("ranks")


def test_a_name_is_added_once(folder: Path) -> None:
    with CheckpointWriter(folder, 1) as writer:
        writer.add("weights", "a", torch.ones(1))
        writer.add("optimizer", "a", torch.ones(1))
        with pytest.raises(ValueError, match="a is added twice"):
            writer.add("weights", "a", torch.ones(1))


def test_there_is_no_pickle_and_others_may_read_it(folder: Path) -> None:
    path = write(folder, 1)
    assert {p.name for p in path.iterdir()} == FILES
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {(path / "state.json").stat().st_mode & 0o777}


def test_the_module_knows_no_distributed_library() -> None:
    code = (
        "import sys, alignzoo.checkpoint, alignzoo.states\n"
        "print([m for m in ('accelerate', 'deepspeed', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


# --- complete or not there -------------------------------------------------------------------------------------------


def test_it_is_not_there_until_it_is_finished(folder: Path) -> None:
    write(folder, 1)
    with CheckpointWriter(folder, 2) as writer:
        writer.add("weights", "a", torch.ones(3))
        assert [p.name for p in checkpoints_in(folder)] == ["step-1"]
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(folder, 3) as writer:
        writer.add("weights", "a", torch.ones(3))
        raise KeyboardInterrupt
    assert [p.name for p in folder.iterdir()] == ["step-1"]


def test_all_is_on_the_disk_before_it_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut leaves cannot be tried here: that every file and folder is flushed, and when, can."""
    flushed: list[tuple[str, bool]] = []
    fsync = os.fsync

    def record(handle: int) -> None:
        place = Path(f"/proc/self/fd/{handle}").readlink()
        flushed.append((place.relative_to(folder.parent).as_posix(), (folder / "step-1").exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    write(folder, 1)
    before = {place for place, there in flushed if not there}
    assert before == {"checkpoints/.step-1.partial", *(f"checkpoints/.step-1.partial/{name}" for name in FILES)}
    assert flushed[-2:] == [("checkpoints/.step-1.partial", False), ("checkpoints", True)]


def test_a_checkpoint_of_the_same_step_is_replaced(folder: Path) -> None:
    write(folder, 4)
    (folder / "step-4" / "state.json").write_text("damaged")
    write(folder, 4)
    assert_is(latest_checkpoint(folder, print), 4)
    assert [p.name for p in folder.iterdir()] == ["step-4"]


def test_left_overs_are_removed_and_said(folder: Path) -> None:
    write(folder, 1)
    for name in (".step-2.partial", ".step-3.removed", ".step-x.partial", "notes"):
        (folder / name).mkdir()
    said: list[str] = []
    remove_left_overs(folder, said.append)
    assert sorted(p.name for p in folder.iterdir()) == [".step-x.partial", "notes", "step-1"]
    assert [line.split(":")[0] for line in said] == [f"removed {folder}/.step-{n}" for n in ("2.partial", "3.removed")]
    remove_left_overs(folder / "absent", said.append)


def test_a_left_over_of_the_same_step_is_overwritten(folder: Path) -> None:
    partial = folder / ".step-2.partial"
    partial.mkdir(parents=True)
    (partial / "weights-00009.safetensors").write_text("half")
    assert {p.name for p in write(folder, 2).iterdir()} == FILES


# --- killed ----------------------------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")  # torch is loaded already: a fork takes milliseconds


def killed(work: Callable[[Any], None], when: Callable[[int], None] = lambda pid: None) -> list[int]:
    """Runs `work` in a process that ends by SIGKILL, at the latest when `when` returns; what it has sent by then."""
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=work, args=(send,))
    process.start()
    send.close()
    assert process.pid is not None
    when(process.pid)
    sent = []
    try:
        while True:
            sent.append(receive.recv())
    except EOFError:
        process.join()
    return sent


def kill_before_operation(folder: Path, number: int) -> None:
    """Ends this process before its n-th operation on files below `folder`."""
    counter = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        named = event == "open" or event.startswith(("os.", "shutil."))
        if named and any(str(a).startswith(str(folder)) for a in arguments) and next(counter) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_killed_before_any_operation_the_last_complete_one_is_there(folder: Path) -> None:
    """Every place where a save, with its pruning, touches the disk."""
    for operation in itertools.count(1):
        shutil.rmtree(folder, ignore_errors=True)
        write(folder, 1)
        write(folder, 2)

        def work(pipe: Any, operation: int = operation) -> None:
            kill_before_operation(folder, operation)
            path = write(folder, 3)
            pipe.send(3)
            prune(folder, 1, lambda _: None, written=path)
            pipe.send(1)

        sent = killed(work)
        last = latest_checkpoint(folder, lambda _: None)
        assert last is not None and last.step in ((3,) if sent else (2, 3)), operation
        assert_is(last, last.step)
        remove_left_overs(folder, lambda _: None)
        assert all(_is_whole(path) for path in folder.iterdir())
        if 1 in sent:
            break
    assert operation > 20 and [p.name for p in folder.iterdir()] == ["step-3"]


def _is_whole(path: Path) -> bool:
    return open_checkpoint(path).step == int(path.name.removeprefix("step-"))


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_times_the_last_complete_one_is_there(folder: Path, kills: int) -> None:
    """A process that saves without end, killed and started again."""
    rng, reached = random.Random(kills), 0

    def save_for_ever(pipe: Any) -> None:
        remove_left_overs(folder, lambda _: None)
        last = latest_checkpoint(folder, lambda _: None)
        for step in itertools.count(1 if last is None else last.step + 1):
            path = write(folder, step)
            pipe.send(step)
            prune(folder, 2, lambda _: None, written=path)

    def kill(pid: int) -> None:
        time.sleep(rng.uniform(0.005, 0.15))
        os.kill(pid, signal.SIGKILL)

    for _ in range(kills):
        sent = killed(save_for_ever, kill)
        said: list[str] = []
        last = latest_checkpoint(folder, said.append)
        reached = max([reached, *sent])
        if reached:
            assert last is not None and last.step in (reached, reached + 1)
            assert_is(last, last.step)
            assert not [line for line in said if "damaged" in line]
            reached = last.step
    assert reached > kills / 2


# --- full disks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["save_file", "_sync", "hash_file"])
def test_a_full_disk_is_told_at_the_end_and_leaves_the_older_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    write(folder, 1)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with CheckpointWriter(folder, 2) as writer:
        monkeypatch.setattr(checkpoint, place, full)
        for i in range(5):
            writer.add("weights", f"w{i}", torch.ones(100))  # raises nothing: the other ranks gather on
        writer.add_json("state", {})
        assert [p.name for p in folder.iterdir()] == ["step-1"]  # the space is free again at once
        with pytest.raises(RunError, match=r"No space left on device[\s\S]*--resume") as caught:
            writer.finish()
    assert str(folder / "step-2") in caught.value.what and caught.value.exit_code == 1
    monkeypatch.undo()
    assert_is(latest_checkpoint(folder, print), 1)


def test_a_limit_of_the_operating_system_is_a_run_error(folder: Path) -> None:
    """A real refusal, inside safetensors: files of at most 100 kB."""
    code = (
        "import resource, sys, pathlib, torch\n"
        "from alignzoo.checkpoint import CheckpointWriter\n"
        "from alignzoo.errors import RunError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for step, size in ((1, 10_000), (2, 100_000)):\n"
        "    with CheckpointWriter(folder, step) as writer:\n"
        "        writer.add('weights', 'w', torch.zeros(size))\n"
        "        try: print(writer.finish().name)\n"
        "        except RunError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout
    assert out.startswith("step-1\n") and "File too large" in out
    assert [p.name for p in folder.iterdir()] == ["step-1"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with CheckpointWriter(tmp_path / "checkpoints", 1) as writer, pytest.raises(RunError, match="could not be written"):
        writer.finish()


# --- damage ----------------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "flipped byte": ("weights-00001.safetensors", _flip, "sha256 differs"),
    "cut": ("optimizer-00001.safetensors", lambda p: os.truncate(p, 50), "has 50 bytes, and"),
    "missing": ("weights-00001.safetensors", Path.unlink, "is missing"),
    "other state": ("state.json", lambda p: p.write_text(p.read_text().replace("5", "6")), "sha256 differs"),
    "no manifest": ("manifest.json", Path.unlink, "is missing"),
    "half a manifest": ("manifest.json", lambda p: os.truncate(p, 300), "cannot be read"),
    "no table": ("manifest.json", lambda p: p.write_text("[]"), "was changed after"),
    "step": ("manifest.json", lambda p: _edit(p, lambda m: m.update(step=6)), "was changed after"),
    "a file less": ("manifest.json", lambda p: _edit(p, lambda m: m["files"].popitem()), "was changed after"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_one_before_is_taken(folder: Path, damage: str) -> None:
    write(folder, 3)
    path = write(folder, 5)
    file, spoil, words = DAMAGES[damage]
    spoil(path / file)
    with pytest.raises(DamagedCheckpoint, match=words) as caught:
        open_checkpoint(path)
    assert caught.value.what.startswith(f"{path / file}: ") and caught.value.exit_code == 2
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # rank 0 sends it to the others
    said: list[str] = []
    assert_is(latest_checkpoint(folder, said.append), 3)
    assert any(str(path / file) in line and "damaged" in line for line in said)


def test_without_verifying_only_hashes_are_not_looked_at(folder: Path) -> None:
    path = write(folder, 5)
    _flip(path / "weights-00001.safetensors")
    assert open_checkpoint(path, verify=False).step == 5
    os.truncate(path / "weights-00001.safetensors", 50)
    with pytest.raises(DamagedCheckpoint):
        open_checkpoint(path, verify=False)


def test_a_renamed_checkpoint_is_damaged(folder: Path) -> None:
    write(folder, 5).rename(folder / "step-9")
    with pytest.raises(DamagedCheckpoint, match="is of step 5, and the folder is step-9"):
        open_checkpoint(folder / "step-9")


def test_where_all_are_damaged_none_is_taken(folder: Path) -> None:
    (write(folder, 5) / "manifest.json").unlink()
    assert latest_checkpoint(folder, lambda _: None) is None
    assert latest_checkpoint(folder / "absent", lambda _: None) is None


def test_a_later_format_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = write(folder, 1)
    monkeypatch.undo()
    with pytest.raises(AlignzooError, match="a checkpoint of format 2, and this version reads 1") as caught:
        latest_checkpoint(folder, print)
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert path.is_dir()


# --- how many stay ---------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_newest_stay(folder: Path) -> None:
    for step in (2, 9, 10):
        write(folder, step)
    said: list[str] = []
    prune(folder, 2, said.append)
    assert names(folder) == ["step-10", "step-9"]
    assert said == [f"removed {folder / 'step-2'} (checkpoint.keep = 2)"]


def test_damaged_ones_do_not_count(folder: Path) -> None:
    for step in (1, 2, 3, 4):
        write(folder, step)
    for step in (2, 3, 4):
        (folder / f"step-{step}" / "manifest.json").unlink()
    prune(folder, 1, print)
    assert names(folder) == ["step-1", "step-2", "step-3", "step-4"]


def test_the_one_just_written_stays_also_below_a_later_one(folder: Path) -> None:
    write(folder, 10)
    prune(folder, 1, print, written=write(folder, 6))
    assert names(folder) == ["step-6"]


def test_later_ones_are_removed_when_a_run_goes_on_from_an_earlier(folder: Path) -> None:
    for step in (2, 9, 10):
        write(folder, step)
    said: list[str] = []
    remove_after(folder, 2, said.append)
    assert names(folder) == ["step-2"] and len(said) == 2
