"""Open and closed questions; decisions by whole words."""

from __future__ import annotations

import pytest

from llava.errors import DataError
from llava.scoring.decisions import first_decision, is_closed


def test_kinds_of_answers() -> None:
    assert is_closed("Closed", "left") and is_closed("yes/no", "no") and is_closed(None, "Yes.")
    assert not is_closed("other", "yes") and not is_closed(None, "left")
    with pytest.raises(DataError, match="answer_type 'maybe'"):
        is_closed("maybe", "left")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes, there is no fracture.", "yes"),
        ("No.", "no"),
        ("There is no effusion", "no"),
        ("The heart is normal, not enlarged", None),
        ("yesterday", None),
        ("**Yes**", "yes"),
        ("answer:no", "no"),
        ("", None),
    ],
)
def test_first_whole_word_decides(text: str, expected: str | None) -> None:
    assert first_decision(text) == expected
