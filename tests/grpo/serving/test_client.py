"""The client of OpenAI-compatible servers, against a server (fake_server.py) that fails in every way."""

import asyncio
import email.utils
import io
import re
import threading
import time

import pytest

pytest.importorskip("openai")

from fake_server import message, serving
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grpo.serving import client as module
from grpo.serving.client import Client, Limit, Server, ServerError, wait_before
from grpo.serving.messages import Reply, Request, data_url, png, read_reply

KEY = "sk-a-secret-of-this-test"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(module, "POLL", 0.02)


def ask(fake, *requests, **settings):
    with Client(Server(fake.url, "m", **settings)) as client:
        return [client.reply(request) for request in requests or [Request("Is 7 prime?")]]


# ---- what is sent and read


def test_a_request_is_sent_as_it_is_and_nothing_more():
    picture = png(Image.new("RGB", (2, 2), "red"))
    with serving() as fake:
        (reply,) = ask(fake, Request("What?", (picture,), "Be brief.", 9, 0.6, 0.95, seed=3))
    body = fake.seen[0][0]
    shown = {"type": "image_url", "image_url": {"url": data_url(picture)}}
    user = {"role": "user", "content": [shown, {"type": "text", "text": "What?"}]}
    messages = [{"role": "system", "content": "Be brief."}, user]
    sampling = {"max_tokens": 9, "temperature": 0.6, "top_p": 0.95, "seed": 3}
    assert body == {"model": "m", "messages": messages} | sampling
    assert (reply.text, reply.finish, reply.tokens_in, reply.tokens_out, reply.error) == (
        "yes",
        "stop",
        7,
        3,
        "",
    )
    assert reply.request == Request("What?", (picture,), "Be brief.", 9, 0.6, 0.95, seed=3).digest("m")


@pytest.mark.parametrize(
    "fields, thinking, text",
    [
        ({"content": "yes"}, "", "yes"),
        ({"content": " yes\n", "reasoning_content": " 7 is odd\n"}, "7 is odd", "yes"),
        ({"content": "yes", "reasoning": "7 is odd"}, "7 is odd", "yes"),
        ({"content": "<think>7 is odd</think>\nyes"}, "7 is odd", "yes"),
        ({"content": "7 is odd</think>yes"}, "7 is odd", "yes"),
        ({"content": "<think>7 is"}, "7 is", ""),
        ({"content": None}, "", ""),
        ({"content": None, "refusal": "I cannot."}, "", "I cannot."),
    ],
)
def test_the_thinking_is_told_from_the_text(fields, thinking, text):
    with serving(message("", **fields)) as fake:
        (reply,) = ask(fake)
    assert (reply.thinking, reply.text) == (thinking, text)


def test_the_name_of_a_request_depends_on_all_that_the_reply_depends_on():
    kinds = [
        Request("a"),
        Request("b"),
        Request("a", (b"\x89PNG1",)),
        Request("a", (b"\x89PNG2",)),
        Request("a", (b"\x89PNG1", b"\x89PNG2")),
        Request("a", system="s"),
        Request("a", max_tokens=5),
        Request("a", temperature=1.0),
        Request("a", top_p=0.5),
        Request("a", seed=0),
        Request("a", seed=1),
    ]
    names = {each.digest(model) for each in kinds for model in ("m", "n")}
    assert len(names) == 2 * len(kinds)
    assert Request("a").digest("m") == Request("a").digest("m")


def test_pictures_are_png_or_jpeg():
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "JPEG")
    assert data_url(file.getvalue()).startswith("data:image/jpeg;base64,")
    with pytest.raises(ValueError, match="neither PNG nor JPEG"):
        data_url(b"GIF89a")


# ---- failures that may pass


@pytest.mark.parametrize(
    "fault",
    [429, 408, 409, 500, 503, "half", "text", "page", "closed", {}, {"choices": []}, {"choices": None}],
)
def test_what_may_pass_is_tried_again(fault):
    with serving(fault, fault) as fake:
        (reply,) = ask(fake, retries=2)
    assert reply.text == "yes" and not reply.error
    assert len(fake.seen) == 3


@pytest.mark.parametrize(
    "fault, why", [(500, "500"), ("half", "incomplete|peer closed"), ("closed", "onnect")]
)
def test_what_does_not_pass_is_a_reply_with_its_reason(fault, why):
    with serving(*[fault] * 3) as fake:
        first, second = ask(fake, Request("a"), Request("b"), retries=2)
    assert first.text == "" and re.search(why, first.error), first.error
    assert "\n" not in first.error and len(first.error) <= 300
    assert second.text == "yes", "a request that failed stops no other one"


def test_silence_ends_with_the_timeout():
    with serving("silent") as fake:
        start = time.monotonic()
        (reply,) = ask(fake, retries=0, timeout=0.2)
    assert reply.error == "no reply after 0.2 seconds"
    assert time.monotonic() - start < 5


def test_a_request_that_the_server_cannot_take_is_not_tried_again():
    told = {"error": {"message": "the prompt is longer than the context"}}
    with serving((400, {}, told)) as fake:
        (reply,) = ask(fake)
    assert "longer than the context" in reply.error and len(fake.seen) == 1


def test_retry_after_is_obeyed():
    with serving((429, {"retry-after": "0.3"})) as fake:
        (reply,) = ask(fake)
    assert reply.text == "yes" and fake.times[1] - fake.times[0] >= 0.3


def test_the_wait_before_the_next_try():
    assert wait_before(0, {"retry-after": "7"}) == 7
    assert wait_before(0, {"retry-after": "100000"}) == module.LONGEST_RETRY_AFTER
    date = email.utils.format_datetime(email.utils.localtime().replace(microsecond=0))
    assert wait_before(0, {"retry-after": date}) <= 1
    for odd in ("", "soon", "-3", "1e", None):
        assert 0 < wait_before(0, {"retry-after": odd}) <= 0.01
    assert wait_before(30, {}) <= module.LONGEST_WAIT


# ---- failures that stop everything


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_fails_for_every_request_is_raised_at_once(status, monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    told = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
    with (
        serving(*[(status, {}, told)] * 99) as fake,
        Client(Server(fake.url, "m", "A_KEY", at_once=2)) as client,
    ):
        with pytest.raises(ServerError, match=str(status)) as raised:
            list(client.replies(Request(str(i)) for i in range(50)))
        assert len(fake.seen) <= 4
    assert KEY not in str(raised.value) and "<A_KEY>" in str(raised.value)


def test_the_key_is_sent_and_never_shown(monkeypatch, capfd):
    monkeypatch.setenv("A_KEY", KEY)
    told = {"error": {"message": f"no {KEY}"}}
    with serving((400, {}, told), "text") as fake:
        replies = ask(fake, Request("a"), Request("b"), key_env="A_KEY")
    assert all(headers["authorization"] == f"Bearer {KEY}" for _, headers in fake.seen)
    assert KEY not in repr(replies) + repr(Server(fake.url, "m", "A_KEY")) + "".join(capfd.readouterr())


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "sécret", "line\nline"])
def test_a_key_that_cannot_be_one_is_named_by_its_variable(value, monkeypatch):
    monkeypatch.delenv("A_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("A_KEY", value)
    with pytest.raises(ServerError, match="A_KEY") as raised:
        Client(Server("http://localhost:1/v1", "m", "A_KEY"))
    assert not (value or "").strip() or value not in str(raised.value)


def test_no_key_is_taken_from_the_environment_unasked(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as fake:
        ask(fake)
    assert KEY not in str(fake.seen)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"url": "localhost:8000"}, "url"),
        ({"url": "http://"}, "url"),
        ({"url": f"http://me:{KEY}@host/v1"}, "host"),
        ({"url": f"http://host/v1?key={KEY}"}, "host"),
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"at_once": 0}, "at_once"),
    ],
)
def test_settings_that_cannot_be_right_are_named(settings, named):
    with pytest.raises(ServerError, match=named) as raised:
        Server(**{"url": "http://host/v1", "model": "m"} | settings)
    assert KEY not in str(raised.value)


def test_a_server_that_is_not_there():
    with serving() as fake:
        url = fake.url
    with Client(Server(url, "m", retries=1)) as client:
        assert "onnect" in client.reply(Request("a")).error


# ---- many at a time


def test_at_most_so_many_are_in_flight_and_all_come_back():
    with serving(seconds=0.02, answer=lambda body: message(body["messages"][0]["content"])) as fake:
        taken = []

        def requests():
            for i in range(40):
                taken.append(i)
                yield Request(str(i))

        with Client(Server(fake.url, "m", at_once=5)) as client:
            found = []
            for request, reply in client.replies(requests()):
                assert request.text == reply.text
                found.append(int(reply.text))
                assert len(taken) <= len(found) + 5, "requests are taken when there is a place for them"
    assert sorted(found) == list(range(40)) and 2 <= fake.most <= 5


def test_a_429_halves_what_is_in_flight():
    busy = [(429, {"retry-after": "0.2"})] * 8
    with serving(*busy, seconds=0.02) as fake, Client(Server(fake.url, "m", at_once=8)) as client:
        sizes = [int(client.limit.now) for _ in client.replies(Request(str(i)) for i in range(24))]
    assert min(sizes) < 8 and sizes[-1] > min(sizes), "429 halves it, and successes raise it again"
    assert len(fake.seen) == 24 + 8


@given(st.lists(st.tuples(st.sampled_from(["ok", "429"]), st.booleans()), max_size=30), st.integers(1, 9))
def test_the_limit_stays_between_one_and_the_most(events, most):
    limit = Limit(most)
    for what, old in events:
        before = limit.now
        if what == "ok":
            limit.raise_again()
            assert limit.now >= before
        else:
            limit.halve(limit.halvings - old)
            assert limit.now == (before if old else max(1, before / 2))
        assert 1 <= limit.now <= most
    for _ in range(most * most + 1):
        limit.raise_again()
    assert limit.now == pytest.approx(most), "successes raise it to the most again"


def test_stop_finishes_what_is_in_flight():
    stop = threading.Event()
    with serving(seconds=0.1) as fake, Client(Server(fake.url, "m", at_once=4)) as client:
        found = []
        for _, reply in client.replies((Request(str(i)) for i in range(100)), stop):
            found.append(reply)
            stop.set()
    assert 1 <= len(found) == len(fake.seen) <= 8 and all(reply.text == "yes" for reply in found)


def test_stop_does_not_wait_for_ever():
    stop = threading.Event()
    with serving(message("yes"), "silent") as fake, Client(Server(fake.url, "m", at_once=2)) as client:
        found = []
        for _, reply in client.replies([Request("a"), Request("b")], stop, grace=0.1):
            found.append(reply.text)
            start = time.monotonic()
            stop.set()
    assert found == ["yes"] and time.monotonic() - start < 5


def test_coroutines_of_another_loop_wait_together():
    with serving(seconds=0.2) as fake, Client(Server(fake.url, "m", at_once=16)) as client:

        async def all_of_them():
            return await asyncio.gather(*(client.areply(Request(str(i))) for i in range(16)))

        start = time.monotonic()
        assert all(reply.text == "yes" for reply in asyncio.run(all_of_them()))
        assert time.monotonic() - start < 2.4, "one after the other they take 3.2 s"


def test_a_reply_without_a_message_is_none():
    with pytest.raises(ValueError, match="no message"):
        read_reply("r", None, 0.0)
    assert Reply("r").error == ""
