"""`llava findings`: images in, findings out, labels, JSON, one warning for each kind of difference to the training."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom.data
import pytest
from PIL import Image

from llava.conversation import get_template
from llava.data.report_rows import report_question
from llava.errors import DataError, GenerationError
from llava.generation.protocol import Completion, Prompt, Sampling
from llava.imaging.image_processor import cut_share
from llava.serve import findings

TEXT = "Mild cardiomegaly. Possible edema. No effusion."


class Engine:
    """Engine that finds the same in every image, and records its prompts."""

    def __init__(self, template: str = "v1", mode: str = "square", completion: Completion | None = None) -> None:
        crop = SimpleNamespace(do_center_crop=True, do_resize=True, size={"shortest_edge": 28}, crop_size={})
        crop.crop_size = {"height": 28, "width": 28}
        self.processor = SimpleNamespace(template=get_template(template), image_mode=mode, image_processor=crop)
        self.completion = completion or Completion(TEXT, (1, 2, 3), "stop")
        self.prompts: list[Prompt] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        self.prompts += prompts
        return [[self.completion] for _ in prompts]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    fake = Engine()
    monkeypatch.setattr(findings, "local_engine_of", lambda args: fake)
    return fake


@pytest.fixture
def film(tmp_path: Path) -> str:
    """A square PNG of 16 bits."""
    levels = np.arange(400, dtype=np.uint16).reshape(20, 20) * 100
    Image.fromarray(levels).save(tmp_path / "film.png")
    return str(tmp_path / "film.png")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_findings_of_one_image(
    film: str, engine: Engine, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    findings.main([film, "--model", "m", "--reason", "cough"])
    shown = capsys.readouterr()
    assert shown.out == TEXT + "\n" and "research use, not for diagnosis" in shown.err
    [prompt] = engine.prompts
    assert prompt.conversation.turns[0].text == f"<image>\n{report_question('findings', 'cough')}"
    assert warnings_of(caplog) == []


def test_two_images_are_one_batch_with_names_and_labels(
    film: str, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    findings.main([film, film, "--model", "m", "--labels"])
    block = f"{film}\n{TEXT}\n  stated: Cardiomegaly\n  uncertain: Edema\n  denied: Pleural Effusion\n"
    assert capsys.readouterr().out == f"{block}\n{block}" and len(engine.prompts) == 2


def test_json_lines(film: str, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    findings.main([film, film, "--model", "m", "--json", "--labels"])
    first, _ = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["image"], first["findings"], first["num_new_tokens"], first["stop_reason"]) == (film, TEXT, 3, "stop")
    assert first["labels"]["Cardiomegaly"] == 1 and first["labels"]["Edema"] == -1
    assert first["evidence"][0]["finding"] == "Cardiomegaly"


@pytest.mark.parametrize("content", [None, b"no image"])
def test_a_bad_file_is_reported_before_a_model_is_loaded(
    film: str, tmp_path: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "local_engine_of", lambda args: pytest.fail("a model was loaded"))
    path = tmp_path / "other.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"other\.png"):
        findings.main([film, str(path), "--model", "m"])


def test_a_ct_slice_is_answered_with_one_warning(
    film: str, engine: Engine, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    slice_file = str(pydicom.data.get_testdata_file("CT_small.dcm"))
    findings.main([slice_file, film, "--model", "m"])
    assert capsys.readouterr().out.count(TEXT) == 2
    [warning] = warnings_of(caplog)
    assert "CT_small.dcm (modality CT): not frontal X-rays" in warning


@pytest.mark.parametrize(
    ("view", "modality", "expected"),
    [("PA", "DX", ""), ("AP", "CR", ""), ("", "CR", ""), ("LL", "DX", "view LL"), ("", "MR", "modality MR")],
)
def test_views_in_dicom_headers(view: str, modality: str, expected: str, tmp_path: Path) -> None:
    dataset = pydicom.dcmread(str(pydicom.data.get_testdata_file("CT_small.dcm")))
    dataset.Modality, dataset.ViewPosition = modality, view
    path = tmp_path / "film.dcm"
    dataset.save_as(path)
    assert findings.read_radiograph(str(path)).view == expected


def test_a_cut_image_and_another_template_are_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("L", (40, 20)).save(tmp_path / "wide.png")
    monkeypatch.setattr(findings, "local_engine_of", lambda args: Engine("chatml"))
    findings.main([str(tmp_path / "wide.png"), "--model", "m"])
    cut, template = warnings_of(caplog)
    assert "wide.png (50 %): cut by the center crop" in cut
    assert "template is chatml; LLaVA-Rad was trained with v1" in template


@pytest.mark.parametrize(
    ("size", "mode", "expected"),
    [((20, 20), "square", 0.0), ((20, 40), "square", 0.5), ((100, 85), "square", 0.15), ((20, 40), "pad", 0.0)],
)
def test_cut_share(size: tuple[int, int], mode: str, expected: float) -> None:
    assert cut_share(Engine(mode=mode).processor, size) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "expected"), [("v1", True), ("vicuna_v1", True), ("v0", False)])
def test_template_by_its_text(name: str, expected: bool) -> None:
    assert findings.has_trained_template(get_template(name)) is expected


def test_an_image_without_findings_fails_after_the_others(
    film: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    failed = Completion("", (), "error", error="too long")
    monkeypatch.setattr(findings, "local_engine_of", lambda args: Engine(completion=failed))
    with pytest.raises(GenerationError, match=r"no findings for .*film\.png"):
        findings.main([film, "--model", "m", "--json"])
    assert json.loads(capsys.readouterr().out)["error"] == "too long"


def test_cut_findings_are_named(film: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(findings, "local_engine_of", lambda args: Engine(completion=Completion("a", (1,), "length")))
    findings.main([film, "--model", "m", "--max-new-tokens", "1"])
    assert warnings_of(caplog) == [f"{film}: cut at --max-new-tokens 1"]
