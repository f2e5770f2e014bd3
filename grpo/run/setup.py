"""What a run holds before its first step: folder, policy, questions. `open_run` makes or finds them.

The command of a stopped run continues it. The newest undamaged checkpoint gives weights, optimizer and step.
metrics.jsonl and samples.jsonl are cut back to that step. The rest is a function of (seed, step), the
settings, and the files of `grpo/run/inputs.py`. A change of either is named.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from data.chat import Chat
from data.lengths import check_prompts
from data.sources.table import open_split
from grpo.config import Config, check_same_run, contradictions, save
from grpo.config.parse import Flags
from grpo.gradient import TokenBudget
from grpo.logprobs import chunk_of
from grpo.monitor import loggers
from grpo.optim import Optimizer
from grpo.parallel.fsdp import shard
from grpo.parallel.ranks import Ranks, gather_objects, use_bfloat16, wait_for_all, wait_for_main
from grpo.rewards.rules import rule
from grpo.run import inputs
from grpo.run.held_out import open_questions
from grpo.run.lock import claim
from grpo.storage import adapter, checkpoint
from grpo.storage.atomic import write_whole
from grpo.storage.jsonl import Metrics, read
from grpo.storage.model_folder import base_folder, check_agreement, load_model, model_folder
from models import lora, weights
from models.config import ModelConfig
from models.layers import attention_sums
from models.qwen_vl import QwenVL

T = TypeVar("T")


@dataclass
class Run:
    """What the training loop works with. base: the model folder that it started from, with tokenizer files.
    heldout: {set: its examples}; the set "heldout" is evaluated during training. step: steps done."""

    folder: Path
    base: Path
    policy: QwenVL
    reference: QwenVL | None
    optimizer: Optimizer
    budget: TokenBudget
    chat: Chat
    examples: Sequence
    heldout: dict[str, list]
    metrics: Metrics
    samples: Metrics
    step: int


def open_run(cfg: Config, ranks: Ranks, flags: Flags | None = None) -> Run:
    """Make the run folder or find it again; load the policy and the questions. All ranks call it together.
    With `flags.dry_run` it writes nothing. Raises ValueError and CheckpointError with one clear line."""
    folder = cfg.folder
    flags = flags or Flags()
    changed = check_same_run(cfg, folder, flags.change)
    loggers.check(cfg.log)
    if not flags.dry_run:
        # the end of the program gives it up: `lock.leave`
        on_main(ranks, partial(claim, folder))
    for name in cfg.rewards if cfg.method == "grpo" else ():
        # a wrong name is found before anything is written
        rule(name, cfg.cap)
    found = newest_checkpoint(folder, ranks)
    start = start_of(cfg, ranks)
    base = base_folder(start)
    limits = {"max_prompt": cfg.max_prompt, "min_pixels": cfg.min_pixels, "max_pixels": cfg.max_pixels}
    chat = Chat(base, template=cfg.template, system=cfg.system, **limits)
    examples, heldout = open_questions(cfg)
    if cfg.data:
        on_main(ranks, lambda: measure(chat, examples))
    record = inputs.Record(folder, found, changed)
    on_main(ranks, lambda: record.compare(inputs.inputs_of(cfg, start, examples), ranks, flags.change))
    policy = load_policy(cfg, ranks, start, found)
    check_agreement(chat, policy.config)
    o = cfg.optim
    how = {"name": o.name, "lr": o.lr, "beta2": o.beta2, "weight_decay": o.weight_decay}
    optimizer = Optimizer(policy, **how, seed=cfg.seed, states_on=o.states_on)
    step = checkpoint.load_optimizer(found, policy, optimizer) if found else 0
    reference = None
    if cfg.method == "grpo" and cfg.loss.kl_coef:
        # with LoRA the reference is the policy without its adapters
        reference = policy if cfg.lora.rank else load_reference(cfg, ranks, start)
    logs = Metrics(None), Metrics(None)
    if ranks.main and not flags.dry_run:
        logs = open_logs(cfg, start, record, found, step)
    for line in [*flags.repeated, *contradictions(cfg, len(examples))] if ranks.main else ():
        tqdm.write(f"warning: {line}", file=sys.stderr)
    wait_for_all()
    chunk = chunk_of(policy.config.vocab_size, cfg.loss.logits_mib, ranks.device.type)
    budget = TokenBudget(cfg.loss.micro_tokens, chunk, ranks.device)
    return Run(folder, base, policy, reference, optimizer, budget, chat, examples, heldout, *logs, step)


def newest_checkpoint(folder: Path, ranks: Ranks) -> Path | None:
    """The newest undamaged checkpoint of a run, None without any; rank 0 looks for all. Prints which are
    damaged. Raises CheckpointError if all are."""
    found, line = gather_objects([checkpoint.newest(folder)] if ranks.main else [])[0]
    if line and found is None:
        raise checkpoint.CheckpointError(line)
    if line and ranks.main:
        tqdm.write(line, file=sys.stderr)
    return found


def measure(chat: Chat, examples: Sequence) -> None:
    """Print how many questions are too long, if some are. Raises TooLong if most are."""
    if line := check_prompts(chat, examples):
        tqdm.write(f"warning: {line}", file=sys.stderr)


def with_steps(cfg: Config) -> Config:
    """The settings with the number of steps that `epochs` comes to. Raises BadSource."""
    if cfg.epochs is None:
        return cfg
    part = {"columns": cfg.columns, "heldout": cfg.heldout}
    questions = len(open_split(cfg.task, cfg.data, "train", cfg.limit, cfg.seed, **part))
    return replace(cfg, steps=math.ceil(cfg.epochs * questions / cfg.prompts))


def on_main(ranks: Ranks, work: Callable[[], T]) -> None:
    """Call `work` on rank 0. All ranks raise its ValueError or OSError."""
    error = None
    if ranks.main:
        try:
            work()
        except (ValueError, OSError) as raised:
            error = raised
    if error := gather_objects([error] if ranks.main else [])[0]:
        raise error


def start_of(cfg: Config, ranks: Ranks) -> Path:
    """The folder of the base, or of an adapter of one. The commit of a hub model is noted when a run begins
    (`open_logs`), so a continued run gets the same one, even if the branch has moved. Raises ValueError."""
    if cfg.init:
        return Path(cfg.init).parent
    note = cfg.folder / "base.json"
    commit = None
    found = None
    # rank 0 asks the hub first, so all ranks get one commit
    if ranks.main:
        commit = json.loads(note.read_text("utf-8"))["revision"] if note.is_file() else None
        found = model_folder(cfg.model, commit or cfg.revision)
        base_folder(found)
        commit = commit or commit_of(found)
    wait_for_main("the model")
    commit = gather_objects([commit] if ranks.main else [])[0]
    return found or model_folder(cfg.model, commit or cfg.revision)


def commit_of(base: Path) -> str | None:
    """The commit of a model in the hub's cache, which has one folder for each."""
    return base.name if base.parent.name == "snapshots" else None


def sharded(cfg: Config, ranks: Ranks) -> bool:
    """Whether policy and reference are sharded over the ranks."""
    return cfg.shard == "always" or (cfg.shard == "auto" and ranks.size > 1 and cfg.optim.name != "muon")


def load_policy(cfg: Config, ranks: Ranks, start: Path, found: Path | None) -> QwenVL:
    """The policy to train: of the checkpoint `found`, or random (`init`), or of `start`; with adapters, or
    with frozen parts."""
    if cfg.lora.rank:
        policy = load_adapted(cfg, ranks, start, found)
    else:
        if cfg.init and not found:
            policy = weights.init(ModelConfig.from_folder(cfg.init), seed=cfg.seed).to(ranks.device)
        else:
            policy = load_model(found or start, device=ranks.device)
        if cfg.optim.name == "adamw_bf16":
            matrices_in_bfloat16(policy)
        freeze(policy, cfg.freeze)
    policy.recompute = policy.visual.recompute = cfg.recompute
    if sharded(cfg, ranks):
        with attention_sums(cfg.exact):
            shard(policy, ranks, use_bfloat16(ranks, cfg.dtype))
    return policy


def load_adapted(cfg: Config, ranks: Ranks, start: Path, found: Path | None) -> QwenVL:
    """The base with adapters: those of the checkpoint `found`, or of `start` if it is an adapter, or fresh
    ones. Raises ValueError if saved adapters are not those of the settings."""
    low = use_bfloat16(ranks, cfg.dtype)
    policy = frozen(weights.load(base_folder(start), device=ranks.device), low)
    layers = lora.chosen(policy, cfg.lora.targets, cfg.freeze)
    folder = found or start
    if adapter.is_adapter(folder):
        saved = adapter.read(folder)
        if (saved.rank, saved.alpha, saved.layers) != (cfg.lora.rank, cfg.lora.alpha, sorted(layers)):
            names = sorted({name.rpartition(".")[2] for name in saved.layers})
            has = f"has lora.rank={saved.rank} lora.alpha={saved.alpha:g} lora.targets=[{','.join(names)}]"
            raise ValueError(f"the adapter in {folder} {has}, in {len(saved.layers)} layers; set the same")
        pairs = saved.pairs(policy, folder)
    else:
        pairs = lora.fresh(layers, cfg.lora.rank, cfg.seed)
    lora.attach(policy, pairs, cfg.lora.alpha / cfg.lora.rank)
    return policy


def freeze(policy: QwenVL, parts: Sequence[str]) -> None:
    """Train all parts but these. vision: the tower and its merger; llm: everything else. Call it before the
    optimizer is made."""
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(("vision" if name.startswith("visual.") else "llm") not in parts)


def load_reference(cfg: Config, ranks: Ranks, start: Path) -> QwenVL:
    """The frozen base. With several ranks, each keeps its part on its device."""
    on = ranks.device if sharded(cfg, ranks) or cfg.loss.reference_on == "device" else "cpu"
    low = use_bfloat16(ranks, cfg.dtype)
    reference = frozen(load_model(start, device=on), low)
    if sharded(cfg, ranks):
        shard(reference, ranks, low)
    return reference


def frozen(reference: QwenVL, use_bfloat16: bool) -> QwenVL:
    """Turn gradients off, in place. use_bfloat16: keep matrices in bfloat16. No result changes: the hub's
    weights are bfloat16, and a product would cast them anyway."""
    reference.requires_grad_(False)
    return matrices_in_bfloat16(reference) if use_bfloat16 else reference


def matrices_in_bfloat16(policy: QwenVL) -> QwenVL:
    """Round matrices to bfloat16, in place. Norms and biases do not change."""
    for parameter in policy.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16()
    return policy


def open_logs(
    cfg: Config, start: Path, record: inputs.Record, found: Path | None, step: int
) -> tuple[Metrics, Metrics]:
    """Write what the run is made of. -> metrics.jsonl and samples.jsonl, cut back to the step of the
    checkpoint `found`. Rank 0 calls it."""
    folder = cfg.folder
    # first, so that a kill between the two does not lose an accepted change
    record.write()
    save(cfg, folder)
    if (commit := commit_of(start)) and not (folder / "base.json").is_file():
        note = json.dumps({"model": cfg.model, "revision": commit}, indent=1)
        write_whole(folder / "base.json", note + "\n")
    path = folder / "metrics.jsonl"
    logs = Metrics(path), Metrics(folder / "samples.jsonl")
    for log in logs:
        log.resume(step if found else -1)
    if found:
        # a kill may have come before old checkpoints were removed
        checkpoint.prune(found, cfg.save.keep)
        rows = read(path)
        if (last := max((row["step"] for row in rows), default=0)) < step:
            what = f"{path} ends at step {last}, the checkpoint is of step {step}"
            tqdm.write(f"{what}. The lines between are lost; the weights are complete", file=sys.stderr)
        for row in record.unwritten(rows, step):
            logs[0].write(row)
    return logs
