"""`llava preferences convert`: preference pairs of any known layout, written in another.

    rows --read_preferences--> Preference... --PREFERENCE_WRITERS[layout]--> rows

Command:
    llava preferences convert pairs.json trl.jsonl --to trl
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava.data.preference_formats import PREFERENCE_WRITERS
from llava.data.quarantine import Quarantine, bad_row
from llava.errors import DataError
from llava.samples import Preference, sample_label
from llava.utils import log
from llava.utils.cli import Parser
from llava.utils.config_file import with_config
from llava.utils.files import refuse_overwriting
from llava.utils.jsonl import file_text, open_atomic
from llava.utils.terminal import write_out


def converted(
    pairs: Sequence[Preference], layout: str, *, skip_bad: bool = False, quarantine: Quarantine | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the row of each pair in a layout of `PREFERENCE_WRITERS`.

    Raises:
        DataError: the layout cannot express a pair and `skip_bad` is off; the message names its file and row.
    """
    for pair in pairs:
        try:
            row = PREFERENCE_WRITERS[layout](pair)
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{sample_label(pair)}: {error}") from error
            if quarantine is not None:
                quarantine.add([bad_row(pair, str(error))])
        else:
            yield row


def make_parser() -> Parser:
    """Return the parser of `llava preferences convert`."""
    parser = Parser(
        prog="llava preferences convert", description="Write preference pairs of any known layout in another."
    )
    parser.add_argument("data", type=Path, help="pairs: a JSON array or JSON lines; the layout is found by its fields")
    parser.add_argument("out", type=Path, help="file to write: JSON lines if its name ends with .jsonl, else an array")
    parser.add_argument(
        "--to",
        required=True,
        choices=list(PREFERENCE_WRITERS),
        help="published (STLLaVA-Med), judge (its judge's lines), trl, llama-factory or ms-swift",
    )
    parser.add_switch("--skip-bad", help="skip unusable rows and list them in OUT.skipped.jsonl instead of stopping")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava preferences convert`."""
    log.setup_logging()
    parser = make_parser()
    args = parser.parse_args(with_config(parser, argv))
    skipped = args.out.with_name(f"{args.out.name}.skipped.jsonl")
    refuse_overwriting([args.data], {"out": args.out, "skip_bad": skipped if args.skip_bad else None})
    from llava.data.preference import read_preferences  # imports torch, for which --help does not wait

    quarantine = Quarantine(skipped if args.skip_bad else None)
    pairs = read_preferences(args.data, skip_bad=args.skip_bad, quarantine=quarantine)
    rows = list(converted(pairs, args.to, skip_bad=args.skip_bad, quarantine=quarantine))
    if not rows:
        raise DataError(f"{args.data}: no row can be written in the layout {args.to}; the first: {quarantine.rows[0]}")
    with open_atomic(args.out) as stream:
        stream.writelines(file_text(rows, lines=args.out.suffix == ".jsonl"))
    listed = f", {len(quarantine)} skipped, listed in {skipped}" if len(quarantine) else ""
    write_out(f"{len(rows)} pairs -> {args.out}{listed}\n")
