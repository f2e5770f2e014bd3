"""AdamW with moments of one byte and weights of two, against PyTorch's AdamW, closed forms and a published
table."""

import pytest
import torch
from small import small_policy
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from grpo import optim
from grpo.optim import BLOCK, Bytes, Muon, Optimizer, dynamic_values, round_at_random
from grpo.run.setup import matrices_in_bfloat16
from grpo.sampling import address_hash, shift_right

RATES = {"lr": 1e-3, "beta2": 0.99, "weight_decay": 0.1}
# every 17th number, ascending, of `create_dynamic_map` in torchao 0.18.0, which is bitsandbytes'
SIGNED = """-0.992969 -0.753906 -0.514844 -0.275781 -0.0873438 -0.0395312 -0.00634375 -0.00015625 0.00026875
0.00690625 0.0423437 0.0901562 0.289844 0.528906 0.767969 1"""
UNSIGNED = """0 0.000240625 0.00198438 0.00676563 0.0177344 0.0416406 0.0655469 0.0894531 0.166797 0.286328
0.405859 0.525391 0.644922 0.764453 0.883984 1"""


def gradients(policy, step):
    """Of very different sizes in a row."""
    random = torch.Generator().manual_seed(step)
    normal = lambda p: torch.randn(p.shape, generator=random)
    return [normal(p) * torch.exp(2 * normal(p)) for p in policy.parameters()]


def train(policy, optimizer, steps, first=0):
    for step in range(first, first + steps):
        for p, g in zip(policy.parameters(), gradients(policy, step)):
            p.grad = g.to(p.dtype)
        optimizer.step()


def trained(name, steps, policy=None, **rates):
    policy = small_policy() if policy is None else policy
    optimizer = Optimizer(policy, name=name, **(RATES | rates))
    train(policy, optimizer, steps)
    return policy, optimizer


def matrices(policy):
    return [p for p in policy.parameters() if p.dim() > 1]


# ---- bytes


@pytest.mark.parametrize("signed", [True, False])
def test_a_byte_stands_for_the_published_numbers(signed):
    values = dynamic_values(signed)
    assert len(values.unique()) == 256 and bool((values.diff() > 0).all())
    published = [float(number) for number in (SIGNED if signed else UNSIGNED).split()]
    torch.testing.assert_close(values[::17], torch.tensor(published), rtol=1e-5, atol=0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [1, 7, 256, 300, 1000])
def test_a_number_becomes_the_nearest_one_of_its_block(signed, n):
    random = torch.Generator().manual_seed(n)
    x = torch.randn(5, n, generator=random) * torch.exp(3 * torch.randn(5, n, generator=random))
    x = x if signed else x.abs()
    x[1] = 0
    table = Bytes(signed)
    codes, scale = table.write(x)
    assert codes.shape == x.shape and codes.dtype == torch.uint8 and scale.shape == (5, -(-n // BLOCK))
    size = -(-n // scale.shape[1])
    largest = torch.stack([part.abs().amax(1) for part in x.split(size, 1)], 1)
    assert torch.equal(scale, largest)
    scaled = x.double() / largest.repeat_interleave(size, 1)[:, :n].double().clamp(min=1e-300)
    nearest = (scaled[..., None] - table.values.double()).abs().amin(-1)
    found = table.read(codes, scale)
    error = (
        found.double() / largest.repeat_interleave(size, 1)[:, :n].double().clamp(min=1e-300) - scaled
    ).abs()
    # as a divisor, the least number is the least above 0
    least = 0 if signed else float(table.values[1])
    assert bool((error <= nearest + least + 1e-6).all()) and not found[1].any()
    assert signed or bool(((found > 0) == (x > 0)).all())


# ---- AdamW


def test_the_first_step_is_that_of_pytorchs_adamw():
    """Moments are rounded behind the step."""
    for p, q in zip(trained("adamw", 1)[0].parameters(), trained("adamw_8bit", 1)[0].parameters()):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-8)


def test_a_later_step_is_adamws_from_the_rounded_moments():
    """In closed form, in float64: Loshchilov & Hutter 2019, Algorithm 2."""
    policy, optimizer = trained("adamw_8bit", 3)
    before = {p: p.detach().double() for p in matrices(policy)}
    read = {}
    for p in matrices(policy):
        state = optimizer.state(p)
        pairs = [(state[name].flatten(1), state[f"{name}_scale"]) for name in ("exp_avg", "exp_avg_sq_root")]
        read[p] = [
            Bytes(signed).read(*pair).view_as(p).double() for signed, pair in zip((True, False), pairs)
        ]
    train(policy, optimizer, 1, first=3)
    for p, g in zip(policy.parameters(), gradients(policy, 3)):
        if p.dim() > 1:
            m = 0.9 * read[p][0] + 0.1 * g.double()
            v = 0.99 * read[p][1] ** 2 + 0.01 * g.double() ** 2
            step = (m / (1 - 0.9**4)) / ((v / (1 - 0.99**4)).sqrt() + 1e-8)
            expected = before[p] * (1 - 1e-3 * 0.1) - 1e-3 * step
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-8)


def test_rounded_moments_hardly_change_where_adamw_goes():
    """Of 30 steps: the difference of the ends is a twentieth of the way. A second moment that is kept itself,
    not its root, becomes 0 beside larger ones, and the ends are 300 ways apart (docs/optimizers.md)."""
    start, (plain, _), (small, _) = small_policy(), trained("adamw", 30), trained("adamw_8bit", 30)
    way = sum(float((p - q).detach().square().sum()) for p, q in zip(matrices(plain), matrices(start)))
    apart = sum(float((p - q).detach().square().sum()) for p, q in zip(matrices(plain), matrices(small)))
    assert 0 < apart < 0.06**2 * way


def test_the_states_are_a_quarter_of_adamws():
    size = lambda pair: sum(t.nbytes for p in matrices(pair[0]) for t in pair[1].state(p).values() if t.dim())
    big = torch.nn.Sequential(torch.nn.Linear(512, 256, bias=False))
    pairs = [trained(name, 1, big) for name in ("adamw", "adamw_8bit")]
    assert size(pairs[1]) <= 0.26 * size(pairs[0])


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_bf16"])
def test_how_many_rows_are_updated_at_a_time_changes_nothing(monkeypatch, name):
    whole = trained(name, 2, matrices_in_bfloat16(small_policy()))[0]
    monkeypatch.setattr(optim, "AT_ONCE", 100)
    parts = trained(name, 2, matrices_in_bfloat16(small_policy()))[0]
    assert all(map(torch.equal, whole.parameters(), parts.parameters()))


# ---- weights in bfloat16


def test_rounding_at_random_is_right_on_average():
    """Over all 2^16 values of the random bits the mean is the number, and each result is a neighbour."""
    bits = torch.arange(1 << 16)
    for number in (1.0, 1.003, -0.0217, 3.1e-5, -12345.678, 1e-38):
        x = torch.full(bits.shape, number)
        found = round_at_random(x, bits)
        assert float(found.double().mean()) == float(x[0])
        below, above = found.min(), found.max()
        assert float(below) <= float(x[0]) <= float(above)
        assert below == above or torch.nextafter(below, above) == above


def test_the_bits_are_uniform_and_of_their_address():
    place = torch.arange(1 << 16)
    bits = lambda *address: shift_right(address_hash(*address, place), 48)
    first = bits(0, 1, 7)
    counts = (first >> 8).bincount(minlength=256).double()
    # chi-square with 255 degrees of freedom: mean 255, deviation 22.6
    assert float(((counts - 256) ** 2 / 256).sum()) < 255 + 5 * 22.6
    for other in (bits(1, 1, 7), bits(0, 2, 7), bits(0, 1, 8), first.roll(1)):
        both = torch.corrcoef(torch.stack((first, other)).double())[0, 1]
        assert abs(float(both)) < 5 / 256
    assert torch.equal(first[100:200], shift_right(address_hash(0, 1, 7, place[100:200]), 48))


def moved(round_to_nearest):
    """By how much 1e4 weights of about 0.02 move in 100 steps of 1e-6, whose gradient is always 1."""
    weight = torch.nn.Linear(100, 100, bias=False)
    torch.nn.init.normal_(weight.weight, 0.02, 0.002, generator=torch.Generator().manual_seed(0))
    weight.bfloat16()
    before = weight.weight.detach().double()
    optimizer = Optimizer(weight, name="adamw_bf16", lr=1e-6, beta2=0.999, weight_decay=0.0)
    if round_to_nearest:
        optimizer = torch.optim.AdamW(weight.parameters(), lr=1e-6, weight_decay=0.0)
    for _ in range(100):
        weight.weight.grad = torch.ones_like(weight.weight)
        optimizer.step()
    return float((weight.weight.detach().double() - before).mean())


def test_small_updates_of_bfloat16_weights_are_kept_on_average_or_lost_by_rounding_to_nearest():
    assert moved(round_to_nearest=False) == pytest.approx(-1e-4, rel=0.05)
    assert moved(round_to_nearest=True) == 0


def test_another_seed_rounds_otherwise():
    first, same, other = (
        trained("adamw_bf16", 2, matrices_in_bfloat16(small_policy()), seed=seed)[0] for seed in (0, 0, 1)
    )
    assert all(map(torch.equal, first.parameters(), same.parameters()))
    assert not all(map(torch.equal, matrices(first), matrices(other)))


# ---- states on the host


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adamw_bf16"])
def test_states_on_the_host_change_no_number(monkeypatch, name):
    """There is no GPU in the tests: copies play the part of what lies there."""
    begun = matrices_in_bfloat16 if name == "adamw_bf16" else lambda policy: policy
    here = trained(name, 3, begun(small_policy()), seed=1)
    to, sent = torch.Tensor.to, []

    def sent_to(x, where):
        if isinstance(where, torch.dtype):
            return to(x, where)
        sent.append(where)
        return x.clone()

    monkeypatch.setattr(torch.Tensor, "to", sent_to)
    away = trained(name, 3, begun(small_policy()), states_on="host", seed=1)
    assert len(sent) > 2 * len(list(away[0].parameters()))
    for p, q in zip(here[0].parameters(), away[0].parameters()):
        state, other = here[1].state(p), away[1].state(q)
        assert torch.equal(p, q) and state.keys() == other.keys() != set()
        assert all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adamw_bf16"])
@pytest.mark.parametrize("on, most", [("device", 4), ("host", 1)])
def test_states_on_the_host_are_on_the_device_for_one_parameter_at_a_time(monkeypatch, name, on, most):
    """Fake tensors play those of a GPU. They know their device, and have no memory."""
    # fake tensors have no values to count with, to look up or to copy
    monkeypatch.setattr(FakeTensor, "__int__", lambda x: 1, raising=False)
    monkeypatch.setattr(FakeTensor, "copy_", lambda x, y: x, raising=False)
    monkeypatch.setattr(optim.AdamW8bit, "_new_rows", lambda self, rates, step, w, *rest: w.float())
    dtype = torch.bfloat16 if name == "adamw_bf16" else torch.float32
    there = []
    with FakeTensorMode():
        matrices = [torch.empty(300, 256, device="cuda", dtype=dtype) for _ in range(4)]
        policy = torch.nn.ParameterList(matrices)
        optimizer = Optimizer(policy, name=name, states_on=on, **RATES)
        (part,) = [part for part, _ in optimizer.parts]

        def step(real=part.step):
            real()
            there.append(sum(moments(state) == {"cuda"} for state in part.state.values()))

        part.step = step
        homes = []
        for _ in range(3):
            for p in policy.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            homes.append([x for p in policy.parameters() for x in optimizer.state(p).values() if x.dim()])
        found = [moments(optimizer.state(p)) for p in policy.parameters()]
        blank = [moments(optimizer.blank_state(p)) for p in policy.parameters()]
    assert max(there) == most and found == blank == [{"cuda" if on == "device" else "cpu"}] * 4
    # the same memory in every step
    assert all(x is y for x, y in zip(homes[0], homes[2], strict=True))


def moments(state):
    """The kinds of device that a parameter's moments are on."""
    return {x.device.type for x in state.values() if x.dim()}


# ---- Muon


@pytest.mark.parametrize("rows, columns", [(24, 24), (40, 16), (16, 40)])
def test_muon_is_pytorchs_but_for_the_rounding_of_its_products(rows, columns):
    """PyTorch computes them in bfloat16, with 8 bits a number."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(3, rows, columns, generator=g)
    both = []
    for kind in (Muon, torch.optim.Muon):
        weights = [torch.nn.Parameter(each.clone()) for each in start]
        both.append((weights, kind(weights, lr=0.02, momentum=0.95, weight_decay=0.1)))
    for _ in range(4):
        gradients = torch.randn(3, rows, columns, generator=g)
        for weights, optimizer in both:
            for weight, gradient in zip(weights, gradients):
                weight.grad = gradient.clone()
            optimizer.step()
    (ours, mine), (theirs, its) = both
    for a, b, first in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (b - first).norm()
        assert torch.equal(mine.state[a]["momentum_buffer"], its.state[b]["momentum_buffer"])


def test_muon_leaves_a_matrix_without_a_gradient():
    weights = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    weights[0].grad = torch.ones(4, 4)
    Muon(weights, lr=0.1, momentum=0.95, weight_decay=0.1).step()
    assert (weights[1] == 1).all() and not (weights[0] == 1).any()
