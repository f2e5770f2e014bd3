"""Where examples come from (`docs/data.md`)."""

from data.sources.table import HELDOUT, LAYOUTS, SOURCES, SPLITS, open_source

__all__ = ["HELDOUT", "LAYOUTS", "SOURCES", "SPLITS", "open_source"]
