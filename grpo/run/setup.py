"""Everything a run holds before its first step: the folder, the policy, the questions. `open_run` makes it,
or finds it again.

A run that was stopped goes on with the same command: the newest undamaged checkpoint gives weights, optimizer
and step; metrics.jsonl and samples.jsonl are cut back to that step; the rest is a function of (seed, step).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data.chat import Chat
from data.sources.table import open_source
from grpo.config.parse import Config, check_same_run, save
from grpo.gradient import TokenBudget
from grpo.logprobs import chunk_of
from grpo.optim import Optimizer
from grpo.parallel import fsdp
from grpo.parallel.ranks import Ranks, gather_objects, use_bfloat16, wait_for_all, wait_for_main
from grpo.rewards.rules import rule
from grpo.storage import checkpoint
from grpo.storage.atomic import write_whole
from grpo.storage.jsonl import Metrics, read
from grpo.storage.model_folder import model_folder
from models import weights
from models.config import ModelConfig


@dataclass
class Run:
    """What the training loop works with."""

    folder: Path
    # the model folder it started from: tokenizer and processor files
    base: Path
    policy: torch.nn.Module
    reference: torch.nn.Module | None
    optimizer: Optimizer
    budget: TokenBudget
    chat: Chat
    examples: Sequence
    # {name of the set: its examples}; "heldout" is the one watched while training
    heldout: dict[str, list]
    metrics: Metrics
    samples: Metrics
    # optimizer steps done
    step: int


def base_of(cfg: Config, ranks: Ranks) -> Path:
    """The folder of the base. A hub model's commit is written down when a run begins, and whoever goes on
    with the run gets that one: a branch may have moved since.

    Raises ValueError.
    """
    if cfg.init:
        return Path(cfg.init).parent
    note, commit = cfg.folder / "base.json", None
    # it asks first, so that all ranks get one commit
    if ranks.main:
        commit = json.loads(note.read_text("utf-8"))["revision"] if note.is_file() else None
        found = model_folder(cfg.model, commit or cfg.revision)
        # of the hub's cache: a folder a commit
        if not note.is_file() and found.parent.name == "snapshots":
            commit = found.name
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, json.dumps({"model": cfg.model, "revision": commit}, indent=1) + "\n")
    wait_for_main("the model")
    commit = gather_objects([commit] if ranks.main else [])[0]
    return found if ranks.main else model_folder(cfg.model, commit or cfg.revision)


def freeze(policy: torch.nn.Module, parts: Sequence[str]) -> None:
    """Train all but these parts, before the optimizer is made. vision: the tower and its merger; llm:
    everything else."""
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(("vision" if name.startswith("visual.") else "llm") not in parts)


def frozen(reference: torch.nn.Module, use_bfloat16: bool) -> torch.nn.Module:
    """A policy that is never trained, in place. use_bfloat16: products are in it, so its matrices are kept in
    it.

    That changes nothing that the hub's models compute, whose weights are bfloat16: a product casts them there
    in any case, and norms and biases stay as they are.
    """
    for parameter in reference.requires_grad_(False).parameters():
        if use_bfloat16 and parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16()
    return reference


def open_run(cfg: Config, ranks: Ranks) -> Run:
    """Make the run folder or find it again, load the policy and the questions. Raises ValueError and
    CheckpointError with one clear line."""
    folder = cfg.folder
    check_same_run(cfg, folder)
    for name in cfg.rewards if cfg.method == "grpo" else ():
        # a wrong name is found before anything is written
        rule(name, cfg.cap)
    # rank 0 looks for all
    found, line = gather_objects([checkpoint.newest(folder)] if ranks.main else [])[0]
    if line and found is None:
        raise checkpoint.CheckpointError(line)
    if line and ranks.main:
        tqdm.write(line, file=sys.stderr)
    base = base_of(cfg, ranks)
    chat = Chat(
        base,
        template=cfg.template,
        max_prompt=cfg.max_prompt,
        min_pixels=cfg.min_pixels,
        max_pixels=cfg.max_pixels,
    )
    examples, heldout = open_source(cfg.task, cfg.data, limit=cfg.limit, seed=cfg.seed, items=cfg.eval.items)

    if found:
        policy = weights.load(found, device=ranks.device)
    elif cfg.init:
        policy = weights.init(ModelConfig.from_folder(cfg.init), seed=cfg.seed).to(ranks.device)
    else:
        policy = weights.load(base, device=ranks.device)
    policy.recompute = policy.visual.recompute = cfg.recompute
    freeze(policy, cfg.freeze)
    cut = cfg.shard == "always" or (cfg.shard == "auto" and ranks.size > 1 and cfg.optim.name != "muon")
    if cut:
        fsdp.shard(policy, ranks, use_bfloat16(ranks, cfg.dtype))
    o = cfg.optim
    optimizer = Optimizer(policy, name=o.name, lr=o.lr, beta2=o.beta2, weight_decay=o.weight_decay)
    step = checkpoint.load_optimizer(found, policy, optimizer) if found else 0
    reference = None
    if cfg.method == "grpo" and cfg.loss.kl_coef:
        # of several ranks, each keeps its part where it is used
        on = ranks.device if cut or cfg.loss.reference_on == "device" else "cpu"
        reference = frozen(weights.load(base, device=on), use_bfloat16(ranks, cfg.dtype))
        if cut:
            fsdp.shard(reference, ranks, use_bfloat16(ranks, cfg.dtype))

    metrics, samples = (
        Metrics(folder / name if ranks.main else None) for name in ("metrics.jsonl", "samples.jsonl")
    )
    if ranks.main:
        folder.mkdir(parents=True, exist_ok=True)
        save(cfg, folder)
        for log in (metrics, samples):
            log.resume(step if found else -1)
        if found:
            # a kill may have come before that
            checkpoint.prune(found, cfg.save.keep)
            if (last := max((row["step"] for row in read(metrics.path)), default=0)) < step:
                tqdm.write(
                    f"{metrics.path} ends at step {last}, the checkpoint at {step}: the lines between "
                    "are lost, the weights are as they were",
                    file=sys.stderr,
                )
    wait_for_all()
    budget = TokenBudget(
        cfg.loss.micro_tokens,
        chunk_of(policy.config.vocab_size, cfg.loss.logits_mib, ranks.device.type),
        ranks.device,
    )
    return Run(
        folder, base, policy, reference, optimizer, budget, chat, examples, heldout, metrics, samples, step
    )
