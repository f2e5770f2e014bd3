"""Which questions a step asks: a function of (seed, step, attempt), so a resumed run needs nothing saved."""

import sys
from collections.abc import Callable

from tqdm import tqdm

from data.order import indices_at
from data.types import BadExample, Example
from grpo.parallel.ranks import gather_objects
from grpo.timing import timed

# If no question of a step can be asked, those of the next steps are tried, as many steps as this in all.
LOOKAHEAD_STEPS = 4

# A question -> the question with what the method needs of it, and errors to be named and counted.
Fit = Callable[[Example], tuple[Example, list[BadExample]]]


@timed("prompts")
def chosen_prompts(
    run, cfg, ranks, step: int, attempt: int = 0, fit: Fit = lambda question: (question, [])
) -> tuple[list, list, int]:
    """This rank's share of the questions of a step. -> (questions, prompts, how many were skipped).

    A skipped question is named on the terminal. A rank may have none. If no rank has any, all of them take
    the next step's too; after LOOKAHEAD_STEPS steps without any, this raises ValueError. attempt: of dynamic
    sampling. From the second on (1), questions of earlier attempts are left out; no question may be left.
    """
    count = min(cfg.prompts, len(run.examples))
    indices = lambda step, attempt: indices_at(step, len(run.examples), count, cfg.seed, attempt)
    asked = {index for earlier in range(attempt) for index in indices(step, earlier)}
    questions: list = []
    prompts: list = []
    skipped: list[BadExample] = []
    for later in range(1 if attempt else LOOKAHEAD_STEPS):
        for index in ranks.share(indices(step + later, attempt)):
            if index in asked:
                continue
            try:
                question, bad = fit(run.examples[index])
                prompts.append(run.chat.prompt(question, blind=cfg.blind))
                questions.append(question)
            except BadExample as error:
                bad = [error]
            for error in bad:
                tqdm.write(f"step {step + 1}: skipped {error}", file=sys.stderr)
            skipped += bad
        if attempt or any(gather_objects([bool(prompts)])):
            return questions, prompts, len(skipped)
    reasons = gather_objects([str(error) for error in skipped])
    what = f"none of {len(reasons)} questions could be asked; the last: {reasons[-1]}"
    raise ValueError(f"step {step + 1}: {what}")
