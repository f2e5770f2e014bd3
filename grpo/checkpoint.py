"""Checkpoints: complete or invisible, and complete means that the run goes on from one bit for bit.

runs/<name>/checkpoints/step_000050/ is a Hugging Face folder (config, tokenizer, safetensors), so it loads in `transformers` and in evaluate.py as it is, with
optimizer.safetensors and state.json beside it. It is written to step_000050.tmp, flushed to the disk, and renamed. There is no generator state to save: the
randomness of step n is a function of (seed, n), so {weights, optimizer, step} is all there is.
"""
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from grpo.optim import Optimizer
from models import weights

SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json", "chat_template.json", "chat_template.jinja",
              "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json", "video_preprocessor_config.json")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, and what to do."""


def save(run: Path, step: int, policy: nn.Module, optimizer: Optimizer, *, base: Path, keep: int) -> Path:
    """Write run/checkpoints/step_NNNNNN and remove all but the newest `keep` (0: keep all). → the folder.

    base: the folder whose tokenizer and processor files go along.  Raises CheckpointError (a full disk, say); older checkpoints are then as they were.
    """
    folder = run / "checkpoints" / f"step_{step:06d}"
    aside = folder.with_suffix(".tmp")
    needed = sum(p.numel() * p.element_size() for p in policy.parameters()) * 3
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        if free < needed:
            raise OSError(f"{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free")
        aside.mkdir()
        weights.save(policy, aside)
        for name in SIDE_FILES:
            if (base / name).exists():
                shutil.copyfile(base / name, aside / name)
        save_file(optimizer_tensors(policy, optimizer), aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps({"step": step}) + "\n")
        for path in (*aside.iterdir(), aside):
            flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:                       # safetensors reports a full disk as its own error
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"could not save step {step} to {folder}: {error}. Free some space or choose another out=DIR; "
                              "the same command then goes on from the last checkpoint.") from error
    for old in complete(run)[:-keep] if keep else []:
        shutil.rmtree(old)
    return folder


def flush(path: Path) -> None:
    """Make sure that a file or folder is on the disk, not only in memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def complete(run: Path) -> list[Path]:
    """The checkpoints of a run folder that were written to the end, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step_??????") if (p / "state.json").exists())


def optimizer_tensors(policy: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state under the parameters' names, such as "model.norm.weight/exp_avg"."""
    return {f"{name}/{key}": value.detach().cpu().contiguous() for name, p in policy.named_parameters() for key, value in optimizer.state(p).items()}


def load_optimizer(folder: Path, policy: nn.Module, optimizer: Optimizer) -> int:
    """Put the saved state into `optimizer`. → the step it was saved after. Raises CheckpointError where the files are damaged or of another model."""
    try:
        step = int(json.loads((folder / "state.json").read_text())["step"])
        saved = load_file(folder / "optimizer.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged ({error}); remove that folder to go on from the one before") from error
    states: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in saved.items():
        name, _, what = key.rpartition("/")
        states.setdefault(name, {})[what] = value
    for name, p in policy.named_parameters():
        if p.requires_grad and step:
            try:
                optimizer.set_state(p, states.pop(name, {}))
            except ValueError as error:
                raise CheckpointError(f"{folder / 'optimizer.safetensors'}: {name}: {error}; remove that folder to go on from the one before") from error
    if states:
        raise CheckpointError(f"{folder / 'optimizer.safetensors'}: holds the state of {min(states)}, which is not trained; "
                              "remove that folder to go on from the one before")
    return step
