"""What the limits of a run leave out, before it begins: the lengths of prompts and documents in tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from data.chat import Chat
from data.sources import hub
from data.types import BadSource, Example

# per cent
QUANTILES = (50, 90, 99, 99.9)
# dropped rows that are named
NAMED = 3
TINY = Path(__file__).parents[1] / "models" / "tiny"


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
