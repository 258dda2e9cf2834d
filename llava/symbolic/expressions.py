"""Arithmetic conditions over numeric columns: `Myeloblast / num_cells > 0.2 and quality == 0`.

or:       and ("or" and)*
and:      not ("and" not)*
not:      "not" not | compared
compared: sum (("<" | "<=" | ">" | ">=" | "==" | "!=") sum)?
sum:      product (("+" | "-") product)*
product:  signed (("*" | "/") signed)*
signed:   ("-" | "+") signed | number | column | "(" or ")"
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from llava.errors import DataError

MAX_CHARACTERS = 1000
"""Maximum length of an expression in characters."""

MAX_DEPTH = 32
"""Maximum nesting depth of parentheses, signs and `not`."""

TOKEN = re.compile(
    r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)|([^\W\d]\w*)|(<=|>=|==|!=|[-+*/()<>≤≥≠])", re.IGNORECASE
)

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)
"""Text that is a number; Python reads more, such as `1_2`."""

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "≤": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "≥": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "≠": operator.ne,
}

KEYWORDS = frozenset({"and", "or", "not"})

Evaluate = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Expression:
    """Parsed condition.

    Attributes:
        text: the source.
        columns: names of the columns, in order of first use.
    """

    text: str
    columns: tuple[str, ...]
    _evaluate: Evaluate

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Return whether the condition holds for the columns of a row.

        Raises:
            DataError: a column is missing or not a number, or a division by 0; the message names the column.
        """
        return bool(self._evaluate(row))


def parse_expression(text: str) -> Expression:
    """Return a parsed condition.

    Raises:
        DataError: the text is not a condition of the grammar, too long, or nested too deeply.
    """
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"expression of {len(text)} characters; at most {MAX_CHARACTERS} are allowed")
    parser = _Parser(text)
    node = parser.disjunction(0)
    if parser.token:
        parser.fail(f"unexpected {parser.token!r}")
    if not node.is_truth:
        parser.fail("expected a condition, such as `blasts / cells > 0.2`; got a number")
    return Expression(text, tuple(parser.columns), node.evaluate)


def is_column(name: str) -> bool:
    """Return whether a name can stand for a column in an expression."""
    match = TOKEN.fullmatch(name)
    is_name = match is not None and match.group(2) is not None
    return is_name and (name[0].isalpha() or name[0] == "_") and name not in KEYWORDS


def as_number(value: Any) -> float | None:
    """Return a finite number or a text that is one as a float, else None; true and false are no numbers."""
    number = exact_number(value)
    return None if number is None else float(number)


def exact_number(value: Any) -> int | float | None:
    """Return the same; a whole number as an integer, so that long ones that differ are not equal."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str):
        text = value.strip()
        if not NUMBER.fullmatch(text):
            return None
        value = float(text)
        if math.isfinite(value) and text.lstrip("-+").isdecimal():
            value = int(text)
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer without a float
        return None


def shown_value(value: Any) -> str:
    """Return a value of a row as JSON, for a message."""
    return json.dumps(value, ensure_ascii=False, default=str)[:80]


@dataclass(frozen=True, slots=True)
class _Node:
    evaluate: Evaluate
    is_truth: bool
    text: str


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str) -> None:
        self.source = text
        self.columns: dict[str, None] = {}
        self.tokens: list[str] = []
        position = 0
        while position < len(text):
            if text[position].isspace():
                position += 1
                continue
            match = TOKEN.match(text, position)
            if match is None:
                self.fail(f"unexpected character {text[position]!r}")
            self.tokens.append(match.group())
            position = match.end()
        self.position = 0

    def fail(self, message: str) -> NoReturn:
        """Raise the error of this expression."""
        raise DataError(f"expression {self.source!r}: {message}")

    @property
    def token(self) -> str:
        """Next token, empty at the end."""
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        """Return the next token and advance."""
        token = self.token
        self.position += 1
        return token

    def disjunction(self, depth: int) -> _Node:
        return self.joined("or", self.conjunction, any, depth)

    def conjunction(self, depth: int) -> _Node:
        return self.joined("and", self.negation, all, depth)

    def joined(self, word: str, part: Callable[[int], _Node], combine: Callable[[Any], bool], depth: int) -> _Node:
        """Return operands joined by `and` or `or`, evaluated from the left until the result is known."""
        parts = [part(depth)]
        while self.token == word:
            self.take()
            parts.append(part(depth))
        if len(parts) == 1:
            return parts[0]
        self.need(parts, truth=True, where=f"around {word!r}")
        functions = [node.evaluate for node in parts]
        return _Node(lambda row: combine(f(row) for f in functions), True, "")

    def negation(self, depth: int) -> _Node:
        if self.token != "not":
            return self.comparison(depth)
        self.take()
        inner = self.negation(self.deeper(depth))
        self.need([inner], truth=True, where="after 'not'")
        return _Node(lambda row: not inner.evaluate(row), True, "")

    def comparison(self, depth: int) -> _Node:
        left = self.sum(depth)
        if self.token not in COMPARISONS:
            return left
        compare = COMPARISONS[self.take()]
        right = self.sum(depth)
        if self.token in COMPARISONS:
            self.fail("one comparison after another; join them with `and`")
        self.need([left, right], truth=False, where="around a comparison")
        return _Node(lambda row: compare(left.evaluate(row), right.evaluate(row)), True, "")

    def sum(self, depth: int) -> _Node:
        return self.chain(("+", "-"), self.product, depth)

    def product(self, depth: int) -> _Node:
        return self.chain(("*", "/"), self.signed, depth)

    def chain(self, symbols: tuple[str, str], part: Callable[[int], _Node], depth: int) -> _Node:
        """Return operands joined by the operators of one precedence, evaluated from the left."""
        begin = self.position
        first = part(depth)
        rest: list[tuple[str, _Node]] = []
        while self.token in symbols:
            symbol = self.take()
            rest.append((symbol, part(depth)))
        if not rest:
            return first
        self.need([first, *(node for _, node in rest)], truth=False, where=f"around {rest[0][0]!r}")
        text = " ".join(self.tokens[begin : self.position])
        return _Node(lambda row: _chained(first, rest, row), False, text)

    def signed(self, depth: int) -> _Node:
        token = self.take()
        if token in ("-", "+"):
            inner = self.signed(self.deeper(depth))
            self.need([inner], truth=False, where="after a sign")
            return _Node(lambda row: -inner.evaluate(row), False, "-" + inner.text) if token == "-" else inner
        if token == "(":
            inner = self.disjunction(self.deeper(depth))
            if self.take() != ")":
                self.fail("a closing parenthesis is missing")
            return inner
        if not token:
            self.fail("it ends where a number or column is expected")
        if token[0].isdecimal() or token[0] == ".":
            number = float(token)
            if not math.isfinite(number):
                self.fail(f"the number {token} is too large")
            return _Node(lambda row: number, False, token)
        if not is_column(token):
            self.fail(f"unexpected {token!r}; expected a number or column")
        self.columns[token] = None
        return _Node(lambda row: column_number(row, token), False, token)

    def deeper(self, depth: int) -> int:
        """Return the next depth."""
        if depth >= MAX_DEPTH:
            self.fail(f"nested more than {MAX_DEPTH} levels deep")
        return depth + 1

    def need(self, nodes: list[_Node], *, truth: bool, where: str) -> None:
        """Check that operands are conditions, or that they are numbers."""
        if any(node.is_truth is not truth for node in nodes):
            self.fail(f"expected {'conditions' if truth else 'numbers'} {where}")


def _chained(first: _Node, rest: list[tuple[str, _Node]], row: Mapping[str, Any]) -> float:
    total: float = first.evaluate(row)
    for symbol, node in rest:
        value = node.evaluate(row)
        if symbol == "/" and value == 0:
            raise DataError(f"division by 0: column {node.text!r} is 0")
        total = {
            "+": operator.add,
            "-": operator.sub,
            "*": operator.mul,
            "/": operator.truediv,
        }[symbol](total, value)
        if not math.isfinite(total):
            raise DataError(f"{symbol!r} with {node.text!r} gives a number that is too large")
    return total


def column_number(row: Mapping[str, Any], column: str) -> float:
    """Return the number in a column of a row.

    Raises:
        DataError: the column is missing, or not a number.
    """
    if column not in row:
        raise DataError(f"column {column!r} is missing")
    number = as_number(row[column])
    if number is None:
        raise DataError(f"column {column!r} is not a number, got {shown_value(row[column])}")
    return number
