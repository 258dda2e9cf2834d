"""Parts of the benchmark of serving on scripted servers, and its peer on a tiny export."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from benchmarks import decode_step, serving
from benchmarks.serving_engine import prompt_of
from benchmarks.serving_peer import OneAtATime
from benchmarks.serving_sides import question, save_folders
from llava.generation.loading import open_engine
from llava.generation.protocol import Sampling
from tests.support.served import MODEL, ScriptedEngine, scripted_app, served


class Running:
    """Server that is there already, in place of a process."""

    def __init__(self, url: str) -> None:
        self.url, self.model = url, MODEL

    def metric(self, name: str) -> float:
        return 1.0

    def anonymous_bytes(self) -> int:
        return 1 << 20


PARTS = ("one", "distinct_8", "shared_8", "turns", "gap", "memory")


def test_the_parts_ask_all_sides(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serving.time, "sleep", lambda seconds: None)
    engine = ScriptedEngine([f"word{number} " for number in range(4)])
    with served(scripted_app(engine, context=4096)) as url, served(scripted_app(engine, context=4096)) as other:
        ours, peer = Running(url), Running(other)
        bench: Any = serving.Bench(ours, ours, {"peer": peer}, Path(), 1, True, itertools.count())  # type: ignore[arg-type]
        found: dict[str, float] = {}
        for name in PARTS:
            found |= serving.SERVED[name](bench)
    names = {"one", "distinct_8", "ttft_8", "shared_8", "turn2", "later_question", "gap", "memory"}
    assert found.keys() == names and all(value > 0 for value in found.values())
    assert "distinct_8: requests/s: ours" in capsys.readouterr().out
    # 2 x 2 single requests, 2 x 8 and 2 x 8 at once, 5 turns, 1 and 9 streams, 200 of memory.
    assert len(engine.prompts) == 4 + 16 + 16 + 5 + 10 + 200


def test_other_answers_of_a_peer_are_an_error() -> None:
    replies = {side: [serving.Reply(text=f"{side}{number}") for number in range(8)] for side in ("ours", "peer")}
    with pytest.raises(RuntimeError, match="8 of 8 answers differ"):
        serving.check_equal(replies)


def test_the_peer_answers_as_our_engine(tmp_path: Path) -> None:
    ours, export = save_folders(tmp_path, "tiny")
    body = {"messages": [question(1, 2)], "max_tokens": 8}
    text = "".join(OneAtATime(str(export)).pieces(body))
    [[answer]] = open_engine(ours, device="cpu").generate([prompt_of(body)], Sampling(max_new_tokens=8))
    assert text.strip() == answer.text.strip() and answer.finish == "length"


def test_the_decoding_part_measures_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(decode_step, "NUM_LAYERS", 2)
    monkeypatch.setattr(decode_step, "VOCABULARY", 300)
    found = decode_step.ratios(1)
    assert found.keys() == {"step_calls", "step_1", "int8_1", "int8_4"} and all(value > 0 for value in found.values())
    assert "equal greedy tokens" in capsys.readouterr().out
