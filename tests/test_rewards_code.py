"""Programs against tests, and the limits that they run in."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from alignzoo_rewards.code import program_of
from alignzoo_rewards.sandbox import Limits, Outcome, Sandbox, find_sandbox
from reward_helpers import SMALL

from alignzoo.errors import RecipeError
from alignzoo.plugins import discover
from alignzoo.recipe import load_recipe
from alignzoo.rewards import make_rewards

QUICK = Limits(seconds=2.0)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return find_sandbox()


@pytest.fixture(scope="module")
def code() -> Any:
    reward = discover().reward("code").cls(allow_execution=True, seconds=5.0)
    reward.line = reward.start("cpu")
    return reward


def run(sandbox: Sandbox, source: str, limits: Limits = QUICK) -> Outcome:
    return sandbox.run(textwrap.dedent(source), limits)


# --- the reward -------------------------------------------------------------------------------------------------------


GOOD = "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles."
BAD = "```python\ndef double(x):\n    return x + 2\n```"  # right for 2
TESTS = ["assert double(2) == 4", "assert double(5) == 10"]


def test_programs_against_tests(code: Any) -> None:
    completions = [GOOD, BAD, "def double(x): return x * 2", "", "```python\ndef double(x:\n```", GOOD, GOOD]
    tests = [TESTS, TESTS, "\n".join(TESTS), TESTS, TESTS, None, []]
    assert code(["p"] * 7, completions, tests=tests) == [1.0, 0.0, 1.0, 0.0, 0.0, None, None]


def test_the_share_of_the_tests(code: Any) -> None:
    share = type(code)(allow_execution=True, value="share")
    share.sandbox = code.sandbox
    assert share(["p"] * 3, [GOOD, BAD, ""], tests=[TESTS] * 3) == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    "ending", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "print('passed'); quit()"]
)
def test_a_program_that_ends_before_its_tests_has_failed(code: Any, ending: str) -> None:
    assert code(["p"], [ending], tests=["assert False"]) == [0.0]


def test_which_part_of_an_answer_is_the_program() -> None:
    assert program_of("```python\na\n```\nthen\n```\nb\n```\n") == "b\n"
    assert program_of("```py\na\n```\n```bash\nrm\n```\n```json\n{}\n```") == "a\n"
    assert program_of("x = 1") == "x = 1" and program_of("") == ""
    assert program_of("```Python\nprint('é')\n```") == "print('é')\n"


def test_only_where_the_recipe_allows_it(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(
        '[loss]\nname = "sft"\n[model]\npath = "m"\n[data]\ntrain = "x"\n[train]\nlearning_rate = 1\n'
        '[[rewards]]\nname = "code"\n'
    )
    with pytest.raises(RecipeError) as caught:
        make_rewards(load_recipe(file), discover())
    message = str(caught.value)
    assert "a.toml:9: " in message and "it runs programs that the model wrote on this machine" in message
    assert "allow_execution = true" in message and caught.value.exit_code == 2
    assert len(make_rewards(load_recipe(file, ["rewards.0.allow_execution=true"]), discover())) == 1


def test_through_the_whole_way(code: Any) -> None:
    table = {"name": "code", "allow_execution": True, "weight": 2.0}
    said: list[str] = []
    rewards = make_rewards(load_recipe({**SMALL, "rewards": [table]}), discover(), said.append)
    rewards.start("cpu")
    assert said == [f'reward "code": {code.line}'] and "run with limits" in said[0]
    assert rewards.score(["p"] * 2, [GOOD, BAD], {"tests": [TESTS] * 2}).total == [2.0, 0.0]
    with pytest.raises(RecipeError, match='reads the column "tests", which the rows have not'):
        rewards.score(["p"], [GOOD], {"test": [TESTS]})


# --- the limits -------------------------------------------------------------------------------------------------------


def test_what_this_machine_has_is_used(sandbox: Sandbox) -> None:
    """Asked in other ways than the sandbox asks itself; else the tests below would skip what is broken."""
    user = ["--user", "--map-root-user"] if os.getuid() else []
    for option, missing in (("--net", "reaching the network"), ("--pid", "signalling this user's other processes")):
        done = subprocess.run(["unshare", *user, "--fork", option, "true"], capture_output=True)
        assert (missing in sandbox.missing) == (done.returncode != 0)
    has_landlock = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) >= 1
    assert ("writing files wherever this user may" in sandbox.missing) == (not has_landlock)


def test_a_program_gets_nothing_of_ours(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "very-secret")
    outcome = run(sandbox, "import os, sys; print(sorted(os.environ), os.listdir('.'), sys.stdin.read() == '')")
    assert outcome.code == 0 and "HF_TOKEN" not in outcome.output and "['program.py'] True" in outcome.output
    if not sandbox.missing:
        outcome = run(sandbox, "import glob\nfor p in glob.glob('/proc/[0-9]*/environ'): print(open(p, 'rb').read())")
        assert "very-secret" not in outcome.output


def test_what_is_left_of_a_program(sandbox: Sandbox) -> None:
    folder = run(sandbox, "import os; open('made', 'w').write('x'); print(os.getcwd())").output.strip()
    assert folder.startswith("/") and not Path(folder).exists()
    assert run(sandbox, "print('x' * 10**6); print('end')").output.endswith("x\nend\n")


@pytest.mark.parametrize(
    "source", ["while True: pass", "import time; time.sleep(60)", "input_ = open('/dev/zero').read()"]
)
def test_a_program_without_an_end(sandbox: Sandbox, source: str) -> None:
    started = time.monotonic()
    assert run(sandbox, source, Limits(seconds=1.0)).code != 0
    assert time.monotonic() - started < 10


def test_a_program_that_wants_all_the_memory(sandbox: Sandbox) -> None:
    outcome = run(sandbox, "x = bytearray(2**31); print('got it')")
    assert outcome.code == 1 and "MemoryError" in outcome.output
    assert run(sandbox, "x = bytearray(2**26); print('fine')").output == "fine\n"


def test_a_program_that_fills_the_disk(sandbox: Sandbox) -> None:
    outcome = run(sandbox, "f = open('big', 'wb')\nfor _ in range(64): f.write(bytes(2**20))\nprint('written')")
    assert outcome.code != 0 and "written" not in outcome.output


FORKS = """
import os, time
made = 0
try:
    for _ in range(200):
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        made += 1
finally:
    print("made", made, flush=True)
"""


def test_a_program_that_multiplies(sandbox: Sandbox) -> None:
    if "starting processes without limit" in sandbox.missing:
        pytest.skip("processes are not counted here")
    outcome = run(sandbox, FORKS, Limits(seconds=5.0, processes=16))
    assert outcome.code == 1 and "Resource temporarily unavailable" in outcome.output
    assert int(outcome.output.split("made ")[1].split()[0]) < 16


def test_nothing_that_a_program_starts_outlives_it(sandbox: Sandbox) -> None:
    if "signalling this user's other processes" in sandbox.missing:
        pytest.skip("no namespace of processes here")
    mark = "alignzoo-test-outlives"
    away = f'os.setsid(); os.execv("/bin/sh", ["sh", "-c", "sleep 77; : {mark}"])'
    for source, code in (
        (f"if os.fork() == 0: {away}\ntime.sleep(0.5)", 0), (f"if os.fork() == 0: {away}\ntime.sleep(60)", None),
        (away, None),
    ):  # fmt: skip
        assert run(sandbox, "import os, time\n" + source, Limits(seconds=1.0)).code == code
        deadline = time.monotonic() + 5
        while mark in (listed := subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout):
            assert time.monotonic() < deadline, listed
            time.sleep(0.1)


def test_a_program_that_writes_elsewhere(sandbox: Sandbox, tmp_path: Path) -> None:
    if "writing files wherever this user may" in sandbox.missing:
        pytest.skip("no Landlock here")
    tmp_path.chmod(0o777)
    target = tmp_path / "there"
    target.write_text("before")
    target.chmod(0o666)
    for attempt in (
        f"open({str(tmp_path / 'new')!r}, 'w')", f"open({str(target)!r}, 'w').write('after')",
        f"os.remove({str(target)!r})",
        f"os.truncate({str(target)!r}, 0)", f"os.mkdir({str(tmp_path / 'folder')!r})",
        f"os.symlink('x', {str(tmp_path / 'l')!r})",
    ):  # fmt: skip
        outcome = run(sandbox, f"import os\n{attempt}\nprint('done')")
        assert outcome.code == 1 and "PermissionError" in outcome.output, attempt
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]


def test_a_program_that_calls_home(sandbox: Sandbox) -> None:
    if "reaching the network" in sandbox.missing:
        pytest.skip("no namespace of networks here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run(sandbox, f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nprint('in')")
    assert outcome.code == 1 and "OSError" in outcome.output and "in\n" not in outcome.output


def test_a_program_that_ends_the_run(sandbox: Sandbox) -> None:
    if "signalling this user's other processes" in sandbox.missing:
        pytest.skip("no namespace of processes here")
    victim = subprocess.Popen(["sleep", "60"])
    try:
        outcome = run(sandbox, f"import os\nos.kill({victim.pid}, 9)\nprint('killed')")
        assert outcome.code == 1 and victim.poll() is None
        run(sandbox, "import os\nos.kill(-1, 9)")
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_without_unshare_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignzoo_rewards.sandbox.APART", ("--no-such-option",))
    weak = find_sandbox()
    assert weak.unshare == () and "reaching the network" in weak.missing
    assert run(weak, "print(1)").code == 0
    assert run(weak, "while True: pass", Limits(seconds=1.0)).code != 0
    reward = discover().reward("code").cls(allow_execution=True)
    assert "WARNING: on this machine nothing keeps them from: reaching the network" in reward.start("cpu")
