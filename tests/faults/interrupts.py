"""What does Ctrl-C leave behind?

    python tests/faults/interrupts.py --times 10 [--seed 0] [--ranks 2]

Starts a small run, sends SIGINT to its process group at a random moment of a random step, as a terminal does,
and looks for: the exit status; one line that says where it goes on; a checkpoint of that step; report.html
and curves.png, whole, which say that the run was stopped; no half written file. With --ranks it runs under
torchrun. Prints a line for each run. Exit status 1 if anything is missing.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from small import small_folder

from grpo.storage.checkpoint import complete

STEPS = 40
QUICK = f"""shapes steps={STEPS} prompts=2 group=3 cap=8 limit=40 device=cpu eval.items=2 eval.every=3
save.every=5 report.every=2 report.prompts=1""".split()


def interrupted(base: Path, place: Path, wait: float, step: int, ranks: int) -> list[str]:
    """A run that gets SIGINT `wait` seconds after this step. -> what is missing."""
    out = place / "run"
    place.mkdir()
    program = [sys.executable, "train.py"]
    if ranks:
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        program.append("train.py")
    with open(place / "log", "w") as log:
        process = subprocess.Popen(
            [*program, *QUICK, f"model={base}", f"out={out}"],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if f"step {step}/{STEPS} " in (place / "log").read_text():
            break
        time.sleep(0.01)
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGINT)
    status = process.wait(60)
    said = (place / "log").read_text()
    return missing(out, said, status, 1 if ranks else 130)


def missing(out: Path, said: str, status: int, wanted: int) -> list[str]:
    """What a stopped run lacks."""
    found = [] if status == wanted else [f"exit status {status}"]
    lines = re.findall(r"^train\.py: stopped by SIGINT after step (\d+) of .*$", said, re.M)
    if len(lines) != 1:
        return [*found, f"{len(lines)} lines on the end: {said[-300:]}"]
    saved = complete(out)
    if not saved or saved[-1].name != f"step_{int(lines[0]):06d}":
        found.append(f"checkpoint of step {lines[0]}")
    page = (out / "report.html").read_text("utf-8") if (out / "report.html").exists() else ""
    if f"stopped by SIGINT after step {lines[0]} of" not in page or not page.rstrip().endswith("</html>"):
        found.append("report.html")
    if not (out / "curves.png").is_file() or (out / "curves.png").read_bytes()[-8:-4] != b"IEND":
        found.append("curves.png")
    return found + [f"half a file: {path.name}" for path in out.rglob("*.tmp")]


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=0)
    asked = parser.parse_args(arguments)
    chance, bad = random.Random(asked.seed), 0
    with tempfile.TemporaryDirectory(prefix="glimpse-interrupts-") as folder:
        base = small_folder(Path(folder) / "base")
        for number in range(asked.times):
            step, wait = chance.randint(1, STEPS - 5), chance.random() * 0.3
            lacks = interrupted(base, Path(folder) / str(number), wait, step, asked.ranks)
            bad += bool(lacks)
            print(
                f"{number}: {wait:.2f} s after step {step}: {'; '.join(lacks) or 'everything is there'}",
                flush=True,
            )
    print(f"{asked.times - bad} of {asked.times} complete")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
