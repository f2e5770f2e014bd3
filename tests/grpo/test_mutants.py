"""Are the tests of the objective tests? Each mutant is objective.py with one thing wrong; test_objective.py
must notice every one.

Most of these are real: the numbers refer to published code that trained with them (docs/06 tells the
stories).
"""

import importlib.util
import inspect
import sys
import types
from pathlib import Path

import pytest

import grpo.objective

MUTANTS = {
    "clip inverted for all A": (
        "return torch.minimum(ratio * advantage",
        "return torch.maximum(ratio * advantage",
    ),
    "clip inverted for A < 0": (
        (
            "    return torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - clip_low, 1 + clip_high) * "
            "advantage)"
        ),
        "    a, b = ratio * advantage, torch.clamp(ratio, 1 - clip_low, 1 + clip_high) * advantage\n"
        "    return torch.where(advantage >= 0, torch.minimum(a, b), torch.maximum(a, b))",
    ),
    "clip bounds swapped": (
        "torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - clip_low, 1 + clip_high)",
        "torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - clip_high, 1 + clip_low)",
    ),
    "no clip": (
        "torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - clip_low, 1 + clip_high) * advantage)",
        "ratio * advantage",
    ),
    "clip without the minimum": (
        "torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - clip_low, 1 + clip_high) * advantage)",
        "torch.clamp(ratio, 1 - clip_low, 1 + clip_high) * advantage",
    ),
    "ratio upside down": ("torch.clamp(logp - logp_old, max", "torch.clamp(logp_old - logp, max"),
    "ratio against the reference": (
        "SURROGATES)(logp, logp_old,",
        "SURROGATES)(logp, logp_old if logp_ref is None else logp_ref,",
    ),
    "ratio not clamped": (
        "torch.exp(torch.clamp(logp - logp_old, max=MAX_EXPONENT))",
        "torch.exp(logp - logp_old)",
    ),
    "old follows the policy": ("logp_old = logp.detach() if", "logp_old = logp if"),
    "old not detached": ("logp_old.detach().float()", "logp_old.float()"),
    "sign of the surrogate": ("kl_coef * distance - gain", "kl_coef * distance + gain"),
    "sign of the KL": ("kl_coef * distance - gain", "-kl_coef * distance - gain"),
    "KL coefficient dropped": ("kl_coef * distance - gain", "distance - gain"),
    "KL the wrong way round": (
        "d = torch.clamp(logp_ref - logp, max",
        "d = torch.clamp(logp - logp_ref, max",
    ),
    "k3 is k1": ("    return torch.exp(d) - d - 1", "    return -d"),
    "k3 without its constant": ("torch.exp(d) - d - 1", "torch.exp(d) - d"),
    "KL not clamped": ("d = torch.clamp(logp_ref - logp, max=MAX_EXPONENT)", "d = logp_ref - logp"),
    "only the exponent clamped": (
        "    return torch.exp(d) - d - 1",
        "    return torch.exp(d) - (logp_ref - logp) - 1",
    ),
    "k2 without the half": ("0.5 * (logp - logp_ref) ** 2", "(logp - logp_ref) ** 2"),
    "k3_is with a constant ratio": ("return ratio * k3(", "return ratio.detach() * k3("),
    "biased standard deviation": (
        "reward.std(dim=1, keepdim=True, correction=1)",
        "reward.std(dim=1, keepdim=True, correction=0)",
    ),
    "standard deviation of the batch": (
        "reward.std(dim=1, keepdim=True, correction=1)",
        "reward.std(correction=1)",
    ),
    "mean of the batch": ("reward - reward.mean(dim=1, keepdim=True)", "reward - reward.mean()"),
    "mean of the other axis": (
        "reward - reward.mean(dim=1, keepdim=True)",
        "reward - reward.mean(dim=0, keepdim=True)",
    ),
    "zero spread is divided": ("torch.where(spread < 1e-6, 0.0, centred / divisor)", "centred / divisor"),
    "eps dropped": ('correction=1) + eps,\n        "batch"', 'correction=1),\n        "batch"'),
    "mask dropped": (
        "return mask.float() / divisor",
        "return torch.ones_like(mask, dtype=torch.float32) / divisor",
    ),
    "padding is read": ("logp = torch.where(inside, logp.float(), 0.0)", "logp = logp.float()"),
    "padding of the reference is read": (
        "logp_ref = torch.where(inside, logp_ref.detach().float(), 0.0)",
        "logp_ref = logp_ref.detach().float()",
    ),
    "weights shifted by one": (
        "    inside = weight != 0",
        "    weight = weight.roll(1, dims=1)\n    inside = weight != 0",
    ),
    "length includes padding": (
        "length = mask.sum(dim=1, keepdim=True).clamp(min=1)",
        "length = mask.shape[1]",
    ),
    "completions of the micro-batch": (
        '"completion": length * completions',
        '"completion": length * len(mask)',
    ),
    "tokens of the micro-batch": ('"token": tokens', '"token": mask.sum()'),
    "mean instead of sum": (
        "(weight * (kl_coef * distance - gain)).sum()",
        "(weight * (kl_coef * distance - gain)).mean()",
    ),
    "cap of the micro-batch": (
        '"constant": cap * completions',
        '"constant": mask.sum(1).max() * completions',
    ),
    "gspo: sum instead of mean": (".sum(dim=1, keepdim=True) / length", ".sum(dim=1, keepdim=True)"),
    "gspo: padding in the length": (
        "length = inside.sum(dim=1, keepdim=True)",
        "length = (logp == logp).sum(dim=1, keepdim=True)",
    ),
    "cispo: gradient through the weight": (
        "torch.clamp(ratio, 1 - clip_low, 1 + clip_high).detach() * advantage * logp",
        "torch.clamp(ratio, 1 - clip_low, 1 + clip_high) * advantage * logp",
    ),
    "cispo: nothing clipped": ("torch.clamp(ratio, 1 - clip_low, 1 + clip_high).detach()", "ratio.detach()"),
    "reinforce: with a ratio": (
        "return advantage * logp, torch",
        "return advantage * (logp - logp_old).exp(), torch",
    ),
    "reinforce: its own old policy": (
        "return advantage * logp, torch",
        "return advantage * (2 * logp - logp_old), torch",
    ),
    "statistics: a mean over all tokens": ("(weight * x).sum().detach()", "x.float().mean().detach()"),
    "statistics: clip sides swapped": (
        "clip_low=total(low),\n                           clip_high=total(high)",
        "clip_low=total(high),\n                           clip_high=total(low)",
    ),
    "report: sign": ("return -gradient", "return gradient"),
}

SOURCE = Path(grpo.objective.__file__).read_text()


def objective_tests():
    """The tests of test_objective.py that take the module as their one argument."""
    spec = importlib.util.spec_from_file_location(
        "objective_under_mutation", Path(__file__).with_name("test_objective.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [
        test
        for name, test in vars(module).items()
        if name.startswith("test_") and list(inspect.signature(test).parameters) == ["objective"]
    ]


def load(source: str, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    # dataclasses look their module up
    sys.modules[name] = module
    try:
        exec(compile(source, name, "exec"), module.__dict__)
    finally:
        del sys.modules[name]
    return module


def killers(module) -> list[str]:
    """The first test that fails on this module, or none."""
    for test in TESTS:
        try:
            test(module)
        except Exception:
            # an assertion, or an error in broken code: both are noticed
            return [test.__name__]
    return []


TESTS = objective_tests()


def test_the_original_survives():
    """Or "killed" would mean nothing."""
    assert len(TESTS) >= 20
    assert killers(load(SOURCE, "objective_copy")) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name):
    old, new = MUTANTS[name]
    assert SOURCE.count(old) == 1, (
        f"{name!r} must apply to exactly one place of objective.py, applies to {SOURCE.count(old)}"
    )
    assert killers(load(SOURCE.replace(old, new), "objective_mutant")), (
        f"no test of the objective notices: {name}"
    )
