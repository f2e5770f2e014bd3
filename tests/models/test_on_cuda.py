"""What the model would do on a GPU, checked without one: which attention kernels are allowed, what is rounded
to bfloat16, and what a backward pass holds."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ARCHITECTURES, completions_for, prompt_batch, tiny_policy

from models import layers
from models.packing import PromptGroups

PICTURES = [[(1, 4, 6)], [], [(1, 12, 20)]]


@pytest.fixture(scope="module")
def prompts():
    return prompt_batch(PICTURES)


@pytest.fixture
def fast():
    """Attention sums in the dtype of its operands, as on a GPU."""
    with layers.attention_sums(exact=False):
        yield


@pytest.fixture
def attention_calls(monkeypatch):
    """Of every call of PyTorch's attention: whether cuDNN was allowed."""
    calls, attention = [], F.scaled_dot_product_attention

    def spied(*arguments, **how):
        calls.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*arguments, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    return calls


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_attention_may_go_to_cudnn(architecture, recompute, prompts, attention_calls):
    """In the vision tower, in a rollout, in training, in what is recomputed. cuDNN plans every new shape."""
    policy = tiny_policy(architecture)
    policy.recompute = policy.visual.recompute = recompute
    with torch.inference_mode():
        policy.decode(prompts.last, policy.prefill(prompts, 1, 2))
    of_rollout = len(attention_calls)
    policy(prompts, *completions_for(prompts, group=3, longest=9)).sum().backward()
    assert len(attention_calls) >= 2 * of_rollout > 0 and not any(attention_calls)


def test_the_other_kernels_stay_allowed():
    allowed = torch.backends.cuda
    assert allowed.flash_sdp_enabled() and allowed.mem_efficient_sdp_enabled() and allowed.math_sdp_enabled()


# ---- rounding


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)], ids=str)
def test_logits_of_bfloat16_operands_are_rounded_once(shape):
    """Against float64 products of the same rounded operands. A result in bfloat16 would be off by 2^-9 of
    its size, a hundred times more than float32 sums are."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*shape, 64, generator=random), torch.randn(90, 64, generator=random)
    with torch.autocast("cpu", torch.bfloat16):
        found = layers.linear_in_float32(x, weight)
    wanted = x.bfloat16().double() @ weight.bfloat16().double().T
    assert found.dtype == torch.float32 and found.shape == (*shape, 90)
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=0)
    assert (wanted - wanted.bfloat16()).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_float32_nothing_changes(dtype):
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=random, dtype=dtype) for n in (5, 90))
    assert torch.equal(layers.linear_in_float32(x, weight), F.linear(x, weight))
    assert torch.equal(layers.product_in_float32(x, weight.T), x @ weight.T)


class Noted(TorchDispatchMode):
    """Notes each operator and the dtypes of what it returns."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        found = operator(*arguments, **(keywords or {}))
        if isinstance(found, torch.Tensor):
            self.calls.append((str(operator), found.dtype, tuple(found.shape)))
        return found


@pytest.mark.parametrize("shapes", [((7, 64), (64, 90)), ((6, 2, 16), (6, 16, 9))], ids=["mm", "bmm"])
def test_on_cuda_one_kernel_multiplies_and_widens(shapes):
    """On fake tensors: no float32 copy of the head, and no second kernel."""
    with FakeTensorMode(allow_non_fake_inputs=True), Noted() as noted:
        a, b = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
        noted.calls.clear()
        found = layers.product_in_float32(a, b)
    assert found.dtype == torch.float32 and found.device.type == "cuda"
    assert [name for name, _, _ in noted.calls] == [f"aten.{'mm' if a.dim() == 2 else 'bmm'}.dtype"]


@torch.no_grad()
def test_decoding_rounds_no_attention_score(prompts, fast):
    """Products of decoding's attention return float32: its scores, and the sum over values before it is
    rounded to bfloat16, as in the fused kernel of training."""
    policy = tiny_policy()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        cache = policy.prefill(prompts, 2, 4)
        with Noted() as noted:
            policy.decode(prompts.last.repeat_interleave(2), cache)
    dtypes = [dtype for name, dtype, _ in noted.calls if "bmm" in name]
    # two products of scores and two of values in each of three blocks
    assert dtypes == [torch.float32] * 12


@pytest.mark.parametrize("head", [32, 128])
@torch.no_grad()
def test_decoding_attends_as_training_does_in_bfloat16(head, fast):
    """Number for number, the fused kernel's roundings: a query is not scaled in bfloat16, and the largest
    weight is not rounded. Sums in another order flip the last bit of few numbers; either rounding flips that
    of most."""
    P, G, C, S, K, R = 3, 4, 7, 20, 2, 3
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: (2 * torch.randn(*shape, head, generator=random)).bfloat16()
    q, k, v = draw(P, G, C, K * R), draw(P, G, C, K), draw(P, G, C, K)
    prompt_k, prompt_v, length = draw(P, S, K), draw(P, S, K), torch.tensor([20, 5, 11])
    mask = layers.group_mask(length, S, C, R, torch.bfloat16)
    wanted = layers.group_attention(q, k, v, prompt_k, prompt_v, mask)[:, :, -1]  # (P, G, H, E)
    prompt = torch.arange(P).repeat_interleave(G)
    padding = torch.arange(S) >= length[prompt, None]
    bias = F.pad(torch.zeros(P * G, S).masked_fill(padding, torch.finfo(torch.bfloat16).min), (0, C))
    found = layers.decode_attention(
        q[:, :, -1].reshape(P * G, K, R, head),
        *(x.flatten(0, 1).transpose(1, 2) for x in (k, v)),
        *(x.transpose(1, 2).contiguous() for x in (prompt_k, prompt_v)),
        PromptGroups.of(prompt, P, K),
        bias[:, None, None].bfloat16(),
    )
    flipped = (found.reshape(wanted.shape) != wanted).float().mean()
    assert found.dtype == torch.bfloat16 and flipped < 0.02


# ---- the backward pass


def test_a_backward_pass_makes_one_gradient_of_the_embedding(prompts):
    policy = tiny_policy(tied=False)
    hidden = policy(prompts, *completions_for(prompts, group=3, longest=9))
    with Noted() as noted:
        hidden.sum().backward()
    table = tuple(policy.model.embed_tokens.weight.shape)
    assert [name for name, _, shape in noted.calls if "embedding" in name and shape == table] == [
        "aten.embedding_dense_backward.default"
    ]


def test_recomputing_keeps_no_state_of_random_numbers(prompts, monkeypatch):
    """On a GPU that state would be copied for each block, forward and backward."""
    policy = tiny_policy()
    policy.recompute = policy.visual.recompute = True
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("the state of random numbers was kept"))
    policy(prompts, *completions_for(prompts, group=2, longest=5)).sum().backward()
