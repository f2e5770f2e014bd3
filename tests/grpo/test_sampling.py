"""Addressed uniforms and the inverse CDF."""

import math

import pytest
import torch

from grpo.sampling import Truncation, least_kept, log_distribution, sample, uid_hash, uniforms

IMPOSSIBLE = torch.finfo(torch.float32).min


def splitmix(x):
    """The finaliser with Python's integers: an independent implementation."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def by_hand(seed, step, uid, g, t):
    state = 0
    for word in (seed, step, uid, g, t):
        state = splitmix(((state ^ (word % 2**64)) + 0x9E3779B97F4A7C15) % 2**64)
    return max((state >> 40) * 2.0**-24, 2.0**-25)


# ---- uniforms
# ----------------------------------------------------------------------


def test_uniforms_are_the_hash_of_their_address():
    uids = [0, -7, uid_hash("shapes/train/3"), 2**63 - 1, -(2**63), 2**64 - 1]
    for seed, step in ((0, 0), (1, 12345), (2**63, 7)):
        u = uniforms(seed, step, uids, 3, 5)
        assert u.shape == (6, 3, 5) and u.dtype == torch.float32
        for p, uid in enumerate(uids):
            assert u[p].tolist() == [[by_hand(seed, step, uid, g, t) for t in range(5)] for g in range(3)]


def test_uniforms_depend_on_the_address_alone():
    """Another batch, order, group size or cap: the same numbers where the address is the same."""
    a, b, c = 11, -5, uid_hash("x")
    whole = uniforms(3, 9, [a, b, c], 6, 40)
    assert torch.equal(uniforms(3, 9, [c, a], 4, 25), whole[[2, 0], :4, :25])
    assert torch.equal(uniforms(3, 9, [b], 6, 40)[0], whole[1])
    for other in (
        uniforms(4, 9, [a], 6, 40),
        uniforms(3, 10, [a], 6, 40),
        uniforms(3, 9, [a + 1], 6, 40),
        uniforms(9, 3, [a], 6, 40),
    ):
        assert (other[0] == whole[0]).float().mean() < 0.01


def test_uniforms_leave_the_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    uniforms(0, 0, [1], 4, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_uniforms_are_uniform_and_unrelated():
    """256 bins by chi-square, and correlations along every axis of the address, seeds and steps included.
    n = 160,000."""
    u = uniforms(0, 0, list(range(20)), 8, 1000)
    assert u.min() > 0 and u.max() < 1
    counts = torch.histc(u, 256, 0, 1)
    expected = u.numel() / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 6 * math.sqrt(2 * 255)
    near = [
        (u[1:], u[:-1]),
        (u[:, 1:], u[:, :-1]),
        (u[..., 1:], u[..., :-1]),
        (u, uniforms(1, 0, list(range(20)), 8, 1000)),
        (u, uniforms(0, 1, list(range(20)), 8, 1000)),
    ]
    for x, y in near:
        correlation = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(x.numel())


def test_uid_hash_is_stable_and_wide():
    assert uid_hash("shapes/train/0") == int.from_bytes(
        bytes.fromhex("41208e55e84727c6"), "little", signed=True
    )
    assert len({uid_hash(str(i)) for i in range(1000)}) == 1000
    assert all(-(2**63) <= uid_hash(str(i)) < 2**63 for i in range(1000)) and uid_hash("é") != uid_hash("e")


# ---- sample
# ----------------------------------------------------------------------


def test_inverse_cdf_by_hand():
    """p = 1/2, 1/4, 1/8, 1/8: the token changes exactly at the cumulative sums, and a boundary belongs to
    the token above it."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    u = torch.tensor([1e-7, 0.4999, 0.5001, 0.7499, 0.7501, 0.8749, 0.8751, 1 - 2.0**-24])
    tokens, logp = sample(logits.expand(8, 4), u, 1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(logp, logits[tokens])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_by_chi_square(temperature):
    """40,000 draws over 9 words, one impossible. The 99.9999 % point of chi-square with 7 degrees of
    freedom is 42."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, IMPOSSIBLE, 0.3, -2.0, 1.5, 0.9])
    u = uniforms(5, 1, list(range(10)), 40, 100)
    tokens, logp = sample(logits.expand(10, 40, 100, 9), u, temperature)
    p = torch.softmax(logits / temperature, -1)
    counts = torch.bincount(tokens.flatten(), minlength=9)
    assert counts[4] == 0
    possible = p > 0
    expected = p[possible] * u.numel()
    assert ((counts[possible] - expected) ** 2 / expected).sum() < 42
    torch.testing.assert_close(logp, torch.log_softmax(logits / temperature, -1)[tokens])


@pytest.mark.parametrize("size", [5, 1000, 151_936])
def test_a_token_of_probability_zero_is_never_returned(size):
    """Also where u falls beside it, at either end of the vocabulary, and where the float32 sum of the
    probabilities isn't 1."""
    g = torch.Generator().manual_seed(size)
    logits = torch.randn(8, size, generator=g)
    banned = torch.zeros(size, dtype=torch.bool)
    banned[[0, 1, size // 2, size - 2, size - 1]] = True
    # at least one is possible
    banned[size // 3] = False
    for value in (IMPOSSIBLE, -math.inf, -1e4):
        u = torch.tensor([0.0, 2.0**-25, 2.0**-24, 0.25, 0.5, 0.75, 1 - 2.0**-23, 1 - 2.0**-24])
        for temperature in (0.3, 1.0):
            tokens, logp = sample(logits.masked_fill(banned, value), u, temperature)
            assert not banned[tokens].any() and logp.isfinite().all()


def test_a_scan_that_is_not_monotone_does_no_harm(monkeypatch):
    """A parallel cumulative sum may move by an ulp where a zero is added. Simulated: impossible tokens sit
    higher than their neighbours."""
    logits = torch.tensor([1.0, IMPOSSIBLE, 0.0, IMPOSSIBLE, IMPOSSIBLE])
    true = torch.Tensor.cumsum
    monkeypatch.setattr(
        torch.Tensor, "cumsum", lambda x, dim: true(x, dim) + torch.tensor([0.0, 1e-3, 0.0, 1e-3, 2e-3])
    )
    tokens, _ = sample(logits.expand(1001, 5), torch.linspace(0, 1 - 2.0**-24, 1001), 1.0)
    assert set(tokens.tolist()) == {0, 2}


def test_one_certain_token():
    logits = torch.full((3, 50), -1e30)
    logits[:, 17] = 4.0
    tokens, logp = sample(logits, torch.tensor([2.0**-25, 0.5, 1 - 2.0**-24]), 1.0)
    assert tokens.tolist() == [17] * 3 and logp.tolist() == [0.0] * 3


def test_temperature_zero_is_greedy():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 3.0]])
    tokens, logp = sample(logits, None, 0)
    # the first of equals
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(logp, torch.log_softmax(logits, -1)[[0, 1], [1, 0]])


def test_a_row_ignores_its_neighbours():
    """The same distribution and address give the same token, whatever else is in the batch."""
    g = torch.Generator().manual_seed(0)
    logits, u = torch.randn(64, 97, generator=g), uniforms(0, 0, [1], 1, 64)[0, 0]
    tokens, logp = sample(logits, u, 1.0)
    for rows in ([3], [9, 3, 60], list(range(63, -1, -1))):
        some, some_logp = sample(logits[rows], u[rows], 1.0)
        assert torch.equal(some, tokens[rows]) and torch.equal(some_logp, logp[rows])


def test_distribution_is_float32_at_the_given_temperature():
    logits = torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    logp = log_distribution(logits, 0.5)
    assert logp.dtype == torch.float32
    # bfloat16 would be 1e-4 away
    assert logp[1].item() == pytest.approx(-math.log1p(math.exp(-4)), abs=1e-7)


def test_sampling_without_uniform_numbers_is_an_error():
    with pytest.raises(ValueError, match=r"temperature 0\.7 needs u"):
        sample(torch.zeros(2, 3), None, 0.7)


# ---- the likeliest words only

TRUNCATIONS = [Truncation(k, p) for k in (None, 1, 3, 50, 999) for p in (1.0, 0.95, 0.5, 1e-6)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_top_k_and_top_p_keep_the_words_that_transformers_keeps(truncation, temperature):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(200, 99, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, :5] = torch.finfo(torch.float32).min
    theirs = TemperatureLogitsWarper(temperature)(None, logits.clone())
    if truncation.top_k:
        theirs = TopKLogitsWarper(truncation.top_k)(None, theirs)
    if truncation.top_p < 1:
        theirs = TopPLogitsWarper(truncation.top_p)(None, theirs)
    ours = log_distribution(logits, temperature, truncation)
    assert torch.equal(ours > -200, torch.log_softmax(theirs, -1) > -200)
    torch.testing.assert_close(ours.exp(), theirs.softmax(-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_what_is_left_out_is_never_drawn(truncation):
    g = torch.Generator().manual_seed(1)
    logits, u = torch.randn(2000, 40, generator=g) * 3, torch.rand(2000, generator=g)
    kept = log_distribution(logits, 0.9, truncation)
    tokens, logp = sample(logits, u, 0.9, truncation)
    assert (logp > -torch.inf).all() and torch.equal(logp, kept.gather(-1, tokens[:, None])[:, 0])
    same, full = sample(logits, u, 0.9, truncation, "full")
    assert torch.equal(same, tokens)
    assert torch.equal(full, log_distribution(logits, 0.9).gather(-1, tokens[:, None])[:, 0])
    if truncation.top_k == 1 or truncation.top_p == 1e-6:
        assert torch.equal(tokens, logits.argmax(-1)) and not logp.any()


def test_without_truncation_nothing_changes():
    g = torch.Generator().manual_seed(2)
    logits, u = torch.randn(500, 40, generator=g), torch.rand(500, generator=g)
    for nothing in (Truncation(), Truncation(40), Truncation(10**9, 1.0)):
        for a, b in zip(sample(logits, u, 0.7), sample(logits, u, 0.7, nothing)):
            assert torch.equal(a, b)


def test_equal_words_stay_together_and_another_rounding_keeps_the_same():
    equal = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert (log_distribution(equal, 1.0, Truncation(2)) > -torch.inf).tolist() == [[True] * 4 + [False]]
    assert least_kept(torch.tensor([[3.0, 1.0, 0.0]]), Truncation(1)).item() == 2.0
    assert least_kept(torch.tensor([[3.0, 1.0]]), Truncation(5)).item() == 1.0
