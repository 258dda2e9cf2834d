"""Prompt of the report judge: error counts of predicted findings in six categories, two severities.

The examples are synthetic. Scores depend on the wording, so rows name `PROMPT_VERSION` and `PROMPT_SHA256`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from llava.judging.store import Messages

PROMPT_VERSION = "llava-1"

CATEGORIES = {
    "A": "false_positive_finding",
    "B": "omission_finding",
    "C": "incorrect_location",
    "D": "incorrect_severity",
    "E": "false_positive_comparison",
    "F": "omission_comparison",
}
"""Names of the error categories by letter."""

SIGNIFICANT_HEADER = "Number of clinically significant errors by type: "
INSIGNIFICANT_HEADER = "Number of clinically insignificant errors by type: "

SYSTEM = (
    "You are an experienced radiologist. You compare candidate findings of a chest X-ray with reference findings and "
    "count the errors of the candidate by type and severity. You answer only with the two lists that are asked for."
)

INSTRUCTION = f"""An error is clinically significant if it is likely to change treatment, management or outcome of the \
patient. Every other error is clinically insignificant.

Types of errors:
(A) the candidate states a finding that the reference does not have
(B) the candidate leaves out a finding of the reference
(C) the candidate places a finding at the wrong location
(D) the candidate gives the wrong severity of a finding
(E) the candidate states a comparison with an earlier examination that the reference does not make
(F) the candidate leaves out a change from an earlier examination that the reference states

Count each error once. Differences in wording alone are not errors. Answer with exactly two lines:
{SIGNIFICANT_HEADER}[(A, 0), (B, 0), (C, 0), (D, 0), (E, 0), (F, 0)]
{INSIGNIFICANT_HEADER}[(A, 0), (B, 0), (C, 0), (D, 0), (E, 0), (F, 0)]"""

EXAMPLES: tuple[tuple[str, str, str, str], ...] = (
    (
        "The heart is normal in size. The lungs are clear. No effusion or pneumothorax.",
        "Heart size is normal. Clear lungs without effusion or pneumothorax.",
        "000000",
        "000000",
    ),
    (
        "Moderate right pleural effusion with adjacent atelectasis. The heart is mildly enlarged.",
        "Moderate left pleural effusion. Heart size is normal.",
        "011000",
        "010000",
    ),
    (
        "Small left apical pneumothorax, increased since the earlier examination. The left chest tube is in place.",
        "A chest tube is in place on the left. No pneumothorax is seen.",
        "010001",
        "000000",
    ),
    (
        "Mild interstitial edema. No focal consolidation. Degenerative changes of the spine.",
        "Severe pulmonary edema, worse than before. No consolidation.",
        "000110",
        "010000",
    ),
    (
        "Linear atelectasis at the left base. No consolidation. Calcified granuloma in the right upper lobe.",
        "Consolidation at the left base, suspicious for pneumonia. Calcified granuloma in the right middle lobe.",
        "100000",
        "011000",
    ),
)
"""Reference, candidate, and the counts of significant and insignificant errors from A to F."""

REMINDER = (
    "Your answer could not be read. Answer with exactly the two lines in the form shown, with all six letters in each, "
    "and nothing else."
)


def judge_messages(reference: str, candidate: str) -> Messages:
    """Return the messages that ask a judge for the errors of a candidate."""
    shown = [_case(one, other) + "\n" + _answer(first, second) for one, other, first, second in EXAMPLES]
    user = "\n##\n".join([INSTRUCTION, *shown, _case(reference, candidate)])
    return ({"role": "system", "content": SYSTEM}, {"role": "user", "content": user})


def messages_after_unread(messages: Messages, reply: str) -> Messages:
    """Return the messages to a judge after a reply that could not be read."""
    said = {"role": "assistant", "content": reply or "(no text)"}
    return (*messages, said, {"role": "user", "content": REMINDER})


def _case(reference: str, candidate: str) -> str:
    return f'Reference Findings:\n"""{reference}"""\nCandidate Findings:\n"""{candidate}"""\nErrors:'


def _answer(first: Sequence[str], second: Sequence[str]) -> str:
    return f"{SIGNIFICANT_HEADER}{_pairs(first)}\n{INSIGNIFICANT_HEADER}{_pairs(second)}"


def _pairs(counts: Sequence[str]) -> str:
    return "[" + ", ".join(f"({letter}, {count})" for letter, count in zip(CATEGORIES, counts, strict=True)) + "]"


PROMPT_SHA256 = hashlib.sha256("\0".join(m["content"] for m in judge_messages("", "")).encode()).hexdigest()
"""Hash of everything in the prompt except the two texts."""
