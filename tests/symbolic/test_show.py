"""`llava rules show`: the page for readers who do not program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.errors import ConfigError, DataError
from llava.symbolic.dialogues import dialogue_row
from llava.symbolic.hierarchy import draw_hierarchy
from llava.symbolic.rules import load_rules, shipped
from llava.symbolic.show import example_truth, main, sentences, ten_cases
from tests.support.browser import narrow_sizes
from tests.support.rule_files import MARROW, rules_of, write_rules


def test_the_page_has_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    main(["bone-marrow-aspirate", "--html", str(page)])
    assert capsys.readouterr().out == f"page: {page}\n"
    text = page.read_text()
    for part in ("Valid paths", "Constraints", "Questions and answers", "Example dialogue", "The reward of ten"):
        assert part in text
    assert "If quality is low, then cell quality is blood or clot; " in text
    assert text.count('class="reward"') == 10


def test_the_page_has_the_name_of_the_rules_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rules(tmp_path)
    monkeypatch.chdir(tmp_path)
    main([str(path), "--html"])
    assert "<svg" in (tmp_path / "marrow.html").read_text()  # a file without phrases: no dialogue, no rewards
    with pytest.raises(ConfigError):
        main([str(path), "--html", str(path)])


def test_the_drawing_joins_answers_that_fit(tmp_path: Path) -> None:
    rules = rules_of(tmp_path)
    drawing = draw_hierarchy(rules)
    assert len(drawing.boxes) == sum(len(node.values) for node in rules.nodes)
    pairs = {pair for path in rules.path_values for pair in zip(range(4), path, path[1:], strict=False)}
    assert len(drawing.lines) == len(pairs) == 15
    boxes = {(box.left, box.top) for box in drawing.boxes}
    assert all(0 <= left < drawing.width and 0 <= top < drawing.height for left, top in boxes)
    assert len(boxes) == len(drawing.boxes)


@pytest.mark.parametrize("name", shipped())
def test_ten_conversations(name: str) -> None:
    rules = load_rules(name)
    assert rules.phrases is not None
    cases = {case.name: case.found for case in ten_cases(rules, rules.phrases, example_truth(rules))}
    assert len(cases) == 10
    best = cases.pop("all right")
    assert best.total == 1.0 and not best.violations
    assert all(-1 <= found.total < 1 for found in cases.values())
    assert not cases["every answer wrong, without contradiction"].violations
    assert cases["diagnosis wrong"].total > cases["empty"].total


def test_the_name_of_the_long_answers_says_their_length() -> None:
    rules = load_rules("bone-marrow-aspirate")
    assert rules.phrases is not None
    answers = {case.name: case.answers for case in ten_cases(rules, rules.phrases, example_truth(rules))}
    (name,) = (name for name in answers if name.startswith("right, and "))
    lengths = [
        len(long.split()) - len(right.split()) for long, right in zip(answers[name], answers["all right"], strict=True)
    ]
    assert lengths == [300] * len(lengths) and name == "right, and 300 words more"


def test_sentences_of_constraints(tmp_path: Path) -> None:
    assert dict(sentences(rules_of(tmp_path)))["blast-aml"] == "If proliferation is blast, then diagnosis is AML."


def test_pages_fit_a_narrow_screen(tmp_path: Path) -> None:
    pages = [tmp_path / f"{name}.html" for name in ("red-cell-morphology", "chest-xray")]
    for page in pages:
        main([page.stem, "--html", str(page)])
    for width, frame, height in narrow_sizes(tmp_path, pages):
        assert width <= frame <= 390 and height > 2000


def test_the_text_lists_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(write_rules(tmp_path))])
    shown = capsys.readouterr().out
    assert shown.startswith("marrow: 288 assignments, 5 valid paths\n") and "plasma-mm: If proliferation is" in shown
    assert json.dumps(shown).count("inconclusive") > 5


def test_rules_without_a_valid_path_are_refused(tmp_path: Path) -> None:
    none = "constraints: [{id: first, then: {diagnosis: AML}}, {id: second, then: {diagnosis: MM}}]"
    text = MARROW.split("constraints:", 1)[0] + none + "\n"
    with pytest.raises(DataError, match="exclude every assignment"):
        main([str(write_rules(tmp_path, text)), "--html", str(tmp_path / "page.html")])


def test_phrases_that_lack_an_answer(tmp_path: Path) -> None:
    source = "provenance: {model: m, prompt_sha256: s, date: d}"
    (tmp_path / "phrases.yaml").write_text(f"{source}\nquestions: {{quality: {{train: [How?]}}}}\n")
    path = write_rules(tmp_path, MARROW + "dialogue: {phrases: phrases.yaml}\n")
    main([str(path), "--html", str(tmp_path / "page.html")])
    assert "Example dialogue" not in (tmp_path / "page.html").read_text()
    with pytest.raises(DataError, match="lack a question or answer of node quality for train"):
        dialogue_row(load_rules(path), {"id": 1, "image": "a.png", "folder": "blood"})
