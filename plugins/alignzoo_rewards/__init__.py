"""The rewards that come with alignzoo, found through its own entry point like anybody's."""

from __future__ import annotations

import alignzoo


@alignzoo.hookimpl
def alignzoo_rewards() -> list[type[alignzoo.Reward]]:
    from alignzoo_rewards.code import Code
    from alignzoo_rewards.exact import Exact
    from alignzoo_rewards.format import Format
    from alignzoo_rewards.gym import ReasoningGym
    from alignzoo_rewards.judge import Judge
    from alignzoo_rewards.length import Length
    from alignzoo_rewards.numeric import Numeric
    from alignzoo_rewards.of_trl import Repetition, Think
    from alignzoo_rewards.reward_model import RewardModel

    return [Exact, Numeric, Format, Length, Repetition, Think, RewardModel, Judge, Code, ReasoningGym]
