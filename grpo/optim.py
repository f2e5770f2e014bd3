"""AdamW as the papers use it, and Muon for training small models from nothing.

Moments are float32, weight decay is for matrices only, and the norm of the whole gradient is clipped. Muon
(Jordan et al. 2024; PyTorch's own) replaces the update of a matrix by the nearest orthogonal one. With it the
built-in base learned to localise several times sooner than with AdamW (docs/results/base.md).
"""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo.exactness import square_sum
from grpo.parallel.ranks import sum_gradients, sum_over_ranks
from grpo.timing import timed

# the learning rate of AdamW for the patch embedding when Muon trains the matrices, as a multiple of lr
PATCH_SCALE = 3.0
# Muon's learning rate as a multiple of lr
MUON_SCALE = 10.0


class NonFinite(RuntimeError):
    """A number that a step needs is not finite. The last checkpoint is unchanged."""

    def __init__(self, what: str, prompts, step: int):
        kept = "Nothing was updated; the last checkpoint is as it was. Prompts of this step: "
        super().__init__(f"step {step + 1}: {what}. {kept}{', '.join(p.uid for p in prompts)}")


class Optimizer:
    """PyTorch's optimizers behind one interface. lr: AdamW's learning rate; Muon's is MUON_SCALE times that.
    skipped: updates that were left out because their gradient was not finite."""

    def __init__(self, policy: nn.Module, *, name: str, lr: float, beta2: float, weight_decay: float):
        """Optimize the parameters that require gradients. name: "adamw", or "muon" for the matrices and AdamW
        for embeddings, norms and biases."""
        self.policy = policy
        self.lr = lr
        self.skipped = 0
        self.parts: list[tuple[torch.optim.Optimizer, float]] = []
        trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        muon = name == "muon"
        embedding = ("embed_tokens.weight", "lm_head.weight")
        hidden = [p for n, p in trained.items() if muon and p.dim() == 2 and not n.endswith(embedding)]
        # The patch embedding is a convolution, which Muon does not take. It needs its own rate: with lr,
        # colours and sizes are learned long after places.
        patches = [p for p in trained.values() if muon and p.dim() > 2]
        others = {*hidden, *patches}
        rest = [p for p in trained.values() if p not in others]
        for chosen, scale in ((rest, 1.0), (patches, PATCH_SCALE)):
            matrices = [p for p in chosen if p.dim() >= 2]
            kinds = [(matrices, weight_decay), ([p for p in chosen if p.dim() < 2], 0.0)]
            groups = [{"params": kind, "weight_decay": decay} for kind, decay in kinds if kind]
            if groups:
                adamw = torch.optim.AdamW(groups, lr=lr * scale, betas=(0.9, beta2), eps=1e-8, fused=True)
                self.parts.append((adamw, scale))
        if hidden:
            rates = {"lr": lr * MUON_SCALE, "weight_decay": weight_decay}
            self.parts.append((torch.optim.Muon(hidden, momentum=0.95, **rates), MUON_SCALE))

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next updates."""
        self.lr = lr
        for part, scale in self.parts:
            for group in part.param_groups:
                group["lr"] = lr * scale

    @timed("learn")
    def clip_and_step(self, max_norm: float) -> float:
        """Sum the gradients over the ranks, scale them down to `max_norm` (0: never), and step.

        -> the norm before clipping, the same on every rank. If it is not finite, nothing is updated, the
        gradients are dropped, and `skipped` grows by one.
        """
        sum_gradients(self.policy)
        norm = float(clip_gradient(self.policy, max_norm or math.inf))
        if math.isfinite(norm):
            self.step()
        else:
            self.policy.zero_grad(set_to_none=True)
            self.skipped += 1
        return norm

    def step(self) -> None:
        """Apply the gradients, then drop them."""
        for part, _ in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of one parameter: name -> tensor; empty before the first step."""
        return next((part.state[parameter] for part, _ in self.parts if parameter in part.state), {})

    def blank_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state that a parameter will have, all zero: same names, shapes, devices and sharding."""
        if isinstance(self.owner(parameter), torch.optim.Muon):
            return {"momentum_buffer": torch.zeros_like(parameter)}
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), device=parameter.device), **moments}

    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Use a `blank_state` that has been filled. The tensors are not copied."""
        self.owner(parameter).state[parameter] = state

    def owner(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        """The PyTorch optimizer that updates a parameter."""
        holds = lambda part: any(parameter is p for group in part.param_groups for p in group["params"])
        return next(part for part, _ in self.parts if holds(part))


def clip_gradient(policy: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradient down to `max_norm` if its 2-norm is larger. -> the norm before, a scalar tensor,
    which may be non-finite. Squares add up in float64, so it does not depend on the number of ranks."""
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    whole = [g for g in grads if not isinstance(g, DTensor)]
    sharded = [g.to_local() for g in grads if isinstance(g, DTensor)]
    zero = torch.zeros((), dtype=torch.float64, device=grads[0].device)
    squares = sum(map(square_sum, whole), zero)
    if sharded:
        squares = squares + sum_over_ranks(sum(map(square_sum, sharded), zero))
    norm = squares.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in (*whole, *sharded):
        g.mul_(scale.to(g.dtype))
    return norm
