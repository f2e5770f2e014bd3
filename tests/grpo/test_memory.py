"""grpo/memory.py: the bytes that it reckons with against those of a real cache."""

from small import small_folder, small_policy, small_prompts

from grpo.batch import collate_prompts
from grpo.memory import SHARE, WAVE, Room, free_memory, measured, rows_that_fit, token_bytes


def test_plain_room_counts_tokens():
    room = Room(100)
    assert room.holds(2, 30, 1, 20) and not room.holds(2, 31, 1, 20)
    assert room.holds(1, 20, 4, 20) and not room.holds(1, 21, 4, 20)
    said = []
    room = Room(100, say=said.append)
    room.halve(2)
    assert room.size == 50 and "2 questions" in said[0] and "half" in said[0]


def test_the_cache_is_reckoned_to_the_byte(tmp_path):
    policy, prompts = small_policy(), small_prompts(small_folder(tmp_path))
    batch = collate_prompts(
        prompts, image_token=policy.config.image_token_id, merge=policy.config.vision.spatial_merge_size
    )
    cache = policy.prefill(batch, 3, 7)
    token = token_bytes(policy.config, 4)
    own = (
        sum(x.nbytes for x in (*cache.own_k, *cache.own_v))
        + cache.bias[:, batch.tokens.shape[1] - 1 :].nbytes
    )
    assert own == len(prompts) * 3 * 7 * token["completion"]
    assert (
        sum(x.nbytes for x in (*cache.prompt_k, *cache.prompt_v))
        < len(prompts) * batch.tokens.shape[1] * token["prompt"]
    )
    assert token_bytes(policy.config, 2)["completion"] * 2 < token["completion"]
    assert token["row"] >= policy.config.vocab_size * 4


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
        for xs in (cache.own_k, cache.own_v, cache.prompt_k, cache.prompt_v, [cache.bias])
        for x in xs
    )
    assert rows // 2 <= len(cache.filled) < rows and held < SHARE * free
    # the prompts count once
    assert rows_that_fit(policy, batch, 5000, 30, free=100 * free) >= 100 * len(cache.filled)


def test_room_follows_the_memory():
    policy = small_policy()
    small = measured(policy, free=10_000_000)
    fits = [n for n in range(1, 5000) if small.holds(n, 50, 2, 30)]
    needed = len(fits) * (50 * small.prompt + 2 * (30 * small.completion + small.row))
    assert fits and needed <= SHARE * 10_000_000 < needed * (len(fits) + 1) / len(fits)
    assert sum(measured(policy, free=20_000_000).holds(n, 50, 2, 30) for n in range(1, 5000)) >= 2 * len(fits)
    ample = measured(policy, free=1 << 40)
    # on a CPU more is no faster
    assert (ample.size, ample.prompt, ample.completion, ample.row) == (WAVE, 1, 1, 0)
    assert free_memory(next(policy.parameters()).device) > 1 << 20
