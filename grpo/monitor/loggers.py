"""TensorBoard, Weights & Biases and trackio: they get the rows of metrics.jsonl, and a few groups with their
pictures, as soon as those are written.

`log: [tensorboard, wandb, trackio]` chooses them, and each needs its library (pip install -e ".[wandb]").
A resumed run continues the same logged run. A logger that fails is left out, with one line; the run goes on.
"""

import base64
import importlib
import importlib.util
import io
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from grpo.storage.atomic import write_whole

# completions shown with a picture
MOST_COMPLETIONS = 4
MOST_TEXT = 600


class Logger:
    """What a library is asked to do. Steps grow."""

    def numbers(self, step: int, row: dict[str, float]) -> None:
        """Log the metrics of a step."""

    def picture(self, step: int, name: str, picture: Image.Image, text: str) -> None:
        """Log a picture with a text below it."""

    def close(self, failed: bool) -> None:
        """Write what is waiting. failed: the run ends before its last step."""


class TensorBoard(Logger):
    """Event files in RUN/tensorboard. What an earlier start logged after the checkpoint is hidden."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    def numbers(self, step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, step: int, name: str, picture: Image.Image, text: str) -> None:
        import numpy as np

        self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        # Markdown: an indented text stays as it is
        self.writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class Wandb(Logger):
    """Weights & Biases. WANDB_PROJECT names the project, WANDB_MODE=offline sends nothing."""

    package = "wandb"

    def __init__(self, folder: Path, settings: dict[str, Any], id: str):
        self.module = self.load()
        project = os.environ.get(f"{self.package.upper()}_PROJECT") or "glimpse"
        same = {"project": project, "config": settings, "resume": "allow"}
        name = settings.get("name") or folder.name
        self.run = self.module.init(**same, **self.named(name, folder, id))

    def load(self) -> Any:
        """The library."""
        return importlib.import_module("wandb")

    def named(self, name: str, folder: Path, id: str) -> dict[str, Any]:
        """How the library finds the same run again."""
        return {"name": name, "id": id, "dir": str(folder)}

    def numbers(self, step: int, row: dict[str, float]) -> None:
        self.module.log(row, step=step)

    def picture(self, step: int, name: str, picture: Image.Image, text: str) -> None:
        self.module.log({name: self.module.Image(picture, caption=text)}, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio(Wandb):
    """trackio has the same functions, and knows a run by its name. TRACKIO_PROJECT names the project."""

    package = "trackio"

    def load(self) -> Any:
        return importlib.import_module("trackio")

    def named(self, name: str, folder: Path, id: str) -> dict[str, Any]:
        return {"name": f"{name}-{id}"}

    def close(self, failed: bool) -> None:
        self.module.finish()


def check(names: Sequence[str]) -> None:
    """Raise ValueError if the library of a logger is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f'log: {name} is not installed; pip install -e ".[{name}]", or leave it out')


class Loggers:
    """All loggers of a run. They follow its metrics.jsonl and samples.jsonl.  warn: prints a line."""

    def __init__(self, cfg, run, warn: Callable[[str], None]):
        self.warn = warn
        known = known_run(run.folder, run.metrics.had)
        # steps that W&B and trackio have from earlier starts
        self.had = known["step"]
        self.open: dict[str, Logger] = {}
        self.place: Counter[tuple[str, int]] = Counter()
        for name in dict.fromkeys(cfg.log):
            try:
                if name == "tensorboard":
                    self.open[name] = TensorBoard(run.folder, run.step)
                else:
                    kind = {"wandb": Wandb, "trackio": Trackio}[name]
                    self.open[name] = kind(run.folder, cfg.to_dict(), known["id"])
            # a library of others: its errors have no common class
            except Exception as error:
                raise ValueError(f"log: {name} cannot start: {error}") from error
        run.metrics.followers.append(self.row)
        run.samples.followers.append(self.group)

    def row(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl: its numbers, under their names."""
        numbers = {key: value for key, value in row.items() if type(value) in (int, float) and key != "step"}
        self.each(row["step"], lambda logger: logger.numbers(row["step"], numbers))

    def group(self, line: dict[str, Any]) -> None:
        """A line of samples.jsonl: its picture, with question and completions below."""
        if not line["picture"]:
            return
        picture = Image.open(io.BytesIO(base64.b64decode(line["picture"].partition(",")[2])))
        # the n-th line of its kind in this step
        self.place[line["kind"], line["step"]] += 1
        name = f"{line['kind']}/{self.place[line['kind'], line['step']]}"
        self.each(line["step"], lambda logger: logger.picture(line["step"], name, picture, caption(line)))

    def each(self, step: int, work: Callable[[Logger], None]) -> None:
        """Call `work` with each logger that has not had this step. One that raises gets nothing more."""
        for name, logger in list(self.open.items()):
            if name != "tensorboard" and step <= self.had:
                continue
            try:
                work(logger)
            except Exception as error:
                del self.open[name]
                self.warn(f"log: {name} failed, and gets nothing more: {error}")

    def close(self, failed: bool) -> None:
        """Close each logger."""
        self.each(self.had + 1, lambda logger: logger.close(failed))


def known_run(folder: Path, had: int) -> dict[str, Any]:
    """logged.json of a run folder, made if it is not there: {"id": of the logged run, "step": the last step
    that earlier starts have logged}.  had: the last step in metrics.jsonl before it was cut back."""
    path = folder / "logged.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {"id": secrets.token_hex(4), "step": -1}
    known["step"] = max(known["step"], had)
    write_whole(path, json.dumps(known) + "\n")
    return known


def caption(line: dict[str, Any]) -> str:
    """Question, right answer, and the first completions with their rewards, as plain text."""
    choices = [f"  {choice}" for choice in line["choices"]]
    found = [line["question"], *choices, f"right: {line['answer']}"]
    for completion in line["completions"][:MOST_COMPLETIONS]:
        found += ["", f"reward {completion['reward']:g}: {completion['text'][:MOST_TEXT]}"]
    return "\n".join(found)
