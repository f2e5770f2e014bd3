"""How good is a model, how sure is that, and what does it depend on?    python evaluate.py --help

Every question is asked once, greedily. --samples asks it K times more. --blind, --ban, --prefix and --compare
ask the same questions with one thing changed, and compare question by question: that finds differences which
two intervals side by side cannot show. --ask puts one question about pictures of your own.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import grpo.parallel.openmp

import torch
import yaml
from tqdm import tqdm

from data.chat import Chat
from data.sources.table import SOURCES, columns_of, hook_of, open_split
from data.types import Example
from grpo.evaluation.answers import Asking, answer_all, answers_as_text, ask
from grpo.evaluation.evaluated_model import (
    BENCHMARKS,
    EvaluatedModel,
    Overrides,
    banned_ids,
    evaluated_model,
    known_ids,
)
from grpo.evaluation.protocols import CAP, PROTOCOLS
from grpo.evaluation.resume import Kept, Log
from grpo.evaluation.scores import Answers, differences, scores
from grpo.evaluation.tables import as_markdown, difference_table, k_table, labels, score_table
from grpo.memory import MemoryBudget, memory_budget
from grpo.sampling import Truncation
from grpo.storage.atomic import write_whole
from grpo.storage.checkpoint import CheckpointError

# the words of --help
HELP = Path(__file__).parent / "grpo" / "evaluation" / "help.yaml"
# of the endless built-in questions: six times the 64 over which tasks, answers and letters are balanced
DRAWN_ITEMS = 384
# arguments that have a smallest value
LEAST = {
    "items": 1,
    "samples": 0,
    "cap": 1,
    "top_k": 1,
    "max_prompt": 2,
    "max_pixels": 1,
    "wave": 1,
    "seed": 0,
}
# arguments that an interrupted evaluation must have in common with the one that goes on
KEPT = "task data columns heldout split items seed samples temperature blind ban prefix protocol".split()
KEPT += ["top_k", "top_p"]


def wave(text: str) -> int | str:
    """The value of --wave: "auto", or a number of tokens."""
    return text if text == "auto" else int(text)


# {title of --help: {option: arguments of add_argument, but for its help}}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "what is asked": {
        "--model": dict(default="tiny", metavar="DIR_OR_ID"),
        "--compare": dict(metavar="DIR_OR_ID"),
        "--task": dict(default="shapes", choices=SOURCES),
        "--data": dict(metavar="FILE_OR_ID"),
        "--columns": dict(default="{}", metavar="{OURS: THEIRS}"),
        "--heldout": dict(type=float, metavar="SHARE"),
        "--split": dict(),
        "--items": dict(type=int, metavar="N"),
        "--samples": dict(type=int, default=0, metavar="K"),
        "--temperature": dict(type=float, metavar="T"),
        "--top-k": dict(type=int, metavar="K"),
        "--top-p": dict(type=float, metavar="P"),
        "--blind": dict(action="store_true"),
        "--ban": dict(action="append", default=[], metavar="WORD"),
        "--prefix": dict(metavar="TEXT"),
        "--json": dict(type=Path, metavar="FILE"),
        "--markdown": dict(type=Path, metavar="FILE"),
        "--seed": dict(type=int, default=0),
        "--ask": dict(nargs="+", metavar="WORD"),
        "--choice": dict(action="append", default=[], metavar="TEXT"),
    },
    "how the model is asked (default: as its run was, if it comes from one)": {
        "--protocol": dict(default="strict", choices=PROTOCOLS),
        "--prompt": dict(choices=("reasoning", "direct")),
        "--template": dict(metavar="NAME_OR_FILE"),
        "--system": dict(metavar="TEXT"),
        "--cap": dict(type=int, metavar="N"),
        "--max-prompt": dict(type=int, metavar="N"),
        "--max-pixels": dict(type=int, metavar="N"),
    },
    "machine": {
        "--device": dict(default="auto", choices=("auto", "cpu", "cuda")),
        "--dtype": dict(default="auto", choices=("auto", "float32", "bfloat16")),
        "--wave": dict(type=wave, default="auto", metavar="N"),
    },
}


class Parser(argparse.ArgumentParser):
    """Errors are one line; argparse prints its whole usage before them."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(f"{message} (python evaluate.py --help)")


def parser() -> Parser:
    """The command line, and the text of --help."""
    words = yaml.safe_load(HELP.read_text("utf-8"))
    protocols = "\n".join(f"  {name:<14}{protocol.about}" for name, protocol in PROTOCOLS.items())
    epilog = words["epilog"].format(protocols=protocols)
    layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=26, width=110)
    made = Parser("evaluate.py", description=__doc__, epilog=epilog, formatter_class=layout)
    for title, options in OPTIONS.items():
        group = made.add_argument_group(title)
        for name, option in options.items():
            text = words["options"][name].format(items=DRAWN_ITEMS, cap=CAP)
            group.add_argument(name, help=text, **option)
    return made


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked as far as possible before anything is loaded. Raises ValueError."""
    made = parser()
    args = made.parse_args(argv)
    for name, least in LEAST.items():
        if (value := getattr(args, name)) not in (None, "auto") and value < least:
            made.error(f"argument --{name.replace('_', '-')}: must be at least {least}, got {value}")
    if args.temperature is not None and not (args.samples and 0 < args.temperature < float("inf")):
        made.error("argument --temperature: must be above 0, and goes with --samples; the rest is greedy")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        made.error(f"argument --top-p: must be above 0 and at most 1, got {args.top_p}")
    if (args.top_k or args.top_p) and not args.samples:
        made.error("argument --top-k or --top-p: goes with --samples; the rest is greedy")
    if args.device == "cuda" and not torch.cuda.is_available():
        made.error("argument --device: PyTorch sees no GPU here")
    for name in ("json", "markdown"):
        if (path := getattr(args, name)) and not path.absolute().parent.is_dir():
            made.error(f"argument --{name}: there is no folder {path.absolute().parent}")
    if args.ask and len(args.ask) < 2:
        made.error("argument --ask: give one or more pictures, and then the question in quotes")
    for name in ("compare", "data", "blind", "ban", "prefix", "json", "markdown"):
        if args.ask and getattr(args, name):
            made.error(f"argument --{name}: does not go with --ask, which puts one question to one model")
    if args.choice and not args.ask:
        made.error("argument --choice: goes with --ask")
    args.device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    args.temperature = args.temperature or 1.0
    args.columns = columns_of(args.columns)
    return args


# ---- asking


def model_of(name: str, args: argparse.Namespace) -> EvaluatedModel:
    """The model of that name, asked as the command line says."""
    overrides = Overrides(*(getattr(args, each.name) for each in dataclasses.fields(Overrides)))
    built_in = args.data is None and not args.ask
    return evaluated_model(name, PROTOCOLS[args.protocol], overrides, args.device, built_in)


def questions(args: argparse.Namespace, models: list[EvaluatedModel]) -> Sequence[Example]:
    """What is asked. Fills in `args.split`, and `args.heldout` as a model's run had it, because another share
    would ask what was trained on. Raises ValueError."""
    whole = args.task in BENCHMARKS and args.task not in {model.trained_on for model in models}
    args.split = args.split or ("all" if whole else "heldout")
    shares = [model.heldout for model in models if (model.trained_on, model.data) == (args.task, args.data)]
    if args.heldout is None and args.split != "all" and shares:
        args.heldout = shares[0]
    items = args.items or (None if args.data else DRAWN_ITEMS)
    what = {"columns": args.columns, "heldout": args.heldout}
    examples = open_split(args.task, args.data, args.split, items, args.seed, **what)
    if not len(examples):
        raise ValueError(f"split {args.split} of {args.data or args.task} has no questions; try --split all")
    return examples


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Ask everything, print the tables as they come, and return what --json writes. Raises ValueError.

    "scores", "answers" and "skipped" are the greedy ones of --model. "more" has every other way of asking by
    its name (sampled, blind, banned, prefixed, compare, compare_sampled), each with scores, answers, skipped
    and, against the first, differences.
    """
    protocol = PROTOCOLS[args.protocol]
    # a wrong name is found before minutes are spent
    models = [model_of(name, args) for name in (args.model, args.compare) if name]
    examples = questions(args, models)
    rules = f"{protocol.name}: {protocol.checker()}, {protocol.total} total"
    print(f"{len(examples)} questions of {args.task}, split {args.split}, seed {args.seed}; protocol {rules}")
    asked = {key: getattr(args, key) for key in KEPT} | {"models": [dataclasses.asdict(m) for m in models]}
    log = Log(unfinished(args.json), asked) if args.json else None
    if log and log.resumed:
        print(f"going on: {log.resumed} answers are in {log.path}")
    config = vars(args) | asked | {"checker": protocol.checker(), "total": protocol.total}
    result: dict[str, Any] = {"config": config, "more": {}}
    first = None
    for model in models:
        policy, chat = model.open(args.device)
        auto = args.wave == "auto"
        room = memory_budget(policy, say=tqdm.write) if auto else MemoryBudget(args.wave, say=tqdm.write)
        about = f"template {model.template}, at most {model.cap} tokens, {model.dtype} on {args.device}"
        print(f"\n{model.folder}: {about}")
        reader = partial(protocol.read, direct=model.direct)
        plain = Asking(model.cap, seed=args.seed, read=reader, measure=hook_of(args.task).measure)
        for key, title, changes in passes(args, chat, again=first is not None):
            kept = log.of(who=dataclasses.asdict(model), seed=args.seed, **changes) if log else Kept()
            how = dataclasses.replace(plain, **changes)
            with tqdm(total=len(examples), desc=title, unit="question", disable=None, leave=False) as bar:
                answers = answer_all(policy, chat, examples, how, room, kept=kept, progress=bar.update)
            block = result if first is None else result["more"].setdefault(key, {})
            block |= block_of(f"{model.name}, {title}", answers, args)
            if first is None:
                first = answers
            elif "sampled" not in key:
                block["differences"] = differences(first, answers)
                left, right = labels(key, [each.name for each in models])
                print(f"\n{left} minus {right}, question by question")
                print(difference_table(block["differences"], left, right))
        # two large models need not fit at once
        del policy
    return result


def block_of(title: str, answers: Answers, args: argparse.Namespace) -> dict[str, Any]:
    """Count the answers of one pass and print their tables. Returns what --json writes of them."""
    protocol = PROTOCOLS[args.protocol]
    found = scores(answers, protocol.total)
    print(f"\n{title}\n{score_table(found, protocol.shown, hook_of(args.task))}")
    if "pass@k" in found:
        print(f"\n{k_table(found)}")
    if answers.skipped:
        print(f"skipped {len(answers.skipped)}: {'; '.join(answers.skipped[:2])}", end="")
        print("; …" if len(answers.skipped) > 2 else "")
    rows = [answer.to_dict() for group in answers for answer in group]
    return {"title": title, "scores": found, "skipped": answers.skipped, "answers": rows}


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The changed fields of `Asking` for --samples."""
    sampling: dict[str, Any] = {"samples": args.samples, "temperature": args.temperature}
    if args.top_k or args.top_p:
        sampling["truncation"] = Truncation(args.top_k, args.top_p or 1.0)
    return sampling


def passes(args: argparse.Namespace, chat: Chat, again: bool) -> list[tuple[str, str, dict[str, Any]]]:
    """Ways of asking: (key in the JSON, title, changed fields of `Asking`). again: of --compare's model."""
    found: list[tuple[str, str, dict[str, Any]]] = [("compare" if again else "greedy", "greedy", {})]
    if args.samples:
        title = f"{args.samples} samples a question at temperature {args.temperature:g}"
        found.append(("compare_sampled" if again else "sampled", title, sampling_of(args)))
    if again:
        return found
    if args.blind:
        found.append(("blind", "greedy, pictures withheld", {"blind": True}))
    if args.ban:
        title = f"greedy, without {' and '.join(map(repr, args.ban))}"
        found.append(("banned", title, {"banned": banned_ids(chat, args.ban)}))
    if args.prefix:
        given = {"prefix": known_ids(chat, args.prefix, "--prefix")}
        found.append(("prefixed", f"greedy, begun with {args.prefix!r}", given))
    return found


def one_question(args: argparse.Namespace) -> str:
    """What --ask prints. Raises ValueError."""
    model = model_of(args.model, args)
    policy, chat = model.open(args.device)
    *pictures, question = args.ask
    reader = partial(PROTOCOLS[args.protocol].read, direct=model.direct)
    sampling = sampling_of(args) if args.samples else {}
    how = Asking(model.cap, seed=args.seed, read=reader, **sampling)
    return answers_as_text(ask(policy, chat, [Path(each) for each in pictures], question, args.choice, how))


def unfinished(path: Path) -> Path:
    """The file that keeps the answers until the evaluation is finished."""
    return path.with_name(path.name + ".part")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line that says what was wrong."""
    try:
        args = arguments(argv)
        if args.ask:
            print(one_question(args))
            return 0
        result = evaluate(args)
        page = args.markdown or (args.json and args.json.with_name(args.json.name + ".md"))
        if page:
            write_whole(page, as_markdown(result, PROTOCOLS[args.protocol].shown, hook_of(args.task)))
        if args.json:
            write_whole(args.json, json.dumps(result, indent=1, ensure_ascii=False, default=str))
            unfinished(args.json).unlink()
            print(f"\nwrote {len(result['answers'])} answers and all scores to {args.json}")
        return 0
    except torch.OutOfMemoryError:
        advice = "lower --cap, --max-pixels or --samples"
        print(f"evaluate.py: the GPU is out of memory with one question at a time; {advice}", file=sys.stderr)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
