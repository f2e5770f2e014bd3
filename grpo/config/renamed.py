"""Settings of earlier versions, and of other trainers, with the name that they have here.

A setting that goes gets its line in RENAMED or REMOVED, so that an old recipe is refused with the new name.
"""

RENAMED = {
    "slots": "max_rows",
    "loss.stretches": "loss.sections",
    # TRL and EasyR1
    "beta": "loss.kl_coef",
    "epsilon": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.decay",
    "warmup_steps": "optim.warmup",
    "max_steps": "steps",
    "total_steps": "steps",
    "num_generations": "group",
    "rollout_n": "group",
    "rollout_batch_size": "prompts",
    "max_completion_length": "cap",
    "max_response_length": "cap",
    "max_prompt_length": "max_prompt",
    "num_iterations": "loss.updates",
    "loss_type": "loss.weighting",
    "scale_rewards": "advantage",
    "reward_funcs": "rewards",
    "reward_weights": "rewards",
    "adv_estimator": "advantage",
    "save_steps": "save.every",
    "save_freq": "save.every",
    "save_total_limit": "save.keep",
    "save_limit": "save.keep",
    "eval_steps": "eval.every",
    "val_freq": "eval.every",
    "output_dir": "out",
    "save_checkpoint_path": "out",
    "model_name_or_path": "model",
    "model_path": "model",
    "dataset_name": "data",
    "train_files": "data",
    "gradient_checkpointing": "recompute",
    "bf16": "dtype",
    "torch_dtype": "dtype",
}
"""{name that is not a setting: the setting that does the same}."""

REMOVED = {
    "sampling": "max_rounds above 1 is dynamic sampling, and max_rounds=1 is none",
    "optim.beta1": "it is always 0.9",
    "optim.eps": "it is always 1e-8",
    "optim.muon_scale": "Muon's rate is always 10 times optim.lr",
    # TRL
    "report_to": "each run writes metrics.jsonl, curves.png and report.html",
    "logging_steps": "each step is logged",
    "gradient_accumulation_steps": "prompts counts a whole step; loss.micro_tokens bounds a forward pass",
    "per_device_train_batch_size": "prompts counts a whole step of all ranks",
    "use_vllm": "the rollout is in grpo/rollout.py",
    "top_p": "the policy that samples is the policy that is trained",
    "top_k": "the policy that samples is the policy that is trained",
}
"""{name that is not a setting: why it needs none}."""


def replacement(key: str) -> str:
    """What a message says about an unknown key from these tables; "" for any other key."""
    if key in RENAMED:
        return f"; its name here is {RENAMED[key]!r}"
    return f"; there is no such setting: {REMOVED[key]}" if key in REMOVED else ""
