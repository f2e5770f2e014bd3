"""Rewards by rule: a completion's text in, a number out. No model judges another.

A rule is a function (text, example, length) -> float in a table; a recipe gives weights to the names it wants. The rules read the text as
a person would see it (`Chat.texts`: with the "<think>" that the prompt opened, without the stop token), and share their parser with the
evaluation.

Departures from VisualThinker-R1-Zero: `accuracy` reads one <answer> outside the thinking and nothing else (theirs also parses the whole
text, so an answer can be paid without being given), and `format` wants each tag exactly once (theirs is here as `format_paper`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data.choices import is_right, well_formed, well_formed_paper
from grpo.objective import choose


def accuracy(text, example, length) -> float:
    """1 if the one <answer> names the right choice, by letter or by text, else 0."""
    return float(is_right(text, example))


def format(text, example, length) -> float:
    """1 if the text is <think>...</think><answer>...</answer> with each tag exactly once and nothing but whitespace around, else 0."""
    return float(well_formed(text))


def format_paper(text, example, length) -> float:
    """1 if the text matches VisualThinker-R1-Zero's regex, which counts no tags, else 0."""
    return float(well_formed_paper(text))


def hard_format(text, example, length) -> float:
    """1 only if well formed *and* right (Vision-R1, arXiv 2503.06749: the hard formatting result reward), else 0."""
    return float(well_formed(text) and is_right(text, example))


def length(text, example, length) -> float:
    """0.001 per token, stop token included (the paper's ablation: the completions grow, the accuracy doesn't)."""
    if length is None:
        raise ValueError("the reward part 'length' counts tokens: call score(..., lengths=rollout.length).")
    return 0.001 * float(length)


REWARDS = {"accuracy": accuracy, "format": format, "format_paper": format_paper, "hard_format": hard_format, "length": length}


# [Eq. 2]
def score(texts: list[list[str]], examples: list, parts: dict[str, float],
          lengths: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The reward of every completion: r = sum over parts of weight * part.

    texts     P lists of G texts, as `Chat.texts` gives them
    examples  the P examples they answer
    parts     {name in REWARDS: weight}; a weight of 0 computes and logs the part without paying for it
    lengths   (P, G) tokens of each completion, needed by "length" only

    -> reward (P, G) float32, {name: part (P, G) float32, unweighted}.
    Raises ValueError for an unknown name (naming the nearest), no parts, a weight that isn't finite, or shapes that disagree.
    """
    rules = {name: choose("reward", name, REWARDS) for name in parts}
    if not parts or not all(math.isfinite(weight) for weight in parts.values()):
        raise ValueError(f"rewards must name at least one part, each with a finite weight; got {parts}. Known: {', '.join(REWARDS)}.")
    sizes = {len(group) for group in texts}
    if len(texts) != len(examples) or len(sizes) != 1:
        raise ValueError(f"score: {len(texts)} groups of sizes {sorted(sizes)} for {len(examples)} examples; expected one group per "
                         "example, all of one size.")
    shape = (len(texts), sizes.pop())
    if lengths is not None and tuple(lengths.shape) != shape:
        raise ValueError(f"score: lengths has shape {tuple(lengths.shape)}, the texts {shape}.")
    counts = [[None] * shape[1]] * shape[0] if lengths is None else lengths.tolist()

    scored = {name: torch.tensor([[rule(text, example, count) for text, count in zip(group, row)]
                                  for group, example, row in zip(texts, examples, counts)], dtype=torch.float32)
              for name, rule in rules.items()}  # each (P, G)
    reward = torch.stack([parts[name] * part for name, part in scored.items()]).sum(dim=0)  # (P, G)
    return reward, scored
