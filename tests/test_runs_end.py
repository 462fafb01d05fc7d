"""Runs that end before their last step, in one process: resumed with changes, stopped early, out of memory; TR-DPO."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import tiny_llama
from rich.console import Console
from runs_helpers import distance, finished, flat, lines_of, metrics_of, sets, weights_in, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignzoo
from alignzoo.cli import cli
from alignzoo.engine import Engine
from alignzoo.errors import AlignzooError, DataError, RecipeError, RunError
from alignzoo.ranks import ERRORS, PARENT
from alignzoo.recipe import load_recipe
from alignzoo.rundir import RunDir


def run(recipe: Path, *changes: str, **options: Any) -> tuple[alignzoo.Result, str]:
    """The result, and what the run says."""
    console = Console(file=io.StringIO(), width=200)
    result = alignzoo.run(load_recipe(recipe, changes), console=console, **options)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


# --- resumed ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tiny_folder: Path, tmp_path: Path) -> Path:
    changes = {"checkpoint__every_steps": 2, "train__max_steps": 5, "samples__prompts": [], "samples__from_eval": 0}
    return write_recipe(tmp_path, tiny_folder, **changes)


@pytest.fixture
def stopped(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run that ended within step 4, with a checkpoint of step 2."""
    real = Engine._step

    def stop(self: Engine, rows: Any, *rest: Any) -> None:
        if rows.step == 4:
            raise KeyboardInterrupt
        real(self, rows, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(recipe_file)
    return recipe_file.parent / "runs/tiny"


def test_what_may_change_goes_on_and_is_shown(recipe_file: Path, stopped: Path) -> None:
    result, said = run(recipe_file, "engine.tokens_per_device=1000", "log.every_steps=2", resume=stopped)
    assert "changed: engine.tokens_per_device: 300 -> 1000\n" in said
    assert "changed: log.every_steps: 1 -> 2\n" in said
    assert f"going on after step 2 of 5: {stopped}/checkpoints/step-2" in said
    assert result.run_dir == stopped and RunDir(stopped).finished
    assert [m["step"] for m in metrics_of(stopped)] == [0, 1, 2, 4, 5, 5]
    resumed = json.loads((stopped / "manifest.json").read_text())["resumed"]
    assert [one["step"] for one in resumed] == [2] and len(resumed[0]["changes"]) == 2
    with pytest.raises(AlignzooError, match="came to its end"):
        run(recipe_file, resume=stopped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.learning_rate=0.5", "train.learning_rate: 0.003 -> 0.5"),
        ("loss.beta=0.2", "loss.beta: 0.1 -> 0.2"),
        ("data.max_length=200", "data.max_length: 1024 -> 200"),
    ],
)
def test_what_may_not_change_is_an_error(change: str, message: str, recipe_file: Path, stopped: Path) -> None:
    before = (stopped / "metrics.jsonl").read_bytes()
    done = CliRunner().invoke(cli, ["run", str(recipe_file), "--resume", str(stopped), "--set", change])
    assert done.exit_code == 2, done.output
    assert "the recipe is not the one that the run began with:\n" in done.stderr and message in done.stderr
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_changed_data_is_an_error(recipe_file: Path, stopped: Path) -> None:
    rows = recipe_file.with_name("train.jsonl")
    rows.write_text(rows.read_text().replace("shelf", "shelves").replace("order", "orders"))
    with pytest.raises(DataError, match="the data is not what the run began with: train: ") as caught:
        run(recipe_file, resume=stopped)
    assert caught.value.exit_code == 2


def test_a_directory_belongs_to_one_run_at_a_time(
    recipe_file: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held by a run that is new, and by one that goes on; and no other one goes on there meanwhile."""
    real, seen = Engine._step, []

    def look(self: Engine, rows: Any, *rest: Any) -> None:
        (newest,) = Path(self.recipe.output.dir).iterdir()
        with pytest.raises(AlignzooError, match="a run is writing there"), RunDir(newest).held():
            pass
        seen.append(newest)
        real(self, rows, *rest)

    before = (stopped / "metrics.jsonl").read_bytes()
    with RunDir(stopped).held(), pytest.raises(AlignzooError, match="a run is writing there"):
        run(recipe_file, resume=stopped)
    assert (stopped / "metrics.jsonl").read_bytes() == before
    monkeypatch.setattr(Engine, "_step", look)
    run(recipe_file, resume=stopped)
    run(recipe_file, f"output.dir={recipe_file.parent / 'other'}", "train.max_steps=1")
    assert len(seen) == 4


def test_a_rank_whose_launcher_died_while_it_started_ends() -> None:
    code = "from alignzoo.ranks import quiet_unless_first as begin; begin(); print('on', flush=True)"
    here = {"RANK": "0", "WORLD_SIZE": "2", ERRORS: "nowhere"}
    ended, on = (
        subprocess.run([sys.executable, "-c", code], env={**os.environ, **here, PARENT: str(pid)}, capture_output=True)
        for pid in (os.getppid(), os.getpid())
    )
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, b"") and (on.returncode, on.stdout) == (0, b"on\n")


# --- stopped early ---------------------------------------------------------------------------------------------------

EACH = ("eval.every_steps=1", "train.lr_scheduler=constant", "train.warmup_ratio=0", "checkpoint.every_steps=100")


def test_the_best_model_is_kept_and_patience_ends_the_run(recipe_file: Path) -> None:
    wild = (*EACH, "train.learning_rate=0.3", "eval.best_metric=eval_loss", "train.max_steps=12")
    result, said = run(recipe_file, *wild, "eval.patience=2")
    losses = {m["step"]: m["eval_loss"] for m in metrics_of(result.run_dir) if "eval_loss" in m and m["step"] > 0}
    best = min(losses, key=lambda step: losses[step])
    assert list(losses) == list(range(1, best + 3)) and best + 2 < 12
    assert f"stopped after step {best + 2}: eval_loss was best at step {best}" in said
    assert "2 evaluations did not better it (eval.patience)" in said
    until_then, _ = run(recipe_file, *EACH, "train.learning_rate=0.3", f"train.max_steps={best}", "log.run_name=b")
    kept = weights_in(result.run_dir / "best")
    assert all(torch.equal(kept[n], w) for n, w in weights_in(until_then.model_path).items())
    assert not torch.equal(flat(kept), flat(weights_in(result.model_path)))
    AutoModelForCausalLM.from_pretrained(result.run_dir / "best")


def test_a_limit_of_the_kl_ends_the_run_and_names_it(recipe_file: Path) -> None:
    result, said = run(recipe_file, *EACH, "eval.max_kl=1e-6", "eval.max_kl_metric=kl/rejected")
    assert "stopped after step 1: |eval_kl/rejected| is " in said and "more than eval.max_kl = 1e-06" in said
    assert metrics_of(result.run_dir)[-1]["step"] == 1 and (result.run_dir / "model").is_dir()


@pytest.mark.parametrize(
    ("key", "known"), [("best_metric", "eval_rewards/accuracies"), ("max_kl_metric", "kl/rejected")]
)
def test_a_metric_that_does_not_exist_is_told_before_the_first_step(key: str, known: str, recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=rf'eval.{key}: there is no metric "(eval_)?nonsense"') as caught:
        run(recipe_file, f"eval.{key}=nonsense", "eval.max_kl=1.0")
    assert known in caught.value.fix and caught.value.exit_code == 2
    assert lines_of(recipe_file.parent / "runs/tiny") == 1


# --- out of memory ---------------------------------------------------------------------------------------------------


class Greedy(alignzoo.Loss):
    """Has no memory left in the training, as a GPU says it, or as the CPU's allocator does."""

    name, data, needs_reference = "greedy", "pairs", False

    Settings = alignzoo.NoSettings
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB")

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        if torch.is_grad_enabled():
            raise self.error
        return alignzoo.LossOutput(-batch.chosen.mean())


ON_THE_CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


@pytest.mark.parametrize("error", [Greedy.error, ON_THE_CPU])
def test_out_of_memory_says_where_and_what_helps(
    error: Exception, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Greedy, "error", error)
    recipe = load_recipe(recipe_file, {"loss": {"name": "greedy"}})
    with pytest.raises(RunError, match=r"^step 1: no memory left .* of \d+ positions") as caught:
        alignzoo.run(recipe, losses=[Greedy], console=Console(file=io.StringIO()))
    assert "llocate" in caught.value.why and "\n" not in caught.value.why
    for setting in ("engine.tokens_per_device", "300", "engine.gradient_checkpointing", "model.lora", "engine.zero"):
        assert setting in caught.value.fix, setting


# --- TR-DPO ----------------------------------------------------------------------------------------------------------

SYNC = ("reference.sync_every_steps=2", "reference.sync_alpha=0.5")
PLAIN = (
    "train.optimizer=sgd", "train.lr_scheduler=constant", "train.warmup_ratio=0", "train.max_grad_norm=0",
    "train.learning_rate=0.1", "train.batch_size=24", "train.epochs=4", "train.max_steps=4",
)  # fmt: skip


def pairs_of(recipe: Path, tokenizer: Any) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected of the training rows as token ids, through the chat template."""
    for line in recipe.with_name("train.jsonl").read_text().splitlines():
        row = json.loads(line)
        turn = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        whole = [
            tokenizer.apply_chat_template([*turn, {"role": "assistant", "content": row[side]}])["input_ids"]
            for side in ("chosen", "rejected")
        ]
        chosen, rejected = (ids[len(prompt) :] for ids in whole)
        yield prompt, chosen, rejected


def log_prob(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + completion])
    table = model(ids).logits[0, :-1].log_softmax(-1)
    return table.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def by_hand(recipe: Path, start: Path, steps: int, every: int, alpha: float) -> torch.Tensor:
    """TR-DPO with soft updates: every `every` steps the reference moves `alpha` of the way to the policy."""
    tokenizer = AutoTokenizer.from_pretrained(start)
    policy, reference = (AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32) for _ in range(2))
    rows = list(pairs_of(recipe, tokenizer))
    for step in range(1, steps + 1):
        for prompt, chosen, rejected in rows:
            with torch.no_grad():
                frozen = log_prob(reference, prompt, chosen) - log_prob(reference, prompt, rejected)
            margin = log_prob(policy, prompt, chosen) - log_prob(policy, prompt, rejected) - frozen
            (-torch.nn.functional.logsigmoid(0.1 * margin) / len(rows)).backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
            for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
                if step % every == 0:
                    old.copy_((1 - alpha) * old + alpha * new)
    return flat(dict(policy.named_parameters())).detach()


def test_a_reference_that_moves_is_tr_dpo(recipe_file: Path, tiny_folder: Path) -> None:
    """Each step sees all rows, so their order has no part in it."""
    model = tiny_llama(vocabulary=600)
    names = [name for name, _ in model.named_parameters()]
    synced, said = run(recipe_file, *PLAIN, *SYNC)
    still, _ = run(recipe_file, *PLAIN, "log.run_name=still")
    assert "moved 0.5 of the way to the policy every 2 steps" in said
    start = {name: weight for name, weight in weights_in(tiny_folder).items() if name in names}
    update = by_hand(recipe_file, tiny_folder, 4, 2, 0.5) - flat(start)

    def far(result: alignzoo.Result) -> float:
        found = {name: weight for name, weight in weights_in(result.model_path).items() if name in names}
        return float((flat(found) - flat(start) - update).norm() / update.norm())

    assert update.norm() > 0.01 * flat(start).norm()
    assert far(synced) < 1e-5 and far(still) > 1e-2


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_tr_dpo_on_two_processes(zero: int, recipe_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    one, _ = run(recipe_file, *PLAIN, *SYNC)
    changes = [word for change in (*PLAIN, *SYNC, "log.run_name=two") for word in ("--set", change)]
    finished(tmp_path / "log", "run", recipe_file, "--processes", "2", *changes, *sets(engine__zero=zero))
    assert distance(recipe_file.parent / "runs/two/model", one.model_path, tiny_folder) < 1e-5
