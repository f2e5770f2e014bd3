"""How answers are read and compared (`docs/answers.md`)."""

from data.answers.parser import extract, is_right, is_right_paper, read, well_formed, well_formed_paper

__all__ = ["extract", "is_right", "is_right_paper", "read", "well_formed", "well_formed_paper"]
