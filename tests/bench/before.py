"""Is this tree as fast as a commit?    python tests/bench/before.py COMMIT [--rounds 10] [--steps 8]

Runs `tests/bench/step.py` by turns: with COMMIT, checked out into a temporary git worktree, and with this
tree. A round is one process of each. The order changes every round. A figure is the median over the rounds of
the ratio within a round, now to before: below 1 is faster. Prints a table; the last line is one JSON object.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.bench.same import ROOT, checked_out, environment
from tests.bench.timing import finish, parser, ratio


def seconds(tree: Path, steps: int) -> dict[str, float]:
    """Seconds of a whole step, of its rollout and of its learning: medians over `steps` steps of a new
    process, with PyTorch's default number of threads."""
    inherited = environment(tree)
    del inherited["OMP_NUM_THREADS"]
    done = subprocess.run(
        [sys.executable, "tests/bench/step.py", "--rounds", str(steps)],
        cwd=tree,
        env=inherited,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    step = found["seconds"]["glimpse"]
    return {"step": step} | {phase: step * found["phases"][phase] for phase in ("rollout", "learn")}


def main(argv: list[str] | None = None) -> dict:
    options = parser(__doc__, 10)
    options.add_argument("commit")
    options.add_argument("--steps", type=int, default=8, help="steps of each process (default 8)")
    args = options.parse_args(argv)
    runs: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    with checked_out(args.commit) as before:
        for number in range(1 if args.quick else args.rounds):
            turns = [("before", before), ("now", ROOT)]
            for name, tree in turns[:: -1 if number % 2 else 1]:
                runs[name].append(seconds(tree, 1 if args.quick else args.steps))
    rows, found = [], {}
    for phase in ("step", "rollout", "learn"):
        taken = {name: [run[phase] for run in of] for name, of in runs.items()}
        pairs = [now / then for now, then in zip(taken["now"], taken["before"], strict=True)]
        found[phase] = ratio(taken["now"], taken["before"])
        rows.append([phase, found[phase], min(pairs), max(pairs)])
    found |= {"commit": args.commit, "runs": runs}
    return finish("before", ["seconds, now to before", "median", "min", "max"], rows, found, args)


if __name__ == "__main__":
    main()
