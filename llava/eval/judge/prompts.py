"""Messages to the judge: a system message, and one with context, question, answers, instruction.

Case --context, layout--> [{"role": "system", ...}, {"role": "user", ...}]
                                |
     reply without scores ------+--again--> the same, the reply, and a reminder of the format

The layout of the message is that of LLaVA-Med; the wording of the instruction is this project's. Figures of different
templates are not comparable, so results record the template's name and hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava.eval.judge.cases import Case
from llava.judging.orders import ORDERS
from llava.judging.store import Messages


@dataclass(frozen=True, slots=True)
class JudgeTemplate:
    """Texts that instruct a judge.

    Attributes:
        system: the system message.
        instruction: the task and the format of the reply.
        reminder: the message after a reply without readable scores.
    """

    system: str
    instruction: str
    reminder: str

    @property
    def sha256(self) -> str:
        """Hash of all texts, recorded with results."""
        return hashlib.sha256("\0".join((self.system, self.instruction, self.reminder)).encode()).hexdigest()


TEMPLATES: dict[str, JudgeTemplate] = {
    "chat-v1": JudgeTemplate(
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
"""Templates by name. Stored replies depend on these texts, so a changed text gets a new name."""


def messages_of(case: Case, order: str, *, template: JudgeTemplate, defects: frozenset[str] = frozenset()) -> Messages:
    """Return the messages to a judge about a case.

    Args:
        case: question and answers.
        order: one of `llava.judging.orders.ORDERS`.
        template: texts that instruct the judge.
        defects: published defects to reproduce.
    """
    first, second = (case.reference, case.answer) if order == ORDERS[0] else (case.answer, case.reference)
    text = (
        f"[Context]\n{figure_context(case.row, defects)}\n\n"
        f"[Question]\n{case.question}\n\n"
        f"[Assistant 1]\n{first}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{second}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{template.instruction}\n\n"
    )
    return ({"role": "system", "content": template.system}, {"role": "user", "content": text})


def figure_context(row: Any, defects: frozenset[str] = frozenset()) -> str:
    """Return the caption of the figure that a question is about, and the sentences that mention it."""
    label = row.get("fig_label")
    caption = row["fig_caption"] if label in (None, "") else f"{label}: {row['fig_caption']}"
    mentions = row.get("in_text_mention")
    lines = repr(mentions) if "python_mentions" in defects else "\n\t- ".join(_sentences(mentions)) or "none"
    return f"Figure Caption:\n{caption}\n\nFigure Context:\n\t- {lines}"


def _sentences(mentions: Sequence[Any] | None) -> list[str]:
    """Return the sentences of mentions, which data files store as text or as objects with `tokens`."""
    texts = (mention.get("tokens") if isinstance(mention, dict) else mention for mention in mentions or ())
    return [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]


def messages_after_unreadable(messages: Messages, reply: str, template: JudgeTemplate) -> Messages:
    """Return the messages to a judge after a reply without readable scores."""
    said = {"role": "assistant", "content": reply or "(no text)"}
    return (*messages, said, {"role": "user", "content": template.reminder})
