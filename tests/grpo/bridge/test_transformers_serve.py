"""A bridge that asks a real server: `transformers serve` with a small random text model. It needs fastapi,
uvicorn, pydantic, starlette and rich (the extra `serving` of transformers), and about a minute."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("openai")

from small_bridge import replies

from grpo.bridge import __main__ as program

NEEDED = ("fastapi", "uvicorn", "pydantic", "starlette", "rich")
TEMPLATE = "{% for message in messages %}User: {{ message.content }}\n{% endfor %}Assistant:"


def random_model(folder):
    """Qwen2 with two layers, and the tokenizer of the built-in model."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from data.shapes import tokenizer

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer.build(), eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = Qwen2Config(vocab_size=len(fast), num_key_value_heads=1, eos_token_id=fast.eos_token_id, **sizes)
    model = Qwen2ForCausalLM(config)
    # the server draws only if the model's own settings say so
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """-> (address, name of the model)."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers serve needs {', '.join(missing)}")
    folder = random_model(tmp_path_factory.mktemp("model"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(folder / "log", "w")
    argv = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    process = subprocess.Popen(
        [*argv, "--port", str(port), "--device", "cpu"],
        stdout=log,
        stderr=log,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(20)


def wait_for(address, process, log):
    """Until the server answers."""
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(address, timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-2000:])


@pytest.mark.slow
def test_a_bridge_asks_transformers_serve(served, tmp_path):
    url, model = served
    data = tmp_path / "items.jsonl"
    rows = [{"uid": f"q{n}", "question": f"red circle or {n}?", "answer": str(n)} for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    writer = [f"reasoner.{text}" for text in (f"url={url}", f"model={model}", "key_env=null", "at_once=4")]
    stages = ["pseudo.prompt=null", "describe.prompt=null", "reason.prompt=question", "reason.max_tokens=12"]
    argv = ["vision_r1", f"data={data}", f"out={tmp_path / 'out'}", *writer, *stages, "attempts=2"]
    status = program.main(argv)
    found = replies(tmp_path / "out")
    # a random model closes no thinking, so every question has two attempts, and is parked
    assert status == 3 and {key[1:] for key in found} == {(f"q{n}", a) for n in range(6) for a in range(2)}
    for told in found.values():
        assert told["error"] == "" and told["tokens_in"] > 3 and 1 <= told["tokens_out"] <= 12
        assert told["finish"] in ("stop", "length")
    texts = {told["text"] for told in found.values()}
    assert len(texts) > 6, "another seed gives another reply"
