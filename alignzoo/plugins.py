"""The plugin host: losses found by their metadata, imported when needed, and kept from breaking one another.

`discover` reads the entry points of the group "alignzoo" without importing anything; a `Registry` imports them when a
loss is asked for, each in a try of its own. alignzoo's own losses come through the same door. It imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from pathlib import Path
from typing import Any, Literal

import pluggy

from alignzoo import hookspecs, schema
from alignzoo.api import Loss
from alignzoo.declared import check_loss_class, place
from alignzoo.errors import PluginError

GROUP = "alignzoo"
BLOCK = "ALIGNZOO_BLOCK_PLUGINS"
State = Literal["found", "loaded", "blocked", "broken"]


@dataclass(frozen=True)
class LossInfo:
    """A loss class and who brought it."""

    cls: type[Loss]
    name: str
    distribution: str  # "file" for --plugin, "python" for a class given from Python
    version: str  # of the distribution; "sha256:..." of a file; "" where there is none
    label: str  # the entry point's name; a file's stem
    origin: str  # the module that the entry point names; a file's absolute path; a class's module and name

    @property
    def owner(self) -> str:
        """The plugin in words, for errors."""
        return f"{self.distribution} {self.version}".strip() + f' ("{self.label}", {self.origin})'


@dataclass(frozen=True)
class PluginStatus:
    """What became of one plugin. "found" is one that nobody has needed yet, so it was not imported."""

    label: str
    distribution: str
    version: str
    state: State
    losses: tuple[str, ...]
    error: str


@dataclass
class _Plugin:
    """One door to losses, and what became of it."""

    label: str
    distribution: str
    version: str
    origin: str
    load: Callable[[], Any]  # imports it: the module or object whose hooks are read
    installed: bool = True  # False: a file that the user named, whose failure is not to be passed over
    state: State = "found"
    error: str = ""
    losses: tuple[LossInfo, ...] = ()

    def info(self, cls: type[Loss]) -> LossInfo:
        return LossInfo(cls, cls.name, self.distribution, self.version, self.label, self.origin)

    def words(self) -> str:
        return f'"{self.label}" ({f"{self.distribution} {self.version}".strip()})'


class Registry:
    """The losses that can be had, by name. Made by `discover`; imports a plugin when its losses are first asked for.

    `warnings` are lines for the user about the discovery itself, such as an unknown name among the blocked.
    """

    def __init__(self, plugins: Sequence[_Plugin], warnings: Sequence[str] = ()) -> None:
        self._plugins = tuple(plugins)
        self.warnings = tuple(warnings)

    def losses(self) -> dict[str, LossInfo]:
        """Every loss whose name has one owner. Imports all plugins; raises PluginError for a broken --plugin file."""
        return {name: owners[0] for name, owners in self._owners().items() if len(owners) == 1}

    def duplicates(self) -> dict[str, tuple[LossInfo, ...]]:
        """The names that more than one class claims, and their owners. `get` refuses them."""
        return {name: owners for name, owners in self._owners().items() if len(owners) > 1}

    def get(self, name: str) -> LossInfo:
        """The loss of that name. Raises PluginError where none or more than one has it, with the way out."""
        owners = self._owners()
        if name not in owners:
            raise self._unknown(name, owners)
        if len(owners[name]) > 1:
            raise _ambiguous(name, owners[name])
        return owners[name][0]

    def statuses(self) -> list[PluginStatus]:
        """All plugins as they stand now; imports none (`losses` does, and `plugin_table`)."""
        return [
            PluginStatus(p.label, p.distribution, p.version, p.state, tuple(i.name for i in p.losses), p.error)
            for p in self._plugins
        ]

    def load(self) -> None:
        """Import whatever has not been imported. A plugin that fails is marked as broken and raises nothing."""
        for plugin in self._plugins:
            if plugin.state == "found":
                _load(plugin)

    def _owners(self) -> dict[str, tuple[LossInfo, ...]]:
        self.load()
        for plugin in self._plugins:
            if plugin.state == "broken" and not plugin.installed:
                raise PluginError(
                    f"the plugin file {plugin.origin} cannot be used",
                    why=plugin.error,
                    fix="mend the file, or leave out its --plugin",
                )
        owners: dict[str, tuple[LossInfo, ...]] = {}
        for info in (info for plugin in self._plugins for info in plugin.losses):
            before = owners.get(info.name, ())
            if all(info.cls is not other.cls for other in before):  # one class by two doors is no conflict
                owners[info.name] = (*before, info)
        return owners

    def _unknown(self, name: str, known: Iterable[str]) -> PluginError:
        names = sorted(known)
        broken = [p for p in self._plugins if p.state == "broken"]
        blocked = [p for p in self._plugins if p.state == "blocked"]
        lines = ["the losses are " + (", ".join(names) or "none at all")]
        lines += [
            f"the plugin {p.words()} is broken and may have it: {p.error}"
            for p in sorted(broken, key=lambda p: -_likeness(name, p))
        ]
        lines += [f"the plugin {p.words()} is blocked by {BLOCK} and may have it" for p in blocked]
        fix = "take a known name, install the plugin that has it, or give its file with --plugin FILE"
        return PluginError(
            f'there is no loss "{name}"{schema.nearest(name, names)}',
            why="\n       ".join(lines),
            fix=fix + ("; `alignzoo plugins` lists them all" if broken or blocked else ""),
        )


def discover(plugin_files: Sequence[Path] = (), losses: Sequence[type[Loss]] = ()) -> Registry:
    """Find plugins without importing them: installed ones, files (--plugin), and classes given from Python.

    Raises PluginError for a file that is not there and for a class that breaks the contract.
    """
    plugins = _installed()
    warnings = _block(plugins, os.environ.get(BLOCK, ""))
    plugins += [_from_file(path) for path in dict.fromkeys(Path(p).resolve() for p in plugin_files)]
    plugins += [_from_class(cls) for cls in dict.fromkeys(losses)]
    return Registry(plugins, warnings)


# --- the doors -----------------------------------------------------------------------------------------------------


def _installed() -> list[_Plugin]:
    try:
        found = [_from_entry_point(point) for point in entry_points(group=GROUP)]
    except Exception:  # a damaged entry_points.txt of any distribution stops the quick way
        found = [plugin for distribution in distributions() for plugin in _of_distribution(distribution)]
    unique = {(p.distribution, p.label, p.origin): p for p in reversed(found)}  # the first on sys.path is kept
    return sorted(unique.values(), key=lambda p: (p.distribution, p.label))


def _of_distribution(distribution: Distribution) -> list[_Plugin]:
    try:
        return [_from_entry_point(point) for point in distribution.entry_points.select(group=GROUP)]
    except Exception as error:
        name, version = _name_and_version(distribution)
        text = f"its entry_points.txt cannot be read: {type(error).__name__}: {error}"
        return [_Plugin(name, name, version, "entry_points.txt", _not_loadable, state="broken", error=text)]


def _not_loadable() -> Any:
    raise AssertionError("a plugin that is broken from the start is not loaded")


def _from_entry_point(point: EntryPoint) -> _Plugin:
    name, version = _name_and_version(point.dist)
    return _Plugin(point.name, name, version, point.value, point.load)


def _name_and_version(distribution: Distribution | None) -> tuple[str, str]:
    with suppress(Exception):  # damaged metadata: the plugin itself may still work
        if distribution is not None:
            return distribution.metadata["Name"] or "unknown", distribution.version or ""
    return "unknown", ""


def _from_file(path: Path) -> _Plugin:
    try:
        source = path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise PluginError(
            f"the plugin file {path} cannot be read: {reason}", fix="mend the path of --plugin"
        ) from error
    digest = hashlib.sha256(source).hexdigest()[:12]
    load = partial(_import_file, path, source)
    return _Plugin(path.stem, "file", f"sha256:{digest}", str(path), load, installed=False)


def _import_file(path: Path, source: bytes) -> types.ModuleType:
    """The module of a file that was read: what runs is what was hashed, and it lies in sys.modules for type hints."""
    digest = hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()[:12]
    stem = re.sub(r"\W", "_", path.stem)
    name = f"alignzoo_plugin_{stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=SourceFileLoader(name, str(path)))
    assert spec is not None, "a loader was given"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_class(cls: type[Loss]) -> _Plugin:
    check_loss_class(cls)
    origin = f"{cls.__module__}.{cls.__qualname__}"
    plugin = _Plugin("python", "python", "", origin, _not_loadable, installed=False, state="loaded")
    plugin.losses = (plugin.info(cls),)
    return plugin


def _block(plugins: Iterable[_Plugin], text: str) -> list[str]:
    """Mark the plugins that are named by label or distribution; a line for every name that fits nothing."""
    plugins, warnings = list(plugins), []
    for word in filter(None, re.split(r"[,\s]+", text)):
        hit = [p for p in plugins if word == p.label or _canonical(word) == _canonical(p.distribution)]
        for plugin in hit:
            plugin.state, plugin.error = "blocked", ""
        if not hit:
            known = sorted({p.label for p in plugins} | {p.distribution for p in plugins})
            warnings.append(
                f'{BLOCK} names "{word}"{schema.nearest(word, known)}, which is no installed plugin: '
                f"the labels and distributions are {', '.join(known)}"
            )
    return warnings


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


# --- loading -------------------------------------------------------------------------------------------------------


def _load(plugin: _Plugin) -> None:
    try:
        classes = _call_hook(plugin.load(), plugin.label)
        _check_classes(classes)
        plugin.losses = tuple(plugin.info(cls) for cls in classes)
        plugin.state = "loaded"
    except (Exception, SystemExit) as error:
        plugin.state, plugin.error, plugin.losses = "broken", _one_line(error, _own_files(plugin)), ()


def _call_hook(plugin: Any, label: str) -> list[type[Loss]]:
    """Register on a manager of its own, compare all hooks with the specs, and ask for the losses."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, name=label)  # compares the arguments
        manager.check_pending()  # compares the names
    except pluggy.PluginValidationError as error:
        raise PluginError(_hook_fault(manager, plugin) or str(error)) from error
    if not manager.get_hookcallers(plugin):
        raise PluginError("it implements no hook: is alignzoo_losses() there, and marked with @alignzoo.hookimpl?")
    results = manager.hook.alignzoo_losses()
    if len(results) != 1 or not isinstance(results[0], list | tuple):
        got = type(results[0]).__name__ if results else "None"
        raise PluginError(f"alignzoo_losses() returned {got}, not a list of classes{place(plugin.alignzoo_losses)}")
    return list(results[0])


def _hook_fault(manager: pluggy.PluginManager, plugin: Any) -> str:
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


def _check_classes(classes: Sequence[type[Loss]]) -> None:
    faults = []
    for cls in classes:
        try:
            check_loss_class(cls)
        except PluginError as error:
            faults.append(str(error))
    names = [cls.name for cls in classes] if not faults else []
    faults += [f'two of its classes are named "{name}"' for name in dict.fromkeys(names) if names.count(name) > 1]
    if faults:
        raise PluginError("; ".join(faults))


def _one_line(error: BaseException, roots: Sequence[Path]) -> str:
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


def _own_files(plugin: _Plugin) -> list[Path]:
    """The file of a plugin, or the folders of its package."""
    if not plugin.installed:
        return [Path(plugin.origin).resolve()]
    top = re.split(r"[.:]", plugin.origin)[0].strip()
    with suppress(Exception):  # a module that is not there has no files
        spec = importlib.util.find_spec(top)
        if spec is not None:
            places = spec.submodule_search_locations or ([spec.origin] if spec.origin else [])
            return [Path(place).resolve() for place in places]
    return []


# --- errors and tables ---------------------------------------------------------------------------------------------


def _likeness(name: str, plugin: _Plugin) -> float:
    """How likely it is, from 0 to 1, that a plugin has the loss: its names contain the loss's or look like it."""
    words = [w.lower() for w in (plugin.label, plugin.distribution, plugin.origin)]
    bare = [re.sub(r"^alignzoo[-_.]?", "", word) for word in words]
    return max(1.0 if name.lower() in word else SequenceMatcher(None, name.lower(), word).ratio() for word in bare)


def _ambiguous(name: str, owners: Sequence[LossInfo]) -> PluginError:
    labels = [info.label for info in owners if info.distribution not in ("file", "python")]
    outs = []
    for info in owners:
        if info.distribution == "file":
            outs.append(f"leave out --plugin {info.origin}")
        elif info.distribution == "python":
            outs.append(f"rename {info.origin}")
        else:
            outs.append(f"block with {BLOCK}={info.distribution if labels.count(info.label) > 1 else info.label}")
    return PluginError(
        f'{len(owners)} losses are named "{name}"',
        why="they come from " + " and from ".join(info.owner for info in owners),
        fix=", or ".join(outs),
    )


def make_loss(
    info: LossInfo, settings_table: Mapping[str, Any], problems: list[schema.Problem], path: schema.Path
) -> Loss | None:
    """A loss from the settings of its table in the recipe (without `name`). None where a problem was added."""
    try:
        settings = schema.build(info.cls.Settings, settings_table, path, problems)
        return None if settings is None else info.cls(settings)
    except (ValueError, PluginError) as error:  # settings that do not go together, refused by the plugin itself
        problems.append(schema.Problem(path, f'loss "{info.name}": {error}'))
        return None


def loss_table(registry: Registry) -> list[dict[str, Any]]:
    """The rows of `alignzoo losses --json`: one for each loss, and one for each owner of a name that has several."""
    rows = [*registry.losses().values(), *(info for owners in registry.duplicates().values() for info in owners)]
    twice = registry.duplicates()
    return [
        _loss_row(info, info.name in twice) for info in sorted(rows, key=lambda info: (info.name, info.distribution))
    ]


def _loss_row(info: LossInfo, duplicate: bool) -> dict[str, Any]:
    declared = vars(info.cls)["needs_reference"]
    return {
        "name": info.name,
        "family": info.cls.family,
        "data": info.cls.data,
        "needs_reference": declared if isinstance(declared, bool) else "depends on settings",
        "needs_reference_by_default": _reference_by_default(info.cls),
        "settings": [dataclasses.asdict(row) for row in schema.rows_of(info.cls.Settings)],
        "paper": info.cls.paper,
        "distribution": info.distribution,
        "version": info.version,
        "label": info.label,
        "origin": info.origin,
        "duplicate": duplicate,
    }


def _reference_by_default(cls: type[Loss]) -> bool | None:
    """needs_reference with the default settings; None where a setting has no default or the property fails."""
    with suppress(Exception):
        return bool(cls().needs_reference)
    return None


def plugin_table(registry: Registry) -> list[dict[str, Any]]:
    """The rows of `alignzoo plugins --json`: every plugin, imported if it can be."""
    registry.load()
    return [{**dataclasses.asdict(status), "losses": list(status.losses)} for status in registry.statuses()]
