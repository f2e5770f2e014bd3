"""GRPO, top to bottom: sample, score, compare, learn, keep.    python train.py --help

    Show the policy P pictures with questions. Let it answer each G times. Score the answers by rule. Compare
    each with its own group. Make what did better than its group more likely, what did worse less likely,
    without moving far from the old policy or the frozen reference.

How this departs from the paper: the defaults of the objective are the paper's. The log-probs are divided by
the sampling temperature, so the policy in the loss is the one that sampled. Without a KL penalty, groups
whose completions all earned the same are left out, because they have no gradient. The normaliser of the loss
is fixed once for the whole update. `method: sft` (imitation, grpo/sft.py) shares everything but steps 1-3.
"""

import sys
import time
from dataclasses import replace
from functools import partial

import grpo.parallel.openmp

from grpo.batch import Batch, Groups, MicroBatch, collate_prompts
from grpo.config import parse
from grpo.gradient import OutOfMemory, accumulate_gradient, score_reference, score_tokens
from grpo.logprobs import completion_logprobs
from grpo.memory import retry_with_fewer_rows, rows_that_fit
from grpo.objective import entropy_bonus, group_advantages, policy_loss, token_weights
from grpo.optim import NonFinite
from grpo.parallel.fsdp import whole_weights
from grpo.parallel.ranks import end_with, join_ranks, leave_ranks, precision
from grpo.plan import plan
from grpo.rewards.rules import score
from grpo.rollout import DecodeOptions, Rollout, generate
from grpo.run import lock
from grpo.run.lifecycle import Lifecycle
from grpo.run.questions import chosen_prompts
from grpo.run.setup import open_run, with_steps
from grpo.run.signals import Interrupted
from grpo.sampling import Truncation, uid_hash
from grpo.schedule import lr_at, stage_at
from grpo.sft import LOSS_ON, count_tokens, fit_documents, pad_documents
from grpo.storage import checkpoint
from grpo.timing import timed
from grpo.variants import ADVANTAGE_SCALES, KL_ESTIMATORS, SURROGATES, WEIGHTINGS


def train_grpo(cfg, run, ranks, log) -> None:
    """Learn from rewards, from step `run.step` to `cfg.steps`."""
    weigh = partial(token_weights, weighting=WEIGHTINGS[cfg.loss.weighting])
    loss_of = partial(loss_of_part, cfg, run.policy, run.budget.chunk)

    for step in range(run.step, cfg.steps):
        # this step's group size G and completion cap
        stage = stage_at(step, cfg.stages, cfg)
        run.optimizer.set_lr(learning_rate(cfg, step))

        # 1  Sample: the current policy answers each of P questions G times.              docs/03, Eq. 1
        # 2  Score: a rule turns each answer into a number.                               docs/04, Eq. 2
        groups = sample_and_score(cfg, run, ranks, step, stage)
        # dynamic sampling: ask further questions in place of groups that all earned the same
        for attempt in range(1, cfg.max_rounds):
            if groups.enough_differ(cfg.enough):
                break
            groups = groups.extend(sample_and_score(cfg, run, ranks, step, stage, attempt))
        batch = groups.batch(dynamic=cfg.max_rounds > 1, sections=cfg.loss.sections)

        # 3  Compare: each answer with the other answers to its question.                 docs/05, Eq. 3
        advantage = group_advantages(batch.reward, scale=ADVANTAGE_SCALES[cfg.advantage])  # (P, G)
        batch.advantage = advantage[batch.share.places].flatten()  # (B,)
        total = ranks.sum(batch.counts).clamp(min=1)
        batch.weight = weigh(batch.mask, tokens=total[0], completions=total[1], cap=stage.cap)  # (B, C)
        if run.reference is not None:
            batch.logp_ref = score_reference(run.reference, batch, cfg.temperature, run.budget)  # (B, C)
        batch.all_teach = cfg.loss.entropy_coef > 0
        # with one update the old policy is this one: the ratio is 1, but its gradient is not 0
        if cfg.loss.updates * cfg.loss.minibatches > 1:
            batch.logp_old = old_logprobs(cfg, run, batch)  # (B, C)

        # 4  Learn: make what did better than its group more likely.                      docs/06, Eq. 4-7
        for part in cfg.loss.updates * batch.minibatches(cfg.loss.minibatches):
            stats = accumulate_gradient(loss_of, run.policy, batch, run.budget, part)
            grad_norm = run.optimizer.clip_and_step(cfg.optim.max_grad_norm)

        # 5  Keep: metrics, report, evaluation, checkpoint.                               docs/metrics
        # pyrefly: ignore[unbound-name]
        log.step(step + 1, batch, stats, grad_norm)


def old_logprobs(cfg, run, batch: Batch):
    """Log-probs (B, C) of the completions under the policy that drew them, before its first update."""
    return score_tokens(run.policy, batch, cfg.temperature, run.budget, loss_truncation(cfg))


def loss_of_part(cfg, policy, chunk: int, part: MicroBatch):
    """The clipped surrogate, the KL penalty and the entropy bonus of one micro-batch. -> (loss, LossStats,
    log-probs and entropies of the tokens, both (b, c))."""
    how = {"truncation": loss_truncation(cfg), "entropy_grad": cfg.loss.entropy_coef > 0}
    logp, entropy = completion_logprobs(policy, part, temperature=cfg.temperature, chunk=chunk, **how)
    loss, stats = policy_loss(
        logp,
        part.logp_old,
        part.logp_ref,
        part.advantage,
        part.weight,
        surrogate=SURROGATES[cfg.loss.surrogate],
        kl=KL_ESTIMATORS[cfg.loss.kl],
        kl_coef=cfg.loss.kl_coef,
        clip_low=cfg.loss.clip_low,
        clip_high=cfg.loss.clip_high,
    )
    if cfg.loss.entropy_coef:
        bonus = entropy_bonus(entropy, part.weight, cfg.loss.entropy_coef)
        loss = loss - bonus
        stats.loss = stats.loss - bonus.detach()
    return loss, stats, logp, entropy.detach()


def sample_and_score(cfg, run, ranks, step: int, stage, attempt: int = 0) -> Groups:
    """Ask this rank's questions of a step, or of a later attempt at it, and score the answers: G of each
    question, on all ranks together."""
    questions, prompts, share, skipped = chosen_prompts(run, cfg, ranks, step, stage, attempt)
    with whole_weights(run.policy) as policy:
        rollout = sample_groups(cfg, run, policy, prompts, share.rows, step, stage)  # (P, G, C)
    texts = run.chat.texts(rollout.tokens, rollout.length)
    reward, parts = score(texts, questions, cfg.rewards, rollout.length, stage.cap)  # (P, G)
    # a group may have rows on several ranks
    reward = ranks.sum(share.among_all(reward))  # (P of all ranks, G)
    return Groups(questions, prompts, rollout, texts, reward, parts, skipped, share)


@timed("rollout")
def sample_groups(cfg, run, policy, prompts: list, rows: range, step: int, stage) -> Rollout:
    """Let the policy write these of the P·G rows, as many at a time as fit into memory. Raises NonFinite."""
    if not prompts:
        return Rollout.none(stage.group)
    padded = collate_prompts(
        prompts, image_token=policy.config.image_token_id, merge=policy.config.vision.spatial_merge_size
    ).to(run.budget.device)
    write = partial(
        generate,
        policy,
        padded,
        group=stage.group,
        cap=stage.cap,
        temperature=cfg.temperature,
        stop_ids=run.chat.stop_ids,
        address=(cfg.seed, step, [uid_hash(prompt.uid) for prompt in prompts]),
    )
    options = DecodeOptions((), None, cfg.cuda_graphs, truncation_of(cfg), cfg.logp_of, rows)
    rollout = retry_with_fewer_rows(
        lambda most: write(options=replace(options, max_rows=most)),
        rows_that_fit(policy, padded, stage.group, stage.cap, cfg.max_rows),
    ).to("cpu")
    if not rollout.logp.isfinite().all():
        raise NonFinite("a log-prob of the rollout is not finite", prompts, step)
    return rollout


def truncation_of(cfg) -> Truncation | None:
    """The settings top_k and top_p; None where they leave out no word."""
    return None if cfg.top_k is None and cfg.top_p == 1 else Truncation(cfg.top_k, cfg.top_p)


def loss_truncation(cfg) -> Truncation | None:
    """The truncation of the log-probs in the loss."""
    return truncation_of(cfg) if cfg.logp_of == "sampled" else None


def learning_rate(cfg, step: int) -> float:
    """The learning rate of a step, from the settings."""
    optim = cfg.optim
    return lr_at(
        step, steps=cfg.steps, lr=optim.lr, warmup=optim.warmup, decay=optim.decay, lr_min=optim.lr_min
    )


def train_sft(cfg, run, ranks, log) -> None:
    """Imitate documents: each question's `extra["documents"]`; without them its answer, as the template
    writes it."""
    policy = run.policy
    weighting = WEIGHTINGS[cfg.loss.weighting]
    fit = partial(fit_documents, run.chat, cap=cfg.cap, too_long=cfg.sft.too_long)
    for step in range(run.step, cfg.steps):
        run.optimizer.set_lr(learning_rate(cfg, step))
        questions, prompts, _, skipped = chosen_prompts(run, cfg, ranks, step, cfg, fit=fit)
        tokens, length = pad_documents([q.extra["documents"] for q in questions])  # (P, G, C), (P, G)
        batch = Batch.of_documents(questions, prompts, tokens, length, skipped)
        total = ranks.sum(count_tokens(batch, cfg.sft.loss_on, policy.config.placeholder_ids))
        weigh = partial(
            token_weights, weighting=weighting, tokens=total[0], completions=total[1], cap=cfg.cap
        )
        loss_of = partial(LOSS_ON[cfg.sft.loss_on], policy, weigh=weigh, chunk=run.budget.chunk)
        stats = accumulate_gradient(loss_of, policy, batch, run.budget)
        grad_norm = run.optimizer.clip_and_step(cfg.optim.max_grad_norm)
        log.sft_step(step + 1, batch, stats, grad_norm)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, open the run, train. -> exit status."""
    started = time.perf_counter()
    try:
        cfg, flags = parse.parse_args(sys.argv[1:] if argv is None else argv)
        if flags.help or flags.list:
            print(parse.help_text() if flags.help else parse.list_text())
            return 0
        if flags.plan:
            print(plan.text(cfg, flags.plan))
            return 0
        ranks = join_ranks(cfg.device, cfg.timeout)
        cfg = with_steps(cfg)
        run = open_run(cfg, ranks, flags)
        log = Lifecycle(cfg, run, ranks, started)
        if flags.dry_run:
            print(log.describe())
            return 0
        with precision(ranks, cfg.dtype, cfg.exact), log:
            log.before()
            (train_grpo if cfg.method == "grpo" else train_sft)(cfg, run, ranks, log)
            log.after()
        return 0
    except Interrupted as stopped:
        return end_with(stopped, stopped.status)
    except (ValueError, OSError, NonFinite, OutOfMemory, checkpoint.CheckpointError) as error:
        return end_with(error, 2)
    except BaseException as error:
        return end_with(error, None)
    finally:
        lock.leave()
        leave_ranks()


if __name__ == "__main__":
    sys.exit(main())
