"""Conversion of generated dialogues to training rows.

    row with `result`  --parse_dialogue-->  pairs  --clean each answer-->  pairs left  --image-->  training row

The outcomes of all rules are counted. A row without a usable pair is left out and counted; it is not an error.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError
from llava.instruct.cleaning import RULES, clean_answer
from llava.instruct.prompts import ASSISTANT, USER
from llava.utils.cli import ExampleFormatter, Parser
from llava.utils.files import refuse_overwriting
from llava.utils.json_rows import read_records
from llava.utils.jsonl import write_json
from llava.utils.log import with_progress
from llava.utils.terminal import write_out

EPILOG = """
example:
  python llava/instruct/instruct_postprocess.py \\
      --input-path data/instruct/llava_med_instruct_60k_inline_mentions_gen.jsonl \\
      --output-path data/instruct/llava_med_instruct_60k_inline_mentions_post.json
"""

Pair = tuple[str, str]

ROW_OUTCOMES: dict[str, str] = {
    "kept": "training rows",
    "no answer": "have no text in `result`",
    "no dialogue": f"have no part with exactly one {USER!r} and one {ASSISTANT!r}",
    "all dropped": "had pairs, but the rules dropped all of them",
}
"""Outcomes of rows, with their meanings."""

PAIR_OUTCOMES: dict[str, str] = {
    **RULES,
    "malformed": f"parts after a {USER!r} without exactly one {ASSISTANT!r}, skipped",
    "empty question": "have no question (fixed mode)",
}
"""Outcomes of pairs of a question and an answer, with their meanings."""


@dataclass(slots=True)
class CleaningCounts:
    """Counts of all outcomes.

    Attributes:
        rows: counts by key of `ROW_OUTCOMES`.
        pairs: counts by key of `PAIR_OUTCOMES`.
        phrases: counts by outcome and the phrase that decided it.
    """

    rows: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    phrases: Counter[tuple[str, str]] = field(default_factory=Counter)

    def text(self) -> str:
        """Return both tables as text, including outcomes with count 0."""
        lines = [f"rows   {self.rows[name]:>8}  {name:<15} {what}" for name, what in ROW_OUTCOMES.items()]
        lines += [f"pairs  {self.pairs[name]:>8}  {name:<15} {what}" for name, what in PAIR_OUTCOMES.items()]
        return "\n".join(lines) + "\n"

    def report(self) -> dict[str, Any]:
        """Return all counts as JSON values."""
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
    """Return a dialogue without placeholders written by the model and without bold speaker names."""
    return _BOLD.sub(r"\1:", text.replace(IMAGE_TOKEN, ""))


def _writable(text: str) -> str:
    """Return a text with lone surrogates, which cannot be encoded, replaced."""
    return text.encode("utf-8", "replace").decode()


def parse_dialogue(text: str) -> tuple[list[Pair], int]:
    """Return the pairs of question and answer, and the number of malformed parts.

    A part is the text between two `User:` marks; it is a pair if it contains exactly one `Assistant:`.
    """
    parts = [part.split(ASSISTANT) for part in text.split(USER)[1:]]
    pairs = [(part[0].strip(), part[1].strip()) for part in parts if len(part) == 2]
    return pairs, len(parts) - len(pairs)


def image_first(identity: str, seed: int) -> bool:
    """Return a fair random choice that depends only on the id of the row and the seed."""
    return hashlib.sha256(f"{seed}\0{identity}".encode()).digest()[0] < 128


def with_image(question: str, *, first: bool) -> str:
    """Return a question with the image placeholder on its own line, before or after the text."""
    return f"{IMAGE_TOKEN}\n{question}" if first else f"{question}\n{IMAGE_TOKEN}"


def training_row(row: Mapping[str, Any], *, mode: str, seed: int, counts: CleaningCounts) -> dict[str, Any] | None:
    """Return the training row of a generated row; None if it has no usable pair.

    In mode `fixed`, `tidy` is applied first and the placeholder is put into the first question that is kept. In mode
    `legacy` it is put into the first question of the dialogue, and is lost if that pair is dropped.

    Raises:
        DataError: the row has no `pair_id`.
    """
    identity, text = row.get("pair_id"), row.get("result")
    if not isinstance(identity, str) or not identity or _writable(identity) != identity:
        raise DataError("field 'pair_id' must be non-empty text")
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


def _cleaned(pairs: Iterable[Pair], mode: str, counts: CleaningCounts) -> Iterator[Pair]:
    for question, answer in pairs:
        if not question and mode != "legacy":
            counts.pairs["empty question"] += 1
            continue
        found = clean_answer(answer, mode)
        counts.pairs[found.outcome] += 1
        if found.phrase:
            counts.phrases[found.outcome, found.phrase] += 1
        if found.text is not None:
            yield question, found.text


def training_rows(
    rows: Iterable[Mapping[str, Any]], *, mode: str = "fixed", seed: int = 0, name: str = "rows"
) -> tuple[list[dict[str, Any]], CleaningCounts]:
    """Return the training rows of generated rows, in their order, and the counts.

    Args:
        rows: caption rows with `result`, as written by instruct_generate.py.
        mode: key of `llava.instruct.cleaning.MODES`.
        seed: seed of the choice whether the placeholder precedes or follows the first question.
        name: name of the file in messages.

    Raises:
        DataError: a row has no `pair_id`; the message names the row.
        ConfigError: the mode is unknown.
    """
    counts = CleaningCounts()
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        try:
            made = training_row(row, mode=mode, seed=seed, counts=counts)
        except DataError as error:
            raise DataError(f"{name}, row {number}: {error}") from None
        if made is not None:
            found.append(made)
    return found, counts


def make_parser(prog: str = "llava instruct postprocess") -> Parser:
    """Return the parser; the published script has the name `instruct_postprocess.py`."""
    parser = Parser(
        prog=prog,
        description="Convert generated dialogues to training data and print the counts of all rules.",
        epilog=EPILOG,
        formatter_class=ExampleFormatter,
    )
    parser.add_argument("--input_path", required=True, help="generated rows, JSON lines or a JSON array")
    parser.add_argument("--output_path", required=True, help="training rows, a JSON array")
    parser.add_argument("--seed", type=int, default=0, help="seed of the placeholder's position in the first question")
    parser.add_switch("--legacy_rules", help="clean as LLaVA-Med 1.0 does, with its defects")
    parser.add_argument("--report_path", help="write the counts of all rules and phrases to this JSON file")
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str = "llava instruct postprocess") -> None:
    """Run the command, under the name `prog`."""
    args = make_parser(prog).parse_args(argv)
    refuse_overwriting([args.input_path], {"output-path": args.output_path, "report-path": args.report_path})
    rows = with_progress(read_records(args.input_path), title="dialogues", unit="row")
    mode = "legacy" if args.legacy_rules else "fixed"
    found, counts = training_rows(rows, mode=mode, seed=args.seed, name=args.input_path)
    write_out(counts.text())
    if args.report_path:
        write_json(args.report_path, counts.report())
    if not found:
        raise DataError(f"{args.input_path}: no row is left after cleaning; {args.output_path} was not written")
    write_json(args.output_path, found)
    write_out(f"wrote  {len(found):>8}  rows to {args.output_path}\n")
