"""Learning rate and stages are functions of the step."""

from types import SimpleNamespace

import pytest

from grpo.schedule import lr_at, stage_at


def test_warmup_is_a_line_that_starts_moving_at_once():
    rates = [lr_at(s, lr=2.0, warmup=4, decay="constant", steps=10) for s in range(10)]
    assert rates == [0.5, 1.0, 1.5, 2.0] + [2.0] * 6


def test_linear_decay_ends_one_step_after_the_run():
    rates = [lr_at(s, lr=1.0, warmup=2, decay="linear", steps=6) for s in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine_decay_to_a_fraction():
    rates = [lr_at(s, lr=2.0, warmup=0, decay="cosine", steps=4, lr_min=0.5) for s in range(4)]
    half = 2**-0.5
    assert rates == pytest.approx([2.0, 1 + 0.5 * (1 + half), 1.5, 1 + 0.5 * (1 - half)])


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_the_rate_is_positive_never_above_lr_and_falls_after_the_warmup(decay):
    rates = [lr_at(s, lr=3e-4, warmup=5, decay=decay, steps=50, lr_min=0.1) for s in range(50)]
    assert all(0 < rate <= 3e-4 for rate in rates) and max(rates) == pytest.approx(3e-4)
    assert (
        rates[:5] == sorted(rates[:5])
        and rates[5:] == sorted(rates[5:], reverse=True)
        and rates[-1] >= 0.1 * 3e-4
    )


def test_a_warmup_longer_than_the_run():
    assert lr_at(9, lr=1.0, warmup=100, decay="cosine", steps=10) == pytest.approx(0.1)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'exponential'.*constant, linear, cosine"):
        lr_at(0, lr=1.0, warmup=0, decay="exponential", steps=2)
    for step in (-1, 2):
        with pytest.raises(ValueError, match="outside the steps of this run, 0 to 1"):
            lr_at(step, lr=1.0, warmup=0, decay="constant", steps=2)


def test_stages():
    first, second, default = (
        SimpleNamespace(until=u, group=g, cap=c) for u, g, c in ((3, 16, 64), (5, 8, 128), (None, 8, 256))
    )
    chosen = [stage_at(step, [first, second], default) for step in range(7)]
    assert chosen == [first] * 3 + [second] * 2 + [default] * 2
    assert stage_at(100, [], default) is default
    with pytest.raises(ValueError, match=r"\[5, 3\]"):
        stage_at(0, [second, first], default)
