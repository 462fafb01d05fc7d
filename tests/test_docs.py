"""The documentation is current and complete, its links lead somewhere, and its examples work."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch

import alignzoo
from alignzoo import api, hookspecs, metrics, plugin_kinds, schema
from alignzoo.cli import cli
from alignzoo.data.formats import FORMATS
from alignzoo.declared import DECLARED, NAMED
from alignzoo.plugins import discover, loss_table, named_table, plugin_table, reward_table
from alignzoo.recipe import KNOWN, SECTIONS, VLLM, CallbackKeys, LoRA, Other, RewardKeys, Source, load_recipe

REPO = Path(__file__).resolve().parents[1]
DOCS = REPO / "docs"
PAGES = [
    REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md", *sorted(DOCS.rglob("*.md")),
    REPO / "plugins/alignzoo-example/README.md", REPO / "recipes/data/README.md",
]  # fmt: skip
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\((?!https?://)([^)\s]+)\)")
SMALL: dict[str, Any] = {
    "loss": {"name": "dpo"}, "model": {"path": "a/model"}, "data": {"train": "rows.jsonl"},
    "train": {"learning_rate": 1e-5},
}  # fmt: skip


def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(language: str) -> Iterator[Any]:
    """The fenced blocks of a language on all pages, each with its page and number."""
    for path in PAGES:
        found = (text for kind, text in _FENCE.findall(path.read_text(encoding="utf-8")) if kind == language)
        for number, text in enumerate(found, start=1):
            yield pytest.param(text, id=f"{path.relative_to(REPO)}:{number}")


# --- current ---------------------------------------------------------------------------------------------------------


def test_the_generated_parts_are_current() -> None:
    done = subprocess.run([sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_every_part_stands_on_one_page() -> None:
    parts = generate().all_parts()
    text = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    assert {name: text.count(f"<!-- generated: {name} -->") for name in parts} == dict.fromkeys(parts, 1)


def test_a_stale_page_is_named_and_mended(tmp_path: Path) -> None:
    """And what was written by hand around the part is kept."""
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("img", "__pycache__"))
    shutil.copytree(REPO / "tests/fixtures_plugins", tmp_path / "tests/fixtures_plugins")
    shutil.copy(REPO / "tests/layouts_of_models.py", tmp_path / "tests")
    target = tmp_path / "docs/recipes.md"
    subprocess.run([sys.executable, tmp_path / "docs/generate.py"], check=True, capture_output=True, timeout=60)
    current = target.read_text()
    stale = current.replace("peak learning rate", "speed").replace("The smallest recipe", "By hand")
    target.write_text(stale)

    def run(*words: str) -> tuple[int, str]:
        command = [sys.executable, str(tmp_path / "docs/generate.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout

    assert run("--check") == (1, "recipes.md: stale, run `python docs/generate.py`\n")
    assert target.read_text() == stale
    assert run() == (0, "recipes.md: written\n")
    assert target.read_text() == current.replace("The smallest recipe", "By hand")
    assert run("--check") == (0, "")


@pytest.mark.parametrize(
    "text",
    [
        "<!-- generated: nothing -->\n<!-- end: nothing -->", "<!-- generated: formats -->", "<!-- end: formats -->",
        "<!-- run: dpo -->\n", "<!-- end: run -->",
    ],
)  # fmt: skip
def test_a_marker_that_fits_nothing(text: str) -> None:
    module = generate()
    with pytest.raises(ValueError, match=r"x\.md"):
        module.render(text, "x.md", module.PARTS)


def test_the_figures_of_a_run_are_kept() -> None:
    module = generate()
    text = (
        "<!-- run: dpo -->\nAccuracy 0.97.\n<!-- end: run -->\n<!-- generated: formats -->\nold\n<!-- end: formats -->"
    )
    made = module.render(text, "x.md", module.PARTS)
    assert made.startswith("<!-- run: dpo -->\nAccuracy 0.97.\n<!-- end: run -->") and "old" not in made


# --- complete --------------------------------------------------------------------------------------------------------


def test_every_key_of_a_recipe_is_documented() -> None:
    parts = re.split(r"^### ", page("recipes.md"), flags=re.MULTILINE)
    tables = {part.split("\n")[0]: part for part in parts}
    classes = {f"[{name}]": cls for name, cls in SECTIONS.items()}
    classes |= {"[model.lora]": LoRA, "[[data.train]] and [[data.eval]]": Source, "[[rewards]]": RewardKeys}
    classes |= {"[rollout.vllm]": VLLM, "[[rollout.others]]": Other, "[[callbacks]]": CallbackKeys}
    assert set(classes) == set(tables) - {parts[0].split("\n")[0]}
    for header, cls in classes.items():
        for field in dataclasses.fields(cls):
            spec = field.metadata["spec"]
            row = next(line for line in tables[header].splitlines() if line.startswith(f"| `{field.name}` |"))
            assert spec.help in row and spec.range() in row


def test_the_default_budgets_are_those_of_the_engine() -> None:
    from alignzoo.engine import TOKENS_PER_DEVICE

    row = next(line for line in page("recipes.md").splitlines() if line.startswith("| `tokens_per_device` |"))
    assert f"{TOKENS_PER_DEVICE['cpu']} on a CPU, {TOKENS_PER_DEVICE['cuda']} on a GPU" in row


def test_every_hook_and_every_declaration_is_documented() -> None:
    text = page("plugins.md")
    hooks = [name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")]
    assert hooks == [kind.hook for kind in plugin_kinds.ALL]
    public = [name for name in vars(api.Loss) if not name.startswith("_") and name != "has_prepare"]
    for name in (*hooks, *DECLARED, *public):
        assert f"`{name}" in text, name
    for cls in (api.LogProbs, *api.KINDS.values(), api.LossOutput):
        for field in dataclasses.fields(cls):
            if field.name not in ("owner", "more"):  # set by alignzoo
                assert f"`{field.name}`" in text or f"{field.name}=" in text, f"{cls.__name__}.{field.name}"
    for parameter in inspect.signature(alignzoo.setting).parameters:
        assert f"{parameter}" in text


def test_every_reward_and_what_it_declares_is_documented() -> None:
    text = page("rewards.md")
    public = [name for name in vars(api.Reward) if not name.startswith("_")]
    for name in (*NAMED, *public, "__call__"):
        assert f"| `{name}" in text, name
    for row in reward_table(discover()):
        part = text.split(f"\n#### {row['name']}\n")[1].split("\n#### ")[0]
        assert row["summary"] in part and all(f"| `{setting['name']}` |" in part for setting in row["settings"])


def test_every_format_field_and_callback_method_is_documented() -> None:
    fields = [field.name for field in dataclasses.fields(api.Format)]
    text = page("plugins.md").split("## A format of rows")[1].split("\n## ")[0]
    assert all(f"`{name}`" in text for name in fields)
    for known in (known for known in FORMATS if known.name in ("pairs", "labelled", "prompts", "messages", "text")):
        assert all(f"`{column}`" in text for column in known.columns) and f"`{known.kind}`" in text
    text = page("callbacks.md")
    for name in (*NAMED, "contract", *(f"{call}(" for call in api.CALLS)):
        assert f"| `{name}" in text, name
    for row in named_table(discover(), plugin_kinds.CallbackInfo):
        part = text.split(f"\n## {row['name']}\n")[1].split("\n## ")[0]
        assert row["summary"] in part and all(f"| `{setting['name']}` |" in part for setting in row["settings"])


def test_every_public_name_is_documented() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    for name in alignzoo.__all__:
        assert f"alignzoo.{name}" in text, name


def test_every_loss_and_setting_is_documented() -> None:
    text = page("losses.md")
    for row in own_losses():
        part = re.split(rf"^## {row['name']}$", text, flags=re.MULTILINE)[1].split("\n## ")[0]
        assert row["paper"] in text and "Reduction:" in part
        for setting in row["settings"]:
            assert f"| `{setting['name']}` |" in part and setting["help"] in part


def own_losses() -> list[dict[str, Any]]:
    return [row for row in loss_table(discover()) if row["distribution"] == "alignzoo"]


HEADINGS = [
    "Equation", "When to use it", "Data", "Settings", "Before the first step", "Healthy metrics", "When it goes wrong",
    "How it differs", "A run",
]  # fmt: skip


@pytest.mark.parametrize("row", own_losses(), ids=lambda row: str(row["name"]))
def test_every_loss_has_its_page(row: dict[str, Any]) -> None:
    """With the same headings as the others, its paper, where each default comes from, its recipe's learning rate.

    A page without a run yet ends before that heading.
    """
    name, text = row["name"], page(f"losses/{row['name']}.md")
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) in (HEADINGS, HEADINGS[:-1])
    papers = re.findall(r"arXiv:[\d.]+\d", row["paper"])
    assert papers and all(paper in text for paper in papers) and f"`{row['data']}`" in text
    hand = re.sub(r"<!-- generated: .*?<!-- end: ", "", text, flags=re.DOTALL)
    for setting in row["settings"]:
        value = f" = {setting['default']}`" if setting["default"] else "` not set"
        assert f"`{setting['name']}{value}" in hand, setting["name"]
    recipe = (REPO / f"recipes/{name}.toml").read_text(encoding="utf-8")
    rate = tomllib.loads(recipe)["train"]["learning_rate"]
    assert f"`recipes/{name}.toml`" in hand and rate in [float(n) for n in re.findall(r"\b\d+e-\d+\b", hand)]


@pytest.mark.parametrize(
    "name", [row["name"] for row in own_losses() if "\n## A run\n" in page(f"losses/{row['name']}.md")]
)
def test_the_page_of_a_loss_shows_its_run(name: str) -> None:
    run = page(f"losses/{name}.md").split(f"<!-- run: {name} -->")[1].split("<!-- end: run -->")[0]
    assert f"../img/{name}.png" in run and re.search(r"\d\.\d", run) and "FIGURES" not in run


def test_the_metrics_on_the_pages_of_losses_are_those_of_runs() -> None:
    known = set(re.findall(r"`([\w/]+)`", page("runs.md")))
    for row in own_losses():
        text = page(f"losses/{row['name']}.md")
        named = {metric.removeprefix("eval_") for metric in re.findall(r"`(\w+/\w+)`", text)}
        assert named and named <= known, named - known


def test_values_before_the_first_step() -> None:
    """Those that the pages name, out of the losses."""
    import math

    mask = torch.ones(1, 2, dtype=torch.bool)
    ratio = alignzoo.LogProbs(policy=-torch.ones(1, 2), reference=-torch.ones(1, 2), mask=mask)
    pairs = alignzoo.Pairs(chosen=ratio, rejected=ratio)
    labelled = alignzoo.Labelled(completion=ratio, label=torch.tensor([True]), step={"baseline": torch.zeros(())})
    registry = discover()
    for name, batch, value in (
        ("dpo", pairs, math.log(2)), ("hinge", pairs, 1.0), ("ipo", pairs, 25.0), ("kto", labelled, 0.5),
    ):  # fmt: skip
        output = registry.get(name).cls()(batch)
        assert output.loss.item() == pytest.approx(value), name
        assert f"{value:.4g}" in page(f"losses/{name}.md").split("## Before the first step")[1].split("\n## ")[0]


def test_every_command_and_option_is_documented() -> None:
    text = page("cli.md")

    def walk(words: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield words, command
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(f"{words} {name}", inner)

    for words, command in walk("alignzoo", cli):
        part = re.split(rf"^## {words}$", text, flags=re.MULTILINE)[1].split("\n## ")[0]
        assert f"Usage: {words} " in part
        for parameter in command.params:
            for option in parameter.opts if not getattr(parameter, "hidden", False) else ():
                assert option in part or parameter.param_type_name == "argument"


def test_every_metric_is_documented() -> None:
    text = page("runs.md")
    names = metrics.RESERVED - {"units", "seconds"}  # kept from plugins, not written
    for name in names:
        assert f"| `{name}` |" in text, name
    for prefix in metrics.RESERVED_PREFIXES:
        assert f"`{prefix}" in text, prefix


def test_every_metric_that_a_run_writes_is_documented() -> None:
    """Names out of the code that records them, for every kind of data."""
    from alignzoo.api import KINDS, LogProbs, LossOutput

    mask = torch.tensor([[True, False], [True, True]])
    sides = {name: LogProbs(policy=torch.zeros(2, 2), reference=torch.zeros(2, 2), mask=mask) for name in "abc"}
    label, zeros = torch.tensor([True, False]), torch.zeros(2)
    given = {
        "demonstrations": {"completion": sides["a"]},
        "pairs": {"chosen": sides["a"], "rejected": sides["b"]},
        "labelled": {"completion": sides["a"], "label": label},
        "groups": {"completion": sides["a"], "rewards": zeros, "group": label.long(), "truncated": label},
    }
    documented = set(re.findall(r"`([\w/]+)`", page("runs.md")))
    assert set(given) == set(KINDS)
    for kind, cls in KINDS.items():
        for rewards in (None, (zeros, zeros) if kind == "pairs" else zeros):
            into = metrics.Accumulator()
            metrics.record(into, "x", cls(**given[kind]), LossOutput(zeros, rewards=rewards))
            found = {name for name in into.result() if not name.startswith("log_ratios/")}
            assert found and found <= documented, found - documented


def test_every_module_has_its_line() -> None:
    text = page("architecture.md")
    named = re.findall(r"^\| `([\w/.]+)` \|", text, flags=re.MULTILINE)
    top = {path.name for path in (REPO / "alignzoo").glob("*.py")} | {"data/", "testing/"}
    inner = [path.name for folder in ("data", "testing") for path in (REPO / "alignzoo" / folder).glob("*.py")]
    assert sorted(named) == sorted([*top, *inner])


def test_every_format_is_documented() -> None:
    for known in FORMATS:
        assert f"| `{known.name}` | {known.kind} |" in page("data.md")


# --- scaling and verified --------------------------------------------------------------------------------------------


def test_the_records_of_verified_are_of_configurations_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import verify

    content = json.loads(page("verified.json"))
    assert content["configurations"] == list(verify.CONFIGURATIONS)
    for record in content["records"]:
        assert record["distance"] < verify.CONFIGURATIONS[record["configuration"]].tolerance == record["tolerance"]
        assert record["configuration"] in page("verified.md") and set(record["versions"]) > set(verify.LIBRARIES)


def per_rank(billions: float, ranks: int, stage: int, training: str) -> float:
    """GB as scaling.md has it, with a reference; LoRA trains 2 % of the weights over a bfloat16 base."""
    part = 0.02 if training == "LoRA" else 1.0
    base = 0 if part == 1 else 2 / (ranks if stage == 3 else 1)
    reference = (4 if "float32" in training else 2 if part == 1 else 0) / (ranks if stage == 3 else 1)
    float32 = {0: 16, 1: 8 + 12 / ranks, 2: 4 + 16 / ranks, 3: 20 / ranks}
    bfloat16 = {0: 8, 1: 6 + 16 / ranks, 2: 2 + 16 / ranks, 3: 18 / ranks}
    return billions * (base + reference + part * (bfloat16 if training == "all, bfloat16" else float32)[stage])


def test_the_table_of_zero_stages_is_what_its_formulas_give() -> None:
    """The lowest stage at or below two thirds of the card; one card has no stages."""
    header, _, *rows = [line.split("|")[1:-1] for line in page("scaling.md").splitlines() if line.count("|") == 11]
    assert len(rows) == 9
    for row in rows:
        size, training, *cells = (cell.strip() for cell in row)
        billions = float(size[:-1]) / (1000 if size.endswith("M") else 1)
        for place, cell in zip(header[2:], cells, strict=True):
            ranks, card = map(int, re.findall(r"\d+", place))
            found = [(s, per_rank(billions, ranks, s, training)) for s in range(4 if ranks > 1 else 1)]
            fits = [f"{s}: {gb:.2g}" for s, gb in found if gb <= card * 2 / 3]
            assert cell == (fits[0] if fits else "-"), (row, place)


# --- coming from -----------------------------------------------------------------------------------------------------


def key_table(first: str) -> list[list[str]]:
    """The cells of the table of keys on coming-from.md that has this first column, without the backticks."""
    part = page("coming-from.md").split(f"| {first} | default | alignzoo | default | difference |\n")[1]
    lines = itertools.takewhile(lambda line: line.startswith("|"), part.splitlines()[1:])
    return [[cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize("first", ["TRL", "LLaMA-Factory"])
def test_our_keys_and_defaults_on_coming_from(first: str) -> None:
    rows = {f"{name}.{row.name}": row.default for name, cls in SECTIONS.items() for row in schema.rows_of(cls)}
    table = key_table(first)
    assert len(table) > 20
    for _, _, key, default, _ in table:
        assert (rows[key] or "not set") == default, key


def test_trls_keys_and_defaults_on_coming_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the version that the page names; with another one installed, the page is checked when it is updated."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    import trl

    if f"TRL {trl.__version__} " not in page("coming-from.md"):
        pytest.skip(f"the page is about another TRL than {trl.__version__}")
    configs = (trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments, trl.SFTConfig, trl.KTOConfig)
    defaults: dict[str, object] = {}
    for field in (field for config in configs for field in dataclasses.fields(config)):
        defaults.setdefault(field.name, field.default)
    for key, default, *_ in key_table("TRL"):
        assert repr(defaults[key]) == default, key
    for name in ("beta", "label_smoothing", "desirable_weight", "undesirable_weight"):
        named = [row for row in own_losses() if row["name"] in ("dpo", "kto")]
        ours = {s["default"] for row in named for s in row["settings"] if s["name"] == name}
        assert ours == {repr(defaults[name])}, name


# --- links and examples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_links_lead_somewhere(path: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", path.read_text(encoding="utf-8"))):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_relative_to(REPO) and target.exists(), link
        if anchor:
            assert anchor in slugs(target.read_text(encoding="utf-8")), link


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("text", blocks("toml"))
def test_recipes_on_the_pages_load(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole recipe as it stands; parts of one put over a small one; other TOML has to parse."""
    table = tomllib.loads(text)
    table.pop("extends", None)
    if not set(table) <= set(KNOWN):
        assert {"project", "build-system"} & set(table)
        return
    if set(SMALL) <= set(table):
        path = tmp_path / "page.toml"
        path.write_text(text, encoding="utf-8")
        recipe = load_recipe(path)
    else:
        lists = {name: value for name, value in table.items() if isinstance(value, list)}
        own = {name: value for name, value in table.items() if name not in lists}
        merged = {name: {**SMALL.get(name, {}), **own.get(name, {})} for name in {**SMALL, **own}}
        recipe = load_recipe(merged | lists)
    from alignzoo.callbacks import make_callbacks
    from alignzoo.check import find_loss
    from alignzoo.rewards import make_rewards

    monkeypatch.setenv("JUDGE_KEY", "a key")
    find_loss(recipe, discover())
    make_rewards(recipe, discover())
    make_callbacks(recipe, discover())


@pytest.mark.parametrize("text", blocks("python"))
def test_python_on_the_pages(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin is loaded, a fragment has to compile; what needs no model is run."""
    file = tmp_path / "page.py"
    file.write_text(text, encoding="utf-8")
    if "def alignzoo_formats" in text or "def alignzoo_callbacks" in text:
        (status,) = [row for row in plugin_table(discover([file])) if row["distribution"] == "file"]
        assert status["formats"] + status["callbacks"] in (["shp"], ["status-file"])  # test_doors.py runs both
        return
    if "alignzoo_losses" in text:
        losses = [info for info in discover([file]).losses().values() if info.distribution == "file"]
        assert losses and callable(losses[0].cls())
        return
    if "alignzoo_rewards" in text:
        (info,) = [info for info in discover([file]).rewards().values() if info.distribution == "file"]
        values = info.cls()(["p", "p"], ["", "a red word"], keyword=["red", "red"])
        assert values == {"keyword": [0.0, 1.0], "brevity": [1.0, 0.94]}[info.name]
        return
    code = compile(text, "page.py", "exec")
    if "alignzoo.run(" not in text and "def prepare" not in text:
        monkeypatch.chdir(REPO)
        exec(code, {})


def test_the_example_of_prepare_keeps_the_contract() -> None:
    text = next(t for _, t in _FENCE.findall(page("plugins.md")) if "def prepare" in t)
    made: dict[str, Any] = {}
    exec(text, made)
    stats = alignzoo.SequenceStats(torch.tensor([1.0, 3.0]), torch.ones(2), torch.tensor([0.0, 0.0]))
    results, state = made["prepare"](None, alignzoo.Step(rows=torch.arange(2), mismatched=stats), {"a": stats.policy})
    assert results["baseline"].item() == 2.0 and list(state) == ["a"]


def test_the_mistake_that_recipes_md_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    lines = ["", "[loss]", 'name = "dpo"', "", "[model]", 'path = "a/b"', "", "[data]", 'train = "rows"', "", "[train]"]
    Path("dpo.toml").write_text("\n".join([*lines, "learning_rate = 1", "", "batch_size = 0", ""]))
    result = CliRunner().invoke(cli, ["run", "dpo.toml", "--set", "trian.learning_rate=1"])
    assert result.stderr.strip() in page("recipes.md")


def test_the_pages_speak_of_the_project_alone() -> None:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/work/|/tmp/|/home/|/root/|localhost", text), path
