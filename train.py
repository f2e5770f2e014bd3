"""GRPO, top to bottom:  sample → score → compare → learn → keep.    python train.py --help

    Show the policy P pictures with questions. Let it answer each G times. Score the answers by rule. Compare
    each with its own group. Make what did better than its group more likely, what did worse less likely,
    without moving far from the old policy or the frozen reference.

How this departs from the paper: the objective's defaults are the paper's; the log-probs are divided by the
sampling temperature (the policy in the loss is the one that sampled), groups whose completions all earned the
same are left out where no KL penalty needs them, and the normaliser is one number for the whole update.
`method: sft` (imitation, grpo/sft.py) shares everything but steps 1-3.
"""

import math
import sys
import time
from functools import partial

import torch

from data.sources.table import hook_of
from grpo.batch import TrainBatch, collate_prompts, learnable
from grpo.config import parse
from grpo.dynamic import SAMPLING, Drawn
from grpo.logprobs import chunk_of, completion_logprobs
from grpo.memory import retry_with_fewer_rows, rows_that_fit
from grpo.monitor.recorder import Keeper
from grpo.monitor.step_metrics import completion_rows
from grpo.monitor.warnings import NonFinite, fitting
from grpo.objective import LossStats, group_advantages, policy_loss, token_weights
from grpo.optim import clip_gradient
from grpo.parallel import fsdp
from grpo.parallel.ranks import (
    announce,
    gather_and_apply,
    join_ranks,
    leave_ranks,
    precision,
    sum_gradients,
    sum_over_ranks,
)
from grpo.plan import plan
from grpo.rewards.rules import score
from grpo.rollout import DecodeOptions, Rollout, generate
from grpo.run.setup import chosen_prompts, on_device, open_run
from grpo.run.signals import Interrupted
from grpo.sampling import uid_hash
from grpo.schedule import lr_at, stage_at
from grpo.sft import encode_documents, imitate, totals
from grpo.storage import checkpoint
from grpo.variants import ADVANTAGE_SCALES, KL_ESTIMATORS, SURROGATES, WEIGHTINGS


def train_grpo(cfg, run, ranks, keeper) -> None:
    """Learn from rewards, from step run.step to cfg.steps."""
    policy, chat, optimizer, micro_tokens = run.policy, run.chat, run.optimizer, cfg.loss.micro_tokens
    # tokens whose logits exist at the same time
    chunk = chunk_of(policy.config.vocab_size, cfg.loss.logits_mib, ranks.device.type)

    def collate(part: TrainBatch) -> TrainBatch:
        return part.collated(
            image_token=chat.image_token, merge=policy.config.vision.spatial_merge_size, device=ranks.device
        )

    for step in range(run.step, cfg.steps):
        start = time.perf_counter()
        announce(f"step {step + 1}")
        # group size, completion cap
        stage = stage_at(step, cfg.stages, cfg)
        lr = lr_at(
            step,
            lr=cfg.optim.lr,
            warmup=cfg.optim.warmup,
            decay=cfg.optim.decay,
            steps=cfg.steps,
            lr_min=cfg.optim.lr_min,
        )
        optimizer.set_lr(lr)

        # 1  Sample: G completions for each of P prompts from the current policy
        # docs/03, Eq. 1 2  Score each completion by rule (both in `sample_and_score`), compare it with its
        # own group                           docs/04-05, Eq. 2-3
        drawn = SAMPLING[cfg.sampling](
            partial(sample_and_score, run, cfg, ranks, step, stage), cfg.max_rounds, cfg.enough
        )
        prompts, rollout, clock = drawn.prompts, drawn.rollout, drawn.clock(start)
        advantage = gather_and_apply(
            drawn.reward, partial(group_advantages, scale=ADVANTAGE_SCALES[cfg.advantage])
        )  # (P, G)

        # 3  Fix what the loss compares with: the reference, and the old policy if we update more than once
        batch = TrainBatch(
            prompts,
            rollout.tokens,
            rollout.length,
            advantage.flatten(),
            stretch=drawn.stretches(cfg.loss.stretches),
        )
        tokens, completions = drawn.totals
        batch.weight = token_weights(
            batch.mask, WEIGHTINGS[cfg.loss.weighting], tokens=tokens, completions=completions, cap=stage.cap
        )  # (B, C)
        if run.reference is not None:
            with on_device(run.reference, ranks.device) as reference:
                batch.logp_ref = scored(reference, batch, cfg, collate, chunk)  # (B, C)
        if cfg.loss.updates > 1:
            # (B, C); with one update the ratio is 1, its gradient is not
            batch.logp_old = scored(policy, batch, cfg, collate, chunk)
        clock["reference"] = time.perf_counter()

        # 4  Learn: clipped surrogate and KL penalty
        # docs/06, Eq. 4-7 groups that all earned the same pull nowhere
        teaching = learnable(batch) if run.reference is None else list(range(len(prompts)))
        for update in range(cfg.loss.updates):

            def learn(micro_tokens: int):
                stats, entropy_sum, logp_now = LossStats.zero(), 0.0, torch.zeros(batch.mask.shape)
                for part, at, rows in fsdp.passes(policy, batch, micro_tokens, teaching):
                    part = collate(part)
                    logp, entropy = completion_logprobs(
                        policy, part, temperature=cfg.temperature, chunk=chunk
                    )  # (b, c)
                    loss, part_stats = policy_loss(
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
                    loss.backward()
                    stats, entropy_sum = stats + part_stats.to("cpu"), entropy_sum + float(entropy.sum())
                    batch.put_back(logp_now, logp.detach(), at, rows)
                return stats, entropy_sum, logp_now

            # out of memory: smaller micro-batches, the same gradient
            (stats, entropy_sum, logp_now), micro_tokens = fitting(learn, micro_tokens, policy)
            norm = step_optimizer(
                policy, optimizer, stats.loss, cfg.optim.max_grad_norm, prompts, step, keeper.skip
            )
            if update == 0:
                # the policy that sampled, as the training forward sees it
                first_logp = logp_now
        clock["learn"] = time.perf_counter()

        # 5  Keep: metrics, report, evaluation, checkpoint
        # docs/metrics
        shown = drawn.reward, drawn.parts, drawn.texts, drawn.examples
        keeper.grpo_step(
            step + 1,
            rollout,
            batch,
            completion_rows(rollout, *shown, hook_of(cfg.task).measure),
            places=drawn.places,
            logp=first_logp,
            teaching=teaching,
            entropy=entropy_sum,
            stats=stats,
            norm=norm,
            lr=lr,
            skipped=drawn.skipped,
            clock=clock,
            shown=shown,
            drawn=(drawn.rounds, drawn.dropped, drawn.dropped_tokens),
        )


def sample_and_score(run, cfg, ranks, step: int, stage, round: int = 0) -> Drawn:
    """What this rank asks in a round of a step, and what it gets; it may be nothing. Raises NonFinite."""
    clock = [time.perf_counter()]

    # 1  Sample: G completions for each of P prompts from the current policy
    # docs/03, Eq. 1
    examples, prompts, skipped = chosen_prompts(run, cfg, ranks, step, round)
    padded = prompts and collate_prompts(
        prompts, image_token=run.chat.image_token, merge=run.policy.config.vision.spatial_merge_size
    ).to(ranks.device)
    clock.append(time.perf_counter())
    with fsdp.whole_weights(run.policy) as policy:
        write = partial(
            generate,
            policy,
            padded,
            group=stage.group,
            cap=stage.cap,
            temperature=cfg.temperature,
            stop_ids=run.chat.stop_ids,
            address=(cfg.seed, step, [uid_hash(p.uid) for p in prompts]),
        )
        rollout = (
            retry_with_fewer_rows(
                lambda rows: write(options=DecodeOptions(max_rows=rows, recorded=cfg.cuda_graphs)),
                rows_that_fit(policy, padded, stage.group, stage.cap, cfg.max_rows),
            ).to("cpu")
            if prompts
            else Rollout.none(stage.group)
        )
    if not rollout.logp.isfinite().all():
        raise NonFinite("a log-prob of the rollout is not finite", prompts, step)
    clock.append(time.perf_counter())

    # 2  Score each completion by rule
    # docs/04, Eq. 2
    texts = run.chat.texts(rollout.tokens, rollout.length)
    reward, parts = score(texts, examples, cfg.rewards, rollout.length, stage.cap)  # (P, G)
    clock.append(time.perf_counter())
    seconds = {
        name: after - before for name, before, after in zip(("prompts", "rollout", "score"), clock, clock[1:])
    }
    return Drawn(examples, prompts, rollout, texts, reward, parts, skipped, seconds)


@torch.no_grad()
def scored(policy, batch: TrainBatch, cfg, collate, chunk: int) -> torch.Tensor:
    """The completions' log-probs under a policy that is not being trained. → (B, C) on the CPU."""
    logp = torch.zeros(batch.mask.shape)
    for part, at, rows in fsdp.passes(policy, batch, cfg.loss.micro_tokens):
        batch.put_back(
            logp,
            completion_logprobs(policy, collate(part), temperature=cfg.temperature, chunk=chunk)[0],
            at,
            rows,
        )
    return logp


def step_optimizer(policy, optimizer, loss, max_grad_norm: float, prompts, step: int, skip) -> float:
    """Sum the ranks' gradients, clip, step. → the gradient's norm before clipping. Where loss or norm is
    not finite, `skip` either raises or lets the update pass."""
    sum_gradients(policy)
    norm, loss = float(clip_gradient(policy, max_grad_norm or float("inf"))), float(sum_over_ranks(loss))
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    else:
        skip(step, f"the loss is {loss} and the gradient's norm {norm}", prompts)
        policy.zero_grad(set_to_none=True)
    return norm


def train_sft(cfg, run, ranks, keeper) -> None:
    """Imitate documents: the examples' `extra["documents"]`, or the bare answer, as the template writes
    one, where there are none."""
    policy, chat, micro_tokens = run.policy, run.chat, cfg.loss.micro_tokens

    def collate(part: TrainBatch) -> TrainBatch:
        return part.collated(
            image_token=chat.image_token, merge=policy.config.vision.spatial_merge_size, device=ranks.device
        )

    for step in range(run.step, cfg.steps):
        start = time.perf_counter()
        announce(f"step {step + 1}")
        lr = lr_at(
            step,
            lr=cfg.optim.lr,
            warmup=cfg.optim.warmup,
            decay=cfg.optim.decay,
            steps=cfg.steps,
            lr_min=cfg.optim.lr_min,
        )
        run.optimizer.set_lr(lr)
        examples, prompts, skipped = chosen_prompts(run, cfg, ranks, step)
        documents, length = encode_documents(
            chat, [e.extra.get("documents") or (chat.bare(e.answer),) for e in examples], cfg.cap
        )
        batch = TrainBatch(prompts, documents, length)
        tokens, completions = ranks.sum(totals(batch, cfg.sft.loss_on, policy.config.placeholder_ids))
        learn = partial(
            imitate,
            policy,
            batch,
            loss_on=cfg.sft.loss_on,
            weighting=cfg.loss.weighting,
            tokens=tokens,
            completions=completions,
            cap=cfg.cap,
            chunk=chunk_of(policy.config.vocab_size, cfg.loss.logits_mib, ranks.device.type),
            collate=collate,
        )
        (loss, weight, logp), micro_tokens = fitting(
            lambda most: learn(micro_tokens=most), micro_tokens, policy
        )
        norm = step_optimizer(
            policy, run.optimizer, loss, cfg.optim.max_grad_norm, prompts, step, keeper.skip
        )
        keeper.sft_step(
            step + 1,
            loss=loss,
            weight=weight,
            batch=batch,
            logp=logp,
            examples=examples,
            norm=norm,
            lr=lr,
            skipped=skipped,
            seconds=time.perf_counter() - start,
        )


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, open the run, train. → exit status."""
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
        run = open_run(cfg, ranks)
        keeper = Keeper(cfg, run, ranks, started)
        if flags.dry_run:
            print(keeper.describe())
            return 0
        with precision(ranks, cfg.dtype), keeper:
            keeper.before()
            (train_grpo if cfg.method == "grpo" else train_sft)(cfg, run, ranks, keeper)
            keeper.after()
        return 0
    except Interrupted as told:
        if ranks.main:
            print(f"\ntrain.py: {told}", file=sys.stderr)
        return told.status
    except (ValueError, OSError, NonFinite, checkpoint.CheckpointError) as error:
        print(f"\ntrain.py: {error}", file=sys.stderr)
        leave_ranks(error)
        return 2
    except BaseException as error:
        leave_ranks(error)
        raise
    finally:
        leave_ranks()


if __name__ == "__main__":
    sys.exit(main())
