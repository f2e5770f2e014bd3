"""A small OpenAI-compatible server in a thread. It answers, or fails as its script says."""

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def message(text, finish="stop", **fields):
    """The JSON of a completion."""
    told = {"role": "assistant", "content": text} | fields
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    choices = [{"index": 0, "message": told, "finish_reason": finish}]
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": choices,
        "usage": usage,
    }


class Fake(ThreadingHTTPServer):
    """script: what to do with the next requests, one entry each; then what `fault(body, n)` says about the
    n-th arrival of a body, from 0; without a word from it `answer(body)` is sent.

    An entry is a status, (status, headers), (status, headers, JSON), "half" (of a JSON, the connection then
    closed), "text" (no JSON), "closed", "silent", or a JSON object to send.
    seen: (body, headers) of every request. most: requests that were in flight at the same time.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, script=(), seconds=0.0, answer=lambda body: message("yes"), fault=lambda body, arrival: None
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seconds, self.answer, self.fault = list(script), seconds, answer, fault
        self.seen, self.times, self.arrivals = [], [], Counter()
        self.lock, self.running, self.most = threading.Lock(), 0, 0
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        fake = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with fake.lock:
            fake.seen.append((body, {name.lower(): value for name, value in self.headers.items()}))
            fake.times.append(time.monotonic())
            fake.running += 1
            fake.most = max(fake.most, fake.running)
            name = json.dumps(body, sort_keys=True)
            todo = fake.script.pop(0) if fake.script else fake.fault(body, fake.arrivals[name])
            fake.arrivals[name] += 1
        try:
            time.sleep(fake.seconds)
            self.act(todo, body)
        finally:
            with fake.lock:
                fake.running -= 1

    def act(self, todo, body):
        if todo == "closed":
            self.close_connection = True
        elif todo == "silent":
            self.server.over.wait(20)
            self.close_connection = True
        elif todo == "half":
            whole = json.dumps(message("yes")).encode()
            self.head(200, {"content-length": str(len(whole))})
            self.wfile.write(whole[: len(whole) // 2])
            self.close_connection = True
        elif todo == "text":
            self.send(200, {"content-type": "application/json"}, b'{"choices": [{"mess')
        elif todo == "page":
            self.send(200, {"content-type": "text/html"}, b"<html>busy</html>")
        elif isinstance(todo, dict):
            self.send(200, {}, json.dumps(todo).encode())
        elif todo is not None:
            status, headers, told = (*((todo,) if isinstance(todo, int) else todo), {}, {})[:3]
            self.send(status, headers, json.dumps(told).encode())
        else:
            self.send(200, {}, json.dumps(self.server.answer(body)).encode())

    def head(self, status, headers):
        self.send_response(status)
        for name, value in ({"content-type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, status, headers, content):
        self.head(status, headers | {"content-length": str(len(content))})
        self.wfile.write(content)


@contextmanager
def serving(*script, **settings):
    """A Fake that runs, and ends with the block."""
    fake = Fake(script, **settings)
    thread = threading.Thread(target=fake.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.over.set()
        fake.shutdown()
        fake.server_close()
