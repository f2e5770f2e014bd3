"""Real photographs through train.py, killed and resumed:  python tests/bench/photographs.py --data FILE

FILE is BLINK's parquet file. Tiny random Qwen2-VL and Qwen2.5-VL checkpoints make three steps of `torchrun
train.py`, with the photographs as parquet and as a JSONL folder. The same command is then killed after its
second save and started again. Checked: all parameters moved, and the resumed run is equal bit for bit. Prints
a line for each; the last line is one JSON object.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from qwen import qwen_folder

from data.sources.table import SOURCES

# a random policy is never right, so it is paid for its length
SETTINGS = (
    "steps=3",
    "cap=12",
    "group=4",
    "prompts=4",
    "max_pixels=20000",
    "eval.items=4",
    "save.every=1",
    "rewards={length: 100, format: 1}",
    "optim.lr=1e-3",
    "optim.decay=constant",
    "revision=null",
)


def as_jsonl(file: str, folder: Path, rows: int = 30) -> Path:
    """Some of BLINK's questions in our own layout."""
    folder.mkdir()
    with open(folder / "questions.jsonl", "w", encoding="utf-8") as lines:
        for i, example in enumerate(SOURCES["blink"](file, "all", rows, 0)):
            (folder / f"{i}.jpg").write_bytes(example.pictures[0])
            lines.write(
                json.dumps(
                    {
                        "uid": example.uid,
                        "question": example.question,
                        "choices": example.choices,
                        "answer": example.answer,
                        "pictures": [f"{i}.jpg"],
                    }
                )
                + "\n"
            )
    return folder


def check(model: Path, task: str, data, out: Path) -> dict[str, bool]:
    """One straight run and one killed and resumed. Raises RuntimeError with what train.py said."""

    def command(name: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            str(ROOT / "train.py"),
            "visualthinker_sat",
            f"model={model}",
            f"task={task}",
            f"data={data}",
            f"out={out / name}",
            *SETTINGS,
        ]

    def run(name: str) -> Path:
        done = subprocess.run(command(name), capture_output=True, text=True, env=env, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return out / name / "checkpoints" / "step_000003" / "model.safetensors"

    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    straight = load_file(run("straight"))
    killed = subprocess.Popen(
        command("killed"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=env,
        cwd=ROOT,
        start_new_session=True,
    )
    while not (out / "killed" / "checkpoints" / "step_000002").exists() and killed.poll() is None:
        time.sleep(0.002)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    # torchrun starts its ranks in sessions of their own
    subprocess.run(["pkill", "-9", "-f", str(out / "killed")], check=False)
    resumed, before = load_file(run("killed")), load_file(model / "model.safetensors")
    return {
        "moved": all(bool((straight[name] != before[name]).any()) for name in before),
        "identical": all(bool((straight[name] == resumed[name]).all()) for name in straight),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="BLINK's val parquet file")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder = as_jsonl(args.data, Path(place) / "jsonl")
        for architecture in ("qwen2_vl", "qwen2_5_vl"):
            model = qwen_folder(Path(place) / architecture, architecture)
            for task, data in (("jsonl", folder), ("blink", Path(args.data).resolve())):
                out = Path(place) / f"{architecture}-{task}"
                out.mkdir()
                found[f"{architecture} {task}"] = check(model, task, data, out)
                print(
                    f"{architecture:<11} {task:<6} "
                    + "  ".join(f"{what} {yes}" for what, yes in found[f"{architecture} {task}"].items()),
                    flush=True,
                )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
