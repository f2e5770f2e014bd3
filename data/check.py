"""`python -m data.check PATH`: names each row of a file of questions that cannot be used; says what to do.

It makes an example of each row and opens each of its pictures, as training does. With --lengths it also says
how long prompts and documents are, and what the limits of a run leave out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from data.answers.parser import is_right, read
from data.chat import Chat
from data.images import open_picture
from data.lengths import Lengths, tokenizer_folder
from data.sources.kinds import Kinds
from data.sources.rows import Rows, open_rows
from data.sources.table import LAYOUTS, columns_of
from data.types import BadExample, Example, MissingPicture, short

# no prompt is too long to be counted
NO_LIMIT = 1 << 40


def why_not_right(example: Example) -> str:
    """Why the example's own right answer would earn nothing; "" if it would earn."""
    text = f"<think></think> <answer>{example.answer}</answer>"
    return "" if is_right(text, example) else read(text, example).why or "it is read as another answer"


def problems(examples: Rows, lengths: Lengths | None = None) -> Iterator[str]:
    """For each row one line that says what is wrong with it, "" if nothing. lengths: counts the rows that can
    be used."""
    seen: dict[str, str] = {}
    for index in range(len(examples)):
        where = examples.where(index)
        try:
            example = examples[index]
            for number, picture in enumerate(example.pictures, 1):
                open_picture(picture, name=f"{where}: picture {number}")
            if lengths:
                lengths.add(example, where)
        except BadExample as error:
            yield f"{error}{'' if getattr(error, 'remedy', '') else '; correct it, or leave the row out'}"
            continue
        if why := why_not_right(example):
            said = f"answer: {short(example.answer)}, written between the answer tags, is not right: {why}"
            yield f"{where}: {said}; write another answer, or leave the row out"
            continue
        first = seen.setdefault(example.uid, where)
        repeated = f"{where}: uid: {short(example.uid)} is also that of {first}; give each row its own"
        yield repeated if first is not where else ""


def missing_pictures(examples: Rows) -> Iterator[str]:
    """For each picture that a row names and that is not there, its address, else its name; each once."""
    seen = set()
    for index in range(len(examples)):
        try:
            examples[index]
        except MissingPicture as error:
            line = error.link or error.name
            if line not in seen:
                seen.add(line)
                yield line
        except BadExample:
            continue


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m data.check", description=__doc__)
    what = "a file, a folder, or a dataset of the hub (owner/name, owner/name:file)"
    parser.add_argument("path", metavar="PATH", help=what)
    whose = "the layout of the rows (default jsonl: your own data)"
    parser.add_argument("--task", default="jsonl", choices=LAYOUTS, help=whose)
    others = "the file's names of columns, as in train.py: '{question: problem, answer: label}'"
    parser.add_argument("--columns", default="{}", metavar="{OURS: THEIRS}", help=others)
    listed = "write the missing pictures here, one a line: the address if the row has it, else the name"
    parser.add_argument("--missing", type=Path, metavar="FILE", help=listed)
    parser.add_argument("--heldout", type=float, metavar="SHARE", help="say how many rows it holds out")
    group = parser.add_argument_group("lengths (defaults: those of train.py)")
    said = "count the tokens of prompts and documents, and what the limits leave out"
    group.add_argument("--lengths", action="store_true", help=said)
    whose = "tiny (default), a folder, a run folder, or a model of the hub, whose weights are not needed"
    group.add_argument("--model", default="tiny", metavar="DIR_OR_ID", help=whose)
    group.add_argument("--template", default="shapes", metavar="NAME_OR_FILE", help="(default shapes)")
    for name, default, about in (
        ("--max-prompt", 1024, "longest prompt (default 1024)"),
        ("--cap", 512, "longest completion, and longest document in imitation (default 512)"),
        ("--max-pixels", None, "larger pictures are scaled down (default: the model's own)"),
    ):
        group.add_argument(name, type=int, default=default, metavar="N", help=about)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0 if every row can be used, 1 if one cannot, 2 if the files cannot be read."""
    args = arguments(argv)
    bad = 0
    kinds = Kinds()
    lengths = None
    try:
        columns = columns_of(args.columns)
        opened = partial(open_rows, LAYOUTS[args.task], args.path, limit=None, seed=0, columns=columns)
        examples = opened(split="all")
        if args.missing:
            lines = list(missing_pictures(examples))
            args.missing.write_text("".join(f"{line}\n" for line in lines), "utf-8")
            print(f"wrote the names of {len(lines)} missing pictures to {args.missing}")
            return 0
        if args.lengths:
            how = {"template": args.template, "max_prompt": NO_LIMIT, "max_pixels": args.max_pixels}
            lengths = Lengths(Chat(tokenizer_folder(args.model), **how), args.max_prompt, args.cap)
        found = problems(examples, lengths)
        for line in tqdm(found, total=len(examples), unit="row", disable=None, leave=False):
            bad += bool(line)
            if line and kinds.is_shown(line):
                tqdm.write(line)
        share = args.heldout
        held = None if share is None else len(opened(split="heldout", heldout=share))
    except (ValueError, OSError) as error:
        print(f"data.check: {error}", file=sys.stderr)
        return 2
    for line in [*kinds.others(), *(lengths.lines() if lengths else ())]:
        print(line)
    if held is not None:
        print(f"heldout={share:g} holds out {held} of {len(examples)} rows")
    total = sum(map(len, examples.shards))
    published = LAYOUTS[args.task].rows
    said = f"{len(examples.shards)} files, {total} rows, {len(examples)} of them questions of {args.task}"
    ours = "" if published in (None, total) else f"; the published benchmark has {published} rows"
    print(f"{said}, {bad} of these bad{ours}")
    return 1 if bad or not len(examples) else 0


if __name__ == "__main__":
    sys.exit(main())
