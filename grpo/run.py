"""Everything a run holds before its first step: the folder, the policy, the questions. `open_run` makes it, or finds it again.

A run that was stopped goes on with the same command: the newest complete checkpoint gives weights, optimizer and step; metrics.jsonl and samples.jsonl are cut
back to that step; the rest is a function of (seed, step).
"""
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data.chat import Chat
from data.order import indices_at
from data.sources import open_source
from data.types import BadExample
from grpo import checkpoint
from grpo.config import Config, check_same_run, save
from grpo.distributed import World, wait_for_all
from grpo.metrics import Metrics
from grpo.objective import choose
from grpo.optim import Optimizer
from grpo.rewards import REWARDS
from models import weights
from models.config import ModelConfig

BUILT_IN = Path(__file__).parent.parent / "models" / "tiny"
LATER = 4                       # steps whose questions are tried before a rank gives up


@dataclass
class Run:
    """What the training loop works with."""
    folder: Path
    base: Path                      # the model folder it started from: tokenizer and processor files
    policy: torch.nn.Module
    reference: torch.nn.Module | None
    optimizer: Optimizer
    chat: Chat
    examples: Sequence
    heldout: dict[str, list]        # {name of the set: its examples}; "heldout" is the one watched while training
    metrics: Metrics
    samples: Metrics
    step: int                       # optimizer steps done


def model_folder(name: str) -> Path:
    """The folder of a model: "tiny" is built in, a run folder gives its newest complete checkpoint. Raises ValueError."""
    if name == "tiny":
        return BUILT_IN
    folder = Path(name)
    if (folder / "checkpoints").is_dir():
        found = checkpoint.complete(folder)
        if not found:
            raise ValueError(f"{folder}: a run folder without a complete checkpoint")
        return found[-1]
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {name!r}: no config.json in {folder.absolute()}; give a folder in Hugging Face layout, a run folder, or 'tiny'")
    return folder


def open_run(cfg: Config, world: World) -> Run:
    """Make the run folder or find it again, load the policy and the questions. Raises ValueError and CheckpointError with one clear line."""
    folder = cfg.folder
    check_same_run(cfg, folder)
    for name in cfg.rewards if cfg.method == "grpo" else ():
        choose("reward", name, REWARDS)                 # a wrong name is found before anything is written
    found = checkpoint.complete(folder)
    base = Path(cfg.init).parent if cfg.init else model_folder(cfg.model)
    chat = Chat(base, template=cfg.template, max_prompt=cfg.max_prompt, min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels)
    examples, heldout = open_source(cfg.task, cfg.data, limit=cfg.limit, seed=cfg.seed, items=cfg.eval.items)
    if min(cfg.prompts, len(examples)) < world.size:
        raise ValueError(f"{min(cfg.prompts, len(examples))} prompts a step are too few for {world.size} ranks: each needs one; raise prompts")

    if found:
        policy = weights.load(found[-1], device=world.device)
    elif cfg.init:
        policy = weights.init(ModelConfig.from_folder(cfg.init), seed=cfg.seed).to(world.device)
    else:
        policy = weights.load(base, device=world.device)
    policy.recompute = policy.visual.recompute = cfg.recompute
    o = cfg.optim
    optimizer = Optimizer(policy, name=o.name, lr=o.lr, beta1=o.beta1, beta2=o.beta2, eps=o.eps, weight_decay=o.weight_decay, muon_scale=o.muon_scale)
    step = checkpoint.load_optimizer(found[-1], policy, optimizer) if found else 0
    reference = None
    if cfg.method == "grpo" and cfg.loss.kl_coef:
        reference = weights.load(base, device=world.device).requires_grad_(False)

    metrics, samples = (Metrics(folder / name if world.main else None) for name in ("metrics.jsonl", "samples.jsonl"))
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        save(cfg, folder)
        for log in (metrics, samples):
            log.resume(step if found else -1)
    wait_for_all()
    return Run(folder, base, policy, reference, optimizer, chat, examples, heldout, metrics, samples, step)


def chosen_prompts(run: Run, cfg: Config, world: World, step: int) -> tuple[list, list, int]:
    """This rank's share of the questions of a step, at least one. → (examples, prompts, how many were skipped). A skipped one is named on the terminal.

    A rank whose whole share was skipped takes that of the next step as well. Raises ValueError if that goes on for LATER steps.
    """
    count = min(cfg.prompts, len(run.examples))
    examples, prompts, skipped = [], [], []
    for later in range(LATER):
        for index in indices_at(step + later, len(run.examples), count, cfg.seed)[world.rank::world.size]:
            try:
                example = run.examples[index]
                prompts.append(run.chat.prompt(example, blind=cfg.blind))
                examples.append(example)
            except BadExample as error:
                skipped.append(error)
                tqdm.write(f"step {step + 1}: skipped {error}", file=sys.stderr)
        if prompts:
            return examples, prompts, len(skipped)
    raise ValueError(f"step {step + 1}: none of {len(skipped)} questions could be asked; the last: {skipped[-1]}")
