"""How much memory does a large parquet file take?    python tests/bench/stream.py [GIGABYTES]
[ROWS_PER_GROUP]

Writes a file of GIGABYTES (default 2) into a temporary folder, with pictures that do not compress. A row
group has ROWS_PER_GROUP rows (default 100, as on the hub; 0: all in one group, the worst case). Then reads
every row in order and a thousand at random. Another process writes the file.

Prints how much the process grew at its peak, and the CPU time of reading.
"""

import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# bytes; a photograph of 640 x 480 pixels has about as many
PICTURE_BYTES = 100_000


def write(file: Path, rows: int, group: int) -> None:
    """SAT's layout; random bytes in the place of pictures, because none is decoded here."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet

    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema(
        [
            ("image_bytes", pyarrow.list_(picture)),
            ("question", pyarrow.string()),
            ("answers", pyarrow.list_(pyarrow.string())),
            ("question_type", pyarrow.string()),
            ("correct_answer", pyarrow.string()),
        ]
    )
    random_bytes = np.random.default_rng(0)
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, rows, group):
            numbers = range(start, min(start + group, rows))
            writer.write_table(
                pyarrow.Table.from_pylist(
                    [
                        {
                            "image_bytes": [{"bytes": random_bytes.bytes(PICTURE_BYTES), "path": f"{i}.png"}],
                            "question": f"Where is the cup, {i}?",
                            "answers": ["left", "right"],
                            "question_type": "other",
                            "correct_answer": "left",
                        }
                        for i in numbers
                    ],
                    schema=schema,
                ),
                row_group_size=group,
            )


def peak() -> float:
    """The largest the process has been, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(gigabytes: float = 2, group: int = 100) -> float:
    """-> the growth in MB."""
    from data.sources.table import SOURCES

    with tempfile.TemporaryDirectory(prefix="glimpse-stream-") as folder:
        file, rows = Path(folder) / "SAT_train.parquet", int(gigabytes * 1e9 / PICTURE_BYTES)
        subprocess.run(
            [sys.executable, __file__, "--write", str(file), str(rows), str(group or rows)], check=True
        )
        small = Path(folder) / "small.parquet"
        subprocess.run([sys.executable, __file__, "--write", str(small), "20", "10"], check=True)
        # libraries are loaded before counting begins
        assert len(SOURCES["sat"](small, "all", None, 0)[3].pictures[0]) == PICTURE_BYTES
        before, start = peak(), time.process_time()
        examples = SOURCES["sat"](file, "all", None, 0)
        print(
            f"{file.stat().st_size / 1e9:.2f} GB, {len(examples)} rows; opened in "
            f"{time.process_time() - start:.2f} s, {peak() - before:+.0f} MB",
            flush=True,
        )
        start = time.process_time()
        for index in range(len(examples)):
            assert len(examples[index].pictures[0]) == PICTURE_BYTES
        print(
            f"every row in order: {1e3 * (time.process_time() - start) / rows:.2f} ms a row, "
            f"{peak() - before:+.0f} MB",
            flush=True,
        )
        start = time.process_time()
        for index in random.Random(0).choices(range(rows), k=1000):
            assert f", {index}?" in examples[index].question
        print(
            f"a thousand at random: {time.process_time() - start:.2f} ms a row, {peak() - before:+.0f} MB",
            flush=True,
        )
        start = time.process_time()
        heldout = len(SOURCES["sat"](file, "heldout", None, 0))
        print(
            f"cut into parts by picture ({heldout} held out): {time.process_time() - start:.1f} s, "
            f"{peak() - before:+.0f} MB",
            flush=True,
        )
        return peak() - before


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        print(f"peak growth {main(*(kind(value) for kind, value in zip((float, int), sys.argv[1:]))):.0f} MB")
