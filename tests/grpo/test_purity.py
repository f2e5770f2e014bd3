"""Mathematics is pure: no function writes its arguments or uses a random generator, and a second call returns
the same.

Pins a published bug: a log-prob function wrote zeros into its labels through a view. The normaliser, computed
from the labels afterwards, was wrong, and Adam hid it.
"""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from grpo import logprobs, names, objective, sampling, schedule, variants


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.arange(5) < torch.tensor([5, 2, 3, 1])[:, None]
LOGP, OLD, REF = (-draw(4, 5, seed=s).abs() for s in range(3))
ROWS, CLIP = draw(4, 1), (0.2, 0.3)
WEIGHT = MASK / MASK.sum()


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight.data = draw(7, 3)

    def forward(self, prompts, tokens, length):
        return prompts[:, None, None, :].expand(*tokens.shape, 3) + tokens[..., None]

    @property
    def head_weight(self):
        return self.head.weight

    def logits(self, hidden, head):
        return nn.functional.linear(hidden, head)


BATCH = SimpleNamespace(
    prompts=draw(2, 3),
    tokens=torch.arange(20).reshape(2, 2, 5) % 7,
    length=MASK.sum(1).reshape(2, 2),
    mask=MASK,
)

# every public function: arguments for a call
CASES = {
    (objective, "group_advantages"): [
        ((draw(3, 4),), dict(scale=s)) for s in variants.ADVANTAGE_SCALES.values()
    ],
    (objective, "group_std"): [((draw(3, 4), 1e-4), {})],
    (objective, "token_ratio"): [((LOGP, OLD), {})],
    (objective, "clipped_surrogate"): [((LOGP, OLD, ROWS, MASK, *CLIP), {})],
    **{(variants, name): [((LOGP, OLD, ROWS, MASK, *CLIP), {})] for name in ("gspo", "cispo", "reinforce")},
    (objective, "k3"): [((LOGP, REF, LOGP.exp()), {})],
    **{(variants, name): [((LOGP, REF, LOGP.exp()), {})] for name in ("k1", "k2", "k3_is")},
    **{(variants, name): [((draw(3, 4), 1e-4), {})] for name in ("undivided", "batch_std")},
    (objective, "completion_mean"): [((MASK.sum(1, keepdim=True), 11, 4, 5), {})],
    **{
        (variants, name): [((MASK.sum(1, keepdim=True), 11, 4, 5), {})] for name in ("token_mean", "constant")
    },
    (objective, "token_weights"): [
        ((MASK, how), dict(tokens=11, completions=4, cap=5)) for how in variants.WEIGHTINGS.values()
    ],
    (objective, "policy_loss"): [
        (
            (LOGP, old, ref, ROWS[:, 0], WEIGHT),
            dict(kl_coef=0.1 if ref is not None else 0.0, kl=kl, surrogate=s),
        )
        for old in (OLD, None)
        for ref in (REF, None)
        for kl in (variants.k1, variants.k3_is)
        for s in variants.SURROGATES.values()
    ],
    (objective, "gradient_weight"): [((LOGP, old, ROWS[:, 0], WEIGHT), {}) for old in (OLD, None)],
    (objective, "entropy_bonus"): [((LOGP.exp(), WEIGHT, coef), {}) for coef in (0.0, 0.1)],
    (names, "choose"): [(("thing", "a", {"a": 1}), {})],
    (sampling, "least_kept"): [((draw(3, 7), sampling.Truncation(2, 0.9)), {})],
    (sampling, "log_distribution"): [
        ((draw(3, 7), 0.7, truncation), {}) for truncation in (None, sampling.Truncation(2, 0.9))
    ],
    (sampling, "sample"): [((draw(3, 7), torch.tensor([0.1, 0.5, 0.9]), t), {}) for t in (0, 0.7, 1.0)],
    (sampling, "uniforms"): [((1, 2, [3, 4], 2, 5), {})],
    (sampling, "uid_hash"): [(("shapes/0",), {})],
    (sampling, "address_hash"): [((1, torch.arange(5)), {})],
    (sampling, "shift_right"): [((torch.arange(-3, 3), 7), {})],
    (logprobs, "chunk_of"): [((7, mib, "cpu"), {}) for mib in (None, 0.001)],
    (logprobs, "completion_logprobs"): [
        ((Policy(), BATCH), dict(temperature=0.7, chunk=chunk, truncation=truncation, entropy_grad=grad))
        for chunk in (2, 100)
        for truncation in (None, sampling.Truncation(2, 0.9))
        for grad in (False, True)
    ],
    (logprobs, "masked_logprobs"): [
        (
            (Policy(), draw(4, 5, 3), torch.arange(20).reshape(4, 5) % 7, MASK),
            dict(temperature=0.7, chunk=chunk),
        )
        for chunk in (2, 100)
    ],
    (schedule, "lr_at"): [((3,), dict(lr=1.0, warmup=2, decay="cosine", steps=9))],
    (schedule, "stage_at"): [((3, [SimpleNamespace(until=2), SimpleNamespace(until=5)], None), {})],
}


def tensors(x):
    """All tensors inside nested arguments or results."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, nn.Module):
        return list(x.state_dict().values())
    if isinstance(x, dict):
        return [t for v in x.values() for t in tensors(v)]
    if isinstance(x, (list, tuple)):
        return [t for v in x for t in tensors(v)]
    return tensors(vars(x)) if hasattr(x, "__dict__") else []


def same(a, b):
    a, b = tensors(a), tensors(b)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("module, name", CASES, ids=[f"{m.__name__}.{n}" for m, n in CASES])
def test_no_function_writes_its_arguments(module, name):
    function = getattr(module, name)
    for args, kwargs in CASES[module, name]:
        before = copy.deepcopy((args, kwargs))
        random, versions = torch.get_rng_state(), [t._version for t in tensors((args, kwargs))]
        first, second = function(*args, **kwargs), function(*args, **kwargs)
        assert same((args, kwargs), before), "an argument changed"
        assert [t._version for t in tensors((args, kwargs))] == versions, (
            "an argument was written to, even if with the same values"
        )
        assert same(first, second) and (tensors(first) or first == second), (
            "the second call returned something else"
        )
        assert torch.equal(torch.get_rng_state(), random), "the random generator moved"
        if name != "choose":
            storages = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            assert not any(t.untyped_storage().data_ptr() in storages for t in tensors(first)), (
                "a result is a view of an argument"
            )


def test_every_public_function_is_listed():
    """So a new function cannot be forgotten here."""
    for module in (objective, variants, names, sampling, logprobs, schedule):
        public = {
            n
            for n, f in vars(module).items()
            if inspect.isfunction(f) and f.__module__ == module.__name__ and not n.startswith("_")
        }
        assert public == {name for owner, name in CASES if owner is module}


def test_this_test_can_fail():
    def writes(x):
        return x.view(-1).zero_()

    x = draw(2, 2)
    version = x._version
    writes(x)
    assert x._version != version and not same(x, draw(2, 2))
