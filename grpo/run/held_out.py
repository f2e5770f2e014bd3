"""Evaluation during training: greedy answers to held-out questions, as metrics and lines of the report."""

from collections.abc import Sequence

from data.sources.table import hook_of, open_source, open_split, usable
from data.types import BadSource, Example
from grpo.evaluation.answers import Asking, answer_all
from grpo.evaluation.evaluated_model import BENCHMARKS
from grpo.evaluation.scores import flat_scores, scores
from grpo.monitor.step_metrics import question_line
from grpo.parallel.fsdp import whole_weights

# held-out questions that the report shows at every evaluation
SHOWN = 6


def open_questions(cfg) -> tuple[Sequence[Example], dict[str, list[Example]]]:
    """The training examples, and the held-out sets by name: the task's own, or one set of `eval.task` and
    `eval.data`. Raises BadSource."""
    name, items = cfg.eval.task or cfg.task, cfg.eval.items
    other = items > 0 and (cfg.eval.task is not None or cfg.eval.data is not None)
    own = {"limit": cfg.limit, "seed": cfg.seed, "columns": cfg.columns}
    own |= {"items": 0 if other else items, "heldout": cfg.heldout}
    examples, heldout = open_source(cfg.task, cfg.data, **own)
    if not other:
        return examples, heldout
    split = "all" if name in BENCHMARKS else "heldout"
    columns = cfg.columns if name == cfg.task else None
    try:
        found = usable(open_split(name, cfg.eval.data, split, items, 0, columns=columns))
    except BadSource as error:
        raise BadSource(f"held-out questions (eval.task, eval.data): {error}") from None
    if not found:
        raise BadSource(f"eval.task={name} with eval.data={cfg.eval.data} gives no question")
    return examples, {"heldout": found}


def evaluate(cfg, run, ranks, step: int, every_set: bool = False) -> dict:
    """Greedy accuracy on the held-out questions, as metrics. All ranks call it together. every_set: the other
    sets of the task too, and answers sampled at temperature 1."""
    same = {"seed": cfg.seed, "blind": cfg.blind, "measure": hook_of(cfg.eval.task or cfg.task).measure}

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
