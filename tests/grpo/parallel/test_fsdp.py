"""Sharding, on one rank: a sharded policy computes what a whole one does, weights are gathered and released,
and empty groups have no effect. Several ranks: tests/faults/test_ranks.py."""

import functools
import operator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from small import batch_of, full, micro_batch, small_folder
from torch.distributed.tensor import DTensor

from data.chat import Chat
from data.shapes.world import Shapes
from grpo.batch import Cut, collate_prompts
from grpo.config import parse
from grpo.gradient import TokenBudget, accumulate_gradient, empty_prompt, passes
from grpo.logprobs import completion_logprobs
from grpo.objective import policy_loss, token_weights
from grpo.optim import Optimizer, clip_gradient
from grpo.parallel import fsdp
from grpo.parallel.ranks import Ranks, sum_gradients
from grpo.plan import plan
from grpo.rollout import generate
from grpo.run.setup import frozen
from grpo.storage.model_folder import BUILT_IN
from grpo.variants import token_mean
from models import lora, weights

RANKS = Ranks(0, 1, torch.device("cpu"))
HOW = {"name": "adamw", "lr": 1e-3, "beta2": 0.999, "weight_decay": 0.1}


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl"])
def base(request, tmp_path_factory):
    """A small random policy's folder. Its widths are multiples of 32: else a processor with AVX-512 rounds
    a row by the number of rows beside it, and an empty group is some (docs/ranks.md)."""
    folder = tmp_path_factory.mktemp("base")
    return small_folder(folder, architecture=request.param, intermediate_size=64)


@pytest.fixture
def alone():
    """A process group of one, on one thread: two cut a product by its number of rows, and an empty group
    has some."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(before)


@pytest.fixture
def batch(base):
    """Three groups of two completions; the second prompt has no picture."""
    chat, world = Chat(base, template="shapes"), Shapes("train", 100, seed=5)
    prompts = [chat.prompt(world[i] if i != 1 else replace(world[i], pictures=())) for i in range(3)]
    random = torch.Generator().manual_seed(2)
    length, tokens = (
        torch.tensor([[5, 2], [3, 3], [1, 6]]),
        torch.randint(8, 120, (3, 2, 6), generator=random),
    )
    found = batch_of(prompts, tokens, length, advantage=torch.randn(6, generator=random))
    found.share = found.share.apart()
    found.weight = token_weights(found.mask, token_mean, tokens=length.sum(), completions=6, cap=6)
    return found


def budget_of(tokens=10**6):
    return TokenBudget(tokens, 4, torch.device("cpu"))


def learn(policy, batch, budget=10**6):
    """One pass over a batch. -> log-probs (B, C); the gradients are summed up."""

    def loss_of(part):
        logp, entropy = completion_logprobs(policy, part, temperature=1.0, chunk=4)
        assert entropy[~part.mask].eq(0).all()
        return *policy_loss(logp, None, None, part.advantage, part.weight), logp, entropy

    batch.stats = {}
    accumulate_gradient(loss_of, policy, batch, budget_of(budget))
    sum_gradients(policy)
    return batch.logp


def gradients(policy):
    return {name: full(p.grad) for name, p in policy.named_parameters()}


def test_a_sharded_policy_learns_what_a_whole_one_does(base, batch, alone):
    """Log-probs, gradients, their norm, two optimizer steps and its state, bit for bit; a part without a
    picture runs with an empty group that has one."""
    plain, cut = weights.load(base), weights.load(base)
    fsdp.shard(cut, RANKS, use_bfloat16=False)
    matrices = [isinstance(p, DTensor) for p in cut.parameters() if p.dim() >= 2]
    assert (
        all(matrices)
        and matrices
        and not any(isinstance(p, DTensor) for p in cut.parameters() if p.dim() < 2)
    )
    optimizers = [Optimizer(policy, **HOW) for policy in (plain, cut)]
    # groups whole, then cut by rows
    for budget in (10**6, 60):
        assert torch.equal(learn(plain, batch, budget), learn(cut, batch, budget))
        one, other = gradients(plain), gradients(cut)
        for name in one:
            # the empty group adds zeros to a sum
            torch.testing.assert_close(
                other[name], one[name], rtol=1e-6, atol=1e-6 * float(one[name].abs().max()), msg=name
            )
        norms = [float(clip_gradient(policy, 0.5)) for policy in (plain, cut)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6) and norms[0] > 0.5
        assert float(torch.stack([g.norm() for g in gradients(cut).values()]).norm()) == pytest.approx(
            0.5, rel=1e-5
        )
    for _ in range(2):
        for policy, optimizer in zip((plain, cut), optimizers):
            learn(policy, batch)
            clip_gradient(policy, 0.5)
            optimizer.step()
    for (name, p), q in zip(plain.named_parameters(), cut.parameters()):
        # two steps of 1e-3
        torch.testing.assert_close(full(q.detach()), p.detach(), rtol=0, atol=1e-5, msg=name)
        state = optimizers[1].state(q)
        assert (
            state.keys() == optimizers[0].state(p).keys() == {"step", "exp_avg", "exp_avg_sq"}
            and full(state["exp_avg"]).shape == p.shape
        )


def test_one_process_is_not_sharded_and_pays_nothing(base, batch):
    policy = weights.load(base)
    with fsdp.whole_weights(policy) as inside:
        assert inside is policy
    # no empty groups
    cuts = lambda: [
        (cut.groups, len(part.prompts.tokens)) for part, cut in passes(policy, batch, budget_of(), [0, 1, 2])
    ]
    assert cuts() == [([0], 1), ([1], 1), ([2], 1)]
    batch.share.section[:2] = 0
    assert [(sorted(groups), count) for groups, count in cuts()] == [([0, 1], 2), ([2], 1)]


def test_gradients_add_up_in_float64_and_are_rounded_once(base, batch):
    policy = weights.load(base)
    learn(policy, batch)
    together = gradients(policy)
    apart = []
    for p in range(3):
        rows = slice(2 * p, 2 * p + 2)
        alone = batch_of(batch.prompts[p : p + 1], batch.tokens[p : p + 1], batch.length[p : p + 1])
        alone.advantage = batch.advantage[rows]
        alone.weight = batch.weight[rows]
        learn(policy, alone)
        apart.append(gradients(policy))
    for name, whole in together.items():
        assert torch.equal(whole, sum(g[name].double() for g in apart).float()), name


@torch.no_grad()
def test_a_policy_cast_once_is_the_one_that_is_cast_for_every_token(base):
    policy = weights.load(base)
    chat, world = Chat(base, template="shapes"), Shapes("train", 100, seed=5)
    prompts = collate_prompts([chat.prompt(world[i]) for i in range(3)], image_token=chat.image_token)
    how = dict(group=4, cap=12, temperature=1.0, stop_ids=chat.stop_ids, address=(0, 0, [1, 2, 3]))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with fsdp.whole_weights(policy) as sampler:
            dtypes = {name: p.dtype for name, p in sampler.named_parameters()}
            once = generate(sampler, prompts, **how)
        each = generate(policy, prompts, **how)
    assert (
        sampler is not policy and torch.equal(once.tokens, each.tokens) and torch.equal(once.logp, each.logp)
    )
    assert {p.dtype for p in policy.parameters()} == {torch.float32} and dtypes[
        "model.embed_tokens.weight"
    ] == dtypes["model.norm.weight"] == torch.float32
    assert (
        dtypes["lm_head.weight"]
        == dtypes["model.layers.0.mlp.up_proj.weight"]
        == dtypes["visual.blocks.0.attn.qkv.weight"]
        == torch.bfloat16
    )


def test_whole_gathers_and_puts_back(base, alone):
    plain, cut = weights.load(base), weights.load(base)
    fsdp.shard(cut, RANKS, use_bfloat16=True)
    with pytest.raises(KeyError), fsdp.whole_weights(cut) as policy:
        assert type(policy) is type(plain) and not any(
            isinstance(p, DTensor) or p.requires_grad for p in policy.parameters()
        )
        for (name, p), (_, q) in zip(plain.named_parameters(), policy.named_parameters()):
            block = p.dim() >= 2 and (".layers." in name or ".blocks." in name)
            # as autocast would have it: products low, embedding, norms and head not
            assert q.dtype == (torch.bfloat16 if block else torch.float32), name
            assert torch.equal(p.to(q.dtype), q), name
        # whatever happens inside
        raise KeyError
    assert all(isinstance(p, DTensor) for p in cut.parameters() if p.dim() >= 2)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_adapters_stay_whole_and_are_merged_as_in_one_process(base, batch, alone, low):
    """Log-probs, gradients, and the weights that sample, bit for bit."""
    policies = [frozen(weights.load(base), low) for _ in range(2)]
    for policy in policies:
        pairs = lora.fresh(lora.chosen(policy, ["q_proj", "down_proj", "qkv"]), 4, seed=0)
        random = torch.Generator().manual_seed(1)
        pairs = {name: (a, torch.randn(b.shape, generator=random) * 0.1) for name, (a, b) in pairs.items()}
        lora.attach(policy, pairs, 2.0)
    plain, cut = policies
    fsdp.shard(cut, RANKS, use_bfloat16=low)
    whole = {name for name, p in cut.named_parameters() if p.dim() > 1 and not isinstance(p, DTensor)}
    assert len(whole) == 2 * len(pairs) and all(".lora_" in name for name in whole)
    with torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=False):
        assert torch.equal(learn(plain, batch, 60), learn(cut, batch, 60))
        trained = [(p, q) for p, q in zip(plain.parameters(), cut.parameters()) if q.requires_grad]
        assert len(trained) == len(whole)
        assert all(torch.equal(p.grad, q.grad) and p.grad.any() for p, q in trained)
        with fsdp.whole_weights(plain) as one, fsdp.whole_weights(cut) as other:
            assert dict(one.named_parameters()).keys() == dict(other.named_parameters()).keys()
            for p, q in zip(one.parameters(), other.parameters()):
                assert torch.equal(p, q)


def test_an_empty_group_has_no_effect(base, batch):
    policy = weights.load(base)
    image = policy.config.image_token_id
    cut = Cut([1], slice(None))
    part = micro_batch(batch, image, cut)
    longer = micro_batch(batch, image, cut, append=empty_prompt(policy))
    assert longer.tokens.shape == (2, 2, 3) and longer.length.tolist() == [[3, 3], [0, 0]]
    assert longer.mask[2:].sum() == 0
    assert longer.weight[:2].equal(part.weight)
    assert longer.weight[2:].eq(0).all() and longer.advantage[2:].eq(0).all()
    assert len(longer.prompts.patches) == 8
    assert policy(longer.prompts, longer.tokens, longer.length)[1].eq(0).all()
    whole = torch.zeros(batch.mask.shape)
    batch.write_back(whole, torch.arange(12.0).view(4, 3), cut)
    assert whole[2:4, :3].flatten().tolist() == list(range(6)) and whole.sum() == 15
    # a rank that has nothing left runs one alone
    nothing = micro_batch(batch, image, Cut([], slice(None)), append=empty_prompt(policy))
    assert nothing.tokens.shape == (1, 2, 1) and nothing.mask.sum() == 0
    assert policy(nothing.prompts, nothing.tokens, nothing.length).shape[:3] == (1, 2, 1)


@pytest.mark.parametrize("count, size", [(18, 4), (5, 3), (2, 4), (0, 2), (3, 1)])
def test_shares_are_stretches(count, size):
    shares = [Ranks(rank, size, torch.device("cpu")).share(list(range(count))) for rank in range(size)]
    assert (
        functools.reduce(operator.iadd, shares, []) == list(range(count))
        and max(map(len, shares)) - min(map(len, shares)) <= 1
    )
    # rank 0 has something wherever there is anything
    assert bool(shares[0]) == bool(count)


def test_the_plan_knows_what_is_gathered_and_held(alone):
    """The plan of a rank against the tensors themselves; vectors, which the plan counts as if they were
    cut, are 1 % of the built-in policy."""
    policy = weights.load(BUILT_IN)
    cfg = parse.load("shapes", ["dtype=bfloat16", "device=cpu"])
    fsdp.shard(policy, RANKS, use_bfloat16=True)
    items = {item.name: item for item in plan.make_plan(cfg, policy.config, ranks=4).stages[0].rollout}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), fsdp.whole_weights(policy) as inside:
        there = {p.data_ptr(): p.nbytes for p in (*policy.parameters(), *inside.parameters())}
        assert items["gathered policy"].bytes == pytest.approx(sum(there.values()), rel=0.01)
    held = {
        ranks: {item.name: item.bytes for item in plan.make_plan(cfg, policy.config, ranks=ranks).held}
        for ranks in (1, 4)
    }
    assert all(held[4][name] == -(-size // 4) for name, size in held[1].items()) and held[1][
        "weights"
    ] == sum(p.numel() * 4 for p in policy.parameters())
    whole = parse.load("shapes", ["dtype=bfloat16", "shard=never"])
    assert plan.make_plan(whole, policy.config, ranks=4).held == plan.make_plan(whole, policy.config).held
