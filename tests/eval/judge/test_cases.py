"""Joining of questions and answers, and the messages to the judge."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.compat import parse_compat
from llava.errors import ConfigError, DataError
from llava.eval.judge.cases import domains_of, image_of, judge_question, read_cases
from llava.eval.judge.prompts import TEMPLATES, figure_context, messages_after_unreadable, messages_of
from llava.eval.judge.review import chosen_defects, release_of
from tests.support.judges import answer, question, write_lines

TEMPLATE = TEMPLATES["chat-v1"]


def files(tmp_path: Path, questions: list[dict], answers: list[dict]) -> tuple[Path, Path]:
    return write_lines(tmp_path / "q.jsonl", questions), write_lines(tmp_path / "a.jsonl", answers)


def test_joined_by_id_and_by_order(tmp_path: Path) -> None:
    paths = files(tmp_path, [question(0), question(1)], [answer(1), answer(0)])
    assert [case.answer for case in read_cases(*paths)] == ["Answer 0.", "Answer 1."]
    swapped = read_cases(*paths, defects=frozenset({"joined_by_order"}))
    assert [case.answer for case in swapped] == ["Answer 1.", "Answer 0."]


def test_answers_of_other_questions_are_refused(tmp_path: Path) -> None:
    paths = files(tmp_path, [question(0), question(1)], [answer(0), answer(5)])
    with pytest.raises(DataError, match="different questions"):
        read_cases(*paths)
    paths = files(tmp_path, [question(0), question(1)], [answer(0)])
    with pytest.raises(DataError, match="1 answers for 2 questions"):
        read_cases(*paths, defects=frozenset({"joined_by_order"}))
    paths = files(tmp_path, [question(0), question(0)], [answer(0)])
    with pytest.raises(DataError, match="must be unique"):
        read_cases(*paths)


@pytest.mark.parametrize(
    ("field", "value"),
    [("gpt4_answer", 3), ("text", None), ("fig_caption", ["x"]), ("in_text_mention", "x"), ("domain", ["mri"])],
)
def test_broken_rows_are_named_without_their_text(tmp_path: Path, field: str, value: object) -> None:
    paths = files(tmp_path, [question(0), question(1, **{field: value})], [answer(0), answer(1)])
    with pytest.raises(DataError, match=rf"row 1: field '{field}'") as caught:
        read_cases(*paths)
    assert "object 1" not in str(caught.value)


def test_missing_field_is_named(tmp_path: Path) -> None:
    row = question(0)
    del row["fig_caption"]
    with pytest.raises(DataError, match=r"row 0: field 'fig_caption' is missing"):
        read_cases(*files(tmp_path, [row], [answer(0)]))


def test_failed_answers_are_known_unless_as_published(tmp_path: Path) -> None:
    paths = files(tmp_path, [question(0), question(1)], [answer(0, " ", error="no image"), answer(1)])
    assert [case.failed for case in read_cases(*paths)] == [True, False]
    assert not any(case.failed for case in read_cases(*paths, defects=frozenset({"judged_failures"})))


def test_question_as_the_judge_reads_it() -> None:
    assert judge_question("<image>\nWhat is it?") == "What is it?" == judge_question("What is it?\n<image>")
    assert judge_question("What is it?\n<image>", frozenset({"tag_in_question"})) == "What is it?\n<image>"
    assert judge_question("What is it?", frozenset({"cut_question"})) == "Wha"


def test_domains_and_clusters() -> None:
    assert domains_of(question(0, domains=("gross", "histology"))) == ("histology", "gross")
    assert domains_of({"domain": {"endoscopy": True, "mri": True}}) == ("mri", "endoscopy")
    assert domains_of({}) == ()
    assert image_of({"image": ["a.png", "b.png"]}) == "a.png"
    assert image_of({"pair_id": "p"}) == "p" and image_of({"question_id": 4}) == "question 4"


def test_messages_have_the_published_layout(tmp_path: Path) -> None:
    (case,) = read_cases(*files(tmp_path, [question(3)], [answer(3)]))
    system, user = messages_of(case, "12", template=TEMPLATE)
    assert system == {"role": "system", "content": TEMPLATE.system}
    assert user["content"] == (
        "[Context]\nFigure Caption:\nFigure 1: Drawing 1.\n\nFigure Context:\n\t- Object 3 is drawn .\n\n"
        "[Question]\nWhat is object 3?\n\n[Assistant 1]\nReference 3.\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\nAnswer 3.\n\n[End of Assistant 2]\n\n[System]\n{TEMPLATE.instruction}\n\n"
    )
    swapped = messages_of(case, "21", template=TEMPLATE)[1]["content"]
    assert "[Assistant 1]\nAnswer 3." in swapped and "[Assistant 2]\nReference 3." in swapped
    *before, said, reminder = messages_after_unreadable((system, user), "", TEMPLATE)
    assert before == [system, user]
    assert said["role"] == "assistant" and reminder["content"] == TEMPLATE.reminder


def test_mentions_of_every_form() -> None:
    row = question(0, in_text_mention=["One  two", {"tokens": "three ."}, ""])
    assert figure_context(row).endswith("Figure Context:\n\t- One two\n\t- three .")
    none = question(0, in_text_mention=None, fig_label=None)
    assert figure_context(none) == "Figure Caption:\nDrawing 0.\n\nFigure Context:\n\t- none"
    as_published = frozenset({"python_mentions"})
    assert figure_context(none, as_published).endswith("\t- None")
    assert figure_context(question(0), as_published).endswith("\t- [{'tokens': 'Object 0 is drawn .', 'entities': []}]")


def test_releases_are_sets_of_defects() -> None:
    assert chosen_defects("none") == frozenset() == chosen_defects("v1.0,-all")
    assert chosen_defects("v1.0,-joined_by_order") == chosen_defects("v1.0") - {"joined_by_order"}
    assert "tag_in_question" in chosen_defects("v1.5")
    with pytest.raises(ConfigError, match="contradict"):
        chosen_defects("v1.5,cut_question")
    with pytest.raises(ConfigError, match="unknown name nonsense; known: joined_by_order"):
        chosen_defects("nonsense")
    assert chosen_defects("v1.0") | chosen_defects("v1.5") == parse_compat("all", "judge")


@pytest.mark.parametrize(
    ("compat", "left_out"),
    [
        ("all", {"tag_in_question"}),
        ("all,none", {"tag_in_question"}),
        ("all,-joined_by_order", {"tag_in_question", "joined_by_order"}),
        ("all,-cut_question", {"cut_question"}),
        ("all,tag_in_question", {"cut_question"}),
        ("all, cut_question", {"tag_in_question"}),
    ],
)
def test_all_leaves_out_what_contradicts(compat: str, left_out: set[str]) -> None:
    assert chosen_defects(compat) == parse_compat("all", "judge") - left_out


@pytest.mark.parametrize(
    "compat", ["v1.0,v1.5", "all,v1.5", "v1.0,tag_in_question", "all,cut_question,tag_in_question"]
)
def test_what_contradicts_by_name_is_refused(compat: str) -> None:
    with pytest.raises(ConfigError, match="cut_question and tag_in_question contradict each other"):
        chosen_defects(compat)


@pytest.mark.parametrize(
    ("compat", "release"),
    [("none", "none"), ("v1.5,none", "v1.5"), ("joined_by_order, v1.0", "v1.0"), ("-v1.5,cut_question", "none")],
)
def test_release_of_a_list(compat: str, release: str) -> None:
    assert release_of(compat) == release


def test_the_real_questions(shared: Path) -> None:
    folder = shared / "oracles" / "llava-med-eval"
    if not folder.is_dir():
        pytest.skip("the real chat questions are not available")
    questions = folder / "llava_med_eval_qa50_qa.jsonl"
    answers = folder / "llava_med_qa50_instruct_caption_in_text_cleaned-60k-3epoch.json"
    cases = read_cases(questions, answers)
    assert len(cases) == 193 and len({case.image for case in cases}) == 50
    counts = Counter(case.domains[0] for case in cases)
    assert [counts[name] for name in ("chest_xray", "mri", "histology", "gross", "ct_scan")] == [37, 38, 44, 34, 40]
    assert Counter(case.type for case in cases) == {"conversation": 143, "detailed_description": 50}
    texts = [messages_of(case, "12", template=TEMPLATE)[1]["content"] for case in cases]
    assert not any("<image>" in text for text in texts)
    assert sum("Figure Context:\n\t- none\n" in text for text in texts) == 14
    first = read_cases(questions, answers, defects=chosen_defects("v1.0"))
    assert [case.question for case in first] == [case.question for case in cases]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["tokens", "mri", "error"]), inner),
    max_leaves=4,
)


@given(
    st.dictionaries(st.sampled_from(list(question(0))), json_values, max_size=3),
    st.dictionaries(st.sampled_from(list(answer(0))), json_values, max_size=2),
    st.sampled_from(["none", "v1.0", "v1.5"]),
)
@settings(max_examples=150, deadline=None)
def test_any_rows_become_messages_or_are_refused(asked_row: dict, answer_row: dict, release: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        questions = write_lines(Path(folder) / "q.jsonl", [{**question(0), **asked_row}])
        answers = write_lines(Path(folder) / "a.jsonl", [{**answer(0), **answer_row}])
        try:
            cases = read_cases(questions, answers, defects=chosen_defects(release))
        except DataError:
            return
    for case in cases:
        messages = messages_of(case, "21", template=TEMPLATE, defects=chosen_defects(release))
        assert all(isinstance(message["content"], str) for message in messages) and case.image
