"""grpo/memory.py: the bytes that it counts, against those of a real cache."""

from small import small_folder, small_policy, small_prompts

from grpo.batch import collate_prompts
from grpo.memory import SHARE, WAVE, MemoryBudget, TokenCost, free_memory, memory_budget, rows_that_fit


def test_a_plain_budget_counts_tokens():
    budget = MemoryBudget(100)
    assert budget.holds(2, 30, 1, 20) and not budget.holds(2, 31, 1, 20)
    assert budget.holds(1, 20, 4, 20) and not budget.holds(1, 21, 4, 20)
    said = []
    budget = MemoryBudget(100, say=said.append)
    budget.halve(2)
    assert budget.size == 50 and "2 questions" in said[0] and "half" in said[0]


def test_the_cache_is_counted_to_the_byte(tmp_path):
    policy, prompts = small_policy(), small_prompts(small_folder(tmp_path))
    batch = collate_prompts(
        prompts, image_token=policy.config.image_token_id, merge=policy.config.vision.spatial_merge_size
    )
    cache = policy.prefill(batch, 3, 7)
    cost = TokenCost.of(policy.config, 4)
    rows = len(prompts) * 3
    places = batch.tokens.shape[1] - 1 + 7
    assert sum(x.nbytes for x in (*cache.completion_k, *cache.completion_v)) == rows * 7 * cost.completion_kv
    assert cache.bias.nbytes == rows * places * cost.mask
    assert sum(x.nbytes for x in (*cache.prompt_k, *cache.prompt_v)) == (
        len(prompts) * (batch.tokens.shape[1] - 1) * cost.prompt_kv
    )
    low = TokenCost.of(policy.config, 2)
    assert low.completion_kv * 2 == cost.completion_kv
    # attention sums in float64 whatever the dtype of the products
    assert (low.mask, low.prompt_kv) == (cost.mask, cost.prompt_kv)
    assert cost.logits >= policy.config.vocab_size * 4


def test_rows_follow_the_memory(tmp_path):
    policy, prompts = small_policy(), small_prompts(small_folder(tmp_path))
    batch = collate_prompts(
        prompts, image_token=policy.config.image_token_id, merge=policy.config.vision.spatial_merge_size
    )
    rows = 50 * len(prompts)
    assert (
        rows_that_fit(policy, batch, 50, 30) == rows
        and rows_that_fit(policy, batch, 50, 30, most=7) == 7
        and rows_that_fit(policy, batch, 50, 30, free=0) == 1
    )
    free = next(
        free
        for free in range(0, 100_000_000, 100_000)
        if rows_that_fit(policy, batch, 50, 30, free=free) >= rows // 2
    )
    cache = policy.prefill(batch, 50, 30, max_rows=rows_that_fit(policy, batch, 50, 30, free=free))
    held = sum(
        x.nbytes
        for xs in (cache.completion_k, cache.completion_v, cache.prompt_k, cache.prompt_v, [cache.bias])
        for x in xs
    )
    assert rows // 2 <= len(cache.filled) < rows and held < SHARE * free
    # the prompts count once
    assert rows_that_fit(policy, batch, 5000, 30, free=100 * free) >= 100 * len(cache.filled)


def test_the_budget_follows_the_memory():
    policy = small_policy()
    small = memory_budget(policy, free=10_000_000)
    fits = [n for n in range(1, 5000) if small.holds(n, 50, 2, 30)]
    needed = len(fits) * (50 * small.prompt + 2 * (30 * small.completion + small.row))
    assert fits and needed <= SHARE * 10_000_000 < needed * (len(fits) + 1) / len(fits)
    assert sum(memory_budget(policy, free=20_000_000).holds(n, 50, 2, 30) for n in range(1, 5000)) >= 2 * len(
        fits
    )
    ample = memory_budget(policy, free=1 << 40)
    # on a CPU more is no faster
    assert (ample.size, ample.prompt, ample.completion, ample.row) == (WAVE, 1, 1, 0)
    assert free_memory(next(policy.parameters()).device) > 1 << 20
