"""One client for every OpenAI-compatible server: a judge, a reward, a writer of reasoning.

    client = Client(Server("http://localhost:8000/v1", "Qwen/Qwen3-32B"))
    client.reply(Request("Is 7 prime?")).text                  one, and wait
    await client.areply(request)                               one, in a coroutine
    for request, reply in client.replies(requests): ...        many, in the order in which they finish

A request is tried again after a timeout, a lost connection, a reply that is not JSON, and the statuses of
AGAIN. `Retry-After` is obeyed. A 429 halves the number of requests in flight; successes raise it again, one
by one. A request that keeps failing gives a Reply with an `error`. What would fail for every request raises
ServerError: a missing or refused key, an unknown model. The key stays in its environment variable: it is
part of no setting, message or file. The library `openai` does the talking (pip install openai).
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import os
import queue
import random
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from grpo.serving.messages import Reply, Request, read_reply

# statuses after which a request is tried again; also those from 500
AGAIN = (408, 409, 425, 429)
# statuses after which every other request would fail, too
FATAL = {401: "the key is refused", 403: "the key may not do this", 404: "no such model or address"}
# seconds before the second try, doubled before each further one, up to the longest
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0
# seconds; a longer Retry-After is cut to this
LONGEST_RETRY_AFTER = 120.0
# seconds between two looks at `stop`
POLL = 0.2


Asked = TypeVar("Asked", bound=Request)


class Stop(Protocol):
    """An event, such as that of threading."""

    def is_set(self) -> bool:
        """Whether to stop."""
        ...


class ServerError(ValueError):
    """No request can succeed: a wrong setting, a missing or refused key, an unknown model."""


@dataclass(frozen=True)
class Server:
    """Where requests go. url: up to and with `/v1`. key_env: the environment variable that holds the key
    (None: the server needs none). timeout: seconds of one try. retries: further tries. at_once: most requests
    in flight. Raises ServerError for a setting that cannot be right."""

    url: str
    model: str
    key_env: str | None = None
    timeout: float = 600.0
    retries: int = 5
    at_once: int = 16

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"url: {self.url!r} is no address; write one like http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            # the url is not printed: it may hold the key
            what = f"url of {parts.hostname}: it may hold no user, password or query"
            raise ServerError(f"{what}; put the key into an environment variable and name it in key_env")
        for name, least in {"timeout": 0.001, "retries": 0, "at_once": 1}.items():
            if getattr(self, name) < least:
                raise ServerError(f"{name}: must be at least {least}, got {getattr(self, name)}")

    def key(self) -> str:
        """The key, from the environment; "none" if there is no `key_env`. Raises ServerError."""
        if self.key_env is None:
            return "none"
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise ServerError(f"the environment variable {self.key_env} is not set; put the key there")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ServerError(f"the environment variable {self.key_env} holds what is no key")
        return key


class Limit:
    """How many requests may be in flight, at most `most`. Used in one event loop."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.now = float(most)
        self.running = 0
        # a burst of 429 counts once: only requests begun since the last halving can halve
        self.halvings = 0
        self.freed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def place(self):
        """Wait for a free place, and hold it."""
        async with self.freed:
            await self.freed.wait_for(lambda: self.running < int(self.now))
            self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            async with self.freed:
                self.freed.notify_all()

    def halve(self, begun: int) -> None:
        """After a 429.  begun: `halvings` when that request was sent."""
        if begun == self.halvings:
            self.halvings += 1
            self.now = max(1.0, self.now / 2)

    def raise_again(self) -> None:
        """After a success: one place more for each round of successes."""
        self.now = min(self.most, self.now + 1 / self.now)


class Client:
    """Sends requests to one server. Thread-safe: its event loop runs in a thread of its own.  Raises
    ServerError if the library or the key is missing."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._key = server.key()
        try:
            # pyrefly: ignore[missing-import]
            import openai
        except ImportError:
            raise ServerError(
                "a server needs the library openai, an optional extra: pip install openai"
            ) from None
        self._openai: Any = openai
        self._api = self._openai.AsyncOpenAI(
            base_url=server.url, api_key=self._key, timeout=server.timeout, max_retries=0
        )
        self._loop = asyncio.new_event_loop()
        self.limit = Limit(server.at_once)
        # a daemon: a request in flight does not keep the program from ending
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._api.close(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def digest(self, request: Request) -> str:
        """The name under which the reply to a request can be stored."""
        return request.digest(self.server.model)

    def reply(self, request: Request) -> Reply:
        """Send one request and wait. Raises ServerError."""
        return self._send(request).result()

    async def areply(self, request: Request) -> Reply:
        """`reply` for a coroutine of any event loop."""
        return await asyncio.wrap_future(self._send(request))

    def replies(
        self, requests: Iterable[Asked], stop: Stop | None = None, grace: float = 10.0
    ) -> Iterator[tuple[Asked, Reply]]:
        """Send all, at most `at_once` at a time, and yield each with its reply when it is finished. Requests
        are taken one by one, so any number of them needs no more memory.

        stop: once it is set (by a handler of Ctrl-C) no further request is taken; those in flight have
        `grace` seconds to finish, and are dropped after that. Raises ServerError, and drops those in flight.
        """
        finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
        flying: dict[Future, Asked] = {}
        source = iter(requests)
        more = True
        end = float("inf")
        try:
            while more or flying:
                if more and stop is not None and stop.is_set():
                    more = False
                    end = time.monotonic() + grace
                while more and len(flying) < self.server.at_once:
                    if (request := next(source, None)) is None:
                        more = False
                        break
                    future = self._send(request)
                    flying[future] = request
                    future.add_done_callback(finished.put)
                if time.monotonic() > end:
                    return
                with contextlib.suppress(queue.Empty):
                    future = finished.get(timeout=POLL)
                    yield flying.pop(future), future.result()
        finally:
            for future in flying:
                future.cancel()

    def _send(self, request: Request) -> Future:
        return asyncio.run_coroutine_threadsafe(self._reply(request), self._loop)

    async def _reply(self, request: Request) -> Reply:
        """One request, with all its tries."""
        body = request.body(self.server.model)
        name = self.digest(request)
        async with self.limit.place():
            attempt = 0
            while True:
                reply, wait = await self._try(name, body, attempt)
                if wait is None or attempt == self.server.retries:
                    return reply
                attempt += 1
                await asyncio.sleep(wait)

    async def _try(self, name: str, body: dict, attempt: int) -> tuple[Reply, float | None]:
        """One try. -> the reply, and the seconds before the next try (None: no further one helps)."""
        begun = self.limit.halvings
        start = time.monotonic()
        try:
            call = self._api.chat.completions.create(**body)
            found = await asyncio.wait_for(call, self.server.timeout)
            reply = read_reply(name, found, time.monotonic() - start)
            self.limit.raise_again()
            return reply, None
        except (TimeoutError, self._openai.OpenAIError, ValueError) as error:
            reply = Reply(name, seconds=time.monotonic() - start, error=self._why(error))
            status = getattr(error, "status_code", 0)
            headers = getattr(getattr(error, "response", None), "headers", {})
        if status in FATAL:
            raise ServerError(f"{self.server.url}: {FATAL[status]} ({reply.error})")
        if status == 429:
            self.limit.halve(begun)
        passes = status < 400 or status >= 500 or status in AGAIN
        return reply, wait_before(attempt, headers) if passes else None

    def _why(self, error: BaseException) -> str:
        """An error in one line. A server may repeat the key in its message, so it is taken out."""
        if isinstance(error, (asyncio.TimeoutError, self._openai.APITimeoutError)):
            return f"no reply after {self.server.timeout:g} seconds"
        words = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
        words = " ".join(words.split())
        if self.server.key_env:
            words = words.replace(self._key, f"<{self.server.key_env}>")
        return words[:300] or type(error).__name__


def wait_before(attempt: int, headers: Any) -> float:
    """Seconds before a request is tried again. attempt: tries that failed before this one. headers: of the
    response; its Retry-After, in seconds or as a date, is obeyed."""
    asked = str(headers.get("retry-after") or "")
    with contextlib.suppress(ValueError):
        seconds = float(asked) if asked[:1].isdigit() else _date(asked) - time.time()
        return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)
    return min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.75, 1.0)


def _date(text: str) -> float:
    """A date of an HTTP header in seconds since 1970. Raises ValueError."""
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except TypeError:
        raise ValueError(text) from None
