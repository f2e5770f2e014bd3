"""AdamW as the papers use it, and Muon for training small models from nothing.

Moments in float32, weight decay on matrices only, the norm of the whole gradient clipped. Muon (Jordan et al. 2024; PyTorch's own) turns the update of each matrix
into the nearest orthogonal one; on the built-in base it learned to localise several times sooner than AdamW (docs/results/base.md).
"""
import torch
from torch import Tensor, nn


class Optimizer:
    """One or two of PyTorch's optimizers behind one face. `set_lr` sets the learning rate of AdamW; Muon's is `muon_scale` times that."""

    def __init__(self, policy: nn.Module, *, name: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, muon_scale: float = 10.0):
        """Optimize the parameters that require gradients. name: adamw or muon (for the matrices; AdamW for embeddings, norms and biases)."""
        trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        embedding = ("embed_tokens.weight", "lm_head.weight")
        hidden = {n: p for n, p in trained.items() if name == "muon" and p.dim() == 2 and not n.endswith(embedding)}
        decayed, spared = ([p for n, p in trained.items() if n not in hidden and (p.dim() >= 2) == matrix] for matrix in (True, False))
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [(torch.optim.AdamW(
            [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}], lr=lr, betas=(beta1, beta2), eps=eps, fused=True), 1.0)]
        if hidden:
            self.parts.append((torch.optim.Muon(list(hidden.values()), lr=lr * muon_scale, momentum=0.95, weight_decay=weight_decay), muon_scale))

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

    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        owner = next(part for part, _ in self.parts if any(parameter is p for group in part.param_groups for p in group["params"]))
        owner.state[parameter] = {key: value if key == "step" else value.to(parameter.device) for key, value in state.items()}


def clip_gradient(policy: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradient down to `max_norm` where its 2-norm exceeds it. → the norm before, a scalar tensor (which may be non-finite: the caller decides)."""
    return nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
