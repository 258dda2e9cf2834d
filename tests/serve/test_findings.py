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

from llava.chat_families import FAMILIES
from llava.conversation import get_template
from llava.data.report_rows import report_question
from llava.errors import DataError, GenerationError
from llava.generation.protocol import Completion, Prompt, Sampling
from llava.imaging.image_processor import cut_share
from llava.jinja_template import JinjaTemplate
from llava.model.checkpoint.save import save_model
from llava.model.checkpoint.tools.convert import convert_checkpoint
from llava.report_labels.labeler import label_report
from llava.serve import findings
from tests.support.tiny import byte_tokenizer, tiny_llava

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
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith("llava")
    ]


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
    assert "the checkpoint names no template, and chatml is used; LLaVA-Rad was trained with v1" in template


@pytest.mark.parametrize(
    ("size", "mode", "expected"),
    [((20, 20), "square", 0.0), ((20, 40), "square", 0.5), ((100, 85), "square", 0.15), ((20, 40), "pad", 0.0)],
)
def test_cut_share(size: tuple[int, int], mode: str, expected: float) -> None:
    assert cut_share(Engine(mode=mode).processor, size) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("used", "saved", "expected"),
    [
        ("v1", None, ""),
        ("v1", "v1", ""),
        ("vicuna_v1", "v1", ""),
        ("v1", "vicuna_v1", ""),
        ("v0", None, "the checkpoint names no template, and v0 is used; LLaVA-Rad was trained with v1"),
        ("chatml", "chatml", "the model was trained with the template chatml, not with v1 as LLaVA-Rad"),
        ("v0", "v1", "the template is v0; the model was trained with v1. Remove --conv-mode."),
        ("v1", "chatml", "the template is v1; the model was trained with chatml. Remove --conv-mode."),
        ("v1", "auto", "the template is v1; the model was trained with auto. Remove --conv-mode."),
    ],
)
def test_a_template_is_judged_by_its_text(used: str, saved: str | None, expected: str) -> None:
    warning = findings.template_warning(get_template(used), saved)
    assert warning.startswith(expected) and bool(warning) == bool(expected)


def test_a_template_of_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FAMILIES["qwen2.5"]
    template = JinjaTemplate.of(tokenizer)
    expected = "the model was trained with the template auto, not with v1 as LLaVA-Rad"
    assert findings.template_warning(template, "auto") == expected  # type: ignore[arg-type]
    assert "Remove --conv-mode" in findings.template_warning(template, "v1")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny model with the template and the crop of LLaVA-Rad."""
    folder = tmp_path_factory.mktemp("model")
    loaded = tiny_llava(template="v1", image_mode="square", seed=5)  # whose findings depend on the image
    save_model(loaded.model, loaded.processor, str(folder))
    return str(folder)


def rows_of(checkpoint: str, capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    """Return the JSON rows of `llava findings` with a real engine."""
    findings.main([*words, "--model", checkpoint, "--device", "cpu", "--max-new-tokens", "8", "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def pydicom_file(name: str) -> str:
    """Return a file of pydicom-data or of pydicom."""
    path = pydicom.data.get_testdata_file(name, download=False)
    assert isinstance(path, str), f"{name}: no such file in pydicom-data"
    return path


def test_a_radiograph_of_pydicom_data(
    checkpoint: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = pydicom_file("RG3_UNCR.dcm")  # CR, AP, 1760 x 1760, 10 bits, inverted
    [row] = rows_of(checkpoint, capsys, path)
    assert row["image"] == path and row["num_new_tokens"] == 8 and row["stop_reason"] == "length"
    assert warnings_of(caplog) == [f"{path}: cut at --max-new-tokens 8"]


def test_several_kinds_of_files_are_one_batch_with_the_findings_of_each(
    checkpoint: str, film: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    wide = str(Path(film).with_name("wide.jpg"))
    Image.new("L", (40, 20), 90).save(wide)
    files = [film, wide, pydicom_file("RG1_UNCR.dcm"), pydicom_file("CT_small.dcm"), pydicom_file("6154")]
    together = rows_of(checkpoint, capsys, *files)
    views, cut, _ = warnings_of(caplog)
    assert cut == f"{wide} (50 %): cut by the center crop; findings there are not seen"
    assert "CT_small.dcm (modality CT)" in views and "6154 (view LL)" in views and "RG1" not in views
    assert [row["image"] for row in together] == files
    assert len({row["findings"] for row in together}) > 2, "the images must have different findings"
    assert together == [row for file in files for row in rows_of(checkpoint, capsys, file)]


def test_sixteen_bits_are_read(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = np.linspace(0, 65535, 56 * 56).reshape(56, 56)
    Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((levels / 257).round().astype(np.uint8)).save(tmp_path / "flat.png")
    Image.new("L", (56, 56)).save(tmp_path / "black.png")
    names = [str(tmp_path / name) for name in ("deep.png", "flat.png", "black.png")]
    deep, flat, black = (row["findings"] for row in rows_of(checkpoint, capsys, *names))
    assert deep == flat != black


def test_a_missing_file_among_others(checkpoint: str, film: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"missing\.dcm"):
        rows_of(checkpoint, capsys, film, "missing.dcm")
    assert capsys.readouterr().out == ""


def test_labels_are_those_of_the_text(checkpoint: str, film: str, capsys: pytest.CaptureFixture[str]) -> None:
    [row] = rows_of(checkpoint, capsys, film, "--labels")
    assert row["labels"] == label_report(row["findings"]).labels


TEMPLATES_OF_MODELS: list[tuple[str, list[str], list[str]]] = [
    ("v1", [], []),
    ("chatml", [], ["the model was trained with the template chatml, not with v1 as LLaVA-Rad"]),
    ("v1", ["--conv-mode", "chatml"], ["the template is chatml; the model was trained with v1. Remove --conv-mode."]),
]


def test_the_template_of_a_saved_model(
    film: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for number, (template, words, expected) in enumerate(TEMPLATES_OF_MODELS):
        loaded = tiny_llava(template=template)
        folder = str(tmp_path / str(number))
        save_model(loaded.model, loaded.processor, folder)
        caplog.clear()
        rows_of(folder, capsys, film, *words)
        assert [warning for warning in warnings_of(caplog) if "--max-new-tokens" not in warning] == expected


def test_the_template_of_a_model_in_the_published_format(
    film: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for template, expected in (("vicuna_v1", False), ("chatml_direct", True)):
        loaded = tiny_llava(template=template)
        save_model(loaded.model, loaded.processor, str(tmp_path / template))
        convert_checkpoint(tmp_path / template, tmp_path / f"{template}-legacy", "legacy")
        caplog.clear()
        rows_of(str(tmp_path / f"{template}-legacy"), capsys, film)
        warning = "the model was trained with the template chatml_direct, not with v1 as LLaVA-Rad"
        assert (warning in warnings_of(caplog)) is expected
        assert not any("names no template" in found for found in warnings_of(caplog))


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
