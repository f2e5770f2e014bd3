"""M-RoPE positions (Qwen2-VL, arXiv 2409.12191, §2.1), once per prompt. Text counts 0, 1, 2 … A picture is a
(time, height, width) box that starts at the next free position and takes as many as its longer side."""

import torch
from torch import Tensor


def mrope_positions(tokens: Tensor, grid: Tensor, image_token: int, merge: int) -> tuple[Tensor, int]:
    """Positions of a prompt's tokens on the three axes, and the next free position.

    tokens (S,) long: each picture's placeholder is already repeated once per merged token. grid (I, 3) long:
    frames, rows and columns of patches of each picture, in order. merge: patches per side of a merged token.
    -> positions (3, S) long, and the next free one: completion token j has position `next + j` on all three
    axes. Raises ValueError if the placeholders do not match the grid.
    """
    is_image = (tokens == image_token).tolist()
    pictures = [(t, h // merge, w // merge) for t, h, w in grid.tolist()]
    needed = sum(t * h * w for t, h, w in pictures)
    given = f"(grid {grid.tolist()})"
    if sum(is_image) != needed:
        count = sum(is_image)
        raise ValueError(f"the prompt holds {count} picture tokens, its pictures need {needed} {given}")
    pieces = [torch.zeros(3, 0, dtype=torch.long)]
    remaining = iter(pictures)
    at = following = 0
    while at < len(is_image):
        if is_image[at]:
            t, h, w = next(remaining)
            count, used = t * h * w, max(h, w)
            if not all(is_image[at : at + count]):
                raise ValueError(f"the {count} tokens of the picture at token {at} are split by text {given}")
            axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
            box = torch.stack(axes).flatten(1)
        else:
            count = used = (is_image.index(True, at) if True in is_image[at:] else len(is_image)) - at
            box = torch.arange(count).expand(3, count)
        pieces.append(box + following)
        at += count
        following += used
    return torch.cat(pieces, 1), following
