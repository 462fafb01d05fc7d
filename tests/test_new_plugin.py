"""`alignzoo new-plugin`: what it writes is in order, passes its own tests, installs and trains; what it refuses."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from alignzoo.api import KINDS
from alignzoo.cli import cli
from alignzoo.errors import PluginError
from alignzoo.newplugin import files_of, new_plugin

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "plugins" / "alignzoo-example"
LONGEST = "a" + 39 * "b"
needs_hatchling = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling, which builds plugins, is not installed"
)


def finished(folder: Path, words: Sequence[str | Path], *path: Path, code: int | None = 0) -> str:
    """What a command prints, started in `folder` with `path` before everything else that can be imported."""
    with_alignzoo = any((part / "alignzoo").is_dir() for part in path)  # then nothing of the checkout is to be seen
    known = [] if with_alignzoo else [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *known]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=folder, env=env, capture_output=True, text=True, timeout=180
    )
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def install(folder: Path, site: Path) -> Path:
    words = ["pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    finished(folder, [*words, "--no-build-isolation", "--target", site, "."])
    return site


def train(folder: Path, model: Path, *words: str, site: Path | None = None) -> list[dict[str, float]]:
    """The steps that `alignzoo run recipe.toml` recorded, on a tiny model; without `site` as a file."""
    chosen = ["--set", f"model.path={model}", "--set", "engine.device=cpu", *words]
    if site is None:
        (module,) = folder.glob("[!c]*.py")
        chosen += ["--plugin", module.name]
    finished(folder, ["alignzoo", "run", "recipe.toml", *chosen], *([site] if site else []))
    (metrics,) = folder.glob("runs/*/metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", KINDS)
@pytest.mark.parametrize("name", ["m", LONGEST])
def test_it_is_in_order(name: str, data: str, tmp_path: Path) -> None:
    """With its own settings for ruff, whatever the length of the name."""
    folder = new_plugin(name, data, folder=tmp_path)
    finished(folder, ["ruff", "check", "--no-cache", "."])
    finished(folder, ["ruff", "format", "--no-cache", "--check", "."])
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == name and project["entry-points"]["alignzoo"] == {name: name}
    assert len((folder / "train.jsonl").read_text().splitlines()) == 10
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize(
    "data",
    ["pairs", "groups", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("labelled", "demonstrations"))],
)
def test_it_passes_its_tests_and_trains_two_steps(data: str, tmp_path: Path, tiny_folder: Path) -> None:
    folder = new_plugin("my-po", data, folder=tmp_path)
    said = finished(folder, ["pytest", "-q", "-p", "no:cacheprovider"])
    assert re.search(r"^2\d passed", said, re.MULTILINE), said
    steps = [record for record in train(folder, tiny_folder) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    assert [record["learning_rate"] for record in steps] == [2e-5, 2e-5]
    if data != "groups":  # a random model never answers right: all rewards are 0, and so are the gradients
        assert all(record["grad_norm"] > 0 for record in steps)


@pytest.mark.parametrize("data", KINDS)
def test_the_readme_has_the_settings_as_they_are_declared(data: str, tmp_path: Path) -> None:
    from alignzoo.plugins import discover
    from alignzoo.schema import rows_of

    folder = new_plugin("my-po", data, folder=tmp_path)
    rows = rows_of(discover([folder / "my_po.py"]).get("my-po").cls.Settings)
    wanted = [f"| `{r.name}` | {r.type} | `{r.default}` | {r.range} | {r.help} |" for r in rows]
    assert wanted and set(wanted) <= set((folder / "README.md").read_text().splitlines())


def test_the_tutorial(tmp_path: Path) -> None:
    """docs/plugins.md: the formula put in, the two failures that it tells of, and their ends."""
    page = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
    tutorial = page[page.index("### A formula of one's own") : page.index("### The entry point")]
    module, reference = re.findall(r"^```python\n(.*?)^```$", tutorial, re.DOTALL | re.MULTILINE)
    folder = new_plugin("my-po", folder=tmp_path)
    (folder / "my_po.py").write_text(module)
    said = finished(folder, ["pytest", "-q", "-p", "no:cacheprovider"], code=1)
    failed = re.findall(r"^FAILED tests/test_my_po\.py::(.+?)(?: - .*)?$", said, re.MULTILINE)
    assert failed == ["test_it_conforms[reference function]", "test_the_readme_has_every_setting"]
    assert all(name in tutorial for name in failed)
    tests, readme = folder / "tests/test_my_po.py", folder / "README.md"
    function = reference[reference.index("def reference") :]
    tests.write_text(re.sub(r"def reference.*?\n\n\n", lambda _: function + "\n\n", tests.read_text(), flags=re.DOTALL))
    readme.write_text(readme.read_text().replace("| `beta` |", "| `margin` | a number |\n| `beta` |"))
    finished(folder, ["pytest", "-q", "-p", "no:cacheprovider"])


# --- the example ------------------------------------------------------------------------------------------------------


def but_the_formula(module: str) -> str:
    """A module without its docstring, the imports of the standard library, what cites, and what computes."""
    tree = ast.parse(module)
    kept = [n for n in tree.body[1:] if not isinstance(n, ast.Import) or n.names[0].name == "alignzoo"]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "__call__":
            node.body = []
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "paper":
            node.value = ast.Constant("")
    return ast.dump(ast.Module(kept, []))


def parts_of(module: str) -> dict[str, str]:
    """The imports, functions and assignments of a module; of its formula and numbers the names alone."""
    formula = ("reference", "test_numbers_by_hand")
    nodes = ast.parse(module).body[1:]
    return {ast.dump(n) if getattr(n, "name", "") not in formula else n.name: "" for n in nodes}  # type: ignore[attr-defined]


def test_the_example_is_what_is_written_with_a_formula_of_its_own() -> None:
    written = files_of("alignzoo-example", "alignzoo_example", "fdpo-js", "pairs")
    here = subprocess.run(["git", "ls-files", "."], cwd=EXAMPLE, capture_output=True, text=True, check=False).stdout
    if here:
        assert sorted(here.split()) == sorted(written)
    texts = {path: (EXAMPLE / path).read_text(encoding="utf-8") for path in written}
    module, tests = "alignzoo_example.py", "tests/test_alignzoo_example.py"
    assert {p: t for p, t in texts.items() if p not in (module, tests)} == {
        p: t for p, t in written.items() if p not in (module, tests)
    }
    assert but_the_formula(texts[module]) == but_the_formula(written[module])
    assert texts[module] != written[module]
    assert parts_of(written[tests]).keys() <= parts_of(texts[tests]).keys()


@needs_hatchling
def test_the_example_is_installed_tested_and_broken(tmp_path: Path) -> None:
    """On a path of its own. Its tests notice a wrong sign, and alignzoo names it when it cannot be imported."""
    shutil.copytree(EXAMPLE, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__", "runs"))
    site = install(tmp_path / "source", tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(EXAMPLE / "tests", tmp_path / "elsewhere/tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(EXAMPLE / "README.md", tmp_path / "elsewhere")

    def tested(code: int) -> str:
        return finished(tmp_path / "elsewhere", ["pytest", "-q", "-p", "no:cacheprovider", "tests"], site, code=code)

    assert " passed" in tested(0)
    module = site / "alignzoo_example.py"
    sound = module.read_text()
    module.write_text(sound.replace("chosen - rejected", "rejected - chosen"))
    assert "way out" in tested(1)
    module.write_text(sound.replace("import alignzoo", "import alignzoo_gone", 1))
    listed = finished(tmp_path, ["alignzoo", "plugins", "--json"], site)
    (row,) = [row for row in json.loads(listed) if row["distribution"] == "alignzoo-example"]
    assert row["state"] == "broken" and "alignzoo_gone" in row["error"]


# --- installed --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """alignzoo itself, built and installed on a path of its own."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds alignzoo, is not installed")
    return install(ROOT, tmp_path_factory.mktemp("wheel") / "site")


def test_the_wheel_has_its_templates(wheel: Path) -> None:
    kept = {"templates", "data/templates"}
    for folder in kept:
        wanted = {p.relative_to(ROOT / "alignzoo") for p in (ROOT / "alignzoo" / folder).rglob("*.*") if p.is_file()}
        assert wanted and wanted <= {p.relative_to(wheel / "alignzoo") for p in (wheel / "alignzoo").rglob("*")}


def test_from_an_empty_folder_beside_the_wheel(wheel: Path, tmp_path: Path, tiny_folder: Path) -> None:
    """Written, installed and trained on two ranks with the alignzoo of the wheel; the checkout has no part in it."""
    (tmp_path / "where.py").write_text("import alignzoo; print(alignzoo.__file__)")
    assert finished(tmp_path, ["where"], wheel) == f"{wheel}/alignzoo/__init__.py\n"
    said = finished(tmp_path, ["alignzoo", "new-plugin", "my-po"], wheel)
    assert "next: cd my-po && pip install" in said
    site = shutil.copytree(wheel, tmp_path / "site")
    install(tmp_path / "my-po", site)
    steps = train(tmp_path / "my-po", tiny_folder, "--processes", "2", "--set", "engine.zero=3", site=site)
    before, after = (record["rewards/margins"] for record in steps if "loss" in record)
    assert before == 0.0 != after  # policy == reference until the first step is done
    (run,) = (tmp_path / "my-po/runs").iterdir()
    assert "my-po" in (run / "recipe.toml").read_text()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message", "fix"),
    [
        ("My_PO", "lower-case letters and digits", '"my-po" can'),
        ("my--po", "single -", '"my-po" can'),
        ("../my-po", "lower-case", '"my-po" can'),
        ("3po", "begins with a letter", ""),
        ("-po-", "begins with a letter", '"po" can'),
        (LONGEST + "c", "up to 40", ""),
        ("class", "a word of Python", '"class-po"'),
        ("torch", 'a module "torch" is there already', "another name"),
        ("json", 'a module "json" is there already', "another name"),
        ("dpo", 'a loss "dpo" is installed already, by alignzoo', "--loss"),
    ],
)
def test_names_that_cannot_be(name: str, message: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError) as caught:
        new_plugin(name, folder=tmp_path)
    assert message in str(caught.value) and fix in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_the_loss_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    folder = new_plugin("dpo", loss="my-po", folder=tmp_path)
    assert 'name, data, needs_reference = "my-po"' in (folder / "dpo.py").read_text()
    with pytest.raises(PluginError, match="My PO"):
        new_plugin("another", loss="My PO", folder=tmp_path)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that what is there stays as it is: a folder, a file, a link that leads nowhere."""
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(cli, ["new-plugin", "my-po", "--data", "labelled"])
    assert made.exit_code == 0 and "  my_po.py\n" in made.output and "  tests/test_my_po.py\n" in made.output
    Path("file").write_text("mine")
    Path("link").symlink_to("nowhere")
    for name in ("my-po", "file", "link"):
        refused = CliRunner().invoke(cli, ["new-plugin", name])
        assert refused.exit_code == 2 and f"{name}: is there already" in refused.output
    assert Path("file").read_text() == "mine" and not Path("nowhere").exists()
    assert CliRunner().invoke(cli, ["new-plugin", "a", "--data", "prompts"]).exit_code == 2
