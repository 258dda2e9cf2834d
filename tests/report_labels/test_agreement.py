"""Agreement of the findings of two reports."""

from __future__ import annotations

import pytest

from llava.report_labels.agreement import agreement


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ("No pleural effusion.", "There is no effusion.", 1.0),
        ("Small effusion.", "No effusion.", 0.0),
        ("Small effusion.", "Possible effusion.", 0.5),
        ("Small effusion. No pneumothorax.", "Small effusion.", 0.5),
        ("Nothing to report here, XXXX kyphosis.", "Mild scoliosis.", 1.0),
        ({"Edema": 1}, {"Edema": -1}, 0.5),
        ({"Edema": 1}, "No edema.", 0.0),
    ],
)
def test_values(reference: object, prediction: object, expected: float) -> None:
    assert agreement(reference, prediction) == expected  # type: ignore[arg-type]


def test_is_symmetric() -> None:
    one, other = "Cardiomegaly. No effusion.", "Normal heart. Possible effusion. Pneumothorax."
    assert agreement(one, other) == agreement(other, one)
