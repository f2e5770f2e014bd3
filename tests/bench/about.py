"""Where, when and with what a measurement was made."""

import datetime
import platform
import subprocess
from pathlib import Path

import torch


def about() -> dict[str, str]:
    """Date, commit (with "+ changes" where the tree has any), machine and versions, for the record beside
    a result."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, check=False
        ).stdout.strip()

    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} threads on {cpu}"
    )
    changed = " + changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD") + changed,
        "machine": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
