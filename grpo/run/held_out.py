"""Evaluation during training: greedy answers to the held-out questions, as metrics and as lines of the
report."""

from data.sources.table import hook_of
from grpo.evaluation.answers import Asking, answer_all
from grpo.evaluation.scores import flat_scores, scores
from grpo.monitor.step_metrics import question_line
from grpo.parallel.fsdp import whole_weights

# held-out questions that the report shows at every evaluation
SHOWN = 6


def evaluate(cfg, run, ranks, step: int, every_set: bool = False) -> dict:
    """Greedy accuracy on the held-out questions, as metrics. All ranks call it together.

    every_set: the task's other sets too, and answers sampled at temperature 1.
    """
    # gathered once for all sets
    with whole_weights(run.policy) as policy:
        found = {}
        for name, items in run.heldout.items():
            if name == "heldout":
                found |= _scores(cfg, run, ranks, policy, items, "eval/", show_at=step)
                if every_set:
                    found |= _scores(cfg, run, ranks, policy, items, "eval/sampled/", temperature=1.0)
            elif every_set:
                found |= _scores(cfg, run, ranks, policy, items, f"eval/{name}/")
    return found


def _scores(
    cfg, run, ranks, policy, items, prefix: str, temperature: float = 0.0, show_at: int | None = None
) -> dict:
    how = Asking(
        cap=cfg.eval.cap or cfg.cap,
        temperature=temperature,
        seed=cfg.seed,
        blind=cfg.blind,
        measure=hook_of(cfg.task).measure,
    )
    answers = answer_all(policy, run.chat, items, how, share=(ranks.rank, ranks.size))
    if show_at is not None and ranks.main:
        show_held_out(run, show_at, items, answers)
    found = flat_scores(scores(answers)) if answers else {}
    return {f"{prefix}{key}": value for key, value in found.items()}


def show_held_out(run, step: int, items, answers) -> None:
    """Write a line of samples.jsonl for each of the few questions that the report shows."""
    by_uid = {group[0].uid: group[0] for group in answers}
    for example in items[:SHOWN]:
        if (answer := by_uid.get(example.uid)) is None:
            continue
        parts = {"accuracy": float(answer.correct), "format": float(answer.well_formed)}
        completion = {
            "text": answer.text,
            "tokens": [run.chat.piece(token) for token in answer.tokens],
            "reward": sum(parts.values()),
            "parts": parts,
            "stopped": answer.stopped,
        }
        run.samples.write(question_line("heldout", step, example) | {"completions": [completion]})
