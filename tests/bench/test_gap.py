"""The gap between sampled and trained log-probs is what docs/results/speed.md promises."""

import pytest

from data.chat import Chat
from grpo.storage.model_folder import BUILT_IN
from models import weights
from tests.bench.gap import gaps


@pytest.mark.parametrize("dtype, mean, largest", [("float32", 1e-7, 1e-5), ("bfloat16", 1e-4, 2e-2)])
def test_the_gap_is_a_rounding(dtype, mean, largest):
    policy, chat = weights.load(BUILT_IN), Chat(BUILT_IN, template="shapes")
    gap = gaps(policy, chat, 0, dtype, exact=True)
    assert len(gap) > 1000 and gap.mean() < mean and gap.max() < largest
