"""From the first evaluation of a run to its last checkpoint: step 5 of the loop, signals, and the end."""

import json
import time
from functools import cached_property
from pathlib import Path

import torch

from data.chat import GENERATION
from data.processor import json_object, with_pixels
from data.sources.table import hook_of
from data.templates import OWN, RECORD, TEMPLATES, TRAINED, as_jinja, as_record
from grpo.config import by_model
from grpo.evaluation.tables import before_after
from grpo.gradient import OutOfMemory
from grpo.monitor import report
from grpo.monitor.recorder import Recorder
from grpo.parallel.ranks import use_bfloat16, wait_for_all
from grpo.run import held_out
from grpo.run.signals import Interrupted, Interrupts
from grpo.storage import checkpoint
from grpo.storage.atomic import write_whole
from grpo.storage.background import Background

# where steps take no time, evaluations come too often to draw curves at each
SHOW_SECONDS = 10.0
# settings that decide how a policy was asked, and its recipe
RECORDED = "recipe method task template system cap max_prompt min_pixels max_pixels dtype".split()


class Lifecycle:
    """Records steps, evaluates, and writes checkpoints, summary.json, curves.png and report.html.

    curves.png and report.html are written at every evaluation, and however the run ends. As a context manager
    it handles SIGINT and SIGTERM, and on exit waits for the checkpoint being written.
    """

    def __init__(self, cfg, run, ranks, started: float):
        self.cfg = cfg
        self.run = run
        self.ranks = ranks
        self.started = started
        self.recorder = Recorder(cfg, run, ranks)
        self.interrupts = Interrupts(show=ranks.main)
        self.last_saved = run.step if checkpoint.complete(run.folder) else -1
        self.background = Background() if cfg.save.background else None
        # whether metrics.jsonl has been read, so that a report can be written
        self.begun = False
        self.shown = started

    def __enter__(self) -> "Lifecycle":
        self.interrupts.__enter__()
        return self

    def __exit__(self, kind, error, _) -> None:
        try:
            self.wait()
        except checkpoint.CheckpointError as late:
            if kind is None:
                raise
            # the run ends for another reason, which its own message names
            self.recorder.warn(str(late))
        finally:
            if error is not None and not isinstance(error, Interrupted):
                self.show(f"ended with an error: {error or kind.__name__}")
            self.recorder.close_loggers(failed=kind is not None)
            self.interrupts.__exit__()
        if isinstance(error, OutOfMemory):
            saved = checkpoint.complete(self.run.folder)
            where = f"the run goes on from {saved[-1]}" if saved else "no checkpoint is saved yet"
            raise OutOfMemory(f"{error}: {where}") from None

    def describe(self) -> str:
        """What the run will do, in two lines; and what its model chose."""
        cfg, run = self.cfg, self.run
        size = sum(p.numel() for p in run.policy.parameters())
        sets = ", ".join(f"{name}: {len(items)}" for name, items in run.heldout.items())
        group = f" x {cfg.group}" if cfg.method == "grpo" else ""
        name = cfg.name if cfg.name == cfg.recipe else f"{cfg.name} (recipe {cfg.recipe})"
        policy = f"{name}: {cfg.method} on {cfg.model} ({size / 1e6:.2f} M parameters)"
        questions = f"{len(run.examples)} questions of {cfg.task} (held out: {sets or 'none'})"
        steps = f"{self.ranks.size} x {self.ranks.device} · {cfg.prompts} prompts{group} · {cfg.steps} steps"
        chosen = "".join(f"\n  {line}" for line in by_model.explained(cfg))
        for_model = f"\nchosen for {cfg.model}, because nothing else said them:{chosen}" if chosen else ""
        return f"{policy} · {questions}\n{steps} · writes to {run.folder}{for_model}"

    def before(self) -> None:
        """Print what begins. Evaluate the base, unless an earlier start of this run did."""
        run = self.run
        self.recorder.resume()
        self.begun = True
        if self.ranks.main:
            print(self.describe() + (f"\ngoing on after step {run.step}" if run.step else ""), flush=True)
        # a checkpoint of step 0 has that evaluation in its metrics
        if self.cfg.eval.items and self.last_saved < 0:
            run.metrics.write({"step": 0} | self.evaluate(0, every_set=True))
            self.show_again()
        self.recorder.open_bar()
        self.leave_if_told(run.step)
        self.recorder.begin_step(run.step + 1)

    def after(self) -> None:
        """Save, write summary, curves and report, and print the table of before and after."""
        if self.last_saved < self.cfg.steps:
            self.save(self.cfg.steps)
        self.wait()
        if not self.ranks.main:
            return
        self.recorder.close_bar()
        folder = self.run.folder
        evaluated = [row for row in report.read_metrics(folder) if "eval/accuracy" in row]
        # without an evaluation of the base (eval.items was 0 when the run began) there is no before
        if evaluated and evaluated[0]["step"] == 0:
            pick = lambda row: {key.removeprefix("eval/"): row[key] for key in row if key.startswith("eval/")}
            base, final = (pick(evaluated[at]) for at in (0, -1))
            self.write_summary(base, final, time.perf_counter() - self.started)
            print("\n" + before_after(base, final, hook_of(self.cfg.eval.task or self.cfg.task)) + "\n")
        written = (*report.write_curves(folder), *report.write_report(folder), folder / "metrics.jsonl")
        for path in (*written, checkpoint.complete(folder)[-1]):
            print(f"  {path}")
        print(f"{time.perf_counter() - self.started:.0f} seconds")

    def write_summary(self, base: dict, final: dict, seconds: float) -> None:
        """Write summary.json, unless this start had nothing left to do and one is there."""
        path = self.run.folder / "summary.json"
        summary = {"base": base, "final": final, "steps": self.cfg.steps, "seconds": round(seconds, 1)}
        # then `seconds` are those of the last start only
        summary |= {"resumed_after": self.run.step} if self.run.step else {}
        if self.run.step < self.cfg.steps or not path.exists():
            write_whole(path, json.dumps(summary, indent=2) + "\n")

    def step(self, step: int, batch, stats, grad_norm: float) -> None:
        """Step 5 of GRPO's step, counted from 1. Raises NonFinite, CheckpointError and Interrupted."""
        self.finish(step, self.recorder.grpo_row(step, batch, stats, grad_norm))

    def sft_step(self, step: int, batch, stats, grad_norm: float) -> None:
        """The same for a step of imitation."""
        self.finish(step, self.recorder.sft_row(step, batch, stats, grad_norm))

    def finish(self, step: int, row: dict) -> None:
        """Evaluate and save when it is time, write the row, and move the bar."""
        cfg = self.cfg
        last = step == cfg.steps
        if self.background:
            self.background.check()
        saves = bool(cfg.save.every) and step % cfg.save.every == 0
        evaluates = bool(cfg.eval.items) and (last or (bool(cfg.eval.every) and step % cfg.eval.every == 0))
        if evaluates:
            row |= self.evaluate(step, every_set=last)
        self.recorder.write(step, row)
        if saves:
            self.save(step)
        if cfg.save.weights_every and step % cfg.save.weights_every == 0:
            self.save_weights(step)
        self.recorder.show_progress(row)
        if not last:
            if evaluates or (saves and not cfg.eval.items):
                self.show_again()
            self.leave_if_told(step)
            self.recorder.begin_step(step + 1)

    def show_again(self) -> None:
        """Write curves.png and report.html, unless that was a moment ago."""
        if time.perf_counter() > self.shown + SHOW_SECONDS:
            self.show()

    def show(self, ended: str = "") -> list[Path]:
        """Write curves.png and report.html of the run so far, on rank 0. -> their paths. ended: why the run
        is over. If they cannot be written, a line says why, and the run goes on."""
        if not self.ranks.main or not self.begun:
            return []
        folder = self.run.folder
        self.shown = time.perf_counter()
        try:
            return [*report.write_curves(folder, say=lambda _: None), *report.write_report(folder, ended)]
        except (ValueError, OSError) as error:
            self.recorder.warn(f"report.html: {error}")
            return []

    def evaluate(self, step: int, every_set: bool) -> dict:
        """The metrics of an evaluation (`grpo/run/held_out.py`)."""
        return held_out.evaluate(self.cfg, self.run, self.ranks, step, every_set)

    def leave_if_told(self, step: int) -> None:
        """If any rank has received a signal, save and raise Interrupted, on every rank."""
        if not (number := self.interrupts.signal_on_any_rank()):
            return
        if step > max(self.last_saved, 0):
            self.save(step)
        self.wait()
        if self.ranks.main:
            self.recorder.close_bar()
        saved = self.run.folder / "checkpoints" / f"step_{step:06d}" if step else None
        stopped = Interrupted(number, step, self.cfg.steps, saved)
        self.show(str(stopped))
        # torchrun ends the other ranks as soon as one has left
        wait_for_all()
        raise stopped

    @cached_property
    def files(self) -> dict[str, str]:
        """The files of a checkpoint that say how the policy is asked."""
        return trained_with(self.cfg, self.run)

    def save(self, step: int) -> None:
        """Write a checkpoint, or start to write it in the background."""
        run = self.run
        checkpoint.save(
            run.folder,
            step,
            run.policy,
            run.optimizer,
            base=run.base,
            keep=self.cfg.save.keep,
            background=self.background,
            files=self.files,
        )
        self.last_saved = step

    def save_weights(self, step: int) -> None:
        """Write the weights alone, in the type of the matrix products."""
        run = self.run
        dtype = torch.bfloat16 if use_bfloat16(self.ranks, self.cfg.dtype) else torch.float32
        checkpoint.save_weights(run.folder, step, run.policy, base=run.base, dtype=dtype, files=self.files)

    def wait(self) -> None:
        """Wait until every checkpoint is written. Raises CheckpointError if one could not be."""
        if self.background:
            self.background.wait()


def trained_with(cfg, run) -> dict[str, str]:
    """The files that say how the policy is asked, {name: text}: for evaluate.py, for transformers and for
    servers."""
    chat = run.chat
    files = with_pixels(run.base, chat.pictures.min_pixels, chat.pictures.max_pixels)
    # a base may name fewer stop tokens than end a rollout; transformers and servers stop at these alone
    generation = json_object(run.base / GENERATION) | {"eos_token_id": list(chat.stop_ids)}
    files[GENERATION] = json.dumps(generation, indent=2) + "\n"
    settings = {key: getattr(cfg, key) for key in RECORDED} | {"eval": {"cap": cfg.eval.cap}}
    if cfg.template not in TEMPLATES:
        settings["template"] = TRAINED
    files[RECORD] = as_record(chat.template, settings=settings)
    # the model's own chat template is better than one made of what training asked
    if cfg.template != OWN or cfg.system is not None:
        files["chat_template.jinja"] = as_jinja(chat.template)
    return files
