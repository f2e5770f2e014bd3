"""How fast is the bridge, and what memory does it take?    python tests/bench/bridge.py [--items 1000 5000]

One text stage of this many questions against a server in a process of its own, which answers each request
after 200 ms, 16 at a time. So at most 80 requests a second are possible. The bridge stores every reply on
disk before it takes the next one. Prints a line for each number of questions: requests a second, the share
of the bound, processor seconds and peak memory of the bridge's process; ends with a line of JSON.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SECONDS, AT_ONCE = 0.2, 16
CHAIN = " ".join(f"So I count up to {number}, and look once more at what is there." for number in range(40))


def serve(pipe) -> None:
    """A server that answers any request after SECONDS. Sends its port through the pipe."""
    reply = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "It is 7.", "reasoning_content": CHAIN},
            }
        ],
        "usage": {"prompt_tokens": 50, "completion_tokens": 200, "total_tokens": 250},
    }
    body = json.dumps(reply).encode()
    head = (
        f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    )

    async def talk(reader, writer):
        try:
            while True:
                asked = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.partition(b":")[2])
                    for line in asked.lower().split(b"\r\n")
                    if line.startswith(b"content-length")
                )
                await reader.readexactly(length)
                await asyncio.sleep(SECONDS)
                writer.write(head + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def listen():
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(listen())


def bridge(count: int, url: str, place: Path, pipe) -> None:
    """A bridge of this many questions. Sends seconds, processor seconds and peak memory."""
    from grpo.bridge import __main__ as program

    data = place / "items.jsonl"
    with open(data, "w") as file:
        for number in range(count):
            row = {"uid": f"q{number}", "question": f"How much is {number} and 4?", "answer": "7"}
            file.write(json.dumps(row) + "\n")
    writer = [f"reasoner.{text}" for text in (f"url={url}", "model=m", "key_env=null", f"at_once={AT_ONCE}")]
    stages = ["pseudo.prompt=null", "describe.prompt=null", "reason.prompt=question"]
    began, used = time.monotonic(), time.process_time()
    status = program.main(["vision_r1", f"data={data}", f"out={place / 'out'}", *writer, *stages])
    seconds, processor = time.monotonic() - began, time.process_time() - used
    lines = (place / "out" / "3-reason.jsonl").read_bytes().count(b"\n")
    assert status == 0 and lines == count, (status, lines)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pipe.send((seconds, processor, peak))


def measured(context, count: int, url: str) -> tuple[float, float, float]:
    """`bridge` in a process of its own."""
    ours, theirs = context.Pipe()
    place = Path(tempfile.mkdtemp(prefix="glimpse-bench-"))
    process = context.Process(target=bridge, args=(count, url, place, theirs))
    process.start()
    found = ours.recv()
    process.join()
    shutil.rmtree(place)
    return found


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[1000, 5000])
    asked = parser.parse_args(arguments)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}/v1"
    bound = AT_ONCE / SECONDS
    told = {"processors": os.cpu_count(), "bound": bound}
    for count in asked.items:
        seconds, processor, peak = measured(context, count, url)
        rate = count / seconds
        told[str(count)] = {"rate": round(rate, 1), "share": round(rate / bound, 3), "mib": round(peak)}
        said = f"{rate:.1f} requests a second, {rate / bound:.0%} of {bound:.0f}"
        print(f"{count} questions: {said}; {processor:.1f} s of processor, {peak:.0f} MiB", flush=True)
    server.terminate()
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
