"""`alignzoo lm-eval`: EleutherAI's lm-evaluation-harness on the model of a run, through its own command line.

https://github.com/EleutherAI/lm-evaluation-harness, docs/interface.md
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from alignzoo.errors import AlignzooError, RunError
from alignzoo.model import Location, locate
from alignzoo.progress import Say
from alignzoo.recipe import load_recipe
from alignzoo.rundir import RunDir

FOLDER = "lm-eval"  # in the run directory; a folder in it for each call


def lm_eval(run: Path, tasks: str, limit: str | None, extra: Sequence[str], say: Say) -> Path:
    """Runs the harness on RUN/model and returns the new folder of its results, RUN/lm-eval/TIME.

    limit: rows of each task, or their share, as --limit of lm_eval. extra: further words for lm_eval, after ours.
    Raises AlignzooError where there is no finished run or no harness, RunError where it fails.
    """
    RunDir(run).read_manifest()
    program = find_program()
    where = locate(f"run:{run}")
    settings = load_recipe(run / "recipe.toml").model
    dtype, trust = settings.dtype, settings.trust_remote_code
    out = RunDir.create(run / FOLDER, datetime.now().strftime("%Y%m%d-%H%M%S")).path
    words = [
        *program, "--model", "hf", "--model_args", model_args(where, dtype, trust), "--tasks", tasks,
        "--output_path", str(out), *(["--limit", limit] if limit else []), *extra,
    ]  # fmt: skip
    say(shlex.join(words))
    code = subprocess.run(words, check=False).returncode
    found = sorted(out.rglob("results*.json"))
    if code or not found:
        if not any(out.iterdir()):
            out.rmdir()
        raise RunError(f"lm_eval ended with exit code {code}" + ("" if found else " and wrote no results"),
                       fix="see what it printed")  # fmt: skip
    for file in found:
        say(f"results: {file}")
    return out


def find_program() -> list[str]:
    """The words that start the harness. Raises AlignzooError where it is not installed."""
    found = shutil.which("lm_eval")
    if found:
        return [found]
    if importlib.util.find_spec("lm_eval") is not None:
        return [sys.executable, "-m", "lm_eval"]
    raise AlignzooError(
        "lm-evaluation-harness is not installed", why="there is no lm_eval on PATH, and no module of that name",
        fix="pip install 'alignzoo[lm-eval]'",
    )  # fmt: skip


def model_args(where: Location, dtype: str, trust_remote_code: bool) -> str:
    """What lm_eval's hf model takes: "pretrained=DIR,dtype=float32"; for an adapter its base, and peft=DIR.

    Raises AlignzooError for what it cannot take.
    """
    base = where.base or where
    if base.base is not None:
        raise AlignzooError(f"{where.path}: an adapter over an adapter, which lm_eval does not load",
                            fix="alignzoo export RUN --to DIR --merge, and lm_eval on DIR")  # fmt: skip
    values = {
        "pretrained": base.path, "revision": base.revision, "gguf_file": base.gguf,
        **({"peft": where.path, "tokenizer": where.path} if where.base else {}),
        "dtype": dtype, "trust_remote_code": "True" if trust_remote_code else None,
    }  # fmt: skip
    odd = [value for value in values.values() if value and ("," in value or "=" in value)]
    if odd:
        raise AlignzooError(f"{odd[0]}: lm_eval takes no path with a comma or an equals sign", fix="rename the folder")
    return ",".join(f"{key}={value}" for key, value in values.items() if value)
