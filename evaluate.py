"""How good is a model, how sure is that, and what does it depend on?    python evaluate.py --help

Every question is asked once, greedily. --samples asks it K times more. --blind, --ban, --prefix and --compare
ask the same questions with one thing changed, and compare question by question: that finds differences which
two intervals side by side cannot show. --checkpoints draws a benchmark over the steps of runs. --ask and
--chat put questions about pictures of your own.
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

from data.sources.table import SOURCES, columns_of, hook_of, open_split
from data.types import Example
from grpo.evaluation import checkpoints, conversation
from grpo.evaluation.answers import Asking
from grpo.evaluation.conversation import AddChoice, AddQuestion, Question
from grpo.evaluation.evaluated_model import BENCHMARKS, EvaluatedModel, Overrides, evaluated_model
from grpo.evaluation.judge import PROMPTS, judge_of, judged_block
from grpo.evaluation.passes import Questions, Session, block_of, ladder, passes, sampling_of
from grpo.evaluation.protocols import CAP, PROTOCOLS
from grpo.evaluation.resume import Log
from grpo.evaluation.scores import Answers, differences
from grpo.evaluation.tables import as_markdown, difference_table, labels, ladder_table
from grpo.memory import MemoryBudget, memory_budget
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
        "--model": dict(metavar="DIR_OR_ID"),
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
        "--checkpoints": dict(nargs="+", type=Path, metavar="RUN"),
    },
    "questions of your own, instead": {
        "--ask": dict(nargs="+", action=AddQuestion, metavar="WORD"),
        "--choice": dict(action=AddChoice, metavar="TEXT"),
        "--chat": dict(nargs="*", type=Path, metavar="PICTURE"),
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
    "a judge reads what the rules do not find right (needs --json)": {
        "--judge": dict(metavar="MODEL"),
        "--judge-url": dict(default="http://localhost:8000/v1", metavar="URL"),
        "--judge-key-env": dict(metavar="NAME"),
        "--judge-prompts": dict(type=Path, default=PROMPTS, metavar="FILE"),
    },
    "machine": {
        "--device": dict(default="auto", choices=("auto", "cpu", "cuda")),
        "--dtype": dict(default="auto", choices=("auto", "float32", "bfloat16")),
        "--wave": dict(type=wave, default="auto", metavar="N"),
    },
}


Opened = tuple[Log | None, dict[str, Any]]


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
    check_together(made, args)
    # beside --checkpoints it is the base
    args.model = args.model or (None if args.checkpoints else "tiny")
    args.device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    args.temperature = args.temperature or 1.0
    args.columns = columns_of(args.columns)
    return args


def check_together(made: Parser, args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    own = "ask" if args.ask else "chat" if args.chat is not None else None
    others = ["data", "blind", "ban", "prefix", "json", "markdown", "compare", "judge", "checkpoints"]
    for name in others if own else ():
        if getattr(args, name):
            made.error(f"argument --{name}: does not go with --{own}, which puts questions to one model")
    if args.ask and args.chat is not None:
        made.error("argument --chat: does not go with --ask")
    for name in ("samples", "blind", "ban", "prefix", "compare", "judge"):
        if args.checkpoints and getattr(args, name):
            made.error(f"argument --{name}: does not go with --checkpoints, which asks each policy once")
    if args.samples and PROTOCOLS[args.protocol].sampling:
        made.error(f"argument --samples: the protocol {args.protocol} samples by itself")
    if args.judge and not args.json:
        made.error("argument --judge: needs --json; the replies are kept beside it")


# ---- asking


def model_of(name: str, args: argparse.Namespace) -> EvaluatedModel:
    """The model of that name, asked as the command line says."""
    overrides = Overrides(*(getattr(args, each.name) for each in dataclasses.fields(Overrides)))
    built_in = args.data is None and not args.ask and args.chat is None
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
    prepare = PROTOCOLS[args.protocol].prepare
    return Questions(examples, range(len(examples)), prepare) if prepare else examples


def begun(args: argparse.Namespace, models: list[EvaluatedModel], examples: Sequence[Example]) -> Opened:
    """Say what is asked, and open the file of an interrupted evaluation. Raises ValueError."""
    protocol = PROTOCOLS[args.protocol]
    rules = f"{protocol.name}: {protocol.checker()}, {protocol.total} total"
    print(f"{len(examples)} questions of {args.task}, split {args.split}, seed {args.seed}; protocol {rules}")
    asked = {key: getattr(args, key) for key in KEPT} | {"models": [dataclasses.asdict(m) for m in models]}
    log = Log(unfinished(args.json), asked) if args.json else None
    if log and log.resumed:
        print(f"going on: {log.resumed} answers are in {log.path}")
    config = vars(args) | asked | {"checker": protocol.checker(), "total": protocol.total}
    return log, config


def loaded(
    args: argparse.Namespace, model: EvaluatedModel, examples: Sequence[Example], log: Log | None
) -> Session:
    """Load a model, and say how it is asked."""
    policy, chat = model.open(args.device)
    auto = args.wave == "auto"
    room = memory_budget(policy, say=tqdm.write) if auto else MemoryBudget(args.wave, say=tqdm.write)
    about = f"template {model.template}, at most {model.cap} tokens, {model.dtype} on {args.device}"
    print(f"\n{model.folder}: {about}")
    return Session(args, model, policy, chat, examples, room, log)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Ask everything, print the tables as they come, and return what --json writes. Raises ValueError.

    "scores", "answers" and "skipped" are those of --model, asked as the protocol says. "more" has every other
    way of asking by its name (sampled, blind, banned, prefixed, greedy_strict, judged, compare,
    compare_sampled), each with scores, answers, skipped and, against the first, differences. "steps": what
    each step of a published evaluation adds.
    """
    # a wrong name is found before minutes are spent
    models = [model_of(name, args) for name in (args.model, args.compare) if name]
    judge = judge_of(args) if args.judge else None
    examples = questions(args, models)
    log, config = begun(args, models, examples)
    result: dict[str, Any] = {"config": config, "more": {}}
    first: Answers | None = None
    steps: list[tuple[str, Answers]] = []
    for model in models:
        session = loaded(args, model, examples, log)
        for way in passes(args, session.chat, model, again=first is not None):
            answers, first_try = session.answer(way)
            block = result if first is None else result["more"].setdefault(way.key, {})
            block |= block_of(f"{model.name}, {way.title}", answers, args)
            if first is None:
                first = answers
                steps = [("the first try", first_try), (f"up to {way.tries} tries", answers)]
            elif way.key != "sampled" and way.key != "compare_sampled":
                compare(block, first, answers, way.key, [each.name for each in models])
            if way.key == "greedy_strict":
                result["steps"] = [(way.title, answers), *steps]
        # two large models need not fit at once
        del session
    if judge and first is not None:
        judged = judged_block(judge, first, examples, args)
        result["more"]["judged"] = judged[0]
        result.setdefault("steps", [("the rules", first)]).append(("with the judge", judged[1]))
    if "steps" in result:
        result["steps"] = ladder(result["steps"])
        print(f"\nwhat each step adds\n{ladder_table(result['steps'])}")
    return result


def compare(block: dict[str, Any], first: Answers, answers: Answers, key: str, names: list[str]) -> None:
    """Add the differences of two passes to the second's block, and print them."""
    block["differences"] = differences(first, answers)
    left, right = labels(key, names)
    print(f"\n{left} minus {right}, question by question")
    print(difference_table(block["differences"], left, right))


def over_steps(args: argparse.Namespace) -> dict[str, Any]:
    """--checkpoints: ask each policy of the runs once, print the table, and return what --json writes. Raises
    ValueError."""
    points = [checkpoints.Point(checkpoints.BASE, 0, Path(args.model))] if args.model else []
    points += [point for run in args.checkpoints for point in checkpoints.points_of(run)]
    models = [model_of(str(point.folder), args) for point in points]
    examples = questions(args, models)
    log, config = begun(args, models, examples)
    found = []
    for point, model in zip(points, models):
        session = loaded(args, model, examples, log)
        answers, _ = session.answer(passes(args, session.chat, model, again=False)[0])
        block = block_of(f"{point.run}, step {point.step}", answers, args)
        found.append({"run": point.run, "step": point.step, "folder": str(point.folder)} | block)
        del session
    print(f"\n{checkpoints.as_text(found, args.split)}")
    return {"config": config, "points": found}


def own_questions(args: argparse.Namespace) -> None:
    """--ask and --chat: load the model once, and print its answers. Raises ValueError."""
    model = model_of(args.model, args)
    for question in args.ask or ():
        conversation.check(question)
    policy, chat = model.open(args.device)
    reader = partial(PROTOCOLS[args.protocol].read, direct=model.direct)
    how = Asking(model.cap, seed=args.seed, read=reader, **(sampling_of(args) if args.samples else {}))

    def reply(question: Question) -> str:
        return conversation.answers_as_text(conversation.ask(policy, chat, question, how))

    if args.ask:
        for text in conversation.all_answers(args.ask, reply):
            print(text)
    else:
        conversation.converse(reply, conversation.typed(), args.chat)


def unfinished(path: Path) -> Path:
    """The file that keeps the answers until the evaluation is finished."""
    return path.with_name(path.name + ".part")


def written(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write what --json and --markdown ask for."""
    page = args.markdown or (args.json and args.json.with_name(args.json.name + ".md"))
    if page:
        if args.checkpoints:
            text = checkpoints.as_page(result["points"], result["config"])
        else:
            text = as_markdown(result, PROTOCOLS[args.protocol].shown, hook_of(args.task))
        write_whole(page, text)
    if not args.json:
        return
    count = len(result.get("answers", ()))
    if args.checkpoints:
        title = f"{args.task}, split {args.split}"
        count = sum(len(point["answers"]) for point in result["points"])
        if said := checkpoints.draw(result["points"], title, args.json.with_name(args.json.name + ".png")):
            print(said)
    write_whole(args.json, json.dumps(result, indent=1, ensure_ascii=False, default=str))
    unfinished(args.json).unlink()
    print(f"\nwrote {count} answers and all scores to {args.json}")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line that says what was wrong."""
    try:
        args = arguments(argv)
        if args.ask or args.chat is not None:
            own_questions(args)
        else:
            written(args, over_steps(args) if args.checkpoints else evaluate(args))
        return 0
    except torch.OutOfMemoryError:
        advice = "lower --cap, --max-pixels or --samples"
        print(f"evaluate.py: the GPU is out of memory with one question at a time; {advice}", file=sys.stderr)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
