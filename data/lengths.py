"""What the limits of a run leave out, before it begins: the lengths of prompts and documents in tokens.

`check_prompts` looks at a run's questions before its weights are loaded, `Lengths` is for `data.check`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from data.chat import Chat
from data.sources import hub
from data.types import BadExample, BadSource, Example

# per cent
QUANTILES = (50, 90, 99, 99.9)
# dropped rows that are named
NAMED = 3
# questions that are measured before a run
SAMPLE = 128
# a prompt limit is proposed in steps of
ROUND = 64
TINY = Path(__file__).parents[1] / "models" / "tiny"


class TooLong(ValueError):
    """Most questions are longer than the limit. The message names settings that help."""


def tokenizer_folder(model: str) -> Path:
    """The folder with a model's tokenizer and processor: tiny, a folder, a run folder's newest checkpoint, or
    a model of the hub, without its weights. Raises BadSource."""
    folder = TINY if model == "tiny" else Path(model)
    steps = sorted(folder.glob("checkpoints/step_*[0-9]"))
    if steps or folder.is_dir():
        return steps[-1] if steps else folder
    if (named := hub.parts_of(model)) and not named[2]:
        return hub.snapshot(named[0], ["*.json"], "model", named[1])
    raise BadSource(f"model {model!r}: no such folder")


def check_prompts(chat: Chat, examples: Sequence[Example]) -> str:
    """A line on how many questions are longer than `chat.max_prompt`, "" if none is. Of many questions SAMPLE
    are looked at, evenly spread. Raises TooLong, with the settings that help, if most are longer."""
    count = min(SAMPLE, len(examples))
    found: list[tuple[int, list[int]]] = []
    for index in range(count):
        # what cannot be asked is named when it is its turn
        with suppress(BadExample):
            found.append(chat.length(examples[index * len(examples) // count]))
    limit = chat.max_prompt
    over = sum(tokens > limit for tokens, _ in found)
    if not over:
        return ""
    found.sort(key=lambda each: each[0])
    longest, of_pictures = found[-1][0], sum(found[-1][1])
    least = f"max_prompt={-(-longest // ROUND) * ROUND}"
    pixels = pixels_that_fit(chat, found)
    helps = f"set {least}" + (f", or max_pixels={pixels} for smaller pictures" if pixels else "")
    of = f"of {len(found)} questions" + (" that were looked at" if count < len(examples) else "")
    said = f"{over} {of} are longer than max_prompt={limit}"
    how = f"half have at most {found[len(found) // 2][0]} tokens, the longest has {longest}"
    how += f" ({of_pictures} of them pictures)"
    if 2 * over > len(found):
        raise TooLong(f"{said}, and none of these could be asked: {how}; {helps}")
    return f"{said}, and will be skipped: {how}. To ask all, {helps}"


def pixels_that_fit(chat: Chat, found: Sequence[tuple[int, list[int]]]) -> int | None:
    """The largest max_pixels with which 19 of 20 of these prompts fit, None if no picture can be that small.
    found: the tokens of each prompt, and of its pictures."""
    room = sorted(
        (chat.max_prompt - tokens + sum(counts)) // len(counts) if counts else chat.max_prompt
        for tokens, counts in found
    )
    pixels = room[len(room) // 20] * (chat.pictures.patch * chat.pictures.merge) ** 2
    return pixels if pixels >= chat.pictures.min_pixels and pixels < chat.pictures.max_pixels else None


class Lengths:
    """Counts the tokens of prompts and of documents, which are what imitation learns: a question's own, else
    its answer in the template's form, with the stop token."""

    def __init__(self, chat: Chat, max_prompt: int, cap: int) -> None:
        self.chat = chat
        self._limits = {"prompts": ("max_prompt", max_prompt), "documents": ("cap", cap)}
        # (tokens, name of the row)
        self._found: dict[str, list[tuple[int, str]]] = {"prompts": [], "documents": []}

    def add(self, example: Example, where: str) -> None:
        """Count an example. Raises BadExample."""
        self._found["prompts"].append((len(self.chat.prompt(example).tokens), where))
        for text in self.chat.documents(example):
            self._found["documents"].append((len(self.chat.encode(text)) + 1, where))

    def lines(self) -> Iterator[str]:
        """For prompts and for documents: the lengths by quantiles, and what the limit leaves out."""
        for what, found in self._found.items():
            if not found:
                continue
            found.sort()
            count = len(found)
            shares = ", ".join(
                f"{percent} % have at most {found[math.ceil(percent * count / 100) - 1][0]:,}"
                for percent in QUANTILES
            )
            yield f"{count:,} {what}, in tokens: {shares}; the longest has {found[-1][0]:,}"
            key, limit = self._limits[what]
            over = [(tokens, where) for tokens, where in reversed(found) if tokens > limit]
            named = "; ".join(f"{where} ({tokens:,})" for tokens, where in over[:NAMED])
            more = "; …" if len(over) > NAMED else ""
            dropped = f"  {key}={limit} drops {len(over):,} ({len(over) / count:.1%})"
            yield f"{dropped}: {named}{more}" if over else dropped
