"""Controls of a model that uses the image and of one that ignores it; the majority baseline."""

from __future__ import annotations

import pytest

from llava.errors import DataError
from llava.eval.medvqa.controls import by_type, control_verdicts, majority_answers, majority_items
from llava.eval.medvqa.items import ScoredItem
from llava.eval.medvqa.report import full_report
from llava.samples import from_row
from tests.support.eval_fakes import row


def make_items(looks: bool) -> tuple[list[ScoredItem], list[ScoredItem]]:
    """Return sixty questions on thirty images; half the references are no, the answer of the blank run."""
    items, blank = [], []
    for index in range(60):
        reference = "yes" if index % 2 else "no"
        types = ("PRES",) if index % 4 < 2 else ("POS", "ABN")
        said = reference if looks else "no"
        items.append(ScoredItem(str(index), "?", reference, said, True, types, f"{index // 2}.png"))
        blank.append(ScoredItem(str(index), "?", reference, "no", True, types, f"{index // 2}.png"))
    return items, blank


@pytest.mark.parametrize(("looks", "value", "gain"), [(True, 100.0, 50.0), (False, 50.0, 0.0)])
def test_gain_from_the_image(looks: bool, value: float, gain: float) -> None:
    items, blank = make_items(looks)
    report = full_report(items, blank=blank, num_resamples=200)
    row_ = report["scores"]["strict"]["closed accuracy"]
    assert row_["answered"]["value"] == value
    assert row_["blank"]["value"] == 50.0
    assert row_["from_picture"]["value"] == gain
    assert (row_["from_picture"]["low"] > 0) is looks
    (sentence,) = control_verdicts(report["scores"]["strict"])
    assert ("NOT above a gray image" in sentence) is not looks
    types = {entry["type"]: entry for entry in report["by_type"]}
    assert set(types) == {"PRES", "POS", "ABN"}
    assert types["ABN"]["from_picture"]["value"] == gain
    assert types["PRES"]["answered"]["num_items"] == 30


def test_other_questions_are_refused() -> None:
    items, blank = make_items(True)
    with pytest.raises(DataError, match="other questions"):
        by_type(items, blank[::-1], num_resamples=10, seed=0)
    with pytest.raises(DataError, match="other questions"):
        full_report(items, blank=blank[1:])


def test_majority() -> None:
    rows = [
        row(1, "a", "?", "No."),
        row(2, "a", "?", "no"),
        row(3, "a", "?", "yes"),
        row(4, "a", "?", "The lung", kind="OPEN"),
    ]
    answers = majority_answers(map(from_row, rows), source="training answers")
    assert (answers.closed, answers.open, answers.source) == ("no", "lung", "training answers")
    items, _ = make_items(True)
    assert {item.prediction for item in majority_items(items, answers)} == {"no"}
    report = full_report(items, baseline=answers, num_resamples=5)
    strict = report["scores"]["strict"]
    assert strict["closed accuracy"]["majority"] == 50.0
    assert strict["closed accuracy"]["above_majority"]["value"] == 50.0
    (sentence,) = control_verdicts(strict)
    assert sentence.startswith("closed accuracy is above the majority answer: +50.00 points [")
    assert majority_answers([], source="x").closed is None


@pytest.mark.parametrize(("low", "verdict"), [(-2.0, "NOT above"), (0.0, "NOT above"), (0.5, "above")])
@pytest.mark.parametrize(("key", "control"), [("from_picture", "a gray image"), ("above_majority", "the majority")])
def test_the_interval_decides_the_verdict(key: str, control: str, low: float, verdict: str) -> None:
    """A gain of 5 points is not enough if its interval contains zero."""
    scores = {"closed accuracy": {key: {"value": 5.0, "low": low, "high": 12.0}}, "open recall": {}}
    (sentence,) = control_verdicts(scores)
    assert sentence.startswith(f"closed accuracy is {verdict} {control}")


@pytest.mark.parametrize(("each", "kind"), [(10, "PRES"), (3, "POS"), (25, "SIZE"), (10, ""), (50, "ABN")])
def test_questions_of_one_image_are_drawn_together_by_type(each: int, kind: str) -> None:
    """All questions of one image are right, all of the other wrong: an image decides the whole score."""
    items = [
        ScoredItem(str(n), "?", "yes", "yes" if n < each else "no", True, (kind,), f"{n // each}.png")
        for n in range(2 * each)
    ]
    (of_type,) = by_type(items, None, num_resamples=200, seed=0)
    assert (of_type["answered"]["low"], of_type["answered"]["high"]) == (0.0, 100.0)
