"""Do the tests of the loop notice a mistake? A mutant is train.py with one mistake; a test of test_loop.py
must fail on every mutant."""

import inspect

import pytest
import test_loop
from test_loop import SOURCE, load_copy

LOOP = {
    "clip bounds swapped": (
        "clip_low=cfg.loss.clip_low,\n        clip_high=cfg.loss.clip_high",
        "clip_low=cfg.loss.clip_high,\n        clip_high=cfg.loss.clip_low",
    ),
    "clip_high is clip_low": ("clip_high=cfg.loss.clip_high", "clip_high=cfg.loss.clip_low"),
    "clip bounds dropped": (
        "        clip_low=cfg.loss.clip_low,\n        clip_high=cfg.loss.clip_high,\n",
        "",
    ),
    "surrogate dropped": ("        surrogate=SURROGATES[cfg.loss.surrogate],\n", ""),
    "KL estimator dropped": ("        kl=KL_ESTIMATORS[cfg.loss.kl],\n", ""),
    "KL coefficient dropped": ("        kl_coef=cfg.loss.kl_coef,\n", ""),
    "entropy without a gradient": ('"entropy_grad": cfg.loss.entropy_coef > 0', '"entropy_grad": False'),
    "entropy bonus dropped": ("    if cfg.loss.entropy_coef:\n", "    if False:\n"),
    "entropy coefficient is the penalty's": (
        "part.weight, cfg.loss.entropy_coef)",
        "part.weight, cfg.loss.kl_coef)",
    ),
    "entropy bonus: sign": ("loss = loss - bonus\n", "loss = loss + bonus\n"),
    "entropy bonus: not in the statistics": ("stats.loss = stats.loss - bonus.detach()", "pass"),
    "entropy bonus in no idle group": ("batch.all_teach = cfg.loss.entropy_coef > 0", "pass"),
    "temperature dropped in the loss": (
        "temperature=cfg.temperature, chunk=chunk",
        "temperature=1.0, chunk=chunk",
    ),
    "full log-probs truncated": ('if cfg.logp_of == "sampled"', 'if cfg.logp_of != ""'),
    "temperature dropped in the rollout": ("temperature=cfg.temperature,\n", "temperature=1.0,\n"),
    "temperature dropped for the reference": (
        "score_reference(run.reference, batch, cfg.temperature,",
        "score_reference(run.reference, batch, 1.0,",
    ),
    "temperature dropped for the old policy": (
        "score_tokens(run.policy, batch, cfg.temperature,",
        "score_tokens(run.policy, batch, 1.0,",
    ),
    "old and reference swapped": (
        "        part.logp_old,\n        part.logp_ref,",
        "        part.logp_ref,\n        part.logp_old,",
    ),
    "old policy dropped": ("        part.logp_old,\n", "        None,\n"),
    "the reference is the policy": ("score_reference(run.reference,", "score_reference(run.policy,"),
    "the old policy is the reference": (
        "return score_tokens(run.policy,",
        "return score_tokens(run.reference,",
    ),
    "old policy scored with one update": ("cfg.loss.minibatches > 1", "cfg.loss.minibatches > 0"),
    "old policy not scored with mini-batches": (
        "if cfg.loss.updates * cfg.loss.minibatches > 1",
        "if cfg.loss.updates > 1",
    ),
    "mini-batches dropped": ("batch.minibatches(cfg.loss.minibatches)", "batch.minibatches(1)"),
    "mini-batches not repeated": ("cfg.loss.updates * batch.minibatches", "batch.minibatches"),
    "every update learns from all": ("run.budget, part)", "run.budget)"),
    "scale dropped": (
        "group_advantages(batch.reward, scale=ADVANTAGE_SCALES[cfg.advantage])",
        "group_advantages(batch.reward)",
    ),
    "own rewards only": ("ranks.sum(share.among_all(reward))", "share.among_all(reward)"),
    "rows of another rank": ("advantage[batch.share.places]", "advantage[: len(batch.prompts)]"),
    "rows of other ranks too": ("cfg.logp_of, rows)", "cfg.logp_of)"),
    "weighting dropped": (
        "weigh = partial(token_weights, weighting=WEIGHTINGS[cfg.loss.weighting])",
        "weigh = token_weights",
    ),
    "own tokens only": ("ranks.sum(batch.counts)", "(batch.counts)"),
    "division by 0": (".clamp(min=1)", ""),
    "tokens and completions swapped": (
        "tokens=total[0], completions=total[1], cap=stage.cap",
        "tokens=total[1], completions=total[0], cap=stage.cap",
    ),
    "cap of the settings in the weights": (
        "completions=total[1], cap=stage.cap",
        "completions=total[1], cap=cfg.cap",
    ),
    "cap of the settings in the rollout": ("        cap=stage.cap,\n", "        cap=cfg.cap,\n"),
    "cap of the settings in the rewards": ("rollout.length, stage.cap)", "rollout.length, cfg.cap)"),
    "group of the settings": ("        group=stage.group,\n", "        group=cfg.group,\n"),
    "stages ignored": ("stage = stage_at(step, cfg.stages, cfg)", "stage = cfg"),
    "stage of the next step": ("stage_at(step, cfg.stages, cfg)", "stage_at(step + 1, cfg.stages, cfg)"),
    "seed dropped": ("address=(cfg.seed, step,", "address=(0, step,"),
    "step dropped from the address": ("address=(cfg.seed, step,", "address=(cfg.seed, 0,"),
    "max_rows dropped": ("stage.cap, cfg.max_rows)", "stage.cap)"),
    "learning rate of the first step": (
        "        run.optimizer.set_lr(learning_rate(cfg, step))\n\n        # 1",
        "        run.optimizer.set_lr(learning_rate(cfg, run.step))\n\n        # 1",
    ),
    "warm-up dropped": ("warmup=optim.warmup", "warmup=0"),
    "lr_min dropped": (", lr_min=optim.lr_min", ""),
    "gradient not clipped": (
        "grad_norm = run.optimizer.clip_and_step(cfg.optim.max_grad_norm)\n\n        # 5",
        "grad_norm = run.optimizer.clip_and_step(0)\n\n        # 5",
    ),
    "begins at 0": ("        # this step's group", "        step -= run.step\n        # this step's group"),
    "steps count from 0": ("log.step(step + 1, batch", "log.step(step, batch"),
    "dynamic sampling never stops": ("if groups.enough_differ(cfg.enough):", "if False:"),
    "enough dropped": ("groups.enough_differ(cfg.enough)", "groups.enough_differ(1.0)"),
    "one attempt too many": ("range(1, cfg.max_rounds)", "range(1, cfg.max_rounds + 1)"),
    "the same questions again": (
        "sample_and_score(cfg, run, ranks, step, stage, attempt))",
        "sample_and_score(cfg, run, ranks, step, stage))",
    ),
    "attempts replace each other": (
        "groups = groups.extend(sample_and_score(cfg, run, ranks, step, stage, attempt))",
        "groups = sample_and_score(cfg, run, ranks, step, stage, attempt)",
    ),
    "idle groups count": ("dynamic=cfg.max_rounds > 1", "dynamic=False"),
    "always dynamic": ("dynamic=cfg.max_rounds > 1", "dynamic=True"),
    "sections dropped": ("sections=cfg.loss.sections", "sections=0"),
    "skipped questions not counted": ("reward, parts, skipped,", "reward, parts, 0,"),
    "non-finite log-probs pass": ("if not rollout.logp.isfinite().all():", "if False:"),
    "imitation: weighting dropped": ("token_weights, weighting=weighting, tokens", "token_weights, tokens"),
    "imitation: own tokens only": ("total = ranks.sum(count_tokens(", "total = 2 * (count_tokens("),
    "imitation: skipped not counted": ("tokens, length, skipped)", "tokens, length)"),
}

# those that any copy of train.py can take
TESTS = [
    test
    for name, test in vars(test_loop).items()
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["train"]
]


def killer(source: str) -> str | None:
    """The first test that fails on a copy of train.py."""
    for test in TESTS:
        train = load_copy(source)
        train.SOURCE_OF_COPY = source
        try:
            test(train)
        except (Exception, pytest.fail.Exception):
            # an assertion, or an error in broken code: both are noticed
            return test.__name__
    return None


def test_the_original_survives():
    """Otherwise "killed" would mean nothing."""
    assert len(TESTS) >= 15
    assert killer(SOURCE) is None


@pytest.mark.parametrize("name", LOOP)
def test_mutant_is_killed(name):
    old, new = LOOP[name]
    count = SOURCE.count(old)
    assert count == 1, f"{name!r} must apply to exactly one place of train.py, applies to {count}"
    assert killer(SOURCE.replace(old, new)), f"no test of the loop notices: {name}"
