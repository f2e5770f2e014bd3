"""Is a killed bridge the bridge it would have been?    python tests/faults/bridge.py [--items 12] [--seeds 3]

For each seed a bridge of 12 questions is asked of a server that fails in every way (429 with Retry-After,
500, half a JSON, no JSON, silence, a closed socket, `length`, a reply in two copies). First it runs
undisturbed. Then, for every k, it is killed by SIGKILL right after its k-th stored reply, and the same
command finishes it. At last one bridge is killed after each single reply, again and again, until nothing is
left.

A bridge is as it would have been if its stored replies are those of the undisturbed one, without their times,
and none is there twice. Prints a line for each seed, and ends with a line of JSON. Exit status 1 if one
differs.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

# after a fork there are no other threads
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / "grpo" / name) for name in ("serving", "bridge"))]
from fake_server import serving
from small_bridge import IMPATIENT, answer, command, faults, items, replies, run

KILLED = -9


def disturbed(arguments: list[str], out: Path, kills: list[int]) -> tuple[int, int]:
    """Run a command that is killed after each number of new replies, then let it finish. -> kills, exit
    status."""
    shutil.rmtree(out, ignore_errors=True)
    done = 0
    for count in kills:
        status = run(arguments, kill_after=count)
        if status != KILLED:
            return done, status
        done += 1
    return done, run(arguments)


def one_seed(seed: int, count: int, place: Path) -> tuple[int, int]:
    """-> kills, and kills of bridges that ended as the undisturbed one."""
    data = items(place / "data", count)
    kills, same = 0, 0
    with serving(answer=answer, fault=faults(seed)) as fake:
        status = run(command(fake.url, data, place / "straight", *IMPATIENT))
        wanted = replies(place / "straight")
        out = place / "killed"
        for sequence in [*([k] for k in range(1, len(wanted) + 1)), [1] * (len(wanted) + 1)]:
            fake.arrivals.clear()
            done, ended = disturbed(command(fake.url, data, out, *IMPATIENT), out, sequence)
            kills += done
            if replies(out) == wanted and ended == status:
                same += done
            else:
                print(
                    f"seed {seed}, killed after {sequence[:3]}: another end ({ended}, {status})", flush=True
                )
    errors = sum(bool(told["error"]) for told in wanted.values())
    again = sum(attempt > 0 for _, _, attempt in wanted)
    said = f"{len(wanted)} replies, {errors} errors and {again} further attempts among them"
    print(f"seed {seed}: {said}; {same} of {kills} kills without a trace; exit status {status}", flush=True)
    return kills, same


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args(arguments)
    began = time.monotonic()
    kills = same = 0
    for seed in range(asked.seeds):
        with tempfile.TemporaryDirectory(prefix="glimpse-bridge-") as folder:
            found = one_seed(seed, asked.items, Path(folder))
            kills, same = kills + found[0], same + found[1]
    told = {"kills": kills, "identical": same, "items": asked.items, "seeds": asked.seeds}
    print(json.dumps(told | {"seconds": round(time.monotonic() - began, 1)}))
    return int(same < kills)


if __name__ == "__main__":
    sys.exit(main())
