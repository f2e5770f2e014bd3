"""What a server is asked, and what it replies. Pure: nothing is sent here."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

# the first bytes of a picture file -> its media type
MEDIA = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class Request:
    """One question to a server's model. pictures: PNG or JPEG files as bytes (see `png`). max_tokens: of the
    reply, with its thinking. seed: None leaves it to the server."""

    text: str
    pictures: tuple[bytes, ...] = ()
    system: str = ""
    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def digest(self, model: str) -> str:
        """A hash of all that the reply depends on: model, text, pictures, sampling. 64 hexadecimal digits."""
        told = asdict(self) | {"pictures": [hashlib.sha256(each).hexdigest() for each in self.pictures]}
        return hashlib.sha256(json.dumps(told | {"model": model}, sort_keys=True).encode()).hexdigest()

    def body(self, model: str) -> dict[str, Any]:
        """The arguments of `chat.completions.create`. Fields that many servers refuse are left out. Raises
        ValueError for a picture of another format."""
        content: Any = self.text
        if self.pictures:
            shown = [{"type": "image_url", "image_url": {"url": data_url(each)}} for each in self.pictures]
            content = [*shown, {"type": "text", "text": self.text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        told = {"model": model, "messages": [*system, {"role": "user", "content": content}]}
        told |= {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}
        return told if self.seed is None else told | {"seed": self.seed}


@dataclass(frozen=True)
class Reply:
    """What came back. request: its digest. thinking: the reasoning before the text, if there is any. finish:
    the server's reason ("stop", "length", ...). tokens_in, tokens_out: as the server counts. seconds: of the
    last try. error: why there is no text, in one line; "" if there is one."""

    request: str
    text: str = ""
    thinking: str = ""
    finish: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    error: str = ""


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PNG")
    return file.getvalue()


def data_url(picture: bytes) -> str:
    """A picture file as a data URL. Raises ValueError if it is neither PNG nor JPEG."""
    for first, media in MEDIA.items():
        if picture.startswith(first):
            return f"data:{media};base64,{base64.b64encode(picture).decode()}"
    raise ValueError("a picture of a request is neither PNG nor JPEG; make it one with grpo.serving's png()")


def split_thinking(text: str) -> tuple[str, str]:
    """What a model wrote -> its thinking, with a `<think>` that it may begin with, and the text behind
    `</think>`."""
    if "</think>" in text:
        thinking, _, text = text.partition("</think>")
        return thinking, text
    # cut before it ended: there is no answer yet
    return (text, "") if text.lstrip().startswith("<think>") else ("", text)


def read_reply(request: str, found: Any, seconds: float) -> Reply:
    """A completion of the library -> Reply. The thinking is the field `reasoning_content` (or `reasoning`),
    else what stands before `</think>`. Raises ValueError if it holds no message."""
    first = (getattr(found, "choices", None) or [None])[0]
    message = getattr(first, "message", None)
    if message is None:
        raise ValueError("the reply holds no message")
    text = message.content or getattr(message, "refusal", None) or ""
    thinking = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None) or ""
    if not thinking:
        thinking, text = split_thinking(text)
    thinking = thinking.strip().removeprefix("<think>").strip()
    counts = getattr(found, "usage", None)
    tokens_in, tokens_out = (
        getattr(counts, f"{kind}_tokens", None) or 0 for kind in ("prompt", "completion")
    )
    finish = getattr(first, "finish_reason", None) or ""
    return Reply(request, text.strip(), thinking, finish, tokens_in, tokens_out, seconds)
