"""M-RoPE positions (Qwen2-VL, arXiv 2409.12191, §2.1): text counts 0, 1, 2 …; a picture is a (time, height,
width) box that starts at the next free position and takes up as many as its longer side. Positions are data:
computed once per prompt, kept nowhere in the model.
"""

import torch
from torch import Tensor


def mrope_positions(tokens: Tensor, grid: Tensor, image_token: int, merge: int) -> tuple[Tensor, int]:
    """Positions of a prompt's tokens on the three axes, and the next free position.

    tokens: (S,) long, each picture's placeholder already repeated once per merged token.
    grid: (I, 3) long, frames, rows and columns of patches of each picture, in order of appearance.
    merge: patches per side of a merged token.
    → positions (3, S) long, and the next free one: the j-th token of a completion sits at `next + j` on all
    three axes. Raises ValueError if the placeholders are not where and as many as the grid says.
    """
    is_image = (tokens == image_token).tolist()
    pictures = [(t, h // merge, w // merge) for t, h, w in grid.tolist()]
    if sum(is_image) != sum(t * h * w for t, h, w in pictures):
        needed = sum(t * h * w for t, h, w in pictures)
        raise ValueError(
            f"the prompt holds {sum(is_image)} picture tokens, its pictures need {needed} (grid "
            f"{grid.tolist()})"
        )
    pieces, at, following, remaining = [], 0, 0, iter(pictures)
    while at < len(is_image):
        if is_image[at]:
            t, h, w = next(remaining)
            if not all(is_image[at : at + t * h * w]):
                raise ValueError(
                    f"the {t * h * w} tokens of the picture at token {at} are split by text (grid "
                    f"{grid.tolist()})"
                )
            box = torch.stack(
                torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
            ).flatten(1)
            count, used = t * h * w, max(h, w)
        else:
            count = is_image.index(True, at) - at if True in is_image[at:] else len(is_image) - at
            box, used = torch.arange(count).expand(3, count), count
        pieces.append(box + following)
        at, following = at + count, following + used
    positions = torch.cat(pieces, 1) if pieces else torch.zeros(3, 0, dtype=torch.long)
    return positions, following
