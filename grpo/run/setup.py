"""Everything a run holds before its first step: the folder, the policy, the questions. `open_run` makes it,
or finds it again.

A run that was stopped goes on with the same command: the newest undamaged checkpoint gives weights, optimizer
and step; metrics.jsonl and samples.jsonl are cut back to that step; the rest is a function of (seed, step).
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from tqdm import tqdm

from data.chat import Chat
from data.order import indices_at
from data.sources import hub
from data.sources.table import open_source
from data.types import BadExample
from grpo.config.parse import Config, check_same_run, save
from grpo.optim import Optimizer
from grpo.parallel import fsdp
from grpo.parallel.ranks import Ranks, gather_objects, use_bfloat16, wait_for_all
from grpo.rewards.rules import rule
from grpo.storage import checkpoint
from grpo.storage.atomic import write_whole
from grpo.storage.jsonl import Metrics, read
from models import weights
from models.config import ModelConfig

BUILT_IN = Path(__file__).parent.parent.parent / "models" / "tiny"
# steps whose questions are tried before a run gives up
LATER = 4
# of a hub model: no pickles, no code
HUB_FILES = ("*.safetensors", "*.json", "merges.txt", "chat_template.jinja")


@dataclass
class Run:
    """What the training loop works with."""

    folder: Path
    # the model folder it started from: tokenizer and processor files
    base: Path
    policy: torch.nn.Module
    reference: torch.nn.Module | None
    optimizer: Optimizer
    chat: Chat
    examples: Sequence
    # {name of the set: its examples}; "heldout" is the one watched while training
    heldout: dict[str, list]
    metrics: Metrics
    samples: Metrics
    # optimizer steps done
    step: int


def model_folder(name: str, revision: str | None = None, files: Sequence[str] = HUB_FILES) -> Path:
    """The folder of a model: "tiny" is built in, a run folder gives its newest undamaged checkpoint, and what
    is no folder here may be a model of the hub.

    revision, files: of a hub model, which is fetched once (`data/sources/hub.py`); of a checkpoint, the files
    that have to be as they were written. Raises ValueError.
    """

    def wanted(name: str) -> bool:
        return not name.startswith("optimizer") and any(fnmatch(name, pattern) for pattern in files)

    if name == "tiny":
        return BUILT_IN
    folder = Path(name)
    if (folder / "checkpoints").is_dir():
        found, line = checkpoint.newest(folder, wanted)
        if found is None:
            raise ValueError(line or f"{folder}: a run folder without a complete checkpoint")
        if line:
            tqdm.write(line, file=sys.stderr)
        return found
    if not folder.exists() and (named := hub.parts_of(name)) and not named[2]:
        try:
            return hub.snapshot(named[0], files, "model", named[1] or revision)
        except hub.HubError as error:
            raise ValueError(f"model {name!r}: there is no such folder, and from the hub: {error}") from error
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model {name!r}: no config.json in {folder.absolute()}; give a folder in Hugging Face layout, a "
            "run folder, 'tiny', "
            "or a model of the hub such as Qwen/Qwen2-VL-2B"
        )
    if (folder / "state.json").is_file() and (wrong := checkpoint.damage(folder, wanted)):
        raise ValueError(
            f"damaged: {folder / wrong}; take another checkpoint, or remove state.json if the change is yours"
        )
    return folder


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


@contextmanager
def on_device(reference: torch.nn.Module, device: torch.device) -> Iterator[torch.nn.Module]:
    """The reference on a device for as long as the context lasts. One that is kept on the host is copied
    there, and the copy forgotten afterwards."""
    home = {
        parameter: parameter.data
        for parameter in reference.parameters()
        if parameter.device.type != device.type
    }
    for parameter, data in home.items():
        parameter.data = data.to(device)
    try:
        yield reference
    finally:
        for parameter, data in home.items():
            parameter.data = data


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
    return Run(folder, base, policy, reference, optimizer, chat, examples, heldout, metrics, samples, step)


def chosen_prompts(run: Run, cfg: Config, ranks: Ranks, step: int, round: int = 0) -> tuple[list, list, int]:
    """This rank's share of the questions of a step. → (examples, prompts, how many were skipped). A skipped
    one is named on the terminal.

    A rank may have none; where no rank has any, all take the next step's as well. Raises ValueError if that
    goes on for LATER steps.
    round: of dynamic sampling; from the second on, what the step has asked already is left out, and there may
    be nothing left.
    """
    count = min(cfg.prompts, len(run.examples))
    examples, prompts, skipped = [], [], []
    before = {
        index
        for earlier in range(round)
        for index in indices_at(step, len(run.examples), count, cfg.seed, earlier)
    }
    for later in range(1 if round else LATER):
        for index in ranks.share(indices_at(step + later, len(run.examples), count, cfg.seed, round)):
            if index in before:
                continue
            try:
                example = run.examples[index]
                prompts.append(run.chat.prompt(example, blind=cfg.blind))
                examples.append(example)
            except BadExample as error:
                skipped.append(error)
                tqdm.write(f"step {step + 1}: skipped {error}", file=sys.stderr)
        if round or any(gather_objects([bool(prompts)])):
            return examples, prompts, len(skipped)
    reasons = gather_objects([str(error) for error in skipped])
    raise ValueError(
        f"step {step + 1}: none of {len(reasons)} questions could be asked; the last: {reasons[-1]}"
    )
