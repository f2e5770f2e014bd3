"""Checkpoints: complete or invisible, and complete means that the run goes on from one bit for bit.

runs/<name>/checkpoints/step_000050/ is a Hugging Face folder (config, tokenizer, safetensors), so it loads in `transformers` and in evaluate.py as it is, with
optimizer.safetensors and state.json beside it. It is written to step_000050.tmp, flushed to the disk, read back, and renamed. state.json holds the size and a
checksum of every file, so that a damaged checkpoint is named instead of trained on, and the one before it is used. There is no generator state to save: the
randomness of step n is a function of (seed, n), so {weights, optimizer, step} is all there is. No paper has this; it is plumbing.
"""
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from grpo.optim import Optimizer
from models import weights

SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json", "chat_template.json", "chat_template.jinja",
              "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json", "video_preprocessor_config.json")
LOGS = ("metrics.jsonl", "samples.jsonl")       # of the run: a checkpoint's step is in them, on the disk, before the checkpoint is
HEADERS = 1_000_000                             # bytes: config.json, state.json and the headers of safetensors, generously


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, and what to do."""


def save(run: Path, step: int, policy: nn.Module, optimizer: Optimizer, *, base: Path, keep: int) -> Path:
    """Write run/checkpoints/step_NNNNNN, and when it is whole on the disk remove all but the newest `keep` (0: keep all). → the folder.

    base: the folder whose tokenizer and processor files go along.  Raises CheckpointError (a full disk, say); older checkpoints are then as they were.
    """
    folder = run / "checkpoints" / f"step_{step:06d}"
    aside = folder.with_suffix(".tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tidy(run)
        side = [base / name for name in SIDE_FILES if (base / name).exists()]
        needed, free = size(policy, optimizer) + sum(path.stat().st_size for path in side) + HEADERS, shutil.disk_usage(folder.parent).free
        if free < needed:
            raise OSError(f"{needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
        aside.mkdir()
        weights.save(policy, aside)
        for path in side:
            shutil.copyfile(path, aside / path.name)
        save_file(optimizer_tensors(policy, optimizer), aside / "optimizer.safetensors")
        write_state(aside, step)
        for path in (*aside.iterdir(), aside, *(run / name for name in LOGS if (run / name).exists())):
            flush(path)
        if wrong := damage(aside):
            raise OSError(f"the disk does not give back what was written: {wrong}")
        if folder.exists():                                           # a damaged one, or it would have been gone on from
            remove(folder)
        os.replace(aside, folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:                       # safetensors reports a full disk as its own error
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"could not save step {step} to {folder}: {error}. Free some space or choose another out=DIR; "
                              "the same command then goes on from the last checkpoint.") from error
    prune(folder, keep)
    return folder


def size(policy: nn.Module, optimizer: Optimizer) -> int:
    """The bytes of the tensors of a checkpoint."""
    return sum(tensor.nbytes for tensor in (*policy.state_dict().values(), *(value for p in policy.parameters() for value in optimizer.state(p).values())))


def write_state(folder: Path, step: int) -> None:
    """Write state.json: the step, the size and checksum of every other file, and a checksum of all that."""
    state = {"step": step, "files": {path.name: {"bytes": path.stat().st_size, "blake2b": checksum(path)} for path in sorted(folder.iterdir())}}
    (folder / "state.json").write_text(json.dumps(state | {"blake2b": signature(state)}, indent=1) + "\n")


def signature(state: dict) -> str:
    """The checksum of what state.json says."""
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()


def checksum(path: Path) -> str:
    """BLAKE2b of a file, 16 bytes in hexadecimal."""
    found = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def flush(path: Path) -> None:
    """Make sure that a file or folder is on the disk, not only in memory; who reads it next reads it from there, where the system knows how."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints (0: keep all) up to this one, which is whole. What is newer is damaged: the run went on from an older one."""
    run = folder.parent.parent
    upto = [old for old in folders(run) if old.name <= folder.name]
    for old in upto[:-keep] if keep else []:
        remove(old)
    tidy(run)


def tidy(run: Path) -> None:
    """Remove what a save or a removal that was killed left half done."""
    for left in (run / "checkpoints").glob("*.tmp"):
        remove(left)


def remove(path: Path) -> None:
    """Take a checkpoint away. It is renamed first, so that a kill does not leave half of one behind under its name."""
    aside = path if path.suffix == ".tmp" else path.with_suffix(".old.tmp")
    if aside != path:
        os.replace(path, aside)
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def folders(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first, whatever state they are in."""
    return sorted(p for p in (run / "checkpoints").glob("step_??????") if p.is_dir())


def complete(run: Path) -> list[Path]:
    """The checkpoints of a run folder that were written to the end, oldest first; `newest` also looks whether they are still as they were written."""
    return [p for p in folders(run) if (p / "state.json").exists()]


def newest(run: Path, wanted: Callable[[str], bool] = bool) -> tuple[Path | None, str]:
    """→ (the newest undamaged checkpoint of a run, what is to be said about damaged ones). wanted: as in `damage`.

    (None, "") where there is no checkpoint; (None, a line that says what to do) where all are damaged.
    """
    wrongs = []
    for folder in reversed(folders(run)):
        if not (wrong := damage(folder, wanted)):
            return folder, f"damaged: {'; '.join(wrongs)}. Going on from {folder.name}, the newest that is as it was written" if wrongs else ""
        wrongs.append(f"{folder / wrong}")
    return None, f"damaged: {'; '.join(wrongs)}. No checkpoint is left to go on from; remove {run / 'checkpoints'} to start anew" if wrongs else ""


def damage(folder: Path, wanted: Callable[[str], bool] = bool) -> str:
    """What is wrong with the first file of a checkpoint that is not as it was written, "" if all are.  wanted: of a file's name, whether it is looked at."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        if state.keys() == {"step"} and isinstance(state["step"], int):         # saved before there were checksums
            return ""
        if state.pop("blake2b") != signature(state):
            raise ValueError("its own checksum is wrong")
    except FileNotFoundError:
        return "state.json is missing"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"state.json: {error}"
    for name, written in state["files"].items():
        path = folder / name
        if not wanted(name):
            continue
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != written["bytes"]:
            return f"{name} has {found} bytes, {written['bytes']} were written"
        if checksum(path) != written["blake2b"]:
            return f"{name} has other content than was written"
    return ""


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
