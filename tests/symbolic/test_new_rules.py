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
