"""Parts of the benchmark of serving on scripted servers, and its peer on a tiny export."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks import decode_step, serving
from benchmarks.serving_engine import prompt_of
from benchmarks.serving_peer import OneAtATime
from benchmarks.serving_sides import Process, question, save_folders
from llava.generation.loading import open_engine
from llava.generation.protocol import Sampling
from tests.support.served import MODEL, ScriptedEngine, scripted_app, served


class RunningServer:
    """Server that is there already, in place of a process."""

    def __init__(self, url: str) -> None:
        self.url, self.model = url, MODEL

    def metric(self, name: str) -> float:
        return 1.0

    def anonymous_bytes(self) -> int:
        return 1 << 20


class RunningServers:
    """Ours and one peer, in place of processes that are started."""

    def __init__(self, ours: str, peer: str) -> None:
        self.ours = self.through = self.small_cache = RunningServer(ours)
        self.peers = {"peer": RunningServer(peer)}


PARTS = ("one", "distinct_8", "shared_8", "turns", "gap", "images", "memory")


def test_the_parts_ask_all_sides(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serving.time, "sleep", lambda seconds: None)
    engine = ScriptedEngine([f"word{number} " for number in range(4)])
    with served(scripted_app(engine, context=4096)) as url, served(scripted_app(engine, context=4096)) as other:
        bench = serving.Bench(cast(Any, RunningServers(url, other)), 1, True, itertools.count())
        found, failed = serving.measured(PARTS, bench)
    names = {"one", "distinct_8", "ttft_8", "shared_8", "turn2", "later_question", "gap", "images", "memory"}
    assert found.keys() == names and failed == []
    assert found.pop("images") == 0 and all(value > 0 for value in found.values())
    shown = capsys.readouterr().out
    assert "distinct_8: requests/s (p95 of seconds to the first token): ours" in shown
    assert "images: 4 of 4 megapixels" in shown
    # 2 x 2 single requests, 2 x 8 and 2 x 8 at once, 5 turns, 1 and 9 streams, 1 of large images, 200 of memory.
    assert len(engine.prompts) == 4 + 16 + 16 + 5 + 10 + 1 + 200


def test_a_part_that_fails_leaves_the_ratios_of_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    engine = ScriptedEngine()
    with served(scripted_app(engine, context=4096)) as url:
        servers = RunningServers(url, "http://127.0.0.1:9")  # nothing listens there
        bench = serving.Bench(cast(Any, servers), 1, True, itertools.count())
        found, failed = serving.measured(["one", "gap"], bench)
    assert failed == ["one"] and found.keys() == {"gap"}
    shown = capsys.readouterr().out
    assert "one: FAILED" in shown and "RATIO gap=" in shown


def test_parts_are_named_with_commas_or_spaces() -> None:
    assert serving.parts_of(["one,distinct_8", "turns"]) == ["one", "distinct_8", "turns"]
    with pytest.raises(argparse.ArgumentTypeError, match="unknown part two; known: one, "):
        serving.parts_of(["two"])


def test_a_server_that_ends_is_reported_with_its_last_line() -> None:
    script = "import sys; sys.stderr.write('first\\nport is taken\\n'); sys.exit(2)"
    with (
        pytest.raises(RuntimeError, match=r"did not start \(exit status 2\): port is taken"),
        Process(["-c", script], 9, "none"),
    ):
        raise AssertionError("it is not ready")


def test_other_answers_of_a_peer_are_an_error() -> None:
    replies = {side: [serving.Reply(text=f"{side}{number}") for number in range(8)] for side in ("ours", "peer")}
    with pytest.raises(RuntimeError, match="8 of 8 answers differ"):
        serving.check_equal(replies)


def test_the_peer_answers_as_our_engine(tmp_path: Path) -> None:
    ours, export = save_folders(tmp_path, "tiny")
    peer, engine = OneAtATime(str(export)), open_engine(ours, device="cpu")
    for seed in range(4):
        body = {"messages": [question(seed, seed)], "max_tokens": 16}
        prompt = prompt_of(body)
        assert tuple(peer.inputs(body)["input_ids"][0].tolist()) == engine.reader.read(prompt).encoded.input_ids
        text = "".join(peer.pieces(body))
        [[answer]] = engine.generate([prompt], Sampling(max_new_tokens=16))
        assert text == answer.text and text.isascii() and text.isalpha() and answer.finish == "length"


def test_the_decoding_part_measures_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(decode_step, "NUM_LAYERS", 2)
    monkeypatch.setattr(decode_step, "VOCABULARY", 300)
    found = decode_step.ratios(1)
    assert found.keys() == {"step_calls", "step_1", *(f"int8_{num}" for num in decode_step.NUMS)}
    assert all(value > 0 for value in found.values())
    assert "equal greedy tokens" in capsys.readouterr().out
