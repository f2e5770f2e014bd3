"""The gap between sampled and trained log-probs is what docs/results/speed.md promises."""

import pytest
import torch

from data.chat import Chat
from grpo.storage.model_folder import BUILT_IN
from models import weights
from models.layers import attention_sums
from tests.bench.gap import gaps


@pytest.mark.parametrize("dtype, mean, largest", [("float32", 1e-7, 1e-5), ("bfloat16", 1e-4, 2e-2)])
def test_the_gap_is_a_rounding(dtype, mean, largest):
    policy, chat = weights.load(BUILT_IN), Chat(BUILT_IN, template="shapes")
    low = torch.autocast("cpu", torch.bfloat16, dtype == "bfloat16", cache_enabled=False)
    with low, attention_sums(exact=True):
        gap = gaps(policy, chat, seed=0)
    assert len(gap) > 1000 and gap.mean() < mean and gap.max() < largest
