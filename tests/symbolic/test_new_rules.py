"""`llava rules new`: questions whose answers become a file that passes its check."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from llava.errors import ConfigError
from llava.symbolic.check import check_file
from llava.symbolic.extract import extract
from llava.symbolic.labels import assign
from llava.symbolic.new_rules import main
from llava.symbolic.rules import load_rules

PIGMENT = ["pigment", "", "", "yes, no", "", "pigmented, brown", "no pigment, not pigmented"]
PIGMENT += ["The lesion is pigmented.", "It is brown.", "There is no pigment.", "It is not pigmented."]
DIAGNOSIS = ["diagnosis", "What is it?", "Name the disease.", "melanoma, nevus, open", "open", "", "nevus, mole"]
DIAGNOSIS += ["cannot be determined", "", "", "", "", "It cannot be determined.", "The rest cannot be determined."]
PATHS = ["A", "yes", "melanoma", "B", "yes", "nevus", "C", "no", "nevus", "D", "no", "open", ""]
LABELS = ["dx", "mel", "nv-1", "nv-2", "none"]
ANSWERS = ["skin", "dermatology", "", *PIGMENT, *DIAGNOSIS, "", *PATHS, *LABELS]


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> Path:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    main([str(folder / "skin.yaml")])
    return folder / "skin.yaml"


def test_the_file_passes_its_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run(tmp_path, monkeypatch, ANSWERS)
    found = check_file(path, [{"dx": "nv-2"}], table="rows")
    assert (found.id, found.assignments, found.paths, found.errors, found.warnings) == ("skin", 6, 4, [], [])
    rules = load_rules(path)
    assert assign(rules, {"dx": "nv-2"}) == {"pigment": "no", "diagnosis": "nevus"}
    assert rules.node("diagnosis").abstain == "open" and rules.primary.id == "diagnosis"
    assert extract(rules.node("pigment"), "The brown lesion.").value == "yes"
    assert extract(rules.node("pigment"), "It is not pigmented.").value == "no"


@pytest.mark.parametrize(
    ("place", "wrong_message"),
    [
        (0, ("two words", "use letters, digits")),
        (0, ("bone-marrow-aspirate", "is taken")),
        (6, ("yes", "write 2 to 20 different answers")),
        (7, ("maybe", "write one of yes, no")),
        (9, ("brown", "'brown' already names yes")),
        (10, ("It is large.", "this sentence is read as none of the answers, not as yes")),
        (12, ("It is brown.", "this sentence is read as yes, not as no")),
        (29, ("purple", "write one of yes, no")),
        (4, ("<image> Is it pigmented?", "leave out <image>")),
        (10, ("<image> It is brown.", "leave out <image>")),
        (ANSWERS.index("nv-1") + 1, ("nv-1", "'nv-1' stands for another case")),
    ],
)
def test_unusable_answers_are_asked_for_again(
    place: int,
    wrong_message: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong, message = wrong_message
    path = run(tmp_path, monkeypatch, [*ANSWERS[:place], wrong, *ANSWERS[place:]])
    assert message in capsys.readouterr().out and check_file(path).errors == []


def test_entries_that_a_row_cannot_tell_apart_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [*ANSWERS[: -len(LABELS) + 1], "1", "1.0", "01", "True", "TRUE", "2", "3"]
    path = run(tmp_path, monkeypatch, lines)
    shown = capsys.readouterr().out
    assert all(f"{text!r} stands for another case" in shown for text in ("1.0", "01", "TRUE"))
    rules = load_rules(path)
    assert [assign(rules, {"dx": value})["diagnosis"] for value in (1, True, 2)] == ["melanoma", "nevus", "nevus"]


def test_the_words_of_a_question_have_a_common_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [f"v{index}" for index in range(20)]
    words = [", ".join(f"w{index}x{part}" for part in range(12)) for index in range(16)]
    most = ", ".join(f"w16x{part}" for part in range(5))
    node = ["type", "", "", ", ".join(values), "", *words, f"{most}, w16x5", most, "", "", ""]
    sentences = [line for index in range(17) for line in (f"It is w{index}x0.", f"I see w{index}x1.")] + [""] * 6
    cases = [line for value in values for line in (f"c{value}", value, "yes")] + ["cno", "v0", "no", ""]
    lines = ["skin", "", "", *node, *sentences, *PIGMENT, "", *cases, "dx", *[""] * 21]
    assert check_file(run(tmp_path, monkeypatch, lines)).errors == []
    assert "write 1 to 5 words or phrases, since a question has at most 200" in capsys.readouterr().out


def test_every_answer_needs_a_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ANSWERS.index("C")
    run(tmp_path, monkeypatch, [*ANSWERS[:place], "", *ANSWERS[place:]])
    shown = capsys.readouterr().out
    assert "Still without a case: pigment no, diagnosis open" in shown


def test_nothing_is_written_if_the_input_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="the input ended before the last question"):
        run(tmp_path, monkeypatch, ANSWERS[:20])
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "skin.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"skin\.yaml exists"):
        run(tmp_path, monkeypatch, ANSWERS)
    assert (tmp_path / "skin.yaml").read_text() == "mine"
