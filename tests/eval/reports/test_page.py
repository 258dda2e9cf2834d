"""Page of scored reports: letters, order, evidence, filter, images, and no requests."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pydicom.data
import pytest
from PIL import Image

from llava.eval.reports.cli import score_main
from llava.eval.reports.page import finding_letters, marked_parts
from llava.report_labels.findings import FINDINGS
from llava.report_labels.labeler import label_report
from tests.support.browser import look_at
from tests.support.chromium import browser

ROWS = [
    {"id": "good", "image": "a.png", "prediction": "Small effusion.", "reference": "Small effusion."},
    {
        "id": "bad",
        "image": "b.dcm",
        "prediction": "Pneumothorax. <b>No edema</b>.",
        "reference": "Small effusion. Possible edema.",
    },
]


@pytest.fixture
def page(tmp_path: Path) -> str:
    """The page of two reports, one with a PNG and one with a DICOM image."""
    Image.new("L", (30, 40), 90).save(tmp_path / "a.png")
    (tmp_path / "b.dcm").write_bytes(Path(str(pydicom.data.get_testdata_file("CT_small.dcm"))).read_bytes())
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    score_main([str(tmp_path / "in.jsonl"), "--output-dir", str(tmp_path / "out"), "--image-folder", str(tmp_path)])
    return (tmp_path / "out" / "report.html").read_text()


def test_worst_report_is_first(page: str) -> None:
    assert page.index("<dd>bad,") < page.index("<dd>good,")


def test_evidence_has_color_and_letter(page: str) -> None:
    assert re.search(r'class="evidence A" title="Pleural Effusion 1">effusion<sup>A</sup>', page)
    assert re.search(r'class="evidence F" title="Pneumothorax 1">Pneumothorax<sup>F</sup>', page)
    assert re.search(r'class="evidence M" title="Pleural Effusion 1">effusion<sup>M</sup>', page)
    assert re.search(r'class="evidence U" title="Edema -1 \(possible\)">edema<sup>U</sup>', page)
    for word in ("agreement", "false", "missing", "uncertain"):
        assert word in page


def test_what_is_always_shown(page: str) -> None:
    for column in ("commonest sentence", "normal (0)", "abnormal (2)", "precision", "recall", "references"):
        assert f">{column}</th>" in page, column
    row = re.search(r"<tr>\s*<td[^>]*>Pleural Effusion</td>(.*?)</tr>", page, re.DOTALL)
    assert row is not None and re.findall(r">([^<]+)</td>", row[1]) == ["1.000", "0.500", "0.667", "2"]
    assert "distinct predictions 100.0%" in page and "swapped sides in 0 reports" in page
    assert page.index("uncertain as negative") < page.index("Reports, worst first")


def test_text_is_escaped(page: str) -> None:
    assert "&lt;b&gt;No " in page
    assert "<b>No " not in page


def test_page_makes_no_requests(page: str) -> None:
    assert not re.search(r"<script|<link|https?://|url\(", page)
    assert "default-src 'none'" in page


def test_filter_by_finding(page: str) -> None:
    number = FINDINGS.index("Pleural Effusion")
    assert f'<label for="f{number}">Pleural Effusion (2)</label>' in page
    assert page.count(f'id="f{number}"') == 1
    for row in range(len(FINDINGS)):
        assert f"#f{row}:checked ~ .cases .case:not(.f{row})" in page


def test_images_are_embedded(page: str) -> None:
    assert page.count("data:image/jpeg;base64,") == 2


@pytest.mark.parametrize(
    ("prediction", "reference", "letter"),
    [(1, 1, "A"), (0, 0, "A"), (1, 0, "F"), (1, None, "F"), (0, 1, "M"), (None, 1, "M"), (-1, 1, "U"), (0, -1, "U")],
)
def test_letters(prediction: int | None, reference: int | None, letter: str) -> None:
    assert finding_letters({"Edema": prediction}, {"Edema": reference}) == {"Edema": letter}


@pytest.mark.parametrize("labels", [(None, None), (0, None), (None, 0)])
def test_denials_of_one_side_have_no_letter(labels: tuple[int | None, int | None]) -> None:
    assert finding_letters({"Edema": labels[0]}, {"Edema": labels[1]}) == {}


def test_parts_are_the_whole_text() -> None:
    text = "Heart size is normal. No effusion, consolidation or edema."
    parts = marked_parts(text, label_report(text), {"Edema": "A", "Consolidation": "M"})
    assert "".join(part["text"] for part in parts) == text
    assert [part["text"] for part in parts if part["letter"]] == ["consolidation", "edema"]


FILTER = """
page.querySelector("label[for=f%d]").click();
const shown = [...page.querySelectorAll(".case")].filter(one => one.offsetHeight > 0);
const color = letter => view.getComputedStyle(page.querySelector(".tag." + letter)).color;
return {shown: shown.map(one => one.querySelector("dd").textContent), all: page.querySelectorAll(".case").length,
  colors: ["A", "F", "M", "U"].map(color),
  letters: [...page.querySelectorAll(".tag b")].slice(0, 4).map(b => b.textContent)};
"""


def test_in_a_browser(page: str, tmp_path: Path) -> None:
    script = FILTER % FINDINGS.index("Pneumothorax")
    for found in look_at(tmp_path, [tmp_path / "out" / "report.html"], widths=(390, 1280), script=script):
        assert found["sizes"][0] <= found["sizes"][1] and found["requests"] == []
        value = found["value"]
        assert value["all"] == 2 and [name.split(",")[0] for name in value["shown"]] == ["bad"]
        assert len(set(value["colors"])) == 4 and value["letters"] == ["A", "F", "M", "U"]


SHOWN = """[...document.querySelectorAll(".case")].filter(one => one.offsetHeight > 0)
  .map(one => one.querySelector("dd").textContent.split(",")[0])"""


def test_no_request_leaves_the_page(page: str, tmp_path: Path) -> None:
    file = tmp_path / "out" / "report.html"
    leaking = tmp_path / "leaking.html"
    without_policy = re.sub(r"<meta[^>]*Content-Security-Policy[^>]*>", "", page)
    leaking.write_text(without_policy.replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>'))
    with browser(tmp_path) as shown:
        for width in (390, 1280):
            shown.open(file.as_uri(), width=width)
            assert shown.until("document.readyState == 'complete' && !!document.querySelector('.case')")
            assert shown.value(SHOWN) == ["bad", "good"]
            assert shown.value("document.documentElement.scrollWidth") <= width
            sizes = shown.value(
                "[...document.querySelectorAll('.case img')].map(i => [i.naturalWidth, i.naturalHeight])"
            )
            assert len(sizes) == 2 and all(min(size) > 0 for size in sizes)
            for finding, expected in (("Pneumothorax", ["bad"]), ("Pleural Effusion", ["bad", "good"])):
                shown.value(f"document.querySelector('label[for=f{FINDINGS.index(finding)}]').click()")
                assert shown.value(SHOWN) == expected
        assert shown.requests == {"file://"} and shown.errors == []
        shown.open(leaking.as_uri())
        assert shown.until("document.images.length == 3")
        assert (
            shown.until("document.images[2].complete") and "http://127.0.0.1:9" in shown.requests
        )  # such a request is noticed
