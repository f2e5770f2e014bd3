"""Adapters: what they compute and learn, against the closed form; merged, switched off, and where they go.
PEFT is compared with in tests/grpo/storage/test_adapter.py."""

import pytest
import torch
from torch.func import functional_call
from zoo import ARCHITECTURES, completions_for, prompt_batch, tiny_policy

from models import lora

TARGETS = ["q_proj", "v_proj", "down_proj", "qkv", "proj"]
PICTURES = [[(1, 4, 6)], []]
SCALE = 2.0


def adapted_policy(architecture="qwen2_vl", zero=False):
    """A tiny policy with adapters of rank 4 in both towers; B is random unless `zero`."""
    policy = tiny_policy(architecture)
    pairs = lora.fresh(lora.chosen(policy, TARGETS), 4, seed=1)
    random = torch.Generator().manual_seed(2)
    if not zero:
        pairs = {name: (a, 0.1 * torch.randn(b.shape, generator=random)) for name, (a, b) in pairs.items()}
    lora.attach(policy, pairs, SCALE)
    return policy


@pytest.fixture(scope="module")
def rows():
    """(prompts, completions (P, G, C), length (P, G))"""
    prompts = prompt_batch(PICTURES)
    return prompts, *completions_for(prompts, group=2, longest=5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_without_b_or_switched_off_it_is_the_base_bit_for_bit(architecture, rows):
    base = tiny_policy(architecture)(*rows)
    assert torch.equal(adapted_policy(architecture, zero=True)(*rows), base)
    policy = adapted_policy(architecture)
    found = policy(*rows)
    assert (found - base).abs().max() > 0.1
    with pytest.raises(KeyError), lora.adapters_off(policy):
        assert torch.equal(policy(*rows), base)
        raise KeyError
    assert torch.equal(policy(*rows), found)


def test_gradients_are_those_of_the_closed_form(rows):
    """[Eq. 9]: the base run with W + scale · B A, differentiated in A and B, in float64."""
    prompts = rows[0].__class__(**{**vars(rows[0]), "patches": rows[0].patches.double()})
    base, policy = tiny_policy().double(), adapted_policy().double()
    policy.recompute = policy.visual.recompute = True
    weight = torch.randn(policy(prompts, *rows[1:]).shape, generator=torch.Generator().manual_seed(3))
    (policy(prompts, *rows[1:]) * weight).sum().backward()
    layers = lora.adapted(policy)
    assert len(layers) == 3 * 3 + 4 * 2
    pairs = {
        name: [part.weight.detach().clone().requires_grad_() for part in (layer.lora_A, layer.lora_B)]
        for name, layer in layers.items()
    }
    weights = {
        f"{name}.weight": base.get_submodule(name).weight.detach() + SCALE * b @ a
        for name, (a, b) in pairs.items()
    }
    (functional_call(base, weights, (prompts, *rows[1:])) * weight).sum().backward()
    for name, layer in layers.items():
        for ours, theirs in zip((layer.lora_A, layer.lora_B), pairs[name]):
            assert theirs.grad.norm() > 0
            assert (ours.weight.grad - theirs.grad).norm() <= 1e-11 * theirs.grad.norm(), name
    frozen = {name for name, p in policy.named_parameters() if ".lora_" not in name}
    assert all(policy.get_parameter(name).grad is None for name in frozen) and len(frozen) > 40


@torch.no_grad()
def test_merged_it_computes_the_same_bit_for_bit(rows):
    policy, names = adapted_policy(), dict(tiny_policy().named_parameters())
    expected, found = policy(*rows), dict(lora.merged_weights(policy))
    assert found.keys() == names.keys()
    lora.merge(policy)
    assert not lora.adapted(policy) and dict(policy.named_parameters()).keys() == names.keys()
    assert all(torch.equal(p, found[name]) for name, p in policy.named_parameters())
    # both multiply by the same sum
    assert torch.equal(policy(*rows), expected)
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, names[name])}
    assert changed == {f"{name}.weight" for name in lora.chosen(tiny_policy(), TARGETS)}


def test_where_adapters_go():
    policy = tiny_policy("qwen2_5_vl")
    both = lora.chosen(policy, ["gate_proj"])
    assert {name.partition(".")[0] for name in both} == {"visual", "model"} and len(both) == 7
    assert len(lora.chosen(policy, ["gate_proj"], frozen=["vision"])) == 3
    assert all(name.startswith("visual.blocks.") for name in lora.chosen(policy, ["proj", "qkv"]))
    with pytest.raises(
        ValueError, match="lora.targets: no layer 'qkv' beside freeze=\\['vision'\\]; there are"
    ):
        lora.chosen(policy, ["q_proj", "qkv"], frozen=["vision"])
    for wrong in ("lm_head", "embed_tokens", "0", "norm"):
        with pytest.raises(ValueError, match=f"no layer '{wrong}'; there are down_proj"):
            lora.chosen(policy, [wrong])


def test_fresh_adapters_are_pefts_and_a_function_of_the_seed():
    layers = lora.chosen(tiny_policy(), ["q_proj", "down_proj"])
    one, same, other = (lora.fresh(layers, 8, seed) for seed in (1, 1, 2))
    for name, (a, b) in one.items():
        bound = layers[name].in_features ** -0.5
        assert a.shape[0] == 8 and 0.9 * bound < a.abs().max() <= bound and not b.any()
        assert torch.equal(a, same[name][0]) and not torch.equal(a, other[name][0])
