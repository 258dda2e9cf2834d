"""Commands of the chat evaluation with a deterministic judge: real questions, resuming, tables, pages."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from llava.errors import ConfigError
from llava.eval import answering, eval_multimodal_chat_gpt_score, model_vqa, summarize_gpt_review
from llava.eval.judge.page import choose_examples
from llava.eval.judge.prompts import TEMPLATES
from llava.eval.judge.scores import Rated
from llava.openai_api import ApiError
from tests.support.eval_fakes import FakeEngine
from tests.support.fake_endpoint import KEY, MODEL, FakeEndpoint, Fault, environment, serve
from tests.support.judges import answer, lines, question, write_lines
from tests.support.processes import run_command, started

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = "llava/eval/eval_multimodal_chat_gpt_score.py"
PUBLISHED_DOMAINS = {"chest_xray": 37, "mri": 38, "histology": 44, "gross": 34, "ct_scan": 40}


def replayed(messages: list[dict]) -> str:
    """Give two scores that depend only on the answers."""
    first, second = (part.split("\n\n[End")[0] for part in messages[1]["content"].split("[Assistant ")[1:3])
    scores = [4 + hashlib.sha256(text[3:].encode()).digest()[0] % 7 for text in (first, second)]
    return f"{scores[0]} {scores[1]}\nThe reasons."


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    with serve(replayed) as state:
        for name in ("OPENAI_API_TYPE", "AZURE_OPENAI_ENDPOINT", "OPENAI_API_BASE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", state.address)
        monkeypatch.setenv("OPENAI_MODEL", MODEL)
        yield state


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Options in the spelling of v1.5, for six questions about three figures."""
    questions = write_lines(tmp_path / "q.jsonl", [question(index) for index in range(6)])
    answers = write_lines(tmp_path / "a.jsonl", [answer(index) for index in (3, 1, 0, 2, 5, 4)])
    paths = {"--question-file": questions, "--answers-file": answers, "--scores-file": tmp_path / "s.jsonl"}
    return [word for option, path in paths.items() for word in (option, str(path))]


def table_of(printed: str) -> dict[str, dict[str, float]]:
    """Read the published table back: row, group, figure."""
    rows = printed.splitlines()
    start = next(index for index, row in enumerate(rows) if row.lstrip().startswith("conversation"))
    groups = rows[start].split()
    cells = [row.split() for row in rows[start + 2 : start + 6]]
    return {name: dict(zip(groups, map(float, values), strict=True)) for name, *values in cells}


def test_the_real_questions_and_released_answers(
    shared: Path, endpoint: FakeEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared / "oracles" / "llava-med-eval"
    if not folder.is_dir():
        pytest.skip("the real chat questions are not available")
    questions = folder / "llava_med_eval_qa50_qa.jsonl"
    answers = folder / "llava_med_qa50_instruct_caption_in_text_cleaned-60k-3epoch.json"
    out = tmp_path / "scores.jsonl"
    v10 = ["--question_input_path", str(questions), "--input_path", str(answers), "--output_path", str(out)]
    eval_multimodal_chat_gpt_score.main([*v10, "--num-resamples", "20"])
    table = table_of(capsys.readouterr().out)
    assert len(endpoint.calls) == 193
    assert {name: table["data_size"][name] for name in PUBLISHED_DOMAINS} == PUBLISHED_DOMAINS
    assert (table["data_size"]["conversation"], table["data_size"]["detailed_description"]) == (143, 50)
    assert table["data_size"]["overall"] == 193

    by_group: dict[str, list[tuple[float, float]]] = {}  # by hand, from the replies as they were written down
    for row in lines(out):
        first, second = map(float, row["result"].split("\n")[0].split(" "))
        domain = next(name for name in PUBLISHED_DOMAINS if row["domain"][name])
        for name in (row["type"], domain, "overall"):
            by_group.setdefault(name, []).append((first, second))
    for name, pairs in by_group.items():
        assert table["gpt4_score"][name] == pytest.approx(sum(pair[0] for pair in pairs) / len(pairs), rel=1e-5)
        assert table["pred_score"][name] == pytest.approx(sum(pair[1] for pair in pairs) / len(pairs), rel=1e-5)
        relative = sum(second / first for first, second in pairs) / len(pairs) * 100
        assert table["pred_relative_score"][name] == pytest.approx(relative, rel=1e-5)

    before = out.read_bytes()
    eval_multimodal_chat_gpt_score.main([*v10, "--num-resamples", "20"])
    assert len(endpoint.calls) == 193 and out.read_bytes() == before
    facts = json.loads((tmp_path / "scores.jsonl.provenance.json").read_text())
    assert facts["judge"] == {"model": MODEL, "temperature": 0.0, "max_tokens": 1024}
    assert facts["template"] == {"name": "chat-v1", "sha256": TEMPLATES["chat-v1"].sha256}
    assert facts["data"]["questions"]["sha256"] and facts["defects"] == [] and KEY not in json.dumps(facts)

    offline = [*v10[:4], "--scores-file", str(tmp_path / "again.jsonl"), "--store", f"{out}.replies.jsonl"]
    eval_multimodal_chat_gpt_score.main([*offline, "--offline", "--model", MODEL, "--num-resamples", "0"])
    assert (tmp_path / "again.jsonl").read_bytes() == before and len(endpoint.calls) == 193


def test_v15_flags_swap_and_report(
    files: list[str], endpoint: FakeEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    eval_multimodal_chat_gpt_score.main([*files, "--release", "v1.5", "--fix", "joined_by_order", "--swap-order"])
    printed = capsys.readouterr().out
    assert "the same judge in both orders, 6 questions" in printed and len(endpoint.calls) == 12
    rows = lines(tmp_path / "s.jsonl")
    assert [row["question_id"] for row in rows] == list(range(6))
    assert all(row["ans2"] == f"Answer {row['question_id']}." for row in rows)
    assert rows[0]["question"].endswith("\n<image>") and "gpt_eval" in rows[0] and "gpt_eval_swapped" in rows[0]
    assert "[{'tokens'" in endpoint.calls[0].body["messages"][1]["content"]
    eval_multimodal_chat_gpt_score.main([*files, "--swap-order", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["orders"]["answer"]["exact"]["value"] == 1.0  # this judge ignores the order
    assert report["orders"]["first place"]["value"] == 0.0
    assert report["provenance"]["orders"] == ["12", "21"]


ALIASES = [
    (["--release", "v1.0"], "v1.0"),
    (["--release", "v1.5", "--fix", "joined_by_order", "minus_one_counts"], "v1.5,-joined_by_order,-minus_one_counts"),
    (["--release", "v1.5", "--fix", "all"], "v1.5,-all"),
    (["--with-defect", "python_mentions", "cut_question"], "python_mentions,cut_question"),
    (["--release", "none"], "none"),
]
"""Options of releases, and the list of `--compat` that gives the same scores."""


@pytest.mark.parametrize(("alias", "compat"), ALIASES)
def test_aliases(
    files: list[str],
    endpoint: FakeEndpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    alias: list[str],
    compat: str,
) -> None:
    found = []
    for words in (alias, ["--compat", compat]):
        eval_multimodal_chat_gpt_score.main([*files, "--num-resamples", "5", *words])
        summarize_gpt_review.main([*files[-2:], "--num-resamples", "5", *words])
        facts = json.loads((tmp_path / "s.jsonl.provenance.json").read_text())
        found.append((capsys.readouterr().out, lines(tmp_path / "s.jsonl"), facts["release"], facts["defects"]))
    assert found[0] == found[1]
    assert len(endpoint.calls) == 6, "the second run takes every reply from the store"


@pytest.mark.parametrize("option", ["--compat", "--fix", "--with-defect"])
def test_unknown_names_are_refused(files: list[str], option: str) -> None:
    with pytest.raises(ConfigError, match="unknown name nonsense; known: joined_by_order"):
        eval_multimodal_chat_gpt_score.main([*files, option, "nonsense"])


def test_killed_process_resumes(files: list[str], tmp_path: Path) -> None:
    with serve(replayed) as state:
        state.pause = 0.15
        words = [sys.executable, SCRIPT, *files, "--max-concurrency", "1", "--num-resamples", "5"]
        store = tmp_path / "s.jsonl.replies.jsonl"
        stop = time.monotonic() + 240
        with started(words, cwd=ROOT, env=environment(state), stderr=subprocess.DEVNULL) as process:
            while time.monotonic() < stop and not (store.exists() and store.read_bytes().count(b"\n") >= 2):
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        kept = store.read_bytes().count(b"\n")
        assert 2 <= kept < 6 and not (tmp_path / "s.jsonl").exists()
        state.pause, before = 0.0, len(state.calls)
        done = run_command(words, cwd=ROOT, env=environment(state), timeout=900)
        assert done.returncode == 0, done.stderr
        assert len(state.calls) - before == 6 - kept
    assert all(row["judgement"]["scores"] for row in lines(tmp_path / "s.jsonl"))


def test_wrong_key_stops_and_leaves_earlier_scores(files: list[str], endpoint: FakeEndpoint, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text("kept")
    endpoint.key = "another"
    with pytest.raises(ApiError, match="credentials"):
        eval_multimodal_chat_gpt_score.main(files)
    assert (tmp_path / "s.jsonl").read_text() == "kept" and len(endpoint.calls) < 10


def test_refused_question_is_counted_and_nothing_of_it_is_logged(
    files: list[str],
    endpoint: FakeEndpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def judge(messages: list[dict]) -> str | Fault:
        return Fault(400, code="content_filter") if "object 2?" in messages[1]["content"] else replayed(messages)

    endpoint.answer = judge
    eval_multimodal_chat_gpt_score.main(files)
    seen = capsys.readouterr()
    assert "no reply: filtered, status 400, content_filter: 1" in seen.out
    assert table_of(seen.out)["data_size"]["overall"] == 5
    assert lines(tmp_path / "s.jsonl")[2]["judgement"]["scores"] is None
    for text in (seen.out, seen.err, caplog.text):
        assert "object" not in text and "Reference" not in text and KEY not in text


def test_reply_truncated_at_the_limit_still_counts(files: list[str], endpoint: FakeEndpoint, tmp_path: Path) -> None:
    endpoint.faults = [Fault(finish_reason="length", text="8 7\nBecause the")]
    eval_multimodal_chat_gpt_score.main([*files, "--max-concurrency", "1"])
    assert sorted(row["result"] == "8 7\nBecause " for row in lines(tmp_path / "s.jsonl")) == [False] * 5 + [True]


def test_score_that_may_be_truncated_is_retried(files: list[str], endpoint: FakeEndpoint, tmp_path: Path) -> None:
    endpoint.faults = [Fault(finish_reason="length", text="10 1")]
    eval_multimodal_chat_gpt_score.main([*files, "--max-concurrency", "1"])
    found = [row["judgement"]["orders"]["12"] for row in lines(tmp_path / "s.jsonl")]
    assert sorted(order["num_replies"] for order in found) == [1] * 5 + [2]
    assert [10.0, 1.0] not in [order["scores"] for order in found]


def test_scores_do_not_overwrite_what_is_read(files: list[str], endpoint: FakeEndpoint, tmp_path: Path) -> None:
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="overwrite"):
        eval_multimodal_chat_gpt_score.main([*files, "--scores-file", str(tmp_path / "." / "a.jsonl")])
    for flag in ("--store", "--out"):
        with pytest.raises(ConfigError, match=f"{flag} .*overwrite"):
            eval_multimodal_chat_gpt_score.main([*files, flag, str(tmp_path / "s.jsonl")])
    with pytest.raises(ConfigError, match=r"--html .*overwrite"):
        summarize_gpt_review.main(["--scores-file", files[3], "--html", files[3]])
    assert (tmp_path / "a.jsonl").read_bytes() == before and endpoint.calls == []


def test_page_shows_examples_of_every_kind() -> None:
    def rated(number: int, scores: tuple[float, float] | None) -> Rated:
        return Rated(str(number), "", (), "x", scores)

    rows = [rated(0, (8, 8)), rated(1, (8, 2)), rated(2, None), rated(3, (8, 9)), rated(4, (8, 5))]
    assert (
        choose_examples(rows, 4) == [2, 1, 3, 0]
        and sorted(choose_examples(rows, 99)) == [0, 1, 2, 3, 4]
        and choose_examples([], 3) == []
    )


def test_dry_run_and_offline_send_no_request(
    files: list[str], endpoint: FakeEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eval_multimodal_chat_gpt_score.main([*files, "--dry-run", "--swap-order"])
    assert "6 questions, 0 without an answer; 12 requests" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no question has a score"):
        eval_multimodal_chat_gpt_score.main([*files, "--offline"])
    assert "not in the store: 6" in capsys.readouterr().out and endpoint.calls == []


def test_summary_of_files_judges_and_page(
    files: list[str], endpoint: FakeEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, other = tmp_path / "s.jsonl", tmp_path / "t.jsonl"
    eval_multimodal_chat_gpt_score.main(files)
    endpoint.answer = lambda messages: "5 5\n<script>"
    eval_multimodal_chat_gpt_score.main([*files, "--model", "other", "--scores-file", str(other)])
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "0.jpg")
    capsys.readouterr()
    page, out = tmp_path / "page.html", tmp_path / "summary.json"
    words = ["--scores-file", str(other), "--against", str(scores), "--html", str(page), "--out", str(out)]
    summarize_gpt_review.main([*words, "--image-folder", str(tmp_path / "images"), "--num-examples", "3"])
    printed = capsys.readouterr().out
    assert "t.jsonl against s.jsonl, 6 questions" in printed and table_of(printed)["pred_relative_score"]["mri"] == 100
    report = json.loads(out.read_text())
    assert report["agreement"]["num_questions"] == 6
    assert report["provenance"]["judging of scores"]["judge"]["model"] == "other"
    text = page.read_text()
    assert text.count('class="case"') == 3 and "data:image/jpeg;base64" in text
    assert "<script>" not in text and "&lt;script&gt;" in text and "http" not in text.replace("http-equiv", "")


def test_from_questions_to_scores(
    endpoint: FakeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """model_vqa answers the chat questions (one image is missing), the judge scores the answers."""
    questions = write_lines(tmp_path / "q.jsonl", [question(index) for index in range(6)])
    (tmp_path / "images").mkdir()
    for name in ("0.jpg", "1.jpg"):
        Image.new("RGB", (9, 9)).save(tmp_path / "images" / name)
    monkeypatch.setattr(answering, "engine_of", lambda args: FakeEngine())
    files = {
        "--question-file": questions,
        "--image-folder": tmp_path / "images",
        "--answers-file": tmp_path / "a.jsonl",
    }
    words = [word for option, path in files.items() for word in (option, str(path))]
    model_vqa.main(["--model-name", "m", *words, "--prompt-form", "plain"])
    answers = lines(tmp_path / "a.jsonl")
    assert answers[1]["prompt"] == "What is object 1?" and answers[1]["question_id"] == 1
    assert ["error" in row["metadata"] for row in answers] == [False] * 4 + [True] * 2
    v10 = ["--question_input_path", str(questions), "--input_path", str(tmp_path / "a.jsonl")]
    eval_multimodal_chat_gpt_score.main([*v10, "--output_path", str(tmp_path / "s.jsonl")])
    assert "without a score, excluded from all figures: the answer failed: 2" in capsys.readouterr().out
    assert len(endpoint.calls) == 4


def test_reviews_of_llava_are_found_and_summarized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="--scores-file"):
        summarize_gpt_review.main([])
    folder = tmp_path / "vqa" / "reviews" / "coco2014_val80"
    folder.mkdir(parents=True)
    rows = [
        {"question_id": 0, "category": "conv", "tuple": [8, 6]},
        {"question_id": 1, "category": "conv", "tuple": [-1, -1]},
    ]
    write_lines(folder / "gpt4_text_model-a.jsonl", rows)
    summarize_gpt_review.main([])
    assert "GPT-4 vs. model-a\nall 8.000 6.000 75.0\nconv 8.000 6.000 75.0\n" in capsys.readouterr().out
    summarize_gpt_review.main(["--release", "v1.0"])
    assert "all 3.500 2.500 71.4" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--out requires --scores-file"):
        summarize_gpt_review.main(["--out", "x.json"])
