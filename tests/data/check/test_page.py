"""Distributions on the page of a check: what is counted, the line of a limit, and what has one value."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.data.check.cli import main
from llava.data.check.lengths import TextLengths
from llava.samples import Conversation, Turn
from tests.support.browser import look_at
from tests.support.check_files import write_rows
from tests.support.text_tools import write_processor


def asked(number: int, image: str, *turns: tuple[str, str]) -> dict[str, Any]:
    """Return a row with several questions."""
    written = [
        {"from": role, "value": text} for pair in turns for role, text in zip(("human", "gpt"), pair, strict=True)
    ]
    written[0]["value"] = "<image>\n" + written[0]["value"]
    return {"id": number, "image": image, "conversations": written}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The page of three rows with four questions about two images."""
    images = tmp_path / "images"
    images.mkdir()
    for name, size in (("0.png", (40, 30)), ("1.png", (80, 30))):
        Image.new("L", size, len(name)).save(images / name)
    rows = [
        asked(0, "0.png", ("Is it normal?", "yes")),
        asked(1, "1.png", ("What is seen here?", "a large mass"), ("Where?", "left")),
        asked(2, "0.png", ("Is it large?", "no")),
    ]
    words = [
        str(write_rows(tmp_path / "rows.json", rows)),
        "--images",
        str(images),
        "--html",
        str(tmp_path / "page.html"),
    ]
    model = str(write_processor(tmp_path / "model"))
    main(
        [
            *words,
            "--json",
            str(tmp_path / "out.json"),
            "--model",
            model,
            "--max-length",
            "40",
            "--num-image-tokens",
            "4",
        ]
    )
    return tmp_path / "page.html"


def bars(text: str, name: str) -> list[str]:
    """Return the texts of the bars of a histogram, those without rows left out."""
    [plot] = re.findall(rf"<h3>{name}</h3>.*?</svg>", text, re.DOTALL)
    return [title for title in re.findall(r"<title>(.*?)</title>", plot) if ": 0 " not in title]


def test_what_the_rows_hold_is_drawn(page: Path) -> None:
    text = page.read_text()
    assert bars(text, "questions per row") == ["1: 2 rows", "2: 1 rows"]
    assert bars(text, "words per question") == ["1: 1 questions", "3: 2 questions", "4: 1 questions"]
    assert bars(text, "words per answer") == ["1: 3 answers", "3: 1 answers"]
    assert sum(int(title.split(": ")[1].split()[0]) for title in bars(text, "image width in pixels")) == 2
    assert "The same everywhere: images per row 1, image height in pixels 30" in text
    words = json.loads((page.parent / "out.json").read_text())["files"]["file"]["words"]
    assert words["question"] == {"number": 4, "shortest": 1, "median": 3, "p90": 4, "longest": 4}


def test_tokens_are_drawn_with_the_limit(page: Path) -> None:
    text, tokens = page.read_text(), json.loads((page.parent / "out.json").read_text())["tokens"]
    assert "lengths" not in tokens and tokens["num_rows"] == 3
    [plot] = re.findall(r"<h3>tokens per row</h3>.*?</div>", text, re.DOTALL)
    assert sum(int(title.split(": ")[1].split()[0]) for title in bars(text, "tokens per row")) == 3
    assert ('class="limit"' in plot) == ("dashed: 40" in plot)


def test_without_rows_nothing_is_drawn(tmp_path: Path) -> None:
    main([str(write_rows(tmp_path / "rows.json", [{"id": 1}])), "--html", str(tmp_path / "page.html")])
    assert "Distributions" not in (tmp_path / "page.html").read_text()


def test_placeholders_and_long_texts() -> None:
    lengths = TextLengths()
    lengths.add(Conversation((Turn("human", "<image>\nWhat is it?"), Turn("gpt", "word " * 20_000))))
    assert lengths.words == {"question": {3: 1}, "answer": {10_000: 1}}
    assert TextLengths().table() == {}


def test_histograms_fit_a_phone_and_their_marks_stay_inside(page: Path, tmp_path: Path) -> None:
    script = """
    const out = [...page.querySelectorAll(".plots text")].filter(one => {
      const box = one.getBoundingClientRect(), all = one.closest("svg").getBoundingClientRect();
      return box.left < all.left - 1 || box.right > all.right + 1 || box.height < 10; });
    return [page.querySelectorAll(".plots svg").length, out.map(one => one.textContent)];"""
    for found in look_at(tmp_path, [page], widths=(390, 1280), script=script):
        assert found["sizes"][0] <= found["sizes"][1] and found["value"][0] >= 5 and found["value"][1] == []


@pytest.mark.parametrize("words", [[], ["--show-folders"]])
def test_folders_of_patients_are_shown_on_request_only(words: list[str], tmp_path: Path) -> None:
    for number, name in enumerate(("Zyx Quentin", "Zyx Anna")):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (40, 30), 7).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "Zyx Anna" / "broken.png").write_bytes(b"no image")
    train, test = "Zyx Quentin/0.png", "Zyx Anna/1.png"
    names = [train, test, "Zyx Anna/broken.png", "Zyx Anna/missing.png", "./Zyx Anna//absent.png"]
    names += ["../Zyx Eve/2.png", "/Zyx Ada/3.png", "file:///Zyx Ida/4.png"]
    rows = [asked(number, name, ("What?", "a")) for number, name in enumerate(names)]
    page, data = tmp_path / "page.html", str(write_rows(tmp_path / "rows.json", rows))
    against = ["--against", str(write_rows(tmp_path / "test.json", [asked(9, test, ("Where?", "b"))]))]
    for more in ([], ["--images", str(tmp_path / "images")]):
        with contextlib.suppress(SystemExit):
            main([data, *against, *more, "--html", str(page), *words])
        text = page.read_text()
        assert ("Zyx" in text) == bool(words) and "1.png" in text
        assert bool(words) or str(tmp_path) not in text
