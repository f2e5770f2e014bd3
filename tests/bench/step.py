"""A whole GRPO step against TRL's GRPOTrainer, on the CPU:  python tests/bench/step.py [--prompts 16]
[--group 12] [--cap 40] [--exact on|off]

TRL needs an environment of its own, in which this script runs both:

    python -m venv trl
    trl/bin/pip install -c constraints.txt torch torchvision -e . trl
    trl/bin/python tests/bench/step.py

The built-in model in both, float32: the same questions and pictures, group, cap, temperature, rewards, KL
penalty against the frozen base, AdamW, one update a step, all completions in one micro-batch, no
recomputation. The prompts' tokens must be equal. Steps of TRL and of ours take turns, so the load of the
machine is the same for both. The learning rate is so small that both stay the base; the table shows that
their completions are equally long and good on average.

TRL's time is a step of its trainer. Ours is all of `train.train_grpo`: drawing the pictures, rollout,
rewards, reference, learning, metrics. Without TRL only ours is measured. Prints a table; the last line is one
JSON object.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpo.parallel.openmp

import torch
import transformers

import train
from data.order import indices_at
from grpo.config import parse
from grpo.parallel.ranks import Ranks, precision
from grpo.rewards.rules import score
from grpo.run.lifecycle import Lifecycle
from grpo.run.setup import open_run
from grpo.storage.model_folder import BUILT_IN
from tests.bench.timing import CLOCKS, finish, parser, ratio, sized, sizes

LR = 1e-7
CHAT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}{% "
    "for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}User: {{ "
    "part['text'] }}\nAssistant: <think>{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


class Ours:
    """A run of the recipe `shapes`, one step a call."""

    def __init__(self, folder: Path, P: int, G: int, C: int, clock: str, exact: bool):
        self.cfg = parse.load(
            "shapes",
            [
                f"out={folder}",
                f"prompts={P}",
                f"group={G}",
                f"cap={C}",
                f"optim.lr={LR}",
                "optim.warmup=0",
                "optim.decay=constant",
                "eval.items=0",
                "save.every=0",
                "report.every=0",
                "device=cpu",
                f"exact={exact}",
                "steps=1000",
            ],
        )
        self.ranks = Ranks(0, 1, torch.device("cpu"))
        self.run = open_run(self.cfg, self.ranks)
        self.log = Lifecycle(self.cfg, self.run, self.ranks, 0.0)
        self.log.before()
        self.now, self.seconds = CLOCKS[clock], []

    def step(self) -> None:
        """The next step."""
        start = self.now()
        with precision(self.ranks, self.cfg.dtype, self.cfg.exact):
            train.train_grpo(replace(self.cfg, steps=self.run.step + 1), self.run, self.ranks, self.log)
        self.seconds.append(self.now() - start)
        self.run.step += 1

    def rows(self) -> list[dict]:
        """The metrics of the timed steps."""
        return [json.loads(line) for line in (self.run.folder / "metrics.jsonl").read_text().splitlines()][
            -len(self.seconds) + 1 :
        ]


def peer(ours: Ours, folder: Path, rounds: int):
    """TRL's trainer over the questions that ours asks; each of its steps is followed by one of ours. ->
    (trainer, its seconds)."""
    import datasets
    import trl

    cfg, run, now, seconds = ours.cfg, ours.run, ours.now, []
    asked = [
        run.examples[i]
        for step in range(rounds + 1)
        for i in indices_at(step, len(run.examples), cfg.prompts, cfg.seed, 0)
    ]
    processor = transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor.from_pretrained(BUILT_IN),
        tokenizer=transformers.PreTrainedTokenizerFast.from_pretrained(BUILT_IN, padding_side="left"),
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=CHAT,
    )
    lines = [
        {"prompt": [{"role": "user", "content": e.asked}], "image": e.pictures[0](), "number": n}
        for n, e in enumerate(asked)
    ]
    for example, line in zip(asked[:3], lines):
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.asked}]}],
            tokenize=False,
        )
        theirs = processor(text=[text], images=[line["image"]], return_tensors="np")["input_ids"][0]
        assert (theirs == run.chat.prompt(example).tokens).all(), "the two are asked different prompts"

    def reward(completions, number, **_):
        texts = [[run.chat.template.opening + messages[0]["content"]] for messages in completions]
        return score(texts, [asked[n] for n in number], cfg.rewards, torch.ones(len(texts), 1), cfg.cap)[0][
            :, 0
        ].tolist()

    class Turns(transformers.TrainerCallback):
        """Take the time of a step, then let ours have its turn."""

        def on_step_begin(self, *_, **__):
            self.start = now()

        def on_step_end(self, *_, **__):
            seconds.append(now() - self.start)
            ours.step()

    rows = cfg.prompts * cfg.group
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        BUILT_IN, attn_implementation="sdpa", dtype=torch.float32
    )
    # all ids that end a turn, as ours
    model.generation_config.eos_token_id = list(run.chat.stop_ids)
    settings = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_generations=cfg.group,
        max_completion_length=cfg.cap,
        temperature=cfg.temperature,
        top_p=1.0,
        top_k=0,
        beta=cfg.loss.kl_coef,
        loss_type="grpo",
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_steps=rounds + 1,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        shuffle_dataset=False,
        disable_tqdm=True,
        generation_kwargs={"suppress_tokens": list(run.policy.config.placeholder_ids)},
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=settings,
        train_dataset=datasets.Dataset.from_list(lines),
        processing_class=processor,
        callbacks=[Turns()],
    )
    trainer.train()
    return trainer, seconds


def seen(lines: list[dict]) -> tuple[float, float]:
    """Mean length of the completions and mean reward, which both programs log under the same names."""
    return tuple(
        round(fmean(line[key] for line in lines), 3) for key in ("completions/mean_length", "reward")
    )


def main(argv: list[str] | None = None) -> dict:
    """Measure and print."""
    options = sized(parser(__doc__, 10))
    how = "the setting exact: sums in float64, or in float32"
    options.add_argument("--exact", choices=("on", "off"), default="on", help=how)
    args = options.parse_args(argv)
    P, G, C, rounds = sizes(args)
    try:
        import trl
    except ImportError:
        trl = None
    with tempfile.TemporaryDirectory(prefix="glimpse-step-") as folder:
        ours = Ours(Path(folder) / "ours", P, G, C, args.clock, args.exact == "on")
        if trl is None:
            print("TRL is not installed here: only Glimpse is measured")
            for _ in range(rounds + 1):
                ours.step()
        else:
            trainer, theirs = peer(ours, Path(folder) / "trl", rounds)
        ours.log.recorder.close_bar()
        lines, mine = ours.rows(), ours.seconds[1:]
    phases = {
        name: median(line[f"time/{name}"] / line["step_time"] for line in lines)
        for name in ("prompts", "rollout", "score", "reference", "learn")
    }
    arithmetic = [line["time/rollout"] + line["time/reference"] + line["time/learn"] for line in lines]
    # In the clock of the metrics; what `train_grpo` does behind the last phase (metrics, the progress bar) is
    # not arithmetic either.
    share = (
        round(1 - median(a / max(s, line["step_time"]) for a, s, line in zip(arithmetic, mine, lines)), 4)
        if args.clock == "wall"
        else round(1 - median(a / line["step_time"] for a, line in zip(arithmetic, lines)), 4)
    )
    rows = [["Glimpse", median(mine), *seen(lines), 1.0]]
    found = {
        "prompts": P,
        "group": G,
        "cap": C,
        "rounds": rounds,
        "exact": args.exact,
        "seconds": {"glimpse": round(median(mine), 4)},
        "not_arithmetic": share,
        "phases": {name: round(value, 4) for name, value in phases.items()},
        "speedup": None,
        "trl": trl and trl.__version__,
    }
    if trl is not None:
        logs = [line for line in trainer.state.log_history if "completions/mean_length" in line][1:]
        found |= {"speedup": ratio(theirs[1:], mine), "transformers": transformers.__version__}
        found["seconds"]["trl"] = round(median(theirs[1:]), 4)
        rows.append([f"TRL {trl.__version__}", median(theirs[1:]), *seen(logs), found["speedup"]])
        found["mean_length"], found["reward"] = ({"glimpse": rows[0][i], "trl": rows[1][i]} for i in (2, 3))
    rows += [[f"of ours, {name}", value * median(mine), "", "", ""] for name, value in phases.items()]
    return finish(
        "step", ["", "seconds a step", "mean length", "reward", "times Glimpse's time"], rows, found, args
    )


if __name__ == "__main__":
    main()
