"""A model without the optimizer's state:  python -m grpo.export MODEL OUT [--dtype bfloat16]

A checkpoint is a Hugging Face folder that also holds the optimizer's state, twice the size of the weights.
This writes a folder without it: config, weights, tokenizer and processor files, in float32 as trained or in
bfloat16 for serving. It checks the checkpoint's checksums first, and OUT is complete or absent.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from grpo.storage.checkpoint import SIDE_FILES, flush
from grpo.storage.model_folder import base_folder, load_model, model_folder
from models import weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(model: str, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model folder and return it.  model: as the setting `model`: a run folder (its newest undamaged
    checkpoint), a checkpoint, another folder in Hugging Face layout, or a hub model.  Peak memory: the model
    in `dtype`, and one file of its weights. Raises ValueError, or OSError with nothing written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; name a folder that does not exist")
    folder = model_folder(model)
    policy = load_model(folder, dtype)
    aside = out.with_name(out.name + ".tmp")
    needed = sum(tensor.nbytes for tensor in policy.state_dict().values())
    aside.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(aside.parent).free) < needed:
        raise OSError(f"{out}: {needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
    # left by a killed export
    shutil.rmtree(aside, ignore_errors=True)
    try:
        weights.save(policy, aside)
        for name in SIDE_FILES:
            # an adapter may come without its base's files
            for source in (base_folder(folder) / name, folder / name):
                if source.exists():
                    shutil.copyfile(source, aside / name)
        for path in (*aside.iterdir(), aside):
            flush(path)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and export. -> exit status."""
    what = "Write a checkpoint as a model folder without the optimizer's state."
    parser = argparse.ArgumentParser(prog="python -m grpo.export", description=what)
    parser.add_argument("model", help="a run folder (its newest checkpoint), a checkpoint, or a model folder")
    parser.add_argument("out", type=Path, help="the folder to write: a new one, or an empty one")
    help = "type of the weights; bfloat16 is half the size, and rounds them"
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help=help)
    args = parser.parse_args(argv)
    try:
        print(export(args.model, args.out, DTYPES[args.dtype]))
    except (ValueError, OSError) as error:
        print(f"grpo.export: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
