"""Everything that needs a GPU to be measured, in one command:  python tests/bench/gpu.py --keep

Correctness first, on small random policies with deterministic kernels: log-probs of the rollout against the
training forward, CUDA graphs against eager steps, the shared prompt's gradient against the repeated one's,
and a resumed run against an undisturbed one.

Then speed and memory, with random weights in the shapes of Qwen2-VL-2B: the machine's rate of products and
copies; a rollout (eager, recorded, and transformers' generate); a training pass; whole steps of the recipe
`visualthinker_sat`, with the seconds of every phase and the peak of memory beside what --plan predicts; the
same steps under FSDP2 on one rank.

A part that fails is reported with its error, and the others still run. --quick runs all of it in small sizes,
on a CPU as well, without what needs a GPU. Prints a table; the last line is one JSON object.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import grpo.parallel.openmp

import numpy as np
import torch
from PIL import Image
from qwen import qwen_folder
from small import STOPS, small_folder, small_policy, small_prompts

from data.types import Prompt
from grpo.batch import Batch, Cut, collate_prompts
from grpo.config import parse
from grpo.logprobs import chunk_of, completion_logprobs
from grpo.parallel.fsdp import whole_weights
from grpo.parallel.ranks import Ranks, precision
from grpo.plan import plan
from grpo.plan.known_models import KNOWN
from grpo.rollout import DecodeOptions, generate
from grpo.sampling import uid_hash
from grpo.storage import checkpoint
from models.config import ModelConfig, VisionConfig
from models.qwen_vl import QwenVL
from tests.bench.load_2b import write
from tests.bench.shared_prompt import both, learn, random_policy
from tests.bench.timing import finish, operations, parser

TINY = ModelConfig(
    "qwen2_vl",
    512,
    64,
    128,
    2,
    2,
    1,
    VisionConfig(2, 32, 2, 64, 64),
    mrope_section=(8, 4, 4),
    tie_word_embeddings=True,
    image_token_id=301,
    video_token_id=302,
    vision_start_token_id=303,
    vision_end_token_id=304,
)
SIZES = {
    "full": dict(prompts=8, group=8, cap=700, side=(32, 64), words=80, micro=16384),
    "quick": dict(prompts=2, group=2, cap=6, side=(2, 4), words=9, micro=200),
}


class Bench:
    """The device, the sizes, and what was found so far."""

    def __init__(self, quick: bool, rounds: int):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.quick, self.rounds, self.size = quick, rounds, SIZES["quick" if quick else "full"]
        self.model = TINY if quick else KNOWN["Qwen/Qwen2-VL-2B"]
        self.ranks = Ranks(0, 1, self.device)
        self.rows: list[list] = []
        self.found: dict = {}

    def seconds(self, work: Callable[[], object], rounds: int | None = None, warm: bool = True) -> float:
        """Median of the rounds, the device's work included."""
        taken = []
        for number in range((rounds or self.rounds) + warm):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            if number >= warm:
                taken.append(time.perf_counter() - start)
        return median(taken)

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def note(self, name: str, value: object, unit: str = "", target: str = "") -> None:
        """A line of the table, and a figure of the record."""
        self.rows.append([name, value, unit, target])
        self.found[name] = value

    def part(self, work: Callable[[], None]) -> None:
        """One part, whose failure is not that of the others."""
        start = time.perf_counter()
        try:
            work()
        except Exception as error:
            self.note(f"FAILED: {work.__name__}", f"{type(error).__name__}: {error}"[:300])
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{work.__name__}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    # ---- is it right?

    def equalities(self) -> None:
        """The rollout against the training forward, recorded against eager, shared against repeated."""
        with tempfile.TemporaryDirectory() as place:
            sources = small_prompts(small_folder(Path(place)))
        policy = small_policy().to(self.device)
        image, merge = policy.config.image_token_id, policy.config.vision.spatial_merge_size
        prompts = collate_prompts(sources, image_token=image).to(self.device)
        how = dict(
            group=8,
            cap=60,
            temperature=1.0,
            stop_ids=STOPS,
            address=(0, 0, [uid_hash(p.uid) for p in sources]),
        )
        for dtype in ("float32", "bfloat16"):
            with precision(self.ranks, dtype):
                rollout = generate(policy, prompts, **how).to("cpu")
                batch = Batch.of_documents([], sources, rollout.tokens, rollout.length).micro_batch(
                    Cut(list(range(len(sources))), slice(None)),
                    image_token=image,
                    merge=merge,
                    device=self.device,
                )
                logp = (
                    completion_logprobs(policy, batch, temperature=1.0, chunk=512)[0]
                    .detach()
                    .cpu()
                    .view(rollout.logp.shape)
                )
            gap = (logp - rollout.logp).abs()
            self.note(
                f"log-prob gap, {dtype}, largest",
                float(gap.max()),
                "nats",
                "≤ 1e-4" if dtype == "float32" else "",
            )
            self.note(f"log-prob gap, {dtype}, mean", float(gap.sum() / rollout.length.sum()), "nats")
            if self.device.type == "cuda":
                with precision(self.ranks, dtype):
                    again = generate(policy, prompts, options=DecodeOptions(recorded=True), **how).to("cpu")
                self.note(
                    f"recorded steps draw the same tokens, {dtype}",
                    bool(torch.equal(again.tokens, rollout.tokens)),
                    "",
                    "True",
                )
        policy = random_policy(128, 2, 256, 512).to(self.device)
        groups = both(policy, 60, 4, 25)
        for group in groups.values():
            group.prompts, group.tokens, group.length = (
                group.prompts.to(self.device),
                group.tokens.to(self.device),
                group.length.to(self.device),
            )
        gradients = []
        for name in ("shared", "repeated"):
            learn(policy, groups[name])
            gradients.append([p.grad.double() for p in policy.parameters() if p.grad is not None])
        self.note(
            "shared prompt's gradient against the repeated one's, float32",
            max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(*gradients)),
            "relative",
            "≤ 1e-4",
        )

    def resumed(self) -> None:
        """Four steps of a small policy, and two and two: with deterministic kernels the same weights."""
        with tempfile.TemporaryDirectory() as place:
            base = small_folder(Path(place) / "base")
            how = [
                "shapes",
                f"model={base}",
                "steps=4",
                "prompts=4",
                "group=4",
                "cap=16",
                "rewards={length: 1000}",
                "eval.items=0",
                "report.every=0",
                "limit=40",
                "save.every=2",
                "save.keep=0",
            ]
            self.child("train", *how, f"out={place}/straight")
            self.child("train", *how, f"out={place}/stopped")
            for name in ("step_000004",):
                for path in (Path(place) / "stopped" / "checkpoints" / name).iterdir():
                    path.unlink()
            self.child("train", *how, f"out={place}/stopped")
            files = [Path(place) / name / "checkpoints" / "step_000004" for name in ("straight", "stopped")]
            same = all(
                (files[0] / path.name).read_bytes() == path.read_bytes()
                for path in files[1].glob("*.safetensors")
            )
        self.note("a resumed run ends as the straight one, bit for bit", same, "", "True")

    # ---- how fast is it, and how large?

    def machine(self) -> None:
        """Products in bfloat16 and copies."""
        side, numbers = (256, 10**6) if self.quick else (8192, 10**9)
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in "ab")
        self.products = 2 * side**3 / self.seconds(lambda: a @ b, 10)
        source = torch.randn(numbers, device=self.device)
        target = torch.empty_like(source)
        self.copies = 2 * source.nbytes / self.seconds(lambda: target.copy_(source), 10)
        self.note("matrix product, bfloat16", self.products / 1e12, "TFLOP/s")
        self.note("copy, read and written", self.copies / 1e9, "GB/s")

    def policy(self) -> QwenVL:
        """Random weights of the real shapes, float32 masters."""
        with self.device:
            policy = QwenVL(self.model)
            for parameter in policy.parameters():
                torch.nn.init.normal_(
                    parameter.data, 0, 0.02
                ) if parameter.dim() > 1 else parameter.data.fill_(1.0)
        return policy

    def prompts(self) -> list[Prompt]:
        """Questions about one picture each, of as many tokens as the recipe allows."""
        random, model, (high, wide) = np.random.default_rng(0), self.model, self.size["side"]
        made = []
        for number in range(self.size["prompts"]):
            picture = [
                model.vision_start_token_id,
                *[model.image_token_id] * (high * wide // 4),
                model.vision_end_token_id,
            ]
            tokens = np.array([*picture, *random.integers(0, 300, self.size["words"])])
            made.append(
                Prompt(
                    uid=f"q{number}",
                    text="",
                    tokens=tokens,
                    grid=np.array([[1, high, wide]]),
                    patches=random.standard_normal((high * wide, model.vision.patch_dim)).astype(np.float32),
                )
            )
        return made

    def speed(self) -> None:
        """A rollout in which no row stops, and one training pass over what it wrote."""
        policy, sources = self.policy(), self.prompts()
        P, G, C = self.size["prompts"], self.size["group"], self.size["cap"]
        prompts = collate_prompts(
            sources, image_token=self.model.image_token_id, merge=self.model.vision.spatial_merge_size
        ).to(self.device)
        how = dict(
            group=G, cap=C, temperature=1.0, stop_ids=[-1], address=(0, 0, [uid_hash(p.uid) for p in sources])
        )
        with precision(self.ranks, "bfloat16"):
            with whole_weights(policy) as sampler:
                for name, recorded in (("eager", False), ("recorded", True))[
                    : 1 + (self.device.type == "cuda")
                ]:
                    made: list = []
                    taken = self.seconds(
                        lambda: made.append(
                            generate(sampler, prompts, options=DecodeOptions(recorded=recorded), **how)
                        ),
                        2,
                    )
                    self.note(f"rollout, {name}", P * G * C / taken, "tokens/s")
                    self.note(
                        f"rollout, {name}, share of the bound by bandwidth",
                        self.bytes_read(policy, prompts) / self.copies / taken,
                        "",
                        "≥ 0.5",
                    )
            rollout = made[-1].to("cpu")
            batch = Batch.of_documents([], sources, rollout.tokens, rollout.length)
            batch.weight = torch.linspace(-1, 1, batch.mask.numel()).view(batch.mask.shape)
            policy.recompute = policy.visual.recompute = True

            def train() -> None:
                policy.zero_grad(set_to_none=True)
                for cut in batch.cuts(self.size["micro"], batch.teaching):
                    part = batch.micro_batch(
                        cut,
                        image_token=self.model.image_token_id,
                        merge=self.model.vision.spatial_merge_size,
                        device=self.device,
                    )
                    logp, _ = completion_logprobs(
                        policy,
                        part,
                        temperature=1.0,
                        chunk=chunk_of(self.model.vocab_size, None, self.device.type),
                    )
                    (logp * part.weight).sum().backward()

            for name, again in (("activations kept", False), ("recomputed", True)):
                policy.recompute = policy.visual.recompute = again
                try:
                    flops = sum(operations(train))
                except torch.OutOfMemoryError:
                    self.note(f"training pass, {name}", "out of memory")
                    continue
                taken = self.seconds(train, 2)
                self.note(f"training pass, {name}", taken, "seconds")
                self.note(
                    f"training pass, {name}, share of the product rate",
                    flops / taken / self.products,
                    "",
                    "≥ 0.4",
                )

    def bytes_read(self, policy: QwenVL, prompts) -> int:
        """What decoding must read: the decoder's weights once a step, the prompts' keys and values once a
        step, each row's own so far; all in bfloat16."""
        P, G, C, S = self.size["prompts"], self.size["group"], self.size["cap"], prompts.tokens.shape[1] - 1
        token = 2 * 2 * self.model.num_hidden_layers * self.model.num_key_value_heads * self.model.head_size
        decoder = 2 * sum(
            p.numel() for name, p in policy.named_parameters() if not name.startswith("visual.")
        )
        return C * (decoder + P * S * token) + P * G * token * C * (C + 1) // 2

    def peer(self) -> None:
        """transformers' generate on the same shapes, prompts and lengths."""
        import transformers

        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "config.json").write_text(json.dumps(self.model.to_dict()))
            values = transformers.AutoConfig.from_pretrained(place)
        with self.device:
            model = transformers.Qwen2VLForConditionalGeneration._from_config(
                values, attn_implementation="sdpa", dtype=torch.bfloat16
            ).eval()
        prompts = collate_prompts(
            self.prompts(), image_token=self.model.image_token_id, merge=self.model.vision.spatial_merge_size
        ).to(self.device)
        P, G, C = self.size["prompts"], self.size["group"], self.size["cap"]
        model.generation_config.eos_token_id = None
        inputs = dict(
            input_ids=prompts.tokens,
            attention_mask=torch.ones_like(prompts.tokens),
            mm_token_type_ids=(prompts.tokens == self.model.image_token_id).int(),
            pixel_values=prompts.patches.bfloat16(),
            image_grid_thw=prompts.grid,
        )
        taken = self.seconds(
            lambda: model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=G,
                max_new_tokens=C,
                pad_token_id=0,
            ),
            1,
            warm=False,
        )
        self.note("rollout, transformers' generate", P * G * C / taken, "tokens/s")
        best = max(self.found.get(f"rollout, {name}", 0) for name in ("eager", "recorded"))
        self.note("rollout, times transformers'", best / (P * G * C / taken), "×", "≥ 10")

    def steps(self) -> None:
        """Whole steps of visualthinker_sat through train.py, plain and under FSDP2 on one rank."""
        with tempfile.TemporaryDirectory() as place:
            model, data = self.folder(Path(place) / "model"), self.questions(Path(place) / "data")
            how = [
                "visualthinker_sat",
                f"model={model}",
                "task=jsonl",
                f"data={data}",
                "steps=4",
                "eval.items=0",
                "save.every=0",
                "report.every=0",
                "revision=null",
                *(["prompts=2", "group=2", "cap=6", "max_pixels=6272"] if self.quick else []),
            ]
            for name, more in (("plain", ()), ("FSDP2 on one rank", ("shard=always",))):
                said = self.child("step", *how, *more, f"out={place}/{name.split()[0]}")
                for phase, taken in said["phases"].items():
                    self.note(
                        f"step, {name}, {phase}", taken, "seconds", "≤ 5" if phase == "step_time" else ""
                    )
                self.note(f"step, {name}, peak", said["peak"] / 1e9, "GB", "≤ 80")
            planned = plan.make_plan(
                parse.load("visualthinker_sat", how[1:]), ModelConfig.from_folder(model)
            ).peak
            # What PyTorch allocates, which is what the steps above measure, is without them.
            self.note("step, peak by --plan", (planned - plan.CUDA_CONTEXT) / 1e9, "GB")
            self.note(
                "step, FSDP2 over plain",
                self.found["step, FSDP2 on one rank, step_time"] / self.found["step, plain, step_time"],
                "×",
                "≤ 1.05",
            )

    def folder(self, folder: Path) -> Path:
        """A model folder with the real shapes, and a tokenizer of bytes."""
        qwen_folder(folder)
        small = ModelConfig.from_folder(folder)
        (folder / "model.safetensors").unlink()
        ids = {
            name: getattr(small, name)
            for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        }
        write(replace(self.model, **ids), folder, 4e9)
        return folder

    def questions(self, folder: Path, count: int = 40) -> Path:
        """Questions about noise, of as many pixels as the recipe allows."""
        folder.mkdir()
        random, lines = np.random.default_rng(0), []
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (448, 896, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            lines.append(
                json.dumps(
                    {
                        "uid": f"q{i}",
                        "question": f"Is box {i} to the left or right of the desk?",
                        "choices": ["left", "right"],
                        "answer": "left",
                        "pictures": [f"{i}.png"],
                    }
                )
            )
        (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    def child(self, what: str, *arguments: str) -> dict:
        """train.py in a process of its own, which begins with an empty device. -> its last line."""
        command = (
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", __file__]
            if "shard=always" in arguments
            else [sys.executable, __file__]
        )
        environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        done = subprocess.run(
            [*command, "--child", what, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
        )
        if done.returncode:
            raise RuntimeError(f"{what}: {done.stderr[-600:]}")
        return json.loads(done.stdout.splitlines()[-1])


def child(what: str, arguments: list[str]) -> None:
    """In a process of its own: train, and say how long each phase of a step took and how much memory there
    was at most."""
    import train

    if what == "train":
        torch.use_deterministic_algorithms(True)
    else:
        # 26 GB that this measurement does not need
        checkpoint.write = lambda *args, **how: None
    cuda = torch.cuda.is_available()
    try:
        status = train.main(arguments)
    except (OSError, IndexError):
        # the checkpoint that was not written is not there to be named
        status = 0
    if status:
        sys.exit(status)
    rows = [
        json.loads(line)
        for line in (Path(arguments[-1].removeprefix("out=")) / "metrics.jsonl").read_text().splitlines()
    ]
    phases = {
        key: median(row[key] for row in rows[1:] if key in row)
        for key in rows[-1]
        if key == "step_time" or key.startswith("time/")
    }
    print(json.dumps({"phases": phases, "peak": torch.cuda.max_memory_allocated() if cuda else 0}))


def main(argv: list[str] | None = None) -> dict:
    """Measure and print."""
    args = parser(__doc__, rounds=3).parse_args(argv)
    bench = Bench(args.quick, 1 if args.quick else args.rounds)
    if bench.device.type == "cpu" and not args.quick:
        raise SystemExit("there is no GPU here; --quick runs all of it in small sizes on a CPU")
    for work in (bench.machine, bench.equalities, bench.speed, bench.peer, bench.steps, bench.resumed):
        bench.part(work)
    return finish("gpu", ["", "found", "unit", "target"], bench.rows, {"figures": bench.found}, args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
