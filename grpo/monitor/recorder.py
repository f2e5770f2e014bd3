"""Step 5 of the loop: what is kept of a step (metrics, the report's samples, evaluations, checkpoints),
and what the person sees."""

import json
import sys
import time
from collections import deque

import torch
from tqdm import tqdm

from data.sources.table import hook_of
from grpo.batch import TrainBatch
from grpo.evaluation.answers import Asking, answer_all
from grpo.evaluation.scores import flat_scores, scores
from grpo.evaluation.tables import before_after
from grpo.monitor import report, warnings
from grpo.monitor.step_metrics import question_line, shown_groups, step_metrics
from grpo.parallel import fsdp
from grpo.parallel.ranks import gather_objects, sum_over_ranks, wait_for_all
from grpo.run.signals import Interrupted, Interrupts
from grpo.storage import checkpoint
from grpo.storage.atomic import write_whole
from grpo.storage.background import Background

# held-out questions that the report follows through the run
SHOWN_HELDOUT = 6


class Keeper:
    """Writes metrics.jsonl, samples.jsonl, checkpoints, summary.json, curves.png and report.html; shows a
    progress bar with what matters.

    A context: within it signals are heard, and nobody leaves it before a checkpoint that is being written is
    written.
    """

    def __init__(self, cfg, run, ranks, started: float):
        self.cfg, self.run, self.ranks, self.started = cfg, run, ranks, started
        self.bar = None
        self.interrupts = Interrupts(show=ranks.main)
        # prompt and completion tokens so far, of all ranks
        self.tokens = 0
        # the last lines of metrics, for the guards
        self.recent: deque = deque(maxlen=warnings.LONGEST)
        # guards that have spoken
        self.warned: set[str] = set()
        # the uids of the one step whose update was skipped, of all ranks;
        self.nonfinite: list[str] = []
        # the same, in that step
        self.skipped: list[str] = []
        self.last_saved = run.step if checkpoint.complete(run.folder) else -1
        self.background = Background() if cfg.save.background else None

    def __enter__(self) -> "Keeper":
        self.interrupts.__enter__()
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.wait()
        except checkpoint.CheckpointError as error:
            if kind is None:
                raise
            # the run ends for another reason, which is said by who knows it
            tqdm.write(str(error), file=sys.stderr)
        finally:
            self.interrupts.__exit__()

    # ---- before and after

    def describe(self) -> str:
        """What is about to happen, in a few lines."""
        cfg, run = self.cfg, self.run
        size = sum(p.numel() for p in run.policy.parameters())
        sets = ", ".join(f"{name}: {len(items)}" for name, items in run.heldout.items())
        return (
            f"{cfg.recipe}: {cfg.method} on {cfg.model} ({size / 1e6:.2f} M parameters) · "
            f"{len(run.examples)} questions of {cfg.task} (held out: {sets or 'none'})\n"
            f"{self.ranks.size} x {self.ranks.device} · {cfg.prompts} "
            f"prompts{f' x {cfg.group}' if cfg.method == 'grpo' else ''} · {cfg.steps} steps · writes to "
            f"{run.folder}"
        )

    def before(self) -> None:
        """Say what begins, and evaluate the base unless an earlier start of this run did."""
        cfg, run = self.cfg, self.run
        rows = report.read_metrics(run.folder) if self.ranks.main else []
        self.tokens = next((row["num_tokens"] for row in reversed(rows) if "num_tokens" in row), 0)
        self.recent.extend(row for row in rows if "reward" in row)
        self.warned = {warning["name"] for warning in warnings.warnings(rows)}
        # rank 0 read them
        self.nonfinite = gather_objects([uid for row in rows for uid in row.get("guard/nonfinite_uids", ())])
        if self.ranks.main:
            print(self.describe() + (f"\ngoing on after step {run.step}" if run.step else ""), flush=True)
        if cfg.eval.items and not run.step:
            run.metrics.write({"step": 0} | self.evaluate(0, every_set=True))
        if self.ranks.main:
            self.bar = tqdm(
                total=cfg.steps,
                initial=run.step,
                unit="step",
                desc=cfg.recipe,
                smoothing=0.1,
                dynamic_ncols=True,
            )
        self.leave_if_told(run.step)

    def after(self) -> None:
        """Save, write summary, curves and report, and print the table of before and after."""
        if self.last_saved < self.cfg.steps:
            self.save(self.cfg.steps)
        self.wait()
        if not self.ranks.main:
            return
        self.bar.close()
        folder = self.run.folder
        evaluated = [row for row in report.read_metrics(folder) if "eval/accuracy" in row]
        if evaluated:
            base, final = (
                {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}
                for row in (evaluated[0], evaluated[-1])
            )
            summary = {
                "base": base,
                "final": final,
                "steps": self.cfg.steps,
                "seconds": round(time.perf_counter() - self.started, 1),
            }
            # then `seconds` are those of the last start only
            summary |= {"resumed_after": self.run.step} if self.run.step else {}
            if self.run.step < self.cfg.steps or not (folder / "summary.json").exists():
                write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
            print("\n" + before_after(base, final, hook_of(self.cfg.task)) + "\n")
        for path in (
            *report.write_curves(folder),
            *report.write_report(folder),
            folder / "metrics.jsonl",
            checkpoint.complete(folder)[-1],
        ):
            print(f"  {path}")
        print(f"{time.perf_counter() - self.started:.0f} seconds")

    # ---- evaluation

    def evaluate(self, step: int, every_set: bool = False) -> dict:
        """Greedy accuracy on the held-out questions, as metrics. every_set: also the other sets, and the
        policy sampled at temperature 1."""
        # gathered once for all sets
        with fsdp.whole_weights(self.run.policy) as policy:
            return self.evaluate_plain(policy, step, every_set)

    def evaluate_plain(self, policy, step: int, every_set: bool) -> dict:
        """`evaluate`, of a policy that has all its weights."""
        cfg, run = self.cfg, self.run
        found = {}
        for name, items in run.heldout.items():
            if name != "heldout" and not every_set:
                continue
            prefix = "eval/" if name == "heldout" else f"eval/{name}/"
            for kind, temperature in (
                ("", 0.0),
                *((("sampled/", 1.0),) if every_set and name == "heldout" else ()),
            ):
                how = Asking(
                    cap=cfg.eval.cap or cfg.cap,
                    temperature=temperature,
                    seed=cfg.seed,
                    blind=cfg.blind,
                    measure=hook_of(cfg.task).measure,
                )
                share = (self.ranks.rank, self.ranks.size)
                answers = answer_all(policy, run.chat, items, how, share=share)
                if answers:
                    found |= {
                        f"{prefix}{kind}{key}": value for key, value in flat_scores(scores(answers)).items()
                    }
                if not kind and name == "heldout" and self.ranks.main:
                    self.show_heldout(step, items, answers)
        return found

    def show_heldout(self, step: int, items, answers) -> None:
        """A line of samples.jsonl for each of the few questions that the report follows."""
        by_uid = {group[0].uid: group[0] for group in answers}
        for example in items[:SHOWN_HELDOUT]:
            if (answer := by_uid.get(example.uid)) is not None:
                self.run.samples.write(
                    question_line("heldout", step, example)
                    | {
                        "completions": [
                            {
                                "text": answer.text,
                                "tokens": [self.run.chat.piece(t) for t in answer.tokens],
                                "reward": float(answer.correct) + float(answer.well_formed),
                                "parts": {
                                    "accuracy": float(answer.correct),
                                    "format": float(answer.well_formed),
                                },
                                "stopped": answer.stopped,
                            }
                        ]
                    }
                )

    # ---- steps

    def grpo_step(
        self,
        step: int,
        rollout,
        batch: TrainBatch,
        rows,
        *,
        logp,
        teaching,
        entropy,
        stats,
        norm,
        lr,
        skipped,
        clock,
        shown,
        places=(),
        drawn=(1, 0, 0),
    ) -> None:
        """Keep a step of GRPO, the `step`-th from 1. logp (B, C): log-probs of the `teaching` prompts'
        completions under the policy that sampled, by the training forward.

        places: where each group stands among those of all ranks.  drawn: the rollouts that the step needed,
        the groups that this rank left out of them, and those groups' tokens (grpo/dynamic.py).
        """
        gap = (rollout.logp.flatten(0, 1) - logp).abs().view(*rollout.tokens.shape)[teaching]
        taught = int(rollout.length[teaching].sum())
        sums = sum_over_ranks(
            torch.tensor(
                [
                    entropy,
                    float(gap.sum()),
                    taught,
                    int(rollout.length.sum()),
                    sum(len(p.tokens) for p in batch.sources),
                    skipped,
                    *drawn[1:],
                ]
            )
        )
        gap_max = max(gather_objects([float(gap.max()) if taught else 0.0]))
        stats, tokens = type(stats)(*sum_over_ranks(stats.vector())), max(float(sums[2]), 1.0)
        groups = gather_objects(rows)
        self.tokens += int(sums[3] + sums[4] + sums[7])
        # without a token to train on there is none, which is not 0
        entropy = float(sums[0]) / tokens if sums[2] else float("nan")
        row = (
            {"step": step}
            | step_metrics(groups)
            | {"entropy": entropy}
            | stats.averages()
            | {
                "grad_norm": norm,
                "learning_rate": lr,
                "num_tokens": self.tokens,
                "frac_skipped": float(sums[5]) / (float(sums[5]) + len(groups)),
                "sampling/logp_gap_mean": float(sums[1]) / tokens,
                "sampling/logp_gap_max": gap_max,
                "sampling/rounds": drawn[0],
                "sampling/frac_resampled": float(sums[6]) / (float(sums[6]) + len(groups)),
            }
        )
        row |= self.timings(clock) | self.guarded(step, row)
        if self.cfg.report.every and ((step - 1) % self.cfg.report.every == 0 or step == self.cfg.steps):
            reward, parts, texts, examples = shown
            loss, most = self.cfg.loss, self.cfg.report.prompts
            lines = shown_groups(
                step,
                batch,
                logp,
                rollout,
                reward,
                parts,
                texts,
                examples,
                self.run.chat.piece,
                prompts=most,
                loss={
                    "clip_low": loss.clip_low,
                    "clip_high": loss.clip_high,
                    "surrogate": loss.surrogate,
                    "kl": loss.kl,
                },
            )
            for _, line in sorted(gather_objects(list(zip(places, lines))), key=lambda pair: pair[0])[:most]:
                self.run.samples.write(line)
        self.finish(
            step,
            row,
            {
                "reward": row["reward"],
                "acc": row["accuracy"],
                "format": row.get("rewards/format/mean"),
                "len": row["completions/mean_length"],
                "cut": row["completions/clipped_ratio"],
                "gap": row["sampling/logp_gap_max"],
                "loss": row["loss"],
            },
        )

    def guarded(self, step: int, row: dict) -> dict:
        """What the guards find in the last steps, this one among them, as metrics; the first time that one
        holds, it is said."""
        self.recent.append(row)
        found = warnings.check(list(self.recent))
        for name, holds in found.items():
            if holds and name not in self.warned:
                self.warned.add(name)
                self.say(f"step {step}: {warnings.GUARDS[name].says}")
        return {f"guard/{name}": int(holds) for name, holds in found.items()}

    def sft_step(
        self, step: int, *, loss, weight, batch: TrainBatch, logp, examples, norm, lr, skipped, seconds
    ) -> None:
        """Keep a step of imitation. loss, weight: this rank's share of them."""
        weighted = sum_over_ranks(torch.stack([loss, weight]))
        sums = sum_over_ranks(
            torch.tensor(
                [
                    int(batch.length.sum()),
                    sum(len(p.tokens) for p in batch.sources),
                    skipped,
                    float(logp.sum()),
                ]
            )
        )
        self.tokens += int(sums[0] + sums[1])
        row = {
            "step": step,
            "loss": float(weighted[0] / weighted[1]),
            "nll": -float(sums[3] / sums[0]),
            "grad_norm": norm,
            "learning_rate": lr,
            "num_tokens": self.tokens,
            "skipped": int(sums[2]),
        }
        per_task: dict[str, list] = {}
        groups = zip(examples, logp.view(*batch.tokens.shape), batch.mask.view(*batch.tokens.shape))
        for task, nll in gather_objects(
            [(example.task, -float(logps.sum() / mask.sum())) for example, logps, mask in groups]
        ):
            per_task.setdefault(task, []).append(nll)
        row |= {f"nll/{task}": sum(values) / len(values) for task, values in sorted(per_task.items()) if task}
        row["step_time"] = seconds
        self.finish(step, row, {"nll": row["nll"], "grad": norm, "lr": lr})

    def finish(self, step: int, row: dict, shown: dict) -> None:
        """Evaluate and save where it is time to, write the line, move the bar. Raises CheckpointError if
        the last checkpoint could not be written."""
        cfg, last = self.cfg, step == self.cfg.steps
        if self.background:
            self.background.check()
        if cfg.eval.items and (last or (cfg.eval.every and step % cfg.eval.every == 0)):
            row |= self.evaluate(step, every_set=last)
            if self.ranks.main and "eval/accuracy" in row:
                self.bar.write(
                    f"step {step}: held-out accuracy {row['eval/accuracy']:.3f}, format "
                    f"{row['eval/format']:.3f}, mean length {row['eval/mean_length']:.1f}"
                )
        row["guard/nonfinite"] = int(bool(self.skipped))
        if self.skipped:
            row["guard/nonfinite_uids"], self.skipped = self.skipped, []
        self.run.metrics.write(row)
        if cfg.save.every and step % cfg.save.every == 0:
            self.save(step)
        if self.ranks.main:
            self.bar.set_postfix_str(
                "  ".join(f"{name} {value:.3g}" for name, value in shown.items() if value is not None),
                refresh=False,
            )
            self.bar.update()
        if not last:
            self.leave_if_told(step)

    def leave_if_told(self, step: int) -> None:
        """Save and raise Interrupted, on every rank, if a signal has told one of them to stop."""
        if number := self.interrupts.signal_on_any_rank():
            if step > max(self.last_saved, 0):
                self.save(step)
            self.wait()
            # or torchrun would end the others as soon as the first has left
            wait_for_all()
            if self.ranks.main:
                self.bar.close()
            raise Interrupted(
                number,
                step,
                self.cfg.steps,
                self.run.folder / "checkpoints" / f"step_{step:06d}" if step else None,
            )

    def skip(self, step: int, what: str, prompts) -> None:
        """A loss or gradient of the step after `step` is not finite, on every rank: let one update of a run
        pass, and keep its prompts' uids.

        Raises warnings.NonFinite the second time, and at the first step of all, where it is no accident.
        """
        uids = gather_objects([p.uid for p in prompts])
        if self.nonfinite or not step:
            raise warnings.NonFinite(what, prompts, step)
        self.nonfinite, self.skipped = uids, uids
        self.say(f"step {step + 1}: {warnings.NONFINITE} ({what})")

    def say(self, line: str) -> None:
        """A line for the person, once for all ranks."""
        if self.ranks.main:
            tqdm.write(line, file=sys.stderr)

    def save(self, step: int) -> None:
        """Write a checkpoint, or begin to."""
        checkpoint.save(
            self.run.folder,
            step,
            self.run.policy,
            self.run.optimizer,
            base=self.run.base,
            keep=self.cfg.save.keep,
            background=self.background,
        )
        self.last_saved = step

    def wait(self) -> None:
        """Until every checkpoint is written. Raises CheckpointError if one could not be."""
        if self.background:
            self.background.wait()

    @staticmethod
    def timings(clock: dict[str, float]) -> dict[str, float]:
        """Seconds of each phase, from the moments at which the phases ended."""
        names, moments = list(clock), list(clock.values())
        return {"step_time": moments[-1] - moments[0]} | {
            f"time/{name}": after - before for name, before, after in zip(names[1:], moments, moments[1:])
        }
