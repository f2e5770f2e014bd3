"""Which questions a step asks, and which rank draws which completions of them: a function of (seed, step,
attempt) and the lengths of the prompts, so a resumed run needs nothing saved."""

import sys
from collections.abc import Callable
from typing import NamedTuple

from tqdm import tqdm

from data.order import indices_at
from data.types import BadExample, Example
from grpo.parallel.ranks import gather_objects
from grpo.parallel.rows import Share, share_rows
from grpo.timing import timed

# If no question of a step can be asked, those of the next steps are tried, as many steps as this in all.
LOOKAHEAD_STEPS = 4

# A question -> the question with what the method needs of it, and errors to be named and counted.
Fit = Callable[[Example], tuple[Example, list[BadExample]]]


class Asked(NamedTuple):
    """What a rank asks: P questions and their prompts, which rows of them it draws, and how many questions
    it has skipped."""

    questions: list
    prompts: list
    share: Share
    skipped: int


@timed("prompts")
def chosen_prompts(run, cfg, ranks, step: int, stage, attempt: int = 0, fit: Fit | None = None) -> Asked:
    """This rank's share of the rows of a step. stage: the group size and the cap.

    A skipped question is named on the terminal. A rank may have no row. If no question can be asked, all
    ranks take the next step's; after LOOKAHEAD_STEPS steps without any, this raises ValueError. attempt: of
    dynamic sampling. From the second on (1), questions of earlier attempts are left out; no question may be
    left. fit: for imitation, where groups are not split.
    """
    count = min(cfg.prompts, len(run.examples))
    if getattr(run.examples, "in_order", False):
        # such a source is read once, from its start
        indices = lambda step, attempt: range(step * count, (step + 1) * count)
    else:
        indices = lambda step, attempt: indices_at(step, len(run.examples), count, cfg.seed, attempt)
    before = {index for earlier in range(attempt) for index in indices(step, earlier)}
    skipped: list[BadExample] = []

    def prepared(index: int) -> tuple:
        question, bad = fit(run.examples[index]) if fit else (run.examples[index], [])
        return question, run.chat.prompt(question, blind=cfg.blind), bad

    for later in range(1 if attempt else LOOKAHEAD_STEPS):
        # each rank prepares some of the prompts, and then those of its rows that another one has prepared
        asked = [index for index in indices(step + later, attempt) if index not in before]
        found = {}
        for index in ranks.share(asked):
            bad = []
            try:
                found[index] = prepared(index)
                bad = found[index][2]
            except BadExample as error:
                bad = [error]
            for error in bad:
                tqdm.write(f"step {step + 1}: skipped {error}", file=sys.stderr)
            skipped += bad
        sizes = gather_objects([(index, len(prompt.tokens)) for index, (_, prompt, _) in found.items()])
        if attempt or sizes:
            share = shared_out([size for _, size in sizes], cfg, ranks, stage, split=fit is None)
            mine = [sizes[place][0] for place in share.places]
            mine = [found.get(index) or prepared(index) for index in mine]
            return Asked([each[0] for each in mine], [each[1] for each in mine], share, len(skipped))
    reasons = gather_objects([str(error) for error in skipped])
    what = f"none of {len(reasons)} questions could be asked; the last: {reasons[-1]}"
    raise ValueError(f"step {step + 1}: {what}")


def shared_out(sizes: list[int], cfg, ranks, stage, split: bool) -> Share:
    """A rank's share of the rows of prompts of these lengths. How long a completion will be is not known, so
    each is expected to have `cap` tokens."""
    group, sections = (stage.group, cfg.loss.sections) if split else (1, 0)
    shared = share_rows(sizes, [stage.cap] * len(sizes), group, sections, ranks.size)
    return Share.of(shared, ranks.rank, len(sizes), group)
