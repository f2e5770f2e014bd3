"""AdamW as the papers use it, AdamW with small states, and Muon for training small models from nothing.

Moments are float32, weight decay is for matrices only, and the norm of the whole gradient is clipped. With
`adamw_8bit` the moments of matrices have one byte a number; with `adamw_bf16` the matrices are bfloat16 too,
and are rounded up or down at random (docs/optimizers.md). Muon (Jordan et al. 2024) replaces the update of a
matrix by the nearest orthogonal one. With it the built-in base learned to localise several times sooner than
with AdamW (docs/results/base.md).
"""

import math
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo.exactness import square_sum
from grpo.parallel.ranks import sum_gradients, sum_over_ranks
from grpo.sampling import address_hash, shift_right, uid_hash
from grpo.timing import timed

# the learning rate of AdamW for the patch embedding when Muon trains the matrices, as a multiple of lr
PATCH_SCALE = 3.0
# Muon's learning rate as a multiple of lr
MUON_SCALE = 10.0
BETA1, EPS = 0.9, 1e-8
# numbers that share a scale, at most
BLOCK = 256
# numbers of a matrix that are updated at a time: ten float32 tensors of this size exist
AT_ONCE = 1 << 23


class NonFinite(RuntimeError):
    """A number that a step needs is not finite. The last checkpoint is unchanged."""

    def __init__(self, what: str, prompts, step: int):
        kept = "Nothing was updated; the last checkpoint is as it was. Prompts of this step: "
        super().__init__(f"step {step + 1}: {what}. {kept}{', '.join(p.uid for p in prompts)}")


def dynamic_values(signed: bool) -> Tensor:
    """The 256 numbers that a byte stands for, ascending, in [-1, 1] or [0, 1]: 0, 1, and seven decades, each
    with twice as many numbers as the one below. (Dynamic quantization: Dettmers 2015, arXiv 1511.04561.)"""
    values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade * (1 if signed else 2) + 1, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values.float()


class Bytes:
    """Numbers as bytes: each the nearest of `dynamic_values`, times the largest of its block. A block is a
    part of a row of at most BLOCK numbers, so sharding by rows cuts no block."""

    def __init__(self, signed: bool):
        self.values = dynamic_values(signed)
        self.edges = (self.values[1:] + self.values[:-1]) / 2
        if not signed:
            # only 0 becomes 0: a divisor that vanished would make a step far too large
            self.edges[0] = 0

    def write(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (rows, n) float32 -> bytes (rows, n) uint8, scales (rows, blocks) float32."""
        n, blocks = x.shape[1], block_count(x.shape)
        x = F.pad(x, (0, -n % blocks)).unflatten(1, (blocks, -1))
        scale = x.abs().amax(-1)
        x = x / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        place = torch.bucketize(x, self.edges.to(x.device), out_int32=True)
        return place.to(torch.uint8).flatten(1)[:, :n], scale

    def read(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The inverse, up to rounding."""
        n, blocks = codes.shape[1], scale.shape[1]
        x = self.values.to(scale.device)[codes.int()]
        x = F.pad(x, (0, -n % blocks)).unflatten(1, (blocks, -1))
        return (x * scale[..., None]).flatten(1)[:, :n]


def block_count(shape: torch.Size) -> int:
    """Blocks of a row, which has all dimensions but the first."""
    return -(-shape[1:].numel() // BLOCK)


def round_at_random(x: Tensor, bits: Tensor) -> Tensor:
    """x float32, bits: uniform in [0, 2^16) -> bfloat16: one of the two neighbours of x, the nearer one more
    often, so that the mean is x (stochastic rounding: arXiv 2010.06192)."""
    return ((x.view(torch.int32) + bits.int()) & -(1 << 16)).view(torch.float32).bfloat16()


class AdamW8bit(torch.optim.Optimizer):
    """AdamW for matrices in float32 or bfloat16, with moments of one byte a number (8-bit optimizers:
    Dettmers et al. 2021, arXiv 2110.02861). The second moment is kept as its root, which a step divides by.

    A bfloat16 matrix is rounded at random. The random bits of a number are a hash of the seed, the step, the
    matrix's name and the number's place in the whole matrix. So a resumed run gets the same bits, and so does
    any number of ranks.
    """

    def __init__(self, params: dict[str, nn.Parameter], seed: int, **rates: float):
        """params: {name: matrix}. rates: lr, beta2, weight_decay."""
        super().__init__(params.values(), rates)
        self.address = {p: (seed, uid_hash(name)) for name, p in params.items()}
        self.momentum, self.root = Bytes(signed=True), Bytes(signed=False)

    @staticmethod
    def blank(p: Tensor) -> dict[str, Tensor]:
        """The state of a matrix before its first step."""
        scales = torch.Size((p.shape[0], block_count(p.shape)))
        state = {"step": torch.zeros(())}
        for name in ("exp_avg", "exp_avg_sq_root"):
            state[name] = zeros_beside(p, p.shape, torch.uint8)
            state[f"{name}_scale"] = zeros_beside(p, scales, torch.float32)
        return state

    @torch.no_grad()
    def step(self, closure=None) -> None:  # pyrefly: ignore[bad-override]
        """Apply the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = state = self.state[p] or self.blank(p)
                state["step"] += 1
                tensors = [p, p.grad, *(value for name, value in state.items() if name != "step")]
                local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
                rows, first = max(1, AT_ONCE // p.shape[1:].numel()), first_row(p)
                for parts in zip(*(tensor.flatten(1).split(rows) for tensor in local)):
                    new = self._new_rows(group, int(state["step"]), *parts)
                    if p.dtype == torch.bfloat16:
                        count = new.numel()
                        place = torch.arange(count, device=p.device).view_as(new) + first * new.shape[1]
                        bits = address_hash(*self.address[p], int(state["step"]), place)
                        new = round_at_random(new, shift_right(bits, 48))
                    parts[0].copy_(new)
                    first += rows

    def _new_rows(self, rates: dict, step: int, w: Tensor, g: Tensor, *moments: Tensor) -> Tensor:
        """Some rows of a matrix after this step, float32. Their moments (bytes and scales of both) are
        updated in place."""
        beta2, g = rates["beta2"], g.float()
        m = self.momentum.read(*moments[:2]).lerp_(g, 1 - BETA1)
        v = self.root.read(*moments[2:]).square_().mul_(beta2)
        root = v.addcmul_(g, g, value=1 - beta2).sqrt_()
        for old, new in zip(moments, (*self.momentum.write(m), *self.root.write(root))):
            old.copy_(new)
        divisor = root.div_((1 - beta2**step) ** 0.5).add_(EPS)
        decayed = w.float() * (1 - rates["lr"] * rates["weight_decay"])
        return decayed.addcdiv_(m, divisor, value=-rates["lr"] / (1 - BETA1**step))


def zeros_beside(p: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros of a shape with p's rows, sharded as p is."""
    local = p.to_local() if isinstance(p, DTensor) else p
    zeros = torch.zeros(len(local), *shape[1:], dtype=dtype, device=local.device)
    if not isinstance(p, DTensor):
        return zeros
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(zeros, p.device_mesh, p.placements, shape=shape, stride=stride)


def first_row(p: Tensor) -> int:
    """The row of a whole matrix that this rank's first one is."""
    if not isinstance(p, DTensor):
        return 0
    rows = -(-p.shape[0] // p.device_mesh.size())
    return min(p.device_mesh.get_local_rank() * rows, p.shape[0])


class Muon(torch.optim.Muon):
    """PyTorch's Muon with its products in float32, for all matrices of one shape together. PyTorch's are in
    bfloat16; a CPU without instructions for that took fifty times longer."""

    @torch.no_grad()
    def step(self, closure=None) -> None:  # pyrefly: ignore[bad-override]
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            of_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    mean = state.setdefault("momentum_buffer", torch.zeros_like(p.grad))
                    mean.lerp_(p.grad, 1 - momentum)
                    # Nesterov's: the mean once more, as it will be if the gradient stays
                    of_shape[p.shape].append((p, p.grad.lerp(mean, momentum)))
            for (rows, columns), pairs in of_shape.items():
                updates = orthogonal(torch.stack([update for _, update in pairs]), *group["ns_coefficients"])
                for (p, _), update in zip(pairs, updates):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update, alpha=-lr * math.sqrt(max(1, rows / columns)))


def orthogonal(x: Tensor, a: float, b: float, c: float) -> Tensor:
    """(n, rows, columns): for each matrix one with nearly the same singular vectors, and singular values
    between 0.5 and 1.5. Five steps of Newton and Schulz with the coefficients of Jordan et al. 2024."""
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.baddbmm(wide, factor, wide, beta=a)
    return wide if x.shape[1] <= x.shape[2] else wide.mT


def trained_by_muon(name: str, dimensions: int) -> bool:
    """Whether Muon takes a parameter: a matrix that is no embedding."""
    return dimensions == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight"))


# {optim.name: what updates matrices}; all vectors have PyTorch's AdamW
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adamw_8bit": AdamW8bit, "adamw_bf16": AdamW8bit, "muon": Muon}


class Optimizer:
    """PyTorch's optimizers behind one interface. lr: AdamW's learning rate; Muon's is MUON_SCALE times that.
    skipped: updates that were left out because their gradient was not finite."""

    def __init__(
        self,
        policy: nn.Module,
        *,
        name: str,
        lr: float,
        beta2: float,
        weight_decay: float,
        seed: int = 0,
        states_on: str = "device",
    ):
        """Optimize the parameters that require gradients. name: of OPTIMIZERS; "muon" leaves embeddings to
        AdamW. seed: of the rounding of bfloat16 weights. states_on: "device", or "host" (not for Muon)."""
        self.policy = policy
        self.states_on_host = states_on == "host"
        self.lr = lr
        self.skipped = 0
        self.parts: list[tuple[torch.optim.Optimizer, float]] = []
        trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        muon = name == "muon"
        hidden = [p for n, p in trained.items() if muon and trained_by_muon(n, p.dim())]
        # The patch embedding is a convolution, which Muon does not take. It needs its own rate: with lr,
        # colours and sizes are learned long after places.
        patches = [p for p in trained.values() if muon and p.dim() > 2]
        others = {*hidden, *patches}
        rest = [p for p in trained.values() if p not in others]
        for chosen, scale in ((rest, 1.0), (patches, PATCH_SCALE)):
            matrices = [p for p in chosen if p.dim() >= 2]
            if matrices and OPTIMIZERS[name] is AdamW8bit:
                named = {n: p for n, p in trained.items() if p.dim() >= 2}
                rates = {"lr": lr * scale, "beta2": beta2, "weight_decay": weight_decay}
                self.parts.append((AdamW8bit(named, seed, **rates), scale))
                matrices = []
            kinds = [(matrices, weight_decay), ([p for p in chosen if p.dim() < 2], 0.0)]
            groups = [{"params": kind, "weight_decay": decay} for kind, decay in kinds if kind]
            if groups:
                adamw = torch.optim.AdamW(groups, lr=lr * scale, betas=(BETA1, beta2), eps=EPS, fused=True)
                self.parts.append((adamw, scale))
        if hidden:
            rates = {"lr": lr * MUON_SCALE, "weight_decay": weight_decay}
            self.parts.append((Muon(hidden, momentum=0.95, **rates), MUON_SCALE))

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
            if self.states_on_host:
                step_one_by_one(part)
            else:
                part.step()
            part.zero_grad(set_to_none=True)

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of one parameter: name -> tensor; empty before the first step."""
        return next((part.state[parameter] for part, _ in self.parts if parameter in part.state), {})

    def blank_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state that a parameter will have, all zero: same names, shapes, devices and sharding."""
        owner = self.owner(parameter)
        if isinstance(owner, AdamW8bit):
            state = owner.blank(parameter)
        elif isinstance(owner, Muon):
            state = {"momentum_buffer": torch.zeros_like(parameter)}
        else:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            state = {"step": torch.zeros((), device=parameter.device), **moments}
        return moved_to_host(state, {}) if self.states_on_host else state

    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Use a `blank_state` that has been filled. The tensors are not copied."""
        self.owner(parameter).state[parameter] = state

    def owner(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        """The PyTorch optimizer that updates a parameter."""
        holds = lambda part: any(parameter is p for group in part.param_groups for p in group["params"])
        return next(part for part, _ in self.parts if holds(part))


def step_one_by_one(part: torch.optim.Optimizer) -> None:
    """`part.step()`, with the same numbers, for one parameter at a time. The states of the others wait in CPU
    memory."""
    groups = part.param_groups
    try:
        for group in groups:
            for p in group["params"]:
                home = part.state[p]
                # a count of steps stays where it is
                part.state[p] = {name: x.to(p.device) if x.dim() else x for name, x in home.items()}
                part.param_groups = [{**group, "params": [p]}]
                part.step()
                part.state[p] = moved_to_host(part.state[p], home)
    finally:
        part.param_groups = groups


def moved_to_host(state: dict[str, Tensor], home: dict[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's state in CPU memory: in the tensors of `home`, or in new ones, which are page-locked for
    a GPU if they are not sharded. A count of steps stays where it is."""

    def moved(name: str, x: Tensor) -> Tensor:
        if not x.dim() or x is home.get(name):
            return x
        if name in home:
            return home[name].copy_(x)
        copy = x.to("cpu")
        pin = copy is not x and torch.cuda.is_available() and not isinstance(copy, DTensor)
        return copy.pin_memory() if pin else copy

    return {name: moved(name, x) for name, x in state.items()}


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
