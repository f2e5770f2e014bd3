"""An example of one's own data:  python -m data.shapes.example FOLDER

Writes thirty pictures of the built-in world into FOLDER/images, and their questions into FOLDER/train.jsonl,
as docs/data.md describes them.
"""

import argparse
import json
import sys
from pathlib import Path

from data.images import open_picture
from data.shapes.world import Shapes

# no other run draws these: 0 is the main job's, 5 and more are the tests'
SEED = 3


def write(folder: Path, count: int = 30) -> Path:
    """Write `count` pictures and questions into a new folder. -> train.jsonl. Raises FileExistsError."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, example in enumerate(Shapes("train", count, SEED), 1):
        name = f"images/{number:02}.png"
        open_picture(example.pictures[0], name=name).save(folder / name)
        row = {"question": example.question, "choices": example.choices, "answer": example.answer}
        rows.append(json.dumps(row | {"picture": name, "task": example.task}) + "\n")
    path = folder / "train.jsonl"
    path.write_text("".join(rows), encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser("python -m data.shapes.example", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder to write; FOLDER/images must not exist")
    folder = parser.parse_args(argv).folder
    try:
        print(write(folder))
    except OSError as error:
        print(f"data.shapes.example: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
