"""The lines of a plan, and bytes and counts as people read them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One line of the plan: what, how many bytes, and where the number comes from."""

    name: str
    bytes: int
    why: str


# What exists at each moment of learning: {moment: lines}.
Moments = dict[str, tuple[Item, ...]]


def total(items: tuple[Item, ...]) -> int:
    """Bytes of all lines."""
    return sum(item.bytes for item in items)


def shown_bytes(count: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.0f} GiB" if count >= 100 else f"{count:.1f} GiB"


def shown_count(count: float) -> str:
    """A number of parameters."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"
