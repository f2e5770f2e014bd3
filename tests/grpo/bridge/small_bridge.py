"""A bridge small enough to be killed after each of its replies, and a server that fails in every way."""

import hashlib
import json
import os
import signal
from pathlib import Path

from fake_server import message
from PIL import Image

from grpo.bridge import __main__ as program
from grpo.bridge.store import FILES, Store
from grpo.serving import client

# short, because silence ends with the timeout; more tries than passing faults, because a reply may also come
# too late on a busy machine
IMPATIENT = [f"{name}.{text}" for name in ("vision", "reasoner") for text in ("timeout=0.5", "retries=6")]
CHAIN = (
    "First I look at the numbers one after the other. Seven is odd, so two does not divide it. Wait, let me "
    "check three as well. Three times two is six, and one is left, so three does not divide it either."
)
# what may happen to a request; most of them go well
FAULTS = [None] * 10 + ["429", "500", "half", "text", "silent", "closed", "refused", "length", "copies"]


def items(folder: Path, count: int = 12) -> Path:
    """Questions with a picture each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        picture = folder / f"{number}.png"
        Image.new("RGB", (30, 30), (number, 0, 0)).save(picture)
        question = f"What is {number} plus one?"
        row = {"uid": f"q{number}", "question": question, "answer": str(number + 1), "picture": picture.name}
        lines.append(json.dumps(row) + "\n")
    file = folder / "items.jsonl"
    file.write_text("".join(lines))
    return file


def command(url: str, data: Path, out: Path, *more: str) -> list[str]:
    """The arguments of a bridge that asks one server for everything."""
    writer = [
        f"{name}.{text}"
        for name in ("vision", "reasoner")
        for text in (f"url={url}", "model=m", "key_env=null", "retries=2", "timeout=20", "at_once=4")
    ]
    return ["vision_r1", f"data={data}", "heldout=0", f"out={out}", *writer, *more]


def chance(seed: int, body: dict) -> int:
    """A number that belongs to a request."""
    told = json.dumps([seed, body], sort_keys=True).encode()
    return int.from_bytes(hashlib.sha256(told).digest()[:4], "big")


def answer(body: dict) -> dict:
    """The reply: a chain for the reasoner, else a text, which depends on the request."""
    number = chance(0, body) % 1000
    content = body["messages"][-1]["content"]
    if isinstance(content, list):
        return message(f"A picture, described as number {number}.")
    asked = content.rpartition("What is ")[2].split()[0]
    right = int(asked) + 1
    return message(f"The answer is {right}.", reasoning_content=f"{CHAIN} So it is {right}. ({number})")


def faults(seed: int):
    """What goes wrong with a request, in every arrival the same."""

    def fault(body: dict, arrival: int):
        kind = FAULTS[chance(seed, body) % len(FAULTS)]
        # after this many arrivals all is well, within the client's tries
        passing = {
            "429": (1, (429, {"retry-after": "0.01"})),
            "500": (2, 500),
            "half": (1, "half"),
            "text": (2, "text"),
            "silent": (1, "silent"),
            "closed": (1, "closed"),
        }
        if kind in passing:
            count, what = passing[kind]
            return what if arrival < count else None
        if kind == "refused":
            # for ever: only another attempt, with another seed, goes well
            return 500
        if kind == "length":
            return answer(body) | {"choices": message("An unfinished", "length")["choices"]}
        if kind == "copies":
            told = answer(body)
            return told | {"choices": told["choices"] * 2}
        return None

    return fault


def run(arguments: list[str], kill_after: int | None = None) -> int:
    """The command in a forked process, killed by SIGKILL after this many replies. -> its exit status."""
    process = os.fork()
    if not process:
        status = 99
        try:
            # no second process may print what the first has in its buffers
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            client.FIRST_WAIT = 0.01
            client.POLL = 0.02
            if kill_after is not None:
                kill_at(kill_after)
            status = program.main(arguments)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_at(count: int) -> None:
    """Kill this process when `count` replies are stored."""
    add = Store.add
    stored = []

    def counted(store, reply):
        add(store, reply)
        stored.append(reply)
        if len(stored) >= count:
            os.kill(os.getpid(), signal.SIGKILL)

    Store.add = counted


def replies(out: Path) -> dict[tuple, dict]:
    """{(stage, uid, attempt): the stored line without its time}; no reply may be there twice."""
    found = {}
    for name in FILES.values():
        for line in (out / name).read_text().splitlines() if (out / name).exists() else ():
            told = json.loads(line)
            told.pop("seconds")
            key = (told["stage"], told["uid"], told["attempt"])
            assert key not in found, f"stored twice: {key}"
            found[key] = told
    return found
