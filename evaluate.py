"""How good is a model, how sure is that, and what does it hang on?    python evaluate.py --help

Every question is asked once, greedily; --samples asks it again and again. --blind, --ban and --compare ask
the same questions with one
thing changed, and the two are compared question by question: that tells differences apart which two intervals
side by side cannot.
--ask puts one question about pictures of your own.
"""

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data.chat import TEMPLATES, Chat
from data.sources.table import SOURCES, hook_of
from grpo.evaluation.answers import Asking, answer_all, answers_as_text, ask
from grpo.evaluation.evaluated_model import BENCHMARKS, Subject, banned_ids, subject
from grpo.evaluation.protocols import CAP, PROTOCOLS
from grpo.evaluation.resume import Kept, Log
from grpo.evaluation.scores import differences, scores
from grpo.evaluation.tables import as_markdown, difference_table, k_table, labels, score_table
from grpo.memory import Room, measured
from grpo.storage.atomic import write_whole
from grpo.storage.checkpoint import CheckpointError

# of the built-in questions, which have no end: six times the 64 over which tasks, answers and letters are
# balanced
DRAWN_ITEMS = 384
TEACHING = """\
what the tables say
  accuracy      share of right answers, with its 95 % Wilson interval; the protocol says how an answer is read
  chance        what guessing earns: 1 / choices
  format        share of completions that are <think>…</think> <answer>…</answer> and nothing else
  unread        share from which no answer could be read: they count as wrong.
                Many of them may hide a model that sees well and was asked badly
  cut, length   share cut off at the cap; mean tokens
  looks, again  (built-in world) share that look at the picture in words, and that look again ("but wait")
  pass@k        chance that at least one of k sampled answers is right (unbiased);
  maj@k         chance that the most frequent one is (ties are shared)
  difference    the first column minus the second, in points, paired; its 95 % interval is Agresti and Min's
  p             McNemar: how often chance would split the questions that only one of the two got right
                at least as unevenly as this

protocols (docs/evaluation.md)
{protocols}

examples
  python evaluate.py
      the built-in base model on held-out built-in questions
  python evaluate.py --model runs/shapes --compare tiny
      what training has changed (of a run, the newest checkpoint is taken)
  python evaluate.py --model runs/shapes --blind
      does it look? Without the picture it should fall to chance
  python evaluate.py --model runs/shapes --ban but
      does its second look matter? Forbid the word it begins with
  python evaluate.py --model runs/shapes --split pairs
      colour-shape pairs that no training question has shown
  python evaluate.py --model runs/shapes --samples 64 --json out.json
      pass@k and maj@k up to 64; every answer in a file. Killed, the same command goes on
  python evaluate.py --model Qwen/Qwen2-VL-2B --task cvbench --data nyu-visionx/CV-Bench \\
      --protocol paper --prompt direct --json base.json
      a benchmark as VisualThinker-R1-Zero asked the base model
  python evaluate.py --ask photo.jpg "What is left of the cup?" --choice "a spoon" --choice "a fork" \\
      --model runs/mine
      one question, answered with its reasoning
""".replace("{protocols}", "\n".join(f"  {name:<14}{protocol.about}" for name, protocol in PROTOCOLS.items()))


class Parser(argparse.ArgumentParser):
    """argparse prints its whole usage before an error; one line is enough."""

    def error(self, message: str):
        raise ValueError(f"{message} (python evaluate.py --help)")


def wave(text: str) -> int | str:
    """The value of --wave: "auto", or a number of tokens."""
    return text if text == "auto" else int(text)


def parser() -> Parser:
    """The command line, and the text of --help."""
    made = Parser(
        "evaluate.py",
        description=__doc__,
        epilog=TEACHING,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=26, width=138
        ),
    )
    add = made.add_argument
    add(
        "--model",
        default="tiny",
        metavar="DIR_OR_ID",
        help="a folder in Hugging Face layout, a run folder, a model of the hub, or tiny, the built-in "
        "(default)",
    )
    add("--compare", metavar="DIR_OR_ID", help="another model, asked the same questions")
    add("--task", default="shapes", choices=SOURCES, help="where the questions come from (default shapes)")
    add(
        "--data",
        metavar="FILE_OR_ID",
        help="the file, folder or dataset of the hub that the task reads, if it needs one (docs/data.md)",
    )
    add(
        "--split",
        help="default: all of a benchmark, unless the model's run was trained on it; else heldout; shapes "
        "also has pairs",
    )
    add(
        "--items",
        type=int,
        metavar="N",
        help=f"how many questions (default: {DRAWN_ITEMS} of shapes, all of a file)",
    )
    add(
        "--samples",
        type=int,
        default=0,
        metavar="K",
        help="also sample K completions a question, for pass@k and maj@k",
    )
    add("--temperature", type=float, metavar="T", help="of those samples (default 1)")
    add(
        "--blind",
        action="store_true",
        help="ask again with every picture withheld: a grey one of the same size is shown",
    )
    add(
        "--ban",
        action="append",
        default=[],
        metavar="WORD",
        help="ask again while WORD's first token can't be written; may be repeated",
    )
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write every answer and all scores here, and the tables as Markdown to FILE.md",
    )
    add("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown here")
    add(
        "--seed",
        type=int,
        default=0,
        help="of the built-in questions and of sampling (default 0, which training's own evaluation uses)",
    )
    add(
        "--ask",
        nargs="+",
        metavar="WORD",
        help='instead: PICTURE … "QUESTION". One answer with its reasoning (--samples K: K of them)',
    )
    add(
        "--choice",
        action="append",
        default=[],
        metavar="TEXT",
        help="with --ask: a choice of the question; repeat it",
    )
    add = made.add_argument_group(
        "how the model is asked (default: as its run was, if it comes from one)"
    ).add_argument
    add(
        "--protocol",
        default="strict",
        choices=PROTOCOLS,
        help="how it is asked, read and counted: see below (default strict)",
    )
    add(
        "--prompt",
        choices=("reasoning", "direct"),
        help="ask for reasoning and an answer, or for the answer alone (default: as the template does)",
    )
    add(
        "--template",
        choices=TEMPLATES,
        help="default: shapes for the built-in model or task, else the protocol's for a base or instruct "
        "model",
    )
    add(
        "--cap",
        type=int,
        metavar="N",
        help=f"longest completion in tokens; default: the recipe shapes' for the same, else {CAP}",
    )
    add(
        "--max-prompt",
        type=int,
        metavar="N",
        help="longest prompt in tokens; a longer one is skipped and named (default: none is too long)",
    )
    add(
        "--max-pixels",
        type=int,
        metavar="N",
        help="larger pictures are scaled down (default: as the model's processor says)",
    )
    add = made.add_argument_group("machine").add_argument
    add(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto (default): a GPU if there is one",
    )
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="auto (default): bfloat16 on a GPU, else float32",
    )
    add(
        "--wave",
        type=wave,
        default="auto",
        metavar="N",
        help="tokens decoded at a time; auto (default): as many as the free memory holds",
    )
    return made


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """What was asked for, checked as far as it can be without loading anything. Raises ValueError."""
    args = (made := parser()).parse_args(argv)
    for name, least in (
        ("items", 1),
        ("samples", 0),
        ("cap", 1),
        ("max_prompt", 2),
        ("max_pixels", 1),
        ("wave", 1),
        ("seed", 0),
    ):
        if (value := getattr(args, name)) not in (None, "auto") and value < least:
            made.error(f"argument --{name.replace('_', '-')}: must be at least {least}, got {value}")
    if args.temperature is not None and not (args.samples and 0 < args.temperature < float("inf")):
        made.error(
            "argument --temperature: must be above 0, and goes with --samples; what is not sampled is greedy"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        made.error("argument --device: PyTorch sees no GPU here")
    for name in ("json", "markdown"):
        if (path := getattr(args, name)) and not path.absolute().parent.is_dir():
            made.error(f"argument --{name}: there is no folder {path.absolute().parent}")
    if args.ask and len(args.ask) < 2:
        made.error("argument --ask: give one or more pictures, and then the question in quotes")
    if args.ask and (
        extra := [
            name for name in ("compare", "data", "blind", "ban", "json", "markdown") if getattr(args, name)
        ]
    ):
        made.error(f"argument --{extra[0]}: does not go with --ask, which puts one question to one model")
    if args.choice and not args.ask:
        made.error("argument --choice: goes with --ask")
    args.device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    args.temperature = args.temperature or 1.0
    return args


# ---- asking


def subject_of(name: str, args: argparse.Namespace) -> Subject:
    """The model of that name, asked as the command line says."""
    return subject(
        name,
        PROTOCOLS[args.protocol],
        built_in=args.data is None and not args.ask,
        device=args.device,
        prompt=args.prompt,
        template=args.template,
        cap=args.cap,
        max_prompt=args.max_prompt,
        max_pixels=args.max_pixels,
        dtype=args.dtype,
    )


def evaluate(args: argparse.Namespace) -> dict:
    """Ask, and print the tables as they come. → what --json writes. Raises ValueError.

    scores, answers and skipped are the greedy ones of --model; what else was asked (sampled, blind, banned,
    compare, compare_sampled) is under "more" by its name, each with scores, answers, skipped and, against the
    first, differences.
    """
    protocol = PROTOCOLS[args.protocol]
    hook = hook_of(args.task)
    # a wrong name is found before minutes are spent
    subjects = [subject_of(name, args) for name in (args.model, args.compare) if name]
    trained_on = {who.trained_on for who in subjects}
    args.split = args.split or (
        "all" if args.task in BENCHMARKS and args.task not in trained_on else "heldout"
    )
    examples = SOURCES[args.task](
        args.data, args.split, args.items or (None if args.data else DRAWN_ITEMS), args.seed
    )
    print(
        f"{len(examples)} questions of {args.task}, split {args.split}, seed {args.seed}; protocol "
        f"{protocol.name}: {protocol.checker()}, {protocol.total} total"
    )
    asked = {
        key: getattr(args, key)
        for key in (
            "task",
            "data",
            "split",
            "items",
            "seed",
            "samples",
            "temperature",
            "blind",
            "ban",
            "protocol",
        )
    }
    asked["subjects"] = [dataclasses.asdict(who) for who in subjects]
    log = Log(unfinished(args.json), asked) if args.json else None
    if log and log.resumed:
        print(f"going on: {log.resumed} answers are in {log.path}")
    result = {
        "config": vars(args) | asked | {"checker": protocol.checker(), "total": protocol.total},
        "more": {},
    }
    first = None
    for who in subjects:
        policy, chat = who.open(args.device)
        room = measured(policy, say=tqdm.write) if args.wave == "auto" else Room(args.wave, say=tqdm.write)
        print(
            f"\n{who.folder}: template {who.template}, at most {who.cap} tokens, {who.dtype} on {args.device}"
        )
        for key, title, options in passes(args, chat, again=first is not None):
            kept = log.of(who=dataclasses.asdict(who), seed=args.seed, **options) if log else Kept()
            with tqdm(total=len(examples), desc=title, unit="question", disable=None, leave=False) as bar:
                reader = partial(protocol.read, direct=who.direct)
                how = Asking(who.cap, seed=args.seed, read=reader, measure=hook.measure, **options)
                answers = answer_all(policy, chat, examples, how, room, kept=kept, progress=bar.update)
            found = scores(answers, protocol.total)
            block = result if first is None else result["more"].setdefault(key, {})
            block |= {
                "title": f"{who.name}, {title}",
                "scores": found,
                "skipped": answers.skipped,
                "answers": [answer.to_dict() for group in answers for answer in group],
            }
            print(
                f"\n{block['title']}\n{score_table(found, protocol.shown, hook)}"
                + (f"\n\n{k_table(found)}" if "pass@k" in found else "")
            )
            if answers.skipped:
                print(
                    f"skipped {len(answers.skipped)}: "
                    + "; ".join([*answers.skipped[:2], *["…"] * (len(answers.skipped) > 2)])
                )
            if first is None:
                first = answers
            elif "sampled" not in key:
                block["differences"] = differences(first, answers)
                left, right = labels(key, [each.name for each in subjects])
                print(
                    f"\n{left} minus {right}, question by "
                    f"question\n{difference_table(block['differences'], left, right)}"
                )
        # two large models need not fit at once
        del policy
    return result


def passes(args: argparse.Namespace, chat: Chat, again: bool) -> list[tuple[str, str, dict]]:
    """How often a model is asked, and what differs: (key in the JSON, title, arguments of `answer_all`).
    again: it is --compare's."""
    found = [("compare" if again else "greedy", "greedy", {})]
    if args.samples:
        title = f"{args.samples} samples a question at temperature {args.temperature:g}"
        found.append(
            (
                "compare_sampled" if again else "sampled",
                title,
                {"samples": args.samples, "temperature": args.temperature},
            )
        )
    if args.blind and not again:
        found.append(("blind", "greedy, pictures withheld", {"blind": True}))
    if args.ban and not again:
        found.append(
            (
                "banned",
                f"greedy, without {' and '.join(map(repr, args.ban))}",
                {"banned": banned_ids(chat, args.ban)},
            )
        )
    return found


def one_question(args: argparse.Namespace) -> str:
    """What --ask prints. Raises ValueError."""
    who = subject_of(args.model, args)
    policy, chat = who.open(args.device)
    *pictures, question = args.ask
    reader = partial(PROTOCOLS[args.protocol].read, direct=who.direct)
    sampled = {"samples": args.samples, "temperature": args.temperature} if args.samples else {}
    how = Asking(who.cap, seed=args.seed, read=reader, **sampled)
    return answers_as_text(ask(policy, chat, [Path(each) for each in pictures], question, args.choice, how))


def unfinished(path: Path) -> Path:
    """Where the answers are kept until the evaluation is through."""
    return path.with_name(path.name + ".part")


def main(argv: list[str] | None = None) -> int:
    """→ exit status: 0, or 2 after one line that says what was wrong."""
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
        print(
            "evaluate.py: the GPU's memory is full with one question at a time; lower --cap, "
            "--max-pixels or --samples",
            file=sys.stderr,
        )
    except (ValueError, OSError, CheckpointError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
