"""What a policy can do: ask it questions, read its answers, count. One protocol for `train.py` and `evaluate.py`.

The parser is the reward's (`data/choices.py`), the prompt is the recipe's, and what could not be read is counted apart from what was wrong:
the same model scores 49.8 or 73.0 on CV-Bench depending on how it is asked, so an accuracy without its extraction failures says little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from data.choices import extract, is_right, well_formed
from data.documents import agrees, read_looks
from data.types import BadExample, Example, Prompt
from grpo.batch import collate_prompts
from grpo.rollout import generate
from grpo.sampling import uid_hash
from grpo.statistics import maj_at_k, pass_at_k, wilson

STEP = -1             # the address of an evaluation's random numbers; training steps are 0, 1, …
WAVE = 1 << 16        # tokens of the rows decoded together: 400 short rows of the built-in model, 1.9 GB of keys and values for Qwen2-VL-2B
BUILT_IN = "shapes/"  # uids of the built-in world. Its task names won't do: CV-Bench has the same


@dataclass(frozen=True)
class Answer:
    """One completion, read. `answer` and `letter` are None, and `why` says why, where no answer could be extracted.

    length: tokens, the stop token included.  stopped: False where the cap cut it off.  The last four are for the built-in world, else None:
    did it look, did it look again ("but wait"), and was the conclusion of its first and of its last look right.
    """

    uid: str
    task: str
    picture: str | None  # name of the picture file, if there is one
    question: str
    choices: tuple[str, ...]
    gold: str
    text: str
    tokens: tuple[int, ...]
    length: int
    stopped: bool
    answer: str | None
    letter: str | None
    why: str
    correct: bool
    well_formed: bool
    looked: bool | None = None
    again: bool | None = None
    first_right: bool | None = None
    last_right: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `evaluate.py --json` writes them: `text` is called completion there, and token ids are left out."""
        values = asdict(self)
        del values["tokens"]
        return {("completion" if key == "text" else key): value for key, value in values.items()}


class Answers(list):
    """One list of answers a question, in the order asked. `skipped` names the questions that could not be asked, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: list[str] = []


@torch.no_grad()
def answer_all(policy, chat, examples: Sequence[Example], *, cap: int, samples: int = 1, temperature: float = 0.0, seed: int = 0,
               wave: int = WAVE, blind: bool = False, banned: Sequence[int] = (), progress: Callable[[int], Any] | None = None) -> Answers:
    """Ask every example `samples` times. → Answers, one list of `samples` Answer each. Raises ValueError for several greedy ones.

    cap: longest completion, tokens.  temperature: 0 is greedy.  wave: tokens (prompts and completions) of the rows decoded together; it
    changes memory and speed, never an answer.  blind: the pictures are withheld (mid-grey ones are shown).  banned: token ids that may
    not be drawn.  progress: called with the number of questions just dealt with.
    An example that cannot be read, or whose prompt is too long, is skipped and named in `.skipped`.
    """
    if samples < 1 or (samples > 1 and temperature == 0):
        raise ValueError(f"{samples} completions a question at temperature {temperature}: need 1, or a temperature above 0")
    answers, progress = Answers(), progress or (lambda count: None)
    device, merge = next(policy.parameters()).device, policy.config.vision.spatial_merge_size

    def skip(error: BadExample) -> None:
        answers.skipped.append(str(error))
        progress(1)

    for asked in _waves(_asked(chat, examples, blind, skip), samples * cap, wave):
        prompts = collate_prompts([prompt for _, prompt in asked], image_token=chat.image_token, merge=merge).to(device)
        rollout = generate(policy, prompts, group=samples, cap=cap, temperature=temperature, stop_ids=chat.stop_ids, banned=banned,
                           address=(seed, STEP, [uid_hash(prompt.uid) for _, prompt in asked]))
        texts = chat.texts(rollout.tokens, rollout.length)
        tokens, length, stopped = (x.tolist() for x in (rollout.tokens, rollout.length, rollout.stopped))
        answers += [[read_answer(example, texts[p][g], tokens[p][g][:length[p][g]], stopped[p][g]) for g in range(samples)]
                    for p, (example, _) in enumerate(asked)]
        progress(len(asked))
    return answers


def _asked(chat, examples: Sequence[Example], blind: bool, skip: Callable[[BadExample], None]) -> Iterator[tuple[Example, Prompt]]:
    """The examples that can be asked, each with its prompt; one by one, because the pixels of a whole benchmark would fill the memory."""
    for index in range(len(examples)):
        try:
            example = examples[index]
            prompt = chat.prompt(example, blind=blind)
        except BadExample as error:
            skip(error)
        else:
            yield example, prompt


def _waves(asked: Iterator[tuple[Example, Prompt]], completions: int, budget: int) -> Iterator[list[tuple[Example, Prompt]]]:
    """Neighbours, as many as fit: each takes the longest prompt of its wave and `completions` tokens. One over the budget goes alone."""
    wave, longest = [], 0
    for pair in asked:
        size = len(pair[1].tokens)
        if wave and (len(wave) + 1) * (max(longest, size) + completions) > budget:
            yield wave
            wave, longest = [], 0
        wave.append(pair)
        longest = max(longest, size)
    if wave:
        yield wave


def read_answer(example: Example, text: str, tokens: Sequence[int], stopped: bool) -> Answer:
    """What a completion's text says: the answer in it, whether that is right, the format, and (in the built-in world) how it looked."""
    found = extract(text, example.choices)
    picture = next((p.name for p in example.pictures if isinstance(p, Path)), None)
    looks = {}
    if example.uid.startswith(BUILT_IN):
        seen = read_looks(text)
        looks = {"looked": seen.looked, "again": seen.again}
        looks |= {"first_right": agrees(seen.first, example), "last_right": agrees(seen.last, example)}
    return Answer(uid=example.uid, task=example.task, picture=picture, question=example.question, choices=example.choices,
                  gold=example.answer, text=text, tokens=tuple(tokens), length=len(tokens), stopped=stopped, answer=found.answer,
                  letter=found.letter, why=found.why, correct=is_right(text, example), well_formed=well_formed(text), **looks)


# ---- counting

def scores(answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """The scores of `answer_all`'s answers, over all questions (micro average) and, under "tasks", the same for each task.

    questions, skipped, completions (a question); accuracy with its 95 % interval, and chance (1 / choices); format, truncated (by the
    cap) and extraction_failure as shares, with the failures' reasons counted under "failures"; mean_length in tokens. In the built-in
    world: looking and self_correction as shares, and the counts wrong_to_right, right_to_wrong of the second look. With several
    completions a question: "pass@k" and "maj@k" for k = 1, 2, 4, …, as {k: {"value", "interval"}}. Raises ValueError without answers.
    """
    if not answers:
        raise ValueError("no question could be asked: " + (next(iter(getattr(answers, "skipped", ())), "there are none")))
    found = _block(answers)
    found["skipped"] = len(getattr(answers, "skipped", ()))
    tasks = dict.fromkeys(group[0].task for group in answers)
    found["tasks"] = {task: _block([group for group in answers if group[0].task == task]) for task in tasks if task}
    return found


def _block(groups: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """The scores of some questions.

    Completions of one question are not independent, so the question is the unit: its own accuracy counts as one fraction of a success.
    """
    rows = [answer for group in groups for answer in group]
    right = [fmean(answer.correct for answer in group) for group in groups]
    found: dict[str, Any] = {
        "questions": len(groups), "completions": len(groups[0]), "accuracy": fmean(right), "interval": _mean(right)["interval"],
        "chance": fmean(1 / len(group[0].choices) if group[0].choices else 0.0 for group in groups),
        "format": fmean(answer.well_formed for answer in rows), "extraction_failure": fmean(answer.answer is None for answer in rows),
        "failures": dict(Counter(answer.why for answer in rows if answer.why).most_common()),
        "mean_length": fmean(answer.length for answer in rows), "truncated": fmean(not answer.stopped for answer in rows)}
    if looks := [answer for answer in rows if answer.looked is not None]:
        again = [answer for answer in looks if answer.again]
        found |= {"looking": fmean(answer.looked for answer in looks), "self_correction": len(again) / len(looks),
                  "wrong_to_right": sum(answer.last_right and not answer.first_right for answer in again),
                  "right_to_wrong": sum(answer.first_right and not answer.last_right for answer in again)}
    if (n := len(groups[0])) > 1:
        sizes = [k for k in (1 << i for i in range(n.bit_length())) if k < n] + [n]
        found["pass@k"] = {k: _mean([pass_at_k(n, sum(a.correct for a in group), k) for group in groups]) for k in sizes}
        found["maj@k"] = {k: _mean([_majority(group, k) for group in groups]) for k in sizes}
    return found


def _majority(group: Sequence[Answer], k: int) -> float:
    """maj@k of one question. A free answer may be right without being spelt as the gold one is: all right ones vote together."""
    return maj_at_k([True if answer.correct else answer.answer for answer in group], True, k)


def _mean(values: list[float]) -> dict[str, Any]:
    """min: a sum of rounded fractions may pass n by a hair."""
    return {"value": fmean(values), "interval": list(wilson(min(sum(values), len(values)), len(values)))}


def flat_scores(found: dict[str, Any]) -> dict[str, float]:
    """The scores as one flat dict of numbers, as metrics.jsonl has them: accuracy, accuracy/<task>, format, mean_length, …"""
    names = ("accuracy", "format", "mean_length", "extraction_failure", "truncated", "looking", "self_correction", "wrong_to_right",
             "right_to_wrong", "skipped")
    flat = {name: found[name] for name in names if name in found}
    return flat | {f"accuracy/{task}": block["accuracy"] for task, block in found["tasks"].items()}
