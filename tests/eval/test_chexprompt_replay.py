"""The report judge against an endpoint that replays every form of reply, killed and started again."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from llava.eval.reports.error_prompt import PROMPT_SHA256, PROMPT_VERSION
from tests.eval.reports.test_error_replies import EXPECTED, READABLE, UNREADABLE
from tests.support.fake_endpoint import FakeEndpoint, Fault, environment, serve
from tests.support.processes import run_command, started

ROOT = Path(__file__).resolve().parents[2]

REPLIES: list[tuple[str | Fault, str]] = [
    *((text, "") for text in READABLE.values()),
    *UNREADABLE,
    (Fault(finish_reason="content_filter", text=""), "filtered"),
    (Fault(400, code="content_filter"), "filtered"),
]
"""Replies, and why they have no rating; empty where they have one."""

KILLED_AFTER = 7


def answer(messages: list[dict[str, Any]]) -> str | Fault:
    """Return the reply to the candidate with its number."""
    match = re.search(r'"""Candidate (\d+)\."""\nErrors:$', messages[1]["content"])
    assert match is not None
    return REPLIES[int(match[1])][0]


def words(folder: Path) -> list[str]:
    """Return the published command."""
    command = [sys.executable, "llava/eval/chexprompt.py", "--rating_name", "one", "--output_dir", str(folder / "out")]
    command += ["--input_fpath", str(folder / "in.jsonl"), "--engine", "gpt-4t", "--temperature", "0.4"]
    command += ["--max_tokens", "128", "--top_p", "0.95", "--max_request_per_min", "0"]
    return [*command, "--use_async", "False", "--num_rounds", "1", "--max_retries", "0"]


def kill_after_some(folder: Path, endpoint: FakeEndpoint) -> int:
    """Start the command, kill it after some replies, and return how many it had stored."""
    store = folder / "out" / "one.replies.jsonl"
    endpoint.pause = 0.1
    with started(words(folder), cwd=ROOT, env=environment(endpoint), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while not (store.is_file() and store.read_bytes().count(b"\n") >= KILLED_AFTER):
            assert process.poll() is None and time.monotonic() < deadline, "it ended before it was killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    endpoint.pause = 0.0
    return store.read_bytes().count(b"\n")


def test_every_reply_killed_resumed_and_not_asked_again(tmp_path: Path) -> None:
    rows = [
        {"id": f"p{n}", "reference": f"Reference {n}.", "candidate": f"Candidate {n}."} for n in range(len(REPLIES))
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serve(answer) as endpoint:
        num_stored = kill_after_some(tmp_path, endpoint)
        assert KILLED_AFTER <= num_stored < len(REPLIES) and not (tmp_path / "out" / "one.jsonl").exists()
        endpoint.calls.clear()
        done = run_command(words(tmp_path), cwd=ROOT, env=environment(endpoint), timeout=900)
        assert done.returncode == 0, done.stderr
        assert len(endpoint.calls) == len(REPLIES) - num_stored
        ratings = (tmp_path / "out" / "one.jsonl").read_bytes()
        again = run_command(words(tmp_path), cwd=ROOT, env=environment(endpoint), timeout=900)
        assert again.returncode == 0, again.stderr
        assert len(endpoint.calls) == len(REPLIES) - num_stored and "0 requests sent" in again.stdout
    assert (tmp_path / "out" / "one.jsonl").read_bytes() == ratings
    for row, given, (_, reason) in zip(map(json.loads, ratings.splitlines()), rows, REPLIES, strict=True):
        assert {key: row[key] for key in given} == given
        assert (row["rating"], row["failure"]) == (None if reason else EXPECTED, reason), row["reply"]
        assert (row["judge"]["prompt"], row["judge"]["prompt_sha256"]) == (PROMPT_VERSION, PROMPT_SHA256)
        assert [row["judge"][key] for key in ("engine", "temperature", "top_p", "max_tokens")] == [
            *("gpt-4t", 0.4, 0.95, 128)
        ]
    summary = json.loads((tmp_path / "out" / "one.summary.json").read_text())
    assert summary["unread"] == dict(Counter(reason for _, reason in REPLIES if reason))
    assert (summary["num_reports"], summary["num_read"]) == (len(REPLIES), len(READABLE))
    assert summary["metrics"]["significant errors"]["value"] == 6.0  # the same counts in every readable form
    assert summary["metrics"]["error-free"]["value"] == 0.0
