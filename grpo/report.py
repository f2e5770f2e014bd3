"""Write curves.png and report.html of a run, finished or not:    python -m grpo.report RUN"""

import sys
from pathlib import Path

from grpo.monitor.report import write_curves, write_report

if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m grpo.report RUN, the folder of a run")
    print(*write_curves(sys.argv[1]), *write_report(sys.argv[1]), sep="\n")
