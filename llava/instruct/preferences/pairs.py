"""`llava preferences pairs`: judgments to preference rows of any layout.

judgments.jsonl --preferred, rejected--> Preference --PREFERENCE_WRITERS[layout]--> pairs.jsonl

Command:
    llava preferences pairs judgments.jsonl --out pairs.json
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.data.preference_formats import PREFERENCE_WRITERS
from llava.errors import DataError
from llava.instruct.preferences.agreement import judged_pairs, judged_report, report_text
from llava.instruct.preferences.judges import DEFAULT_MARGINS
from llava.instruct.preferences.rows import Answered, read_answered
from llava.instruct.preferences.verdicts import Thresholds, verdict_of
from llava.samples import Conversation, Preference, Turn
from llava.utils import log
from llava.utils.cli import Parser
from llava.utils.config_file import with_config
from llava.utils.files import refuse_overwriting
from llava.utils.jsonl import file_text, open_atomic, write_json
from llava.utils.terminal import write_out


def read_judged(path: str | Path) -> list[Answered]:
    """Return the judged rows of a file.

    Raises:
        DataError: a row has no judgment; the message names file and row.
    """
    judged = read_answered(path)
    for number, one in enumerate(judged):
        judgment = one.row.get("judgment")
        if not isinstance(judgment, Mapping) or not {"by", "failure", "preferred", "rejected"} <= judgment.keys():
            raise DataError(f"{path}, row {number}: no judgment; write the file with `llava preferences judge`")
        places = [judgment["preferred"], judgment["rejected"]]
        if any(place is not None and not (type(place) is int and 0 <= place < len(one.answers)) for place in places):
            raise DataError(f"{path}, row {number}: 'preferred' and 'rejected' must be places of answers, got {places}")
    return judged


def judged_again(one: Answered, *, min_margin: float | None, min_score: float | None) -> Answered:
    """Return a judged row under other thresholds; None keeps the stored verdict's."""
    if min_margin is None and min_score is None:
        return one
    judgment = one.row["judgment"]
    margin = DEFAULT_MARGINS.get(judgment["by"], 0.0) if min_margin is None else min_margin
    verdict = verdict_of(judgment, Thresholds(margin, min_score))
    row = {**one.row, "judgment": {**judgment, **verdict.fields()}}
    return Answered(one.asked, one.answers, one.unfinished, row)


def preference_of(one: Answered, preferred: int, rejected: int, *, layout: str) -> Preference:
    """Return the pair of a judged row; its judgment without replies is kept in the field `judgment`."""
    asked = one.asked.shown
    if layout == "judge" and len(one.asked.images) < 2:
        asked = one.asked.text.replace(IMAGE_TOKEN, "").strip()  # such a line has no placeholder
    sides = [Conversation((Turn("human", asked), Turn("gpt", one.answers[place]))) for place in (preferred, rejected)]
    meta = {"key": one.asked.key, "judgment": _without_replies(one.row["judgment"])}
    return Preference(one.asked.id, sides[0], sides[1], one.asked.images, meta=meta)


def _without_replies(judgment: Mapping[str, Any]) -> dict[str, Any]:
    """Return a judgment without the texts of the judge, which repeat those of the answers."""
    kept = {name: value for name, value in judgment.items() if name not in ("comparisons", "failure")}
    if "comparisons" in judgment:
        kept["comparisons"] = [
            {
                "answers": one["answers"],
                "orders": {order: {"scores": found["scores"]} for order, found in one["orders"].items()},
            }
            for one in judgment["comparisons"]
        ]
    return kept


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="llava preferences pairs",
        description="Turn judgments into preference rows.",
    )
    parser.add_argument("judgments", type=Path, help="rows of `llava preferences judge`")
    parser.add_argument("--out", type=Path, required=True, help="pairs: JSON lines (.jsonl), else a JSON array")
    parser.add_argument("--to", choices=list(PREFERENCE_WRITERS), default="published", help="layout of the rows")
    parser.add_argument("--min-margin", type=float, help="smallest difference of scores; default: as judged")
    parser.add_argument("--min-score", type=float, help="smallest score of a preferred answer")
    parser.add_argument("--report", type=Path, help="write the numbers of the report to this JSON file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava preferences pairs`; the file appears complete or not at all.

    Raises:
        DataError: the judgments cannot be read, or none prefers an answer.
    """
    log.setup_logging()
    parser = make_parser()
    args = parser.parse_args(with_config(parser, argv))
    refuse_overwriting([args.judgments], {"out": args.out, "report": args.report})
    limits = {"min_margin": args.min_margin, "min_score": args.min_score}
    judged = [judged_again(one, **limits) for one in read_judged(args.judgments)]
    pairs = judged_pairs(judged)
    report = judged_report(judged)
    if not pairs:
        reasons = Counter(report["without_preference"]).most_common(3)
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons)
        raise DataError(f"{args.judgments}: no answer is preferred ({listed}); nothing was written")
    writer = PREFERENCE_WRITERS[args.to]
    rows = [writer(preference_of(*pair, layout=args.to)) for pair in pairs]
    with open_atomic(args.out) as stream:
        stream.writelines(file_text(rows, lines=args.out.suffix == ".jsonl"))
    write_out(report_text(report) + f"{len(rows)} pairs -> {args.out}\n")
    if args.report is not None:
        write_json(args.report, report)
