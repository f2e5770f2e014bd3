"""What a policy can do: ask it questions, read its answers, count. The same for `train.py` and `evaluate.py`.

How an answer is read is a protocol's to say (`grpo/evaluation/protocols.py`; by default the reward's parser
reads it), and what could not be read is
counted apart from what was wrong: the same model scores 49.8 or 73.0 on CV-Bench depending on how it is
asked, so an accuracy without its extraction failures says little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from data.answers.parser import well_formed
from data.shapes.documents import agrees, read_looks
from data.types import BadExample, Example, Prompt
from grpo.batch import collate_prompts
from grpo.evaluation.protocols import TOTALS, WEIGHTS, Mark, Reading, strict
from grpo.evaluation.reflection import ends_in_loop, reflection_scores, repetition, said
from grpo.evaluation.resume import Kept, Written
from grpo.evaluation.statistics import maj_at_k, paired_difference, pass_at_k, wilson
from grpo.memory import WAVE, Room
from grpo.parallel.ranks import gather_objects
from grpo.rollout import DecodeOptions, generate
from grpo.sampling import uid_hash

# the address of an evaluation's random numbers; training steps are 0, 1, …
STEP = -1
# uids of the built-in world. Its task names won't do: CV-Bench has the same
BUILT_IN = "shapes/"


@dataclass(frozen=True)
class Answer:
    """One completion, read. `answer` and `letter` are None, and `why` says why, where no answer could be
    extracted.

    length: tokens, the stop token included.  stopped: False where the cap cut it off.  source: where a
    benchmark has the picture from. The last four are for the built-in world, else None: did it look, did it
    look again ("but wait"), and was the conclusion of its first and of its last look right.
    """

    uid: str
    task: str
    # its file, else the question's uid and the picture's number; several are separated by commas
    picture: str | None
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
    source: str | None = None
    looked: bool | None = None
    again: bool | None = None
    first_right: bool | None = None
    last_right: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `evaluate.py --json` writes them: `text` is called completion there, and token
        ids are left out."""
        values = asdict(self)
        del values["tokens"]
        return {("completion" if key == "text" else key): value for key, value in values.items()}


class Answers(list):
    """One list of answers a question, in the order asked. `skipped` names the questions that could not be
    asked, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: list[str] = []


# the number of a question among all, the question, its prompt
Asked = tuple[int, Example, Prompt]


@torch.no_grad()
def answer_all(
    policy,
    chat,
    examples: Sequence[Example],
    *,
    cap: int,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    wave: int | Room = WAVE,
    blind: bool = False,
    banned: Sequence[int] = (),
    read: Callable[[str, Example], Reading] = strict,
    share: tuple[int, int] = (0, 1),
    kept: Kept | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Answers:
    """Ask every example `samples` times. → Answers, one list of `samples` Answer each. Raises ValueError for
    several greedy ones.

    cap: longest completion, tokens.  temperature: 0 is greedy.  wave: tokens (prompts and completions) of the
    rows decoded together, or the Room for them; it changes memory and speed, never an answer, and is halved
    where the GPU's memory is full.  blind: the pictures are withheld (mid-grey ones are shown).  banned:
    token ids that may not be drawn.  read: how an answer is found in a completion.
    share: (rank, of how many): every rank asks its share, and all of them get all answers.  kept: completions
    of an evaluation that was interrupted are not written again, new ones are added.  progress: called with
    the number of questions just dealt with. An example that cannot be read, or whose prompt is too long, is
    skipped and named in `.skipped`.
    """
    if samples < 1 or (samples > 1 and temperature == 0):
        raise ValueError(
            f"{samples} completions a question at temperature {temperature}: need 1, or a temperature above 0"
        )
    room, kept, progress = (
        wave if isinstance(wave, Room) else Room(wave),
        kept or Kept(),
        progress or (lambda count: None),
    )
    # by a question's number: its answers, or why it was skipped
    outcomes: list[tuple[int, list[Answer] | str]] = []

    def skip(number: int, error: BadExample) -> None:
        outcomes.append((number, str(error)))
        progress(1)

    write = partial(
        _write, policy, chat, samples=samples, cap=cap, temperature=temperature, seed=seed, banned=banned
    )
    for asked in _waves(_asked(chat, examples, blind, skip, share), room, samples, cap):
        written = [kept.find(number, example) for number, example, _ in asked]
        # a wave is written whole, in the company it would have had
        if None in written:
            written = _fitting(write, asked, room)
            kept.add([(number, example) for number, example, _ in asked], written)
        outcomes += [
            (number, [read_answer(example, *row, read) for row in rows])
            for (number, example, _), rows in zip(asked, written)
        ]
        progress(len(asked))
    answers = Answers()
    for _, outcome in sorted(gather_objects(outcomes), key=lambda pair: pair[0]):
        (answers.skipped if isinstance(outcome, str) else answers).append(outcome)
    return answers


def _write(
    policy,
    chat,
    asked: list[Asked],
    *,
    samples: int,
    cap: int,
    temperature: float,
    seed: int,
    banned: Sequence[int],
) -> list[list[Written]]:
    """The completions of the questions of a wave."""
    device, merge = next(policy.parameters()).device, policy.config.vision.spatial_merge_size
    prompts = collate_prompts([prompt for *_, prompt in asked], image_token=chat.image_token, merge=merge).to(
        device
    )
    rollout = generate(
        policy,
        prompts,
        group=samples,
        cap=cap,
        temperature=temperature,
        stop_ids=chat.stop_ids,
        options=DecodeOptions(banned),
        address=(seed, STEP, [uid_hash(prompt.uid) for *_, prompt in asked]),
    )
    texts = chat.texts(rollout.tokens, rollout.length)
    tokens, length, stopped = (x.tolist() for x in (rollout.tokens, rollout.length, rollout.stopped))
    return [
        [Written(texts[p][g], tuple(tokens[p][g][: length[p][g]]), stopped[p][g]) for g in range(samples)]
        for p in range(len(asked))
    ]


def _fitting(
    write: Callable[[list[Asked]], list[list[Written]]], asked: list[Asked], room: Room
) -> list[list[Written]]:
    """A wave's completions; in halves, where the memory of the GPU is full. Raises OutOfMemoryError if one
    question alone fills it."""
    try:
        return write(asked)
    except torch.OutOfMemoryError:
        if len(asked) == 1:
            raise
    # here, and not above: an exception holds on to all that was computed
    room.halve(len(asked))
    torch.cuda.empty_cache()
    middle = len(asked) // 2
    return _fitting(write, asked[:middle], room) + _fitting(write, asked[middle:], room)


def _asked(
    chat,
    examples: Sequence[Example],
    blind: bool,
    skip: Callable[[int, BadExample], None],
    share: tuple[int, int],
) -> Iterator[Asked]:
    """The examples that can be asked, each with its prompt; one by one, because the pixels of a whole
    benchmark would fill the memory."""
    rank, ranks = share
    for index in range(rank, len(examples), ranks):
        try:
            example = examples[index]
            prompt = chat.prompt(example, blind=blind)
        except BadExample as error:
            skip(index, error)
        else:
            yield index, example, prompt


def _waves(asked: Iterator[Asked], room: Room, samples: int, cap: int) -> Iterator[list[Asked]]:
    """Neighbours, as many as there is room for. One that needs more goes alone."""
    wave, longest = [], 0
    for one in asked:
        size = len(one[2].tokens)
        if wave and not room.holds(len(wave) + 1, max(longest, size), samples, cap):
            yield wave
            wave, longest = [], 0
        wave.append(one)
        longest = max(longest, size)
    if wave:
        yield wave


def read_answer(
    example: Example,
    text: str,
    tokens: Sequence[int],
    stopped: bool,
    read: Callable[[str, Example], Reading] = strict,
) -> Answer:
    """What a completion's text says: the answer in it, whether that is right, the format, and (in the
    built-in world) how it looked."""
    found = read(text, example)
    pictures = [
        p.name if isinstance(p, Path) else f"{example.uid}#{number}"
        for number, p in enumerate(example.pictures, 1)
    ]
    looks = {}
    if example.uid.startswith(BUILT_IN):
        seen = read_looks(text)
        looks = {"looked": seen.looked, "again": seen.again}
        looks |= {"first_right": agrees(seen.first, example), "last_right": agrees(seen.last, example)}
    return Answer(
        uid=example.uid,
        task=example.task,
        picture=", ".join(pictures) or None,
        question=example.question,
        choices=example.choices,
        gold=example.answer,
        text=text,
        tokens=tuple(tokens),
        length=len(tokens),
        stopped=stopped,
        answer=found.answer,
        letter=found.letter,
        why=found.why,
        correct=found.correct,
        well_formed=well_formed(text),
        source=example.extra.get("source"),
        **looks,
    )


# ---- counting


def scores(answers: Sequence[Sequence[Answer]], total: str = "micro") -> dict[str, Any]:
    """The scores of `answer_all`'s answers, over all questions (micro average) and, under "tasks", the same
    for each task.

    "totals" has the total made in each way that these questions allow
    (`grpo/evaluation/protocols.py:TOTALS`), "total" the one that was asked for, by its name.

    questions, skipped, completions (a question); accuracy with its 95 % interval, and chance (1 / choices);
    format, truncated (by the cap) and extraction_failure as shares, with the failures' reasons counted under
    "failures"; mean_length in tokens. In the built-in
    world: looking and self_correction as shares, and the counts wrong_to_right, right_to_wrong of the second
    look. With several
    completions a question: "pass@k" and "maj@k" for k = 1, 2, 4, …, as {k: {"value", "interval"}}. Raises
    ValueError without answers, or without those that the total needs.
    """
    if not answers:
        raise ValueError(
            "no question could be asked: " + (next(iter(getattr(answers, "skipped", ())), "there are none"))
        )
    found = _block(answers)
    found["skipped"] = len(getattr(answers, "skipped", ()))
    tasks = dict.fromkeys(group[0].task for group in answers)
    found["tasks"] = {
        task: _block([group for group in answers if group[0].task == task]) for task in tasks if task
    }
    marks = [
        Mark(group[0].task, group[0].source, fmean(answer.correct for answer in group)) for group in answers
    ]
    # of CV-Bench, whatever the protocol
    both = ["source_averaged"] if {mark.source for mark in marks} >= set(WEIGHTS) else []
    found["totals"] = {name: TOTALS[name](marks) for name in dict.fromkeys(["micro", *both, total])}
    found["total"] = {"name": total} | found["totals"][total]
    return found


def differences(
    first: Sequence[Sequence[Answer]], second: Sequence[Sequence[Answer]]
) -> dict[str, dict[str, Any]]:
    """First minus second over the questions that both were asked: {task, and "all": both accuracies and
    `Paired` as one dict}. Raises ValueError."""
    other = {group[0].uid: group[0] for group in second}
    pairs = [(group[0], other[group[0].uid]) for group in first if group[0].uid in other]
    if not pairs:
        raise ValueError("no question could be asked of both; see what was skipped")
    found = {}
    for task in [*dict.fromkeys(a.task for a, _ in pairs if a.task), "all"]:
        a, b = zip(*((a.correct, b.correct) for a, b in pairs if task in ("all", a.task)))
        found[task] = {"first": sum(a) / len(a), "second": sum(b) / len(b)} | asdict(paired_difference(a, b))
    return found


def _block(groups: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """The scores of some questions.

    Completions of one question are not independent, so the question is the unit: its own accuracy counts as
    one fraction of a success.
    """
    rows = [answer for group in groups for answer in group]
    right = [fmean(answer.correct for answer in group) for group in groups]
    found: dict[str, Any] = {
        "questions": len(groups),
        "completions": len(groups[0]),
        "accuracy": fmean(right),
        "interval": _mean(right)["interval"],
        "chance": fmean(1 / len(group[0].choices) if group[0].choices else 0.0 for group in groups),
        "format": fmean(answer.well_formed for answer in rows),
        "extraction_failure": fmean(answer.answer is None for answer in rows),
        "failures": dict(Counter(answer.why for answer in rows if answer.why).most_common()),
        "mean_length": fmean(answer.length for answer in rows),
        "truncated": fmean(not answer.stopped for answer in rows),
    }
    written = [answer.tokens[:-1] if answer.stopped else answer.tokens for answer in rows]
    found |= {
        "repetition": fmean(map(repetition, written)),
        "loop_ratio": fmean(map(ends_in_loop, written)),
        "aha": reflection_scores(
            [[(said(answer.text), answer.correct) for answer in group] for group in groups]
        ),
    }
    if looks := [answer for answer in rows if answer.looked is not None]:
        again = [answer for answer in looks if answer.again]
        found |= {
            "looking": fmean(answer.looked for answer in looks),
            "self_correction": len(again) / len(looks),
            "wrong_to_right": sum(answer.last_right and not answer.first_right for answer in again),
            "right_to_wrong": sum(answer.first_right and not answer.last_right for answer in again),
        }
    if (n := len(groups[0])) > 1:
        sizes = [k for k in (1 << i for i in range(n.bit_length())) if k < n] + [n]
        found["pass@k"] = {
            k: _mean([pass_at_k(n, sum(a.correct for a in group), k) for group in groups]) for k in sizes
        }
        found["maj@k"] = {k: _mean([_majority(group, k) for group in groups]) for k in sizes}
    return found


def _majority(group: Sequence[Answer], k: int) -> float:
    """maj@k of one question. A free answer may be right without being spelt as the gold one is: all right
    ones vote together."""
    return maj_at_k([True if answer.correct else answer.answer for answer in group], True, k)


def _mean(values: list[float]) -> dict[str, Any]:
    """min: a sum of rounded fractions may pass n by a hair."""
    return {"value": fmean(values), "interval": list(wilson(min(sum(values), len(values)), len(values)))}


def flat_scores(found: dict[str, Any]) -> dict[str, float]:
    """The scores as one flat dict of numbers, as metrics.jsonl has them: accuracy, accuracy/<task>,
    format, mean_length, …"""
    names = (
        "accuracy",
        "format",
        "mean_length",
        "extraction_failure",
        "truncated",
        "repetition",
        "loop_ratio",
        "looking",
        "self_correction",
        "wrong_to_right",
        "right_to_wrong",
        "skipped",
    )
    flat = {name: found[name] for name in names if name in found} | {
        f"aha/{name}": value for name, value in found["aha"].items() if "word/" not in name
    }
    return flat | {f"accuracy/{task}": block["accuracy"] for task, block in found["tasks"].items()}
