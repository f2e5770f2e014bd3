"""Occurrences of words of reflection over documents, as Table 4 of Vision-R1 (arXiv 2503.06749)."""

from __future__ import annotations

import re
from collections import Counter

VISION_R1 = ("wait", "hmm", "mistake", "alternatively", "check")
"""The words of Table 4."""

TITLES = ["word", "exact", "a document", "with forms", "a document", "documents"]
"""Of the columns of `Count.table`."""


class Count:
    """Occurrences of words over documents."""

    def __init__(self, words: tuple[str, ...]):
        stems = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
        self.form = re.compile(rf"\b({stems})(\w*)", re.IGNORECASE)
        self.words = words
        self.documents = 0
        self.exact: Counter[str] = Counter()
        self.stem: Counter[str] = Counter()
        # documents that hold the exact word
        self.holding: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Count one document."""
        self.documents += 1
        found = [(match[1].lower(), not match[2]) for match in self.form.finditer(text)]
        exact = [word for word, whole in found if whole]
        self.exact.update(exact)
        self.stem.update(word for word, _ in found)
        self.holding.update(set(exact))

    def table(self) -> list[list[str]]:
        """A row for each word: occurrences of the exact word, in all and a document; the same of its forms;
        the share of documents that hold the exact word."""
        n = max(self.documents, 1)
        return [
            [
                word,
                f"{self.exact[word]:,}",
                f"{self.exact[word] / n:.3f}",
                f"{self.stem[word]:,}",
                f"{self.stem[word] / n:.3f}",
                f"{self.holding[word] / n:.1%}",
            ]
            for word in self.words
        ]
