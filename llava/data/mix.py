"""A mixture written out as one data file: every row once, with its source and licence.

mixture.yaml --load_mixture--> Samples --pictures relative to one folder--> rows.json

Command:
    llava data mix mixture.yaml --out rows.json
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llava.data.mixture import load_mixture, read_mixture
from llava.errors import ConfigError, DataError
from llava.samples import Sample, name_of, to_row
from llava.utils.cli import Parser
from llava.utils.files import refuse_overwriting
from llava.utils.jsonl import write_json

UNKNOWN = "unknown"


def relative(sample: Sample, folder: Path) -> Sample:
    """Return the sample with its pictures named relative to a folder.

    Raises:
        DataError: a picture lies outside.
    """
    outside = [image for image in sample.images if not Path(image).is_relative_to(folder)]
    if outside:
        raise DataError(f"{name_of(sample)}: image {outside[0]} lies outside {folder}; give --root a folder above it")
    return replace(sample, images=tuple(Path(image).relative_to(folder).as_posix() for image in sample.images))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of `llava data mix`."""
    parser = Parser(prog="llava data mix", description="Write the rows of a mixture as one data file.")
    parser.add_argument("mixture", type=Path, help="YAML file with `sources`, see docs/data.md")
    parser.add_argument("--out", type=Path, required=True, help="data file to write: a JSON array in LLaVA format")
    parser.add_argument(
        "--root", type=Path, help="folder that image names will be relative to; default: the mixture's own"
    )
    args = parser.parse_args(argv)
    mixture = read_mixture(args.mixture)
    if mixture.stream:
        raise ConfigError(f"{args.mixture}: a stream is not written as one file; leave `stream: true` out")
    refuse_overwriting([args.mixture, *(source.path for source in mixture.sources)], {"out": args.out})
    folder = (args.root or args.mixture.parent).resolve()
    samples = [relative(sample, folder) for sample in load_mixture(mixture.sources)]
    write_json(args.out, [to_row(sample) for sample in samples])
    counts = Counter((str(sample.meta["source"]), str(sample.meta.get("licence", UNKNOWN))) for sample in samples)
    lines = [f"{count:>8}  {name}  (licence: {licence})" for (name, licence), count in counts.items()]
    sys.stdout.write("\n".join([*lines, f"{len(samples)} rows -> {args.out}"]) + "\n")
