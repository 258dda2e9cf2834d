"""Numbers of a quickstart against hand counts, and its result page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from llava.eval.medvqa.items import ScoredItem
from llava.quickstart import report
from llava.samples import Conversation, Sample, Turn

NUM_IMAGES = 30


def items(right: float) -> list[ScoredItem]:
    """Return a closed and an open question per image, answered right for the first `right` of the images."""
    answers = []
    for index in range(NUM_IMAGES):
        hit = index < right * NUM_IMAGES
        answers.append(
            ScoredItem(f"{index}a", "Is it?", "yes", "Yes." if hit else "no", True, ("presence",), f"{index}.png")
        )
        answers.append(
            ScoredItem(f"{index}b", "What?", "blue", "blue" if hit else "pink", False, ("stain",), f"{index}.png")
        )
    return answers


def samples(answers: list[ScoredItem]) -> list[Sample]:
    return [
        Sample(
            item.question_id,
            Conversation((Turn("human", item.question), Turn("gpt", item.reference))),
            (item.image,),
            {"question_type": item.types[0], "answer_type": "CLOSED" if item.closed else "OPEN"},
        )
        for item in answers
    ]


def compared(after: float, blank: float) -> dict[str, object]:
    runs = {"after": items(after), "after_blank": items(blank), "before": items(0.0)}
    runs["majority"] = items(0.3)
    return report.compare_runs(runs)


def test_accuracy_counts_open_and_closed_questions() -> None:
    result = report.compare_runs({"after": items(0.6), "after_blank": items(0.2), "majority": items(0.3)})
    assert result["num_questions"] == 60 and result["num_images"] == 30
    assert result["accuracy"]["after"]["value"] == pytest.approx(60.0)
    assert result["difference"]["after_blank"]["value"] == pytest.approx(40.0)
    assert result["difference"]["majority"]["value"] == pytest.approx(30.0)
    assert result["by_type"]["stain"] == pytest.approx({"after": 60.0, "after_blank": 20.0, "majority": 30.0})
    # Both questions of an image are right or wrong together, so the interval is that of 30 values, not 60.
    low, high = (result["accuracy"]["after"][side] for side in ("low", "high"))
    assert high - low == pytest.approx(2 * 1.96 * 100 * (0.24 / 30) ** 0.5, rel=0.15)


def test_a_run_about_fewer_questions_is_compared_on_these() -> None:
    # The model is right about the first 18 images; before training only the last 15 were asked about, all wrong.
    before = [item for item in items(0.0) if int(item.image.removesuffix(".png")) >= 15]
    result = report.compare_runs({"after": items(0.6), "after_blank": items(0.2), "before": before})
    assert result["accuracy"]["before"]["num_items"] == 30 and result["num_questions"] == 60
    assert result["accuracy"]["before"]["value"] == 0.0
    assert result["difference"]["before"]["value"] == pytest.approx(20.0)
    text = report.summary_text(
        {**result, "difference": {**result["difference"], "majority": result["difference"]["before"]}}
    )
    assert "(30 questions)" in text and text.count("questions)") == 1


def test_a_type_that_a_run_was_not_asked_about() -> None:
    before = [item for item in items(0.0) if item.types == ("stain",)]
    result = report.compare_runs({"after": items(0.6), "after_blank": items(0.2), "before": before})
    assert report.type_rows(result) == [["presence", "60", "20", "-"], ["stain", "60", "20", "0"]]


@pytest.mark.parametrize(("after", "blank", "passed"), [(0.9, 0.3, True), (0.9, 0.85, False), (0.35, 0.0, False)])
def test_the_claim_needs_both_controls(after: float, blank: float, passed: bool) -> None:
    result = compared(after, blank)
    assert result["passed"] is passed
    assert ("NOT SHOWN" in report.verdict_text(result)) is not passed


def test_the_majority_is_counted_in_the_training_rows_by_type() -> None:
    answers = items(1.0)
    train = samples([replace(item, reference="no" if item.closed else "pink") for item in items(1.0)])
    majority = report.majority_items(answers, samples(answers), train)
    assert {item.prediction for item in majority if item.closed} == {"no"}
    assert {item.prediction for item in majority if not item.closed} == {"pink"}
    assert [item.question_id for item in majority] == [item.question_id for item in answers]


def test_the_page_names_the_data_and_shows_three_answers(tmp_path: Path) -> None:
    for index in range(NUM_IMAGES):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    (tmp_path / "short.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    path = tmp_path / "index.html"
    report.write_page(
        path,
        result=compared(0.9, 0.3),
        items=items(0.9),
        blank=items(0.3),
        image_folder=tmp_path,
        curves={
            "Loss: tuning": tmp_path / "metrics.jsonl",
            "Loss: short": tmp_path / "short.jsonl",
            "Loss: absent": tmp_path / "absent.jsonl",
        },
        facts={"seed": 0},
        reason="Size small.",
        times=[["tuning", "60 s", "70 s"]],
        notice="SYNTHETIC drawings",
        chat="llava chat --model m --image i.png",
    )
    text = path.read_text()
    assert text.count('class="case"') == 3 and text.count("data:image/jpeg") == 3
    assert "Size small." in text and "70 s" in text
    assert "<h3>Loss: tuning</h3>" in text and "lowest 1.5 at step 2" in text and text.count("<polyline") == 1
    assert "Loss: short" not in text and "Loss: absent" not in text
    assert text.count("SYNTHETIC drawings") >= 2
    assert "llava chat --model m --image i.png" in text and "90.0" in text
