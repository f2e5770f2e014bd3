"""AdamW as the papers use it, and Muon for training small models from nothing.

Moments in float32, weight decay on matrices only, the norm of the whole gradient clipped. Muon (Jordan et al.
2024; PyTorch's own) turns the update of each matrix into the nearest orthogonal one; on the built-in base it
learned to localise several times sooner than AdamW (docs/results/base.md).
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo.parallel.ranks import sum_over_ranks

# beside Muon, AdamW's learning rate for the patch embedding, as a multiple of lr
PATCH_SCALE = 3.0
# Muon's learning rate as a multiple of lr
MUON_SCALE = 10.0


class Optimizer:
    """One or two of PyTorch's optimizers behind one face. `set_lr` sets the learning rate of AdamW; Muon's
    is MUON_SCALE times that."""

    def __init__(self, policy: nn.Module, *, name: str, lr: float, beta2: float, weight_decay: float):
        """Optimize the parameters that require gradients. name: adamw or muon (for the matrices; AdamW for
        embeddings, norms and biases)."""
        trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        embedding = ("embed_tokens.weight", "lm_head.weight")
        hidden = {
            n: p for n, p in trained.items() if name == "muon" and p.dim() == 2 and not n.endswith(embedding)
        }
        rest = {n: p for n, p in trained.items() if n not in hidden}
        # The patch embedding is a convolution, which Muon does not take; it needs a rate of its own, or
        # colours and sizes are learned long after places.
        patches = {n: p for n, p in rest.items() if name == "muon" and p.dim() > 2}
        self.parts: list[tuple[torch.optim.Optimizer, float]] = []
        for chosen, scale in ((rest.keys() - patches.keys(), 1.0), (patches.keys(), PATCH_SCALE)):
            groups = [
                {
                    "params": [p for n, p in rest.items() if n in chosen and (p.dim() >= 2) == matrix],
                    "weight_decay": weight_decay * matrix,
                }
                for matrix in (True, False)
            ]
            if chosen:
                self.parts.append(
                    (
                        torch.optim.AdamW(
                            [g for g in groups if g["params"]],
                            lr=lr * scale,
                            betas=(0.9, beta2),
                            eps=1e-8,
                            fused=True,
                        ),
                        scale,
                    )
                )
        if hidden:
            self.parts.append(
                (
                    torch.optim.Muon(
                        list(hidden.values()), lr=lr * MUON_SCALE, momentum=0.95, weight_decay=weight_decay
                    ),
                    MUON_SCALE,
                )
            )

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of this step."""
        for part, scale in self.parts:
            for group in part.param_groups:
                group["lr"] = lr * scale

    def step(self) -> None:
        """Apply the gradients, and forget them."""
        for part, _ in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is remembered of one parameter: name → tensor; empty before the first step."""
        return next((part.state[parameter] for part, _ in self.parts if parameter in part.state), {})

    def blank_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What will be remembered of a parameter, all zero: like `state` in names, shapes, devices and
        sharding."""
        if isinstance(self.owner(parameter), torch.optim.Muon):
            return {"momentum_buffer": torch.zeros_like(parameter)}
        return {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Remember a `blank_state` that has been filled. The tensors are taken as they are, not copied."""
        self.owner(parameter).state[parameter] = state

    def owner(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        """The one of PyTorch's optimizers that updates a parameter."""
        return next(
            part
            for part, _ in self.parts
            if any(parameter is p for group in part.param_groups for p in group["params"])
        )


def clip_gradient(policy: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradient down to `max_norm` where its 2-norm exceeds it. → the norm before, a scalar tensor
    (which may be non-finite: the caller decides).

    The squares are added up in float64, so the norm of the whole does not depend on how many ranks hold it.
    """
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    cut, here = ([g for g in grads if isinstance(g, DTensor) == sharded] for sharded in (True, False))
    squares = sum((_square(g) for g in here), torch.zeros((), dtype=torch.float64, device=grads[0].device))
    if cut:
        cut = [g.to_local() for g in cut]
        squares = squares + sum_over_ranks(sum(_square(g) for g in cut))
    norm = squares.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in (*here, *cut):
        g.mul_(scale.to(g.dtype))
    return norm


def _square(g: Tensor) -> Tensor:
    return torch.linalg.vector_norm(g, dtype=torch.float64) ** 2
