"""Words of reflection in files of chains:    python -m grpo.words FILE [FILE ...] [--words wait,hmm]

Vision-R1's Table 4 (arXiv 2503.06749) counts five words in its cold-start data and in two other data sets.
The paper does not say whether word forms count ("waiting"). So both counts are printed: of the exact word,
and of all words that begin with it. Case is ignored. A document is what the model says in one row.

FILE is JSON lines or a JSON array, gzip or not. It has the rows of LLaMA-Factory (`conversations`), of chats
(`messages`) or of this project (`documents`, `completions`, `text`). --field names any other field.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.sources.jsonl import JsonlShard
from grpo.evaluation.tables import table
from grpo.evaluation.word_counts import TITLES, VISION_R1, Count

FIELDS = ("documents", "completions", "text", "response", "output", "answer")
MODELS = ("gpt", "assistant", "model")


def model_texts(row: dict[str, Any], field: str = "") -> list[str]:
    """What a row lets the model say. field: the name of the field, instead of the known ones."""
    if field:
        return _texts(row.get(field))
    for name in ("conversations", "messages", "prompt"):
        if isinstance(row.get(name), list):
            turns = [turn for turn in row[name] if isinstance(turn, dict)]
            said = [turn for turn in turns if turn.get("from", turn.get("role")) in MODELS]
            return [text for turn in said for text in _texts(turn.get("value", turn.get("content")))]
    extra = row.get("extra")
    found = _texts(extra.get("documents")) if isinstance(extra, dict) else []
    return found or next((texts for name in FIELDS if (texts := _texts(row.get(name)))), [])


def _texts(value: Any) -> list[str]:
    """The texts in a field: a text, a list of texts, or of objects with a `text`."""
    if isinstance(value, dict):
        value = value.get("text")
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def count(paths: list[Path], words: tuple[str, ...], field: str = "") -> Count:
    """The words of all model texts of some files. Raises BadSource, BadRow."""
    found = Count(words)
    for path in paths:
        shard = JsonlShard(path, (), (), (), {})
        for number in tqdm(range(len(shard)), desc=path.name, unit="row", leave=False, disable=None):
            for text in model_texts(shard.row(number), field):
                found.add(text)
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the table. -> exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo.words", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--words", default=",".join(VISION_R1), help="default: %(default)s")
    parser.add_argument("--field", default="", help="the field that holds the text")
    args = parser.parse_args(argv)
    words = tuple(word for word in (part.strip().lower() for part in args.words.split(",")) if word)
    try:
        if not words:
            raise ValueError("--words is empty; name at least one word")
        found = count(args.files, words, args.field)
        if not found.documents:
            raise ValueError(
                f"no row of {', '.join(map(str, args.files))} has a text of a model; name --field"
            )
    except (ValueError, OSError) as error:
        print(f"grpo.words: {error}", file=sys.stderr)
        return 2
    print(f"{found.documents:,} documents")
    print(table(TITLES, found.table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
