"""Settings: recipes, `key=value` arguments, and what a run folder keeps of them."""

from grpo.config.parse import (
    FORMAT,
    Flags,
    check_same_run,
    help_text,
    list_text,
    load,
    load_run,
    markdown_table,
    parse_args,
    recipes,
    save,
)
from grpo.config.settings import (
    HEADINGS,
    Config,
    Evaluate,
    Loss,
    Optim,
    Report,
    Save,
    Stage,
    differences,
    value_of,
)
from grpo.config.typed import ConfigError

__all__ = [
    "FORMAT",
    "HEADINGS",
    "Config",
    "ConfigError",
    "Evaluate",
    "Flags",
    "Loss",
    "Optim",
    "Report",
    "Save",
    "Stage",
    "check_same_run",
    "differences",
    "help_text",
    "list_text",
    "load",
    "load_run",
    "markdown_table",
    "parse_args",
    "recipes",
    "save",
    "value_of",
]
