"""Evaluation during training: greedy answers to held-out questions, as metrics and lines of the report."""

from data.sources.table import hook_of
from grpo.evaluation.answers import Asking, answer_all
from grpo.evaluation.scores import flat_scores, scores
from grpo.monitor.step_metrics import question_line
from grpo.parallel.fsdp import whole_weights

# held-out questions that the report shows at every evaluation
SHOWN = 6


def evaluate(cfg, run, ranks, step: int, every_set: bool = False) -> dict:
    """Greedy accuracy on the held-out questions, as metrics. All ranks call it together. every_set: the other
    sets of the task too, and answers sampled at temperature 1."""
    same = {"seed": cfg.seed, "blind": cfg.blind, "measure": hook_of(cfg.task).measure}

    def scored(items, prefix: str, temperature: float = 0.0, show: bool = False) -> dict:
        how = Asking(cfg.eval.cap or cfg.cap, temperature=temperature, **same)
        answers = answer_all(policy, run.chat, items, how, share=(ranks.rank, ranks.size))
        if show:
            show_held_out(run, step, items, answers)
        found = flat_scores(scores(answers)) if answers else {}
        return {f"{prefix}{key}": value for key, value in found.items()}

    # gathered once for all sets
    with whole_weights(run.policy) as policy:
        found = {}
        for name, items in run.heldout.items():
            if name == "heldout":
                found |= scored(items, "eval/", show=ranks.main)
                if every_set:
                    found |= scored(items, "eval/sampled/", temperature=1.0)
            elif every_set:
                found |= scored(items, f"eval/{name}/")
    return found


def show_held_out(run, step: int, items, answers) -> None:
    """Write a line of samples.jsonl for each of the few questions that the report shows."""
    by_uid = {group[0].uid: group[0] for group in answers}
    for example in items[:SHOWN]:
        if (answer := by_uid.get(example.uid)) is None:
            continue
        parts = {"accuracy": float(answer.correct), "format": float(answer.well_formed)}
        completion = {"text": answer.text, "tokens": [run.chat.piece(token) for token in answer.tokens]}
        completion |= {"reward": sum(parts.values()), "parts": parts, "stopped": answer.stopped}
        run.samples.write(question_line("heldout", step, example) | {"completions": [completion]})
