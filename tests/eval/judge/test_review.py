"""Judging: orders, retries, stored replies, and no request sent twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.errors import ConfigError, DataError
from llava.eval.judge.cases import Case, read_cases
from llava.eval.judge.review import NOT_ANSWERED, JudgeSettings, num_to_ask, review_cases, score_row
from llava.judging.store import Judge, Messages, Store, reply_not_stored
from tests.support.judges import FakeJudge, answer, lines, question, write_lines


def cases(tmp_path: Path, number: int = 4, **metadata: str) -> list[Case]:
    questions = write_lines(tmp_path / "q.jsonl", [question(index) for index in range(number)])
    answers = [answer(index, **(metadata if index == 0 else {})) for index in range(number)]
    return read_cases(questions, write_lines(tmp_path / "a.jsonl", answers))


def prefers_the_first(messages: Messages) -> str:
    """Give the reference 6, the answer 4, and 2 more to the one in first position."""
    return "8 4\nwhy" if "[Assistant 1]\nReference" in messages[1]["content"] else "6 6\nwhy"


def judge(fake: object, tmp_path: Path, name: str = "j", **sampling: float) -> Judge:
    return Judge(name, fake, Store(tmp_path / "store.jsonl"), sampling=sampling)  # type: ignore[arg-type]


def test_one_order_and_both(tmp_path: Path) -> None:
    some = cases(tmp_path)
    (first, *_) = review_cases(some, judge(FakeJudge(prefers_the_first), tmp_path), JudgeSettings())
    assert first.scores == (8.0, 4.0) and [opinion.order for opinion in first.opinions] == ["12"]
    judgements = review_cases(some, judge(FakeJudge(prefers_the_first), tmp_path), JudgeSettings(swap=True))
    assert [judgement.scores for judgement in judgements] == [(7.0, 5.0)] * 4
    assert [opinion.scores for opinion in judgements[0].opinions] == [(8.0, 4.0), (6.0, 6.0)]
    row = score_row(judgements[0], JudgeSettings(swap=True, release="v1.5"))
    assert row["gpt_eval"] == "8 4\nwhy" and row["gpt_eval_swapped"] == "6 6\nwhy"
    assert (row["question"], row["ans1"], row["ans2"]) == ("What is object 0?", "Reference 0.", "Answer 0.")
    assert row["judgement"]["scores"] == [7.0, 5.0]
    assert row["judgement"]["orders"]["21"] == {"scores": [6.0, 6.0], "failure": "", "num_replies": 1}


def test_second_run_sends_nothing_and_gives_the_same(tmp_path: Path) -> None:
    some, settings = cases(tmp_path), JudgeSettings(swap=True)
    fake = FakeJudge(prefers_the_first)
    before = review_cases(some, judge(fake, tmp_path), settings)
    assert len(fake.asked) == 8
    silent = judge(FakeJudge(lambda messages: pytest.fail("asked again")), tmp_path)
    assert num_to_ask(some, silent, settings) == (0, 0)
    assert review_cases(some, silent, settings) == before and silent.num_asked == 0
    replayed = review_cases(some, judge(reply_not_stored, tmp_path), settings)
    assert replayed == before


def test_killed_run_resumes_even_after_half_a_line(tmp_path: Path) -> None:
    some, settings = cases(tmp_path), JudgeSettings(swap=True)
    with pytest.raises(KeyboardInterrupt):
        review_cases(some, judge(FakeJudge(prefers_the_first, stop_after=3), tmp_path), settings)
    store = tmp_path / "store.jsonl"
    assert len(lines(store)) == 3
    with store.open("a") as stream:
        stream.write('{"key": "ab')
    fake = FakeJudge(prefers_the_first)
    after = review_cases(some, judge(fake, tmp_path), settings)
    assert len(fake.asked) == 5 and all(judgement.scores == (7.0, 5.0) for judgement in after)
    assert after == review_cases(some, Judge("j", FakeJudge(prefers_the_first), Store(None)), settings)


def test_unreadable_replies_are_retried_with_a_reminder(tmp_path: Path) -> None:
    def slow(messages: Messages) -> str:
        return ["Hard to say.", "Still thinking.", "8 7"][(len(messages) - 2) // 2]

    some = cases(tmp_path, 1)
    fake = FakeJudge(slow)
    (judgement,) = review_cases(some, judge(fake, tmp_path), JudgeSettings(num_rounds=3))
    assert judgement.scores == (8.0, 7.0) and judgement.opinions[0].num_replies == 3
    assert [len(messages) for messages in fake.asked] == [2, 4, 6]
    assert fake.asked[1][2]["content"] == "Hard to say."
    (short,) = review_cases(some, judge(FakeJudge(slow), tmp_path), JudgeSettings(num_rounds=2))
    assert short.scores is None and short.failure == "no scores" and short.opinions[0].reply == "Still thinking."
    row = score_row(short, JudgeSettings())
    assert row["judgement"]["failure"] == "no scores" and row["result"] == "Still thinking."


def test_missing_reply_is_data_and_is_retried_in_the_next_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    some = cases(tmp_path)
    (first, *rest) = review_cases(
        some,
        judge(FakeJudge(lambda messages: None if "object 0" in messages[1]["content"] else "5 5"), tmp_path),
        JudgeSettings(),
    )
    assert first.failure == "no reply: status 500" and all(one.scores == (5.0, 5.0) for one in rest)
    assert "1 of 4" in caplog.text and "object" not in caplog.text
    fake = FakeJudge(lambda messages: "4 4")
    again = review_cases(some, judge(fake, tmp_path), JudgeSettings())
    assert again[0].scores == (4.0, 4.0) and len(fake.asked) == 1


def test_one_order_of_two_is_no_score(tmp_path: Path) -> None:
    def one_sided(messages: Messages) -> str | None:
        return "8 4" if "[Assistant 1]\nReference" in messages[1]["content"] else None

    judgements = review_cases(cases(tmp_path), judge(FakeJudge(one_sided), tmp_path), JudgeSettings(swap=True))
    assert all(one.scores is None and one.failure.startswith("no reply") for one in judgements)


def test_failed_answers_are_not_judged(tmp_path: Path) -> None:
    some = cases(tmp_path, error="no image")
    fake = FakeJudge(lambda messages: "5 5")
    judgements = review_cases(some, judge(fake, tmp_path), JudgeSettings())
    assert len(fake.asked) == 3 and judgements[0].failure == NOT_ANSWERED
    assert judgements[0].opinions == () and score_row(judgements[0], JudgeSettings())["result"] is None


def test_reply_depends_on_judge_sampling_and_every_word(tmp_path: Path) -> None:
    some = cases(tmp_path, 1)
    asked = []
    for name, temperature, template_orders in (
        ("j", 0.0, False),
        ("k", 0.0, False),
        ("j", 0.5, False),
        ("j", 0.0, True),
    ):
        fake = FakeJudge(lambda messages: "5 5")
        review_cases(some, judge(fake, tmp_path, name, temperature=temperature), JudgeSettings(swap=template_orders))
        asked.append(len(fake.asked))
    assert asked == [1, 1, 1, 1]


def test_equal_requests_are_sent_once(tmp_path: Path) -> None:
    some = cases(tmp_path, 1) * 3
    fake = FakeJudge(lambda messages: "5 5")
    assert len([one for one in review_cases(some, judge(fake, tmp_path), JudgeSettings()) if one.scores]) == 3
    assert len(fake.asked) == 1


def test_literal_scores_and_a_reference_of_zero(tmp_path: Path) -> None:
    literal = JudgeSettings(defects=frozenset({"literal_scores"}), num_rounds=1)
    (one,) = review_cases(cases(tmp_path, 1), judge(FakeJudge(lambda messages: "85 40"), tmp_path), literal)
    assert one.scores == (85.0, 40.0)
    (zero,) = review_cases(cases(tmp_path, 1), Judge("z", FakeJudge(lambda messages: "0 40"), Store(None)), literal)
    assert zero.failure == "reference scored 0"


def test_not_a_store_and_bad_settings(tmp_path: Path) -> None:
    write_lines(tmp_path / "other.jsonl", [{"question_id": 1}])
    with pytest.raises(DataError, match="not a store"):
        Store(tmp_path / "other.jsonl")
    with pytest.raises(ConfigError, match="num-rounds"):
        JudgeSettings(num_rounds=0)
    with pytest.raises(ConfigError, match="unknown template"):
        JudgeSettings(template="nonsense")
