import json
from dataclasses import dataclass
from pathlib import Path

import alignzoo


@dataclass(frozen=True)
class Settings:
    path: str = alignzoo.setting("status.json", "the file, replaced whole each time")


class StatusFile(alignzoo.Callback):
    """The state of the run in one small JSON file, for a page or a scheduler that looks at it."""

    name = "status-file"
    Settings = Settings

    def run_started(self, run):
        self._write({"status": "running", **run})

    def step_ended(self, metrics):
        self._write({"status": "running", "metrics": metrics})

    def run_ended(self, end):
        self._write(end)

    def _write(self, content):
        aside = Path(f"{self.settings.path}.new")
        aside.write_text(json.dumps(content))
        aside.replace(self.settings.path)


@alignzoo.hookimpl
def alignzoo_callbacks():
    return [StatusFile]
