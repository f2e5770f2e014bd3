"""--plan of a run with adapters, against the tensors themselves; and the two recipes on the cards that they
are for."""

import pytest
import torch
from test_plan import GATED, TINY, at_the_head, collate_prompts, in_a_block, named, prompts

from grpo.config import parse
from grpo.optim import Optimizer
from grpo.parallel import fsdp
from grpo.plan import known_models, plan
from grpo.run.setup import frozen
from models import lora, weights

GIB = 2**30
SMALL = ["lora.rank=4", "loss.kl_coef=0.01"]


def adapted(model, cfg, low=False):
    policy = frozen(weights.init(model, 0), low)
    layers = lora.chosen(policy, cfg.lora.targets, cfg.freeze)
    lora.attach(policy, lora.fresh(layers, cfg.lora.rank, 0), 1.0)
    return policy


@pytest.mark.parametrize("model", [TINY, GATED], ids=["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_weights_adapters_and_merged_ones_are_what_is_planned(model, low):
    name = "adamw_8bit" if low else "adamw"
    cfg = parse.load("shapes", [*SMALL, f"dtype={'bfloat16' if low else 'float32'}", f"optim.name={name}"])
    policy = adapted(model, cfg, low)
    planned = plan.make_plan(cfg, model)
    held, sampling = named(planned.held), named(planned.stages[0].rollout)
    base = sum(p.nbytes for p in policy.parameters() if not p.requires_grad)
    # vectors stay in float32
    assert held["frozen weights"] == pytest.approx(base, rel=0.02 if low else 1e-9)
    for p in policy.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    trained = [p for p in policy.parameters() if p.requires_grad]
    gradients = named(in_a_block(planned))["gradients of adapters"]
    assert gradients == sum(p.grad.nbytes for p in trained)
    optimizer = Optimizer(policy, name=name, lr=1e-3, beta2=0.99, weight_decay=0.0)
    optimizer.step()
    moments = sum(x.nbytes for p in trained for name, x in optimizer.state(p).items() if name != "step")
    assert held["adapters"] == moments + gradients and held["reference"] == 0
    own = {p.data_ptr() for p in policy.parameters()}
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=False)
    with autocast, fsdp.whole_weights(policy) as sampler:
        new = {p.data_ptr(): p.nbytes for p in sampler.parameters() if p.data_ptr() not in own}
    assert sampling["merged weights"] == sum(new.values())


def test_activations_are_those_of_a_frozen_tower():
    """The default targets are layers of the decoder, so that Qwen2-VL's tower keeps nothing."""
    cfg = parse.load("shapes", [*SMALL, "max_prompt=40", "cap=64", "prompts=2", "group=8", "max_pixels=7056"])
    policy = adapted(TINY, cfg)
    kept, alive = {}, []
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            # else its address is used again
            alive.append(tensor)
        return tensor

    batch = collate_prompts(prompts(TINY, 2, 40, 6), image_token=TINY.image_token_id)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy(batch, torch.full((2, 8, 64), 11), torch.full((2, 8), 64))
    planned = named(at_the_head(plan.make_plan(cfg, TINY)))
    # a bound: the first block's norm, whose input has no gradient, keeps nothing either
    assert 0.85 * planned["activations (estimate)"] < sum(kept.values()) <= planned["activations (estimate)"]


@pytest.mark.parametrize(
    "recipe, most", [("visualthinker_sat_lora", 13), ("vision_r1_rl_lora", 60)], ids=["2B", "7B"]
)
def test_the_recipes_fit_their_cards(recipe, most):
    cfg = parse.load(recipe)
    model = known_models.KNOWN[cfg.model]
    one = plan.make_plan(cfg, model)
    full = plan.make_plan(parse.load(recipe, ["lora.rank=0"]), model)
    assert one.peak < most * GIB and one.peak < 0.5 * full.peak
    assert one.stages[0].flops < full.stages[0].flops


def test_ranks_shard_the_base_and_hold_adapters_whole():
    cfg = parse.load("vision_r1_rl_lora")
    model = known_models.KNOWN[cfg.model]
    one, four = (named(plan.make_plan(cfg, model, ranks=ranks).held) for ranks in (1, 4))
    assert four["frozen weights"] == -(-one["frozen weights"] // 4) and four["adapters"] == one["adapters"]
    rollout = named(plan.make_plan(cfg, model, ranks=4).stages[0].rollout)
    assert rollout["gathered policy"] == one["frozen weights"] and rollout["merged weights"] > 0
