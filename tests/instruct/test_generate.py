"""Generation of dialogues against a faulty local endpoint: kills, limits, failures, output."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava import openai_api
from llava.errors import ConfigError, DataError, GenerationError
from llava.instruct import instruct_generate
from llava.instruct.prompts import messages_for
from llava.utils.budget import Budget, Prices, estimate_tokens
from llava.utils.json_rows import read_records
from tests.support.fake_endpoint import KEY, FakeEndpoint, Fault, Message, environment, serve
from tests.support.processes import run_command, started

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = "oracles/llava-med-eval/llava_med_eval_qa50_fig_captions.json"
SECRET = "Zyxxword"  # stands for a patient's text


def answer(messages: list[Message]) -> str:
    """Return the same answer for the same question."""
    digest = hashlib.sha256(messages[-1]["content"].encode()).hexdigest()
    return f"User: What is {digest[:8]}?\n\nAssistant: A drawing.\n\nUser: More?\n\nAssistant: Based on the image, no."


def late(messages: list[Message]) -> str:
    """Return the same answer after a random delay."""
    time.sleep(random.uniform(0, 0.05))
    return answer(messages)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    monkeypatch.setattr(openai_api, "FIRST_WAIT", 0.01)
    with serve(answer) as state:
        for name, value in environment(state).items():
            monkeypatch.setenv(name, value)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield state


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    rows = [
        {"pair_id": f"9100000{number}_F1", "fig_label": "Fig. 1", "fig_caption": f"{SECRET} row {number}."}
        for number in range(9)
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"mri": rows[:5], "gross": rows[5:]}))
    return path


def run(captions: Path, output: Path, *more: str) -> int:
    """Run the command in this process; return its exit status."""
    try:
        instruct_generate.main(["--input_path", str(captions), "--output_path", str(output), *more])
    except SystemExit as error:
        assert isinstance(error.code, int)
        return error.code
    return 0


def ids(path: Path) -> list[str]:
    return [str(row["pair_id"])[7] for row in read_records(path)]


IN_TURN = list("051627384")


def test_rows_come_in_order_with_answer_and_tokens(endpoint: FakeEndpoint, captions: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "gen.jsonl"
    endpoint.answer = late
    assert run(captions, output) == 0
    assert ids(output) == IN_TURN
    row = next(read_records(output))
    assert list(row) == ["pair_id", "fig_label", "fig_caption", "result", "generation"]
    assert row["result"] == answer([{"content": f"Figure Caption:\nFig. 1: {SECRET} row 0."}])
    prompt = row["generation"].pop("prompt_tokens")
    assert prompt > 1000 and row["generation"] == {"model": "fake-model", "answer_tokens": len(row["result"].split())}
    assert not list(tmp_path.rglob("*.failed.jsonl"))
    assert endpoint.most_at_once <= 8
    body = endpoint.calls[0].body
    assert body["temperature"] == 0.0 and body["max_tokens"] == 1024
    num_calls = len(endpoint.calls)
    content = output.read_bytes()
    assert run(captions, output) == 0
    assert len(endpoint.calls) == num_calls and output.read_bytes() == content


def test_max_size_counts_exactly(endpoint: FakeEndpoint, captions: Path, tmp_path: Path) -> None:
    assert run(captions, tmp_path / "gen.jsonl", "--max-size", "4") == 0
    assert ids(tmp_path / "gen.jsonl") == IN_TURN[:4]
    assert run(captions, tmp_path / "gen.jsonl", "--max_size", "6") == 0
    assert ids(tmp_path / "gen.jsonl") == IN_TURN[:6] and len(endpoint.calls) == 6


@pytest.mark.parametrize(("words", "used"), [(["False"], False), (["True"], True), ([], True)])
def test_the_switch_of_mentions_is_a_switch(
    endpoint: FakeEndpoint, tmp_path: Path, words: list[str], used: bool
) -> None:
    """The original treats any value as true."""
    row = {"pair_id": "1_F1", "fig_label": "", "fig_caption": "Plain.", "in_text_mention": [{"tokens": "There ."}]}
    (tmp_path / "c.json").write_text(json.dumps([row]))
    assert run(tmp_path / "c.json", tmp_path / "gen.jsonl", "--use_inline_mentions", *words) == 0
    assert ("There ." in endpoint.calls[0].question) is used


def test_printed_command_killed_at_a_random_row_and_resumed(
    endpoint: FakeEndpoint, shared: Path, tmp_path: Path
) -> None:
    captions = shared / CAPTIONS
    whole, pieces = tmp_path / "whole.jsonl", tmp_path / "pieces.jsonl"
    broken = hashlib.sha256(b"").hexdigest()

    def some_fail(messages: list[Message]) -> str | Fault:
        digest = hashlib.sha256(messages[-1]["content"].encode()).hexdigest()
        time.sleep(int(digest[:2], 16) / 2550)  # answers come out of order
        return Fault(400, code="content_filter") if digest[-1] == broken[0] else answer(messages)

    endpoint.answer = some_fail
    assert run(captions, whole, "--use_inline_mentions", "True") == 1  # some rows failed
    num_calls = len(endpoint.calls)
    assert num_calls == 50
    endpoint.calls.clear()
    line = [sys.executable, "llava/instruct/instruct_generate.py", "--input_path", str(captions), "--output_path"]
    line += [str(pieces), "--max-size", "60000", "--use_inline_mentions", "True"]
    stop_at = random.randrange(1, 40)
    deadline = time.monotonic() + 240
    with started(line, cwd=ROOT, env=environment(endpoint), stderr=subprocess.DEVNULL) as process:
        while not pieces.exists() or pieces.read_bytes().count(b"\n") < stop_at:
            assert process.poll() is None and time.monotonic() < deadline, f"ended before row {stop_at}"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    num_before = pieces.read_bytes().count(b"\n")
    with pieces.open("ab") as stream:  # as a kill in the middle of a line leaves it
        stream.write(b'{"pair_id": "3457')
    done = run_command(line, cwd=ROOT, env=environment(endpoint), timeout=900)
    assert done.returncode == 1, done.stderr
    assert pieces.read_bytes() == whole.read_bytes()
    failed = [path.with_name(f"{path.stem}.failed.jsonl").read_bytes() for path in (pieces, whole)]
    assert failed[0] == failed[1] and failed[0].count(b"\n") == 50 - len(ids(whole)) > 0
    asked = Counter(call.question for call in endpoint.calls)
    assert len(asked) == 50
    assert sum(asked.values()) - 50 <= 8, "only requests in flight at the kill may be sent twice"
    assert f"50 selected: {num_before} answered" in done.stdout
    post = tmp_path / "post.json"
    line = [sys.executable, "llava/instruct/instruct_postprocess.py", "--input_path", str(pieces), "--output_path"]
    done = subprocess.run([*line, str(post)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(post.read_text())
    assert [row["id"] for row in rows] == [row["pair_id"] for row in read_records(pieces)]
    assert all(len(row["conversations"]) == 4 and "<image>" in row["conversations"][0]["value"] for row in rows)


def test_failed_rows_are_data_and_are_retried_on_request(
    endpoint: FakeEndpoint, captions: Path, tmp_path: Path
) -> None:
    output, failed = tmp_path / "gen.jsonl", tmp_path / "gen.failed.jsonl"
    endpoint.answer = lambda messages: (
        Fault(finish_reason="length", text="User: cut") if "row 6" in messages[-1]["content"] else answer(messages)
    )
    assert run(captions, output, "--batch_size", "1") == 1
    assert ids(output) == list("05127384") and ids(failed) == ["6"]
    note = next(read_records(failed))["failure"]
    wasted = note["wasted"]
    assert (note["reason"], note["attempts"], wasted["answer_tokens"]) == ("cut_short", 1, 2)
    assert wasted["prompt_tokens"] > 1000
    assert run(captions, output, "--retry_failed") == 1 and len(endpoint.calls) == 10
    assert next(read_records(failed))["failure"]["wasted"] == {name: 2 * count for name, count in wasted.items()}
    endpoint.answer = answer
    assert run(captions, output) == 1 and len(endpoint.calls) == 10
    endpoint.faults = [Fault(text=" ")]
    assert run(captions, output, "--retry_failed") == 0 and len(endpoint.calls) == 12
    assert ids(output) == IN_TURN and not failed.exists()
    note = [row["generation"] for row in read_records(output)][IN_TURN.index("6")]
    assert note["wasted"] == {"prompt_tokens": 3 * wasted["prompt_tokens"], "answer_tokens": 4}
    assert sum("wasted" in row["generation"] for row in read_records(output)) == 1


def test_rate_limits_and_transient_errors_leave_no_trace(
    endpoint: FakeEndpoint, captions: Path, tmp_path: Path
) -> None:
    assert run(captions, tmp_path / "calm.jsonl") == 0
    endpoint.faults = [
        Fault(429, headers=(("Retry-After", "0.2"),)),
        Fault(500),
        Fault(body=b"{"),
        Fault(cut_after=30),
        Fault(429, headers=(("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "150ms"))),
        Fault(503, headers=(("retry-after-ms", "50"),)),
    ]
    assert run(captions, tmp_path / "storm.jsonl") == 0
    assert (tmp_path / "storm.jsonl").read_bytes() == (tmp_path / "calm.jsonl").read_bytes()


def test_a_wrong_key_stops_at_once_and_blames_no_row(endpoint: FakeEndpoint, captions: Path, tmp_path: Path) -> None:
    endpoint.key = "another"
    with pytest.raises(GenerationError, match="credentials"):
        run(captions, tmp_path / "gen.jsonl", "--batch_size", "2")
    assert len(endpoint.calls) <= 2
    assert not (tmp_path / "gen.failed.jsonl").exists()
    endpoint.key = ""
    assert run(captions, tmp_path / "gen.jsonl") == 0


def test_an_endpoint_that_is_down_stops_the_run(
    endpoint: FakeEndpoint, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.answer = lambda messages: Fault(500)
    more = ["--batch_size", "1", "--max_failures", "3", "--max_retries", "1"]
    assert run(captions, tmp_path / "gen.jsonl", *more) == 1
    assert len(endpoint.calls) == 6
    shown = capsys.readouterr().out
    assert "3 rows failed in a row, the last with unavailable after 2 attempts" in shown and "6 pending" in shown


def test_limits_hold_over_several_runs(endpoint: FakeEndpoint, captions: Path, tmp_path: Path) -> None:
    output = tmp_path / "gen.jsonl"
    assert run(captions, output, "--max_size", "1") == 0
    one = next(read_records(output))["generation"]
    each = one["prompt_tokens"] + one["answer_tokens"]
    ceiling = each * 4 + 300
    common = ["--max_answer_tokens", "200", "--batch_size", "8"]
    for _ in range(2):  # once the limit is reached, another run sends nothing
        assert run(captions, output, *common, "--max_total_tokens", str(ceiling)) == 1
        spent = sum(
            row["generation"]["prompt_tokens"] + row["generation"]["answer_tokens"] for row in read_records(output)
        )
        assert spent <= ceiling
        assert 2 <= len(ids(output)) <= 4
    assert len(endpoint.calls) == len(ids(output))
    cost = ["--price_prompt", "2", "--price_answer", "8", "--max_cost"]
    before = len(endpoint.calls)
    assert run(captions, output, *common, *cost, "0.0001") == 1 and len(endpoint.calls) == before
    assert run(captions, output, *common, *cost, "1") == 0 and ids(output) == IN_TURN


def test_budget_reserves_the_longest_answer() -> None:
    budget = Budget(Prices(), max_answer_tokens=100, max_total_tokens=400)
    assert budget.reserve("a", 50) and budget.reserve("b", 50) and not budget.reserve("c", 50)
    assert budget.settle("a", 100, 10, answer="") == (100, 10)
    assert budget.scale == 2.0
    assert not budget.reserve("c", 50), "110 spent, 100 + 100 reserved, 100 + 100 more"
    budget.release("b", 0, 0)
    assert budget.reserve("c", 50)
    assert budget.settle("c", None, None, answer="x" * 8) == (50, 6)
    with pytest.raises(ConfigError, match="--price-prompt"):
        Budget(Prices(1.0), 10, max_cost=1.0)
    with pytest.raises(ConfigError, match="negative"):
        Budget(Prices(-1.0, 1.0), 10)


def test_estimate_of_tokens() -> None:
    assert estimate_tokens([{"content": ""}, {"content": "abcde"}, {"content": "éé"}]) == 4 + 6 + 5


def test_dry_run_sends_no_request_and_needs_no_key(
    captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    prices = ["--price_prompt", "2", "--price_answer", "8"]
    assert run(captions, tmp_path / "gen.jsonl", "--dry_run", "True", "--show_prompts", "1", *prices) == 0
    shown = capsys.readouterr().out
    rows = json.loads(captions.read_text())
    expected = sum(
        estimate_tokens(messages_for(row, use_inline_mentions=False)) for part in rows.values() for row in part
    )
    assert f"{expected:,} prompt tokens" in shown and "at most 9,216" in shown and "expected" in shown
    assert shown.count("=====") == 1 and f"{SECRET} row 0" in shown and f"{SECRET} row 1" not in shown
    assert [path.name for path in tmp_path.iterdir()] == ["captions.json"]


def test_neither_key_nor_caption_is_printed(endpoint: FakeEndpoint, captions: Path, tmp_path: Path) -> None:
    """Errors of this endpoint quote the whole request, as some servers do."""
    endpoint.answer = lambda messages: Fault(400 if "row 1" in messages[-1]["content"] else 500, code="bad")
    line = [sys.executable, "-m", "llava.instruct.instruct_generate", "--input_path", str(captions)]
    line += ["--output_path", str(tmp_path / "gen.jsonl"), "--max_retries", "0"]
    more = {"LLAVA_TRACEBACK": "1"}
    done = [subprocess.run(line, cwd=ROOT, env=environment(endpoint, **more), capture_output=True, check=False)]
    endpoint.key = "another"
    line[-1] = "1"
    line += ["--retry_failed"]
    done += [subprocess.run(line, cwd=ROOT, env=environment(endpoint, **more), capture_output=True, check=False)]
    assert [item.returncode for item in done] == [1, 1]
    assert b"GenerationError" in done[1].stderr and b"refused" in done[0].stdout
    for item in done:
        for secret in (SECRET, KEY, KEY[3:]):
            assert secret.encode() not in item.stdout + item.stderr
    assert KEY not in (tmp_path / "gen.failed.jsonl").read_text()


def test_other_files_are_not_appended_to(endpoint: FakeEndpoint, captions: Path, tmp_path: Path) -> None:
    for content in ('{"id": 1}\n', "text\nmore\n", "[1]\n"):
        (tmp_path / "gen.jsonl").write_text(content)
        with pytest.raises(DataError, match="line 1"):
            run(captions, tmp_path / "gen.jsonl")
        assert (tmp_path / "gen.jsonl").read_text() == content
    assert not endpoint.calls


def test_rows_of_another_list_follow_those_of_this_one(endpoint: FakeEndpoint, captions: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"pair_id": "92000009_F1", "fig_caption": "Other."}]))
    assert run(other, tmp_path / "gen.jsonl") == 0
    assert run(captions, tmp_path / "gen.jsonl", "--max_size", "2") == 0
    found: list[dict[str, Any]] = list(read_records(tmp_path / "gen.jsonl"))
    assert [row["pair_id"] for row in found] == ["91000000_F1", "91000005_F1", "92000009_F1"]
