"""What is told before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_data_tokenizers import chat_tokenizer

from alignzoo.check import Live, make_job
from alignzoo.recipe import load_recipe

ROWS = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]


@pytest.mark.parametrize("command", ["check", "run"])
def test_an_unknown_loss_is_told_before_torch_is_imported(command: str, tmp_path: Path) -> None:
    recipe = tmp_path / "a.toml"
    recipe.write_text(
        '[loss]\nname = "dpoo"\n[model]\npath = "x"\n[data]\ntrain = "x.jsonl"\n[train]\nlearning_rate = 1e-5\n'
    )
    code = (
        "import sys\nfrom alignzoo.cli import cli\n"
        "try: cli(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code)\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'accelerate') if name in sys.modules])"
    )
    words = [sys.executable, "-c", code, command, str(recipe)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert 'no loss "dpoo" (did you mean "dpo"?)' in done.stderr
    assert done.stdout.splitlines() == ["2", "[]"]


@pytest.mark.parametrize("side", ["train", "eval"])
def test_rows_that_can_be_gone_through_only_once_serve_for_pairs_too(side: str) -> None:
    """An SFT run on pairs reads the held-out ones twice: as what is imitated, and as pairs."""
    recipe = load_recipe(
        {
            "loss": {"name": "sft"},
            "model": {"path": "given"},
            "data": {"train": "x", **({"eval_fraction": 0.2} if side == "train" else {"eval": "y"})},
            "train": {"learning_rate": 1e-3},
        }
    )
    once = {"train": ROWS, "eval": None if side == "train" else ROWS[:4]}
    once[side] = (row for row in once[side])  # type: ignore[union-attr]
    job = make_job(recipe, len, live=Live(object(), chat_tokenizer(), **once))  # type: ignore[arg-type]
    assert len(job.data.eval) == len(job.pairs) == 4
