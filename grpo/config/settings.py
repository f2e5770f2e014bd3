"""Every setting of a run, as one tree of dataclasses: name, type, default and help.

The string below a field is its help, for `--help` and the tables of the docs. The defaults of the objective
are the paper's (VisualThinker-R1-Zero, GRPO). Only the entry points see a Config; others take values.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grpo.config.checks import check, value_of
from grpo.config.typed import leaves
from grpo.optim import OPTIMIZERS
from grpo.variants import ADVANTAGE_SCALES, KL_ESTIMATORS, SURROGATES, WEIGHTINGS

# a setting takes the names that a table knows
if TYPE_CHECKING:
    Weighting = Surrogate = Estimator = Scale = OptimizerName = str
else:
    Weighting = Literal[tuple(WEIGHTINGS)]
    Surrogate = Literal[tuple(SURROGATES)]
    Estimator = Literal[tuple(KL_ESTIMATORS)]
    Scale = Literal[tuple(ADVANTAGE_SCALES)]
    OptimizerName = Literal[tuple(OPTIMIZERS)]

# the linear layers of a decoder block
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEADINGS = {
    "recipe": "The run",
    "by_model": "The policy",
    "task": "The questions",
    "prompts": "Rollouts",
    "rewards": "Rewards and advantages",
    "loss": "The objective",
    "sft": "Imitation",
    "optim": "The optimizer",
    "eval": "Evaluation, checkpoints, report",
}
"""{first field below the heading: heading}, in the help and in the docs."""


@dataclass(frozen=True)
class Stage:
    """A part of training with its own group size and completion cap (Vision-R1 calls it PTST)."""

    until: int
    """Step before which the stage ends."""
    group: int
    """Completions per prompt in this stage."""
    cap: int
    """Longest completion in this stage, in tokens."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters instead of all weights: docs/lora.md."""

    rank: int = 0
    """Rank r of the adapters (LoRA). Only they are trained, and without them the policy is the reference. 0:
    train the weights themselves."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: [*LINEARS])
    """Names of the layers that get an adapter, in the blocks of all parts that are not frozen. Qwen2-VL's
    vision tower has qkv, proj, fc1, fc2."""


@dataclass(frozen=True)
class Loss:
    """The objective: docs/06."""

    weighting: Weighting = "completion"
    """How the loss is averaged. token: every token counts the same (DAPO); completion: every completion
    counts the same (the GRPO paper); constant: every token counts 1/cap (Dr. GRPO)."""
    surrogate: Surrogate = "clip"
    """The policy term. clip: PPO's clipped ratio per token; gspo: one ratio per completion; cispo: a clipped
    ratio as a weight; reinforce: no ratio (GPG)."""
    clip_low: float = 0.2
    """The lower clip of the ratio is 1 - clip_low."""
    clip_high: float = 0.2
    """The upper clip of the ratio is 1 + clip_high (DAPO's clip-higher: 0.28)."""
    kl: Estimator = "k3"
    """Estimator of the KL to the reference. k3: the paper's; k3_is: times the ratio, an unbiased gradient."""
    kl_coef: float = 0.04
    """Weight of the KL penalty. 0: no reference is needed, and none is loaded."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, which keeps the policy's entropy up. 0: none, and no entropy gradient."""
    reference_on: Literal["device", "host"] = "device"
    """Where the reference model is kept. host: in CPU memory, copied to the GPU once a step."""
    updates: int = 1
    """Updates from the whole rollout, one after another. With 1 the ratio is 1, so no clip is reached."""
    minibatches: int = 1
    """Disjoint parts of the step's prompts, with an optimizer update each. `updates` repeats all of them."""
    micro_tokens: int = 16384
    """Most tokens (prompts once, completions, padding) in a forward pass; only memory and speed change."""
    sections: int = 4
    """CPU, float32: split a step's rows into this many fixed sections, so that 1, 2 and 4 ranks give
    bit-identical runs. 0: one section per group, for any number of ranks up to `prompts`."""
    logits_mib: float | None = None
    """MiB of logits at a time; the peak is twice that, the gradient the same. null: CPU 115, GPU 512."""


@dataclass(frozen=True)
class Imitation:
    """Supervised fine-tuning (method: sft)."""

    loss_on: Literal["answer", "prompt_and_answer"] = "answer"
    """Tokens in the loss. prompt_and_answer: the prompt's words too, not its pictures (the paper's SFT)."""
    too_long: Literal["skip", "cut", "error"] = "skip"
    """A document of more than `cap` tokens is named and skipped, or cut to `cap`, or ends the run."""


@dataclass(frozen=True)
class Optim:
    """The optimizer and its learning rate."""

    name: OptimizerName = "adamw"
    """adamw: as in the papers; adamw_8bit: with moments of one byte; adamw_bf16: weights in bfloat16 too
    (docs/optimizers.md); muon: orthogonal updates of matrices, for training from random weights."""
    states_on: Literal["device", "host"] = "device"
    """Where the moments are kept. host: in CPU memory, copied to the GPU for one parameter at a time."""
    lr: float = 1e-6
    """Peak learning rate."""
    warmup: int = 0
    """Steps of linear warm-up."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate from the end of the warm-up to the last step."""
    lr_min: float = 0.0
    """Learning rate at the last step, as a fraction of lr."""
    beta2: float = 0.999
    """AdamW's decay rate of the mean squared gradient. (beta1 is 0.9.)"""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices. Norms and biases have none."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradient; a larger gradient is scaled down. 0: no maximum."""


@dataclass(frozen=True)
class Evaluate:
    """Held-out questions, answered greedily before, during and after training."""

    every: int = 50
    """Steps between evaluations. 0: only before and after training."""
    items: int = 200
    """Number of held-out questions. 0: no evaluation."""
    cap: int | None = None
    """Longest completion in evaluation, in tokens. null: the training cap."""
    task: str | None = None
    """Source of the held-out questions. null: the run's own task. Of a benchmark all questions are asked."""
    data: str | None = None
    """File, folder or hub dataset of the held-out questions. null: the run's own, or none."""


@dataclass(frozen=True)
class Save:
    """Checkpoints: Hugging Face folders with the optimizer beside them."""

    every: int = 50
    """Steps between checkpoints. 0: only at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep. 0: all. With 1 there is no older one if the last is damaged."""
    weights_every: int = 0
    """Steps between folders of weights alone (RUN/weights), which are all kept. 0: none."""
    background: bool = True
    """Train on while a checkpoint is written from a copy of it in CPU memory. false: wait, without a copy."""


@dataclass(frozen=True)
class Report:
    """What `report.html` shows token by token."""

    every: int = 25
    """Steps between shown completions. 0: only curves."""
    prompts: int = 2
    """Groups shown per shown step."""


@dataclass(frozen=True)
class Config:
    """All settings of a run. Frozen, because a run that changes its own settings can't be repeated."""

    recipe: str = "shapes"
    """Name of the recipe."""
    name: str | None = None
    """The run's name in report, loggers and model card. null: that of its folder `out`."""
    method: Literal["grpo", "sft"] = "grpo"
    """grpo: learn from rewards; sft: imitate documents, as the built-in base did."""
    steps: int = 100
    """Number of steps; a step is one rollout."""
    epochs: float | None = None
    """Passes over the questions, instead of steps; config.yaml then has the steps that come out."""
    seed: int = 0
    """Seed. Each random number is a function of the seed, the step and the prompt."""
    out: str | None = None
    """Folder of the run. null: runs/<name>; without a name runs/<data> of your own questions, else
    runs/<recipe>."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: on a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products. auto: bfloat16 on a GPU, else float32. Weights, loss and optimizer are float32
    for all of them, if optim.name is adamw."""
    exact: bool = True
    """CPU: attention adds up in float64, and so do float32 gradients. Sampled and trained log-probs are then
    equal on one thread, and in float32 so are runs on 1, 2 and 4 ranks. false: faster."""
    shard: Literal["auto", "always", "never"] = "auto"
    """Shard policy and optimizer over the ranks (FSDP2, docs/ranks.md). auto: several ranks, no muon."""
    timeout: float = 600.0
    """Seconds that a rank waits for another one. Then the run ends and names the lost rank."""

    by_model: bool = False
    """Where neither recipe nor command line says a setting, take the one that goes with the model
    (grpo/config/by_model.yaml)."""
    model: str = "tiny"
    """The base model: tiny (built in), a folder in Hugging Face layout, a run folder (its newest checkpoint),
    or a name on the hub (Qwen/Qwen2-VL-2B)."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; another model does not inherit it. null: the newest commit."""
    init: str | None = None
    """A config.json: start from random weights of this shape (sft only)."""
    freeze: list[Literal["vision", "llm"]] = field(default_factory=list)
    """Not trained, no adapters. vision: tower and merger; llm: embedding, decoder, head (questions then need
    pictures)."""
    lora: Lora = field(default_factory=Lora)
    recompute: bool = False
    """Recompute each block's activations in the backward pass: less memory, a third more time."""

    task: str = "shapes"
    """Source of the questions: a name in data/sources/table.py."""
    data: str | None = None
    """File, folder or hub dataset (array/SAT) of the task (docs/data.md). null: the task needs no data."""
    columns: dict[str, str] = field(default_factory=dict)
    """The file's own names of columns: {question: problem, answer: label}, our name first."""
    heldout: float | None = None
    """Share of the rows to hold out, if the data has no file of its own for that. null: a sixteenth."""
    limit: int | None = None
    """Use only this many examples, the first ones. null: all."""
    template: str = "shapes"
    """Prompt template: a name in data/templates.yaml, a FILE.yaml or FILE.jinja of your own, or chat: the
    model's own chat template (docs/data.md)."""
    system: str | None = None
    """System prompt in place of the template's own. null: leave that."""
    max_prompt: int = 1024
    """Longest prompt in tokens, pictures included. A longer prompt is skipped and counted, never cut."""
    min_pixels: int | None = None
    """Smaller pictures are enlarged to this many pixels. null: the model's own value."""
    max_pixels: int | None = None
    """Larger pictures are scaled down to this many pixels. null: the model's own value."""
    blind: bool = False
    """Replace every picture by a grey one, as a control of whether pictures matter."""

    prompts: int = 8
    """Prompts per step, over all ranks."""
    group: int = 8
    """Completions per prompt (G)."""
    cap: int = 512
    """Longest completion in tokens."""
    stages: list[Stage] = field(default_factory=list)
    """Other group sizes and caps for the first steps: [{until: 200, group: 16, cap: 1024}, ...]."""
    temperature: float = 1.0
    """Temperature of sampling and of the log-probs in the loss."""
    top_k: int | None = None
    """Draw from the top_k likeliest words only. null: from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest words whose probabilities reach top_p. 1: from all."""
    logp_of: Literal["sampled", "full"] = "sampled"
    """With top_k or top_p: log-probs in the loss. sampled: of the words that could be drawn, renormalised;
    full: of all words, as transformers and TRL take them."""
    max_rows: int | None = None
    """Completions decoded at the same time; it does not change them. null: as many as fit into memory."""
    cuda_graphs: bool = False
    """Decode with CUDA graphs: the GPU does not wait for Python. Off: it is not measured on a GPU yet."""
    max_rounds: int = 1
    """Most rollouts per step. Above 1 is dynamic sampling (DAPO, GPG): groups with equal rewards are replaced
    by groups of further prompts."""
    enough: float = 1.0
    """Dynamic sampling stops when this share of the step's groups has unequal rewards."""

    rewards: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 1.0})
    """Reward parts and their weights: names in grpo/rewards/rules.py, or FILE.py:FUNCTION for your own."""
    advantage: Scale = "std"
    """Divisor of (reward - group mean). std: the group's std (GRPO); none: 1 (Dr. GRPO); batch: of all."""

    loss: Loss = field(default_factory=Loss)
    sft: Imitation = field(default_factory=Imitation)
    optim: Optim = field(default_factory=Optim)
    eval: Evaluate = field(default_factory=Evaluate)
    save: Save = field(default_factory=Save)
    report: Report = field(default_factory=Report)
    log: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Also log the metrics and some pictures there. Each is an extra: pip install -e ".[wandb]"."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def folder(self) -> Path:
        """Where the run writes: `out`, or runs/<name>, or runs/<data> of one's own questions, or
        runs/<recipe>."""
        if self.out or self.name:
            return Path(self.out or f"runs/{self.name}")
        return Path("runs") / ((self.task == "jsonl" and data_name(self.data)) or self.recipe)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, in the order of the fields."""
        return dataclasses.asdict(self)


def data_name(data: str | None) -> str:
    """The name of data: of a folder, of a file without its ending, or of a dataset of the hub. "" if none."""
    # FOLDER,PICTURES; OWNER/NAME@REVISION:FILE
    path = Path((data or "").partition(",")[0])
    if not path.exists():
        path = Path(re.split("[@:]", str(path))[0])
    name = os.path.basename(os.path.abspath(path)) if data else ""
    return name if path.is_dir() else name.partition(".")[0]


def differences(config: Config, other: Config) -> list[str]:
    """["optim.lr: 1e-06 -> 2e-06", ...]: the differences between two runs."""
    pairs = ((key, value_of(config, key), value_of(other, key)) for key in leaves(Config))
    return [f"{key}: {a} -> {b}" for key, a, b in pairs if a != b]
