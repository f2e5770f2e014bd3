"""Tiny random policies of each architecture, their twins in transformers, and prompts with pictures of
several sizes."""

import torch
import transformers

from models import weights
from models.config import ModelConfig, VisionConfig
from models.mrope import mrope_positions
from models.qwen_vl import PromptBatch

ARCHITECTURES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGE, VOCABULARY = 3, 90
TWINS = {
    "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
}


def tiny_config(architecture="qwen2_vl", tied=True) -> ModelConfig:
    """D = 64, H = 4, K = 2, E = 16, three blocks; a vision tower of four, windows of 4x4 merged tokens in
    Qwen2.5-VL. Qwen3-VL: E = 24, 6x6 learned positions, DeepStack after two of the tower's blocks.

    rope_theta and rms_norm_eps are not the defaults, so that losing them between two files shows; nor are
    Qwen3-VL's patches, which are as large as the others'.
    """
    vision = dict(depth=4, width=32, num_heads=2, hidden_size=64)
    decoder = dict(mrope_section=(2, 3, 3))
    if architecture == "qwen2_vl":
        vision |= dict(intermediate_size=64)
    elif architecture == "qwen2_5_vl":
        vision |= dict(intermediate_size=52, gated=True, window_size=112, fullatt_block_indexes=(1, 3))
    else:
        vision |= dict(intermediate_size=52, num_position_embeddings=36, deepstack_visual_indexes=(1, 2))
        decoder = dict(mrope_section=(6, 3, 3), head_dim=24)
    return ModelConfig(
        architecture,
        VOCABULARY,
        64,
        96,
        3,
        4,
        2,
        VisionConfig(**vision),
        **decoder,
        rope_theta=5000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        image_token_id=IMAGE,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )


def tiny_policy(architecture="qwen2_vl", tied=True, seed=0):
    """A random policy in which every parameter matters: norms and biases are drawn too, matrices so large
    that attention is uneven."""
    policy = weights.init(tiny_config(architecture, tied), seed)
    random = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=random) * (0.1 if parameter.dim() > 1 else 0.3)
            )
    return policy


def twin_of(policy, folder):
    """The same weights in transformers (eager attention, float32), through a folder that we save and it
    loads."""
    weights.save(policy, folder)
    twin, info = TWINS[policy.config.architecture].from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return twin.eval()


def prompt_tokens(grids, text, random) -> torch.Tensor:
    """A few words, then each picture between its marks with words after it."""
    words = lambda n: torch.randint(7, VOCABULARY, (n,), generator=random)
    pieces = [words(text)]
    for t, h, w in grids:
        pieces += [torch.tensor([5]), torch.full((t * h * w // 4,), IMAGE), torch.tensor([6]), words(3)]
    return torch.cat(pieces)


def prompt_batch(pictures, text=4, seed=0) -> PromptBatch:
    """pictures: per prompt, the grids of its pictures. The p-th prompt begins with `text + p` words, so
    lengths differ."""
    random = torch.Generator().manual_seed(seed)
    tokens = [prompt_tokens(grids, text + p, random) for p, grids in enumerate(pictures)]
    count, longest = len(tokens), max(map(len, tokens))
    grid = torch.tensor([g for grids in pictures for g in grids], dtype=torch.long).view(-1, 3)
    batch = PromptBatch(
        tokens=torch.randint(7, VOCABULARY, (count, longest), generator=random),
        length=torch.tensor([len(t) for t in tokens]),
        positions=torch.zeros(count, 3, longest, dtype=torch.long),
        next_position=torch.zeros(count, dtype=torch.long),
        image_slot=torch.full((count, longest), -1),
        patches=torch.randn(int(grid.prod(1).sum()), 1176, generator=random),
        grid=grid,
    )
    features = 0
    for p, (ids, grids) in enumerate(zip(tokens, pictures)):
        batch.tokens[p, : len(ids)] = (
            # behind it stay random words: padding must not matter, whatever it holds
            ids
        )
        own = torch.tensor(grids, dtype=torch.long).view(-1, 3)
        batch.positions[p, :, : len(ids)], batch.next_position[p] = mrope_positions(ids, own, IMAGE, 2)
        where = (ids == IMAGE).nonzero()[:, 0]
        batch.image_slot[p, where] = features + torch.arange(len(where))
        features += len(where)
    return batch


def completions_for(prompts, group, longest, seed=0):
    """(P, G, C) random words and ragged lengths (P, G), one row of the full length."""
    random = torch.Generator().manual_seed(seed + 7)
    shape = (len(prompts.tokens), group)
    length = torch.randint(1, longest + 1, shape, generator=random)
    length[0, 0] = longest
    return torch.randint(7, VOCABULARY, (*shape, longest), generator=random), length


def repeated(prompts, group):
    """Each prompt with its pictures `group` times: what a trainer without shared prompts computes."""
    per_prompt = pictures_of(prompts)
    slots = prompts.image_slot.repeat_interleave(group, 0)
    start = 0
    for row in range(len(slots)):
        where = slots[row] >= 0
        slots[row, where] = start + torch.arange(int(where.sum()))
        start += int(where.sum())
    again = lambda x: x.repeat_interleave(group, 0)
    return PromptBatch(
        tokens=again(prompts.tokens),
        length=again(prompts.length),
        positions=again(prompts.positions),
        next_position=again(prompts.next_position),
        image_slot=slots,
        patches=torch.cat([patches for patches, _ in per_prompt for _ in range(group)]),
        grid=torch.cat([grid for _, grid in per_prompt for _ in range(group)]),
    )


def pictures_of(prompts):
    """Each prompt's patches and grid."""
    areas, out, picture, patch = prompts.grid.prod(1).tolist(), [], 0, 0
    for p in range(len(prompts.tokens)):
        wanted, first, begin = 4 * int((prompts.image_slot[p] >= 0).sum()), picture, patch
        while patch - begin < wanted:
            patch, picture = patch + areas[picture], picture + 1
        out.append((prompts.patches[begin:patch], prompts.grid[first:picture]))
    return out


def twin_inputs(prompts, p, completion):
    """Keyword arguments of the twin's forward for prompt p followed by a completion (C,)."""
    ids = torch.cat((prompts.tokens[p, : prompts.length[p]], completion))[None]
    patches, grid = pictures_of(prompts)[p]
    pictures = dict(pixel_values=patches, image_grid_thw=grid) if len(grid) else {}
    return dict(input_ids=ids, mm_token_type_ids=(ids == IMAGE).int(), **pictures)
