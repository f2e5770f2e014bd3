"""Every setting of a run, as one tree of dataclasses: the names, the types, the defaults, and what they mean.

A field is followed by its help, which is also what `--help` prints and what the tables of the docs are
generated from. The defaults of the objective are the paper's (VisualThinker-R1-Zero, GRPO); recipes say how
they depart from them.
Configuration stops at the entry points: functions elsewhere take values, never a Config.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grpo.config.typed import ConfigError, leaves
from grpo.variants import ADVANTAGE_SCALES, KL_ESTIMATORS, SURROGATES, WEIGHTINGS

# The names that a table knows are the values that its setting takes.
if TYPE_CHECKING:
    Weighting = Surrogate = Estimator = Scale = str
else:
    Weighting = Literal[tuple(WEIGHTINGS)]
    Surrogate = Literal[tuple(SURROGATES)]
    Estimator = Literal[tuple(KL_ESTIMATORS)]
    Scale = Literal[tuple(ADVANTAGE_SCALES)]

HEADINGS = {
    "recipe": "The run",
    "model": "The policy",
    "task": "The questions",
    "prompts": "Rollouts",
    "rewards": "Rewards and advantages",
    "loss": "The objective",
    "sft": "Imitation",
    "optim": "The optimizer",
    "eval": "Evaluation, checkpoints, report",
}
"""The field that each heading stands above, in help and docs."""


@dataclass(frozen=True)
class Stage:
    """A stretch of training with its own group size and completion cap (Vision-R1 calls it PTST)."""

    until: int
    """The stage ends before this step."""
    group: int
    """Completions per prompt in this stage."""
    cap: int
    """Longest completion in this stage, in tokens."""


@dataclass(frozen=True)
class Loss:
    """The objective: docs/06."""

    weighting: Weighting = "completion"
    """What a token weighs. token: all alike (DAPO); completion: all completions alike (the GRPO paper);
    constant: 1/cap (Dr. GRPO)."""
    surrogate: Surrogate = "clip"
    """clip: PPO's ratio per token; gspo: one ratio per completion; cispo: the ratio is clipped, the
    gradient is not; reinforce: no ratio (GPG)."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high (0.28 is DAPO's clip-higher)."""
    kl: Estimator = "k3"
    """Estimator of the KL to the reference. k3: the GRPO paper's; k3_is: k3 times the ratio, unbiased in
    its gradient as well."""
    kl_coef: float = 0.04
    """Weight of the KL penalty. 0: no reference model is loaded."""
    reference_on: Literal["device", "host"] = "device"
    """Where the reference is kept. host: in the machine's memory, and copied to the GPU for its pass in
    each step."""
    updates: int = 1
    """Optimizer updates per rollout. With 1 the ratio is 1, and its gradient is not."""
    micro_tokens: int = 16384
    """Most tokens (prompts once, completions, padding) in one forward. Changes memory and speed, never the
    gradient."""
    stretches: int = 4
    """In float32 on a CPU a step's groups are learned from in so many stretches: on a number of ranks that
    divides it a run is the same bit for bit. 0: each group alone, any number."""
    logits_mib: float | None = None
    """MiB of logits that exist at the same time (twice that is in use). null: 115 on a CPU, 512 on a GPU.
    Changes memory and speed, never the gradient."""


@dataclass(frozen=True)
class Imitation:
    """What `method: sft` learns from a document."""

    loss_on: Literal["answer", "prompt_and_answer"] = "answer"
    """Which tokens count. prompt_and_answer: also the prompt's words (not its pictures), as the paper's
    SFT baseline was trained."""


@dataclass(frozen=True)
class Optim:
    """The optimizer and its learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw: as in the papers; muon: orthogonal updates for the matrices, AdamW for the rest (training
    from random weights)."""
    lr: float = 1e-6
    """Peak learning rate."""
    warmup: int = 0
    """Steps of linear warm-up."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up, until the last step."""
    lr_min: float = 0.0
    """Where the decay ends, as a fraction of lr."""
    beta1: float = 0.9
    """Memory of the mean of the gradient."""
    beta2: float = 0.999
    """Memory of its square."""
    eps: float = 1e-8
    """Added to the root of the square."""
    weight_decay: float = 0.0
    """Decoupled weight decay; vectors (norms, biases) are spared."""
    muon_scale: float = 10.0
    """Muon's learning rate as a multiple of lr."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm. 0: never."""


@dataclass(frozen=True)
class Evaluate:
    """Held-out questions, answered greedily, before, during and after training."""

    every: int = 50
    """Evaluate each so many steps. 0: only before and after."""
    items: int = 200
    """Held-out questions asked. 0: no evaluation at all."""
    cap: int | None = None
    """Longest completion in evaluation. null: the training cap."""


@dataclass(frozen=True)
class Save:
    """Checkpoints: Hugging Face folders with the optimizer beside them."""

    every: int = 50
    """Save each so many steps. 0: only at the end."""
    keep: int = 2
    """Checkpoints kept, the newest first. 0: all; 1: there is none to go back to, should the last one be
    damaged."""
    background: bool = True
    """Training goes on while a checkpoint is written, and stops only for a copy of weights and optimizer
    in the CPU's memory. false: it waits, without the copy."""


@dataclass(frozen=True)
class Report:
    """What `report.html` shows token by token."""

    every: int = 25
    """Show the completions of each so many steps. 0: only the curves."""
    prompts: int = 2
    """Groups shown of such a step."""


@dataclass(frozen=True)
class Config:
    """Everything a run is made of. Frozen: a run that changes its own settings can't be repeated."""

    recipe: str = "shapes"
    """Name of the recipe this started from."""
    method: Literal["grpo", "sft"] = "grpo"
    """grpo: learn from rewards; sft: imitate documents (how the built-in base was made)."""
    steps: int = 100
    """Steps in all; a step is one rollout."""
    seed: int = 0
    """Everything random is a function of this, the step and the prompt."""
    out: str | None = None
    """Folder of the run. null: runs/<recipe>."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto: bfloat16 on a GPU, else float32. Master weights, loss and optimizer are
    float32 always."""
    shard: Literal["auto", "always", "never"] = "auto"
    """Cut the policy and its optimizer over the ranks (FSDP2): docs/ranks.md. auto: with more than one
    rank, unless optim.name is muon."""
    timeout: float = 600.0
    """Of several ranks: seconds after which one that is silent, or that others wait for and that does not
    move, is taken for lost, named, and the run ended."""

    model: str = "tiny"
    """The base: tiny (built in), a folder in Hugging Face layout, a run folder (its newest checkpoint), or
    a model of the hub (Qwen/Qwen2-VL-2B)."""
    revision: str | None = None
    """Commit, tag or branch of a hub model. null: the newest."""
    init: str | None = None
    """A config.json: start from random weights of this shape instead (sft only)."""
    freeze: list[Literal["vision", "llm"]] = field(default_factory=list)
    """Parts that are not trained. vision: the tower and its merger; llm: embedding, decoder and head (then
    every question needs a picture)."""
    recompute: bool = False
    """Recompute the activations of each block in the backward pass: less memory, a third more time."""

    task: str = "shapes"
    """Where the questions come from: a name in data/sources/table.py."""
    data: str | None = None
    """File, folder or dataset of the hub (array/SAT) that the task reads: docs/data.md. null: the task
    needs none."""
    limit: int | None = None
    """Use only the first so many examples. null: all."""
    template: str = "shapes"
    """How a question becomes a prompt: a name in data/chat.py."""
    max_prompt: int = 1024
    """Longest prompt in tokens, pictures included. A longer one is skipped and counted, never cut."""
    min_pixels: int | None = None
    """Smaller pictures are enlarged to this many pixels. null: as the model's processor says."""
    max_pixels: int | None = None
    """Larger pictures are scaled down to this many pixels. null: as the model's processor says."""
    blind: bool = False
    """Replace every picture by a grey one: the control that shows whether looking matters."""

    prompts: int = 8
    """Prompts per step, over all ranks."""
    group: int = 8
    """G: completions per prompt."""
    cap: int = 512
    """Longest completion in tokens."""
    stages: list[Stage] = field(default_factory=list)
    """Other group sizes and caps for the first steps: [{until: 200, group: 16, cap: 1024}, ...]."""
    temperature: float = 1.0
    """Of sampling, and of the log-probs in the loss: the policy that samples is the policy that is
    trained."""
    max_rows: int | None = None
    """Completions decoded at the same time; the others wait for a free slot, which changes none of them.
    null: as many as fit into the free memory."""
    cuda_graphs: bool = False
    """Decode by CUDA graphs, which spares a GPU the wait for Python between kernels. Off, because nobody
    has measured it on a GPU yet."""
    sampling: Literal["fixed", "dynamic"] = "fixed"
    """dynamic: groups that all earned the same are replaced by those of further prompts (DAPO, GPG), in at
    most max_rounds rounds."""
    max_rounds: int = 4
    """Rollouts of a step under dynamic sampling, the first one counted."""
    enough: float = 1.0
    """Dynamic sampling asks no further once this share of the step's groups can teach."""

    rewards: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 1.0})
    """Reward parts and their weights: names in grpo/rewards/rules.py, or FILE.py:FUNCTION for a function
    of your own."""
    advantage: Scale = "std"
    """What (reward - mean of its group) is divided by. std: of the group (GRPO); none (Dr. GRPO); batch:
    std of all rewards."""

    loss: Loss = field(default_factory=Loss)
    sft: Imitation = field(default_factory=Imitation)
    optim: Optim = field(default_factory=Optim)
    eval: Evaluate = field(default_factory=Evaluate)
    save: Save = field(default_factory=Save)
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        check(self)

    @property
    def folder(self) -> Path:
        """Where the run writes: `out`, or runs/<recipe>."""
        return Path(self.out or f"runs/{self.recipe}")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, in the order of the fields."""
        return dataclasses.asdict(self)


def check(config: Config) -> None:
    """Values that are of the right type and still make no sense. Raises ConfigError naming the key."""
    at_least = {
        "prompts": 1,
        "group": 1,
        "cap": 1,
        "max_prompt": 2,
        "steps": 0,
        "optim.warmup": 0,
        "optim.weight_decay": 0,
        "optim.max_grad_norm": 0,
        "loss.kl_coef": 0,
        "loss.clip_high": 0,
        "loss.updates": 1,
        "loss.micro_tokens": 1,
        "loss.stretches": 0,
        "max_rounds": 1,
        "eval.every": 0,
        "eval.items": 0,
        "save.every": 0,
        "save.keep": 0,
        "report.every": 0,
        "report.prompts": 0,
        "limit": 1,
        "max_rows": 1,
        "min_pixels": 1,
        "max_pixels": 1,
        "eval.cap": 1,
        "seed": 0,
    }
    for key, least in at_least.items():
        value = value_of(config, key)
        if value is not None and value < least:
            raise ConfigError(f"{key}: must be at least {least}, got {value}")
    for key in ("temperature", "optim.lr", "optim.eps", "loss.logits_mib", "timeout"):
        if value_of(config, key) is not None and value_of(config, key) <= 0:
            raise ConfigError(f"{key}: must be above 0, got {value_of(config, key)}")
    for key in ("optim.beta1", "optim.beta2", "loss.clip_low"):
        if not 0 <= value_of(config, key) < 1:
            raise ConfigError(f"{key}: must be in [0, 1), got {value_of(config, key)}")
    if not 0 < config.enough <= 1:
        raise ConfigError(
            f"enough: is a share of the step's groups, above 0 and at most 1, got {config.enough}"
        )
    if not 0 <= config.optim.lr_min <= 1:
        raise ConfigError(f"optim.lr_min: is a fraction of optim.lr, in [0, 1], got {config.optim.lr_min}")
    if config.min_pixels and config.max_pixels and config.min_pixels > config.max_pixels:
        raise ConfigError(f"min_pixels: {config.min_pixels} is more than max_pixels, {config.max_pixels}")
    if config.init and config.method != "sft":
        raise ConfigError(
            "init: random weights can't learn from rewards, because they never earn one; use method=sft, "
            "or drop init"
        )
    if config.shard == "always" and config.optim.name == "muon":
        raise ConfigError(
            "shard: muon needs whole matrices; use shard=auto or shard=never, and every rank holds the "
            "whole policy"
        )
    if len(set(config.freeze)) > 1:
        raise ConfigError("freeze: with vision and llm both frozen there is nothing left to train")
    _check_rollouts(config)


def _check_rollouts(config: Config) -> None:
    if config.method != "grpo":
        return
    if not config.rewards:
        raise ConfigError("rewards: at least one reward part is needed")
    if config.cuda_graphs and config.device == "cpu":
        raise ConfigError("cuda_graphs: there are none on a CPU; drop it, or set device=cuda")
    if config.sampling == "dynamic" and config.loss.kl_coef:
        raise ConfigError(
            "sampling: dynamic leaves out groups that a KL penalty would still move; set loss.kl_coef=0, "
            "as DAPO and GPG do"
        )
    sizes = [("group", config.group)] + [
        (f"stages[{i}].group", stage.group) for i, stage in enumerate(config.stages)
    ]
    for key, size in sizes:
        if size < 2:
            raise ConfigError(
                f"{key}: a completion is compared with its group, which needs at least 2, got {size}"
            )
    ends = [stage.until for stage in config.stages]
    if ends != sorted(set(ends)) or any(stage.cap < 1 for stage in config.stages):
        raise ConfigError(
            f"stages: `until` must grow from stage to stage and `cap` be at least 1, got until {ends}"
        )


def value_of(config: Config, key: str) -> Any:
    """The value at a dotted key: value_of(config, "optim.lr")."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def differences(config: Config, other: Config) -> list[str]:
    """["optim.lr: 1e-06 -> 2e-06", ...]: what differs between two runs."""
    pairs = ((key, value_of(config, key), value_of(other, key)) for key in leaves(Config))
    return [f"{key}: {a} -> {b}" for key, a, b in pairs if a != b]
