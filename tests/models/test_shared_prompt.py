"""The prompt is computed once per group: value and gradient are those of the repeated form and of decoding,
and do not depend on the other rows of the batch.

Values in float32 within 1e-5 of each other (sums in different orders, values of size 1 to 10); gradients in
float64, where only exact mathematics passes 1e-10.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from zoo import ARCHITECTURES, completions_for, pictures_of, prompt_batch, repeated, tiny_policy

from models import decoder
from models.decoder import by_length
from models.qwen_vl import PromptBatch

PICTURES = [[(1, 4, 6), (1, 6, 6)], [], [(1, 12, 10)], [(1, 4, 6)]]
GROUP, LONGEST = 3, 9


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy(request):
    return tiny_policy(request.param)


@pytest.fixture(scope="module")
def rows():
    prompts = prompt_batch(PICTURES)
    return prompts, *completions_for(prompts, GROUP, LONGEST)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def inputs_of(prompts, completions):
    """What `decode` is fed to write these completions."""
    P, G, _ = completions.shape
    return torch.cat((prompts.last[:, None, None].expand(P, G, 1), completions[..., :-1]), -1)


def decode(policy, cache, inputs):
    """inputs (P, G, C) -> hidden (P, G, C, D)."""
    return torch.stack(
        [policy.decode(tokens.flatten(), cache).view(*tokens.shape, -1) for tokens in inputs.unbind(-1)], 2
    )


def gradients(policy, prompts, completions, length, weight):
    policy.zero_grad()
    (policy(prompts, completions, length) * weight).sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in policy.named_parameters()
        if parameter.grad is not None
    }


def in_double(prompts):
    return replace(prompts, patches=prompts.patches.double())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradient_equals_the_repeated_form(architecture, recompute, rows):
    policy, (prompts, completions, length) = tiny_policy(architecture).double(), rows
    prompts = in_double(prompts)
    weight = torch.randn(
        *completions.shape, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    policy.recompute = policy.visual.recompute = recompute
    shared = gradients(policy, prompts, completions, length, weight)
    policy.recompute = policy.visual.recompute = False
    rows = (x.flatten(0, 1)[:, None] for x in (completions, length, weight))
    alone = gradients(policy, repeated(prompts, GROUP), *rows)
    assert shared.keys() == alone.keys() and len(shared) == len(list(policy.parameters()))
    for name in shared:
        assert (shared[name] - alone[name]).norm() <= 1e-10 * alone[name].norm() > 0, name


@torch.no_grad()
def test_prefill_and_decode_equal_forward(policy, rows):
    prompts, completions, _ = rows
    forward = policy(prompts, completions)
    cache = policy.prefill(prompts, GROUP, LONGEST)
    for c, tokens in enumerate(inputs_of(prompts, completions).unbind(-1)):
        close(policy.decode(tokens.flatten(), cache), forward[:, :, c].flatten(0, 1))
    with pytest.raises(ValueError, match="full"):
        policy.decode(completions[..., 0].flatten(), cache)


@torch.no_grad()
def test_lengths_only_remove_padding(policy, rows):
    """With `length`, real tokens get what they get without, and the rest is zero."""
    prompts, completions, length = rows
    length = length.clone()
    # a row may be empty
    length[1, 2] = 0
    real = torch.arange(LONGEST) < length[..., None]
    ragged, full = policy(prompts, completions, length), policy(prompts, completions)
    close(ragged[real], full[real])
    assert not ragged[~real].any() and full[~real].abs().min() > 0


@torch.no_grad()
def test_padding_is_never_read(policy, rows):
    prompts, completions, length = rows
    random = torch.Generator().manual_seed(11)
    tokens, words = prompts.tokens.clone(), completions.clone()
    for p, n in enumerate(prompts.length):
        tokens[p, n:] = torch.randint(7, 90, tokens[p, n:].shape, generator=random)
    beyond = torch.arange(LONGEST) >= length[..., None]
    words[beyond] = torch.randint(7, 90, (int(beyond.sum()),), generator=random)
    other = replace(prompts, tokens=tokens)
    assert not torch.equal(tokens, prompts.tokens) and not torch.equal(words, completions)
    assert torch.equal(policy(other, words, length), policy(prompts, completions, length))


@torch.no_grad()
def test_linear_layers_see_real_tokens_only(policy, rows):
    """Operations of all matrix products outside attention, counted where they run: two per parameter and
    real token, the last block's fewer; nothing for padding."""
    prompts, completions, length = rows
    patches, inner = len(prompts.patches), policy.config.vision
    with FlopCounterMode(display=False) as counter:
        policy(prompts, completions, length)
    found = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in found.items() if "attention" not in str(op))
    asked, said = int((prompts.length - 1).sum()), int(length.sum())
    # there is padding
    assert said < length.numel() * LONGEST and asked < len(prompts.length) * (prompts.tokens.shape[1] - 1)
    shapes = {name: p.numel() for name, p in policy.named_parameters() if p.dim() > 1}
    tower = (
        sum(
            n
            for name, n in shapes.items()
            if name.startswith("visual.") and "merger" not in name and "pos_embed" not in name
        )
        * patches
    )
    merger = sum(n for name, n in shapes.items() if "merger" in name) * patches // inner.spatial_merge_size**2
    blocks = [
        sum(n for name, n in shapes.items() if name.startswith(f"model.layers.{number}."))
        for number in range(len(policy.model.layers))
    ]
    keys = sum(
        n
        for name, n in shapes.items()
        if name.startswith(f"model.layers.{len(blocks) - 1}.") and ("k_proj" in name or "v_proj" in name)
    )
    assert products == 2 * (
        tower + merger + sum(blocks[:-1]) * (asked + said) + blocks[-1] * said + keys * asked
    )


@pytest.mark.parametrize(
    "length", [[[5, 5], [5, 5]], [[2, 9, 5], [9, 9, 1]], [[0, 3, 0], [0, 0, 0]], [[9], [1]]]
)
def test_parts_of_like_length_hold_every_token_once(length):
    length = torch.tensor(length)
    whole, parts = by_length(length, 9)
    places = torch.arange(length.numel() * 9)
    flat = whole.pack(places.view(*length.shape, 9)) if whole.index is None else whole.index
    real = (torch.arange(9) < length[..., None]).flatten()
    assert sorted(flat.tolist()) == places[real].tolist() and sum(part.tokens for part in parts) == len(flat)
    assert sum(part.shape[1] for part in parts) == length.shape[1]
    row = flat.split([part.tokens for part in parts])
    for part, tokens in zip(parts, row):
        # a row's tokens lie side by side, in order
        padded = part.pad(tokens + 1)
        for line in padded.flatten(0, 1):
            real = line[line > 0]
            assert (
                torch.equal(line[: len(real)], real)
                and (len(real) < 2 or (real.diff() == 1).all())
                and len({(int(x) - 1) // 9 for x in real}) <= 1
            )
        longest = int((padded > 0).sum(-1).max())
        assert part.shape[2] == max(longest, 1) and (padded > 0).sum(-1).amax(0).min() >= 0.8 * longest


def test_parts_change_nothing(rows, monkeypatch):
    """Lengths far apart: attention in several parts gives what one part gives, in value and gradient."""
    policy, (prompts, completions, _) = tiny_policy().double(), rows
    prompts, length = in_double(prompts), torch.tensor([[9, 3, 1], [2, 2, 2], [1, 9, 4], [5, 8, 0]])
    weight = torch.randn(
        *completions.shape, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    assert len(by_length(length, LONGEST)[1]) == 3
    found = gradients(policy, prompts, completions, length, weight)
    monkeypatch.setattr(decoder, "MIN_LENGTH_RATIO", 0.0)
    assert len(by_length(length, LONGEST)[1]) == 1
    for name, gradient in gradients(policy, prompts, completions, length, weight).items():
        assert (found[name] - gradient).norm() <= 1e-12 * gradient.norm() > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_mask_serves_all_blocks(dtype, rows):
    """A mask is as large as the scores of one query head and its prompt; each block of each row would keep
    one of its own if attention made it from truth values."""
    policy, (prompts, completions, length) = tiny_policy(), rows
    P, _, C = completions.shape
    queries = policy.config.num_attention_heads // policy.config.num_key_value_heads * C
    masks, alive = set(), []

    def note(tensor):
        if tensor.dim() > 1 and tensor.shape[-2:] == (queries, prompts.tokens.shape[1] - 1 + C):
            masks.add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
            alive.append(tensor)
        return tensor

    with (
        torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16, cache_enabled=False),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        policy(prompts, completions, length)
    size = P * queries * (prompts.tokens.shape[1] - 1 + C) * 8
    assert len(policy.model.layers) > 1 and [nbytes for _, nbytes in masks] == [size]


@torch.no_grad()
def test_prompts_do_not_see_each_other(policy, rows):
    """Each prompt by itself, with its own pictures and no padding, gives what it gives beside the others;
    likewise in decoding."""
    prompts, completions, length = rows
    together = policy(prompts, completions, length)
    cache = policy.prefill(prompts, GROUP, LONGEST)
    decoded = decode(policy, cache, inputs_of(prompts, completions))
    for p, (patches, grid) in enumerate(pictures_of(prompts)):
        n = int(prompts.length[p])
        slots = prompts.image_slot[p, :n]
        first = int(slots[slots >= 0].min()) if len(grid) else 0
        alone = PromptBatch(
            prompts.tokens[p : p + 1, :n],
            prompts.length[p : p + 1],
            prompts.positions[p : p + 1, :, :n],
            prompts.next_position[p : p + 1],
            torch.where(slots >= 0, slots - first, -1)[None],
            patches,
            grid,
        )
        for g in range(GROUP):
            close(
                policy(alone, completions[p : p + 1, g : g + 1], length[p : p + 1, g : g + 1])[0, 0],
                together[p, g],
            )
        cache = policy.prefill(alone, GROUP, LONGEST)
        # no padding
        assert not cache.prompt_bias.any()
        mine = decode(policy, cache, inputs_of(alone, completions[p : p + 1]))
        close(mine[0], decoded[p])


@torch.no_grad()
def test_closing_slots_changes_nothing(policy, rows):
    """Slots are closed in the middle of decoding, twice; rows that stay move, a prompt without rows goes,
    and all go on as before."""
    prompts, completions, _ = rows
    inputs, forward = (
        inputs_of(prompts, completions).flatten(0, 1),
        policy(prompts, completions).flatten(0, 1),
    )
    cache = policy.prefill(prompts, GROUP, LONGEST)
    row = torch.arange(len(inputs))
    # who is running then
    plan = {2: [1, 3, 4, 5, 9, 11], 5: [3, 9]}
    for c in range(LONGEST):
        if c in plan:
            kept = cache.keep(torch.isin(row, torch.tensor(plan[c])), len(plan[c]))
            row = row[kept]
            assert (
                sorted(row.tolist()) == plan[c]
                and cache.capacity == LONGEST
                and len(cache.completion_k[0]) == len(row)
            )
            assert (
                len(cache.prompt_k[0])
                == len({r // GROUP for r in plan[c]})
                == cache.groups.count // policy.config.num_key_value_heads
            )
        close(policy.decode(inputs[row, c], cache), forward[row, c])
    assert c > 5


@torch.no_grad()
def test_a_slot_is_used_again(policy, rows):
    """Three slots write all twelve rows: one is given to the next row every few tokens, so that rows of
    any length and prompt stand beside each other."""
    prompts, completions, _ = rows
    inputs, forward = (
        inputs_of(prompts, completions).flatten(0, 1),
        policy(prompts, completions).flatten(0, 1),
    )
    cache = policy.prefill(prompts, GROUP, LONGEST, max_rows=3)
    row, waiting, done = torch.arange(3), 3, set()
    assert (
        len(cache.completion_k[0]) == 3
        and len(cache.prompt_k[0]) == len(prompts.tokens)
        and not any(x.any() for x in (*cache.completion_k, *cache.completion_v))
    )
    for turn in range(100):
        at = cache.filled.clone()
        close(policy.decode(inputs[row, at], cache), forward[row, at])
        full = cache.filled == LONGEST
        done |= set(row[full].tolist())
        # some are given up early
        change = full | (torch.arange(3) == turn % 5) & (waiting < 9)
        for slot in change.nonzero().flatten():
            row[slot] = min(waiting, len(inputs) - 1)
            cache.begin(slot[None], row[slot][None] // GROUP)
            waiting += 1
        if waiting > len(inputs) + 3:
            break
    assert {9, 10, 11} <= done and turn < 99


@torch.no_grad()
def test_placeholders_cannot_be_drawn(policy, rows):
    logits = policy.logits(policy(*rows))
    banned = list(policy.config.placeholder_ids)
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()
    assert not logits.softmax(-1)[..., banned].any()
    assert (logits.argmin(-1)[..., None] == torch.tensor(banned)).any(-1).all()


def test_recomputation_keeps_less_and_changes_nothing(policy, rows):
    """Same gradients bit for bit; the forward keeps fewer bytes for the backward pass."""
    sizes, grads = [], []
    for recompute in (False, True):
        policy.recompute = policy.visual.recompute = recompute
        kept = {}

        def note(tensor, kept=kept):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = policy(*rows)
        sizes.append(sum(kept.values()))
        policy.zero_grad()
        hidden.square().sum().backward()
        grads.append(
            [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]
        )
    policy.recompute = policy.visual.recompute = False
    assert sizes[1] < 0.6 * sizes[0]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@torch.no_grad()
def test_bfloat16_follows_float32(rows):
    """Half the digits, the same numbers: 2 to 3 significant digits through seven blocks."""
    policy = tiny_policy()
    exact = policy(*rows)
    rough = policy.bfloat16()(*rows)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()
