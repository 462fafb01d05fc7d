"""The losses that come with alignzoo, found through its own entry point like anybody's."""

from __future__ import annotations

import alignzoo


@alignzoo.hookimpl
def alignzoo_losses() -> list[type[alignzoo.Loss]]:
    from alignzoo_losses.dpo import DPO
    from alignzoo_losses.sft import SFT

    return [SFT, DPO]
