"""What a run writes about its steps: metrics.jsonl, samples.jsonl, progress, warnings, and loggers."""

import math
import sys
import time
from collections import deque

import torch
from tqdm import tqdm

from data.sources.table import hook_of
from grpo.batch import Batch
from grpo.gradient import UpdateStats
from grpo.monitor import report, warnings
from grpo.monitor.loggers import Loggers
from grpo.monitor.step_metrics import completion_rows, shown_groups, step_metrics, whole_groups
from grpo.objective import LossStats
from grpo.optim import NonFinite
from grpo.parallel.ranks import gather_objects, sum_over_ranks
from grpo.timing import take_times

# the progress bar: name -> metric
BAR = {
    "reward": "reward",
    "acc": "accuracy",
    "format": "rewards/format/mean",
    "len": "completions/mean_length",
    "cut": "completions/clipped_ratio",
    "gap": "sampling/logp_gap_max",
    "loss": "loss",
}
BAR_SFT = {"nll": "nll", "grad": "grad_norm", "lr": "learning_rate"}


class Recorder:
    """Makes a step's row of metrics.jsonl and its lines of samples.jsonl, and prints warnings.

    tokens: prompt and completion tokens so far, of all ranks.  nonfinite: uids of the prompts of the one
    update of the run that was skipped because it was not finite.
    """

    def __init__(self, cfg, run, ranks):
        self.cfg = cfg
        self.run = run
        self.ranks = ranks
        self.measure = hook_of(cfg.task).measure
        self.bar: tqdm | None = None
        self.loggers: Loggers | None = None
        self.tokens = 0
        # the first and the last rows of metrics, for the warnings
        self.first: list[dict] = []
        self.recent: deque[dict] = deque(maxlen=warnings.LONGEST)
        # warnings that have been printed
        self.warned: set[str] = set()
        self.nonfinite: list[str] = []
        # updates that the optimizer had skipped before this step
        self.skipped_before = 0
        self.step_began = time.perf_counter()

    def resume(self) -> None:
        """Read what earlier starts of this run have recorded, and start the loggers of the setting `log`. All
        ranks call it together. Raises ValueError if a logger cannot start."""
        rows = report.read_metrics(self.run.folder) if self.ranks.main else []
        self.tokens = next((row["num_tokens"] for row in reversed(rows) if "num_tokens" in row), 0)
        rewarded = [row for row in rows if "reward" in row]
        self.first = rewarded[: warnings.FIRST]
        self.recent.extend(rewarded)
        self.warned = {warning["name"] for warning in warnings.warnings(rows)}
        # only rank 0 has read them
        self.nonfinite = gather_objects([uid for row in rows for uid in row.get("guard/nonfinite_uids", ())])
        if self.ranks.main and self.cfg.log:
            self.loggers = Loggers(self.cfg, self.run, self.warn)

    def begin_step(self, step: int) -> None:
        """Start the clocks of a step."""
        take_times()
        self.step_began = time.perf_counter()

    def grpo_row(self, step: int, batch: Batch, stats: UpdateStats, grad_norm: float) -> dict:
        """The metrics of step `step` (from 1) of GRPO; writes the step's samples. Raises NonFinite."""
        times = {"step_time": time.perf_counter() - self.step_began}
        times |= {f"time/{phase}": seconds for phase, seconds in take_times().items()}
        nonfinite = self.nonfinite_row(step, batch, stats, grad_norm)
        rows = completion_rows(batch, self.measure)
        groups = whole_groups(gather_objects(list(zip(batch.share.places, rows))))
        row = {"step": step} | step_metrics(groups) | self.update_metrics(batch, stats)
        row |= {"grad_norm": grad_norm, "learning_rate": self.run.optimizer.lr, "num_tokens": self.tokens}
        row |= self.draw_metrics(batch, len(groups)) | times
        row |= self.guard_metrics(step, row) | nonfinite
        report = self.cfg.report
        if report.every and ((step - 1) % report.every == 0 or step == self.cfg.steps):
            self.write_samples(step, batch)
        return row

    def update_metrics(self, batch: Batch, stats: UpdateStats) -> dict:
        """Averages over the tokens that the update learned from, over all ranks; counts the step's tokens."""
        teaching = batch.teaching
        gap = (batch.rollout.logp.flatten(0, 1) - batch.logp).abs().view(batch.tokens.shape)[teaching]
        taught = int(batch.length[teaching].sum())
        answered = int(batch.length.sum())
        firsts = zip(batch.prompts, batch.share.first_here)
        asked = sum(len(prompt.tokens) for prompt, first in firsts if first)
        mine = [stats.entropy, float(gap.sum()), taught, answered, asked, batch.dropped_tokens]
        entropy, gap_sum, tokens, *written = sum_over_ranks(torch.tensor(mine)).tolist()
        self.tokens += int(sum(written))
        gap_max = max(gather_objects([float(gap.max()) if taught else 0.0]))
        averages = LossStats(*sum_over_ranks(stats.loss.vector())).averages()
        # without a token to train on there is no entropy, which is not an entropy of 0
        return averages | {
            "entropy": entropy / tokens if tokens else math.nan,
            "sampling/logp_gap_mean": gap_sum / max(tokens, 1.0),
            "sampling/logp_gap_max": gap_max,
        }

    def draw_metrics(self, batch: Batch, count: int) -> dict:
        """What was asked and not learned from. count: the groups of all ranks."""
        skipped = int(sum_over_ranks(torch.tensor(batch.skipped)))
        return {
            "frac_skipped": skipped / (skipped + count),
            "sampling/rounds": sum(drawn > 0 for drawn in batch.share.drawn),
            "sampling/frac_resampled": batch.dropped / (batch.dropped + count),
        }

    def sft_row(self, step: int, batch: Batch, stats: UpdateStats, grad_norm: float) -> dict:
        """The metrics of a step of imitation. Raises NonFinite."""
        seconds = time.perf_counter() - self.step_began
        nonfinite = self.nonfinite_row(step, batch, stats, grad_norm)
        loss, weight = sum_over_ranks(torch.stack([stats.loss.loss, stats.loss.weight]))
        asked = sum(len(prompt.tokens) for prompt in batch.prompts)
        counts = [int(batch.length.sum()), asked, batch.skipped, float(batch.logp.sum())]
        sums = sum_over_ranks(torch.tensor(counts))
        self.tokens += int(sums[0] + sums[1])
        row = {
            "step": step,
            "loss": float(loss / weight),
            "nll": -float(sums[3] / sums[0]),
            "grad_norm": grad_norm,
            "learning_rate": self.run.optimizer.lr,
            "num_tokens": self.tokens,
            "skipped": int(sums[2]),
        }
        shape = batch.tokens.shape
        groups = zip(batch.questions, batch.logp.view(shape), batch.mask.view(shape))
        mine = [(question.task, -float(logp.sum() / mask.sum())) for question, logp, mask in groups]
        per_task: dict[str, list[float]] = {}
        for task, nll in gather_objects(mine):
            per_task.setdefault(task, []).append(nll)
        row |= {f"nll/{task}": sum(nlls) / len(nlls) for task, nlls in sorted(per_task.items()) if task}
        return row | {"step_time": seconds} | nonfinite

    def nonfinite_row(self, step: int, batch: Batch, stats: UpdateStats, grad_norm: float) -> dict:
        """Whether an update of this step was skipped because it was not finite, as metrics. Raises NonFinite
        the second time in a run, and at the first step of a run, where it is no accident."""
        skipped = self.run.optimizer.skipped - self.skipped_before
        self.skipped_before += skipped
        if not skipped:
            return {"guard/nonfinite": 0}
        firsts = zip(batch.prompts, batch.share.first_here)
        uids = gather_objects([prompt.uid for prompt, first in firsts if first])
        what = f"the loss is {float(sum_over_ranks(stats.loss.loss))} and the gradient's norm {grad_norm}"
        if self.nonfinite or skipped > 1 or step == 1:
            raise NonFinite(what, batch.prompts, step - 1)
        self.nonfinite = uids
        self.warn(f"step {step}: {warnings.NONFINITE} ({what})")
        return {"guard/nonfinite": 1, "guard/nonfinite_uids": uids}

    def guard_metrics(self, step: int, row: dict) -> dict:
        """Which warnings hold in the last steps, this one included, as metrics. Each is printed once."""
        self.recent.append(row)
        self.first = [*self.first, row][: warnings.FIRST]
        found = warnings.check(list(self.recent), self.first)
        for name, holds in found.items():
            if holds and name not in self.warned:
                self.warned.add(name)
                said = warnings.GUARDS[name].message(list(self.recent))
                self.warn(f"step {step}: {said} (docs/troubleshooting.md, guard/{name})")
        return {f"guard/{name}": int(holds) for name, holds in found.items()}

    def write_samples(self, step: int, batch: Batch) -> None:
        """Write the first groups of a step, over all ranks, to samples.jsonl, token by token."""
        most = self.cfg.report.prompts
        lines = shown_groups(step, batch, self.cfg.loss, self.run.chat.piece, most)
        placed = gather_objects(list(zip(batch.share.places, ([line] for line in lines))))
        for first, *others in whole_groups(placed)[:most]:
            first["completions"] += [row for line in others for row in line["completions"]]
            self.run.samples.write(first)

    def write(self, step: int, row: dict) -> None:
        """Write a row of metrics.jsonl, and print its evaluation if it has one."""
        self.run.metrics.write(row)
        if self.ranks.main and "eval/accuracy" in row:
            tqdm.write(
                f"step {step}: held-out accuracy {row['eval/accuracy']:.3f}, format "
                f"{row['eval/format']:.3f}, mean length {row['eval/mean_length']:.1f}"
            )

    def warn(self, line: str) -> None:
        """Print a line on stderr, once for all ranks."""
        if self.ranks.main:
            tqdm.write(line, file=sys.stderr)

    def open_bar(self) -> None:
        """Show the progress bar, on rank 0, if stderr is a terminal. In a file it would be one long line."""
        if self.ranks.main and sys.stderr.isatty():
            cfg = self.cfg
            look = dict(unit="step", smoothing=0.1, dynamic_ncols=True)
            self.bar = tqdm(total=cfg.steps, initial=self.run.step, desc=cfg.name, **look)

    def show_progress(self, row: dict) -> None:
        """One step more, with the metrics of BAR: in the bar, or as a line `step 3/60 reward=1.2 ...`."""
        if not self.ranks.main:
            return
        names = BAR if "reward" in row else BAR_SFT
        shown = {name: f"{row[key]:.3g}" for name, key in names.items() if row.get(key) is not None}
        if self.bar is not None:
            self.bar.set_postfix_str("  ".join(map(" ".join, shown.items())), refresh=False)
            self.bar.update()
            return
        shown["seconds"] = f"{row['step_time']:.3g}"
        line = " ".join(map("=".join, shown.items()))
        print(f"step {row['step']}/{self.cfg.steps} {line}", file=sys.stderr, flush=True)

    def close_bar(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()

    def close_loggers(self, failed: bool) -> None:
        """End what is logged. failed: the run has not come to its last step."""
        if self.loggers is not None:
            self.loggers.close(failed)
