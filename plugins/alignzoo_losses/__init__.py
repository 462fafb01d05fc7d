"""The losses that come with alignzoo, found through its own entry point like anybody's."""

from __future__ import annotations

import alignzoo


@alignzoo.hookimpl
def alignzoo_losses() -> list[type[alignzoo.Loss]]:
    from alignzoo_losses.alpha_dpo import AlphaDPO
    from alignzoo_losses.alphapo import AlphaPO
    from alignzoo_losses.aot import AOT
    from alignzoo_losses.apo import APO
    from alignzoo_losses.bco import BCO
    from alignzoo_losses.bco_unpaired import UnpairedBCO
    from alignzoo_losses.bradley_terry import BradleyTerry
    from alignzoo_losses.cpo import CPO
    from alignzoo_losses.dft import DFT
    from alignzoo_losses.discopop import DiscoPOP
    from alignzoo_losses.dpo import DPO
    from alignzoo_losses.exo import EXO
    from alignzoo_losses.fdpo import FDPO
    from alignzoo_losses.grpo import GRPO
    from alignzoo_losses.hinge import Hinge
    from alignzoo_losses.ipo import IPO
    from alignzoo_losses.kto import KTO
    from alignzoo_losses.nca import NCA
    from alignzoo_losses.orpo import ORPO
    from alignzoo_losses.robust import Robust
    from alignzoo_losses.rpo import RPO
    from alignzoo_losses.rrhf import RRHF
    from alignzoo_losses.sft import SFT
    from alignzoo_losses.simpo import SimPO
    from alignzoo_losses.slic import SLiC
    from alignzoo_losses.sppo import SPPO
    from alignzoo_losses.wpo import WPO

    supervised = [SFT, DFT]
    preference = [DPO, IPO, Hinge, ORPO, SimPO, AlphaPO, CPO, Robust, RPO, APO, SPPO, NCA, EXO, BCO, DiscoPOP, AOT]
    return [*supervised, *preference, SLiC, FDPO, WPO, AlphaDPO, KTO, UnpairedBCO, GRPO, RRHF, BradleyTerry]
