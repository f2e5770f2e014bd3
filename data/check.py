"""`python -m data.check PATH`: every row of a file of questions that cannot be used, by number and field, and
what to do about it.

Each row is made into an example and each of its pictures is opened, as in training; only here nothing stops
or is skipped unseen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from tqdm import tqdm

from data.images import open_picture
from data.sources.rows import Rows
from data.sources.table import LAYOUTS, SOURCES
from data.types import BadExample


def problems(examples: Rows) -> Iterator[str]:
    """For each row one line that names what is wrong with it, "" if nothing is."""
    seen: dict[str, str] = {}
    for index in range(len(examples)):
        where = examples.where(index)
        try:
            example = examples[index]
            for number, picture in enumerate(example.pictures, 1):
                open_picture(picture, name=f"{where}: picture {number}")
        except BadExample as error:
            yield f"{error}{'' if getattr(error, 'remedy', '') else '; correct it, or leave the row out'}"
            continue
        first = seen.setdefault(example.uid, where)
        yield (
            ""
            if first is where
            else f"{where}: uid: {example.uid!r} is also that of {first}; give each row its own"
        )


def main(argv: list[str] | None = None) -> int:
    """→ exit status: 0 if every row can be used, 1 if one cannot, 2 if the files cannot be read."""
    parser = argparse.ArgumentParser("python -m data.check", description=__doc__)
    parser.add_argument(
        "path", metavar="PATH", help="a file, a folder, or a dataset of the hub (owner/name, owner/name:file)"
    )
    parser.add_argument(
        "--task",
        default="jsonl",
        choices=LAYOUTS,
        help="whose layout it has (default jsonl, your own data's)",
    )
    args = parser.parse_args(argv)
    bad = 0
    try:
        examples = SOURCES[args.task](args.path, "all", None, 0)
        for line in tqdm(problems(examples), total=len(examples), unit="row", disable=None, leave=False):
            if line:
                bad += 1
                tqdm.write(line)
    except ValueError as error:
        print(f"data.check: {error}", file=sys.stderr)
        return 2
    rows, published = sum(map(len, examples.shards)), LAYOUTS[args.task].rows
    print(
        (
            f"{len(examples.shards)} files, {rows} rows, {len(examples)} of them questions of {args.task}, "
            f"{bad} of these bad"
        )
        + (f"; the published benchmark has {published} rows" if published not in (None, rows) else "")
    )
    return 1 if bad or not len(examples) else 0


if __name__ == "__main__":
    sys.exit(main())
