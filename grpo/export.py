"""A model to hand on:  python -m grpo.export MODEL OUT [--dtype bfloat16]

A checkpoint is a Hugging Face folder as it is, with the optimizer's state beside the weights, twice their
size. This writes one without it: config, weights, tokenizer and processor files, in float32 as trained, or in
half of that for serving. The checkpoint's checksums are looked at first, and OUT is there whole or not at
all.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from grpo.storage.checkpoint import SIDE_FILES, flush
from grpo.storage.model_folder import model_folder
from models import weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(model: str, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model folder. model: as in `model=`: a run folder (its newest undamaged checkpoint), a
    checkpoint, any other folder in Hugging Face layout, a hub model.

    The peak of memory is the model in `dtype`, and a file of its weights. Raises ValueError, or OSError with
    nothing written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; name a folder that is not")
    folder = model_folder(model)
    policy, aside = weights.load(folder, dtype=dtype), out.with_name(out.name + ".tmp")
    needed = sum(tensor.nbytes for tensor in policy.state_dict().values())
    aside.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(aside.parent).free) < needed:
        raise OSError(f"{out}: {needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
    # of an export that was killed
    shutil.rmtree(aside, ignore_errors=True)
    try:
        weights.save(policy, aside)
        for name in SIDE_FILES:
            if (folder / name).exists():
                shutil.copyfile(folder / name, aside / name)
        for path in (*aside.iterdir(), aside):
            flush(path)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def main(argv: list[str] | None = None) -> int:
    """→ exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo.export",
        description="Write a checkpoint as a model folder without the optimizer's state.",
    )
    parser.add_argument(
        "model", help="a run folder (its newest checkpoint), a checkpoint, or any model folder"
    )
    parser.add_argument("out", type=Path, help="the folder to write; it must not be there, or be empty")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="of the weights; bfloat16 is half the size, and rounds them",
    )
    asked = parser.parse_args(argv)
    try:
        print(export(asked.model, asked.out, DTYPES[asked.dtype]))
    except (ValueError, OSError) as error:
        print(f"grpo.export: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
