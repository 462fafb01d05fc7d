"""The callbacks that come with alignzoo, found through its own entry point like anybody's."""

from __future__ import annotations

import alignzoo


@alignzoo.hookimpl
def alignzoo_callbacks() -> list[type[alignzoo.Callback]]:
    from alignzoo_callbacks.webhook import Webhook

    return [Webhook]
