"""`alignzoo new-plugin`: a distribution with one loss that installs, passes its own tests and trains as it stands."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path

from alignzoo.api import CONTRACT, KINDS
from alignzoo.errors import PluginError
from alignzoo.plugins import discover

WORDS = {
    "pairs": "preference pairs", "labelled": "labelled rows", "demonstrations": "demonstrations",
    "groups": "groups of sampled answers",
}  # fmt: skip
_NAME = re.compile(r"(?=.{1,40}$)[a-z][a-z0-9]*(-[a-z0-9]+)*")  # of PEP 503, and with _ for - an identifier


def new_plugin(name: str, data: str = "pairs", loss: str | None = None, folder: Path = Path()) -> Path:
    """Write the distribution `name` below `folder`, with a loss on the kind `data`; gives the folder made.

    loss: its name in recipes; `name` if not given. Raises PluginError, with nothing written, for a name that cannot be
    one, for a module or a loss of that name that is installed, and for a folder that is there.
    """
    loss, target = loss or name, folder / name
    for word in (name, loss):
        _check_word(word)
    if data not in KINDS:
        raise PluginError(f'"{data}" is no kind of data', fix=f"one of {', '.join(KINDS)}")
    module = name.replace("-", "_")
    if target.exists() or target.is_symlink():
        raise PluginError(f"{target}: is there already", why="nothing is overwritten", fix="take another name")
    _check_free(module, loss)
    for path, text in files_of(name, module, loss, data).items():
        file = target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return target


def _check_word(name: str) -> None:
    if not _NAME.fullmatch(name):
        meant = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        raise PluginError(
            f'"{name}" cannot be the name of a plugin',
            why="it begins with a letter, and has up to 40 lower-case letters and digits with single - between them",
            fix=f'"{meant}" can' if _NAME.fullmatch(meant) else "",
        )
    if keyword.iskeyword(name):
        raise PluginError(f'"{name}" is a word of Python, no module can be named so', fix=f'for example "{name}-po"')


def _check_free(module: str, loss: str) -> None:
    """Neither a module nor a loss of these names is installed."""
    if importlib.util.find_spec(module) is not None:
        raise PluginError(
            f'a module "{module}" is there already',
            why="the plugin's module would hide it, or be hidden by it",
            fix="take another name",
        )
    taken = {name: info.distribution for name, info in discover().losses().items()}
    if loss in taken:
        raise PluginError(
            f'a loss "{loss}" is installed already, by {taken[loss]}',
            why="two losses of one name are both refused",
            fix="take another name, or name the loss otherwise with --loss",
        )


def files_of(name: str, module: str, loss: str, data: str) -> dict[str, str]:
    """The text of every file, by its path below the distribution's folder."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(  # << >>: what is written is full of braces, TOML, YAML and Python
        loader=PackageLoader("alignzoo", "templates/plugin"), undefined=StrictUndefined, keep_trailing_newline=True,
        variable_start_string="<<", variable_end_string=">>", block_start_string="<%", block_end_string="%>",
        comment_start_string="<#", comment_end_string="#>", trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    values = {
        "name": name, "module": module, "loss": loss, "data": data, "words": WORDS[data], "contract": CONTRACT,
        "class_name": "".join(part.capitalize() for part in loss.split("-")) + "Loss",
    }  # fmt: skip

    def filled(template: str) -> str:
        return environment.get_template(f"{template}.jinja").render(values)

    values["settings"] = filled(f"{data}/settings.md")
    same = ("pyproject.toml", "README.md", "LICENSE", "conftest.py", "recipe.toml")
    return {path: filled(path) for path in same} | {
        ".gitignore": filled("gitignore"),
        ".github/workflows/test.yml": filled("test.yml"),
        f"{module}.py": filled(f"{data}/module.py"),
        f"tests/test_{module}.py": filled(f"{data}/test_module.py"),
        "train.jsonl": filled(f"{data}/train.jsonl"),
    }
