"""From a step's completions to its line in metrics.jsonl, and to the groups that the report shows token by
token."""

import base64
import io
import re
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean, pstdev, stdev

import torch

from data.images import open_picture
from data.types import Example, Measure
from grpo.batch import Batch, Groups
from grpo.evaluation.scores import Completion, read_completion, total
from grpo.objective import gradient_weight, token_ratio
from grpo.variants import KL_ESTIMATORS, SURROGATES

# an answer after fewer words than these is said without thinking
FEW_WORDS = 5


def completion_rows(groups: Groups, measure: Measure) -> list[list[Completion]]:
    """The records of this rank's completions, P lists of its rows. measure: of the task's hook."""
    rows = []
    for p, (example, place) in enumerate(zip(groups.questions, groups.share.places)):
        group = []
        for g in groups.share.here[p].nonzero().flatten().tolist():
            text = groups.texts[p][g]
            tokens = groups.tokens[p, g, : int(groups.length[p, g])].tolist()
            stopped = bool(groups.rollout.stopped[p, g])
            record = read_completion(example, text, tokens, stopped, measure=measure)
            parts = {name: float(part[p, g]) for name, part in groups.parts.items()}
            group.append(replace(record, reward=float(groups.reward[place, g]), parts=parts))
        rows.append(group)
    return rows


def whole_groups(groups: list[tuple[int, list]]) -> list[list]:
    """The groups in the order of their places, from (place, rows) of all ranks: a split group's rows are
    joined in the order of the ranks, which is that of the rows."""
    found: dict[int, list] = {}
    for place, rows in groups:
        found.setdefault(place, []).extend(rows)
    return [found[place] for place in sorted(found)]


def words_before_answer(text: str) -> int:
    """The words of a completion before its first <answer>, tags not counted."""
    return len(re.sub("</?think>", " ", text.partition("<answer>")[0]).split())


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
        "completions/unthought_ratio": fmean(
            "<answer>" in row.text and words_before_answer(row.text) < FEW_WORDS for row in rows
        ),
        "accuracy": counted["accuracy"],
        "chance": fmean(1 / len(row.choices) if row.choices else 0.0 for row in rows),
    }
    for kind, wanted in (("right", True), ("wrong", False)):
        if lengths := [row.length for row in rows if row.correct == wanted]:
            found[f"completions/mean_length_{kind}"] = fmean(lengths)
    for task in sorted({row.task for row in rows if row.task}):
        found[f"accuracy/{task}"] = fmean(row.correct for row in rows if row.task == task)
    return found | {f"aha/{name}": value for name, value in (counted["aha"] | counted["measured"]).items()}


def picture_url(example: Example) -> str | None:
    """The example's first picture as a data: URL (PNG), None without a picture."""
    if not example.pictures:
        return None
    buffer = io.BytesIO()
    open_picture(example.pictures[0], name=example.uid).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def shown_groups(step: int, batch: Batch, loss, piece: Callable[[int], str], most: int) -> list[dict]:
    """The lines of samples.jsonl for this rank's first `most` groups: every completion with its reward parts,
    and every token with what moved it. loss: the settings `loss`. piece: token id -> its text."""
    G = batch.length.shape[1]
    old = batch.logp if batch.logp_old is None else batch.logp_old
    how = {"clip_low": loss.clip_low, "clip_high": loss.clip_high, "surrogate": SURROGATES[loss.surrogate]}
    pull = gradient_weight(batch.logp, old, batch.advantage, batch.weight, **how)  # (B, C)
    kl = torch.zeros_like(batch.logp)  # (B, C)
    if batch.logp_ref is not None:
        kl = KL_ESTIMATORS[loss.kl](batch.logp, batch.logp_ref, token_ratio(batch.logp, old))
    clipped = batch.mask & (pull == 0) & (batch.advantage[:, None] != 0)  # (B, C)
    per_token = {"weight": pull, "logp": batch.logp, "kl": kl}
    lines = []
    for p, example in enumerate(batch.questions[:most]):
        completions = []
        for g in batch.share.here[p].nonzero().flatten().tolist():
            b = p * G + g
            n = int(batch.length[p, g])
            line = {
                "tokens": [piece(token) for token in batch.tokens[p, g, :n].tolist()],
                "text": batch.texts[p][g],
                "reward": float(batch.reward[batch.share.places[p], g]),
                "parts": {name: float(part[p, g]) for name, part in batch.parts.items()},
                "advantage": float(batch.advantage[b]),
            }
            # four significant digits
            line |= {key: [float(f"{v:.4g}") for v in row[b, :n].tolist()] for key, row in per_token.items()}
            line |= {"clipped": clipped[b, :n].tolist(), "stopped": bool(batch.rollout.stopped[p, g])}
            completions.append(line)
        lines.append(question_line("train", step, example) | {"completions": completions})
    return lines


def question_line(kind: str, step: int, example: Example) -> dict:
    """A line of samples.jsonl without its completions. kind: "train" or "heldout"."""
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
