"""Rewards by rule, and a user's own."""

from grpo.rewards.rules import REWARDS, rule, score
from grpo.rewards.user_code import RewardError, RewardTimeout, UserReward, names_a_file, open_reward

__all__ = [
    "REWARDS",
    "RewardError",
    "RewardTimeout",
    "UserReward",
    "names_a_file",
    "open_reward",
    "rule",
    "score",
]
