"""What is told before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_data_tokenizers import chat_tokenizer

from alignzoo.check import Live, make_job
from alignzoo.recipe import load_recipe

ROWS = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]


def test_an_unknown_loss_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    recipe = tmp_path / "a.toml"
    recipe.write_text(
        '[loss]\nname = "dpoo"\n[model]\npath = "x"\n[data]\ntrain = "x.jsonl"\n[train]\nlearning_rate = 1e-5\n'
    )
    code = (
        "import sys\nfrom alignzoo.check import make_job\nfrom alignzoo.errors import PluginError\n"
        "from alignzoo.recipe import load_recipe\n"
        "try: make_job(load_recipe(sys.argv[1]), print)\n"
        "except PluginError as error: print(error)\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'accelerate') if name in sys.modules])"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - started
    assert 'no loss "dpoo" (did you mean "dpo"?)' in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert seconds < 5  # a third of a second on a free machine


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
