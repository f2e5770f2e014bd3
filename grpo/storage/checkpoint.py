"""Checkpoints: complete or invisible. From a complete one the run continues bit for bit.

runs/<name>/checkpoints/step_000050/ is a Hugging Face folder (config, tokenizer, safetensors), with
optimizer.safetensors and state.json beside it; of a LoRA run, an adapter instead of the weights
(grpo/storage/adapter.py). `transformers` and evaluate.py load it. It is written to
step_000050.tmp, flushed to disk, read back, and renamed. state.json holds the size and a checksum of each
file, so that a damaged checkpoint is named and the one before it is used. The randomness of step n is a
function of (seed, n), so {weights, optimizer, step} is the whole state.

With several ranks, each writes its share of the weight files, which are the same for any number of ranks, and
its shards of the optimizer's state (optimizer-00002-of-00004.safetensors). Any number of ranks reads them
(grpo/storage/sharded.py). A thread can write while training goes on (grpo/storage/background.py).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from grpo.optim import Optimizer
from grpo.parallel.ranks import wait_for_all
from grpo.storage import adapter, sharded
from grpo.storage.background import Background
from grpo.storage.snapshot import Snapshot, take
from models import weights
from models.qwen_vl import QwenVL
from models.weights import save_file

SIDE_FILES = """tokenizer.json tokenizer_config.json generation_config.json preprocessor_config.json
processor_config.json video_preprocessor_config.json chat_template.json chat_template.jinja
special_tokens_map.json vocab.json merges.txt added_tokens.json trained_with.json""".split()
# logs of the run; they are on disk before the checkpoint is visible, so they hold its step
LOGS = ("metrics.jsonl", "samples.jsonl")
# bytes per rank, an upper bound of config.json, state.json and the headers of safetensors
HEADERS = 1_000_000


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. The message says which one, and what to do."""


def save(
    run: Path,
    step: int,
    policy: QwenVL,
    optimizer: Optimizer,
    *,
    base: Path,
    keep: int,
    background: Background | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write run/checkpoints/step_NNNNNN, then remove all but the newest `keep` checkpoints (0: keep all).
    Every rank calls it. -> the folder.

    base: the folder of the tokenizer and processor files.  background: if given, return when the state is
    copied, and write while training goes on.  files: {name: text} of files in place of those of `base`, or
    beside them.  Raises CheckpointError (for example, a full disk); with a
    background it may be the error of the save before. Older checkpoints are then untouched.
    """
    if background is None:
        return write(run, step, take(policy, optimizer), base=base, keep=keep, files=files)
    # the copy of the save before is still being written
    background.wait()
    state = take(policy, optimizer, background.memory)
    how = {"base": base, "keep": keep, "group": background.group, "files": files}
    background.start(partial(write, run, step, state, **how))
    return run / "checkpoints" / f"step_{step:06d}"


def write(run: Path, step: int, state: Snapshot, *, base: Path, keep: int, group=None, files=None) -> Path:
    """Write a snapshot as `save` does.  group: process group of all ranks; None: the default one."""
    writer = CheckpointWriter(run, step, state, base, files)
    try:
        if state.ranks == 1:
            writer.begin()
            writer.finish([writer.part(state.optimizer)])
        else:
            steps = sharded.ShardWriter(writer.begin, writer.part, writer.finish)
            sharded.write(state.tensors, state.optimizer, steps, group)
    except (OSError, SafetensorError) as error:
        # safetensors has its own error for a full disk
        if state.rank == 0:
            shutil.rmtree(writer.aside, ignore_errors=True)
        raise CheckpointError(
            f"could not save step {step} to {writer.folder}: {error}. Free some space or choose another "
            "out=DIR; the same command then goes on from the last checkpoint."
        ) from error
    if state.rank == 0:
        prune(writer.folder, keep)
    return writer.folder


def write_side_files(base: Path, folder: Path, files: Mapping[str, str] | None) -> list[Path]:
    """Write the files of tokenizer and processor into a folder. files: {name: text} of others, in place of
    the base's. -> the files."""
    texts = files or {}
    # beside a new chat template the one in an older kind of file would be another one
    left = {*texts, *(["chat_template.json"] if "chat_template.jinja" in texts else [])}
    names = [name for name in SIDE_FILES if (base / name).exists() and name not in left]
    for name in names:
        shutil.copyfile(base / name, folder / name)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in (*names, *texts)]


def save_weights(
    run: Path,
    step: int,
    policy: QwenVL,
    *,
    base: Path,
    dtype: torch.dtype,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write run/weights/step_NNNNNN: the policy in `dtype` and the side files, nothing to go on from. Every
    rank calls it, and each writes its share of the files. -> the folder. Raises CheckpointError."""
    rank, ranks = sharded.ranks()
    folder = run / "weights" / f"step_{step:06d}"
    aside = folder.with_suffix(".tmp")
    # a file of the saved type has as many tensors as one of twice its bytes in float32
    size = weights.SHARD_BYTES * torch.float32.itemsize / dtype.itemsize
    onto_cpu = lambda name, tensor: tensor.detach().to("cpu", dtype, copy=True)
    copy = adapter.copy(policy, rank, ranks, onto_cpu, max_shard_bytes=size).to(dtype)
    try:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        wait_for_all()
        paths = adapter.write(copy, aside, base)
        if rank == 0:
            paths += write_side_files(base, aside, files)
        for path in paths:
            flush(path)
        wait_for_all()
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
            flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not save the weights of step {step} to {folder}: {error}") from error
    return folder


class CheckpointWriter:
    """The three steps of writing a checkpoint: `begin` on rank 0, `part` on each rank, `finish` on rank 0.
    They raise OSError or SafetensorError."""

    def __init__(
        self, run: Path, step: int, state: Snapshot, base: Path, files: Mapping[str, str] | None = None
    ):
        self.run = run
        self.step = step
        self.state = state
        self.base = base
        self.folder = run / "checkpoints" / f"step_{step:06d}"
        self.aside = self.folder.with_suffix(".tmp")
        self.side = [base / name for name in SIDE_FILES if (base / name).exists()]
        self.base = base
        self.files = files

    def begin(self) -> None:
        """Make the folder if the disk has room."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        tidy(self.run)
        needed = self.state.bytes + HEADERS * self.state.ranks + sum(p.stat().st_size for p in self.side)
        if (free := shutil.disk_usage(self.folder.parent).free) < needed:
            raise OSError(f"{needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
        self.aside.mkdir()

    def part(self, optimizer: dict[str, Tensor], header: dict[str, str] | None = None) -> dict[str, dict]:
        """Write this rank's weight files and optimizer shards, and on rank 0 the side files. -> {name: size
        and checksum} of the files, which are on disk."""
        rank, ranks = self.state.rank, self.state.ranks
        if not self.aside.is_dir():
            why = "out=DIR has to be on a file system that all ranks share"
            raise OSError(f"{self.aside}, made by rank 0, is not there; {why}")
        paths = adapter.write(self.state.policy, self.aside, self.base)
        if rank == 0:
            paths += write_side_files(self.base, self.aside, self.files)
        shard = "" if ranks == 1 else f"-{rank + 1:05}-of-{ranks:05}"
        paths.append(self.aside / f"optimizer{shard}.safetensors")
        save_file(optimizer, paths[-1], header)
        files = {path.name: {"bytes": path.stat().st_size, "blake2b": checksum(path)} for path in paths}
        for path in paths:
            flush(path)
        if wrong := mismatch(self.aside, files):
            raise OSError(f"the disk does not give back what was written: {wrong}")
        return files

    def finish(self, parts: list[dict[str, dict]]) -> None:
        """Write state.json, flush the run's logs, and give the folder its name."""
        write_state(self.aside, self.step, {name: file for part in parts for name, file in part.items()})
        logs = [self.run / name for name in LOGS if (self.run / name).exists()]
        for path in (self.aside / "state.json", self.aside, *logs):
            flush(path)
        # state.json alone: each rank has checked its own files
        if wrong := damage(self.aside, lambda name: False):
            raise OSError(f"the disk does not give back what was written: {wrong}")
        if self.folder.exists():
            # a damaged one: the run continued from an older one
            remove(self.folder)
        os.replace(self.aside, self.folder)
        flush(self.folder.parent)


def write_state(folder: Path, step: int, files: dict[str, dict]) -> None:
    """Write state.json: the step, size and checksum of each other file, and a checksum of these."""
    state: dict = {"step": step, "files": dict(sorted(files.items()))}
    state["blake2b"] = state_checksum(state)
    (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n")


def state_checksum(state: dict) -> str:
    """BLAKE2b of the contents of state.json."""
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()


def checksum(path: Path) -> str:
    """BLAKE2b of a file, 16 bytes in hexadecimal."""
    found = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def flush(path: Path) -> None:
    """Flush a file or folder to disk. Where the system can, the next read comes from disk too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints (0: keep all) up to `folder`, which is complete. A newer
    one is damaged and stays until its step is written again."""
    run = folder.parent.parent
    upto = [old for old in folders(run) if old.name <= folder.name]
    for old in upto[:-keep] if keep else []:
        remove(old)
    tidy(run)


def tidy(run: Path) -> None:
    """Remove what a killed save or a killed removal left."""
    for left in (run / "checkpoints").glob("*.tmp"):
        remove(left)


def remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a kill leaves no half checkpoint of that name."""
    aside = path if path.suffix == ".tmp" else path.with_suffix(".old.tmp")
    if aside != path:
        os.replace(path, aside)
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def folders(run: Path) -> list[Path]:
    """All checkpoints of a run folder, oldest first, damaged ones too."""
    return sorted(p for p in (run / "checkpoints").glob("step_??????") if p.is_dir())


def complete(run: Path) -> list[Path]:
    """The completely written checkpoints of a run folder, oldest first. `newest` also checks their files."""
    return [p for p in folders(run) if (p / "state.json").exists()]


def newest(run: Path, wanted: Callable[[str], bool] = bool) -> tuple[Path | None, str]:
    """-> (newest undamaged checkpoint or None, a line about damaged ones or "").  wanted: see `damage`."""
    wrongs = []
    for folder in reversed(folders(run)):
        if not (wrong := damage(folder, wanted)):
            after = f"Going on from {folder.name}, the newest that is as it was written"
            return folder, f"damaged: {'; '.join(wrongs)}. {after}" if wrongs else ""
        wrongs.append(f"{folder / wrong}")
    after = f"No checkpoint is left to go on from; remove {run / 'checkpoints'} to start anew"
    return None, f"damaged: {'; '.join(wrongs)}. {after}" if wrongs else ""


def damage(folder: Path, wanted: Callable[[str], bool] = bool) -> str:
    """What is wrong with the first damaged file of a checkpoint, or "".  wanted: whether to check a name."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        # of a version without checksums
        if state.keys() == {"step"} and isinstance(state["step"], int):
            return ""
        if state.pop("blake2b") != state_checksum(state):
            raise ValueError("its own checksum is wrong")
    except FileNotFoundError:
        return "state.json is missing"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"state.json: {error}"
    return mismatch(folder, {name: written for name, written in state["files"].items() if wanted(name)})


def mismatch(folder: Path, files: dict[str, dict]) -> str:
    """What is wrong with the first file that has not its size and checksum, or ""."""
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != written["bytes"]:
            return f"{name} has {found} bytes, {written['bytes']} were written"
        if checksum(path) != written["blake2b"]:
            return f"{name} has other content than was written"
    return ""


def load_optimizer(folder: Path, policy: nn.Module, optimizer: Optimizer) -> int:
    """Load the state of `optimizer`, saved by any number of ranks. Every rank calls it. -> the step of the
    checkpoint. Raises CheckpointError if the files are damaged or of another model."""
    try:
        step = int(json.loads((folder / "state.json").read_text())["step"])
        trained = [(name, p) for name, p in policy.named_parameters() if p.requires_grad and step]
        states = [(name, p, optimizer.blank_state(p)) for name, p in trained]
        flat = {f"{name}/{key}": tensor for name, _, state in states for key, tensor in state.items()}
        sharded.read(folder, flat)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        what = f"the optimizer's state in {folder} can't be used: {error}"
        raise CheckpointError(f"{what}; remove that folder to go on from the one before") from error
    for _, p, state in states:
        optimizer.set_state(p, state)
    return step
