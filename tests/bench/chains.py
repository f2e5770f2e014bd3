"""A large JSON array of chains, as in Vision-R1-cold:    python tests/bench/chains.py [--gigabytes 2]

Writes a file of generated chains, opens it as training does, and reads rows at random places. The first
opening scans the file; the second finds the index in the cache. Prints a table: seconds, megabytes a second,
and the megabytes by which the process grew (files that the kernel keeps in memory are not counted). The last
line is one JSON object.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.sources.table import open_split
from tests.bench.about import about

WORDS = "wait let me look at the angle of this triangle once more so it has to be about twelve or not".split()
# of 100 words, six have characters that JSON escapes or that look like its own
WORDS = 5 * WORDS[:19] + ["so\n\n", "hmm.\n", "\\frac{1}{2}", 'the "angle"', "[ok]", "\u2220ABC"]


def write_chains(path: Path, size: int) -> int:
    """Write an array of chains of some 1,500 words until it has `size` bytes. -> the number of rows."""
    chance, rows, written = random.Random(0), 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            chain = " ".join(chance.choices(WORDS, k=1500))
            turns = [
                {"from": "human", "value": "<image>\nWhich?"},
                {"from": "gpt", "value": f"<think>{chain}</think><answer> Final Answer:B </answer>"},
            ]
            row = {"id": str(rows), "image": "1.png", "conversations": turns}
            written += file.write((",\n" if rows else "[\n") + json.dumps(row, indent=2))
            rows += 1
        file.write("\n]\n")
    return rows


def own_memory() -> float:
    """Megabytes of this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1000


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="glimpse-array-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        path = Path(folder) / "vision_r1_chains.json"
        rows = write_chains(path, int(args.gigabytes * 1e9))
        (Path(folder) / "1.png").write_bytes(b"")
        found = {"gigabytes": path.stat().st_size / 1e9, "rows": rows}
        for opening in ("first", "again"):
            before, start = own_memory(), time.perf_counter()
            examples = open_split("vision_r1_cold", str(path), "train", None, 0, heldout=0)
            found[f"{opening} seconds"] = time.perf_counter() - start
            found[f"{opening} memory"] = own_memory() - before
        found["megabytes a second"] = 1000 * found["gigabytes"] / found["first seconds"]
        start, some = time.perf_counter(), random.Random(1).sample(range(rows), min(rows, 200))
        assert all(examples[number].extra["documents"] for number in some)
        found["milliseconds a row"] = 1000 * (time.perf_counter() - start) / len(some)
    for name, value in found.items():
        print(f"{name:20} {value:10.3g}" if isinstance(value, float) else f"{name:20} {value:10}")
    print(json.dumps({"bench": "chains", **found, "about": about()}))
    return found


if __name__ == "__main__":
    main()
