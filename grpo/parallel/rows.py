"""Which rank gets which rows of a step: a pure function of what each row is expected to cost.

The P·G rows of a step are numbered b = p·G + g and cut into neighbouring pieces. So what is gathered from all
ranks is in the order that one rank would have, and at most ranks - 1 groups are on two ranks or more. A rank
computes the prompt of every group that it has a row of. A run does not use it yet: `Ranks.share` shares out
whole groups, so with fewer prompts than ranks some ranks have no row.
"""

from collections.abc import Sequence


def cut_rows(prompts: Sequence[int], rows: Sequence[int], group: int, pieces: int) -> list[range]:
    """Cut the rows of P groups into `pieces` neighbouring ranges; the costliest is as cheap as possible.

    prompts, rows (P,): the cost of each prompt, paid once in every piece that has a row of it, and of each of
    its `group` rows, in tokens. No range is empty, unless there are fewer rows than pieces.
    """
    count = group * len(rows)
    if count < pieces:
        return [range(min(b, count), min(b + 1, count)) for b in range(pieces)]
    low = max((prompt + row for prompt, row in zip(prompts, rows)), default=0)
    high = sum(prompts) + group * sum(rows)
    while low < high:
        limit = (low + high) // 2
        if _fill(prompts, rows, group, pieces, limit)[-1].stop == count:
            high = limit
        else:
            low = limit + 1
    return _fill(prompts, rows, group, pieces, low)


def _fill(prompts, rows, group: int, pieces: int, limit: int) -> list[range]:
    """Fill one piece after another up to `limit`, with a row left for each of the pieces that follow."""
    count = group * len(rows)
    found = []
    b = 0
    for later in reversed(range(pieces)):
        first = b
        cost = 0
        while b < count - later:
            p, g = divmod(b, group)
            cost += rows[p] + (prompts[p] if g == 0 or b == first else 0)
            if cost > limit:
                break
            b += 1
        found.append(range(first, b))
    return found


def share_rows(
    prompts: Sequence[int], rows: Sequence[int], group: int, sections: int, ranks: int
) -> list[list[range]]:
    """The rows of every rank, cut into sections. Arguments as for `cut_rows`.

    A number of ranks that divides `sections` shares out whole sections. So these are the same ranges on any
    such number of ranks, and so are their gradients (grpo/exactness.py). On another number of ranks, each has
    one section.
    """
    if sections % ranks:
        sections = ranks
    pieces = cut_rows(prompts, rows, group, max(sections, ranks))
    each = len(pieces) // ranks
    return [pieces[first : first + each] for first in range(0, len(pieces), each)]
