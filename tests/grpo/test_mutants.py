"""Do the tests of the objective notice a mistake? A mutant is objective.py or variants.py with one mistake.
A test of test_objective.py, test_variants.py or test_variants_by_hand.py must fail on every mutant.

Most of these mistakes are real: they were published in code that people trained with (docs/06 tells where).
"""

import importlib.util
import inspect
import sys
import types
from pathlib import Path

import pytest

import grpo.objective
import grpo.variants

CLIP = "torch.minimum(ratio * advantage, clipped * advantage)"

OBJECTIVE = {
    "clip inverted for all A": (CLIP, CLIP.replace("minimum", "maximum")),
    "clip inverted for A < 0": (
        CLIP,
        f"torch.where(advantage >= 0, {CLIP}, {CLIP.replace('minimum', 'maximum')})",
    ),
    "clip bounds swapped": ("1 - clip_low, 1 + clip_high)\n", "1 - clip_high, 1 + clip_low)\n"),
    "no clip": (CLIP, "ratio * advantage"),
    "clip without the minimum": (CLIP, "clipped * advantage"),
    "default bounds": ('"clip_high": 0.2, **clip', '"clip_high": 0.28, **clip'),
    "bounds not passed on": ("inside, **clip)", "inside, 0.2, 0.2)"),
    "ratio upside down": ("torch.clamp(logp - logp_old, max", "torch.clamp(logp_old - logp, max"),
    "ratio against the reference": (
        "ratio = surrogate(logp, logp_old,",
        "ratio = surrogate(logp, logp_old if logp_ref is None else logp_ref,",
    ),
    "ratio not clamped": (
        "torch.exp(torch.clamp(logp - logp_old, max=MAX_EXPONENT))",
        "torch.exp(logp - logp_old)",
    ),
    "old follows the policy": ("logp_old = logp.detach() if", "logp_old = logp if"),
    "old not detached": ("logp_old.detach().float()", "logp_old.float()"),
    "another surrogate": ("gain, ratio = surrogate(", "gain, ratio = clipped_surrogate("),
    "another estimator": ("distance = kl(", "distance = k3("),
    "sign of the surrogate": ("kl_coef * distance - gain", "kl_coef * distance + gain"),
    "sign of the KL": ("kl_coef * distance - gain", "-kl_coef * distance - gain"),
    "KL coefficient dropped": ("kl_coef * distance - gain", "distance - gain"),
    "KL the wrong way round": (
        "d = torch.clamp(logp_ref - logp, max",
        "d = torch.clamp(logp - logp_ref, max",
    ),
    "k3 is k1": ("    return torch.exp(d) - d - 1", "    return -d"),
    "k3 without its constant": ("torch.exp(d) - d - 1", "torch.exp(d) - d"),
    "only the exponent is clamped": (
        "d = torch.clamp(logp_ref - logp, max=MAX_EXPONENT)\n    return torch.exp(d) - d - 1",
        "d = logp_ref - logp\n    return torch.exp(torch.clamp(d, max=MAX_EXPONENT)) - d - 1",
    ),
    "k3_is against the old ratio's absence": ("logp_ref, token_ratio(logp, logp_old))", "logp_ref, 1.0)"),
    "biased standard deviation": ("dim=1, keepdim=True, correction=1)", "dim=1, keepdim=True, correction=0)"),
    "standard deviation of the batch": ("reward.std(dim=1, keepdim=True, correction=1)", "reward.std()"),
    "mean of the batch": ("reward - reward.mean(dim=1, keepdim=True)", "reward - reward.mean()"),
    "mean of the other axis": (
        "reward - reward.mean(dim=1, keepdim=True)",
        "reward - reward.mean(dim=0, keepdim=True)",
    ),
    "zero spread is divided": (
        "torch.where(spread < 1e-6, 0.0, centred / scale(reward, eps))",
        "centred / scale(reward, eps)",
    ),
    "spread compared with 0": ("spread < 1e-6", "spread == 0"),
    "eps dropped": ("correction=1) + eps", "correction=1)"),
    "another scale": ("centred / scale(reward, eps)", "centred / group_std(reward, eps)"),
    "mask dropped": ("return mask.float() /", "return torch.ones_like(mask, dtype=torch.float32) /"),
    "padding is read": ("logp = torch.where(inside, logp.float(), 0.0)", "logp = logp.float()"),
    "padding of the old policy is read": (
        "torch.where(inside, logp_old.detach().float(), 0.0)",
        "logp_old.detach().float()",
    ),
    "padding of the reference is read": (
        "torch.where(inside, logp_ref.detach().float(), 0.0)",
        "logp_ref.detach().float()",
    ),
    "weights shifted by one": (
        "    inside = weight != 0",
        "    weight = weight.roll(1, dims=1)\n    inside = weight != 0",
    ),
    "length includes padding": (
        "length = mask.sum(dim=1, keepdim=True).clamp(min=1)",
        "length = mask.shape[1]",
    ),
    "completions of the micro-batch": ("return length * completions", "return length * len(length)"),
    "weights not passed the totals": (
        "weighting(length, tokens, completions, cap)",
        "weighting(length, mask.sum(), len(mask), cap)",
    ),
    "mean instead of sum": (
        "(weight * (kl_coef * distance - gain)).sum()",
        "(weight * (kl_coef * distance - gain)).mean()",
    ),
    "entropy bonus: coefficient dropped": (
        "return coef * (weight * torch.where(weight",
        "return (weight * torch.where(weight",
    ),
    "entropy bonus: unweighted": (
        "coef * (weight * torch.where(weight != 0, entropy.float(), 0.0)).sum()",
        "coef * torch.where(weight != 0, entropy.float(), 0.0).sum()",
    ),
    "entropy bonus: a mean": (
        "torch.where(weight != 0, entropy.float(), 0.0)).sum()",
        "torch.where(weight != 0, entropy.float(), 0.0)).mean()",
    ),
    "entropy bonus: padding is read": ("torch.where(weight != 0, entropy.float(), 0.0)", "entropy.float()"),
    "entropy bonus: no gradient": (
        "torch.where(weight != 0, entropy.float(), 0.0)",
        "torch.where(weight != 0, entropy.detach().float(), 0.0)",
    ),
    "statistics: a mean over all tokens": ("(weight * x).sum().detach()", "x.float().mean().detach()"),
    "statistics: clip sides swapped": (
        'clip_low=total((ratio < 1 - clip["clip_low"]) & (advantage < 0))',
        'clip_low=total((ratio > 1 + clip["clip_high"]) & (advantage > 0))',
    ),
    "statistics: the sign of A at the low side": (
        '(ratio < 1 - clip["clip_low"]) & (advantage < 0)',
        'ratio < 1 - clip["clip_low"]',
    ),
    "statistics: the sign of A at the high side": (
        '(ratio > 1 + clip["clip_high"]) & (advantage > 0)',
        'ratio > 1 + clip["clip_high"]',
    ),
    "statistics: the bounds swapped": ('ratio > 1 + clip["clip_high"]', 'ratio > 1 + clip["clip_low"]'),
    "statistics: the clamped share": ("clamped = logp_ref - logp > MAX", "clamped = logp - logp_ref > MAX"),
    "report: sign": ("return -gradient", "return gradient"),
    "report: another loss": ("advantage, weight, **how)", "advantage, weight)"),
}

VARIANTS = {
    "k2 without its half": ("0.5 * (logp - logp_ref) ** 2", "(logp - logp_ref) ** 2"),
    "k1 upside down": ("return logp - logp_ref", "return logp_ref - logp"),
    "k3_is with a constant ratio": ("return ratio * k3(", "return ratio.detach() * k3("),
    "k3_is without the ratio": ("return ratio * k3(", "return k3("),
    "names of estimators exchanged": ('"k2": k2, "k3": k3', '"k2": k3, "k3": k2'),
    "gspo: sum instead of mean": (".sum(dim=1, keepdim=True) / length", ".sum(dim=1, keepdim=True)"),
    "gspo: padding in the length": (
        "length = inside.sum(dim=1, keepdim=True)",
        "length = (logp == logp).sum(dim=1, keepdim=True)",
    ),
    "gspo: not clipped": (CLIP, "ratio * advantage"),
    "gspo: clip inverted": (CLIP, CLIP.replace("minimum", "maximum")),
    "gspo: bounds swapped": (
        "clipped = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)",
        "clipped = torch.clamp(ratio, 1 - clip_high, 1 + clip_low)",
    ),
    "gspo: ratio not clamped": ("torch.clamp(mean_log_ratio, max=MAX_EXPONENT)", "mean_log_ratio"),
    "cispo: gradient through the weight": (
        "torch.clamp(ratio, 1 - clip_low, 1 + clip_high).detach() * advantage * logp",
        "torch.clamp(ratio, 1 - clip_low, 1 + clip_high) * advantage * logp",
    ),
    "cispo: nothing clipped": ("torch.clamp(ratio, 1 - clip_low, 1 + clip_high).detach()", "ratio.detach()"),
    "cispo: bounds swapped": (
        "torch.clamp(ratio, 1 - clip_low, 1 + clip_high).detach()",
        "torch.clamp(ratio, 1 - clip_high, 1 + clip_low).detach()",
    ),
    "reinforce: with a ratio": (
        "return advantage * logp, torch",
        "return advantage * (logp - logp_old).exp(), torch",
    ),
    "reinforce: its own old policy": (
        "return advantage * logp, torch",
        "return advantage * (2 * logp - logp_old), torch",
    ),
    "names of surrogates exchanged": ('"gspo": gspo, "cispo": cispo', '"gspo": cispo, "cispo": gspo'),
    "batch: biased deviation": ("reward.std(correction=1)", "reward.std(correction=0)"),
    "batch: eps dropped": ("reward.std(correction=1) + eps", "reward.std(correction=1)"),
    "none: divided": ("torch.ones_like(reward[:, :1])", "group_std(reward, eps)"),
    "names of scales exchanged": (
        '"none": undivided, "batch": batch_std',
        '"none": batch_std, "batch": undivided',
    ),
    "token: completions": ("    return tokens\n", "    return completions\n"),
    "constant: without the cap": ("return cap * completions", "return completions"),
    "constant: the length": ("return cap * completions", "return length * completions"),
    "names of weightings exchanged": (
        '"token": token_mean, "completion": completion_mean',
        '"token": completion_mean, "completion": token_mean',
    ),
}

SOURCES = {module: Path(module.__file__).read_text() for module in (grpo.objective, grpo.variants)}
FIXTURES = ["objective", "variants"]


def cases_of(name: str) -> list:
    """The tests of a file whose arguments are the modules under test, and nothing else."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{name}_under_mutation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [
        test
        for key, test in vars(module).items()
        if key.startswith("test_")
        and set(inspect.signature(test).parameters) <= set(FIXTURES)
        and inspect.signature(test).parameters
    ]


def load(objective: str, variants: str) -> dict[str, types.ModuleType]:
    """Both modules from these sources. The variants import this objective, not the installed one."""
    found = {name: types.ModuleType(f"{name}_mutant") for name in FIXTURES}
    real = sys.modules["grpo.objective"]
    try:
        for name, source in zip(FIXTURES, (objective, variants)):
            # dataclasses look their module up
            sys.modules[f"{name}_mutant"] = found[name]
            exec(compile(source, name, "exec"), found[name].__dict__)
            sys.modules["grpo.objective"] = found["objective"]
    finally:
        sys.modules["grpo.objective"] = real
        for name in FIXTURES:
            sys.modules.pop(f"{name}_mutant", None)
    return found


def killer(modules: dict) -> str | None:
    """The first test that fails on these modules."""
    for test in TESTS:
        try:
            test(*(modules[name] for name in inspect.signature(test).parameters))
        except Exception:
            # an assertion, or an error in broken code: both are noticed
            return test.__name__
    return None


TESTS = [test for name in ("objective", "variants", "variants_by_hand") for test in cases_of(f"test_{name}")]


def test_the_original_survives():
    """Otherwise "killed" would mean nothing."""
    assert len(TESTS) >= 30
    assert killer(load(*SOURCES.values())) is None


@pytest.mark.parametrize(
    "module, name", [*((grpo.objective, n) for n in OBJECTIVE), *((grpo.variants, n) for n in VARIANTS)]
)
def test_mutant_is_killed(module, name):
    old, new = (OBJECTIVE | VARIANTS)[name]
    count = SOURCES[module].count(old)
    assert count == 1, f"{name!r} must apply to exactly one place of {module.__name__}, applies to {count}"
    sources = SOURCES | {module: SOURCES[module].replace(old, new)}
    assert killer(load(*sources.values())), f"no test of the objective notices: {name}"
