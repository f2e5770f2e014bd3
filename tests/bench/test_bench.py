"""Every benchmark of speed runs, and its last line is the promised JSON object. Sizes are tiny; no figure is
compared with a target here."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

from tests.bench import logprobs, optimizers, rollout, roofline, save, scaling, shared_prompt, step, timing

SCRIPTS = {
    "rollout": (rollout, "speedup"),
    "logprobs": (logprobs, "memory_saving"),
    "shared_prompt": (shared_prompt, "speedup"),
    "scaling": (scaling, "prompt_traffic_growth"),
    "roofline": (roofline, "machine"),
    "step": (step, "not_arithmetic"),
    "save": (save, "background: stopped"),
    "optimizers": (optimizers, "random"),
}


@pytest.fixture(autouse=True)
def no_children(monkeypatch):
    """The memory of a process of its own is asked for in this one, where the peak is another: what is
    tested is that all of it runs."""

    def inside(script, *args):
        extra = []
        monkeypatch.setattr(
            module := {"logprobs.py": logprobs, "shared_prompt.py": shared_prompt}[script.rpartition("/")[2]],
            "extra_memory",
            lambda work: extra.append(work()) or 10**9,
        )
        module.main(list(args))
        return {"extra": 10**9 - 1}

    for module in (logprobs, shared_prompt):
        monkeypatch.setattr(module, "child", inside)


@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_and_ends_with_its_figures(name, capsys):
    module, headline = SCRIPTS[name]
    found = module.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == json.loads(json.dumps(found))
    assert found["bench"] == name and headline in found and found["about"]["commit"]
    assert re.search(rf"python tests/bench/{name}\.py", module.__doc__)


def test_the_prompts_part_of_the_traffic_does_not_grow():
    policy = shared_prompt.random_policy(64, 2, 128, 128)
    read = {}
    for G in (1, 8):
        with scaling.traffic() as read[G]:
            scaling.decode(policy, 40, G, 3)
    # steps, blocks, keys and values, tokens, numbers, bytes: float64, as attention reads them on a CPU
    assert read[1]["prompt"] == read[8]["prompt"] == 3 * 2 * 2 * 39 * 64 * 8
    assert read[8]["own"] == 8 * read[1]["own"]


def test_turns_and_figures(monkeypatch):
    order, clock = [], iter(range(1000))
    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: float(next(clock)))
    seconds = timing.take_turns(
        {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), next(clock))}, 2
    )
    assert order == ["a", "b", "a", "b", "b", "a"] and seconds == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert timing.ratio([4.0, 9.0, 100.0], [2.0, 3.0, 1.0]) == 3.0
    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == 2.0


def test_operations_are_counted_in_attention_too():
    P, heads, n, E = 2, 3, 8, 16
    q, k, v = (torch.randn(P, heads, n, E, requires_grad=True) for _ in "qkv")
    # a product of n queries and n keys
    one = 2 * P * heads * n * n * E
    assert timing.operations(lambda: F.scaled_dot_product_attention(q, k, v)) == (0, 2 * one)
    assert timing.operations(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)) == (0, one)
    assert timing.operations(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == (
        0,
        (2 + 5) * one,
    )
    x, w = torch.randn(5, 4), torch.randn(6, 4)
    assert timing.operations(lambda: F.linear(x, w)) == (2 * 5 * 6 * 4, 0)
    a, b = torch.randn(3, 5, 4), torch.randn(3, 4, 6)
    assert timing.operations(lambda: (a @ b).baddbmm_(a, b)) == (0, 2 * 2 * 3 * 5 * 6 * 4)


def test_what_is_kept_is_counted_once_and_without_the_parameters():
    layer = torch.nn.Linear(4, 4, bias=False)
    x = torch.ones(2, 4)
    assert timing.kept_for_backward(layer, lambda: layer(x) + layer(x)) == x.nbytes


@pytest.mark.slow
def test_the_gpu_script_runs_in_small_sizes(capsys):
    """On a CPU, without what needs a GPU; half a minute, because it starts train.py five times."""
    from tests.bench import gpu

    figures = gpu.main(["--quick"])["figures"]
    assert not [name for name in figures if name.startswith("FAILED")], figures
    assert (
        figures["a resumed run ends as the straight one, bit for bit"]
        and figures["log-prob gap, float32, largest"] < 1e-4
        and "step, plain, time/learn" in figures
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bench"] == "gpu"
