"""Log-probabilities in chunks that are recomputed: equal to the plain form in value and gradient, and
small in memory."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from grpo import logprobs
from grpo.logprobs import chunk_of, completion_logprobs
from grpo.sampling import Truncation, sample

P, G, C, D, V = 2, 3, 7, 8, 31
LENGTH = torch.tensor([[7, 1, 4], [2, 7, 5]])


class ToyPolicy(nn.Module):
    """Hidden states that are a function of the completion tokens before them; no model is needed to test a
    head."""

    def __init__(self, vocab=V, impossible=(), seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head, self.impossible = (
            nn.Embedding(vocab, D),
            nn.Linear(D, vocab, bias=False),
            list(impossible),
        )
        self.widest = self.scored = 0

    def forward(self, prompts, completions, length=None):
        before = torch.cat([torch.zeros_like(completions[..., :1]), completions[..., :-1]], dim=-1)
        return self.embed(before).cumsum(dim=-2) + prompts

    @property
    def head_weight(self):
        return self.head.weight

    def logits(self, hidden, head=None):
        self.widest, self.scored = max(self.widest, len(hidden)), self.scored + len(hidden)
        logits = nn.functional.linear(hidden, self.head.weight if head is None else head).float()
        logits[..., self.impossible] = torch.finfo(torch.float32).min
        return logits


def make_batch(length=LENGTH, cap=C, vocab=V):
    g = torch.Generator().manual_seed(1)
    mask = (torch.arange(cap) < length[..., None]).flatten(0, 1)
    return SimpleNamespace(
        prompts=torch.randn(length.shape[0], 1, 1, D, generator=g),
        length=length,
        mask=mask,
        tokens=torch.randint(vocab, (*length.shape, cap), generator=g),
    )


def plain(policy, batch, temperature):
    """What every small trainer does: all logits at once."""
    logp = torch.log_softmax(
        policy.logits(policy(batch.prompts, batch.tokens).flatten(0, 1)) / temperature, dim=-1
    )
    chosen = logp.gather(-1, batch.tokens.flatten(0, 1)[..., None]).squeeze(-1)
    return torch.where(batch.mask, chosen, 0.0), torch.where(batch.mask, -(logp.exp() * logp).sum(-1), 0.0)


@pytest.mark.parametrize("chunk", [1, 7, 26, 27, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_the_plain_form_in_value_and_gradient(chunk, temperature):
    """26 tokens, so chunks of 1, a ragged 7, exactly all, and more than all. 1e-6: float32 sums of 31
    terms; the gradients are up to 11 large and 4e-6 from those in float64."""
    policy, batch = ToyPolicy(), make_batch()
    g = torch.Generator().manual_seed(2)
    upstream = torch.randn(batch.mask.shape, generator=g)
    expected, entropy = plain(policy, batch, temperature)
    gradients = torch.autograd.grad((expected * upstream).sum(), policy.parameters())
    logp, found_entropy = completion_logprobs(policy, batch, temperature=temperature, chunk=chunk)
    torch.testing.assert_close(logp, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found_entropy, entropy, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(torch.autograd.grad((logp * upstream).sum(), policy.parameters()), gradients):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=4e-6)
        assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("chunk", [1, 7, 26, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("impossible", [(), (0, 30)], ids=["all words", "two banned"])
def test_the_entropys_gradient_is_that_of_full_logits(chunk, temperature, impossible, monkeypatch):
    """Each log-prob and each entropy has a slope of its own. A banned word's is 0, not NaN."""
    monkeypatch.setattr(logprobs, "TOKENS_PER_BLOCK", 5)
    policy, batch = ToyPolicy(impossible=impossible), make_batch()
    batch.tokens = batch.tokens.clamp(1, 29)
    g = torch.Generator().manual_seed(2)
    slopes = torch.randn(2, *batch.mask.shape, generator=g)
    logits = policy.logits(policy(batch.prompts, batch.tokens).flatten(0, 1)) / temperature
    logp = logits.log_softmax(dim=-1)
    chosen = logp.gather(-1, batch.tokens.flatten(0, 1)[..., None]).squeeze(-1)
    every = torch.stack([chosen, -(logp.exp() * logp.clamp(min=-1e9)).sum(-1)])
    wanted = torch.autograd.grad((torch.where(batch.mask, every, 0.0) * slopes).sum(), policy.parameters())
    how = {"temperature": temperature, "chunk": chunk, "entropy_grad": True}
    both = torch.stack(completion_logprobs(policy, batch, **how))
    found = torch.autograd.grad((both * slopes).sum(), policy.parameters(), retain_graph=True)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    alone = torch.autograd.grad((both[1] * slopes[1]).sum(), policy.parameters())
    assert all(a.isfinite().all() and a.abs().max() > 0.1 for a in alone)
    assert not alone[1][list(impossible)].any()


def test_the_entropys_gradient_by_finite_differences():
    """A small step along a random direction of the head changes the sum of entropies by the gradient's
    part in that direction. No formula of the entropy's gradient is used."""
    policy, batch = ToyPolicy(), make_batch()
    how = {"temperature": 0.8, "chunk": 5, "entropy_grad": True}
    summed = lambda: completion_logprobs(policy, batch, **how)[1].double().sum()
    (gradient,) = torch.autograd.grad(summed(), [policy.head.weight])
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(4))
    value = []
    for side in (3e-3, -3e-3):
        with torch.no_grad():
            policy.head.weight.add_(side * direction)
            value.append(summed())
            policy.head.weight.sub_(side * direction)
    measured = float(value[0] - value[1]) / 6e-3
    assert measured == pytest.approx(float((gradient * direction).sum()), rel=1e-3)


def test_an_entropy_without_a_slope_leaves_the_gradient_bit_for_bit():
    """With entropy_grad off nothing is computed, and on with slope 0 it adds nothing but rounding."""
    policy, batch = ToyPolicy(), make_batch()
    upstream = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(2))
    found = []
    for entropy_grad in (False, True):
        how = {"temperature": 0.7, "chunk": 4, "entropy_grad": entropy_grad}
        logp, entropy = completion_logprobs(policy, batch, **how)
        assert entropy.requires_grad == entropy_grad
        found.append((logp, entropy, torch.autograd.grad((logp * upstream).sum(), policy.parameters())))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    for a, b in zip(found[0][2], found[1][2]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def both_gradients(policy, batch, chunk, parameters, temperature=0.8):
    """Of the parameters, by the plain form and by ours, for a loss in which every token has a slope of its
    own."""
    upstream = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad((plain(policy, batch, temperature)[0] * upstream).sum(), parameters)
    logp, _ = completion_logprobs(policy, batch, temperature=temperature, chunk=chunk)
    return expected, torch.autograd.grad((logp * upstream).sum(), parameters)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_the_slope_of_a_banned_word_is_zero(chunk):
    """A batch that holds one all the same: its logit is a constant, so only the other words of its
    distribution move."""
    policy, batch = ToyPolicy(impossible=[0, 30]), make_batch()
    batch.tokens[0, 0, 2] = 30
    expected, found = both_gradients(policy, batch, chunk, list(policy.parameters()), temperature=1.0)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=4e-6)
    assert not found[1][30].any()


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_spans_of_tokens_add_up(chunk, monkeypatch):
    """26 tokens in spans of 5: the first writes the head's gradient, the others add to it."""
    monkeypatch.setattr(logprobs, "TOKENS_PER_BLOCK", 5)
    policy, batch = ToyPolicy(impossible=[0, 30]), make_batch()
    expected, found = both_gradients(policy, batch, chunk, list(policy.parameters()))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=4e-6)


def test_a_tokens_gradient_does_not_depend_on_the_batch():
    """The hidden state's gradient of a row is the same bit for bit with more rows beside it: blocks of
    words are as large."""
    policy = ToyPolicy(4000)
    g = torch.Generator().manual_seed(3)
    hidden, tokens, upstream = (
        torch.randn(64, D, generator=g),
        torch.randint(4000, (64,), generator=g),
        torch.randn(64, generator=g),
    )

    def gradient(count):
        rows = hidden[:count].clone().requires_grad_()
        logp, _ = logprobs.masked_logprobs(
            policy, rows, tokens[:count], torch.ones(count, dtype=torch.bool), temperature=0.8, chunk=8
        )
        return torch.autograd.grad((logp * upstream[:count]).sum(), rows)[0]

    torch.testing.assert_close(gradient(64)[:32], gradient(32), rtol=0, atol=0)


def test_a_tied_head_adds_to_the_embeddings_gradient():
    policy, batch = ToyPolicy(), make_batch()
    policy.head.weight = policy.embed.weight
    (expected,), (found,) = both_gradients(policy, batch, 4, [policy.embed.weight])
    # a rounding of the largest entries, which are 60
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-7 * expected.abs().max().item())
    policy.head.weight = nn.Parameter(policy.embed.weight.detach().clone())
    # the head's share is not nothing
    assert (both_gradients(policy, batch, 4, [policy.embed.weight])[1][0] - found).norm() > 0.1 * found.norm()


@pytest.mark.parametrize("frozen", ["head", "embed"])
def test_a_frozen_part_gets_no_gradient_and_changes_no_other(frozen):
    policy, batch = ToyPolicy(), make_batch()
    _expected, found = both_gradients(policy, batch, 4, list(policy.parameters()))
    getattr(policy, frozen).weight.requires_grad_(False)
    (trained,) = [p for p in policy.parameters() if p.requires_grad]
    _, (alone,) = both_gradients(policy, batch, 4, [trained])
    assert torch.equal(alone, found[0 if frozen == "head" else 1])
    logp, _ = completion_logprobs(policy, batch, temperature=1.0, chunk=4)
    logp.sum().backward()
    assert getattr(policy, frozen).weight.grad is None and trained.grad is not None


@pytest.mark.parametrize("chunk", [4, 1000])
def test_products_in_bfloat16_and_sums_in_float32(chunk):
    """Under autocast both forms round their factors to 8 bits; the plain form also rounds the head's
    gradient. Called outside of autocast, the backward pass knows what the forward pass computed in."""
    policy, batch = ToyPolicy(), make_batch()
    upstream = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(2))
    exact, _ = both_gradients(policy, batch, chunk, list(policy.parameters()))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected, _ = plain(policy, batch, 0.8)
        logp, _ = completion_logprobs(policy, batch, temperature=0.8, chunk=chunk)
    torch.testing.assert_close(logp, expected, rtol=1e-6, atol=1e-6)
    wanted = torch.autograd.grad((expected * upstream).sum(), policy.parameters())
    found = torch.autograd.grad((logp * upstream).sum(), policy.parameters())
    for ours, theirs, true in zip(found, wanted, exact):
        assert ours.dtype == torch.float32
        assert 0 < (ours - true).norm() <= max(1.1 * (theirs - true).norm(), 0.01 * true.norm())
    logp, _ = completion_logprobs(policy, batch, temperature=0.8, chunk=chunk)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad((logp * upstream).sum(), policy.parameters())
    for ours, true in zip(found, exact):
        torch.testing.assert_close(ours, true, rtol=1e-5, atol=4e-6)


def test_zero_outside_the_mask_and_nothing_scored_there():
    policy, batch = ToyPolicy(), make_batch()
    logp, entropy = completion_logprobs(policy, batch, temperature=1.0, chunk=5)
    assert (logp[~batch.mask] == 0).all() and (entropy[~batch.mask] == 0).all()
    assert (
        (logp[batch.mask] < 0).all()
        and (entropy[batch.mask] > 0).all()
        and (entropy <= math.log(V) + 1e-5).all()
    )
    assert policy.scored == batch.mask.sum() and policy.widest == 5


def test_masks_ignore_token_values():
    """The last real token may well equal the padding: only lengths decide."""
    policy, batch = ToyPolicy(), make_batch()
    batch.tokens = torch.zeros_like(batch.tokens)
    logp, _ = completion_logprobs(policy, batch, temperature=1.0, chunk=4)
    assert torch.equal(logp != 0, batch.mask)


def test_entropy_carries_no_gradient_and_none_is_made_without_grad():
    policy, batch = ToyPolicy(), make_batch()
    logp, entropy = completion_logprobs(policy, batch, temperature=1.0, chunk=4)
    assert logp.requires_grad and not entropy.requires_grad
    with torch.no_grad():
        quiet, _ = completion_logprobs(policy, batch, temperature=1.0, chunk=4)
    assert not quiet.requires_grad and torch.equal(quiet, logp.detach())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_impossible_tokens_make_no_nan(temperature):
    """The placeholder ids have the lowest float32 as logit: over a temperature below 1 that is -inf, and 0
    * -inf is NaN."""
    policy, batch = ToyPolicy(impossible=[0, 1, 30]), make_batch()
    batch.tokens = batch.tokens.clamp(2, 29)
    logp, entropy = completion_logprobs(policy, batch, temperature=temperature, chunk=6)
    logp.sum().backward()
    assert logp.isfinite().all() and entropy.isfinite().all() and entropy.max() <= math.log(V - 3) + 1e-5
    assert all(p.grad.isfinite().all() for p in policy.parameters())
    assert (policy.head.weight.grad[[0, 1, 30]] == 0).all()


def test_the_policy_that_samples_is_the_policy_that_is_scored():
    """The same hidden states through `sample` and through here: the same log-probs, bit for bit."""
    policy, batch = ToyPolicy(), make_batch()
    with torch.no_grad():
        hidden = policy(batch.prompts, batch.tokens)
        u = torch.rand(P, G, C, generator=torch.Generator().manual_seed(3))
        drawn, logp = sample(policy.logits(hidden.flatten(0, 2)).reshape(P, G, C, V), u, 0.8)
        policy.forward = lambda *_: hidden
        batch.tokens = drawn
        found, _ = completion_logprobs(policy, batch, temperature=0.8, chunk=1000)
    torch.testing.assert_close(found[batch.mask], logp.flatten(0, 1)[batch.mask], rtol=0, atol=1e-6)


def kept_bytes(chunk, vocab=4000, cap=40):
    """Bytes that autograd holds between forward and backward."""
    policy, batch = ToyPolicy(vocab), make_batch(torch.full((2, 2), cap), cap, vocab)
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logp, _ = completion_logprobs(policy, batch, temperature=0.9, chunk=chunk)
        total = sum(kept.values()) - sum(p.untyped_storage().nbytes() for p in policy.parameters())
    assert logp.requires_grad
    return total


def test_chunks_are_recomputed_not_kept():
    """160 tokens x 4,000 words are 2.4 MiB of logits. Chunks that autograd keeps would save nothing, which
    is the bug this pins."""
    logits = 160 * 4000 * 4
    # one chunk holds them all ...
    assert kept_bytes(chunk=1000) > 0.9 * logits
    # ... eight hold none of them
    assert kept_bytes(chunk=20) < 0.1 * logits


class Large(TorchDispatchMode):
    """Counts the results with at least this many numbers."""

    def __init__(self, least):
        super().__init__()
        self.least, self.seen = least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        view = torch.is_tensor(out) and any(
            torch.is_tensor(a) and a.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
            for a in args
        )
        if torch.is_tensor(out) and out.numel() >= self.least and not view:
            self.seen.append(str(function))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_makes_one_gradient_of_the_head(dtype):
    """Eighty chunks, one (V, D) result, which is the gradient itself. Autograd would make one per chunk
    and add them."""
    policy, batch = ToyPolicy(4000), make_batch(torch.full((2, 2), 40), 40, 4000)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16, cache_enabled=False):
        logp, _ = completion_logprobs(policy, batch, temperature=0.9, chunk=2)
    with Large(4000 * D) as large:
        torch.autograd.grad(logp.sum(), policy.head.weight)
    assert len(large.seen) == 1, large.seen


def test_a_chunk_is_as_many_tokens_as_its_bytes_hold():
    assert (
        chunk_of(151936, 111.3, "cpu") == chunk_of(151936, None, "cpu") == 192
        and chunk_of(151936, None, "cuda") == 880
    )
    assert (
        chunk_of(151936, 0.01, "cpu") == 1
        and chunk_of(151936, 9, "cpu") == 15
        and chunk_of(128, 1, "cpu") == 2048
    )


def test_a_batch_without_tokens():
    """Ranks pad their micro-batches with empty ones; the backward pass must still run and give zeros."""
    policy, batch = ToyPolicy(), make_batch(torch.zeros(1, 2, dtype=torch.long))
    logp, entropy = completion_logprobs(policy, batch, temperature=1.0, chunk=4)
    logp.sum().backward()
    assert (
        (logp == 0).all() and (entropy == 0).all() and all((p.grad == 0).all() for p in policy.parameters())
    )


@pytest.mark.parametrize("wrong", [dict(temperature=0, chunk=4), dict(temperature=1.0, chunk=0)])
def test_wrong_settings_are_errors(wrong):
    with pytest.raises(ValueError, match="must both be positive"):
        completion_logprobs(ToyPolicy(), make_batch(), **wrong)


# ---- the likeliest words only


@pytest.mark.parametrize("chunk", [1, 7, 26, 1000])
@pytest.mark.parametrize("truncation", [Truncation(5), Truncation(None, 0.8), Truncation(9, 0.9)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_truncated_log_probs_and_their_gradient(chunk, truncation, temperature, monkeypatch):
    """Against autograd over the words that stay. A token that is left out reaches down to itself."""
    monkeypatch.setattr(logprobs, "TOKENS_PER_BLOCK", 5)
    policy, batch = ToyPolicy(impossible=[3]), make_batch()
    batch.tokens[batch.tokens == 3] = 4
    logits = policy.logits(policy(batch.prompts, batch.tokens).flatten(0, 1)) / temperature
    chosen = batch.tokens.flatten(0, 1)[..., None]
    order = logits.detach().sort(dim=-1, descending=True).values
    p = order[..., : truncation.top_k].softmax(-1)
    count = ((p.cumsum(-1) - p) < truncation.top_p).sum(-1, keepdim=True)
    least = torch.minimum(order.gather(-1, count - 1), logits.detach().gather(-1, chosen))
    left = torch.where(logits < least, -torch.inf, logits)
    assert (logits.detach().gather(-1, chosen) < order.gather(-1, count - 1)).any(), "some are left out"
    expected = torch.where(batch.mask, left.log_softmax(-1).gather(-1, chosen)[..., 0], 0.0)
    upstream = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(2))
    keep = {"retain_graph": True}
    gradients = torch.autograd.grad((expected * upstream).sum(), policy.parameters(), **keep)
    how = {"temperature": temperature, "chunk": chunk, "truncation": truncation}
    logp, entropy = completion_logprobs(policy, batch, **how)
    torch.testing.assert_close(logp, expected, rtol=1e-6, atol=1e-6)
    wanted = torch.special.entr(left.softmax(-1)).sum(-1)
    torch.testing.assert_close(entropy, torch.where(batch.mask, wanted, 0.0), rtol=1e-5, atol=1e-6)
    for found, each in zip(torch.autograd.grad((logp * upstream).sum(), policy.parameters()), gradients):
        torch.testing.assert_close(found, each, rtol=1e-5, atol=4e-6)
    # the entropy is that of the words that stay; 0 * -inf at the others would be NaN
    p = left.softmax(-1)
    stays = torch.where(p > 0, p * left.log_softmax(-1).clamp(min=-1e9), 0.0).sum(-1)
    wanted = torch.autograd.grad((torch.where(batch.mask, -stays, 0.0) * upstream).sum(), policy.parameters())
    _, entropy = completion_logprobs(policy, batch, **how, entropy_grad=True)
    for found, each in zip(torch.autograd.grad((entropy * upstream).sum(), policy.parameters()), wanted):
        torch.testing.assert_close(found, each, rtol=1e-5, atol=1e-5)
