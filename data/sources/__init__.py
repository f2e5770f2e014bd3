"""Where examples come from (`docs/data.md`)."""

from data.sources.table import HOOKS, LAYOUTS, SOURCES, SPLITS, hook_of, open_source

__all__ = ["HOOKS", "LAYOUTS", "SOURCES", "SPLITS", "hook_of", "open_source"]
