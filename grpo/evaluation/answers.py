"""Ask a policy questions and read its answers: the same for `train.py` and `evaluate.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from data.types import BadExample, Example, Measure, Prompt, measure_nothing
from grpo.batch import collate_prompts
from grpo.evaluation.protocols import Reading, strict
from grpo.evaluation.resume import Kept, Written
from grpo.evaluation.scores import Answers, Completion, read_completion
from grpo.memory import WAVE, MemoryBudget
from grpo.parallel.ranks import gather_objects
from grpo.rollout import DecodeOptions, generate
from grpo.sampling import Truncation, uid_hash

# the "step" in the address of an evaluation's random numbers; training steps are 0, 1, …
EVAL_STEP = -1


@dataclass(frozen=True)
class Asking:
    """How questions are asked and answers are read. Raises ValueError for several greedy completions.

    cap: longest completion, tokens. samples: completions a question. temperature: 0 is greedy. blind: shows
    mid-grey pictures instead. banned: token ids that are never drawn. prefix: token ids behind the prompt,
    with which every completion begins; they are in its text, and not in its tokens and length. read: finds
    the answer in a completion. measure: of the task's hook. truncation: words that are never drawn. attempt:
    another one has other random numbers.
    """

    cap: int
    samples: int = 1
    temperature: float = 0.0
    truncation: Truncation | None = None
    seed: int = 0
    blind: bool = False
    banned: Sequence[int] = ()
    prefix: Sequence[int] = ()
    read: Callable[[str, Example], Reading] = strict
    measure: Measure = measure_nothing
    attempt: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or (self.samples > 1 and self.temperature == 0):
            asked = f"{self.samples} completions a question at temperature {self.temperature}"
            raise ValueError(f"{asked}: need 1, or a temperature above 0")


# the number of a question among all, the question, its prompt
Asked = tuple[int, Example, Prompt]


@torch.no_grad()
def answer_all(
    policy,
    chat,
    examples: Sequence[Example],
    how: Asking,
    wave: int | MemoryBudget = WAVE,
    share: tuple[int, int] = (0, 1),
    kept: Kept | None = None,
    progress: Callable[[int], Any] = lambda count: None,
) -> Answers:
    """Ask every example `how.samples` times. It is skipped if it cannot be read or its prompt is too long.

    wave: tokens (prompts and completions) of the rows decoded together, or their MemoryBudget; it changes
    memory and speed, never an answer, and is halved when the GPU is out of memory. share: (rank, ranks):
    each rank asks its share, and all ranks get all answers. kept: completions of an interrupted evaluation,
    which are not written again; new ones are added. progress: called with the number of questions done.
    """
    room = wave if isinstance(wave, MemoryBudget) else MemoryBudget(wave)
    kept = kept or Kept()
    # by a question's number: its completions, or why it was skipped
    outcomes: list[tuple[int, list[Completion] | str]] = []

    def skip(number: int, error: BadExample) -> None:
        outcomes.append((number, str(error)))
        progress(1)

    mine = range(share[0], len(examples), share[1])
    for asked in _waves(_asked(chat, examples, how, skip, mine), room, how):
        questions = [(number, example) for number, example, _ in asked]
        found = [kept.find(*question) for question in questions]
        written = [rows for rows in found if rows is not None]
        # a wave with a gap is written whole, so that every question has the neighbours that it would have had
        if len(written) < len(asked):
            written = _write_halved(policy, chat, asked, how, room)
            kept.add(questions, written)
        outcomes += [
            (number, [read_completion(example, *row, how.read, how.measure) for row in rows])
            for (number, example), rows in zip(questions, written)
        ]
        progress(len(asked))
    answers = Answers()
    for _, outcome in sorted(gather_objects(outcomes), key=lambda pair: pair[0]):
        if isinstance(outcome, str):
            answers.skipped.append(outcome)
        else:
            answers.append(outcome)
    return answers


def _write(policy, chat, asked: list[Asked], how: Asking) -> list[list[Written]]:
    """The completions of the questions of a wave."""
    device = next(policy.parameters()).device
    merge = policy.config.vision.spatial_merge_size
    prompts = [prompt for *_, prompt in asked]
    rollout = generate(
        policy,
        collate_prompts(prompts, image_token=chat.image_token, merge=merge).to(device),
        group=how.samples,
        cap=how.cap,
        temperature=how.temperature,
        stop_ids=chat.stop_ids,
        options=DecodeOptions(how.banned, truncation=how.truncation),
        address=(how.seed, EVAL_STEP - how.attempt, [uid_hash(prompt.uid) for prompt in prompts]),
    )
    begun = torch.tensor(how.prefix, dtype=torch.long, device=rollout.tokens.device)
    tokens = torch.cat([begun.expand(*rollout.length.shape, -1), rollout.tokens], dim=-1)
    texts = chat.texts(tokens, rollout.length + len(begun))
    rows, length, stopped = (x.tolist() for x in (rollout.tokens, rollout.length, rollout.stopped))
    return [
        [Written(texts[p][g], tuple(rows[p][g][: length[p][g]]), stopped[p][g]) for g in range(how.samples)]
        for p in range(len(asked))
    ]


def _write_halved(policy, chat, asked: list[Asked], how: Asking, room: MemoryBudget) -> list[list[Written]]:
    """`_write`; after a CUDA out-of-memory error, in two halves. Raises it if one question is too large."""
    try:
        return _write(policy, chat, asked, how)
    except torch.OutOfMemoryError:
        if len(asked) == 1:
            raise
    # here, not in the handler: the exception keeps the tensors of the failed try alive
    room.halve(len(asked))
    torch.cuda.empty_cache()
    middle = len(asked) // 2
    halves = (asked[:middle], asked[middle:])
    return [rows for half in halves for rows in _write_halved(policy, chat, half, how, room)]


def _asked(
    chat, examples: Sequence[Example], how: Asking, skip: Callable[[int, BadExample], None], share: range
) -> Iterator[Asked]:
    """The examples that can be asked, and prompts. One by one: a benchmark's pixels would fill the memory."""
    for index in share:
        try:
            example = examples[index]
            prompt = chat.prompt(example, blind=how.blind)
        except BadExample as error:
            skip(index, error)
        else:
            tokens = np.concatenate([prompt.tokens, np.array(how.prefix, prompt.tokens.dtype)])
            yield index, example, replace(prompt, tokens=tokens)


def _waves(asked: Iterator[Asked], room: MemoryBudget, how: Asking) -> Iterator[list[Asked]]:
    """Lists of neighbours that fit into the room together. A question that alone is too large goes alone."""
    wave: list[Asked] = []
    longest = 0
    for one in asked:
        size = len(one[2].tokens)
        if wave and not room.holds(len(wave) + 1, max(longest, size), how.samples, how.cap):
            yield wave
            wave = []
            longest = 0
        wave.append(one)
        longest = max(longest, size)
    if wave:
        yield wave
