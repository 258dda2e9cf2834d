"""The report judge: evaluator, command, replay, resume, pacing, and the agreement of two judges."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava.errors import ConfigError, DataError
from llava.eval.chexprompt import ReportEvaluator, judge_main, paced, rate_pairs
from llava.eval.reports.error_counts import JudgedReport, error_summary, judge_agreement, kendall_tau
from llava.eval.reports.error_prompt import CATEGORIES, INSIGNIFICANT_HEADER, SIGNIFICANT_HEADER
from llava.judging.store import Judge, Messages, Store
from tests.support.fake_endpoint import Fault, environment, serve
from tests.support.judges import FakeJudge

ROOT = Path(__file__).resolve().parents[2]
NAMES = list(CATEGORIES.values())
ROWS = [{"id": f"p{n // 2}_{n}", "reference": f"Reference {n}.", "prediction": f"Candidate {n}."} for n in range(6)]


def reply(first: str = "100000", second: str = "000000") -> str:
    counts = [", ".join(f"({a}, {n})" for a, n in zip("ABCDEF", row, strict=True)) for row in (first, second)]
    return f"{SIGNIFICANT_HEADER}[{counts[0]}]\n{INSIGNIFICANT_HEADER}[{counts[1]}]"


def rating(first: str, second: str) -> dict[str, Any]:
    sides = [dict(zip(NAMES, map(int, row), strict=True)) for row in (first, second)]
    return {"clinically_significant": sides[0], "clinically_insignificant": sides[1]}


def judge(rule: Callable[[Messages], str | None], store: Path | None = None, **options: Any) -> tuple[Judge, FakeJudge]:
    fake = FakeJudge(rule, **options)
    return Judge("judge", fake, Store(store)), fake


def test_a_single_text_is_a_list_of_one() -> None:
    evaluator = ReportEvaluator("judge", ask=FakeJudge(lambda _: reply("100000", "020000")), requests_per_minute=0)
    assert evaluator.evaluate("Normal heart.", "Severe cardiomegaly.") == [rating("100000", "020000")]


def test_an_unreadable_severity_is_none() -> None:
    evaluator = ReportEvaluator("judge", ask=FakeJudge(lambda _: "no lists"), requests_per_minute=0, max_retries=0)
    assert evaluator.evaluate(["a"], ["b"]) == [{"clinically_significant": None, "clinically_insignificant": None}]


def test_numbers_of_texts_must_be_equal() -> None:
    with pytest.raises(DataError, match="2 references and 1 candidates"):
        ReportEvaluator("judge", ask=FakeJudge(lambda _: reply())).evaluate(["a", "b"], ["c"])


def test_unreadable_replies_are_asked_for_again() -> None:
    one, fake = judge(lambda messages: reply() if len(messages) > 2 else "What?")
    rated = rate_pairs([("a", "b")], one, num_rounds=2)
    assert rated[0][:2] == (rating("100000", "000000"), "")
    assert len(fake.asked) == 2


def test_failures_have_reasons() -> None:
    replies = {"a": reply(), "b": "I'm sorry, I can't assist.", "c": None, "d": reply()[:-20]}
    one, _ = judge(
        lambda messages: next(v for k, v in replies.items() if f'"""{k}"""\nErrors' in messages[1]["content"])
    )
    rated = rate_pairs([("x", name) for name in replies], one, num_rounds=1)
    assert [reason for _, reason, _ in rated] == ["", "refused", "status 500", "cut short"]


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    pairs = [(f"r{n}", f"c{n}") for n in range(5)]
    one, _ = judge(lambda _: reply(), tmp_path / "store.jsonl", stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        rate_pairs(pairs, one)
    again, second = judge(lambda _: reply(), tmp_path / "store.jsonl")
    assert all(rated[0] for rated in rate_pairs(pairs, again))
    assert len(second.asked) == 2
    last, third = judge(lambda _: reply(), tmp_path / "store.jsonl")
    rate_pairs(pairs, last)
    assert third.asked == []


def test_pacing() -> None:
    waits: list[float] = []
    fake = FakeJudge(lambda _: reply())
    requests = [({"role": "user", "content": str(n)},) for n in range(7)]
    found = dict(paced(fake, 3, sleep=waits.append)(requests))
    assert sorted(found) == list(range(7))
    assert len(waits) == 2
    assert all(59 < wait <= 60 for wait in waits)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(place: Path, endpoint: Any, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "llava/eval/chexprompt.py", "--rating_name", "one", "--output_dir", str(place / "out")]
    command += ["--input_fpath", str(place / "in.jsonl"), "--max_request_per_min", "0", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment(endpoint), capture_output=True, text=True, check=False, timeout=900
    )


def test_published_command_against_an_endpoint(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", ROWS)
    with serve(lambda _: reply("100000", "000001")) as endpoint:
        done = run(tmp_path, endpoint, "--engine", "gpt-4t", "--temperature", "0.4", "--top_p", "0.95")
        assert done.returncode == 0, done.stderr
        assert len(endpoint.calls) == 6
        body = endpoint.calls[0].body
        assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("gpt-4t", 0.4, 0.95, 128)
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        again = run(tmp_path, endpoint, "--engine", "gpt-4t")
        assert again.returncode == 0
        assert len(endpoint.calls) == 6
        assert "0 requests sent" in again.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "one.jsonl").read_text().splitlines()]
    assert [list(row)[:4] for row in rows] == [["id", "reference", "candidate", "rating"]] * 6
    assert rows[0]["rating"] == rating("100000", "000001")
    assert {"prompt", "prompt_sha256", "engine", "temperature", "top_p", "max_tokens"} <= set(rows[0]["judge"])
    summary = json.loads((tmp_path / "out" / "one.summary.json").read_text())
    assert summary["metrics"]["total errors"]["value"] == 2.0
    assert summary["metrics"]["total errors"]["num_clusters"] == 3


def test_filtered_replies_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", ROWS[:2])

    def answer(messages: list[dict[str, Any]]) -> str | Fault:
        filtered = "Candidate 0" in messages[-1]["content"]
        return Fault(finish_reason="content_filter", text="x") if filtered else reply()

    with serve(answer) as endpoint:
        done = run(tmp_path, endpoint, "--engine", "m")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "one.summary.json").read_text())["unread"] == {"filtered": 1}


def test_offline_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        str(write(tmp_path / "in.jsonl", ROWS[:2])),
        "--output-dir",
        str(tmp_path),
        "--engine",
        "judge",
        "--offline",
    ]
    with pytest.raises(SystemExit):
        judge_main(words)
    shown = capsys.readouterr().out
    assert "not in the store 2" in shown and "0 requests sent" in shown and "figure" not in shown


def test_agreement_with_another_judge(tmp_path: Path) -> None:
    counts = ["100000", "200000", "000000", "000000", "010000", "111000"]
    rows = [
        {"id": row["id"], "reference": row["reference"], "candidate": row["prediction"], "rating": rating(n, "000000")}
        for row, n in zip(ROWS, counts, strict=True)
    ]
    other = write(tmp_path / "other.jsonl", rows)
    write(tmp_path / "in.jsonl", ROWS)
    with serve(lambda _: reply()) as endpoint:
        done = run(tmp_path, endpoint, "--engine", "m", "--against", str(other))
        assert done.returncode == 0, done.stderr
    agreement = json.loads((tmp_path / "out" / "one.summary.json").read_text())["agreement"]
    assert agreement["num_reports"] == 6
    assert agreement["total"]["exact"]["value"] == pytest.approx(2 / 6)
    assert agreement["total"]["mean absolute difference"]["value"] == pytest.approx(5 / 6)


def test_other_reports_cannot_be_compared(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", ROWS)
    write(tmp_path / "other.jsonl", [{"id": "x"}])
    with serve(lambda _: reply()) as endpoint:
        done = run(tmp_path, endpoint, "--engine", "m", "--against", str(tmp_path / "other.jsonl"))
    assert done.returncode == 2
    assert "other.jsonl, row 0: not the same reports" in done.stderr


@pytest.mark.parametrize(
    "words", [[], ["a", "--input-fpath", "b"], ["a", "--num-rounds", "0"], ["a", "--engine", "x", "--model", "y"]]
)
def test_contradicting_options(tmp_path: Path, words: list[str]) -> None:
    write(tmp_path / "a", ROWS[:1])
    given = [str(tmp_path / word) if word == "a" else word for word in words]
    with pytest.raises(ConfigError):
        judge_main([*given, "--output-dir", str(tmp_path / "out"), "--offline"])


def test_summary() -> None:
    judged = [
        JudgedReport(0, "p", rating("100000", "020000")),
        JudgedReport(1, "p", rating("000000", "000000")),
        JudgedReport(2, "q", rating("000000", "000001")),
        JudgedReport(3, "q", None, "refused"),
    ]
    summary = error_summary(judged)
    values = {name: cell["value"] for name, cell in summary["metrics"].items()}
    assert (summary["num_reports"], summary["num_read"], summary["unread"]) == (4, 3, {"refused": 1})
    assert values["significant errors"] == pytest.approx(1 / 3)
    assert values["insignificant errors"] == pytest.approx(1.0)
    assert values["total errors"] == pytest.approx(4 / 3)
    assert values["error-free"] == pytest.approx(1 / 3)
    assert values["without significant errors"] == pytest.approx(2 / 3)
    assert values["omission_finding, insignificant"] == pytest.approx(2 / 3)


def test_two_equal_judges() -> None:
    judged = [JudgedReport(n, str(n), rating(f"{n}00000", "000000")) for n in range(5)]
    agreement = judge_agreement(judged, judged)
    assert agreement["total"]["exact"] == {"value": 1.0, "ci_l": 1.0, "ci_h": 1.0}
    assert agreement["total"]["Kendall tau-b"]["value"] == pytest.approx(1.0)


def test_kendall_tau() -> None:
    assert kendall_tau(np.array([[1, 1], [2, 3], [3, 2]])) == pytest.approx(1 / 3)
    assert math.isnan(kendall_tau(np.array([[1, 1], [1, 3]])))
