"""Which values of the settings make no sense, and which have no effect.

A single value that has the right type is refused here if no run can mean it (`check`). Two settings that do
not go together are refused; one that another makes pointless is a line on the terminal (`contradictions`).
"""

import re
from pathlib import Path
from typing import Any

from grpo.config.typed import ConfigError

LEAST = {
    0: "steps seed lora.rank loss.kl_coef loss.entropy_coef loss.clip_high loss.sections optim.warmup "
    "optim.weight_decay optim.max_grad_norm eval.every eval.items save.every save.keep save.weights_every "
    "report.every report.prompts",
    1: "prompts group cap top_k max_rounds limit max_rows min_pixels max_pixels loss.updates "
    "loss.minibatches loss.micro_tokens eval.cap",
    2: "max_prompt",
}
"""{smallest value: keys}."""


def check(config) -> None:
    """Refuse values that have the right type and make no sense. Raises ConfigError that names the key."""
    for least, keys in LEAST.items():
        for key in keys.split():
            value = value_of(config, key)
            if value is not None and value < least:
                raise ConfigError(f"{key}: must be at least {least}, got {value}")
    for key in ("temperature", "lora.alpha", "optim.lr", "loss.logits_mib", "timeout", "epochs"):
        value = value_of(config, key)
        if value is not None and value <= 0:
            raise ConfigError(f"{key}: must be above 0, got {value}")
    for key in ("optim.beta2", "loss.clip_low"):
        if not 0 <= value_of(config, key) < 1:
            raise ConfigError(f"{key}: must be in [0, 1), got {value_of(config, key)}")
    if not 0 < config.top_p <= 1:
        raise ConfigError(f"top_p: must be above 0 and at most 1, got {config.top_p}")
    if not 0 < config.enough <= 1:
        raise ConfigError(f"enough: must be above 0 and at most 1 (a share of groups), got {config.enough}")
    if not 0 <= config.optim.lr_min <= 1:
        raise ConfigError(f"optim.lr_min: must be in [0, 1] (a fraction of lr), got {config.optim.lr_min}")
    if config.heldout is not None and not 0 <= config.heldout < 1:
        raise ConfigError(f"heldout: must be in [0, 1) (a share of the rows), got {config.heldout}")
    if config.min_pixels and config.max_pixels and config.min_pixels > config.max_pixels:
        raise ConfigError(f"min_pixels: {config.min_pixels} is more than max_pixels, {config.max_pixels}")
    if config.name and not re.fullmatch(r"\w[\w .+-]*", config.name):
        raise ConfigError(f"name: {config.name!r} is no name of a folder; write letters, digits, - and _")
    if config.init and config.method != "sft":
        raise ConfigError("init: random weights never earn a reward; use method=sft or drop init")
    if config.lora.rank:
        _check_lora(config)
    if config.shard == "always" and config.optim.name == "muon":
        raise ConfigError("shard: muon needs whole matrices; use shard=auto or shard=never")
    if config.optim.states_on == "host" and config.optim.name == "muon":
        why = "muon updates all matrices of one shape together"
        raise ConfigError(f"optim.states_on: {why}; use optim.states_on=device, or another optim.name")
    if config.optim.name == "adamw_bf16" and config.dtype != "bfloat16":
        raise ConfigError("optim.name: adamw_bf16 keeps the weights in bfloat16; set dtype=bfloat16 as well")
    if len(set(config.freeze)) > 1:
        raise ConfigError("freeze: with vision and llm both frozen nothing is left to train")
    if config.method == "grpo":
        _check_rollouts(config)


def _check_lora(config) -> None:
    if config.init:
        raise ConfigError("lora.rank: random weights need full training; use lora.rank=0 or a model")
    if config.optim.name == "muon":
        raise ConfigError("lora.rank: muon is for whole matrices; use optim.name=adamw")
    if config.optim.name == "adamw_bf16":
        raise ConfigError("lora.rank: adapters are float32; use optim.name=adamw_8bit or adamw")
    if not config.lora.targets:
        raise ConfigError("lora.targets: at least one layer is needed, such as q_proj")


def _check_rollouts(config) -> None:
    if not config.rewards:
        raise ConfigError("rewards: at least one reward part is needed")
    if config.cuda_graphs and config.device == "cpu":
        raise ConfigError("cuda_graphs: a CPU has none; drop it, or set device=cuda")
    terms = {"loss.kl_coef": "a KL penalty", "loss.entropy_coef": "an entropy bonus"}
    for key, term in terms.items():
        if config.max_rounds > 1 and value_of(config, key):
            why = f"dynamic sampling leaves out groups that {term} would still move"
            raise ConfigError(f"max_rounds: {why}; set {key}=0, as DAPO and GPG do")
    sizes = {"group": config.group} | {f"stages[{i}].group": s.group for i, s in enumerate(config.stages)}
    for key, size in sizes.items():
        if size < 2:
            raise ConfigError(f"{key}: must be at least 2, because a group compares completions; got {size}")
    if (parts := config.loss.minibatches) > config.prompts:
        raise ConfigError(f"loss.minibatches: {parts} parts of {config.prompts} prompts; raise prompts")
    ends = [stage.until for stage in config.stages]
    if ends != sorted(set(ends)) or any(stage.cap < 1 for stage in config.stages):
        raise ConfigError(f"stages: `until` must grow and `cap` be at least 1, got until {ends}")


def contradictions(config, questions: int) -> list[str]:
    """A line for each setting that has not the effect that it seems to have.  questions: number of them."""
    lines = []
    if config.revision and (config.model == "tiny" or Path(config.model).exists()):
        lines.append(f"revision: {config.revision!r} has no effect on {config.model}, which is no hub model")
    if 0 < config.steps <= config.optim.warmup:
        warmup = f"optim.warmup: {config.optim.warmup} steps of warm-up in a run of {config.steps}"
        lines.append(f"{warmup}: the learning rate only reaches optim.lr at the end, or never")
    if config.prompts > questions:
        lines.append(f"prompts: {config.prompts} per step, but there are {questions} questions; all are used")
    if not config.exact and config.device == "cuda":
        lines.append("exact: has no effect on a GPU, where nothing adds up in float64")
    if config.optim.states_on == "host" and config.device == "cpu":
        lines.append("optim.states_on: has no effect on a CPU, whose memory is the host's")
    if config.method == "sft":
        return lines
    if config.stages and config.stages[-1].until > config.steps:
        lines.append(f"stages: until {config.stages[-1].until}, but the run ends at step {config.steps}")
    if config.lora.rank and config.loss.reference_on == "host":
        lines.append("loss.reference_on: has no effect with lora.rank: the reference is the policy itself")
    if config.logp_of == "full" and config.top_k is None and config.top_p == 1:
        lines.append("logp_of: has no effect without top_k or top_p")
    if config.max_rounds == 1 and config.enough < 1:
        lines.append("enough: has no effect without dynamic sampling; set max_rounds above 1")
    return lines


def value_of(config, key: str) -> Any:
    """The value at a dotted key: value_of(config, "optim.lr")."""
    for name in key.split("."):
        config = getattr(config, name)
    return config
