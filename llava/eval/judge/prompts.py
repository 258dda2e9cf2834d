"""What the judge reads: a system message and one message with context, question, two answers and the instruction.

Case --context, layout--> [{"role": "system", ...}, {"role": "user", ...}]
                                |
     reply without scores ------+--again--> the same, the reply, and a reminder of the form

The layout of the message is the published one (llava-med.md 8.10), so that a judge sees what it saw there; the wording
of the instruction is this project's. Figures of two templates do not compare: results name template and hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava.eval.judge.cases import Case
from llava.judging.store import Messages

ORDERS = ("12", "21")
"""Which answer stands first: the reference, or the answer under test."""


@dataclass(frozen=True, slots=True)
class Template:
    """The judge's task in words.

    Attributes:
        system: who the judge is.
        instruction: what to do with the two answers and how to write it down.
        reminder: said after a reply without readable scores.
    """

    system: str
    instruction: str
    reminder: str

    @property
    def sha256(self) -> str:
        """The hash of everything in it, by which results are told apart."""
        return hashlib.sha256("\0".join((self.system, self.instruction, self.reminder)).encode()).hexdigest()


TEMPLATES: dict[str, Template] = {
    "chat-v1": Template(
        system="You check the quality of answers. You are precise, fair and helpful.",
        instruction=(
            "Two AI assistants answered the question above about a medical figure. You cannot see the figure: its "
            "caption and the sentences of the article that mention it stand in for it. Judge both answers by how "
            "helpful, relevant, accurate and detailed they are, and give each assistant one overall score from 1 to "
            "10; more is better.\n"
            "Write on the first line only the two scores, Assistant 1 before Assistant 2, with one space between "
            "them. From the second line on, explain the scores in full. Do not let the order in which the answers "
            "stand influence you, and do not favour either side."
        ),
        reminder=(
            "The first line of that reply was not two scores. Reply again: on the first line only two numbers from 1 "
            "to 10, the score of Assistant 1 and the score of Assistant 2, with one space between them."
        ),
    ),
}
"""Templates by name; a changed text gets a new name."""


def messages_of(case: Case, order: str, *, template: Template, defects: frozenset[str] = frozenset()) -> Messages:
    """Return what a judge is sent about a case.

    Args:
        case: question and answers.
        order: one of `ORDERS`.
        template: the judge's task.
        defects: published ones that stay in.
    """
    first, second = (case.reference, case.answer) if order == "12" else (case.answer, case.reference)
    text = (
        f"[Context]\n{context(case.row, defects)}\n\n"
        f"[Question]\n{case.question}\n\n"
        f"[Assistant 1]\n{first}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{second}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{template.instruction}\n\n"
    )
    return ({"role": "system", "content": template.system}, {"role": "user", "content": text})


def context(row: Any, defects: frozenset[str] = frozenset()) -> str:
    """Return caption and mentions of the figure that a question is about."""
    label = row.get("fig_label")
    caption = row["fig_caption"] if label in (None, "") else f"{label}: {row['fig_caption']}"
    mentions = row.get("in_text_mention")
    lines = repr(mentions) if "python_mentions" in defects else "\n\t- ".join(_sentences(mentions)) or "none"
    return f"Figure Caption:\n{caption}\n\nFigure Context:\n\t- {lines}"


def _sentences(mentions: Sequence[Any] | None) -> list[str]:
    """Return the sentences of mentions, which data files hold as text or as objects with `tokens`."""
    texts = (mention.get("tokens") if isinstance(mention, dict) else mention for mention in mentions or ())
    return [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]


def again(messages: Messages, reply: str, template: Template) -> Messages:
    """Return what a judge is sent after a reply without readable scores."""
    said = {"role": "assistant", "content": reply or "(no text)"}
    return (*messages, said, {"role": "user", "content": template.reminder})
