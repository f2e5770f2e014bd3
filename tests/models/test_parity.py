"""Equal to transformers' own Qwen2-VL, Qwen2.5-VL and Qwen3-VL (eager, float32): vision tower, logits,
gradients, greedy decoding.

Tolerances: two float32 programs that sum in different orders. The tiny policies have logits and features of
size 1 to 10, where 1e-5 is a few dozen roundings; a wrong mask, position or scale is off by 1e-2 and more.
"""

import pytest
import torch
from zoo import ARCHITECTURES, completions_for, prompt_batch, tiny_policy, twin_inputs, twin_of

# Two pictures, none, one larger than a window with ragged windows at its edges, one smaller than a window.
PICTURES = [[(1, 4, 6), (1, 6, 6)], [], [(1, 12, 20)], [(1, 4, 6)]]
CASES = [(architecture, tied) for architecture in ARCHITECTURES for tied in (True, False)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}")
def pair(request, tmp_path_factory):
    """(our policy, its twin in transformers)."""
    policy = tiny_policy(*request.param)
    return policy, twin_of(policy, tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def rows():
    """(prompts, completions (P, G, C), length (P, G))"""
    prompts = prompt_batch(PICTURES)
    return prompts, *completions_for(prompts, group=3, longest=9)


def test_the_twin_is_the_untied_one_only_where_asked(pair):
    policy, twin = pair
    assert (
        twin.lm_head.weight.data_ptr() == twin.model.language_model.embed_tokens.weight.data_ptr()
    ) == policy.config.tie_word_embeddings


MIXED = [(1, 12, 20), (1, 4, 6), (1, 12, 20), (1, 34, 10)]


@pytest.mark.parametrize(
    "grids", [[(1, 2, 2)], [(1, 6, 6)] * 3, MIXED, [(1, 16, 16)], [(2, 8, 12), (1, 8, 12)]], ids=str
)
@torch.no_grad()
def test_vision_tower(pair, grids):
    policy, twin = pair
    grid = torch.tensor(grids)
    patches = torch.randn(int(grid.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(1))
    found = twin.model.visual(patches, grid_thw=grid)
    theirs = torch.stack((found.pooler_output, *getattr(found, "deepstack_features", ())))
    ours = policy.visual(patches, grid)
    assert theirs[0].abs().max() > 1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_of_every_completion_token(pair, rows):
    policy, twin = pair
    prompts, completions, length = rows
    ours = policy.logits(policy(prompts, completions, length))
    real = [token for token in range(policy.config.vocab_size) if token not in policy.config.placeholder_ids]
    for p in range(len(completions)):
        for g in range(completions.shape[1]):
            n = int(length[p, g])
            theirs = twin(**twin_inputs(prompts, p, completions[p, g, :n])).logits[
                0, prompts.length[p] - 1 : -1
            ]
            torch.testing.assert_close(ours[p, g, :n, real], theirs[:, real], atol=1e-5, rtol=1e-5)
            assert theirs.std() > 0.5


def test_gradient_of_every_parameter(pair, rows):
    """Shared prompts, ragged groups, one backward pass, against transformers on each row by itself, prompt
    and pictures repeated."""
    policy, twin = pair
    prompts, completions, length = rows
    weight = torch.randn(completions.shape, generator=torch.Generator().manual_seed(5))
    weight[torch.arange(completions.shape[2]) >= length[..., None]] = 0

    def score(logits, tokens, weight):
        logits = logits.index_fill(-1, torch.tensor(policy.config.placeholder_ids), -1e9)
        return (logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] * weight).sum()

    policy.zero_grad()
    score(policy.logits(policy(prompts, completions, length)), completions, weight).backward()
    twin.zero_grad()
    for p in range(len(completions)):
        for g in range(completions.shape[1]):
            n = int(length[p, g])
            logits = twin(**twin_inputs(prompts, p, completions[p, g, :n])).logits[
                0, prompts.length[p] - 1 : -1
            ]
            score(logits, completions[p, g, :n], weight[p, g, :n]).backward()
    theirs = {hub(name): parameter.grad for name, parameter in twin.named_parameters()}
    ours = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        # float32 on both sides, summed in another order: 1e-6 to 3e-6. test_shared_prompt.py compares with
        # the repeated form in float64.
        error, size = (gradient - theirs[name]).norm(), theirs[name].norm()
        assert size > 0, name
        assert error <= 5e-6 * size, f"{name}: {error / size:.1e}"


@torch.no_grad()
def test_greedy_decoding(pair, rows):
    """Token for token what transformers generates, prompts of different lengths decoded together."""
    policy, twin = pair
    prompts, steps = rows[0], 12
    cache, tokens, drawn = policy.prefill(prompts, 2, steps), prompts.last.repeat_interleave(2), []
    for _ in range(steps):
        tokens = policy.logits(policy.decode(tokens, cache)).argmax(-1)
        drawn.append(tokens)
    drawn = torch.stack(drawn, -1).view(-1, 2, steps)  # (P, G, steps)
    assert torch.equal(drawn[:, 0], drawn[:, 1])
    twin.generation_config.eos_token_id = None
    for p in range(len(prompts.tokens)):
        inputs = twin_inputs(prompts, p, torch.zeros(0, dtype=torch.long))
        banned = list(policy.config.placeholder_ids)
        theirs = twin.generate(
            **inputs, max_new_tokens=steps, do_sample=False, suppress_tokens=banned, pad_token_id=0
        )
        assert torch.equal(drawn[p, 0], theirs[0, prompts.length[p] :])


def hub(name):
    """transformers' name of a parameter in memory -> the hub's."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
