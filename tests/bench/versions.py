"""The tests of models/ and grpo/ on the oldest and the newest versions:  python tests/bench/versions.py
[--torch 2.13.0 2.14.1] [--transformers 5.21.0 5.24.0] [--pythons python3.11 ...] [--place DIR]

Makes an environment for every corner (interpreter, torch, transformers) in DIR, installs the extra `dev`
without constraints.txt, and runs the fast tests of tests/models and tests/grpo there. A version that pip
cannot bring is named, and its corners are left out; so is an interpreter that is not there. An environment
and a result that are there already are not made again: the command goes on where it stopped.

Prints a line a corner and ends with a line of JSON. Exit status 1 if a test failed.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/models", "tests/grpo")


def environment(place: Path, python: str, torch: str, transformers: str) -> tuple[Path | None, str]:
    """An environment with these versions, or None and the last line of the error."""
    folder = place / f"{python}-{torch}-{transformers}"
    done = folder / "complete"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, "-m", "venv", folder], check=True)
        pinned = [f"torch=={torch}", f"transformers=={transformers}"]
        command = [folder / "bin" / "python", "-m", "pip", "install", "-q", *pinned, f"{ROOT}[dev]"]
        made = subprocess.run(command, capture_output=True, text=True, cwd=place)
        if made.returncode:
            shutil.rmtree(folder)
            return None, made.stderr.strip().splitlines()[-1]
        # The installed copy; the tests run the checkout's.
        subprocess.run([*command[:3], "uninstall", "-q", "-y", "glimpse-grpo"], check=True)
        done.touch()
    return folder, ""


def counts(folder: Path) -> dict[str, int]:
    """What pytest said of the tests in an environment: {"passed": n, "failed": n, "skipped": n}."""
    log = folder / "tests.log"
    if not log.exists():
        part = log.with_suffix(".part")
        with open(part, "w") as file:
            command = [folder / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        part.rename(log)
    said = log.read_text().splitlines()[-1]
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", said)}


def main() -> int:
    """Test every corner."""
    how = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    options.add_argument("--pythons", nargs="+", default=["python3.11", "python3.12", "python3.13"])
    options.add_argument("--torch", nargs="+", default=["2.13.0", "2.14.1"])
    options.add_argument("--transformers", nargs="+", default=["5.21.0", "5.24.0"])
    options.add_argument("--place", type=Path, default=Path("versions"), help="folder of the environments")
    args = options.parse_args()
    args.place = args.place.resolve()
    args.place.mkdir(parents=True, exist_ok=True)
    found = {}
    for python, torch, transformers in product(args.pythons, args.torch, args.transformers):
        corner = f"{python}, torch {torch}, transformers {transformers}"
        if not shutil.which(python):
            found[corner] = {"missing": f"{python} is not here"}
        else:
            folder, error = environment(args.place, python, torch, transformers)
            found[corner] = counts(folder) if folder else {"missing": error}
        print(f"{corner}: {found[corner]}", flush=True)
    print(json.dumps({"bench": "versions", "corners": found}))
    wrong = {"failed", "error", "errors"}
    return int(any(wrong & corner.keys() or not corner for corner in found.values()))


if __name__ == "__main__":
    sys.exit(main())
