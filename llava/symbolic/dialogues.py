"""`llava rules dialogues`: turn table rows into dialogues in LLaVA's form, in several question orders.

row --labels--> truth --style--> asked nodes --context, phrases of the split--> conversations
"""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.errors import ConfigError, DataError
from llava.openai_api import ChatClient, add_api_flags, settings_of
from llava.symbolic.labels import assign
from llava.symbolic.paraphrase import with_paraphrases
from llava.symbolic.read_settings import STYLES
from llava.symbolic.rules import load_rules
from llava.symbolic.structure import PREFIXES, SPLITS, Assignment, Phrases, RuleSet
from llava.utils.cli import Parser
from llava.utils.files import refuse_overwriting
from llava.utils.json_rows import read_records
from llava.utils.jsonl import file_text, open_atomic
from llava.utils.terminal import write_out

CLINICIAN = "The clinician believes that: "
"""Beginning of a question with a statement before it."""


def ordered_nodes(rules: RuleSet, style: str, truth: Mapping[str, str], draw: random.Random) -> list[str]:
    """Return the asked nodes of a style: those whose `ask_when` the truth fulfills, in its order."""
    ids = rules.asked(truth)
    if style == "diagnosis_first":
        ids.reverse()
    elif style == "shuffled":
        draw.shuffle(ids)
    elif style in ("improvised", "single"):
        low, high = rules.dialogue.improvised_turns if style == "improvised" else (1, 1)
        ids = draw.sample(ids, draw.randint(min(low, len(ids)), min(high, len(ids))))
    limit = rules.dialogue.turns_per_image
    return ids if limit is None else ids[:limit]


def dialogue_row(
    rules: RuleSet, row: Mapping[str, Any], *, split: str = "train", seed: int = 0, style: str | None = None
) -> dict[str, Any]:
    """Return the dialogue of one row of a table; the same row and seed give the same bytes.

    Args:
        rules: rule set with phrases.
        row: row of a table, with `image` and, for its group, the column that `eval` names, `patient` or the image.
        split: wordings, `train` or `test`.
        seed: seed of the run.
        style: a style; None draws one by the weights of the rule file.

    Raises:
        DataError: the row has no valid assignment or no image, or the rule set has no phrases.
    """
    phrases = wordings_of(rules, split)
    image = row.get("image")
    if not isinstance(image, str) or not image:
        raise DataError(f"row {str(row.get('id', '?'))[:80]!r}: key 'image' is missing")
    truth = assign(rules, row)
    if broken := rules.violations(truth):
        raise DataError(f"row {str(row.get('id', '?'))[:80]!r}: its assignment breaks {', '.join(broken)}")
    draw = random.Random(f"{seed}/{split}/{row.get('id', image)}/{image}")
    style = style or _weighted(rules.dialogue.styles, draw)
    asked = ordered_nodes(rules, style, truth, draw)
    turns, contexts = dialogue_turns(Wordings(rules, phrases, split), truth, asked, draw)
    group = row.get(rules.evaluation.get("groups", "patient"), image)
    return {
        "id": row.get("id", image),
        "image": image,
        "conversations": turns,
        "asked": asked,
        "truth": truth,
        "style": style,
        "contexts": contexts,
        "group": group,
        "rules": {"id": rules.id, "version": rules.version},
    }


def dialogue_turns(
    wordings: Wordings, truth: Assignment, asked: Sequence[str], draw: random.Random
) -> tuple[list[dict[str, str]], list[str]]:
    """Return the questions and answers about the asked nodes, and the statement before each question.

    The first question has the image. No node comes before the first node, so a statement about that one is `none`.
    """
    turns: list[dict[str, str]] = []
    contexts: list[str] = []
    dialogue = wordings.rules.dialogue
    for place, id in enumerate(asked):
        context = _weighted(dialogue.context, draw)
        question, answer = question_and_answer(wordings, truth, id, context, draw)
        contexts.append(context if question.startswith(CLINICIAN) else "none")
        if place == 0:
            question = _with_image(question, dialogue.image_position, draw)
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns, contexts


def _weighted(weights: Mapping[str, float], draw: random.Random) -> str:
    return draw.choices(list(weights), list(weights.values()))[0]


@lru_cache(maxsize=64)
def wordings_of(rules: RuleSet, split: str) -> Phrases:
    """Return the phrases of a rule set, which have a wording of every question and answer in a split.

    Raises:
        DataError: a wording is missing; the message names its node.
    """
    if rules.phrases is None:
        raise DataError(f"{rules.path}: the rule set has no phrases")
    for node in rules.nodes:
        answers = rules.phrases.answers.get(node.id, {})
        found = [rules.phrases.questions.get(node.id, {}), *(answers.get(value, {}) for value in node.values)]
        if not all(splits.get(split) for splits in found):
            raise DataError(
                f"{rules.path}: the phrases lack a question or answer of node {node.id} for {split}; "
                "`llava rules check` lists all"
            )
    return rules.phrases


@dataclass(frozen=True, slots=True)
class Wordings:
    """Rules with the phrases of one split."""

    rules: RuleSet
    phrases: Phrases
    split: str


def question_and_answer(
    wordings: Wordings, truth: Assignment, id: str, context: str, draw: random.Random
) -> tuple[str, str]:
    """Return a question, after a clinician's statement where the context has one, and its answer."""
    rules, phrases, split = wordings.rules, wordings.phrases, wordings.split
    question = draw.choice(phrases.questions[id][split])
    answer = draw.choice(phrases.answers[id][truth[id]][split])
    ids = [node.id for node in rules.nodes]
    about = id if context in ("agree", "disagree") else ids[ids.index(id) - 1]
    if context == "none" or (about != id and ids[0] == id):  # the first node has none before it
        return question, answer
    wrong = context in ("disagree", "hint_wrong")
    value = draw.choice([v for v in rules.node(about).values if v != truth[about]]) if wrong else truth[about]
    claims = phrases.claims.get(about, {}).get(value, {}).get(split) or phrases.answers[about][value][split]
    claim = draw.choice(claims)
    if about != id:
        return f"{CLINICIAN}{claim} {question}", answer
    return f"{CLINICIAN}{claim} Do you agree? {question}", PREFIXES[context] + answer


def _with_image(question: str, position: str, draw: random.Random) -> str:
    """Return the first question with the image before or after it."""
    before = draw.random() < 0.5 if position == "random" else position == "before"
    return f"{IMAGE_TOKEN}\n{question}" if before else f"{question}\n{IMAGE_TOKEN}"


def make_parser() -> Parser:
    """Return the parser of `llava rules dialogues`."""
    parser = Parser(prog="llava rules dialogues", description="Write dialogues for the rows of a table.")
    parser.add_argument("file", help="rule file, or the name of a shipped rule set")
    parser.add_argument("--table", type=Path, required=True, help="rows of the table: JSON array or JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="file of the dialogues, a JSON array")
    parser.add_argument("--split", choices=SPLITS, default="train", help="wordings of this split")
    parser.add_argument("--style", choices=STYLES, help="order of the questions; default: drawn by weight")
    parser.add_argument("--seed", type=int, default=0, help="seed; the same seed gives the same bytes")
    parser.add_argument(
        "--paraphrase", type=int, nargs="?", const=3, metavar="N", help="ask a language model for N paraphrases (3)"
    )
    parser.add_argument(
        "--paraphrases", type=Path, help="file of the replies, which are not asked again; default: beside --out"
    )
    add_api_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the dialogues of a table.

    Raises:
        ConfigError: `--paraphrase` is below 1, the endpoint is not configured, or an output is also an input.
        DataError: a row cannot be used; the message names the row.
    """
    args = make_parser().parse_args(argv)
    store = args.paraphrases or args.out.with_name(f"{args.out.name}.paraphrases.jsonl")
    rules = load_rules(args.file)
    refuse_overwriting([*rules.files, args.table], {"--out": args.out, "--paraphrases": store})
    if args.paraphrase is not None:
        rules = _paraphrased(rules, args, store)
    rows = list(_rows(rules, args.table, args.split, args.seed, args.style))
    asked = [row for row in rows if row["asked"]]
    with open_atomic(args.out) as stream:
        stream.writelines(file_text(asked))
    left = f"; {len(rows) - len(asked)} rows have nothing to ask" if len(asked) < len(rows) else ""
    write_out(f"{args.out}: {len(asked)} dialogues{left}\n")


def _paraphrased(rules: RuleSet, args: Namespace, store: Path) -> RuleSet:
    """Return the rules with paraphrases of the answers, and print their number."""
    if not 1 <= args.paraphrase <= 20:
        raise ConfigError(f"--paraphrase must be from 1 to 20, got {args.paraphrase}")
    client = ChatClient(settings_of(args), max_retries=args.max_retries)
    rules, counts = with_paraphrases(rules, split=args.split, number=args.paraphrase, store=store, client=client)
    write_out(
        f"paraphrases: {counts.asked} requests, {counts.kept} kept, {counts.dropped} dropped, because they are read as "
        f"another value or are not new\n"
    )
    return rules


def _rows(rules: RuleSet, table: Path, split: str, seed: int, style: str | None) -> Iterator[dict[str, Any]]:
    for index, row in enumerate(read_records(table)):
        try:
            yield dialogue_row(rules, row, split=split, seed=seed, style=style)
        except DataError as error:
            raise DataError(f"{table}, row {index}: {error}") from None
