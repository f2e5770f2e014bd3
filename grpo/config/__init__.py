"""Settings: recipes, `key=value` arguments, and what a run folder keeps of them."""

from grpo.config.checks import contradictions, value_of
from grpo.config.parse import check_same_run, help_text, list_text, load, load_run, parse_args, recipes, save
from grpo.config.settings import HEADINGS, Config, Stage, differences
from grpo.config.typed import ConfigError

__all__ = ["HEADINGS", "Config", "ConfigError", "Stage", "check_same_run", "contradictions", "differences"]
__all__ += ["help_text", "list_text", "load", "load_run", "parse_args", "recipes", "save", "value_of"]
