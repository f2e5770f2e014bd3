"""Rewards by rule, and a user's own."""

from typing import TYPE_CHECKING

from grpo.rewards.user_code import RewardError, RewardTimeout, UserReward, names_a_file, open_reward

__all__ = ["REWARDS", "RewardError", "RewardTimeout", "UserReward", "names_a_file", "open_reward"]
__all__ += ["rule", "score"]

if TYPE_CHECKING:
    from grpo.rewards.rules import REWARDS, rule, score
else:

    def __getattr__(name):
        """The rules, imported when used: they import torch, which a user's reward does not need."""
        if name not in __all__:
            raise AttributeError(name)
        from grpo.rewards import rules

        return getattr(rules, name)
