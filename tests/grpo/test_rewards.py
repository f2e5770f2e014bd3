"""Rewards: what is paid, and what must not be. Each adversarial text is a hack that was paid somewhere (see docs/04)."""

import pytest
import torch

from data.types import Example
from grpo.rewards import REWARDS, score

ASKED = Example(uid="t/0", question="Which is nearer?", choices=("the red cube", "the blue ball"), answer="the blue ball")
FREE = Example(uid="t/1", question="How many?", choices=(), answer="3")


def paid(text, part, example=ASKED, length=None):
    lengths = None if length is None else torch.tensor([[length]])
    return score([[text]], [example], {part: 1.0}, lengths)[1][part].item()


@pytest.mark.parametrize("text, accuracy, format, paper, hard", [
    ("<think>look</think><answer>B</answer>", 1, 1, 1, 1),
    ("<think>look</think>\n<answer>(B) the blue ball</answer>\n", 1, 1, None, 1),
    ("<think>look</think><answer>the blue ball</answer>", 1, 1, 1, 1),
    ("<think>look</think><answer>A</answer>", 0, 1, 1, 0),
    ("<think>look<answer>B</answer>", 0, 0, 0, 0),                                  # the answer is inside the thinking
    ("<answer>B</answer>", 1, 0, 0, 0),                                             # right without thinking: only hard_format minds
    ("<think>look</think><answer>A or B</answer>", 0, 1, 1, 0),                     # hedging
    ("<think>look</think><answer></answer>", 0, 1, 1, 0),                           # `"" in truth` is true
    ("<think>look</think><answer>A</answer><answer>B</answer>", 0, 0, 1, 0),        # one of them will be right; the paper's regex pays
    ("<think>B</think>", 0, 0, 0, 0),
    ("the blue ball", 0, 0, 0, 0),                                                  # named, but not given as the answer
    ("", 0, 0, 0, 0),
    ("<think>a\nb</think> <answer>B</answer> and more", 1, 0, 0, 0),                # a newline is no obstacle; a tail breaks the form
])
def test_what_each_text_is_paid(text, accuracy, format, paper, hard):
    assert paid(text, "accuracy") == accuracy and paid(text, "format") == format and paid(text, "hard_format") == hard
    assert paper is None or paid(text, "format_paper") == paper


def test_free_answers():
    assert paid("<think>x</think><answer>3</answer>", "accuracy", FREE) == 1
    assert paid("<think>x</think><answer>13</answer>", "accuracy", FREE) == 0


def test_length_counts_tokens_not_words():
    assert paid("one two", "length", length=250) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="lengths=rollout.length"):
        paid("one two", "length")


def test_score_is_the_weighted_sum_and_keeps_the_parts():
    good, plain, bad = "<think>x</think><answer>B</answer>", "<answer>B</answer>", "no"
    lengths = torch.tensor([[10, 20, 30], [40, 50, 60]])
    reward, parts = score([[good, plain, bad], [bad, bad, good]], [ASKED, ASKED], {"accuracy": 1.0, "format": 0.5, "length": 0.0}, lengths)
    assert parts["accuracy"].tolist() == [[1, 1, 0], [0, 0, 1]] and parts["format"].tolist() == [[1, 0, 0], [0, 0, 1]]
    torch.testing.assert_close(parts["length"], 0.001 * lengths)  # a weight of 0 is logged, not paid
    torch.testing.assert_close(reward, torch.tensor([[1.5, 1.0, 0.0], [0.0, 0.0, 1.5]]))
    assert reward.dtype == torch.float32 and list(parts) == ["accuracy", "format", "length"]


def test_each_group_is_scored_against_its_own_example():
    other = Example(uid="t/2", question="Which?", choices=("the blue ball", "the red cube"), answer="the blue ball")
    text = "<think>x</think><answer>A</answer>"
    reward, _ = score([[text], [text]], [ASKED, other], {"accuracy": 1.0})
    assert reward.tolist() == [[0.0], [1.0]]


def test_every_part_is_documented_and_stays_within_one():
    for name, rule in REWARDS.items():
        assert rule.__doc__ and 0 <= rule("<think>x</think><answer>B</answer>", ASKED, 9) <= 1, name


def test_mistakes_are_named():
    group = [["a", "b"]]
    for call, message in (
        (lambda: score(group, [ASKED], {"acuracy": 1.0}), "unknown reward 'acuracy'. Did you mean 'accuracy'"),
        (lambda: score(group, [ASKED], {}), "at least one part"),
        (lambda: score(group, [ASKED], {"format": float("nan")}), "finite"),
        (lambda: score(group, [ASKED, FREE], {"format": 1.0}), "1 groups .* for 2 examples"),
        (lambda: score([["a"], ["a", "b"]], [ASKED, FREE], {"format": 1.0}), r"sizes \[1, 2\]"),
        (lambda: score(group, [ASKED], {"format": 1.0}, torch.ones(2, 1)), r"lengths has shape \(2, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
