"""What tests of the plugin host share: distributions made on the spot, and a fresh interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignzoo.plugins import BLOCK, PluginStatus, Registry

Install = Callable[..., Path]


def distribution(folder: Path, name: str, version: str, points: dict[str, str]) -> None:
    """What an installer leaves beside the modules: the metadata that importlib.metadata reads."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{label} = {module}" for label, module in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[alignzoo]", *lines]) + "\n")


def installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """The body of a fixture: makes a distribution with one module on sys.path, and forgets the modules afterwards.

    install(label, source, version=..., name=...) gives the path of the module's file.
    """
    monkeypatch.delenv(BLOCK, raising=False)
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    before = set(sys.modules)

    def make(label: str, source: str, version: str = "1.0", name: str = "") -> Path:
        module = f"zoo_{(name or label).replace('-', '_')}"
        file = site / f"{module}.py"
        file.write_text(textwrap.dedent(source))
        distribution(site, name or f"alignzoo-{label}", version, {label: module})
        return file

    yield make
    for module in set(sys.modules) - before:
        if module.startswith(("zoo_", "alignzoo_plugin_", "alignzoo_ipo2", "alignzoo_example")):
            del sys.modules[module]


def source_of(name: str, *, body: str = "") -> str:
    """A plugin with one loss that has nothing wrong with it."""
    return textwrap.dedent(f"""
        import alignzoo

        class Mine(alignzoo.Loss):
            name, data, needs_reference, Settings = "{name}", "pairs", False, alignzoo.NoSettings

            def __call__(self, batch):
                return alignzoo.LossOutput(-batch.chosen.sum())

        @alignzoo.hookimpl
        def alignzoo_losses():
            return [Mine]
    """) + textwrap.dedent(body)


def status(registry: Registry, label: str) -> PluginStatus:
    registry.load()
    return next(s for s in registry.statuses() if s.label == label)


def python(code: str, *path: Path) -> Any:
    """What a fresh interpreter prints, as JSON."""
    env = {k: v for k, v in os.environ.items() if k not in (BLOCK, "PYTHONPATH")}
    env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
