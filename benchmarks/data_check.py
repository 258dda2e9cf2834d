"""Benchmark of `llava data check`: time and memory, and the cost of ten times the rows.

    python -m benchmarks.data_check                  # 60,000 rows (about 88 MB), each with its own image
    python -m benchmarks.data_check --times 10       # the same without images, and ten times the rows: bytes per row
    python -m benchmarks.data_check --times 10 --against True       # the same, each compared with a second file

Rows, texts and images (64 x 64 gray PNG) are made here, in a temporary folder. Wall time and largest resident memory of
each run are measured in a process; the last line is machine-readable.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import machine, say
from llava.utils.cli import Parser, parse_bool

NUM_ROWS = 60_000
DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
WORDS = (
    "the of in and a is are with image shows lesion mass left right upper lower lung liver kidney brain tissue cells "
    "density signal contrast area region border suggests possible consistent normal small large dark bright"
)

_CHILD = """
import resource, sys, time
from llava.data.check.cli import main
start = time.perf_counter()
try:
    main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
else:
    status = 0
used = resource.getrusage(resource.RUSAGE_SELF)
busy = used.ru_utime + used.ru_stime
sys.stderr.write(f"\\nMEASURED {status} {time.perf_counter() - start:.2f} {busy:.2f} {used.ru_maxrss}\\n")
"""


def write_rows(path: Path, num_rows: int, *, first: int = 0, seed: int = 0) -> None:
    """Write rows of 1,450 bytes: an image, five flags, about three questions with long answers."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(first, first + num_rows):
            row = {"id": f"{number:08d}_F1", "image": f"{number // 1000:04d}/{number:08d}_F1.png"}
            flags = {name: number % 5 == place for place, name in enumerate(DOMAINS)}
            turns = []
            for question in range(draw.choice((2, 3, 3, 4))):
                front = "<image>\n" if question == 0 else ""
                turns.append({"from": "human", "value": front + _sentence(draw, 9, "?")})
                turns.append({"from": "gpt", "value": _sentence(draw, 52, ".")})
            text = json.dumps({**row, "domain": flags, "conversations": turns}, indent=1)
            stream.write(("[" if number == first else ",\n") + text)
        stream.write("]\n")


def _sentence(draw: random.Random, num_words: int, end: str) -> str:
    return " ".join(draw.choices(WORDS.split(), k=num_words)).capitalize() + end


def write_images(folder: Path, num_rows: int) -> None:
    """Write a distinct image for every row."""
    draw = np.random.default_rng(0)
    for number in range(num_rows):
        if number % 1000 == 0:
            (folder / f"{number // 1000:04d}").mkdir(parents=True)
        spots = Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8))
        buffer = BytesIO()
        spots.resize((64, 64), Image.Resampling.BILINEAR).save(buffer, format="PNG", compress_level=1)
        (folder / f"{number // 1000:04d}" / f"{number:08d}_F1.png").write_bytes(buffer.getvalue())


def measure(argv: Sequence[str]) -> tuple[float, float, float]:
    """Return seconds, processor seconds and MiB (largest resident memory) of a check in a process.

    Raises:
        RuntimeError: the check did not end with status 0.
    """
    command = [sys.executable, "-c", _CHILD, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    marks = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("MEASURED")]
    if done.returncode or not marks or marks[0][0] != "0":
        raise RuntimeError(f"llava data check failed: {done.stdout[-2000:]} {done.stderr[-2000:]}")
    sys.stdout.write(done.stdout)
    return float(marks[0][1]), float(marks[0][2]), int(marks[0][3]) / 1024


def check(folder: Path, name: str, num_rows: int, *, images: bool, against: bool) -> tuple[float, float, float]:
    """Make data in a folder, check it, and print the cost; return the values of `measure`."""
    started, place = time.perf_counter(), folder / name
    place.mkdir()
    write_rows(place / "rows.json", num_rows)
    argv = [str(place / "rows.json")]
    if images:
        write_images(place / "images", num_rows)
        argv += ["--images", str(place / "images")]
    if against:
        write_rows(place / "test.json", num_rows, first=num_rows, seed=1)
        argv += ["--against", str(place / "test.json")]
    megabytes = (place / "rows.json").stat().st_size / 1e6
    say(f"made {num_rows} rows, {megabytes:.0f} MB, in {time.perf_counter() - started:.0f} s")
    seconds, busy, peak = measure(argv)
    say(f"{num_rows} rows: {seconds:.1f} s, {busy:.1f} s of processor time, {peak:.0f} MiB")
    return seconds, busy, peak


def main(argv: Sequence[str] | None = None) -> None:
    """Make the data, check it, and report."""
    parser = Parser(prog="python -m benchmarks.data_check", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=NUM_ROWS, help="rows of the small file")
    parser.add_argument("--times", type=int, default=1, help="also check a file with this many times the rows")
    # The former name is parsed, but hidden from the help text.
    parser.add_argument("--pictures", dest="images", type=parse_bool, help=argparse.SUPPRESS)
    parser.add_argument("--images", type=parse_bool, help="give every row an image; default: only without --times")
    parser.add_switch("--against", help="compare with a second file of the same number of rows")
    args = parser.parse_args(argv)
    options = {"images": args.times == 1 if args.images is None else args.images, "against": args.against}
    say(machine())
    with tempfile.TemporaryDirectory() as temporary:
        seconds, busy, peak = check(Path(temporary), "small", args.rows, **options)
        line = f"MEASURED rows={args.rows} seconds={seconds:.1f} processor_seconds={busy:.1f} mib={peak:.0f}"
        if args.times > 1:
            count = args.rows * args.times
            more_seconds, _, more = check(Path(temporary), "large", count, **options)
            num_files = 2 if args.against else 1  # both have the same number of rows
            each = (more - peak) * 2**20 / (count - args.rows) / num_files
            say(f"{each:.0f} more bytes per row")
            line += f" times={args.times} seconds_more={more_seconds:.1f} bytes_a_row={each:.0f}"
        say(line)


if __name__ == "__main__":
    main()
