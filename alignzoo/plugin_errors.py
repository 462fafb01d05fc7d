"""What is wrong with a plugin, in one line with its place. It imports no torch."""

from __future__ import annotations

import importlib.util
import inspect
import re
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pluggy

from alignzoo import hookspecs, schema
from alignzoo.declared import place
from alignzoo.errors import PluginError


def hook_fault(manager: pluggy.PluginManager, plugin: Any) -> str:
    """What is wrong with the hooks of a plugin that was refused, each with its place; "" where nothing is found."""
    specs = [name for name in dir(hookspecs) if manager.parse_hookspec_opts(hookspecs, name) is not None]
    faults = []
    for name in (n for n in dir(plugin) if manager.parse_hookimpl_opts(plugin, n) is not None):
        function = getattr(plugin, name)
        if name not in specs:
            faults.append(f'unknown hook "{name}"{schema.nearest(name, specs)}{place(function)}')
            continue
        wanted, found = (inspect.signature(f) for f in (getattr(hookspecs, name), function))
        if set(found.parameters) - set(wanted.parameters):
            takes = ", ".join(wanted.parameters) or "no arguments"
            faults.append(f"{name}{found} has arguments that the hook has not: it takes {takes}{place(function)}")
    return "; ".join(faults)


def one_line(error: BaseException, roots: Sequence[Path]) -> str:
    """Exception type, message, and the innermost line of the plugin's own files."""
    syntax = isinstance(error, SyntaxError)
    message = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno))
    own = [f for f in frames if any(Path(f[0]).resolve().is_relative_to(root) for root in roots)]
    own = own or (frames[-1:] if syntax else [])
    kind = "" if isinstance(error, PluginError) else f"{type(error).__name__}: "
    return f"{kind}{message}" + (f" ({own[-1][0]}:{own[-1][1]})" if own else "")


def own_files(origin: str, installed: bool) -> list[Path]:
    """The file of a plugin, or the folders of its package."""
    if not installed:
        return [Path(origin).resolve()]
    top = re.split(r"[.:]", origin)[0].strip()
    with suppress(Exception):  # a module that is not there has no files
        spec = importlib.util.find_spec(top)
        if spec is not None:
            places = spec.submodule_search_locations or ([spec.origin] if spec.origin else [])
            return [Path(place).resolve() for place in places]
    return []
