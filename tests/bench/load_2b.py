"""How much memory it takes to load a checkpoint of 2 billion parameters:  python tests/bench/load_2b.py
[--model Qwen/Qwen2-VL-2B] [--folder FOLDER]

Writes a checkpoint with the real shapes and random bfloat16 weights, in several shards, into a temporary
folder (4.4 GB for the 2B). Loads it with `models.weights.load` in another process, and compares the peak of
that process's memory with what it had before. The target is 1.2 times the size of the weights. With --folder
it loads the checkpoint in FOLDER instead. Prints a table; the last line is one JSON object.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import grpo.parallel.openmp

import torch
from safetensors.torch import save_file

from grpo.plan.known_models import KNOWN
from models import weights
from models.config import ModelConfig
from models.qwen_vl import QwenVL

TARGET = 1.2


def write(config: ModelConfig, folder: Path, shard_bytes: float) -> int:
    """A random checkpoint in bfloat16, written shard by shard: never more than one of them is in memory. ->
    its size in bytes."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in QwenVL(config).named_parameters()}
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if shards[-1] and size + 2 * shape.numel() > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
    where = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(
            {name: torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-0.05, 0.05) for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
        where |= dict.fromkeys(names, file)
    (folder / weights.INDEX).write_text(
        json.dumps(
            {"metadata": {"total_size": 2 * sum(s.numel() for s in shapes.values())}, "weight_map": where}
        )
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return 2 * sum(shape.numel() for shape in shapes.values())


def memory(what: str) -> int:
    """Bytes of this process: VmRSS, what it holds now, or VmHWM, the most it ever held.

    Linux counts the peak of a program from its start; `getrusage`, the way elsewhere, also counts what its
    parent held when it was started.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(
            next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(what))
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def load(folder: Path) -> dict:
    """Load in this process. -> bytes of the policy, and of the peak over what was there before."""
    with torch.device("meta"):
        # 80 MB of PyTorch's own code, which come with the first such model, are not the checkpoint's
        QwenVL(ModelConfig.from_folder(folder))
    before, start = memory("VmRSS"), time.perf_counter()
    policy = weights.load(folder, dtype=torch.bfloat16)
    seconds = time.perf_counter() - start
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    return {
        "policy": sum(p.nbytes for p in policy.parameters()),
        "peak": memory("VmHWM") - before,
        "before": before,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen/Qwen2-VL-2B", choices=list(KNOWN))
    parser.add_argument("--shard-bytes", type=float, default=4e9, help="the hub's 2B has shards of 4 GB")
    parser.add_argument("--folder", help="load this checkpoint, write none")
    parser.add_argument("--child", action="store_true", help="load --folder in this very process")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(load(Path(args.folder))))
        return
    with tempfile.TemporaryDirectory(prefix="glimpse-load-") as made:
        folder = Path(args.folder or made)
        if not args.folder:
            size = write(KNOWN[args.model], folder, args.shard_bytes)
            print(
                f"wrote {size / 1e9:.2f} GB in {len(list(folder.glob('*.safetensors')))} shards", flush=True
            )
        done = subprocess.run(
            [sys.executable, __file__, "--child", "--folder", str(folder)],
            check=True,
            capture_output=True,
            text=True,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    found |= {
        "model": args.folder or args.model,
        "ratio": round(found["peak"] / found["policy"], 3),
        "target": TARGET,
    }
    for name, value in (
        ("weights", found["policy"]),
        ("process before", found["before"]),
        ("peak over that", found["peak"]),
    ):
        print(f"{name:<16}{value / 1e9:>8.2f} GB")
    print(
        f"{'peak / weights':<16}{found['ratio']:>8.3f}    target {TARGET}: "
        f"{'met' if found['ratio'] <= TARGET else 'MISSED'}    {found['seconds']} s"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
