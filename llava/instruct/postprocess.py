"""Generated dialogues to training rows.

    row with `result`  --parse_dialogue-->  pairs  --clean each answer-->  pairs left  --image-->  training row

Every rule counts what it did; a row without a usable pair is left out and counted, never an error.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError
from llava.instruct.cleaning import RULES, clean
from llava.instruct.prompts import ASSISTANT, USER
from llava.utils.cli import ExampleFormatter, Parser
from llava.utils.files import refuse_overwriting
from llava.utils.jsonl import read_records, write_json
from llava.utils.log import progress

EPILOG = """
example:
  python llava/instruct/instruct_postprocess.py \\
      --input_path data/instruct/llava_med_instruct_60k_inline_mentions_gen.jsonl \\
      --output_path data/instruct/llava_med_instruct_60k_inline_mentions_post.json
"""

Pair = tuple[str, str]

ROW_OUTCOMES: dict[str, str] = {
    "kept": "training rows",
    "no answer": "have no text in `result`",
    "no dialogue": f"have no part with exactly one {USER!r} and one {ASSISTANT!r}",
    "all dropped": "had pairs, and no rule left any",
}
"""What becomes of rows."""

PAIR_OUTCOMES: dict[str, str] = {
    **RULES,
    "malformed": f"parts behind a {USER!r} without exactly one {ASSISTANT!r}, skipped",
    "empty question": "have no question (fixed mode)",
}
"""What becomes of pairs of a question and an answer."""


@dataclass(slots=True)
class Counts:
    """How often each outcome came up.

    Attributes:
        rows: by key of `ROW_OUTCOMES`.
        pairs: by key of `PAIR_OUTCOMES`.
        phrases: by outcome and the phrase that decided it.
    """

    rows: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    phrases: Counter[tuple[str, str]] = field(default_factory=Counter)

    def text(self) -> str:
        """Return both tables, outcomes that never came up included."""
        lines = [f"rows   {self.rows[name]:>8}  {name:<15} {what}" for name, what in ROW_OUTCOMES.items()]
        lines += [f"pairs  {self.pairs[name]:>8}  {name:<15} {what}" for name, what in PAIR_OUTCOMES.items()]
        return "\n".join(lines) + "\n"

    def report(self) -> dict[str, Any]:
        """Return everything for a JSON file."""
        phrases = [
            {"outcome": outcome, "phrase": phrase, "count": count}
            for (outcome, phrase), count in sorted(self.phrases.items(), key=lambda item: (-item[1], item[0]))
        ]
        return {
            "rows": {name: self.rows[name] for name in ROW_OUTCOMES},
            "pairs": {name: self.pairs[name] for name in PAIR_OUTCOMES},
            "phrases": phrases,
        }


_BOLD = re.compile(r"^[ \t]*\*{1,2}(User|Assistant)(?::\*{1,2}|\*{1,2}:)", re.MULTILINE)


def tidy(text: str) -> str:
    """Return a dialogue without place holders of the model's own, and with speakers that are not bold."""
    return _BOLD.sub(r"\1:", text.replace(IMAGE_TOKEN, ""))


def _writable(text: str) -> str:
    """Return text with halves of surrogate pairs, which no file can hold, replaced."""
    return text.encode("utf-8", "replace").decode()


def parse_dialogue(text: str) -> tuple[list[Pair], int]:
    """Return the pairs of question and answer, and the number of parts that are no pair.

    A part is what lies behind one `User:` and before the next; it is a pair when it holds exactly one `Assistant:`.
    """
    parts = [part.split(ASSISTANT) for part in text.split(USER)[1:]]
    pairs = [(part[0].strip(), part[1].strip()) for part in parts if len(part) == 2]
    return pairs, len(parts) - len(pairs)


def image_first(identity: str, seed: int) -> bool:
    """Toss a fair coin for a row: by its id and a seed, so that no other row has a say in it."""
    return hashlib.sha256(f"{seed}\0{identity}".encode()).digest()[0] < 128


def with_image(question: str, *, first: bool) -> str:
    """Return a question with the place holder of the image on a line of its own, before or after it."""
    return f"{IMAGE_TOKEN}\n{question}" if first else f"{question}\n{IMAGE_TOKEN}"


def training_row(row: Mapping[str, Any], *, mode: str, seed: int, counts: Counts) -> dict[str, Any] | None:
    """Return the training row of a generated one; None when nothing of it can be used.

    In mode `legacy` the image stands with the first question that was written, even if that pair is dropped, and the
    row then has none. In mode `fixed` it stands with the first question that is left; the text is made `tidy` before.

    Raises:
        DataError: the row has no `pair_id`.
    """
    identity, text = row.get("pair_id"), row.get("result")
    if not isinstance(identity, str) or not identity or _writable(identity) != identity:
        raise DataError("field 'pair_id' must be a text that is not empty")
    if not isinstance(text, str) or not text.strip():
        counts.rows["no answer"] += 1
        return None
    text = _writable(text)
    fixed = mode != "legacy"
    pairs, num_malformed = parse_dialogue(tidy(text) if fixed else text)
    counts.pairs["malformed"] += num_malformed
    if not pairs:
        counts.rows["no dialogue"] += 1
        return None
    first = image_first(identity, seed)
    if not fixed:
        pairs[0] = (with_image(pairs[0][0], first=first), pairs[0][1])
    pairs = list(_cleaned(pairs, mode, counts))
    if not pairs:
        counts.rows["all dropped"] += 1
        return None
    if fixed:
        pairs[0] = (with_image(pairs[0][0], first=first), pairs[0][1])
    counts.rows["kept"] += 1
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
    return {"id": identity, "image": f"{identity}.jpg", "domain": row.get("domain", {}), "conversations": turns}


def _cleaned(pairs: Iterable[Pair], mode: str, counts: Counts) -> Iterator[Pair]:
    for question, answer in pairs:
        if not question and mode != "legacy":
            counts.pairs["empty question"] += 1
            continue
        found = clean(answer, mode)
        counts.pairs[found.outcome] += 1
        if found.phrase:
            counts.phrases[found.outcome, found.phrase] += 1
        if found.text is not None:
            yield question, found.text


def postprocess(
    rows: Iterable[Mapping[str, Any]], *, mode: str = "fixed", seed: int = 0, name: str = "rows"
) -> tuple[list[dict[str, Any]], Counts]:
    """Return the training rows of generated ones, in their order, and what was counted.

    Args:
        rows: caption rows with `result` (llava-med.md 3.10).
        mode: key of `llava.instruct.cleaning.MODES`.
        seed: decides for each row whether the image stands before or after the first question.
        name: of the file, for messages.

    Raises:
        DataError: a row has no `pair_id`; names its number.
        ConfigError: unknown mode.
    """
    counts = Counts()
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        try:
            made = training_row(row, mode=mode, seed=seed, counts=counts)
        except DataError as error:
            raise DataError(f"{name}, row {number}: {error}") from None
        if made is not None:
            found.append(made)
    return found, counts


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="instruct_postprocess.py",
        description="Make training data of generated dialogues; says what every rule did.",
        epilog=EPILOG,
        formatter_class=ExampleFormatter,
    )
    parser.add_argument("--input_path", required=True, help="generated rows, JSON lines or a JSON array")
    parser.add_argument("--output_path", required=True, help="training rows, a JSON array")
    parser.add_argument("--seed", type=int, default=0, help="decides where the image stands in the first question")
    parser.add_switch("--legacy_rules", help="clean as LLaVA-Med 1.0 did, with its defects")
    parser.add_argument("--report_path", help="also write what every rule and phrase did, as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = make_parser().parse_args(argv)
    refuse_overwriting([args.input_path], {"output-path": args.output_path, "report-path": args.report_path})
    rows = progress(read_records(args.input_path), title="dialogues", unit="row")
    mode = "legacy" if args.legacy_rules else "fixed"
    found, counts = postprocess(rows, mode=mode, seed=args.seed, name=args.input_path)
    sys.stdout.write(counts.text())
    if args.report_path:
        write_json(args.report_path, counts.report())
    if not found:
        raise DataError(f"{args.input_path}: no row is left; nothing was written to {args.output_path}")
    write_json(args.output_path, found)
    sys.stdout.write(f"wrote  {len(found):>8}  rows to {args.output_path}\n")
