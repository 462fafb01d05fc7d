"""`alignzoo export`: a plain folder from a checkpoint or a finished run, the weights those that were trained."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import REPO, tiny_llama
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignzoo
from alignzoo import export as module
from alignzoo.checkpoint import CheckpointWriter, DamagedCheckpoint
from alignzoo.errors import AlignzooError, ModelError
from alignzoo.export import export
from alignzoo.model import BASE_FILE, add_adapter, hash_weights, load_model, locate, save_model
from alignzoo.recipe import Recipe, load_recipe, to_table
from alignzoo.rundir import RunDir, manifest

IDS = torch.arange(3, 23)[None]
LORA = {"model.lora.rank": 4, "model.lora.alpha": 16}


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path) -> Recipe:
    return recipe_of(tmp_path, tiny_folder, {})


def recipe_of(tmp_path: Path, model: Path, overrides: Mapping[str, Any]) -> Recipe:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    content = {
        "loss": {"name": "dpo"}, "model": {"path": str(model)}, "data": {"train": str(tmp_path / "rows.jsonl")},
        "train": {"learning_rate": 1e-3}, "output": {"dir": str(tmp_path / "runs")},
    }  # fmt: skip
    return load_recipe(content, overrides)


def trained(recipe: Recipe, step: int) -> Any:
    """The recipe's model with every weight that trains moved."""
    torch.manual_seed(step)
    model = load_model(locate(recipe.model.path), recipe.model, print)
    if recipe.model.lora is not None:
        model = add_adapter(model, recipe.model.lora, quantised=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def run_of(recipe: Recipe, steps: tuple[int, ...] = (3,), live: tuple[str, ...] = ()) -> RunDir:
    """A run directory with checkpoints, as a run that was killed leaves it."""
    run_dir = RunDir.create(Path(recipe.output.dir), "run")
    run_dir.write_recipe(to_table(recipe))
    weights = hash_weights(locate(recipe.model.path))
    now = datetime.now(UTC)
    run_dir.write_json("manifest.json", manifest(command=[], seed=0, started=now, weights=weights, live=live))
    for step in steps:
        with CheckpointWriter(run_dir.checkpoints, step) as writer:
            for name, parameter in trained(recipe, step).named_parameters():
                if parameter.requires_grad:
                    writer.add("weights", name, parameter)
            writer.finish()
    return run_dir


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def assert_same_weights(found: Any, expected: Any) -> None:
    theirs = dict(expected.named_parameters())
    assert theirs.keys() == dict(found.named_parameters()).keys()
    for name, parameter in found.named_parameters():
        assert parameter.dtype == theirs[name].dtype and torch.equal(parameter, theirs[name]), name


# --- from a checkpoint -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_all_weights(recipe: Recipe, tiny_folder: Path, tmp_path: Path, dtype: str | None) -> None:
    run = run_of(recipe)
    to = export(run.checkpoints / "step-3", tmp_path / "deep/out", merge=False, dtype=dtype, say=print)
    assert to == tmp_path / "deep/out" and [p.name for p in to.parent.iterdir()] == ["out"]
    expected = trained(recipe, 3)
    assert_same_weights(plain(to), expected.to(torch.bfloat16) if dtype else expected)
    assert json.loads((to / "config.json").read_text())["dtype"] == dtype or "float32"
    assert (to / "generation_config.json").is_file() and not list(to.glob("*.bin"))
    ours, base = AutoTokenizer.from_pretrained(to), AutoTokenizer.from_pretrained(tiny_folder)
    assert ours.chat_template == base.chat_template and ours.get_vocab() == base.get_vocab()


def test_weights_that_were_trained_wider_are_rounded_once_or_not_at_all(tmp_path: Path, tiny_folder: Path) -> None:
    """ZeRO trains bfloat16 models with float32 weights, and these are in the checkpoint."""
    wide, narrow = (recipe_of(tmp_path, tiny_folder, {"model.dtype": d}) for d in ("float32", "bfloat16"))
    run = run_of(wide)
    run.write_recipe(to_table(narrow))
    whole = export(run.path, tmp_path / "whole", merge=False, dtype="float32", say=print)
    assert_same_weights(plain(whole), trained(wide, 3))
    rounded = export(run.path, tmp_path / "rounded", merge=False, dtype=None, say=print)
    assert_same_weights(plain(rounded), trained(wide, 3).to(torch.bfloat16))


def test_an_adapter(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_folder, LORA | {"model.lora.modules_to_save": ["lm_head"]})
    run = run_of(recipe)
    to = export(run.checkpoints / "step-3", tmp_path / "adapter", merge=False, dtype=None, say=print)
    assert json.loads((to / BASE_FILE).read_text()) == {"base": str(tiny_folder)}
    assert not (to / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(plain(tiny_folder), to)
    assert torch.equal(logits(loaded), logits(trained(recipe, 3)))
    assert not torch.allclose(logits(loaded), logits(plain(tiny_folder)), atol=1e-2)
    assert torch.equal(logits(load_model(locate(str(to)), recipe.model, print)), logits(merged(recipe)))


def merged(recipe: Recipe) -> Any:
    return trained(recipe, 3).merge_and_unload()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_adapter_merged(tmp_path: Path, tiny_folder: Path, dtype: str | None) -> None:
    recipe = recipe_of(tmp_path, tiny_folder, LORA)
    to = export(run_of(recipe).path, tmp_path / "whole", merge=True, dtype=dtype, say=print)
    assert not list(to.glob("adapter*")) and not (to / BASE_FILE).exists()
    expected = merged(recipe)
    torch.testing.assert_close(logits(expected), logits(trained(recipe, 3)), atol=1e-4, rtol=1e-4)
    assert_same_weights(plain(to), expected.to(torch.bfloat16) if dtype else expected)


def test_an_adapter_over_a_quantised_base_is_merged_into_the_base_as_it_was(tmp_path: Path, tiny_folder: Path) -> None:
    run = run_of(recipe_of(tmp_path, tiny_folder, LORA))
    quantised = recipe_of(tmp_path, tiny_folder, LORA | {"model.quantization": "4bit"})
    run.write_recipe(to_table(quantised))
    to = export(run.path, tmp_path / "whole", merge=True, dtype=None, say=print)
    assert_same_weights(plain(to), merged(recipe_of(tmp_path, tiny_folder, LORA)))


def test_the_template_of_the_recipe_is_carried(tmp_path: Path, tiny_folder: Path) -> None:
    template = tmp_path / "shout.jinja"
    template.write_text("{% for m in messages %}!{{ m['content'] }}{{ eos_token }}{% endfor %}")
    recipe = recipe_of(tmp_path, tiny_folder, {"data.chat_template": str(template)})
    to = export(run_of(recipe).path, tmp_path / "out", merge=False, dtype=None, say=print)
    assert AutoTokenizer.from_pretrained(to).chat_template == template.read_text()


def test_of_an_unfinished_run_the_newest_undamaged_step(recipe: Recipe, tmp_path: Path) -> None:
    run = run_of(recipe, (3, 5, 7))
    (run.checkpoints / "step-7" / "weights-00001.safetensors").unlink()
    said: list[str] = []
    to = export(run.path, tmp_path / "out", merge=True, dtype=None, say=said.append)
    assert_same_weights(plain(to), trained(recipe, 5))
    assert any("step-7" in line and "damaged" in line for line in said)
    assert "the run did not come to its end: step 5 is exported" in said
    assert "merge: nothing to merge, all weights were trained" in said


@pytest.mark.parametrize("changes", [{}, LORA, LORA | {"output.merge": True}], ids=["full", "lora", "merged"])
def test_a_checkpoint_of_a_run_is_what_a_run_of_so_many_steps_saves(
    tmp_path: Path, tiny_folder: Path, changes: dict[str, Any]
) -> None:
    rows = (REPO / "recipes/data/shop_train.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    recipe = recipe_of(tmp_path, tiny_folder, {
        "train.batch_size": 4, "train.lr_scheduler": "constant", "train.learning_rate": 1e-2, "engine.device": "cpu",
        "checkpoint.every_steps": 2, "eval.at_start": False, **changes,
    })  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    short = replace(recipe, train=replace(recipe.train, max_steps=2))
    saved = alignzoo.run(short).model_path
    run = alignzoo.run(recipe).run_dir
    merge = recipe.output.merge
    to = export(run / "checkpoints/step-2", tmp_path / "out", merge=merge, dtype=None, say=print)
    assert {p.name for p in to.iterdir()} == {p.name for p in saved.iterdir()}
    (name,) = (p.name for p in to.glob("*.safetensors"))
    expected, last = load_file(saved / name), load_file(run / "model" / name)
    for key, tensor in load_file(to / name).items():
        assert torch.equal(tensor, expected.pop(key)), key
    assert not expected and any(not torch.equal(tensor, last[key]) for key, tensor in load_file(to / name).items())
    for file in ("tokenizer_config.json", "adapter_config.json" if changes and not merge else "config.json"):
        assert json.loads((to / file).read_text()) == json.loads((saved / file).read_text())


# --- from a saved model ----------------------------------------------------------------------------------------------


def finished(recipe: Recipe, tokenizer: Any) -> RunDir:
    run = run_of(recipe)
    save_model(trained(recipe, 9), tokenizer, run.path / "model", base=recipe.model.path, merge=False)
    return run


def test_a_finished_run_is_its_model(recipe: Recipe, tokenizer: Any, tmp_path: Path) -> None:
    run = finished(recipe, tokenizer)
    for source in (run.path, run.path / "model"):
        to = export(source, tmp_path / f"out-{source.name}", merge=False, dtype=None, say=print)
        files = {p.name: p.read_bytes() for p in to.iterdir()}
        assert files == {p.name: p.read_bytes() for p in (run.path / "model").iterdir()}
    half = export(run.path, tmp_path / "half", merge=False, dtype="float16", say=print)
    assert_same_weights(plain(half), trained(recipe, 9).to(torch.float16))
    assert AutoTokenizer.from_pretrained(half).chat_template == tokenizer.chat_template


def test_a_finished_adapter(tmp_path: Path, tiny_folder: Path, tokenizer: Any) -> None:
    recipe = recipe_of(tmp_path, tiny_folder, LORA)
    run = finished(recipe, tokenizer)
    whole = export(run.path, tmp_path / "whole", merge=True, dtype=None, say=print)
    assert_same_weights(plain(whole), trained(recipe, 9).merge_and_unload())
    half = export(run.path, tmp_path / "half", merge=False, dtype="bfloat16", say=print)
    exact = load_file(run.path / "model/adapter_model.safetensors")
    for name, tensor in load_file(half / "adapter_model.safetensors").items():
        assert torch.equal(tensor, exact.pop(name).to(torch.bfloat16))
    assert not exact
    assert PeftModel.from_pretrained(plain(tiny_folder), half)


def test_the_command(recipe: Recipe, tmp_path: Path) -> None:
    from alignzoo.cli import cli

    words = ["export", str(run_of(recipe).path), "--to", str(tmp_path / "out"), "--dtype", "bfloat16", "--merge"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == f"model: {tmp_path / 'out'}"
    assert "merge: nothing to merge" in done.stdout
    assert_same_weights(plain(tmp_path / "out"), trained(recipe, 3).to(torch.bfloat16))
    again = CliRunner().invoke(cli, words)
    assert again.exit_code == 2 and "is there already" in again.stderr


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(source: Path, to: Path, words: str, error: type[AlignzooError] = AlignzooError) -> None:
    before = sorted(to.parent.iterdir())
    with pytest.raises(error, match=words):
        export(source, to, merge=True, dtype=None, say=print)
    assert sorted(to.parent.iterdir()) == before


def test_nothing_is_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused(run_of(recipe).path, tmp_path / "out", "is there already")


def test_what_is_no_run_is_named(recipe: Recipe, tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "out", "neither a run directory, nor a checkpoint")
    refused(tmp_path / "absent", tmp_path / "out", "neither a run directory, nor a checkpoint")
    refused(run_of(recipe, ()).path, tmp_path / "out", r"no undamaged checkpoint in it[\s\S]*--resume")


def test_a_damaged_checkpoint_is_not_exported(recipe: Recipe, tmp_path: Path) -> None:
    step = run_of(recipe).checkpoints / "step-3"
    file = step / "weights-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(step, tmp_path / "out", "weights-00001.safetensors: its content is not", DamagedCheckpoint)


def test_a_checkpoint_without_its_recipe_is_told(recipe: Recipe, tmp_path: Path) -> None:
    run = run_of(recipe)
    (run.path / "recipe.toml").unlink()
    refused(run.checkpoints / "step-3", tmp_path / "out", r"no recipe\.toml[\s\S]*in its run directory")


def test_an_adapter_belongs_to_its_base(tmp_path: Path, tiny_folder: Path, tokenizer: Any) -> None:
    base = tmp_path / "base"
    save_model(plain(tiny_folder), tokenizer, base, base="", merge=False)
    run = finished(recipe_of(tmp_path, base, LORA), tokenizer)
    other = plain(tiny_folder)
    other.lm_head.weight.data += 1
    other.save_pretrained(base)
    for source in (run.path, run.checkpoints / "step-3"):
        refused(source, tmp_path / "out", "is not the model that the run began with", ModelError)


def test_a_model_from_python_has_no_base_to_load(recipe: Recipe, tmp_path: Path) -> None:
    refused(run_of(recipe, live=("model",)).path, tmp_path / "out", "was given from Python", ModelError)


@pytest.mark.parametrize("spoil", ["name", "shape"])
def test_weights_of_another_model_are_refused(recipe: Recipe, tmp_path: Path, spoil: str) -> None:
    run = run_of(recipe, ())
    model = trained(recipe, 3)
    with CheckpointWriter(run.checkpoints, 3) as writer:
        for name, parameter in model.named_parameters():
            last = name == "model.norm.weight"
            writer.add("weights", name + "x" * (last and spoil == "name"), parameter[last and spoil == "shape" :])
        writer.finish()
    refused(run.path, tmp_path / "out", r"are not those of the model: model\.norm\.weight", ModelError)


@pytest.mark.parametrize("whole", [True, False])
def test_a_full_disk_leaves_nothing(
    recipe: Recipe, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    run = finished(recipe, tokenizer) if whole else run_of(recipe)

    def full(*arguments: Any, **options: Any) -> None:
        (tmp_path / ".out.partial").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.shutil, "copytree", full)
    monkeypatch.setattr(module, "save_model", full)
    refused(run.path, tmp_path / "out", "No space left on device")


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time, pathlib
from alignzoo.export import export

def held():  # bytes of this process that no file backs
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def most(run, to, dtype):  # while it exports, beyond what it holds before
    done, found, start = threading.Event(), [held()], held()
    def watch():
        while not done.wait(0.002):
            found.append(held())
    thread = threading.Thread(target=watch)
    thread.start()
    export(pathlib.Path(run), pathlib.Path(to), merge=True, dtype=dtype, say=lambda _: None)
    done.set()
    thread.join()
    return max(found) - start

small, whole, lora, to = sys.argv[1:]
for run in small, lora.replace("big", "small"):
    most(run, f"{to}/warm-{len(run)}", None)  # whatever is imported on the way is there now
print(most(whole, f"{to}/whole", None), most(whole, f"{to}/rounded", "bfloat16"), most(lora, f"{to}/lora", None))
"""


def test_it_takes_the_memory_of_the_model_once(tmp_path: Path, tiny_folder: Path, tokenizer: Any) -> None:
    """All weights, all weights rounded to half the size, and an adapter that is merged."""
    big = tiny_llama(vocabulary=len(tokenizer), hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    size = sum(p.numel() * p.element_size() for p in big.parameters())
    save_model(big, tokenizer, tmp_path / "saved", base="", merge=False)
    runs = []
    for name, model, changes in (
        ("small", tiny_folder, {}), ("small-lora", tiny_folder, LORA), ("big", tmp_path / "saved", {}),
        ("big-lora", tmp_path / "saved", LORA),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        runs.append(run_of(recipe_of(tmp_path / name, model, changes)).path)
    words = [str(run) for run in (runs[0], runs[2], runs[3], tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True)
    whole, rounded, lora = (int(word) / size for word in done.stdout.splitlines()[-1].split())
    assert 0.8 < whole < 1.2 and 0.4 < rounded < 0.7 and 0.8 < lora < 1.4, (whole, rounded, lora)
