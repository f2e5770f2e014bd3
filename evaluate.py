"""How good is a model, how sure is that, and what does it hang on?    python evaluate.py --help

Every question is asked once, greedily; --samples asks it again and again. --blind, --ban and --compare ask the same questions with one
thing changed, and the two are compared question by question: that tells differences apart which two intervals side by side cannot.
"""
import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data.chat import TEMPLATES, Chat
from data.sources import SOURCES
from grpo import config
from grpo.checkpoint import CheckpointError
from grpo.evaluation import WAVE, Answers, answer_all, scores
from grpo.run import model_folder
from grpo.statistics import paired_difference
from grpo.tables import difference_table, k_table, score_table
from models import weights

DRAWN_ITEMS = 384       # of the built-in questions, which have no end: six times the 64 over which tasks, answers and letters are balanced
PAPER_CAP = 1024        # VisualThinker-R1-Zero's max_new_tokens in evaluation
TEACHING = """\
what the tables say
  accuracy      share of right answers, with its 95 % Wilson interval; each is read from the one <answer> by the parser that pays the reward
  chance        what guessing earns: 1 / choices
  format        share of completions that are <think>…</think> <answer>…</answer> and nothing else
  unread        share from which no answer could be read: they count as wrong, and may hide a model that sees well and was asked badly
  cut, length   share cut off at the cap; mean tokens
  looks, again  (built-in world) share that look at the picture in words, and that look again ("but wait")
  pass@k        chance that at least one of k sampled answers is right (unbiased); maj@k: that the most frequent one is (ties are shared)
  difference    the first column minus the second, in points, paired; its 95 % interval is Agresti and Min's
  p             McNemar: how often chance would split the questions that only one of the two got right as unevenly as this, or more so

examples
  python evaluate.py                                      the built-in base model on held-out built-in questions
  python evaluate.py --model runs/shapes --compare tiny   what training has changed (of a run, the newest checkpoint is taken)
  python evaluate.py --model runs/shapes --blind          does it look? Without the picture it should fall to chance
  python evaluate.py --model runs/shapes --ban but        does its second look matter? Forbid the word it begins with
  python evaluate.py --model runs/shapes --split pairs    colour-shape pairs that no training question has shown
  python evaluate.py --model runs/shapes --samples 64 --json out.json
                                                          pass@k and maj@k up to 64; every answer in a file
  python evaluate.py --model Qwen2-VL-2B --task blink --data val.parquet --split all --template visualthinker --max-prompt 2048
"""


class Parser(argparse.ArgumentParser):
    """argparse prints its whole usage before an error; one line is enough."""

    def error(self, message: str):
        raise ValueError(f"{message} (python evaluate.py --help)")


def parser() -> Parser:
    """The command line, and the text of --help."""
    made = Parser("evaluate.py", description=__doc__, epilog=TEACHING,
                  formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=138))
    add = made.add_argument
    add("--model", default="tiny", metavar="DIR", help="a folder in Hugging Face layout, a run folder, or tiny, the built-in (default)")
    add("--compare", metavar="DIR", help="another model, asked the same questions")
    add("--task", default="shapes", choices=SOURCES, help="where the questions come from (default shapes)")
    add("--data", type=Path, metavar="FILE", help="the file that the task reads, if it needs one")
    add("--split", default="heldout", help="heldout (default); shapes also has pairs, blink also has all")
    add("--items", type=int, metavar="N", help=f"how many questions (default: {DRAWN_ITEMS} of shapes, all of a file)")
    add("--samples", type=int, default=0, metavar="K", help="also sample K completions a question, for pass@k and maj@k")
    add("--temperature", type=float, metavar="T", help="of those samples (default 1)")
    add("--blind", action="store_true", help="ask again with every picture withheld: a grey one of the same size is shown")
    add("--ban", action="append", default=[], metavar="WORD", help="ask again while WORD's first token can't be written; may be repeated")
    add("--json", type=Path, metavar="FILE", help="write every answer and all scores here")
    add("--seed", type=int, default=0, help="of the built-in questions and of sampling (default 0, which training's own evaluation uses)")
    add = made.add_argument_group("how the model is asked (default: as its run was, if it comes from one)").add_argument
    add("--template", choices=TEMPLATES, help="default: shapes for the built-in model or task, else visualthinker")
    add("--cap", type=int, metavar="N", help=f"longest completion in tokens; default: the recipe shapes' for the same, else {PAPER_CAP}")
    add("--max-prompt", type=int, metavar="N", help="longest prompt in tokens; a longer one is skipped and named (default 1024)")
    add("--max-pixels", type=int, metavar="N", help="larger pictures are scaled down (default: as the model's processor says)")
    add = made.add_argument_group("machine").add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto (default): a GPU if there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto (default): bfloat16 on a GPU, else float32")
    add("--wave", type=int, default=WAVE, metavar="N", help=f"tokens decoded at a time (default {WAVE}); fewer take less memory")
    return made


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """What was asked for, checked as far as it can be without loading anything. Raises ValueError."""
    args = (made := parser()).parse_args(argv)
    for name, least in (("items", 1), ("samples", 0), ("cap", 1), ("max_prompt", 2), ("max_pixels", 1), ("wave", 1), ("seed", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            made.error(f"argument --{name.replace('_', '-')}: must be at least {least}, got {value}")
    if args.temperature is not None and not (args.samples and 0 < args.temperature < float("inf")):
        made.error("argument --temperature: must be above 0, and goes with --samples; what is not sampled is greedy")
    if args.device == "cuda" and not torch.cuda.is_available():
        made.error("argument --device: PyTorch sees no GPU here")
    if args.json and not args.json.absolute().parent.is_dir():
        made.error(f"argument --json: there is no folder {args.json.absolute().parent}")
    args.device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    args.temperature = args.temperature or 1.0
    return args


# ---- who is asked, and how

@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, and everything about how it is asked that changes its scores."""

    name: str                # as on the command line
    folder: Path
    template: str
    cap: int
    max_prompt: int
    min_pixels: int | None
    max_pixels: int | None
    dtype: str

    def open(self, device: str) -> tuple[torch.nn.Module, Chat]:
        """Load it. → (policy, chat). Raises ValueError naming the file."""
        chat = Chat(self.folder, template=self.template, max_prompt=self.max_prompt, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        return weights.load(self.folder, dtype=getattr(torch, self.dtype), device=device).requires_grad_(False), chat


def subject(name: str, args: argparse.Namespace) -> Subject:
    """Asked as the command line says; else as the run did whose checkpoint it is; else as suits the built-in world, or the paper."""
    folder = model_folder(name)
    run = Path(name) if (Path(name) / "checkpoints").is_dir() else folder.resolve().parent.parent   # or one of its checkpoints
    if (run / "checkpoints").is_dir() and (run / "config.yaml").is_file():
        cfg = config.load(run / "config.yaml")
    elif name == "tiny" or args.data is None:
        cfg = config.load("shapes", ["max_prompt=1024"])
    else:
        cfg = config.Config(template="visualthinker", cap=PAPER_CAP)
    dtype = args.dtype if args.dtype != "auto" else cfg.dtype
    if dtype == "auto":
        dtype = "bfloat16" if args.device == "cuda" else "float32"
    return Subject(name, folder, args.template or cfg.template, args.cap or cfg.eval.cap or cfg.cap, args.max_prompt or cfg.max_prompt,
                   cfg.min_pixels, args.max_pixels or cfg.max_pixels, dtype)


def banned_ids(chat: Chat, words: list[str]) -> list[int]:
    """The ids that may not be drawn: each word's first token, alone and after a space. Raises ValueError for an unknown word."""
    found = set()
    for word in words:
        for spelling in (word, f" {word}"):
            ids = chat.encode(spelling)
            if not word.strip() or "".join(chat.tokenizer.decode(ids).split()) != "".join(word.split()):
                raise ValueError(f"argument --ban: the tokenizer of {chat.folder} does not know {word!r}")
            if chat.tokenizer.decode(ids[:1]).strip():      # a space that is a token of its own begins other words too
                found.add(ids[0])
    return sorted(found)


# ---- asking

def evaluate(args: argparse.Namespace) -> dict:
    """Ask, and print the tables as they come. → what --json writes. Raises ValueError.

    scores, answers and skipped are the greedy ones of --model; what else was asked (sampled, blind, banned, compare, compare_sampled) is under "more" by its
    name, each with scores, answers, skipped and, against the first, differences.
    """
    subjects = [subject(name, args) for name in (args.model, args.compare) if name]        # a wrong name is found before minutes are spent
    items = args.items or (None if args.data else DRAWN_ITEMS)
    examples = SOURCES[args.task](args.data, args.split, items, args.seed)
    print(f"{len(examples)} questions of {args.task}, split {args.split}, seed {args.seed}")
    result = {"config": vars(args) | {"subjects": [dataclasses.asdict(who) for who in subjects]},
              "more": {}}
    first = None
    for who in subjects:
        policy, chat = who.open(args.device)
        print(f"\n{who.folder}: template {who.template}, at most {who.cap} tokens, {who.dtype} on {args.device}")
        for key, title, options in passes(args, chat, again=first is not None):
            with tqdm(total=len(examples), desc=title, unit="question", disable=None, leave=False) as bar:
                answers = answer_all(policy, chat, examples, cap=who.cap, seed=args.seed, wave=args.wave, progress=bar.update, **options)
            found = scores(answers)
            kept = result if first is None else result["more"].setdefault(key, {})
            kept |= {"scores": found, "skipped": answers.skipped, "answers": [answer.to_dict() for group in answers for answer in group]}
            print(f"\n{who.name}, {title}\n{score_table(found)}" + (f"\n\n{k_table(found)}" if "pass@k" in found else ""))
            if answers.skipped:
                print(f"skipped {len(answers.skipped)}: " + "; ".join([*answers.skipped[:2], *["…"] * (len(answers.skipped) > 2)]))
            if first is None:
                first = answers
            elif "sampled" not in key:
                kept["differences"] = differences(first, answers)
                left, right = labels(key, subjects)
                print(f"\n{left} minus {right}, question by question\n{difference_table(kept['differences'], left, right)}")
        del policy                                                                          # two large models need not fit at once
    return result


def passes(args: argparse.Namespace, chat: Chat, again: bool) -> list[tuple[str, str, dict]]:
    """How often a model is asked, and what differs: (key in the JSON, title, arguments of `answer_all`). again: it is --compare's."""
    found = [("compare" if again else "greedy", "greedy", {})]
    if args.samples:
        title = f"{args.samples} samples a question at temperature {args.temperature:g}"
        found.append(("compare_sampled" if again else "sampled", title, {"samples": args.samples, "temperature": args.temperature}))
    if args.blind and not again:
        found.append(("blind", "greedy, pictures withheld", {"blind": True}))
    if args.ban and not again:
        found.append(("banned", f"greedy, without {' and '.join(map(repr, args.ban))}", {"banned": banned_ids(chat, args.ban)}))
    return found


def labels(key: str, subjects: list[Subject]) -> tuple[str, str]:
    """Short names of the two sides of a comparison."""
    if key != "compare":
        return "as it is", key
    names = [Path(who.name).name for who in subjects]
    return tuple(names) if names[0] != names[1] else ("first", "second")


def differences(first: Answers, second: Answers) -> dict[str, dict]:
    """First minus second over the questions that both were asked: {task, and "all": both accuracies and `Paired` as one dict}."""
    other = {group[0].uid: group[0] for group in second}
    pairs = [(group[0], other[group[0].uid]) for group in first if group[0].uid in other]
    if not pairs:
        raise ValueError("no question could be asked of both; see what was skipped")
    found = {}
    for task in [*dict.fromkeys(a.task for a, _ in pairs if a.task), "all"]:
        a, b = zip(*((a.correct, b.correct) for a, b in pairs if task in ("all", a.task)))
        found[task] = {"first": sum(a) / len(a), "second": sum(b) / len(b)} | dataclasses.asdict(paired_difference(a, b))
    return found


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False, default=str)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def main(argv: list[str] | None = None) -> int:
    """→ exit status: 0, or 2 after one line that says what was wrong."""
    try:
        args = arguments(argv)
        result = evaluate(args)
        if args.json:
            write_json(args.json, result)
            print(f"\nwrote {len(result['answers'])} answers and all scores to {args.json}")
        return 0
    except torch.cuda.OutOfMemoryError:
        print("evaluate.py: the GPU's memory is full; give --wave a smaller number", file=sys.stderr)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
