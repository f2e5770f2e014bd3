"""A judge: a model on an OpenAI-compatible server that finds or compares answers which the rules do not find
right. Nothing is asked without --judge.

Replies are kept in a file beside --json, one line each, and are never asked for twice. A line's key is a hash
of model, prompt and sampling: after another prompt or model, everything is asked again.
"""

from __future__ import annotations

import argparse
import json
import os
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from data.types import BadExample, Example
from grpo.evaluation.comparisons import Reading
from grpo.evaluation.passes import block_of
from grpo.evaluation.protocols import PROTOCOLS
from grpo.evaluation.scores import Answers, Completion
from grpo.serving.client import Client, Server
from grpo.serving.messages import Reply, Request
from grpo.storage.atomic import append_line

PROMPTS = Path(__file__).with_name("judge.yaml")
STEPS = ("extract", "verdict")
FIELDS = {"question", "answer", "response", "extracted"}
# tokens of a reply, as in VLMEvalKit
LONGEST_REPLY = 128
# (what was said, question) -> the reading of the protocol's rule
Rule = Callable[[str, Example], Reading]


def prompts_of(path: Path = PROMPTS) -> dict[str, dict[str, str]]:
    """{benchmark, or "default": {"extract", "verdict": the text with its fields}}. Raises ValueError naming
    file and entry."""
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise ValueError(f"{path}: write {{benchmark: {{extract: text, verdict: text}}}}")
    for name, entry in found.items():
        for step, text in entry.items():
            if step not in STEPS or not isinstance(text, str):
                raise ValueError(f"{path}: {name}: {step}: there are {' and '.join(STEPS)}, each a text")
            try:
                fields = {field for _, field, *_ in string.Formatter().parse(text) if field is not None}
            except ValueError as error:
                raise ValueError(f"{path}: {name}: {step}: {error}; write {{{{ for a bracket") from error
            if unknown := sorted(fields - FIELDS):
                raise ValueError(
                    f"{path}: {name}: {step}: no field {unknown[0]!r}; there are {sorted(FIELDS)}"
                )
    return found


class Verdicts:
    """The file of replies. `found`: {key of the request: text}. Raises ValueError if it is not ours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, str] = {}
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        for number, line in enumerate(lines[:-1], 1):
            try:
                row = json.loads(line)
                self.found[row["request"]] = row["text"]
            except (KeyError, TypeError, ValueError) as error:
                problem = f"{path}, line {number}: not written by a judge"
                raise ValueError(f"{problem}; remove the file, or write elsewhere with --json") from error
        if lines[-1]:
            # a last line without its end was cut by a kill
            os.truncate(path, sum(len(line) + 1 for line in lines[:-1]))

    def add(self, request: Request, reply: Reply, uid: str, step: str) -> None:
        """Keep a reply."""
        row = {"request": reply.request, "uid": uid, "step": step, "text": reply.text, "prompt": request.text}
        append_line(self.path, (json.dumps(row) + "\n").encode("ascii"))
        self.found[reply.request] = reply.text


@dataclass
class Judged:
    """An answer on its way through the steps. place: of its group. response: what the protocol takes out of
    the completion. said: what was extracted from it. failed: why the server gave no reply."""

    place: int
    completion: Completion
    example: Example
    response: str
    said: str
    reading: Reading | None = None
    failed: str = ""


@dataclass
class Judge:
    """Reads the answers that are not right by the rule. rule: of the protocol. extracted: (completion) ->
    what the protocol takes out of it."""

    client: Client
    verdicts: Verdicts
    prompts: Mapping[str, Mapping[str, str]]
    rule: Rule
    extracted: Callable[[str], str]

    def read(self, answers: Answers, examples: Sequence[Example]) -> tuple[Answers, dict[str, Any]]:
        """The answers with the judge's readings; and counts: read (answers that were not right by the rule),
        requests, kept (replies that were there before), right (by the judge), failed, with the first reason
        in "why". Raises ServerError."""
        waiting = list(self._waiting(answers, examples))
        counts: dict[str, Any] = {"read": len(waiting), "requests": 0, "kept": 0}
        for step in STEPS:
            sent, kept = self._step(step, waiting)
            counts["requests"] += sent
            counts["kept"] += kept
        final = Answers()
        final.extend(answers)
        final.skipped = answers.skipped
        right = 0
        for each in waiting:
            if each.reading is not None and not each.failed:
                right += each.reading.correct
                final[each.place] = [replace(each.completion, **each.reading._asdict())]
        failures = [each.failed for each in waiting if each.failed]
        return final, counts | {
            "right": right,
            "failed": len(failures),
            "why": failures[0] if failures else "",
        }

    def _waiting(self, answers: Answers, examples: Sequence[Example]) -> Iterator[Judged]:
        """The answers that are wrong or unread by the rule, with their questions."""
        places = {group[0].uid: place for place, group in enumerate(answers) if not group[0].correct}
        for index in range(len(examples)):
            try:
                example = examples[index]
            except BadExample:
                continue
            if example.uid in places and self._prompts(example):
                completion = answers[places[example.uid]][0]
                response = self.extracted(completion.text).strip()
                yield Judged(places[example.uid], completion, example, response, said=response)

    def _prompts(self, example: Example) -> Mapping[str, str]:
        benchmark = example.extra.get("benchmark", "")
        return self.prompts.get(benchmark, self.prompts.get("default", {}))

    def _step(self, step: str, waiting: Sequence[Judged]) -> tuple[int, int]:
        """Ask one step of all that need it. -> how many requests were sent, and replies were there."""
        asked: dict[str, list[Judged]] = {}
        requests: dict[str, Request] = {}
        for each in waiting:
            prompt = self._prompts(each.example).get(step)
            if prompt and not each.failed and not (each.reading and each.reading.correct):
                request = Request(self._filled(prompt, each), max_tokens=LONGEST_REPLY)
                key = self.client.digest(request)
                asked.setdefault(key, []).append(each)
                requests[key] = request
        new = {key: request for key, request in requests.items() if key not in self.verdicts.found}
        for key in requests.keys() - new.keys():
            self._take(step, asked[key], self.verdicts.found[key])
        replies = self.client.replies(new.values())
        bar = tqdm(replies, f"judge: {step}", len(new), unit="reply", disable=None, leave=False)
        for request, reply in bar:
            those = asked[reply.request]
            if reply.error:
                for each in those:
                    each.failed = reply.error
                continue
            self.verdicts.add(request, reply, those[0].example.uid, step)
            self._take(step, those, reply.text)
        return len(new), len(requests) - len(new)

    def _filled(self, prompt: str, each: Judged) -> str:
        example = each.example
        gold = f"{example.letter}. {example.answer}" if example.letter else example.answer
        return prompt.format(question=example.asked, answer=gold, response=each.response, extracted=each.said)

    def _take(self, step: str, those: Sequence[Judged], text: str) -> None:
        """Use a reply."""
        for each in those:
            if step == "extract":
                each.said = text.strip()
                each.reading = self.rule(each.said, each.example)
            else:
                right = text.strip() == "1"
                answer = each.said or None
                each.reading = Reading(answer, None, "" if answer else "empty answer", right)


def judge_of(args: argparse.Namespace) -> Judge:
    """The judge of --judge. Raises ValueError, also where the key is missing."""
    protocol = PROTOCOLS[args.protocol]
    client = Client(Server(args.judge_url, args.judge, args.judge_key_env))
    verdicts = Verdicts(args.json.with_name(args.json.name + ".judge.jsonl"))
    return Judge(client, verdicts, prompts_of(args.judge_prompts), protocol.compare, protocol.extracted)


def judged_block(
    judge: Judge, first: Answers, examples: Sequence[Example], args: argparse.Namespace
) -> tuple[dict[str, Any], Answers]:
    """The answers as the judge reads them. -> what --json writes of them, and they."""
    answers, counts = judge.read(first, examples)
    block = block_of(f"{args.model}, read by the judge {args.judge}", answers, args) | {"judge": counts}
    told = "the judge read {read} answers, and {right} of them are right; {requests} requests, {kept} kept"
    print(told.format(**counts))
    if counts["failed"]:
        again = "and count by the rules; the same command asks again"
        print(f"{counts['failed']} got no reply ({counts['why']}) {again}")
    return block, answers
