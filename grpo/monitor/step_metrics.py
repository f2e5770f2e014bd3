"""From a step to its line in metrics.jsonl, and to the completions that the report shows token by token."""

import base64
import io
from dataclasses import replace
from statistics import fmean, pstdev, stdev

import torch

from data.images import open_picture
from grpo.batch import Batch
from grpo.evaluation.scores import Completion, read_completion, total
from grpo.objective import gradient_weight, token_ratio
from grpo.rollout import Rollout
from grpo.variants import KL_ESTIMATORS, SURROGATES


def completion_rows(rollout: Rollout, reward, parts, texts, examples, measure) -> list[list[Completion]]:
    """The records of a rollout, P lists of G. reward and each part (P, G). measure: of the task's hook."""
    rows = []
    for p, example in enumerate(examples):
        group = []
        for g, text in enumerate(texts[p]):
            tokens = rollout.tokens[p, g, : int(rollout.length[p, g])].tolist()
            record = read_completion(example, text, tokens, bool(rollout.stopped[p, g]), measure=measure)
            paid = {name: float(part[p, g]) for name, part in parts.items()}
            group.append(replace(record, reward=float(reward[p, g]), parts=paid))
        rows.append(group)
    return rows


def step_metrics(groups: list[list[Completion]]) -> dict[str, float]:
    """The metrics of a step from its completions, TRL's names first. `reward_std` is the mean of the groups'
    own deviations, as R1-V logs it."""
    rows = [row for group in groups for row in group]
    length = [row.length for row in rows]
    deviations = [stdev([row.reward for row in group]) for group in groups]
    counted = total(groups)
    found = {
        "reward": fmean(row.reward for row in rows),
        "reward_std": fmean(deviations),
        "frac_reward_zero_std": fmean(d < 1e-6 for d in deviations),
    }
    for name in rows[0].parts:
        values = [row.parts[name] for row in rows]
        found |= {f"rewards/{name}/mean": fmean(values), f"rewards/{name}/std": pstdev(values)}
    found |= {
        "completions/count": len(rows),
        "completions/mean_length": counted["mean_length"],
        "completions/min_length": min(length),
        "completions/max_length": max(length),
        "completions/clipped_ratio": counted["truncated"],
        "completions/repetition": counted["repetition"],
        "completions/loop_ratio": counted["loop_ratio"],
        "completions/identical_groups": fmean(
            len(group) > 1 and len({row.tokens for row in group}) == 1 for group in groups
        ),
        "accuracy": counted["accuracy"],
    }
    for kind, wanted in (("right", True), ("wrong", False)):
        if lengths := [row.length for row in rows if row.correct == wanted]:
            found[f"completions/mean_length_{kind}"] = fmean(lengths)
    for task in sorted({row.task for row in rows if row.task}):
        found[f"accuracy/{task}"] = fmean(row.correct for row in rows if row.task == task)
    return found | {f"aha/{name}": value for name, value in (counted["aha"] | counted["measured"]).items()}


def picture_url(example) -> str | None:
    """The example's first picture as a data: URL (PNG), None where it has none."""
    if not example.pictures:
        return None
    buffer = io.BytesIO()
    open_picture(example.pictures[0], name=example.uid).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def shown_groups(
    step: int,
    batch: Batch,
    logp,
    rollout: Rollout,
    reward,
    parts,
    texts,
    examples,
    pieces,
    *,
    prompts: int,
    loss: dict,
) -> list[dict]:
    """The lines of samples.jsonl for the first `prompts` groups: every completion with its parts, and every
    token with what moved it.

    logp (B, C): the policy's log-probs before the update.  pieces: token id → the text it stands for.  loss:
    clip_low, clip_high, surrogate, kl.
    """
    group = rollout.length.shape[1]
    old = logp if batch.logp_old is None else batch.logp_old
    pull = gradient_weight(
        logp,
        old,
        batch.advantage,
        batch.weight,
        clip_low=loss["clip_low"],
        clip_high=loss["clip_high"],
        surrogate=SURROGATES[loss["surrogate"]],
    )
    ratio = token_ratio(logp, old)
    kl = (
        torch.zeros_like(logp)
        if batch.logp_ref is None
        else KL_ESTIMATORS[loss["kl"]](logp, batch.logp_ref, ratio)
    )
    silent = batch.mask & (pull == 0) & (batch.advantage[:, None] != 0)
    lines = []
    for p, example in list(enumerate(examples))[:prompts]:
        completions = []
        for g in range(group):
            b, n = p * group + g, int(rollout.length[p, g])
            completions.append(
                {
                    "tokens": [pieces(t) for t in rollout.tokens[p, g, :n].tolist()],
                    "text": texts[p][g],
                    "reward": float(reward[p, g]),
                    "parts": {name: float(part[p, g]) for name, part in parts.items()},
                    "advantage": float(batch.advantage[b]),
                    "weight": _short(pull[b, :n]),
                    "logp": _short(logp[b, :n]),
                    "kl": _short(kl[b, :n]),
                    "clipped": silent[b, :n].tolist(),
                    "stopped": bool(rollout.stopped[p, g]),
                }
            )
        lines.append(question_line("train", step, example) | {"completions": completions})
    return lines


def question_line(kind: str, step: int, example) -> dict:
    """What the report says of a question, before its completions."""
    return {
        "step": step,
        "kind": kind,
        "uid": example.uid,
        "question": example.question,
        "choices": list(example.choices),
        "answer": example.answer,
        "task": example.task,
        "picture": picture_url(example),
    }


def _short(values) -> list[float]:
    return [float(f"{v:.4g}") for v in values.tolist()]
