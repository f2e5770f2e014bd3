"""`python -m data.check PATH`: names each row of a file of questions that cannot be used; says what to do.

It makes an example of each row and opens each of its pictures, as training does.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator

from tqdm import tqdm

from data.answers.parser import is_right, read
from data.images import open_picture
from data.sources.rows import Rows
from data.sources.table import LAYOUTS, rows
from data.types import BadExample, Example

# rows of one kind that are shown
SHOWN = 5
# what differs between two lines of one kind: quoted values, names of files, numbers
_VALUES = re.compile(r"\[[^\[\]]*\]|'[^']*'|\"[^\"]*\"|\S*/\S*(?=[,:; ])|[0-9]+")


def why_not_right(example: Example) -> str:
    """Why the example's own right answer would earn nothing; "" if it would earn."""
    text = f"<think></think> <answer>{example.answer}</answer>"
    return "" if is_right(text, example) else read(text, example).why or "it is read as another answer"


def problems(examples: Rows) -> Iterator[str]:
    """For each row one line that says what is wrong with it, "" if nothing."""
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
        if why := why_not_right(example):
            said = f"answer: {example.answer[:60]!r}, written between the answer tags, is not right: {why}"
            yield f"{where}: {said}; write another answer, or leave the row out"
            continue
        first = seen.setdefault(example.uid, where)
        repeated = f"{where}: uid: {example.uid!r} is also that of {first}; give each row its own"
        yield repeated if first is not where else ""


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0 if every row can be used, 1 if one cannot, 2 if the files cannot be read."""
    parser = argparse.ArgumentParser("python -m data.check", description=__doc__)
    what = "a file, a folder, or a dataset of the hub (owner/name, owner/name:file)"
    parser.add_argument("path", metavar="PATH", help=what)
    whose = "the layout of the rows (default jsonl: your own data)"
    parser.add_argument("--task", default="jsonl", choices=LAYOUTS, help=whose)
    args = parser.parse_args(argv)
    bad = 0
    kinds = Counter[str]()
    try:
        examples = rows(args.task, args.path, "all", None)
        for line in tqdm(problems(examples), total=len(examples), unit="row", disable=None, leave=False):
            if line:
                bad += 1
                kind = _VALUES.sub("…", line)
                kinds[kind] += 1
                if kinds[kind] <= SHOWN:
                    tqdm.write(line)
    except ValueError as error:
        print(f"data.check: {error}", file=sys.stderr)
        return 2
    for kind, count in kinds.items():
        if count > SHOWN:
            print(f"and {count - SHOWN} more rows like the {SHOWN} above: {kind}")
    total = sum(map(len, examples.shards))
    published = LAYOUTS[args.task].rows
    said = f"{len(examples.shards)} files, {total} rows, {len(examples)} of them questions of {args.task}"
    ours = "" if published in (None, total) else f"; the published benchmark has {published} rows"
    print(f"{said}, {bad} of these bad{ours}")
    return 1 if bad or not len(examples) else 0


if __name__ == "__main__":
    sys.exit(main())
