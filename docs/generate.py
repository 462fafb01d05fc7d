"""Writes the generated parts of the pages here: `python docs/generate.py`. With --check it only names the stale pages.

A page holds `<!-- generated: NAME -->` and `<!-- end: NAME -->`; what stands between them is made here from the code,
what stands around them is written by hand and kept. So is what stands between `<!-- run: LOSS -->` and
`<!-- end: run -->`: the figures of a run of that loss's recipe.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import runpy
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from alignzoo import schema
from alignzoo.api import INVARIANCES
from alignzoo.cli import cli
from alignzoo.data.formats import FORMATS
from alignzoo.data.lint_rules import RULES
from alignzoo.data.rows import REASONS
from alignzoo.plugin_kinds import CallbackInfo, LossInfo, RewardInfo
from alignzoo.plugins import BLOCK, Registry, discover, loss_table, named_table
from alignzoo.recipe import SECTIONS, CallbackKeys, RewardKeys
from alignzoo.tables import reference_in_words

DOCS = Path(__file__).resolve().parent
LAYOUTS = DOCS.parent / "tests" / "layouts_of_models.py"
EXAMPLES = DOCS.parent / "tests" / "fixtures_plugins"
WIDTH = 100  # columns of the --help pages
_PART = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end: (?P=name) -->)", re.DOTALL)
_RUN = re.compile(r"<!-- run: [\w-]+ -->\n.*?<!-- end: run -->", re.DOTALL)
_MARK = re.compile(r"<!-- (?:generated|run|end): ")
_ABOUT = {
    "model": "What is trained.",
    "reference": "What the policy is compared with. A loss that needs no reference leaves this section without effect.",
    "data": "What is learned from. See [data.md](data.md).",
    "train": "What the result depends on.",
    "engine": "What the machine needs. It changes nothing but rounding. Many ranks: [scaling.md](scaling.md).",
    "checkpoint": "All that a run needs to go on after it was stopped. See [checkpoints.md](checkpoints.md).",
    "eval": "When the held-out rows are evaluated.",
    "watch": "What is told while a run goes wrong. See [watch.md](watch.md).",
    "samples": "Answers of the model before and after training, for `samples.md`.",
    "rollout": "With this section the rows are prompts, answered during the run. See [online.md](online.md).",
    "log": "How often metrics are written, and where else. See [runs.md](runs.md).",
    "output": "Where the run directory is made and what is saved in it.",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def setting_rows(rows: Sequence[schema.Row]) -> list[str]:
    """A table of settings."""
    cells = [
        (code(r.name), r.type, r.default if r.default == "required" else code(r.default) or "not set", r.range, r.help)
        for r in rows
    ]
    return table(("key", "type", "default", "range", "meaning"), cells)


# --- recipes.md


def sections() -> list[str]:
    """Every section with its keys, and the tables inside of it."""
    lines = []
    for name, cls in SECTIONS.items():
        own = [row for row in schema.rows_of(cls) if "." not in row.name]
        lines += [f"### [{name}]", "", _ABOUT[name], "", *setting_rows(own), ""]
        for inner, places in nested(name, cls).items():
            lines += [f"### {' and '.join(places)}", "", *setting_rows(schema.rows_of(inner)), ""]
    about = "How good the model's own answers are. All other keys are the reward's own: see [rewards.md](rewards.md)."
    lines += ["### [[rewards]]", "", about, "", *setting_rows(schema.rows_of(RewardKeys)), ""]
    about = (
        "Who is told what happens in the run. All other keys are the callback's own: see [callbacks.md](callbacks.md)."
    )
    return [*lines, "### [[callbacks]]", "", about, "", *setting_rows(schema.rows_of(CallbackKeys)), ""]


def nested(section: str, cls: type) -> dict[type, list[str]]:
    """The tables inside of a section, each with the headers that a recipe writes it under."""
    found: dict[type, list[str]] = {}
    for key, annotation in schema.type_hints(cls).items():
        for inner, listed in schema.nested_in(annotation):
            header = f"[[{section}.{key}]]" if listed else f"[{section}.{key}]"
            found.setdefault(inner, []).append(header)
    return found


# --- losses.md and losses/*.md


def own_losses(registry: Registry) -> list[Mapping[str, Any]]:
    """The losses that come with alignzoo."""
    return [row for row in loss_table(registry) if row["distribution"] == "alignzoo"]


def losses() -> list[str]:
    """The losses that come with alignzoo, in a table and then each with its docstring and settings."""
    registry = discover()
    rows = own_losses(registry)
    overview = [
        (f"[`{r['name']}`](#{r['name']})", r["family"], r["data"], reference_in_words(r), r["paper"]) for r in rows
    ]
    lines = [*table(("loss", "family", "data", "reference", "paper"), overview), ""]
    for row in rows:
        info, name = registry.get(row["name"]), row["name"]
        link = f"When to use it, what to watch, a run: [losses/{name}.md](losses/{name}.md)."
        lines += [f"## {name}", "", inspect.cleandoc(module_doc(info)), "", link, "", *settings(info), ""]
    return lines


def settings(info: LossInfo) -> list[str]:
    """The settings of a loss."""
    rows = schema.rows_of(info.cls.Settings)
    return setting_rows(rows) if rows else ["It has no settings."]


def equation(info: LossInfo) -> list[str]:
    """The indented lines of the docstring that a loss's file begins with. Raises ValueError where there are none."""
    lines = [line for line in inspect.cleandoc(module_doc(info)).splitlines() if line.startswith("    ")]
    if not lines:
        raise ValueError(f"{info.cls.__module__}: its docstring has no equation, indented by four spaces")
    return ["```text", *textwrap.dedent("\n".join(lines)).splitlines(), "```"]


def module_doc(info: LossInfo) -> str:
    """The docstring of the file that a loss stands in: paper, equation, reduction, deviations."""
    return sys.modules[info.cls.__module__].__doc__ or ""


# --- rewards.md and callbacks.md


def rewards() -> list[str]:
    """The rewards that come with alignzoo, in a table and then each with its docstring and settings."""
    rows = own_rows(RewardInfo)
    lines = [*table(("reward", "value"), [(code(row["name"]), row["summary"]) for row in rows]), ""]
    return [*lines, *(line for row in rows for line in described(RewardInfo, row, "####"))]


def callbacks() -> list[str]:
    """The callbacks that come with alignzoo, each with its docstring and settings."""
    return [line for row in own_rows(CallbackInfo) for line in described(CallbackInfo, row, "##")]


def own_rows(kind: type[RewardInfo | CallbackInfo]) -> list[Mapping[str, Any]]:
    return [row for row in named_table(discover(), kind) if row["distribution"] == "alignzoo"]


def described(kind: type[RewardInfo | CallbackInfo], row: Mapping[str, Any], level: str) -> list[str]:
    """Docstring and settings of a class."""
    cls = discover().one(kind, row["name"]).cls
    own = schema.rows_of(cls.Settings)
    settings = setting_rows(own) if own else ["It has no settings."]
    return [f"{level} {row['name']}", "", inspect.cleandoc(cls.__doc__ or ""), "", *settings, ""]


# --- cli.md


def commands() -> list[str]:
    """The --help of every command."""
    lines = []
    for words, command in walk(("alignzoo",), cli):
        context = click.Context(command, info_name=" ".join(words), terminal_width=WIDTH)
        context.help_option_names = ["-h", "--help"]
        lines += [f"## {' '.join(words)}", "", "```text", command.get_help(context), "```", ""]
    return lines


def walk(words: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from walk((*words, name), command.commands[name])


# --- data.md and plugins.md


def formats() -> list[str]:
    """The formats of rows, in the order in which they are tried."""
    rows = [(code(f.name), f.kind, ", ".join(map(code, f.columns)), f.description) for f in FORMATS]
    return table(("format", "kind", "columns", "rows"), rows)


def reasons() -> list[str]:
    """The reasons under which rows are counted."""
    return table(("reason", "meaning"), [(code(reason), words) for reason, words in REASONS.items()])


def lint_rules() -> list[str]:
    """What `alignzoo data lint` finds by rules of its own."""
    cells = [(code(name), r.severity, r.what, r.causes, r.fix) for name, r in RULES.items()]
    return table(("finding", "severity", "what", "in training", "to do"), cells)


def layouts() -> list[str]:
    """What `auto` makes of the rows of tiny models of many classes, as the tests hold it."""
    return table(("model", "rows"), list(runpy.run_path(str(LAYOUTS))["EXPECTED"].items()))


def example(file: str) -> list[str]:
    """A plugin that the tests load."""
    return ["```python", (EXAMPLES / file).read_text(encoding="utf-8").rstrip("\n"), "```"]


# --- verified.md


def verified() -> list[str]:
    """The records of benchmarks/verify.py, a row for each; a configuration without one has a row too."""
    content, rows = json.loads((DOCS / "verified.json").read_text(encoding="utf-8")), []
    for name in content["configurations"]:
        found = [r for r in content["records"] if r["configuration"] == name]
        rows += [verified_row(record) for record in found] or [(name, "nobody yet", "", "", "", "")]
    return table(("configuration", "hardware", "versions", "date", "distance", "tolerance"), rows)


def verified_row(record: Mapping[str, Any]) -> Sequence[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    numbers = (f"{record['distance']:g}", f"{record['tolerance']:g}")
    return record["configuration"], record["hardware"], versions, record["date"], *numbers


# --- conformance.md


def checks() -> list[str]:
    """The checks of `alignzoo conform`."""
    from alignzoo.testing import CHECKS

    return table(
        ("check", "what holds", "usual cause of a failure"), [(code(c.name), c.holds, c.cause) for c in CHECKS.values()]
    )


def draws() -> list[str]:
    """The log-probs that a loss is tried on."""
    from alignzoo.testing.rows import ABOUT

    return table(("draw", "log-probs"), [(code(name), words) for name, words in ABOUT.items()])


def invariances() -> list[str]:
    """What a loss may declare in `invariances`."""
    return table(("name", "meaning"), [(code(name), words) for name, words in INVARIANCES.items()])


def mutants() -> list[str]:
    """The counts of benchmarks/mutants.py, a row for each loss; then the mutants that no test could tell apart."""
    records = json.loads((DOCS / "mutants.json").read_text(encoding="utf-8"))
    rows = [mutant_row(name, record) for name, record in records.items()]
    lines = [*table(("loss", "mutants", "by conform", "by the oracle", "equivalent", "survive", "killed"), rows), ""]
    for name, record in records.items():
        lines += [f"- {name}, `{what}`. Equivalent: {why}." for what, why in record["equivalent"].items()]
        lines += [f"- {name}, `{what}`. Survives." for what in record["survivors"]]
    return lines


def mutant_row(name: str, record: Mapping[str, Any]) -> Sequence[str]:
    killed, equivalent = record["conform"] + record["oracle"], len(record["equivalent"])
    counts = (record["mutants"], record["conform"], record["oracle"], equivalent, len(record["survivors"]))
    return name, *map(str, counts), f"{100 * killed / (record['mutants'] - equivalent):.0f} %"


PARTS: dict[str, Callable[[], list[str]]] = {
    "sections": sections, "losses": losses, "commands": commands, "formats": formats, "reasons": reasons,
    "layouts": layouts, "verified": verified, "rewards": rewards, "lint-rules": lint_rules, "checks": checks,
    "draws": draws, "invariances": invariances, "mutants": mutants,
    "example": partial(example, "alignzoo_ipo2.py"), "reward-example": partial(example, "alignzoo_brevity.py"),
    "callbacks": callbacks, "format-example": partial(example, "alignzoo_shp.py"),
    "callback-example": partial(example, "alignzoo_status.py"),
}  # fmt: skip


# --- pages


def all_parts() -> dict[str, Callable[[], list[str]]]:
    """Every part by its name: those of PARTS, and of each loss its equation and its settings."""
    registry = discover()
    found = dict(PARTS)
    for row in own_losses(registry):
        info = registry.get(row["name"])
        found[f"equation-{row['name']}"] = partial(equation, info)
        found[f"settings-{row['name']}"] = partial(settings, info)
    return found


def render(text: str, page: str, known: Mapping[str, Callable[[], list[str]]]) -> str:
    """A page with its generated parts made anew. Raises ValueError for a marker that fits nothing."""
    parts = list(_PART.finditer(text))
    if len(_MARK.findall(_RUN.sub("", text))) != 2 * len(parts):
        raise ValueError(f"{page}: a marker without its partner, or one inside of another part")
    for part in parts:
        if part["name"] not in known:
            raise ValueError(f'{page}: no part is called "{part["name"]}"; there are {", ".join(known)}')
    return _PART.sub(lambda part: part[1] + "\n" + "\n".join(known[part["name"]]()).strip() + "\n\n" + part[4], text)


def stale(folder: Path = DOCS) -> dict[Path, str]:
    """The pages that differ from what the code says, with the text that they should have."""
    os.environ.pop(BLOCK, None)  # what is blocked here is documented all the same
    known = all_parts()
    pages = {page: page.read_text(encoding="utf-8") for page in sorted(folder.rglob("*.md"))}
    fresh = {page: render(text, str(page.relative_to(folder)), known) for page, text in pages.items()}
    return {page: text for page, text in fresh.items() if text != pages[page]}


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 where a page is stale.")
def main(check: bool) -> None:
    """Write the generated parts of the pages in docs/."""
    pages = stale()
    for page, text in pages.items():
        name = page.relative_to(DOCS)
        click.echo(f"{name}: {'stale, run `python docs/generate.py`' if check else 'written'}")
        if not check:
            page.write_text(text, encoding="utf-8")
    if check and pages:
        sys.exit(1)


if __name__ == "__main__":
    main()
