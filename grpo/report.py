"""Write curves.png and report.html of a run, finished or not:    python -m grpo.report RUN"""

import sys
from pathlib import Path

from grpo.monitor.report import write_curves, write_report


def main(argv: list[str]) -> int:
    """Write both files, and print their paths. -> exit status."""
    if len(argv) != 1:
        print("usage: python -m grpo.report RUN, the folder of a run", file=sys.stderr)
        return 2
    try:
        if not any((Path(argv[0]) / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
            raise ValueError(f"{argv[0]} holds no run: it has neither config.yaml nor metrics.jsonl")
        print(*write_curves(argv[0]), *write_report(argv[0]), sep="\n")
    except (ValueError, OSError) as error:
        print(f"grpo.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
