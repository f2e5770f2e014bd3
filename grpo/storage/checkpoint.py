"""Checkpoints: complete or invisible, and complete means that the run goes on from one bit for bit.

runs/<name>/checkpoints/step_000050/ is a Hugging Face folder (config, tokenizer, safetensors), so it loads in
`transformers` and in evaluate.py as it is, with optimizer.safetensors and state.json beside it. It is written
to step_000050.tmp, flushed to the disk, read back, and renamed. state.json holds the size and a checksum of
every file, so that a damaged checkpoint is named instead of trained on, and the one before it is used. There
is no generator state to save: the randomness of step n is a function of (seed, n), so {weights, optimizer,
step} is all there is.

Of several ranks, each writes its share of the files of weights, which are the same for any number of ranks,
and its piece of the optimizer's state (optimizer-00002-of-00004.safetensors); any number of ranks reads them
again (grpo/storage/sharded.py). All of it can happen in a thread while training goes on
(grpo/storage/background.py). No paper has this; it is plumbing.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from grpo.optim import Optimizer
from grpo.storage import sharded
from grpo.storage.background import Background
from grpo.storage.snapshot import Snapshot, take
from models import weights

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "video_preprocessor_config.json",
)
# of the run: a checkpoint's step is in them, on the disk, before the checkpoint is
LOGS = ("metrics.jsonl", "samples.jsonl")
# bytes: config.json, state.json and the headers of safetensors, generously
HEADERS = 1_000_000


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, and what to do."""


def save(
    run: Path,
    step: int,
    policy: nn.Module,
    optimizer: Optimizer,
    *,
    base: Path,
    keep: int,
    background: Background | None = None,
) -> Path:
    """Write run/checkpoints/step_NNNNNN, and when it is whole on the disk remove all but the newest `keep`
    (0: keep all). Every rank calls it. → the folder.

    base: the folder whose tokenizer and processor files go along.  background: returns as soon as the state
    is copied, and has the rest done while training goes on. Raises CheckpointError (a full disk, say), with a
    background that of the save before; older checkpoints are then as they were.
    """
    if background is None:
        return write(run, step, take(policy, optimizer), base=base, keep=keep)
    # one at a time: the copy is still being written
    background.wait()
    background.start(
        partial(
            write,
            run,
            step,
            take(policy, optimizer, background.memory),
            base=base,
            keep=keep,
            group=background.group,
        )
    )
    return run / "checkpoints" / f"step_{step:06d}"


def write(run: Path, step: int, state: Snapshot, *, base: Path, keep: int, group=None) -> Path:
    """What `save` does with the state, once taken.  group: the ranks' process group for it; None: the
    default one."""
    save = Save(run, step, state, base)
    try:
        if state.ranks == 1:
            save.begin()
            save.finish([save.part(state.optimizer)])
        else:
            sharded.write(
                state.tensors, state.optimizer, sharded.Parts(save.begin, save.part, save.finish), group
            )
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as its own error
        if state.rank == 0:
            shutil.rmtree(save.aside, ignore_errors=True)
        raise CheckpointError(
            f"could not save step {step} to {save.folder}: {error}. Free some space or choose another "
            "out=DIR; "
            "the same command then goes on from the last checkpoint."
        ) from error
    if state.rank == 0:
        prune(save.folder, keep)
    return save.folder


class Save:
    """The three parts of writing a checkpoint: rank 0 begins, every rank writes what is its own, rank 0
    makes it visible. They raise OSError or SafetensorError."""

    def __init__(self, run: Path, step: int, state: Snapshot, base: Path):
        self.run, self.step, self.state = run, step, state
        self.folder = run / "checkpoints" / f"step_{step:06d}"
        self.aside = self.folder.with_suffix(".tmp")
        self.side = [base / name for name in SIDE_FILES if (base / name).exists()]

    def begin(self) -> None:
        """Make a place for it, if there is room."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        tidy(self.run)
        needed = (
            self.state.bytes + sum(path.stat().st_size for path in self.side) + HEADERS * self.state.ranks
        )
        free = shutil.disk_usage(self.folder.parent).free
        if free < needed:
            raise OSError(f"{needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
        self.aside.mkdir()

    def part(self, optimizer: dict[str, Tensor], header: dict[str, str] | None = None) -> dict[str, dict]:
        """Write what is this rank's: files of weights, its piece of the optimizer, and the side files if
        it is the first. → size and checksum of each, on the disk."""
        rank, ranks = self.state.rank, self.state.ranks
        if not self.aside.is_dir():
            raise OSError(
                f"{self.aside}, made by rank 0, is not there; out=DIR has to be on a file system that "
                "all ranks share"
            )
        paths = weights.save(self.state.policy, self.aside)
        if rank == 0:
            paths += [Path(shutil.copyfile(path, self.aside / path.name)) for path in self.side]
        paths.append(
            self.aside
            / (
                "optimizer.safetensors"
                if ranks == 1
                else f"optimizer-{rank + 1:05}-of-{ranks:05}.safetensors"
            )
        )
        save_file(optimizer, paths[-1], header)
        files = {path.name: {"bytes": path.stat().st_size, "blake2b": checksum(path)} for path in paths}
        for path in paths:
            flush(path)
        if wrong := unlike(self.aside, files):
            raise OSError(f"the disk does not give back what was written: {wrong}")
        return files

    def finish(self, parts: list[dict[str, dict]]) -> None:
        """Write state.json and give the folder its name; the run's logs come first."""
        write_state(self.aside, self.step, {name: file for part in parts for name, file in part.items()})
        for path in (
            self.aside / "state.json",
            self.aside,
            *(self.run / name for name in LOGS if (self.run / name).exists()),
        ):
            flush(path)
        # state.json; each rank has read its own files
        if wrong := damage(self.aside, lambda name: False):
            raise OSError(f"the disk does not give back what was written: {wrong}")
        # a damaged one, or it would have been gone on from
        if self.folder.exists():
            remove(self.folder)
        os.replace(self.aside, self.folder)
        flush(self.folder.parent)


def write_state(folder: Path, step: int, files: dict[str, dict]) -> None:
    """Write state.json: the step, the size and checksum of every other file, and a checksum of all that."""
    state = {"step": step, "files": dict(sorted(files.items()))}
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
    """Make sure that a file or folder is on the disk, not only in memory; who reads it next reads it from
    there, where the system knows how."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints (0: keep all) up to this one, which is whole. What is
    newer is damaged: the run went on from an older one."""
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
    """Take a checkpoint away. It is renamed first, so that a kill does not leave half of one behind under
    its name."""
    aside = path if path.suffix == ".tmp" else path.with_suffix(".old.tmp")
    if aside != path:
        os.replace(path, aside)
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def folders(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first, whatever state they are in."""
    return sorted(p for p in (run / "checkpoints").glob("step_??????") if p.is_dir())


def complete(run: Path) -> list[Path]:
    """The checkpoints of a run folder that were written to the end, oldest first; `newest` also looks
    whether they are still as they were written."""
    return [p for p in folders(run) if (p / "state.json").exists()]


def newest(run: Path, wanted: Callable[[str], bool] = bool) -> tuple[Path | None, str]:
    """→ (the newest undamaged checkpoint of a run, what is to be said about damaged ones). wanted: as in
    `damage`.

    (None, "") where there is no checkpoint; (None, a line that says what to do) where all are damaged.
    """
    wrongs = []
    for folder in reversed(folders(run)):
        if not (wrong := damage(folder, wanted)):
            return (
                folder,
                (
                    f"damaged: {'; '.join(wrongs)}. Going on from {folder.name}, the newest that is as it "
                    "was written"
                )
                if wrongs
                else "",
            )
        wrongs.append(f"{folder / wrong}")
    return (
        None,
        (
            f"damaged: {'; '.join(wrongs)}. No checkpoint is left to go on from; remove "
            f"{run / 'checkpoints'} to start anew"
        )
        if wrongs
        else "",
    )


def damage(folder: Path, wanted: Callable[[str], bool] = bool) -> str:
    """What is wrong with the first file of a checkpoint that is not as it was written, "" if all are.
    wanted: of a file's name, whether it is looked at."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        # saved before there were checksums
        if state.keys() == {"step"} and isinstance(state["step"], int):
            return ""
        if state.pop("blake2b") != signature(state):
            raise ValueError("its own checksum is wrong")
    except FileNotFoundError:
        return "state.json is missing"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"state.json: {error}"
    return unlike(folder, {name: written for name, written in state["files"].items() if wanted(name)})


def unlike(folder: Path, files: dict[str, dict]) -> str:
    """What is wrong with the first file that has not the size and checksum given for it, "" if all have."""
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
    """Put the saved state into `optimizer`, by however many ranks it was saved. Every rank calls it. → the
    step it was saved after.

    Raises CheckpointError where the files are damaged or of another model.
    """
    try:
        step = int(json.loads((folder / "state.json").read_text())["step"])
        states = {
            name: (p, optimizer.blank_state(p))
            for name, p in policy.named_parameters()
            if p.requires_grad and step
        }
        sharded.read(
            folder,
            {f"{name}/{key}": tensor for name, (_, state) in states.items() for key, tensor in state.items()},
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"the optimizer's state in {folder} can't be used: {error}; remove that folder to go on from "
            "the one before"
        ) from error
    for p, state in states.values():
        optimizer.set_state(p, state)
    return step
