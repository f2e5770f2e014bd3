"""Settings of earlier versions, and of other trainers, with the name that they have here (`renamed.yaml`).

A setting that goes gets its line there, so that an old recipe is refused with the new name.
"""

from pathlib import Path

import yaml

_TABLES = yaml.safe_load(Path(__file__).with_name("renamed.yaml").read_text("utf-8"))
RENAMED: dict[str, str] = {old: new for new, names in _TABLES["renamed"].items() for old in names}
"""{name that is not a setting: the setting that does the same}."""

REMOVED: dict[str, str] = _TABLES["removed"]
"""{name that is not a setting: why it needs none}."""


def replacement(key: str) -> str:
    """What a message says about an unknown key from these tables; "" for any other key. EasyR1's keys have
    groups before them: `worker.rollout.n` is in the table as `rollout.n`."""
    names = key.split(".")
    for name in (".".join(names[start:]) for start in range(len(names))):
        if name in RENAMED:
            return f"; its name here is {RENAMED[name]!r}"
        if name in REMOVED:
            return f"; there is no such setting: {REMOVED[name]}"
    return ""
