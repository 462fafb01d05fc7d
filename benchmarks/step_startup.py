"""How long `alignzoo run recipes/dpo.toml` takes until its first step, and where that time goes.

The command runs twice, data and log-probs of the reference kept by the first: what a second run of a recipe waits for.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SECONDS = 200  # both runs and the imports, on two cores
REPO = Path(__file__).resolve().parents[1]
_LINE = re.compile(r"^import time:\s+(\d+) \|\s+(\d+) \|( *)(\S+)$", re.MULTILINE)
_SET = ("samples.prompts=[]", "samples.from_eval=0", "eval.at_start=false", "train.max_steps=1")


def measure(work: Path, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Seconds of each phase, cold and with what the first run kept; the slowest imports. settings: as for --set."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        runs = {name: _run(Path(folder), name, settings) for name in ("cold", "kept")}
    return {"date": datetime.now(UTC).date().isoformat(), "phases": runs, "imports": slow_imports()}


def _run(folder: Path, name: str, settings: Sequence[str]) -> dict[str, float]:
    into = folder / f"{name}.json"
    here = {**os.environ, "ALIGNZOO_CACHE": str(folder / "cache")}
    settings = [*_SET, f"output.dir={folder / 'runs'}", *settings]
    words = [sys.executable, __file__, str(into), repr(time.time()), *settings]
    done = subprocess.run(words, env=here, cwd=REPO, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    found: dict[str, float] = json.loads(into.read_text(encoding="utf-8"))
    return found


def slow_imports(least: float = 0.1) -> list[tuple[str, float]]:
    """Top-level packages that a run imports, with their seconds, of `python -X importtime`."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import alignzoo.runner"], capture_output=True, text=True, cwd=REPO,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    own: dict[str, float] = {}
    for self_time, _, _, module in _LINE.findall(done.stderr):
        package = module.split(".")[0]
        own[package] = own.get(package, 0.0) + int(self_time) / 1e6
    return sorted(((n, round(s, 3)) for n, s in own.items() if s >= least), key=lambda pair: -pair[1])


class _FirstStep(Exception):
    """The run has come to its first step."""


def _watch(into: Path, began: float, settings: Sequence[str]) -> None:
    """The command in this process, with a clock between its phases; it ends at its first step."""
    marks = {"interpreter": time.time()}
    from alignzoo import runner
    from alignzoo.engine import Engine

    marks["imports"] = time.time()

    def after(owner: Any, name: str, phase: str) -> None:
        real = getattr(owner, name)

        def run(*args: Any, **options: Any) -> Any:
            found = real(*args, **options)
            marks[phase] = time.time()
            return found

        setattr(owner, name, run)

    after(runner, "make_accelerator", "accelerator")
    after(runner, "make_job", "recipe, plugins, data")
    after(runner, "start_or_resume", "run directory, hashes of the weights")
    after(runner, "load_models", "the model loaded")
    after(runner, "_engine", "engine, optimizer, trial of the layout")
    after(runner.Precompute, "run", "log-probs of the reference")

    def first_step(*_: Any, **__: Any) -> None:
        marks["schedule"] = time.time()
        raise _FirstStep

    Engine._step = first_step  # type: ignore[method-assign]
    recipe = runner.load_recipe("recipes/dpo.toml", settings)
    try:
        runner.run(recipe)
    except _FirstStep:
        times = [began, *marks.values()]
        phases = {name: end - start for name, start, end in zip(marks, times, times[1:], strict=False)}
        into.write_text(json.dumps({name: round(s, 3) for name, s in phases.items()}), encoding="utf-8")


if __name__ == "__main__":
    _watch(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
