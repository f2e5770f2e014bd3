"""The frozen reference: in the dtype of the products, on the host if asked, and the same numbers either
way."""

from types import SimpleNamespace

import pytest
import torch
from small import small_folder, small_policy, small_prompts

from grpo.batch import collate_prompts
from grpo.gradient import on_device
from grpo.logprobs import completion_logprobs
from grpo.run.setup import frozen


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    prompts = collate_prompts(small_prompts(small_folder(tmp_path_factory.mktemp("model"))), image_token=5)
    tokens = torch.randint(12, 120, (4, 3, 6), generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(
        prompts=prompts, tokens=tokens, length=torch.full((4, 3), 6), mask=torch.ones(12, 6, dtype=torch.bool)
    )


def scores(policy, batch):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        return completion_logprobs(policy, batch, temperature=1.0, chunk=16)[0]


@pytest.mark.parametrize("tied", [True, False])
def test_in_bfloat16_it_scores_as_the_policy_does(batch, tied):
    """Of weights that are bfloat16 on disk, as the hub's are: to the last bit, or the KL of an untouched
    policy would not be 0."""
    policy, reference = small_policy(tied=tied), small_policy(tied=tied)
    for parameter in (*policy.parameters(), *reference.parameters()):
        parameter.data = parameter.data.bfloat16().float()
    frozen(reference, use_bfloat16=True)
    assert {p.dtype for p in reference.parameters() if p.dim() > 1} == {torch.bfloat16} and not any(
        p.requires_grad for p in reference.parameters()
    )
    assert torch.equal(scores(reference, batch), scores(policy, batch))
    with torch.no_grad():
        reference.model.norm.weight.mul_(1.01)
    assert not torch.equal(scores(reference, batch), scores(policy, batch))


def test_in_float32_it_stays_as_it_is():
    assert {p.dtype for p in frozen(small_policy(), use_bfloat16=False).parameters()} == {torch.float32}


def test_it_is_copied_to_the_device_and_comes_back(monkeypatch):
    """There is no GPU in the tests: a copy plays the part of what lies there."""
    reference = frozen(small_policy(), use_bfloat16=True)
    home = {name: p.data_ptr() for name, p in reference.named_parameters()}
    with on_device(reference, torch.device("cpu")):
        # no copy where it is there already
        assert {name: p.data_ptr() for name, p in reference.named_parameters()} == home
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda tensor, device: (
            tensor.clone() if device == torch.device("cuda") else pytest.fail(f"sent to {device}")
        ),
    )
    with pytest.raises(RuntimeError, match="while it scores"), on_device(reference, torch.device("cuda")):
        assert not {p.data_ptr() for p in reference.parameters()} & set(home.values())
        raise RuntimeError("while it scores")
    assert {name: p.data_ptr() for name, p in reference.named_parameters()} == home
