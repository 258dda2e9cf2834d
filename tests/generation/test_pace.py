"""Size of the pieces of prompts that are read beside running answers."""

from __future__ import annotations

from typing import Any

import pytest

from llava.generation.pace import FIRST_PIECE, MIN_PIECE, SHARE, Pace
from llava.generation.protocol import Sampling
from tests.support.generation_tools import ask, engine_of
from tests.support.tiny import tiny_llava


def test_a_piece_takes_a_few_steps() -> None:
    pace = Pace()
    assert pace.num_tokens(512) == FIRST_PIECE and pace.num_tokens(8) == 8
    pace.note_step(0.010)
    pace.note_piece(100, 0.020)
    assert pace.num_tokens(512) == int(SHARE * 50) and pace.num_tokens(30) == 30
    for _ in range(50):
        pace.note_piece(100, 1.0)  # the machine became slow
    assert pace.num_tokens(512) == MIN_PIECE
    for _ in range(50):
        pace.note_step(1.0)
    assert SHARE * 100 - 1 <= pace.num_tokens(512) <= SHARE * 100


def test_a_prompt_beside_running_answers_is_read_in_small_pieces_with_the_same_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long, short = ask("q" * 150 + "?", 1), ask("a?")
    sampling = Sampling(max_new_tokens=6)
    [[expected]] = engine_of(tiny_llava(seed=3)).generate([long], sampling)
    engine = engine_of(tiny_llava(seed=3), prefill_chunk=512, prefix_cache_mb=4)
    runner, pieces = engine.scheduler.runner, []
    read, embed = runner.read, runner.embed
    monkeypatch.setattr("llava.generation.pace.FIRST_PIECE", 40)
    monkeypatch.setattr(engine.scheduler.pace, "note_piece", lambda *_: None)

    def counted(extensions: Any, *rest: Any) -> Any:
        pieces.append(sum(extension.length for extension in extensions))
        return read(extensions, *rest)

    def noted(*args: Any) -> Any:
        pieces.append(0)
        return embed(*args)

    monkeypatch.setattr(runner, "read", counted)
    monkeypatch.setattr(runner, "embed", noted)
    running = [engine.submit(short, Sampling(max_new_tokens=1500, temperature=1.0, seed=seed)) for seed in range(3)]
    for handle in running:
        list(zip(range(3), handle, strict=False))  # each has been in a decoding step
    del pieces[:]
    [answer] = engine.submit(long, sampling).completions()
    for handle in running:
        handle.cancel()
    assert answer.token_ids == expected.token_ids
    image, *read_pieces = pieces
    assert image == 0 and len(read_pieces) > 2 and max(read_pieces) <= 40


@pytest.mark.parametrize("pause", [float("inf"), 0.0])
def test_far_more_prompts_than_answers_are_read_before_the_next_step(
    monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    monkeypatch.setattr("llava.generation.chunked_prefill.LONGEST_PAUSE", pause)
    prompts, sampling = [ask(f"Question {number}?", number) for number in range(4)], Sampling(max_new_tokens=6)
    expected = engine_of(tiny_llava(seed=3)).generate(prompts, sampling)
    engine = engine_of(tiny_llava(seed=3), prefill_chunk=16)
    runner, order = engine.scheduler.runner, []
    read, decode = runner.read, runner.decode
    monkeypatch.setattr(runner, "read", lambda *args: order.append("read") or read(*args))
    monkeypatch.setattr(runner, "decode", lambda ids: order.append("decode") or decode(ids))
    found = engine.generate(prompts, sampling)
    assert [one.token_ids for [one] in found] == [one.token_ids for [one] in expected]
    is_read_later = "read" in order[order.index("decode") :]
    assert is_read_later == (pause == 0.0)
