"""Does torchrun start a run again after a rank was lost, and is it the run that it would have been?

    python tests/faults/restarts.py --times 20 [--seed 0] [--nodes]

Runs small policies on two ranks under `torchrun --max-restarts 3`. In a random step something happens to a
random rank while it samples (EVENTS). All files of all checkpoints, samples.jsonl, and metrics.jsonl without
its times are compared, bit for bit, with an undisturbed run. Where a rank is lost, the other one has to
name it.

    kill    SIGKILL
    stop    SIGSTOP, for ever. The other rank notices after `timeout`. torchrun then needs 30 seconds to see
            that SIGTERM does not end it.
    hang    its main thread does not return
    raise   an unexpected error
    starve  it is stopped for half a second, again and again, while the run lasts

With --nodes two agents of torchrun, each with one rank, are two machines that meet at a port (`--nnodes 2`).
In a random step the second machine is gone: SIGKILL ends its agent and its rank. The same command is then
typed on it again.

Prints a line for each run, and ends with a line of JSON: times, identical runs, lost ranks that were named,
and the seconds from the event to that line. Exit status 1 if a run differs or a lost rank was not named.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from small import small_folder

from grpo.storage.checkpoint import complete

STEPS, TIMEOUT = 5, 5.0
QUICK = [
    "shapes",
    "seed=1",
    f"steps={STEPS}",
    "prompts=2",
    "group=3",
    "cap=8",
    "rewards={length: 100, format: 1}",
    "optim.lr=1e-3",
    "optim.warmup=0",
    "eval.items=2",
    "eval.every=2",
    "save.every=2",
    # steps of a tenth of a second: a rank may be lost before a checkpoint in the background is whole
    "save.background=false",
    "save.keep=0",
    "report.every=1",
    "report.prompts=1",
    "limit=40",
    "device=cpu",
    f"timeout={TIMEOUT}",
]
EVENTS = {
    "kill": "has died: its process ended without a word",
    "stop": "hangs: it has not come to '.*' within 5 seconds",
    "hang": "hangs: it has not come to '.*' within 5 seconds",
    "raise": "ended with an error: KeyError: 'unexpected'",
    "starve": "",
}
"""What may happen, and what the other rank says of it."""
# train.py; while it samples in a step, something happens to one rank, once.
DISTURBED = """
import os, signal, sys, time
import train
what, step, rank, place = sys.argv.pop(1).split()
real, calls = train.generate, []
def generate(*args, **how):
    calls.append(1)
    here = os.environ.get("NODE", os.environ["RANK"]) == rank
    if len(calls) == int(step) and here and not os.path.exists(place):
        with open(place, "w") as file:
            file.write(f"{os.getpid()}\\n")
        if what == "gone": os.kill(os.getppid(), signal.SIGKILL)
        if what == "raise": raise KeyError("unexpected")
        if what == "hang": time.sleep(1000)
        if what in ("kill", "gone"): os.kill(os.getpid(), signal.SIGKILL)
        if what == "stop": os.kill(os.getpid(), signal.SIGSTOP)
    return real(*args, **how)
if __name__ == "__main__":
    train.generate = generate
    sys.exit(train.main(sys.argv[1:]))
"""


def torchrun(base: Path, place: Path, event: str, step: int, rank: int) -> tuple[Path, str, float]:
    """A run on two ranks, to its end. -> (its folder, what it said, seconds from the event until the other
    rank said something; nan if it never did)."""
    place.mkdir(exist_ok=True)
    (place / "script.py").write_text(DISTURBED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=3",
        str(place / "script.py"),
        f"{event} {step} {rank} {place / 'pid'}",
    ]
    with open(place / "log", "w") as log:
        process = subprocess.Popen(
            [*command, *QUICK, f"model={base}", f"out={place / 'run'}"],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
    until, happened, named = time.monotonic() + 280, 0.0, float("nan")
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
        if not happened and (place / "pid").exists():
            happened = time.monotonic()
        if happened and named != named and f"on rank {1 - rank}: " in (place / "log").read_text():
            named = time.monotonic() - happened
        if happened and event == "starve":
            starve(int((place / "pid").read_text() or 0))
    if process.poll() is None:
        process.terminate()
    return place / "run", (place / "log").read_text() + f"\nexit status {process.wait(60)}\n", named


def two_nodes(base: Path, place: Path, step: int) -> tuple[Path, str, float]:
    """A run on two machines; the second one is gone in this step (0: never) and comes back. As `torchrun`."""
    place.mkdir(exist_ok=True)
    (place / "script.py").write_text(DISTURBED)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [
        *[sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"],
        *["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=glimpse"],
        *["--local-addr=localhost", "--max-restarts=3"],
        *[str(place / "script.py"), f"gone {step} 1 {place / 'pid'}", *QUICK],
        *[f"model={base}", f"out={place / 'run'}"],
    ]

    def start(node: int) -> subprocess.Popen:
        with open(place / f"log{node}", "a") as log:
            names = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NODE": str(node)}
            # the agents count restarts in different ways (grpo/parallel/ranks.py)
            names["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
            return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **names})

    said = lambda: (place / "log0").read_text()
    # the first one has the port
    nodes = [start(0)]
    time.sleep(3.0)
    nodes.append(start(1))
    until, happened, named = time.monotonic() + 280, 0.0, float("nan")
    while any(node.poll() is None for node in nodes) and time.monotonic() < until:
        time.sleep(0.05)
        if not happened and (place / "pid").exists() and nodes[1].poll() is not None:
            happened = time.monotonic()
        if happened and named != named and "on rank 0: " in said():
            named = time.monotonic() - happened
            nodes[1] = start(1)
    for node in nodes:
        node.terminate()
    found = {node.wait(60) for node in nodes}
    return place / "run", said() + f"\nexit status {max(found, key=abs)}\n", named


def starve(pid: int) -> None:
    """Half a second without a processor."""
    with contextlib.suppress(ProcessLookupError):
        if pid:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.5)
            os.kill(pid, signal.SIGCONT)


def left_behind(out: Path) -> tuple[list[dict], bytes, dict[str, bytes]]:
    """What a run has to leave whether or not it was disturbed: lines of metrics without times, samples,
    files of the checkpoints."""
    rows = [
        {k: v for k, v in json.loads(line).items() if k != "step_time" and not k.startswith("time/")}
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    files = {
        f"{folder.name}/{path.name}": path.read_bytes()
        for folder in complete(out)
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert len(rows) == STEPS + 1 and f"step_{STEPS:06d}/model.safetensors" in files, (len(rows), list(files))
    return rows, (out / "samples.jsonl").read_bytes(), files


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--nodes", action="store_true", help="two machines; the second one is gone for a while"
    )
    asked = parser.parse_args(arguments)
    chance, identical, lost, named, seconds = random.Random(asked.seed), 0, 0, 0, {}
    with tempfile.TemporaryDirectory(prefix="glimpse-restarts-") as folder:
        place = Path(folder)
        base = small_folder(place / "base")
        straight = left_behind(torchrun(base, place / "straight", "nothing", 0, 0)[0])
        for number in range(asked.times):
            event, step, rank = (
                "gone" if asked.nodes else list(EVENTS)[number % len(EVENTS)],
                chance.randint(1, STEPS),
                1 if asked.nodes else chance.randrange(2),
            )
            at = place / str(number)
            out, said, took = (
                two_nodes(base, at, step) if asked.nodes else torchrun(base, at, event, step, rank)
            )
            same = said.endswith("exit status 0\n") and left_behind(out) == straight
            identical, lost = identical + same, lost + (event != "starve")
            why = EVENTS["kill" if event == "gone" else event]
            if why and re.search(rf"on rank {1 - rank}: rank {rank} .*{why}", said):
                named += 1
                seconds.setdefault(event, []).append(round(took, 1))
            print(
                f"{number} ({event}, rank {rank}, step {step}): "
                + ("identical" if same else "differs")
                + (f", named after {took:.1f} s" if took == took else ""),
                flush=True,
            )
            if not same:
                print(said)
    print(
        json.dumps(
            {
                "times": asked.times,
                "identical": identical,
                "lost": lost,
                "named": named,
                "seconds_until_named": seconds,
                "timeout": TIMEOUT,
                "seed": asked.seed,
            }
        )
    )
    return int(identical < asked.times or named < lost)


if __name__ == "__main__":
    sys.exit(main())
