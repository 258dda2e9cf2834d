"""`llava rules new`: interview in the terminal that writes a rule file valid for `llava rules check`.

name --> nodes (question, values, words that name them, sentences) --> valid paths --> table column --> two files
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llava.constants import IMAGE_TOKEN
from llava.errors import ConfigError
from llava.symbolic.check import check_file
from llava.symbolic.draft import DraftNode, LabeledPaths, phrases_text, rules_text
from llava.symbolic.extract import extract, normalize
from llava.symbolic.hierarchy import plain
from llava.symbolic.labels import equals
from llava.symbolic.problems import SLUG, TRUTH
from llava.symbolic.read_nodes import MAX_NODES, MAX_PATTERNS
from llava.symbolic.rules import shipped
from llava.symbolic.structure import Assignment
from llava.utils.cli import Parser
from llava.utils.jsonl import write_atomic
from llava.utils.terminal import write_out

MAX_WORDS = 12
"""Maximum number of words or phrases that name one value."""

Read = Callable[[], str]
"""Function that returns the next line without its line break."""


class Interview:
    """Questions and answers of one session; an answer that cannot be used is asked for again."""

    def __init__(self, read: Read) -> None:
        self.read = read

    def ask(self, question: str, problem: Callable[[str], str] = lambda text: "", *, default: str = "") -> str:
        """Return an answer for which `problem` returns nothing.

        Raises:
            ConfigError: the input ends.
        """
        while True:
            write_out(question + (f" [{default}]" if default else "") + ": ")
            try:
                text = self.read().strip() or default
            except EOFError:
                raise ConfigError("the input ended before the last question; nothing was written") from None
            found = problem(text)
            if not found:
                return text
            write_out(f"  {found}\n")

    def names(self, question: str, problem: Callable[[list[str]], str]) -> list[str]:
        """Return a list of names, written with commas."""
        text = self.ask(question, lambda text: problem(split_list(text)))
        return split_list(text)


def split_list(text: str) -> list[str]:
    """Return the parts of a text between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def needs_text(text: str) -> str:
    """Return a request for a text if there is none."""
    return "" if text else "please write something"


def phrase_problem(text: str) -> str:
    """Return why a text cannot be a question or an answer."""
    return f"leave out {IMAGE_TOKEN}, which stands for the image" if IMAGE_TOKEN in text else needs_text(text)


def name_problem(text: str, taken: Sequence[str] = ()) -> str:
    """Return why a text is not a new name."""
    if not SLUG.fullmatch(text):
        return "use letters, digits, _ - . without spaces, such as skin_lesion"
    return f"{text} is taken" if text in taken else ""


def ask_node(talk: Interview, taken: Sequence[str]) -> DraftNode | None:
    """Return the next node, or None if there are no more."""
    more = " (empty line: no more questions)" if len(taken) >= 2 else ""
    end = len(taken) >= 2
    id = talk.ask(
        f"\nName of question {len(taken) + 1}, one word{more}",
        lambda t: "" if end and not t else name_problem(t, taken),
    )
    if not id:
        return None
    first = talk.ask("The question as a sentence", phrase_problem, default=f"What is the {plain(id)}?")
    second = talk.ask(
        "The same question in other words, for the test",
        lambda text: phrase_problem(text) or same_problem(text, first),
        default=f"Describe the {plain(id)}.",
    )
    values = talk.names("Possible answers, with commas", values_problem)
    node = DraftNode(id, (first, second))
    node.abstain = talk.ask(
        "Which of them means that it cannot be determined? (empty line: none)",
        lambda text: "" if text in ("", *values) else f"write one of {', '.join(values)}",
    )
    for left, value in zip(reversed(range(len(values))), values, strict=True):
        ask_words(talk, node, value, left=left)
    for value in values:
        node.sentences[value] = ask_sentences(talk, node, value)
    return node


def values_problem(values: list[str]) -> str:
    """Return why a list of values cannot be used."""
    if not 2 <= len(values) <= 20 or len(set(values)) < len(values):
        return "write 2 to 20 different answers"
    if any(len(value) > 64 or value.startswith("__") for value in values):
        return "an answer is too long, or begins with __"
    return ""


def same_problem(text: str, other: str) -> str:
    """Return a request for other words if two wordings are the same."""
    return "these are the same words as for training" if normalize(text) == normalize(other) else ""


def ask_words(talk: Interview, node: DraftNode, value: str, *, left: int) -> None:
    """Ask for the words that name a value; `left` values are asked after it, which need a word each."""
    used = sum(map(len, node.words.values()))
    most = min(MAX_WORDS, MAX_PATTERNS - used - left)

    def problem(text: str) -> str:
        words = [normalize(word) for word in split_list(text)]
        others = {word: other for other, known in node.words.items() for word in known}
        if not 1 <= len(words) <= most or not all(0 < len(word) <= 100 for word in words):
            reason = f", since a question has at most {MAX_PATTERNS}" if most < MAX_WORDS else ""
            return f"write 1 to {most} words or phrases{reason}"
        taken = [word for word in words if word in others]
        return f"{taken[0]!r} already names {others[taken[0]]}" if taken else ""

    text = talk.ask(
        f"  Words that name the answer {value!r}, with commas", problem, default=plain(value).replace(",", "")
    )
    node.words[value] = [normalize(word) for word in split_list(text)]


def ask_sentences(talk: Interview, node: DraftNode, value: str) -> tuple[str, str]:
    """Ask for two sentences that say a value and are read as it."""
    checked = node.rule_node()

    def problem(text: str) -> str:
        if IMAGE_TOKEN in text:
            return phrase_problem(text)
        read = extract(checked, text).value
        known = {"__no_match__": "none of the answers", "__conflict__": "several answers"}
        return "" if read == value else f"this sentence is read as {known.get(read, read)}, not as {value}"

    word = node.words[value][0]
    first = talk.ask(f"  A sentence that says {value!r}", problem, default=f"This is {word}.")
    second = talk.ask(
        "  Another one, for the test", lambda t: problem(t) or same_problem(t, first), default=f"I would say: {word}."
    )
    return first, second


def ask_paths(talk: Interview, nodes: Sequence[DraftNode]) -> dict[str, Assignment]:
    """Ask for the valid combinations of answers until every answer has one."""
    write_out("\nWhich answers go together? One case after the other, such as a disease with its signs.\n")
    paths: dict[str, Assignment] = {}
    while True:
        left = unused_values(nodes, paths)
        if left and paths:
            write_out(f"\nStill without a case: {', '.join(left)}\n")
        enough = bool(paths) and not left
        name = ask_case(talk, paths, enough=enough)
        if not name:
            return paths
        path = {
            node.id: talk.ask(f"  {plain(node.id)} ({', '.join(node.words)})", known_value(list(node.words)))
            for node in nodes
        }
        if path in paths.values():
            write_out("  this combination is already there\n")
            continue
        paths[name] = path


def ask_case(talk: Interview, paths: dict[str, Assignment], *, enough: bool) -> str:
    """Return the name of the next case, empty for none."""
    more = " (empty line: no more cases)" if enough else ""
    return talk.ask(
        f"\nName of case {len(paths) + 1}{more}",
        lambda text: "" if enough and not text else name_problem(text, list(paths)),
    )


def unused_values(nodes: Sequence[DraftNode], paths: dict[str, Assignment]) -> list[str]:
    """Return the answers that no path has."""
    used = {pair for path in paths.values() for pair in path.items()}
    return [f"{plain(node.id)} {value}" for node in nodes for value in node.words if (node.id, value) not in used]


def known_value(values: list[str]) -> Callable[[str], str]:
    """Return a check that a text is one of the values."""
    return lambda text: "" if text in values else f"write one of {', '.join(values)}"


def ask_labels(talk: Interview, paths: dict[str, Assignment]) -> LabeledPaths:
    """Ask how the table of images names the cases."""
    write_out("\nYour table has one row per image. One of its columns says which case the image shows.\n")
    column = talk.ask("Name of this column", needs_text, default="label")
    entries: dict[str, str] = {}
    for name in paths:
        entries[name] = talk.ask(
            f"  Entry in the column {column!r} for the case {name}",
            lambda text: needs_text(text) or entry_problem(text, list(entries.values())),
            default=name,
        )
    return LabeledPaths(paths, column, entries)


def entry_problem(text: str, taken: Sequence[str]) -> str:
    """Return why an entry of the table cannot stand for a case: a row with it would fit an earlier one."""
    is_truth = text.lower() in TRUTH and text.lower() in map(str.lower, taken)  # of a row, true equals both
    return f"{text!r} stands for another case" if is_truth or equals(text, taken) else ""


def make_parser() -> Parser:
    """Return the parser of `llava rules new`."""
    parser = Parser(prog="llava rules new", description="Write a rule file by answering questions in the terminal.")
    parser.add_argument("file", nargs="?", type=Path, help="rule file to write; default: its name, .yaml")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Ask the questions and write the two files.

    Raises:
        ConfigError: the input ends early, or a file exists.
    """
    args = make_parser().parse_args(argv)
    talk = Interview(_line)
    write_out("An empty line takes the answer in brackets. Nothing is written before the last question.\n\n")
    id = talk.ask("Name of the rule set, one word", lambda text: name_problem(text, list(shipped())))
    file = args.file or Path(f"{id}.yaml")
    phrases = Path("phrases") / f"{id}.en.yaml"
    for path in (file, file.parent / phrases):
        if path.exists():
            raise ConfigError(f"{path} exists; name another file, or remove it")
    about = {key: talk.ask(f"{key.capitalize()} (may be empty)") for key in ("specialty", "modality")}
    nodes: list[DraftNode] = []
    while len(nodes) < MAX_NODES and (node := ask_node(talk, [known.id for known in nodes])) is not None:
        nodes.append(node)
    table = ask_labels(talk, ask_paths(talk, nodes))
    write_atomic(file.parent / phrases, phrases_text(nodes))
    write_atomic(file, rules_text(id, about, nodes, table, phrases.as_posix()))
    found = check_file(file)
    problems = [f"error: {text}\n" for text in found.errors] + [f"warning: {text}\n" for text in found.warnings]
    write_out(f"\n{file}: {found.assignments:,} combinations, {found.paths:,} valid paths\n{''.join(problems)}")
    write_out(f"next: llava rules show {file} --html\n")
    if found.errors:
        raise SystemExit(1)


def _line() -> str:
    """Return the next line of the standard input."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
