"""The plugin host: what plugins bring, found by metadata, imported when needed, kept from breaking one another.

`discover` reads the entry points of the group "alignzoo" without importing anything; a `Registry` imports them when
something is asked for, each in a try of its own. alignzoo's own come through the same door. It imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from pathlib import Path
from typing import Any, Literal, TypeVar

import pluggy

from alignzoo import hookspecs, schema
from alignzoo.api import Loss
from alignzoo.declared import place
from alignzoo.errors import PluginError
from alignzoo.plugin_errors import hook_fault, one_line, own_files
from alignzoo.plugin_kinds import ALL, Info, LossInfo, RewardInfo

GROUP = "alignzoo"
BLOCK = "ALIGNZOO_BLOCK_PLUGINS"
State = Literal["found", "loaded", "blocked", "broken"]
T = TypeVar("T", bound=Info)


@dataclass(frozen=True)
class PluginStatus:
    """What became of one plugin. "found" is one that nobody has needed yet, so it was not imported."""

    label: str
    distribution: str
    version: str
    state: State
    brings: Mapping[str, tuple[str, ...]]  # by kind: losses, rewards, formats, callbacks
    error: str


@dataclass
class _Plugin:
    """One plugin, and what became of it."""

    label: str
    distribution: str
    version: str
    origin: str
    load: Callable[[], Any]  # imports it: the module or object whose hooks are read
    installed: bool = True  # False: a file that the user named, whose failure is not to be passed over
    state: State = "found"
    error: str = ""
    found: tuple[Info, ...] = ()

    def info(self, kind: type[Info], cls: Any) -> Info:
        return kind(cls, cls.name, self.distribution, self.version, self.label, self.origin)

    def names(self, kind: type[Info]) -> tuple[str, ...]:
        return tuple(info.name for info in self.found if isinstance(info, kind))

    def words(self) -> str:
        return f'"{self.label}" ({f"{self.distribution} {self.version}".strip()})'


class Registry:
    """What plugins bring, by kind and name. Made by `discover`; imports plugins when it is first asked.

    `warnings` are lines for the user about the discovery itself, such as an unknown name among the blocked.
    """

    def __init__(self, plugins: Sequence[_Plugin], warnings: Sequence[str] = ()) -> None:
        self._plugins = tuple(plugins)
        self.warnings = tuple(warnings)

    def losses(self) -> dict[str, LossInfo]:
        """Every loss whose name has one owner. Imports all plugins; raises PluginError for a broken --plugin file."""
        return self.all(LossInfo)

    def rewards(self) -> dict[str, RewardInfo]:
        """Every reward whose name has one owner; as `losses`."""
        return self.all(RewardInfo)

    def all(self, kind: type[T]) -> dict[str, T]:
        """Everything of a kind whose name has one owner; as `losses`."""
        return {name: owners[0] for name, owners in self._owners(kind).items() if len(owners) == 1}

    def duplicates(self, kind: type[T] = LossInfo) -> dict[str, tuple[T, ...]]:  # type: ignore[assignment]
        """The names that more than one class claims, and their owners. `get` refuses them."""
        return {name: owners for name, owners in self._owners(kind).items() if len(owners) > 1}

    def get(self, name: str) -> LossInfo:
        """The loss of that name. Raises PluginError where none or more than one has it, with the way out."""
        return self.one(LossInfo, name)

    def reward(self, name: str) -> RewardInfo:
        """The reward of that name; as `get`."""
        return self.one(RewardInfo, name)

    def one(self, kind: type[T], name: str) -> T:
        """The one of a kind that has this name; as `get`."""
        owners = self._owners(kind)
        if name not in owners:
            raise self._unknown(kind, name, owners)
        if len(owners[name]) > 1:
            raise _ambiguous(name, owners[name])
        return owners[name][0]

    def statuses(self) -> list[PluginStatus]:
        """All plugins as they stand now; imports none (`losses` does, and `plugin_table`)."""
        return [
            PluginStatus(p.label, p.distribution, p.version, p.state, {k.kinds: p.names(k) for k in ALL}, p.error)
            for p in self._plugins
        ]

    def load(self) -> None:
        """Import whatever has not been imported. A plugin that fails is marked as broken and raises nothing."""
        for plugin in self._plugins:
            if plugin.state == "found":
                _load(plugin)

    def _owners(self, kind: type[T]) -> dict[str, tuple[T, ...]]:
        self.load()
        for plugin in self._plugins:
            if plugin.state == "broken" and not plugin.installed:
                raise PluginError(
                    f"the plugin file {plugin.origin} cannot be used",
                    why=plugin.error,
                    fix="mend the file, or leave out its --plugin",
                )
        owners: dict[str, tuple[T, ...]] = {}
        for info in (i for plugin in self._plugins for i in plugin.found if isinstance(i, kind)):
            before = owners.get(info.name, ())
            if all(info.cls is not other.cls for other in before):  # one class by two doors is no conflict
                owners[info.name] = (*before, info)
        return owners

    def _unknown(self, kind: type[Info], name: str, known: Iterable[str]) -> PluginError:
        names = sorted(known)
        broken = [p for p in self._plugins if p.state == "broken"]
        blocked = [p for p in self._plugins if p.state == "blocked"]
        lines = [f"the {kind.kinds} are " + (", ".join(names) or "none at all")]
        lines += [
            f"the plugin {p.words()} is broken and may have it: {p.error}"
            for p in sorted(broken, key=lambda p: -_likeness(name, p))
        ]
        lines += [f"the plugin {p.words()} is blocked by {BLOCK} and may have it" for p in blocked]
        fix = "take a known name, install the plugin that has it, or give its file with --plugin FILE"
        return PluginError(
            f'there is no {kind.kind} "{name}"{schema.nearest(name, names)}',
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
    LossInfo.checked(cls)
    origin = f"{cls.__module__}.{cls.__qualname__}"
    plugin = _Plugin("python", "python", "", origin, _not_loadable, installed=False, state="loaded")
    plugin.found = (plugin.info(LossInfo, cls),)
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
        things = _call_hooks(plugin.load(), plugin.label)
        plugin.found = tuple(plugin.info(kind, cls) for kind, cls in _checked(things))
        plugin.state = "loaded"
    except (Exception, SystemExit) as error:
        plugin.state, plugin.error, plugin.found = (
            "broken",
            one_line(error, own_files(plugin.origin, plugin.installed)),
            (),
        )


def _call_hooks(plugin: Any, label: str) -> list[tuple[type[Info], Any]]:
    """Register on a manager of its own, compare all hooks with the specs, and ask for all that they bring."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, name=label)  # compares the arguments
        manager.check_pending()  # compares the names
    except pluggy.PluginValidationError as error:
        raise PluginError(hook_fault(manager, plugin) or str(error)) from error
    callers = [caller.name for caller in manager.get_hookcallers(plugin) or ()]
    if not callers:
        hooks = " or ".join(f"{kind.hook}()" for kind in ALL)
        raise PluginError(f"it implements no hook: is {hooks} there, and marked with @alignzoo.hookimpl?")
    things: list[tuple[type[Info], Any]] = []
    for kind in (kind for kind in ALL if kind.hook in callers):
        results = getattr(manager.hook, kind.hook)()
        if len(results) != 1 or not isinstance(results[0], list | tuple):
            got = type(results[0]).__name__ if results else "None"
            raise PluginError(f"{kind.hook}() returned {got}, not a list{place(getattr(plugin, kind.hook))}")
        things += [(kind, thing) for thing in results[0]]
    return things


def _checked(things: Sequence[tuple[type[Info], Any]]) -> list[tuple[type[Info], type[Any]]]:
    faults, found = [], []
    for kind, thing in things:
        try:
            found.append((kind, kind.checked(thing)))
        except PluginError as error:
            faults.append(str(error))
    named = [(kind, cls.name) for kind, cls in found]
    doubled = dict.fromkeys(name for kind, name in named if named.count((kind, name)) > 1)
    faults += [f'two of its classes are named "{name}"' for name in doubled]
    if faults:
        raise PluginError("; ".join(faults))
    return found


# --- errors and tables ---------------------------------------------------------------------------------------------


def _likeness(name: str, plugin: _Plugin) -> float:
    """How likely it is, from 0 to 1, that a plugin has the loss: its names contain the loss's or look like it."""
    words = [w.lower() for w in (plugin.label, plugin.distribution, plugin.origin)]
    bare = [re.sub(r"^alignzoo[-_.]?", "", word) for word in words]
    return max(1.0 if name.lower() in word else SequenceMatcher(None, name.lower(), word).ratio() for word in bare)


def _ambiguous(name: str, owners: Sequence[Info]) -> PluginError:
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
        f'{len(owners)} {owners[0].kinds} are named "{name}"',
        why="they come from " + " and from ".join(info.owner for info in owners),
        fix=", or ".join(outs),
    )


def make_loss(
    info: LossInfo, settings_table: Mapping[str, Any], problems: list[schema.Problem], path: schema.Path
) -> Loss | None:
    """A loss from the settings of its table in the recipe (without `name`). None where a problem was added."""
    return make(info, settings_table, problems, path)  # type: ignore[no-any-return]


def make(info: Info, table: Mapping[str, Any], problems: list[schema.Problem], path: schema.Path) -> Any:
    """A loss, reward or callback from its own settings; as `make_loss`."""
    try:
        settings = schema.build(info.cls.Settings, table, path, problems)
        return None if settings is None else info.cls(settings)
    except (ValueError, PluginError) as error:  # settings that do not go together, refused by the plugin itself
        problems.append(schema.Problem(path, f'{info.kind} "{info.name}": {error}'))
        return None


def loss_table(registry: Registry) -> list[dict[str, Any]]:
    """The rows of `alignzoo losses --json`: one for each loss, and one for each owner of a name that has several."""
    return [
        {
            "name": info.name,
            "family": info.cls.family,
            "data": info.cls.data,
            **_needs_reference(info.cls),
            "settings": [dataclasses.asdict(row) for row in schema.rows_of(info.cls.Settings)],
            "paper": info.cls.paper,
            **_owner(info, doubled),
        }
        for info, doubled in _all(registry, LossInfo)
    ]


def reward_table(registry: Registry) -> list[dict[str, Any]]:
    """The rows of `alignzoo rewards --json`; as `loss_table`."""
    return named_table(registry, RewardInfo)


def named_table(registry: Registry, kind: type[Info]) -> list[dict[str, Any]]:
    """The rows of a kind that has a name, settings and a docstring; as `loss_table`."""
    return [
        {
            "name": info.name,
            "summary": (inspect.cleandoc(info.cls.__doc__ or "").splitlines() or [""])[0],
            "settings": [dataclasses.asdict(row) for row in schema.rows_of(info.cls.Settings)],
            **_owner(info, doubled),
        }
        for info, doubled in _all(registry, kind)
    ]


def _all(registry: Registry, kind: type[T]) -> list[tuple[T, bool]]:
    """Everything of a kind by name, and whether the name has several owners."""
    owners = sorted(registry._owners(kind).items())
    return [(i, len(found) > 1) for _, found in owners for i in sorted(found, key=lambda i: i.distribution)]


def _owner(info: Info, duplicate: bool) -> dict[str, Any]:
    keys = ("distribution", "version", "label", "origin")
    return {**{key: getattr(info, key) for key in keys}, "duplicate": duplicate}


def _needs_reference(cls: type[Loss]) -> dict[str, Any]:
    declared = vars(cls)["needs_reference"]
    return {
        "needs_reference": declared if isinstance(declared, bool) else "depends on settings",
        "needs_reference_by_default": _reference_by_default(cls),
    }


def _reference_by_default(cls: type[Loss]) -> bool | None:
    """needs_reference with the default settings; None where a setting has no default or the property fails."""
    with suppress(Exception):
        return bool(cls().needs_reference)
    return None


def plugin_table(registry: Registry) -> list[dict[str, Any]]:
    """The rows of `alignzoo plugins --json`: every plugin, imported if it can be."""
    registry.load()
    return [
        {key: value for key, value in vars(status).items() if key != "brings"}
        | {kinds: list(names) for kinds, names in status.brings.items()}
        for status in registry.statuses()
    ]
