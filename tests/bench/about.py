"""Where, when and with what a measurement was made."""

import datetime
import hashlib
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def weights_hash(folder: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a model's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def base_hash() -> str:
    """The first 12 of the built-in base."""
    return weights_hash(ROOT / "models/tiny")[:12]


def about() -> dict[str, str]:
    """Date, commit (with "+ changes" where the tree has any), machine, versions and the built-in base, for
    the record beside a result."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=False
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
        "base": base_hash(),
    }
