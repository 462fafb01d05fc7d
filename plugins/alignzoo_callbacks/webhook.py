"""What happens in a run, as JSON to an address: a chat, a queue, a page of one's own."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import alignzoo
from alignzoo.errors import PluginError

Event = Literal["run_started", "step_ended", "evaluated", "checkpoint_saved", "run_ended"]


@dataclass(frozen=True)
class Settings:
    url: str | None = alignzoo.setting(None, "where it is sent to; written into the run directory, so no secret")
    url_env: str | None = alignzoo.setting(None, "name of the environment variable that holds the address")
    on: tuple[Event, ...] = alignzoo.setting(("run_ended",), "what is sent")
    token_env: str | None = alignzoo.setting(
        None, "name of the environment variable that holds a token, sent as Authorization: Bearer"
    )
    seconds: float = alignzoo.setting(10.0, "time for one request; the training waits for it", gt=0)

    def __post_init__(self) -> None:
        if (self.url is None) == (self.url_env is None):
            raise ValueError("give either url or url_env")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url = {self.url!r} does not begin with http:// or https://")


class Webhook(alignzoo.Callback):
    """POSTs JSON when the run is over, or for whatever else `on` lists.

    The body has `event`, `text` (a line for people, which Slack and others show), `host`, and the data of the event.
    Environment variables are read before the run begins, sent to the address only, and written nowhere.
    """

    name = "webhook"
    Settings = Settings

    def __init__(self, settings: Any = None, /, **values: Any) -> None:
        super().__init__(settings, **values)
        s = self.settings
        self._url = s.url or _from_environment(s.url_env)
        self._headers = {"Authorization": f"Bearer {_from_environment(s.token_env)}"} if s.token_env else {}
        self._run = "run"

    def run_started(self, run: Mapping[str, Any]) -> None:
        self._run = str(run["directory"])
        self._send("run_started", f"{run['recipe']}: {run['loss']}, {run['steps']} steps", run)

    def step_ended(self, metrics: Mapping[str, float]) -> None:
        self._send("step_ended", f"step {metrics['step']:g}", {"metrics": metrics})

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        self._send("evaluated", f"evaluation at step {metrics['step']:g}", {"metrics": metrics})

    def checkpoint_saved(self, path: str) -> None:
        self._send("checkpoint_saved", f"checkpoint {path}", {"path": path})

    def run_ended(self, end: Mapping[str, Any]) -> None:
        words = f": {end['error'].splitlines()[0]}" if end["error"] else ""
        self._send("run_ended", f"{end['status']} after {end['seconds']:.0f} s{words}", end)

    def _send(self, event: str, words: str, data: Mapping[str, Any]) -> None:
        import httpx2

        if event not in self.settings.on:
            return
        body = {"event": event, "text": f"{self._run}: {words}", "host": socket.gethostname(), **data}
        try:
            httpx2.post(self._url, json=body, headers=self._headers, timeout=self.settings.seconds).raise_for_status()
        except httpx2.HTTPStatusError as error:  # its own words have the address, which may be a secret
            raise OSError(f"the address answered {error.response.status_code}") from None
        except httpx2.HTTPError as error:
            raise OSError(f"{type(error).__name__}: {str(error).replace(self._url, 'the address')}") from None


def _from_environment(variable: str) -> str:
    found = os.environ.get(variable)
    if not found:
        raise PluginError(f"the environment variable {variable} is not set", fix=f"export {variable}=...")
    return found
