"""Annotation files of LLaVA-Rad as training rows: selections, questions, and causes of rows that are left out."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llava.data.records import load_samples
from llava.errors import ConfigError, DataError

ROWS = """[
{"id": "1_1", "image": "mimic/p10/a.jpg", "generate_method": "rule-based", "reason": "cough\\nand fever", "view": "AP",
 "conversations": [{"from": "human", "value": "<image>\\nDescribe."}, {"from": "gpt", "value": " Clear lungs. "}]},
{"id": "1_1", "image": "mimic/p10/b.jpg", "generate_method": "gpt4", "reason": null, "view": "PA",
 "conversations": [{"from": "human", "value": "Describe.\\n<image>"}, {"from": "gpt", "value": "Small effusion."}]},
{"id": "2_1", "image": "mimic/p10/c.jpg", "generate_method": "rule-based", "reason": NaN, "view": "LATERAL",
 "conversations": [{"from": "human", "value": "<image>\\nDescribe."}, {"from": "gpt", "value": "No effusion."}]},
{"id": "3_1", "image": "mimic/p10/d.jpg", "generate_method": "rule-based", "reason": " ", "view": NaN,
 "conversations": [{"from": "human", "value": "<image>\\nDescribe."}, {"from": "gpt", "value": NaN}]}
]"""

WITHOUT_REASON = "<image>\nProvide a description of the findings in the radiology image."
WITH_REASON = f"{WITHOUT_REASON[:-1]} given the following indication: cough and fever"
BY_VIEW = "<image>\nGiven the chest X-ray image from {} view, describe the findings in the image: "


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An annotation file with bare NaN, repeated ids and the published prefix."""
    (tmp_path / "chat.json").write_text(ROWS)
    return tmp_path / "chat.json"


@pytest.mark.parametrize(
    ("loader", "questions"),
    [
        ("mimic_train_findings", [WITH_REASON, WITHOUT_REASON]),
        ("mimic_test_findings", [WITH_REASON]),
        ("mimic_cxr_all_frontal_findings", ["<image>\nDescribe.", "<image>\nDescribe."]),
        ("mimic_cxr_all_views_findings", [BY_VIEW.format(view) for view in ("AP", "PA", "LATERAL")]),
    ],
)
def test_selections_and_questions(file: Path, loader: str, questions: list[str]) -> None:
    samples = load_samples(file, loader=loader)
    assert [sample.conversation.turns[0].text for sample in samples] == questions


def test_names_answers_and_repeated_ids(file: Path) -> None:
    samples = load_samples(file, loader="mimic_train_findings")
    assert [sample.images for sample in samples] == [("p10/a.jpg",), ("p10/b.jpg",)]
    assert [sample.conversation.turns[1].text for sample in samples] == ["Clear lungs.", "Small effusion."]
    assert [sample.id for sample in samples] == ["1_1", "1_1"]


def test_rows_left_out_are_counted_by_cause(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_samples(file, loader="mimic_test_findings")
    assert "not a frontal view (AP or PA) 1" in caplog.text
    assert "test row not extracted by rules 1" in caplog.text
    assert "no findings 1" in caplog.text


def test_a_file_of_rows_that_are_all_left_out(tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text('[{"id": "1", "image": "a.jpg", "conversations": []}]')
    with pytest.raises(DataError, match="all were left out: no findings 1"):
        load_samples(tmp_path / "chat.json", loader="mimic_train_findings")


def test_unknown_loader(file: Path) -> None:
    with pytest.raises(ConfigError, match="unknown loader 'mimic'; known: chexpert_plus_findings, default, mimic_cxr"):
        load_samples(file, loader="mimic")
