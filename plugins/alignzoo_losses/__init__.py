"""The losses that come with alignzoo, found through its own entry point like anybody's."""

from __future__ import annotations

import alignzoo


@alignzoo.hookimpl
def alignzoo_losses() -> list[type[alignzoo.Loss]]:
    from alignzoo_losses.dpo import DPO
    from alignzoo_losses.grpo import GRPO
    from alignzoo_losses.hinge import Hinge
    from alignzoo_losses.ipo import IPO
    from alignzoo_losses.kto import KTO
    from alignzoo_losses.orpo import ORPO
    from alignzoo_losses.sft import SFT

    return [SFT, DPO, IPO, Hinge, ORPO, KTO, GRPO]
