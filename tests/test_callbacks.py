"""Callbacks: what they are told and when, what becomes of one that fails, and that none of it changes the training."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import REPO
from plugin_helpers import Install, installer, status
from runs_helpers import finished, metrics_of, weights_in, write_recipe

import alignzoo
from alignzoo.api import CALLS
from alignzoo.callbacks import make_callbacks
from alignzoo.cli import cli
from alignzoo.errors import RecipeError, RunError
from alignzoo.plugins import discover
from alignzoo.recipe import Recipe, load_recipe, to_table
from alignzoo.resume import recipe_changes
from alignzoo.rundir import RunDir
from alignzoo.runner import run

STATUS = REPO / "tests/fixtures_plugins/alignzoo_status.py"
SMALL = {"loss": {"name": "dpo"}, "model": {"path": "m"}, "data": {"train": "r"}, "train": {"learning_rate": 1e-5}}
RECORDER = '''
import json, random
from dataclasses import dataclass
import numpy, torch
import alignzoo

@dataclass(frozen=True)
class Settings:
    path: str = alignzoo.setting("calls.jsonl", "a file")
    fail: tuple[str, ...] = alignzoo.setting((), "methods that raise")

class Recorder(alignzoo.Callback):
    """Writes down what it is told."""
    name, Settings = "recorder", Settings

    def _note(self, call, given):
        random.random(), numpy.random.rand(), torch.rand(3)
        with open(self.settings.path, "a") as file:
            file.write(json.dumps([call, given]) + "\\n")
        if isinstance(given, dict):
            given.clear()
        if call in self.settings.fail:
            raise ValueError(f"{call} went wrong")

    def run_started(self, run): self._note("run_started", run)
    def step_ended(self, metrics): self._note("step_ended", metrics)
    def evaluated(self, metrics): self._note("evaluated", metrics)
    def checkpoint_saved(self, path): self._note("checkpoint_saved", path)
    def run_ended(self, end): self._note("run_ended", end)

@alignzoo.hookimpl
def alignzoo_callbacks():
    return [Recorder]
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    yield from installer(tmp_path, monkeypatch)


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    file = tmp_path / "recorder.py"
    file.write_text(RECORDER)
    return file


def calls_in(path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def small(tiny_folder: Path, tmp_path: Path, name: str = "tiny", **changes: Any) -> Recipe:
    """Six steps, evaluated after three; dropout, so that the random generators matter."""
    changes = {
        "train__max_steps": 6, "eval__every_steps": 3, "samples__prompts": [], "samples__from_eval": 0,
        "model__lora": {"rank": 2, "dropout": 0.2}, "checkpoint__every_steps": 4, **changes,
    }  # fmt: skip
    callbacks = changes.pop("callbacks", None)
    file = write_recipe(tmp_path / "work", tiny_folder, name, **changes)
    return load_recipe(file, {} if callbacks is None else {"callbacks": callbacks})


# --- what they are told -----------------------------------------------------------------------------------------------


def test_the_calls_of_a_run_and_that_they_change_nothing(tiny_folder: Path, tmp_path: Path, recorder: Path) -> None:
    """The recorder draws random numbers and empties what it is given; the weights are bit for bit the same."""
    calls = tmp_path / "calls.jsonl"
    plain = run(small(tiny_folder, tmp_path, "plain"))
    told = run(
        small(tiny_folder, tmp_path, "told", callbacks=[{"name": "recorder", "path": str(calls)}]), plugins=[recorder]
    )
    found = calls_in(calls)
    steps = ["step_ended"] * 3
    assert [call for call, _ in found] == [
        "run_started", "evaluated", *steps, "evaluated", "step_ended", "checkpoint_saved", *steps[:2], "evaluated",
        "run_ended",
    ]  # fmt: skip
    start, end = found[0][1], found[-1][1]
    assert start == {
        "directory": str(told.run_dir), "recipe": "told", "loss": "dpo", "steps": 6, "rows": 24, "held_out": 6,
        "resumed": False,
    }  # fmt: skip
    lines = [given for call, given in found if call in ("step_ended", "evaluated")]
    assert lines == [line for line in RunDir(told.run_dir).read_metrics() if "loss" in line or "eval_loss" in line]
    assert found[7][1] == str(told.run_dir / "checkpoints/step-4")
    assert (end["status"], end["error"], end["model"]) == ("finished", "", str(told.run_dir / "model"))
    assert Path(end["model"]).is_dir() and end["seconds"] > 0
    assert end["metrics"]["step"] == 6 and {"loss", "eval_loss"} <= end["metrics"].keys()
    one, other = weights_in(plain.run_dir / "model"), weights_in(told.run_dir / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [r["loss"] for r in metrics_of(plain.run_dir) if "loss" in r] == [
        r["loss"] for r in metrics_of(told.run_dir) if "loss" in r
    ]


def test_the_run_keeps_what_it_needs_to_be_made_again(tiny_folder: Path, tmp_path: Path, recorder: Path) -> None:
    recipe = small(
        tiny_folder, tmp_path, train__max_steps=1, callbacks=[{"name": "recorder", "path": str(tmp_path / "c")}]
    )
    made = run(recipe, plugins=[recorder])
    assert (made.run_dir / "plugins/recorder.py").read_text() == RECORDER
    (choice,) = load_recipe(made.run_dir / "recipe.toml").callbacks
    assert (choice.name, choice.strict, choice.settings) == (
        "recorder", False, {"path": str(tmp_path / "c"), "fail": []},
    )  # fmt: skip
    manifest = json.loads((made.run_dir / "manifest.json").read_text())
    assert [plugin["label"] for plugin in manifest["plugins"]] == ["builtin"]


def test_a_run_that_fails_tells_why(tiny_folder: Path, tmp_path: Path, recorder: Path) -> None:
    calls = tmp_path / "calls.jsonl"
    recipe = small(
        tiny_folder, tmp_path, callbacks=[{"name": "recorder", "path": str(calls)}], train__learning_rate=1e30
    )
    with pytest.raises(RunError) as caught:
        run(recipe, plugins=[recorder])
    call, end = calls_in(calls)[-1]
    assert (call, end["status"], end["model"]) == ("run_ended", "failed", "")
    assert end["error"] == str(caught.value)


# --- one that fails ---------------------------------------------------------------------------------------------------


def test_one_that_fails_is_told_once_and_counted(
    tiny_folder: Path, tmp_path: Path, recorder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {"name": "recorder", "path": str(tmp_path / "calls"), "fail": ["step_ended", "run_ended"]}
    run(small(tiny_folder, tmp_path, callbacks=[table, {**table, "fail": []}]), plugins=[recorder])
    out = capsys.readouterr().out
    line = 1 + RECORDER.splitlines().index('            raise ValueError(f"{call} went wrong")')
    assert out.count("went wrong") == 1
    assert f'callback "recorder" failed in step_ended: ValueError: step_ended went wrong ({recorder}:{line})' in out
    assert 'WARNING: callback "recorder" failed 7 times' in out and '"recorder_2" failed' not in out
    assert [call for call, _ in calls_in(tmp_path / "calls")].count("run_ended") == 2


def test_a_strict_one_ends_the_run_after_the_step(tiny_folder: Path, tmp_path: Path, recorder: Path) -> None:
    calls = tmp_path / "calls"
    table = {"name": "recorder", "path": str(calls), "fail": ["step_ended"], "strict": True}
    with pytest.raises(RunError) as caught:
        run(small(tiny_folder, tmp_path, callbacks=[table]), plugins=[recorder])
    assert 'stopped after step 1: callback "recorder" failed in step_ended' in caught.value.what
    assert caught.value.on_all_ranks and caught.value.exit_code == 1
    found = calls_in(calls)
    assert found[-1][0] == "run_ended" and found[-1][1]["status"] == "failed"


def test_a_strict_one_ends_all_ranks(tiny_folder: Path, tmp_path: Path, recorder: Path) -> None:
    """Only the first is called, and none waits for the other."""
    calls = tmp_path / "calls"
    file = write_recipe(tmp_path / "work", tiny_folder, samples__prompts=[], samples__from_eval=0)
    table = f'callbacks=[{{name="recorder", path="{calls}", fail=["step_ended"], strict=true}}]'
    _, err = finished(
        tmp_path, "run", file, "--processes", "2", "--plugin", recorder, "--set", table, code=RunError.exit_code
    )
    assert err.count("stopped after step 1") == 1 and "step_ended went wrong" in err
    assert [call for call, _ in calls_in(calls)] == ["run_started", "evaluated", "step_ended", "run_ended"]


def test_the_generators_are_as_they_were(recorder: Path, tmp_path: Path) -> None:
    recipe = load_recipe({**SMALL, "callbacks": [{"name": "recorder", "path": str(tmp_path / "c")}]})
    callbacks = make_callbacks(recipe, discover([recorder]))

    def draw() -> tuple[Any, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    callbacks.call("step_ended", {"step": 1})  # nobody is called before `begin`
    callbacks.begin(print)
    callbacks.see({"step": 1})
    assert len(calls_in(tmp_path / "c")) == 1 and draw() == expected


# --- the recipe and the contract --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([{"name": "webhok"}], 'there is no callback "webhok" (did you mean "webhook"?)'),
        ([{"url": "x"}], '"name" is missing'),
        ({"name": "webhook"}, '"callbacks" is a list of tables: write [[callbacks]]'),
        ([{"name": "webhook", "url": "http://x", "strict": 1}], "strict = 1: has the wrong type"),
        ([{"name": "webhook", "url": "http://x", "onn": []}], 'unknown key "onn" (did you mean "on"?)'),
        ([{"name": "webhook", "url": "http://x", "on": ["end"]}], "on = ['end']: element 0 (\"end\") is not among"),
        ([{"name": "webhook"}], "give either url or url_env"),
        ([{"name": "webhook", "url": "ftp://x"}], "does not begin with http:// or https://"),
        ([{"name": "webhook", "url_env": "NO_SUCH_HOOK"}], "the environment variable NO_SUCH_HOOK is not set"),
    ],
)
def test_mistakes_in_a_recipe(table: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_callbacks(load_recipe({**SMALL, "callbacks": table}), discover())
    assert message in str(caught.value)


def test_a_resolved_recipe_reads_back() -> None:
    recipe = load_recipe({**SMALL, "callbacks": [{"name": "webhook", "url": "http://x", "strict": True}]})
    callbacks = make_callbacks(recipe, discover())
    table = to_table(recipe, callback_settings=callbacks.settings)
    assert table["callbacks"] == [
        {"name": "webhook", "strict": True, "url": "http://x", "on": ("run_ended",), "seconds": 10.0}
    ]
    assert make_callbacks(load_recipe(table), discover()).settings == callbacks.settings
    changed = {key: value for key, value in table.items() if key != "callbacks"}
    assert [change.key for change in recipe_changes(table, changed)] == ["callbacks"]  # a run goes on without them
    assert callbacks.describe()[0].startswith('webhook (alignzoo 0.1.0): url = "http://x"')


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("Settings = alignzoo.NoSettings\n    def run_ended(self, end): pass", "does not declare name"),
        ("name, Settings = 'Bad', alignzoo.NoSettings\n    def run_ended(self, end): pass", 'name = "Bad" (wanted: '),
        ("name = 'bad'\n    def run_ended(self, end): pass", "does not declare Settings"),
        ("name, Settings = 'bad', alignzoo.NoSettings", "has none of the methods run_started, step_ended"),
        ("name, Settings = 'bad', alignzoo.NoSettings\n    def run_ended(self): pass", "run_ended takes (self, end)"),
        (
            "name, Settings, contract = 'bad', alignzoo.NoSettings, 99\n    def run_ended(self, end): pass",
            "made for contract 99 of alignzoo, and this alignzoo has contract 1",
        ),
    ],
)  # fmt: skip
def test_a_class_that_breaks_the_contract(install: Install, body: str, message: str) -> None:
    source = f"import alignzoo\n\nclass Bad(alignzoo.Callback):\n    {body}\n\n"
    install("bad", source + "@alignzoo.hookimpl\ndef alignzoo_callbacks(): return [Bad]\n")
    found = status(discover(), "bad")
    assert found.state == "broken" and message in found.error
    assert "webhook" in json.dumps(CliRunner().invoke(cli, ["callbacks"]).stdout)


def test_every_call_has_a_method() -> None:
    assert [name for name in vars(alignzoo.Callback) if name in CALLS] == list(CALLS)


def test_the_command_lists_them() -> None:
    rows = json.loads(CliRunner().invoke(cli, ["callbacks", "--json", "--plugin", str(STATUS)]).stdout)
    assert {row["name"]: row["distribution"] for row in rows} == {"status-file": "file", "webhook": "alignzoo"}
    assert [setting["name"] for setting in rows[0]["settings"]] == ["path"] and rows[0]["summary"]


# --- those that there are ---------------------------------------------------------------------------------------------


def test_the_callback_of_the_docs(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    recipe = small(tiny_folder, tmp_path, train__max_steps=2, callbacks=[{"name": "status-file", "path": str(path)}])
    made = run(recipe, plugins=[STATUS])
    found = json.loads(path.read_text())
    assert found["status"] == "finished" and found["directory"] == str(made.run_dir)
    assert not path.with_name("status.json.new").exists()


class Server:
    """An address that keeps what it gets. code: what it answers."""

    def __init__(self, code: int = 200) -> None:
        server, self.got, self.tokens = self, [], []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                server.tokens.append(self.headers["Authorization"])
                self.send_response(code)
                self.end_headers()

            def log_message(self, *words: Any) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/secret-path"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_a_webhook_gets_the_end_of_a_run(
    tiny_folder: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what else it was asked to send; address and token are in no file of the run."""
    monkeypatch.setenv("HOOK", server.url)
    monkeypatch.setenv("HOOK_TOKEN", "s3cret")
    table = {"name": "webhook", "url_env": "HOOK", "token_env": "HOOK_TOKEN", "on": ["evaluated", "run_ended"]}
    made = run(small(tiny_folder, tmp_path, train__max_steps=2, callbacks=[table]))
    assert [body["event"] for body in server.got] == ["evaluated", "evaluated", "run_ended"]
    end = server.got[-1]
    assert end["status"] == "finished" and end["text"].startswith(f"{made.run_dir}: finished after ")
    assert server.got[0]["metrics"]["eval_loss"] == pytest.approx(0.693, abs=0.01)
    assert set(server.tokens) == {"Bearer s3cret"}
    for path in (p for p in made.run_dir.rglob("*") if p.is_file()):
        assert b"secret-path" not in path.read_bytes() and b"s3cret" not in path.read_bytes(), path


@pytest.mark.parametrize("down", [True, False])
def test_an_address_that_does_not_answer_well(down: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is a warning, which does not tell the address."""
    server, said = Server(code=500), []
    if down:
        server.http.shutdown()
        server.http.server_close()
    monkeypatch.setenv("HOOK", server.url)
    callbacks = make_callbacks(
        load_recipe({**SMALL, "callbacks": [{"name": "webhook", "url_env": "HOOK"}]}), discover()
    )
    callbacks.begin(said.append)
    callbacks.end(
        {"status": "failed", "error": "out of memory\nand more", "directory": "d", "model": "", "seconds": 3.0}
    )
    (line,) = said
    assert line.startswith('WARNING: callback "webhook" failed in run_ended: ')
    assert ("ConnectError" if down else "the address answered 500") in line and "secret-path" not in line
    if not down:
        assert server.got[0]["text"] == "run: failed after 3 s: out of memory"
        server.http.shutdown()
        server.http.server_close()
