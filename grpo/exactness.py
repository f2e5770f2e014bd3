"""Why a run on 1, 2 and 4 ranks is the same to the last bit, and the functions that make it so.

This holds in float32 on a CPU with `exact=true`; with false, none of it is done. On a GPU and in bfloat16,
runs on different numbers of ranks differ by roundings (docs/ranks.md). A floating-point sum depends on its
order, so every order is fixed:

    tokens     Attention sums in float64 and rounds once (`to_attention_dtype`). Log-probs go through blocks
               of a fixed size (grpo/logprobs.py). So a token's log-prob does not depend on its batch.
    sections   A step's rows are cut into `loss.sections` sections (grpo/parallel/rows.py), and no micro-batch
               holds rows of two. So a section's gradient does not depend on the rank that has it.
    sums       Gradients add up in float64 and are rounded once (`sum_in_float64`). So do the squares of the
               gradient's norm (`square_sum`).
    decisions  Which groups are kept, the weights of the loss and the clipping follow from the rewards of all
               groups and from sums over the ranks, which all ranks have.

`tests/faults/ranks.py` compares tokens, samples and weights of such runs.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.layers import to_attention_dtype


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which the gradients of micro-batches add up: float64 for float32 on a CPU."""
    return to_attention_dtype(torch.empty(0, device=device)).dtype


def sum_in_float64(policy: nn.Module) -> None:
    """Set gradients to zeros in float64, to which the backward passes add. `sum_gradients` (ranks.py) rounds
    them. A sharded matrix keeps its own: FSDP2 adds it up in its reduce dtype."""
    for parameter in policy.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.grad_dtype = None
            parameter.grad = torch.zeros_like(parameter, dtype=torch.float64)


def square_sum(g: Tensor) -> Tensor:
    """The sum of the squares, in float64: it does not depend on how many ranks hold parts of the gradient."""
    return torch.linalg.vector_norm(g, dtype=torch.float64) ** 2
