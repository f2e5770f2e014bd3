"""Rewards by rule: a completion's text in, a number out. No model judges another.

A rule is a function (text, example, length) -> float in the table REWARDS. A recipe gives weights to names
of the table and to functions of its own (`FILE.py:FUNCTION`, grpo/rewards/user_code.py). A rule reads the
text of `Chat.texts`: with the "<think>" that the prompt opened, without the stop token.

Departures from VisualThinker-R1-Zero: `accuracy` reads one <answer> outside the thinking and nothing else
(theirs, `accuracy_paper`, takes the first one, or the whole text), and `format` requires each tag exactly
once (theirs is `format_paper`).
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from data.answers.parser import extract, is_right, is_right_paper, well_formed, well_formed_paper
from grpo.names import choose
from grpo.rewards.user_code import RewardError, UserReward, names_a_file, open_reward
from grpo.timing import timed

# the slope of `overlong` as a share of the cap; DAPO: the last 4,096 of 20,480 tokens
CACHE = 0.2


def accuracy(text, example, length) -> float:
    """1 if the one <answer> is right, else 0: a choice by letter or text, a free one as text or number."""
    return float(is_right(text, example))


def accuracy_paper(text, example, length) -> float:
    """1 by VisualThinker-R1-Zero's string rules, else 0: the first <answer>, or the whole text, is the
    answer's text, or its last letter is."""
    return float(is_right_paper(text, example))


def accuracy_math_verify(text, example, length) -> float:
    """1 if math-verify finds the one <answer> equal to the right one, else 0. Choices: as in `accuracy`."""
    if example.choices:
        return accuracy(text, example, length)
    return 0.0 if extract(text, ()).why else _math_verify("answer", text, example, length)


def accuracy_paper_math_verify(text, example, length) -> float:
    """1 if math-verify or `accuracy_paper` finds the right answer anywhere, else 0 (the whole rule)."""
    return accuracy_paper(text, example, length) or _math_verify("paper", text, example, length)


def _math_verify(function, text, example, length) -> float:
    """0 for a text that math-verify cannot finish, because a completion must not stop the run."""
    try:
        return open_reward(f"grpo.rewards.math_verify:{function}")(text, example, length)
    except RewardError as error:
        print(f"counted as wrong: {error}", file=sys.stderr)
        return 0.0


def format(text, example, length) -> float:
    """1 for <think>...</think><answer>...</answer>, each tag once, only whitespace around; else 0."""
    return float(well_formed(text))


def format_paper(text, example, length) -> float:
    """1 if the text matches VisualThinker-R1-Zero's regex, which counts no tags, else 0."""
    return float(well_formed_paper(text))


def hard_format(text, example, length) -> float:
    """1 if well formed *and* right, else 0 (Vision-R1, arXiv 2503.06749). "Final Answer:" may begin it."""
    return float(well_formed(text) and is_right(text, example))


def length(text, example, length) -> float:
    """0.001 per token, with the stop token. (The paper's ablation: completions grow, accuracy does not.)"""
    if length is None:
        raise ValueError("the reward part 'length' counts tokens: call score(..., lengths=rollout.length).")
    return 0.001 * float(length)


def overlong(length: float, cap: int, cache: float) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13): 0 up to cap - cache tokens, then linear
    down to -1 at the cap, and -1 beyond.  cap: L_max, the longest completion, tokens.  cache: L_cache, the
    length of the slope, tokens; with 0 it is a step just above the cap."""
    if length <= cap - cache:
        return 0.0
    return max((cap - cache - length) / cache, -1.0) if cache else -1.0


def overlong_part(text, example, length, cap) -> float:
    """0, and linear down to -1 over the last fifth of the cap (`overlong`)."""
    if length is None or cap is None:
        call = "score(..., lengths=rollout.length, cap=cap)"
        raise ValueError(f"the reward part 'overlong' compares tokens with the cap: call {call}.")
    return overlong(float(length), cap, CACHE * cap)


_RULES = [accuracy, accuracy_paper, accuracy_math_verify, accuracy_paper_math_verify]
_RULES += [format, format_paper, hard_format, length]
REWARDS: dict[str, Callable] = {each.__name__: each for each in _RULES} | {"overlong": overlong_part}


def rule(name: str, cap: int | None = None) -> Callable:
    """The function (text, example, length) -> float of a part's name.  cap: tokens; for "overlong".  Raises
    ValueError for an unknown name or a missing extra, and RewardError for a file that does not load."""
    if names_a_file(name):
        return open_reward(name)
    found = choose("reward", name, REWARDS)
    if name.endswith("math_verify") and importlib.util.find_spec("math_verify") is None:
        raise ValueError(f"the reward {name!r} needs math-verify, an optional extra: pip install math-verify")
    return partial(found, cap=cap) if name == "overlong" else found


# [Eq. 2]
@timed("score")
def score(
    texts: list[list[str]],
    examples: list,
    parts: dict[str, float],
    lengths: Tensor | None = None,
    cap: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The reward of every completion: r = sum over parts of weight * part.

    texts     P lists of G texts, from `Chat.texts`
    examples  the P examples that they answer
    parts     {name in REWARDS, or FILE.py:FUNCTION: weight}; a part of weight 0 is computed and logged only
    lengths   (P, G) tokens of each completion; for "length" and "overlong". A row of length 0 is on another
              rank: its text is not read, and its numbers are 0
    cap       longest completion, tokens; for "overlong"

    -> reward (P, G) float32, {name: part (P, G) float32, unweighted}.
    Raises ValueError for an unknown name, no parts, a weight that is not finite, or shapes that disagree, and
    RewardError if a user's function fails.
    """
    rules = {name: rule(name, cap) for name in parts}
    if not parts or not all(math.isfinite(weight) for weight in parts.values()):
        wanted = f"at least one part, each with a finite weight; got {parts}. Known: {', '.join(REWARDS)}."
        raise ValueError(f"rewards must name {wanted}")
    # a rank may have no row; then `lengths` has the group size
    sizes = {len(group) for group in texts} or set([] if lengths is None else lengths.shape[1:])
    if len(texts) != len(examples) or len(sizes) != 1:
        got = f"{len(texts)} groups of sizes {sorted(sizes)} for {len(examples)} examples"
        raise ValueError(f"score: {got}; expected one group per example, all of one size.")
    shape = (len(texts), sizes.pop())
    if lengths is not None and tuple(lengths.shape) != shape:
        raise ValueError(f"score: lengths has shape {tuple(lengths.shape)}, the texts {shape}.")
    here = torch.ones(shape, dtype=torch.bool) if lengths is None else lengths > 0  # (P, G)
    rows = here.flatten().nonzero().flatten().tolist()
    counts = [None] * len(rows) if lengths is None else lengths[here].tolist()
    flat = [texts[b // shape[1]][b % shape[1]] for b in rows]
    asked = [examples[b // shape[1]] for b in rows]

    scored = {}
    for name, pay in rules.items():
        for part, numbers in paid(name, pay, flat, asked, counts).items():
            scored[part] = torch.zeros(shape).masked_scatter(here, torch.tensor(numbers, dtype=torch.float32))
    reward = torch.stack([weight * scored[name] for name, weight in parts.items()]).sum(dim=0)  # (P, G)
    return reward, scored


def paid(name: str, pay: Callable, texts: list, examples: list, lengths: list) -> dict[str, list[float]]:
    """One rule's numbers for B completions: {name: B rewards}, and of a user's function {name/metric: B}."""
    if not isinstance(pay, UserReward):
        return {name: [pay(*each) for each in zip(texts, examples, lengths)]}
    rows = pay.rows(texts, examples, lengths)
    names = [name, *(f"{name}/{metric}" for metric in pay.metrics)]
    return {part: [row[i] for row in rows] for i, part in enumerate(names)}
