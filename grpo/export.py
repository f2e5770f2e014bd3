"""A model to publish:  python -m grpo.export MODEL OUT [--dtype bfloat16] [--push OWNER/NAME]

A checkpoint is a Hugging Face folder that also holds the optimizer's state, twice the size of the weights.
This writes a folder without it: config, weights, tokenizer and processor files, in float32 as trained or in
bfloat16 for serving; of a run, also README.md with scores and a way to ask. It checks the checkpoint's
checksums first, and OUT is complete or absent. --push sends it to the hub.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from grpo.monitor.card import card, run_of
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
        if run_of(folder):
            (aside / "README.md").write_text(card(folder, out.name), encoding="utf-8")
        for path in (*aside.iterdir(), aside):
            flush(path)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def push(folder: Path, name: str) -> str:
    """Upload an exported folder as the model `name` of the hub. A new one is private. -> its address. Raises
    OSError if the hub refuses."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=name, commit_message="Exported by Glimpse")
    # its errors, and those of its HTTP client, have no common class
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise OSError(f"{folder} is complete, but was not pushed to {name}: {said}") from error
    return str(address)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and export. -> exit status."""
    what = "Write a checkpoint as a model folder without the optimizer's state."
    parser = argparse.ArgumentParser(prog="python -m grpo.export", description=what)
    parser.add_argument("model", help="a run folder (its newest checkpoint), a checkpoint, or a model folder")
    parser.add_argument("out", type=Path, help="the folder to write: a new one, or an empty one")
    help = "type of the weights; bfloat16 is half the size, and rounds them"
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help=help)
    help = "upload OUT to the hub, too; needs `hf auth login`. A new model is private until you say otherwise"
    parser.add_argument("--push", metavar="OWNER/NAME", help=help)
    args = parser.parse_args(argv)
    try:
        print(export(args.model, args.out, DTYPES[args.dtype]))
        if args.push:
            print(push(args.out, args.push))
    except (ValueError, OSError) as error:
        print(f"grpo.export: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
