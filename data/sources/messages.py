"""Chat messages as a row: the turns of system and user are its question, a last turn of the assistant is its
answer.

Read are the forms of OpenAI, TRL and Qwen (`role`, and `content` as text or as parts) and of ShareGPT
(`from`, `value`). A picture is a part; or a mark "<image>" in a text, for the next one of the row's pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from data.types import MARK, BadRow, short

ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}
# where a part of a turn has its picture; without any it is one of the row's own
PICTURES = ("image", "image_url", "url", "path", "base64")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def unfolded(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row whose `messages` have become question, pictures, answer and documents (what imitation learns
    from); any other row as it is. Raises BadRow."""
    if "messages" not in values:
        return dict(values)
    found = {name: value for name, value in values.items() if name not in ("messages", "picture", "pictures")}
    bad = lambda reason, remedy: BadRow(where, "messages", reason, remedy)
    if values.get("question") is not None:
        raise bad("stand beside question", "keep one of the two, or choose one with the setting columns")
    turns = values["messages"] if isinstance(values["messages"], list) else [values["messages"]]
    said = [_turn(turn, where) for turn in turns]
    answer = said.pop() if said and said[-1][0] == "assistant" else None
    roles = [role for role, _, _ in said]
    if "user" not in roles or not {"user", "system"}.issuperset(roles):
        whose = ", ".join([short(role)[1:-1] for role in roles[:6]] + ["…"] * (len(roles) > 6))
        remedy = "one row asks one question: write a turn of the user, perhaps of the system, and an answer"
        raise bad(f"have turns of {whose}" if whose else "have no turn of the user", remedy)
    found["question"] = "\n\n".join(text for _, text, _ in said)
    pictures = [picture for _, _, shown in said for picture in shown]
    if own := _own_pictures(values, pictures, bad):
        found["pictures"] = own
    if answer is not None:
        _, text, shown = answer
        if shown:
            raise bad("have a picture in the assistant's turn", "write its answer as text")
        found["documents"] = (text,)
        tagged = _ANSWER.findall(text)
        if found.get("answer") is None:
            found["answer"] = (tagged[0] if len(tagged) == 1 else text).strip()
    if found.get("answer") is None:
        raise BadRow(where, "answer", "is missing", "add it, or end the messages with the assistant's answer")
    return found


def _own_pictures(values: Mapping[str, Any], pictures: list[Any], bad: Any) -> list[Any]:
    """The pictures in the order of their marks: those in the messages, and at each place that names none the
    next one of the row."""
    given = values.get("pictures", values.get("picture", []))
    given = given if isinstance(given, list) else [given]
    # no places: all stand where the template puts them
    if not pictures:
        return given
    places = sum(picture is None for picture in pictures)
    if places != len(given):
        said = f"have {places} places for pictures, and the row has {len(given)} pictures"
        raise bad(said, "write one place for each picture, or none")
    following = iter(given)
    return [next(following) if picture is None else picture for picture in pictures]


def _turn(turn: Any, where: str) -> tuple[str, str, list[Any]]:
    """(role, text with a mark for each picture, the pictures; None for one that the row has)."""
    if not isinstance(turn, dict):
        raise BadRow(where, "messages", f"hold {short(turn)}, not a turn", 'write {"role": …, "content": …}')
    role = turn.get("role") or turn.get("from")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    if not isinstance(role, str) or not isinstance(content, (str, list)):
        said = f"have a turn with the keys {short(list(turn))}"
        raise BadRow(where, "messages", said, 'write {"role": "user", "content": "…"}')
    texts: list[str] = []
    pictures: list[Any] = []
    for text, picture in _parts(content, where):
        texts.append(MARK if text is None else text)
        pictures += [picture] if text is None else [None] * text.count(MARK)
    return ROLES.get(role, role), "".join(texts), pictures


def _parts(content: str | list[Any], where: str) -> Iterator[tuple[str | None, Any]]:
    """(text, None) or (None, picture) for each part of a turn."""
    for part in [content] if isinstance(content, str) else content:
        if isinstance(part, str):
            yield part, None
            continue
        part = (
            {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        )
        kind = str(part.get("type") or next(iter(part), "nothing")).removeprefix("input_")
        shown = next((part[key] for key in PICTURES if part.get(key)), None)
        text = part.get("text")
        if kind == "text" and isinstance(text, str) and shown is None:
            yield text, None
        elif kind in ("image", "image_url") and not text:
            yield None, shown["url"] if isinstance(shown, dict) and "url" in shown else shown
        else:
            said = f"have a part of type {short(kind)} that cannot be read"
            raise BadRow(where, "messages", said, "write parts of type text and image")
