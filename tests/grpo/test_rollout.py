"""Rollouts: what is written is what the full forward pass would have written, token for token, whatever
shares the batch."""

from dataclasses import replace

import pytest
import torch
from small import STOPS, batch_of, micro_batch, small_folder, small_policy, small_prompts

from data.chat import Chat
from data.shapes.world import Shapes
from grpo import cuda_graphs
from grpo import rollout as module
from grpo.batch import collate_prompts
from grpo.logprobs import completion_logprobs
from grpo.rollout import DecodeOptions, generate
from grpo.sampling import Truncation, sample, uid_hash, uniforms
from models.cache import KVCache
from models.layers import attention_sums

CAP, GROUP, SEED, STEP = 14, 4, 3, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chat(folder):
    return Chat(folder, template="shapes")


@pytest.fixture(scope="module")
def sources(folder):
    return small_prompts(folder)


@pytest.fixture(scope="module")
def policy():
    return small_policy()


def write(
    policy,
    chat,
    sources,
    *,
    group=GROUP,
    cap=CAP,
    temperature=1.0,
    stop_ids=STOPS,
    seed=SEED,
    step=STEP,
    **options,
):
    return generate(
        policy,
        collate_prompts(sources, image_token=chat.image_token),
        group=group,
        cap=cap,
        temperature=temperature,
        stop_ids=stop_ids,
        address=(seed, step, [uid_hash(p.uid) for p in sources]),
        options=DecodeOptions(**options),
    )


def rows(rollout):
    """P lists of G completions, each a list of tokens."""
    return [
        [tokens[:n] for tokens, n in zip(group, length)]
        for group, length in zip(rollout.tokens.tolist(), rollout.length.tolist())
    ]


@pytest.fixture(scope="module")
def together(policy, chat, sources):
    return write(policy, chat, sources)


# ---- the same as without any cache


@torch.no_grad()
def by_full_forward(policy, prompts, u, temperature, stop_ids):
    """One completion of one prompt, each token from a fresh pass over prompt and completion. u: (C,)."""
    tokens, logps = [], []
    for t in range(len(u)):
        # the last one is what is predicted: it is not read
        completion = torch.tensor([[[*tokens, 0]]])
        hidden = policy(prompts, completion)[0, 0, -1]
        token, logp = sample(policy.logits(hidden), u[t], temperature)
        tokens.append(int(token))
        logps.append(float(logp))
        if tokens[-1] in stop_ids:
            break
    return tokens, logps


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_each_row_is_what_the_full_forward_draws(policy, chat, sources, temperature):
    """Shared prompts, key-value cache, compaction, lock step, against one row by itself without any of
    them; greedy at temperature 0."""
    rollout = write(policy, chat, sources[:3], group=3, temperature=temperature)
    for p, source in enumerate(sources[:3]):
        prompts = collate_prompts([source], image_token=chat.image_token)
        u = uniforms(SEED, STEP, [uid_hash(source.uid)], 3, CAP)[0]
        for g in range(3):
            tokens, logps = by_full_forward(policy, prompts, u[g], temperature, STOPS)
            n = int(rollout.length[p, g])
            assert rollout.tokens[p, g, :n].tolist() == tokens, (p, g)
            torch.testing.assert_close(rollout.logp[p, g, :n], torch.tensor(logps), atol=1e-5, rtol=0)
    texts = [tuple(row) for group in rows(rollout) for row in group]
    assert (
        len(set(texts)) > 5
        if temperature
        else all(len(set(map(tuple, group))) == 1 for group in rows(rollout))
    )


# ---- the company a row keeps


def test_one_prompt_at_a_time(policy, chat, sources, together):
    for p, source in enumerate(sources):
        assert rows(write(policy, chat, [source])) == rows(together)[p : p + 1]


def test_order_and_repetition(policy, chat, sources, together):
    order = [3, 1, 0, 2, 1]
    assert rows(write(policy, chat, [sources[p] for p in order])) == [rows(together)[p] for p in order]


@pytest.mark.parametrize("group", [1, 2, 3])
def test_a_smaller_group_is_the_beginning_of_a_larger_one(policy, chat, sources, together, group):
    assert rows(write(policy, chat, sources, group=group)) == [rows_of[:group] for rows_of in rows(together)]


@pytest.mark.parametrize("cap", [1, 5, 13])
def test_a_smaller_cap_cuts_and_changes_nothing_else(policy, chat, sources, together, cap):
    shorter = write(policy, chat, sources, cap=cap)
    assert rows(shorter) == [[row[:cap] for row in group] for group in rows(together)]
    assert torch.equal(shorter.stopped, together.stopped & (together.length <= cap))


def test_one_prompt_and_one_completion(policy, chat, sources, together):
    alone = write(policy, chat, sources[:1], group=1)
    assert alone.tokens.shape[:2] == (1, 1) and rows(alone) == [[rows(together)[0][0]]]


@pytest.mark.parametrize("few", [None, 2])
@pytest.mark.parametrize("first, end", [(0, 16), (3, 6), (5, 16), (0, 1), (15, 16)])
def test_some_rows_are_those_of_all(policy, chat, sources, together, first, end, few):
    """Also a row alone; the others of their groups are empty."""
    p = first // GROUP
    asked = range(first - p * GROUP, end - p * GROUP)
    found = write(policy, chat, sources[p : -(-end // GROUP)], rows=asked, max_rows=few)
    here = torch.arange(found.length.numel()).view(found.length.shape)
    here = (asked.start <= here) & (here < asked.stop)
    whole = slice(p, p + len(found.length))
    assert torch.equal(found.length, together.length[whole] * here)
    assert torch.equal(found.stopped, together.stopped[whole] & here)
    longest = found.tokens.shape[-1]
    assert longest == int(found.length.max())
    assert torch.equal(found.tokens, together.tokens[whole, :, :longest] * here[..., None])
    wanted = together.logp[whole, :, :longest] * here[..., None]
    torch.testing.assert_close(found.logp, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("share, often", [(0.0, False), (0.3, True), (0.99, True)])
def test_closing_slots_changes_no_token(policy, chat, sources, together, monkeypatch, share, often):
    calls, keep = [], KVCache.keep
    monkeypatch.setattr(module, "CLOSE_AT", share)
    monkeypatch.setattr(module, "MIN_ROWS", (1, 0))
    monkeypatch.setattr(
        KVCache,
        "keep",
        lambda cache, running, most: (
            calls.append((most, len(running), int(running.sum()))) or keep(cache, running, most)
        ),
    )
    same(write(policy, chat, sources), together)
    assert bool(calls) == often
    # each one shrinks it, to the running rows
    assert all(most == running <= share * slots for most, slots, running in calls)


@pytest.mark.parametrize("few", [1, 2, 5, 15, 16, 99])
@pytest.mark.parametrize("look", [1, 4])
def test_rows_that_wait_for_a_slot_draw_the_same_tokens(
    policy, chat, sources, together, monkeypatch, few, look
):
    monkeypatch.setattr(module, "TOKENS_BETWEEN_CHECKS", {"cpu": look})
    begun, begin = [], KVCache.begin
    monkeypatch.setattr(
        KVCache, "begin", lambda cache, slots, prompt: begun.append(len(slots)) or begin(cache, slots, prompt)
    )
    same(write(policy, chat, sources, max_rows=few), together)
    assert sum(begun) == max(16 - few, 0)


@pytest.mark.parametrize("few", [None, 5])
@pytest.mark.parametrize("reads", [3, 8, 100])
def test_steps_of_one_shape_equal_those_that_read_only_what_is_there(
    policy, chat, sources, together, monkeypatch, reads, few
):
    """What a CUDA graph needs: sixteen tokens between two looks, and each reads a multiple of `reads`
    places, most of them empty."""
    monkeypatch.setattr(module, "TOKENS_BETWEEN_CHECKS", {"cpu": 16})
    shapes = Shaped(monkeypatch, reads)
    same(write(policy, chat, sources, max_rows=few), together)
    assert all(span % reads == 0 or span == CAP for span in shapes.spans) and len(set(shapes.spans)) <= -(
        -CAP // reads
    )


class Shaped:
    """Repeat, with every step's span noted, and the work changed."""

    def __init__(self, monkeypatch, reads, change=lambda work: work):
        spans = self.spans = []

        class Noted(cuda_graphs.Repeat):
            def __init__(self, work, recorded):
                super().__init__(change(work), False)
                self.multiple = reads

            def __call__(self, times, key):
                spans.extend([key] * times)
                for _ in range(times):
                    self.work()

        monkeypatch.setattr(module, "Repeat", Noted)


def test_a_step_compiles_as_one_graph(policy, chat, sources, together, monkeypatch):
    """No break, so no way back to Python and no wait for the device within a token; and the compiled step
    draws the same tokens."""
    monkeypatch.setattr(module, "TOKENS_BETWEEN_CHECKS", {"cpu": 16})
    compiled = []

    def change(work):
        compiled.append(torch.compile(work.func.__func__, fullgraph=True, backend="aot_eager"))
        return lambda: compiled[-1](work.func.__self__, *work.args)

    Shaped(monkeypatch, CAP, change)
    same(write(policy, chat, sources), together)
    assert compiled


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("few", [None, 5])
def test_recorded_steps_equal_eager_ones(chat, sources, few):
    policy = small_policy().to("cuda")
    prompts = collate_prompts(sources, image_token=chat.image_token).to("cuda")
    how = dict(
        group=GROUP,
        cap=200,
        temperature=1.0,
        stop_ids=STOPS,
        address=(SEED, STEP, [uid_hash(p.uid) for p in sources]),
    )
    recorded, eager = (
        generate(policy, prompts, options=DecodeOptions(max_rows=few, recorded=recorded), **how)
        for recorded in (True, False)
    )
    same(recorded, eager)


def same(rollout, other):
    for name in ("tokens", "length", "stopped"):
        assert torch.equal(getattr(rollout, name), getattr(other, name)), name
    torch.testing.assert_close(rollout.logp, other.logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fewest", [(1, 0), (2, 2), (99, 0)])
def test_slots_are_closed_as_rows_stop_but_for_a_few(policy, chat, sources, monkeypatch, fewest):
    monkeypatch.setattr(module, "MIN_ROWS", fewest)
    monkeypatch.setattr(module, "CLOSE_AT", 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    slots, step = [], policy.decode
    monkeypatch.setattr(policy, "decode", lambda last, cache: slots.append(len(last)) or step(last, cache))
    rollout = write(policy, chat, sources)
    few = min(fewest[0] + 2 * fewest[1], 16)
    # 4 prompts: the first step is the same for the rows of each
    assert slots[0] == -(-few // 4) * 4
    assert slots[1:] == [max(int((rollout.length > t).sum()), few) for t in range(1, len(slots))]


@pytest.mark.parametrize("threads", [1, 2, 16, 96])
def test_on_a_gpu_the_least_number_of_rows_is_not_that_of_the_threads(monkeypatch, threads):
    """It was 4 + 4 x threads there too: with 16 threads 64 rows were never closed."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert module.least_rows("cuda") == module.MIN_ROWS_ON_GPU < 64
    assert module.least_rows("cpu") == 4 + 4 * threads


# ---- the address


def test_the_address_decides(policy, chat, sources, together):
    assert torch.equal(write(policy, chat, sources).tokens, together.tokens)
    for other in ({"seed": SEED + 1}, {"step": STEP + 1}):
        changed = rows(write(policy, chat, sources, **other))
        assert all(a != b for a, b in zip(changed, rows(together)))
    renamed = rows(write(policy, chat, [replace(p, uid=p.uid + "x") for p in sources]))
    assert all(a != b for a, b in zip(renamed, rows(together)))


def test_the_picture_decides(policy, chat):
    """The same words, the same random numbers, another picture: other tokens. Both are drawn, so nothing
    but what is seen differs."""
    world = Shapes("train", 100, seed=5)
    first = [chat.prompt(world[i]) for i in range(4)]
    second = [chat.prompt(replace(world[i], pictures=world[i + 4].pictures)) for i in range(4)]
    assert all((a.tokens == b.tokens).all() for a, b in zip(first, second))
    a, b = rows(write(policy, chat, first)), rows(write(policy, chat, second))
    # of 16
    assert sum(x != y for group in zip(a, b) for x, y in zip(*group)) > 8


# ---- stopping


def check_ends(rollout, stops, cap):
    P, G, C = rollout.tokens.shape
    assert C == int(rollout.length.max()) <= cap
    for p in range(P):
        for g in range(G):
            n, tokens = int(rollout.length[p, g]), rollout.tokens[p, g].tolist()
            # the stop token is part of it
            assert (tokens[n - 1] in stops) == bool(rollout.stopped[p, g])
            assert not set(tokens[: n - 1]) & set(stops)
            assert rollout.stopped[p, g] or n == cap
            assert not any(tokens[n:]) and not rollout.logp[p, g, n:].any()
            assert (rollout.logp[p, g, :n] < 0).all()


def test_rows_end_with_their_stop_token(together):
    check_ends(together, STOPS, CAP)
    # both kinds are in it
    assert together.stopped.any() and not together.stopped.all()


def test_the_stop_token_is_trained(policy, chat, sources, together):
    batch = micro_batch(batch_of(sources, together.tokens, together.length), chat.image_token)
    logp, _ = completion_logprobs(policy, batch, temperature=1.0, chunk=64)
    last = logp.view(*together.tokens.shape).gather(-1, together.length[..., None] - 1)[..., 0]
    assert (last[together.stopped] < 0).all()


def test_everyone_stops_at_once(policy, chat, sources):
    rollout = write(policy, chat, sources, stop_ids=range(127))
    assert rollout.tokens.shape == (4, GROUP, 1) and (rollout.length == 1).all() and rollout.stopped.all()


def test_some_stop_at_the_first_token(policy, chat, sources):
    """Half of the vocabulary stops: rows of one token beside longer ones."""
    stops = range(0, 127, 2)
    rollout = write(policy, chat, sources, stop_ids=stops)
    check_ends(rollout, stops, CAP)
    assert (rollout.length == 1).any() and (rollout.length > 2).any()


def test_nobody_stops(policy, chat, sources):
    # which can't be drawn
    rollout = write(policy, chat, sources, stop_ids=(chat.image_token,))
    assert (
        rollout.tokens.shape == (4, GROUP, CAP)
        and (rollout.length == CAP).all()
        and not rollout.stopped.any()
    )


# ---- what can't be drawn


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_banned_ids_are_never_drawn(policy, chat, sources, temperature):
    before = write(policy, chat, sources, temperature=temperature)
    banned = sorted({t for group in rows(before) for row in group for t in row} - set(STOPS))
    after = write(policy, chat, sources, temperature=temperature, banned=banned)
    assert banned and not {t for group in rows(after) for row in group for t in row} & set(banned)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_placeholders_are_never_drawn_however_much_the_policy_wants_to(chat, sources, temperature):
    policy = small_policy(tied=False)
    placeholders = list(policy.config.placeholder_ids)
    with torch.no_grad():
        policy.lm_head.weight[placeholders] = 100 * torch.randn(
            4, 32, generator=torch.Generator().manual_seed(0)
        )
    prompts = collate_prompts(sources, image_token=chat.image_token)
    with torch.no_grad():
        hidden = policy(prompts, torch.zeros(4, 1, 1, dtype=torch.long))
        assert (hidden @ policy.lm_head.weight.T).argmax(-1).flatten().tolist() != [0] * 4
        assert set((hidden @ policy.lm_head.weight.T).argmax(-1).flatten().tolist()) & set(placeholders)
    rollout = write(policy, chat, sources, temperature=temperature)
    assert not {t for group in rows(rollout) for row in group for t in row} & set(placeholders)
    batch = micro_batch(batch_of(sources, rollout.tokens, rollout.length), chat.image_token)
    logp, _ = completion_logprobs(policy, batch, temperature=1.0, chunk=64)
    # nor do they take probability in the loss
    assert (logp.view(rollout.logp.shape) - rollout.logp).abs().max() < 1e-5


# ---- the policy that samples is the policy that is trained


@pytest.mark.parametrize("logp_of", ["sampled", "full"])
@pytest.mark.parametrize("truncation", [Truncation(4), Truncation(None, 0.7)], ids=str)
def test_truncated_log_probs_are_those_of_the_training_forward(policy, chat, sources, truncation, logp_of):
    """And completions are those of the untruncated rollout only by chance."""
    rollout = write(policy, chat, sources, truncation=truncation, logp_of=logp_of)
    assert rows(rollout) != rows(write(policy, chat, sources))
    assert rows(rollout) == rows(write(policy, chat, sources, truncation=truncation, max_rows=5))
    batch = micro_batch(batch_of(sources, rollout.tokens, rollout.length), chat.image_token)
    how = {"temperature": 1.0, "chunk": 64, "truncation": truncation if logp_of == "sampled" else None}
    logp, _ = completion_logprobs(policy, batch, **how)
    assert (logp.view(rollout.logp.shape) - rollout.logp).abs().max() < 1e-5
    other = {"sampled": None, "full": truncation}[logp_of]
    logp, _ = completion_logprobs(policy, batch, **how | {"truncation": other})
    assert (logp.view(rollout.logp.shape) - rollout.logp).abs().max() > 0.01


def test_fast_log_probs_are_those_of_the_training_forward_up_to_rounding(policy, chat, sources):
    """exact=false: attention in float32, sampled and trained; what docs/ranks.md promises of the gap."""
    exact = write(policy, chat, sources)
    with attention_sums(exact=False):
        rollout = write(policy, chat, sources)
        batch = micro_batch(batch_of(sources, rollout.tokens, rollout.length), chat.image_token)
        logp, _ = completion_logprobs(policy, batch, temperature=1.0, chunk=64)
    gap = (logp.view(rollout.logp.shape) - rollout.logp).abs().max()
    assert 0 < gap < 1e-4
    same = (rollout.tokens == exact.tokens).all(-1)
    # a rounding may draw another token, seldom
    assert same.float().mean() > 0.8 and 0 < (rollout.logp - exact.logp)[same].abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("micro", [10**9, 100])
def test_log_probs_are_those_of_the_training_forward(policy, chat, sources, temperature, micro):
    rollout = write(policy, chat, sources, temperature=temperature)
    batch = batch_of(sources, rollout.tokens, rollout.length)
    logp = torch.zeros(batch.mask.shape)
    for cut in batch.cuts(micro, batch.teaching):
        part = micro_batch(batch, chat.image_token, cut)
        found, _ = completion_logprobs(policy, part, temperature=temperature, chunk=64)
        batch.write_back(logp, found.detach(), cut)
    # attention is exact (layers.to_attention_dtype); products of few rows are not
    assert (logp.view(rollout.logp.shape) - rollout.logp).abs().max() <= (1e-5 if micro == 100 else 2e-6)
    # and they are not all alike
    assert rollout.logp[rollout.logp < 0].std() > 0.5
