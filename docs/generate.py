"""Writes the generated parts of docs/*.md: `python docs/generate.py`. With --check it only names the stale pages.

A page holds `<!-- generated: NAME -->` and `<!-- end: NAME -->`; what stands between them is made here from the code,
what stands around them is written by hand and kept.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from alignzoo import schema
from alignzoo.cli import cli
from alignzoo.data.formats import FORMATS
from alignzoo.data.rows import REASONS
from alignzoo.plugins import BLOCK, LossInfo, discover, loss_table
from alignzoo.recipe import SECTIONS
from alignzoo.tables import reference_in_words

DOCS = Path(__file__).resolve().parent
EXAMPLE = DOCS.parent / "tests" / "fixtures_plugins" / "alignzoo_ipo2.py"
WIDTH = 100  # columns of the --help pages
_PART = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end: (?P=name) -->)", re.DOTALL)
_MARK = re.compile(r"<!-- (?:generated|end): ")
_ABOUT = {
    "model": "What is trained.",
    "reference": "What the policy is compared with. A loss that needs no reference leaves this section without effect.",
    "data": "What is learned from. See [data.md](data.md).",
    "train": "What the result depends on.",
    "engine": "What the machine needs. It changes nothing but rounding.",
    "checkpoint": "Copies of the model during the run.",
    "eval": "When the held-out rows are evaluated.",
    "samples": "Answers of the model before and after training, for `samples.md`.",
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
    return lines


def nested(section: str, cls: type) -> dict[type, list[str]]:
    """The tables inside of a section, each with the headers that a recipe writes it under."""
    found: dict[type, list[str]] = {}
    for key, annotation in schema.type_hints(cls).items():
        for inner, listed in schema.nested_in(annotation):
            header = f"[[{section}.{key}]]" if listed else f"[{section}.{key}]"
            found.setdefault(inner, []).append(header)
    return found


# --- losses.md


def losses() -> list[str]:
    """The losses that come with alignzoo, in a table and then each with its docstring and settings."""
    registry = discover()
    rows = [row for row in loss_table(registry) if row["distribution"] == "alignzoo"]
    overview = [
        (f"[`{r['name']}`](#{r['name']})", r["family"], r["data"], reference_in_words(r), r["paper"]) for r in rows
    ]
    lines = [*table(("loss", "family", "data", "reference", "paper"), overview), ""]
    for row in rows:
        info = registry.get(row["name"])
        lines += [f"## {row['name']}", "", inspect.cleandoc(module_doc(info)), ""]
        settings = schema.rows_of(info.cls.Settings)
        lines += [*setting_rows(settings), ""] if settings else ["It has no settings.", ""]
    return lines


def module_doc(info: LossInfo) -> str:
    """The docstring of the file that a loss stands in: paper, equation, reduction, deviations."""
    return sys.modules[info.cls.__module__].__doc__ or ""


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


def example() -> list[str]:
    """The plugin that the tests load."""
    return ["```python", EXAMPLE.read_text(encoding="utf-8").rstrip("\n"), "```"]


PARTS: dict[str, Callable[[], list[str]]] = {
    "sections": sections, "losses": losses, "commands": commands, "formats": formats, "reasons": reasons,
    "example": example,
}  # fmt: skip


# --- pages


def render(text: str, page: str) -> str:
    """A page with its generated parts made anew. Raises ValueError for a marker that fits nothing."""
    parts = list(_PART.finditer(text))
    if len(_MARK.findall(text)) != 2 * len(parts):
        raise ValueError(f"{page}: a marker without its partner, or one inside of another part")
    for part in parts:
        if part["name"] not in PARTS:
            raise ValueError(f'{page}: no part is called "{part["name"]}"; there are {", ".join(PARTS)}')
    return _PART.sub(lambda part: part[1] + "\n" + "\n".join(PARTS[part["name"]]()).strip() + "\n\n" + part[4], text)


def stale(folder: Path = DOCS) -> dict[Path, str]:
    """The pages that differ from what the code says, with the text that they should have."""
    os.environ.pop(BLOCK, None)  # what is blocked here is documented all the same
    pages = {page: page.read_text(encoding="utf-8") for page in sorted(folder.glob("*.md"))}
    fresh = {page: render(text, page.name) for page, text in pages.items()}
    return {page: text for page, text in fresh.items() if text != pages[page]}


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 where a page is stale.")
def main(check: bool) -> None:
    """Write the generated parts of docs/*.md."""
    pages = stale()
    for page, text in pages.items():
        click.echo(f"{page.name}: {'stale, run `python docs/generate.py`' if check else 'written'}")
        if not check:
            page.write_text(text, encoding="utf-8")
    if check and pages:
        sys.exit(1)


if __name__ == "__main__":
    main()
