"""Page of a run: curves of the metrics file, progress, and reloading while it trains."""

from __future__ import annotations

from pathlib import Path

from llava.imaging.dicom.policy import DicomPolicy
from llava.samples import Conversation, Origin, Sample, Turn
from llava.train.curves import curve, series
from llava.train.held_out_page import write_cases
from llava.train.run_page import write_run_page
from tests.support.browser import look_at
from tests.support.tiny import tiny_image

ROWS = [
    {"step": step, "loss": 4 / step, "learning_rate": 1e-4, "epoch": 0.1, "name": "x", "flag": True}
    for step in range(1, 6)
] + [{"step": 5, "eval_loss": 1.0, "train_runtime": 3.0}, {"step": 4, "eval_loss": float("nan")}]


def test_numbers_that_are_logged_twice_are_series() -> None:
    assert list(series(ROWS)) == ["loss", "learning_rate"]
    assert series(ROWS)["loss"][1] == (2, 2.0)
    assert series([]) == {}


def test_the_curve_of_a_series_names_its_best_value() -> None:
    assert curve("loss", [(10, 4.0), (20, 2.0), (30, 3.0)]).note == "lowest 2 at step 20"
    assert curve("eval_open_recall", [(1, 0.5), (2, 0.5)]).note == "highest 0.5 at step 1"
    assert curve("eval_open_recall", [(1, 0.5), (2, 0.5)]).name == "held-out open recall"


def test_the_page_reloads_until_the_run_is_over(tmp_path: Path) -> None:
    write_run_page(tmp_path, ROWS, num_steps=20, is_over=False)
    text = (tmp_path / "report.html").read_text()
    assert '<meta http-equiv="refresh" content="10">' in text and "training: step 5 of 20" in text
    assert text.count("<polyline") == 2 and "25.0 %" in text and "<h3>learning rate</h3>" in text
    write_run_page(tmp_path, ROWS[:1], num_steps=1, is_over=True)
    text = (tmp_path / "report.html").read_text()
    assert "refresh" not in text and "finished: step 1 of 1" in text and "Curves appear after two logs" in text


def test_memory_has_a_curve_and_the_chat_line_names_the_run(tmp_path: Path) -> None:
    rows = [{**row, "peak_memory_gb": 1.25 + number} for number, row in enumerate(ROWS[:3])]
    write_run_page(tmp_path, rows, num_steps=20, is_over=False)
    text = (tmp_path / "report.html").read_text()
    assert "<h3>peak memory, GB</h3>" in text and text.count("<polyline") == 3
    assert f"llava chat --model {tmp_path} --image FILE" in text


def held_out(folder: Path) -> list[Sample]:
    """Two rows, one with an image whose name and folder name a person."""
    (folder / "Zyx Quentin").mkdir()
    tiny_image(1).save(folder / "Zyx Quentin" / "zyx.png")
    turns = (Turn("human", "<image>\nIs <b> seen?"), Turn("gpt", "yes"))
    first = Sample("a", Conversation(turns), ("Zyx Quentin/zyx.png",), origin=Origin("rows.json", 4))
    return [first, Sample("b", Conversation((Turn("human", "Who?"), Turn("gpt", "me"))), origin=Origin("rows.json", 7))]


def test_held_out_answers_are_shown_with_their_images(tmp_path: Path) -> None:
    samples = held_out(tmp_path)
    write_cases(tmp_path, samples, ["no & more", "me"], [0.0, 1.0], image_folder=tmp_path, dicom=DicomPolicy())
    write_run_page(tmp_path, ROWS, num_steps=20, is_over=False)
    text = (tmp_path / "report.html").read_text()
    assert text.count('class="case"') == 2 and text.count("data:image/jpeg") == 1
    assert "Is &lt;b&gt; seen?" in text and "no &amp; more" in text and "row 4" in text and "no image" in text
    assert "quentin" not in text.lower() and "zyx" not in text.lower()


def test_the_page_fits_a_phone(tmp_path: Path) -> None:
    write_cases(
        tmp_path, held_out(tmp_path), ["no " * 80, "x" * 300], [0, 1], image_folder=tmp_path, dicom=DicomPolicy()
    )
    write_run_page(tmp_path, ROWS, num_steps=20, is_over=True)
    for found in look_at(tmp_path, [tmp_path / "report.html"], widths=(390, 1280)):
        assert found["sizes"][0] <= found["sizes"][1] and found["requests"] == []
