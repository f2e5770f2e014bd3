"""M-RoPE positions, token by token, against transformers and by hand."""

import pytest
import torch
from zoo import ARCHITECTURES, IMAGE, TWINS, prompt_tokens, tiny_config

from models.mrope import mrope_positions

GRIDS = [[], [(1, 2, 2)], [(1, 4, 12)], [(1, 12, 4), (1, 6, 6)], [(1, 6, 6), (1, 2, 8), (1, 20, 14)]]


@pytest.mark.parametrize("grids", GRIDS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_to_transformers(architecture, grids):
    twin = TWINS[architecture]
    config = twin.config_class.from_dict(tiny_config(architecture).to_dict())
    with torch.device("meta"):
        model = twin(config).model
    tokens, grid = (
        prompt_tokens(grids, 5, torch.Generator().manual_seed(0)),
        torch.tensor(grids, dtype=torch.long).view(-1, 3),
    )
    theirs, delta = model.get_rope_index(tokens[None], (tokens[None] == IMAGE).int(), image_grid_thw=grid)
    ours, following = mrope_positions(tokens, grid, IMAGE, 2)
    assert torch.equal(ours, theirs[:, 0])
    assert following == len(tokens) + int(delta)


def test_by_hand():
    """Two words, a picture of 2x3 merged tokens, one word: the picture takes three positions, its longer
    side."""
    positions, following = mrope_positions(
        torch.tensor([9, 9] + [IMAGE] * 6 + [9]), torch.tensor([[1, 4, 6]]), IMAGE, 2
    )
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert following == 6


def test_pictures_that_touch():
    positions, following = mrope_positions(
        torch.tensor([IMAGE] * 5), torch.tensor([[1, 2, 2], [1, 4, 4]]), IMAGE, 2
    )
    assert positions.tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 2, 2], [0, 1, 2, 1, 2]]
    assert following == 3


@pytest.mark.parametrize(
    "tokens, grids, why",
    [
        ([9, IMAGE, 9], [[1, 4, 4]], "holds 1 picture tokens, its pictures need 4"),
        ([9, IMAGE, IMAGE, IMAGE, IMAGE], [], "holds 4 picture tokens, its pictures need 0"),
        ([IMAGE, IMAGE, 9, IMAGE, IMAGE], [[1, 4, 4]], "split by text"),
    ],
)
def test_placeholders_that_do_not_fit_are_refused(tokens, grids, why):
    with pytest.raises(ValueError, match=why):
        mrope_positions(torch.tensor(tokens), torch.tensor(grids, dtype=torch.long).view(-1, 3), IMAGE, 2)
