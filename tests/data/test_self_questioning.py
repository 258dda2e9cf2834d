"""Questions that are trained: which turns are drawn, and draws that depend on seed, epoch and row only."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava.constants import IGNORE_INDEX
from llava.conversation import get_template
from llava.data.collator import Collator
from llava.data.dataset import SFTDataset, StreamDataset
from llava.data.loader import StepLoader
from llava.data.samplers import RandomSampler
from llava.data.self_questioning import DEFAULT_RATE, QuestionDraws, with_questions
from llava.data.shards import StreamRow
from llava.data.streaming import StreamedRow, StreamSource
from llava.errors import ConfigError
from llava.samples import Conversation, Sample, Turn, from_row, to_row
from tests.support.text_tools import talk
from tests.support.tiny import tiny_image

DIALOGUE = talk("<image>\nQ1", "A1", "Q2", "A2", "Q3", "A3")


def flags(conversation: Conversation) -> list[bool | None]:
    return [turn.train for turn in conversation.turns]


def test_each_later_question_costs_one_draw_in_order() -> None:
    draws = iter([0.6, 0.2])
    asked = with_questions(DIALOGUE, rate=0.5, draw=lambda: next(draws), has_image=True)
    assert flags(asked) == [None, None, None, None, True, None]
    assert list(draws) == []


def test_a_given_flag_is_kept_and_costs_no_draw() -> None:
    turns = list(DIALOGUE.turns)
    turns[2] = replace(turns[2], train=False)
    draws = iter([0.0])
    asked = with_questions(Conversation(tuple(turns)), rate=0.5, draw=lambda: next(draws), has_image=True)
    assert flags(asked) == [None, None, False, None, True, None]


def test_rows_without_an_image_cost_no_draw() -> None:
    def never() -> float:
        raise AssertionError

    assert with_questions(DIALOGUE, rate=1.0, draw=never, has_image=False) == DIALOGUE
    assert with_questions(talk("<image>\nQ", "A"), rate=1.0, draw=never, has_image=True) == talk("<image>\nQ", "A")


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0, 0), (1.0, 1000, 1000), (0.5, 440, 560)])
def test_the_rate_is_the_share_of_asked_questions(rate: float, low: int, high: int) -> None:
    asking = QuestionDraws(rate, seed=3)
    rows = (asking.apply(DIALOGUE, has_image=True, place=f"0/{row}") for row in range(500))
    assert low <= sum(flag is True for row in rows for flag in flags(row)) <= high


def test_shared_draws_are_those_of_pythons_global_stream() -> None:
    asking = QuestionDraws(0.5, seed=9, shared=True)
    random.seed(42)
    found = [asking.apply(DIALOGUE, has_image=True, place="0/0") for _ in range(4)]
    draw = random.Random(42).random
    assert found == [with_questions(DIALOGUE, rate=0.5, draw=draw, has_image=True) for _ in range(4)]


def test_a_template_decides_whether_questions_are_drawn() -> None:
    for name in ("v1_sq", "chatml_sq"):
        assert QuestionDraws(seed=1).fitting(get_template(name)) == QuestionDraws(DEFAULT_RATE, seed=1)
        assert QuestionDraws(0.0).fitting(get_template(name)) is None
    assert QuestionDraws().fitting(get_template("v1")) is None
    assert QuestionDraws(0.0).fitting(get_template("v1")) is None
    with pytest.raises(ConfigError, match=r"--sq-r 0.5: template v1 .*--version v1_sq or chatml_sq"):
        QuestionDraws(0.5).fitting(get_template("v1"))


def test_vuser_is_a_question_that_is_always_asked() -> None:
    turns = [{"from": "human", "value": "Q1"}, {"from": "gpt", "value": "A1"}, {"from": "vuser", "value": "Q2"}]
    sample = from_row({"id": "1", "conversations": turns})
    assert sample.conversation.turns[2] == Turn("human", "Q2", train=True)
    assert from_row(to_row(sample)) == sample
    kept = from_row({"id": "1", "conversations": [*turns[:2], {**turns[2], "train": False}]})
    assert kept.conversation.turns[2].train is False


@pytest.fixture
def dialogues(tiny: Any, tmp_path: Path) -> SFTDataset:
    tiny_image(0).save(tmp_path / "0.png")
    samples = [Sample(str(number), DIALOGUE, ("0.png",)) for number in range(8)]
    processor = tiny.processor.changed(template="v1_sq")
    return SFTDataset(samples, processor, image_folder=tmp_path, asking=QuestionDraws(0.5, seed=7))


def asked_turns(labels: tuple[int, ...], turns: tuple[int, ...]) -> set[int]:
    return {turn for label, turn in zip(labels, turns, strict=True) if label != IGNORE_INDEX and turn % 2 == 0}


def draws_of(dataset: SFTDataset, *, ranks: int = 1, workers: int = 0, epochs: Any = (0, 1, 2)) -> dict[Any, set[int]]:
    """Return the asked turns of every (epoch, row) as loaders yield them."""
    processor = dataset.processor
    collator = Collator(dataset, processor.image_token_id, processor.pad_token_id)
    found: dict[Any, set[int]] = {}
    for rank in range(ranks):
        sampler = RandomSampler(len(dataset), 4 // ranks, rank=rank, world_size=ranks, seed=1)
        loader = StepLoader(sampler, collator, num_workers=workers, persistent_workers=True)
        for epoch in epochs:
            loader.set_epoch(epoch)
            for step in loader:
                for row, encoded in zip(step.row_ids, step.sequences, strict=True):
                    found[epoch, row] = asked_turns(encoded.labels, encoded.turns)
    return found


def test_draws_depend_on_seed_epoch_and_row_only(dialogues: SFTDataset) -> None:
    one = draws_of(dialogues)
    assert len(one) == 24
    by_epoch = [[one[epoch, row] for row in range(8)] for epoch in range(3)]
    assert by_epoch[0] != by_epoch[1] != by_epoch[2]
    assert {turn for turns in one.values() for turn in turns} == {2, 4}
    assert draws_of(dialogues, ranks=2) == one
    assert draws_of(dialogues, workers=2) == one
    assert draws_of(dialogues, epochs=(2,)) == {key: turns for key, turns in one.items() if key[0] == 2}  # a resume
    dialogues.asking = QuestionDraws(0.5, seed=8)
    assert draws_of(dialogues) != one


def test_streams_draw_by_pass_and_row(tiny: Any, tmp_path: Path) -> None:
    tiny_image(0).save(tmp_path / "0.png")
    turns = [{"from": turn.role, "value": turn.text} for turn in DIALOGUE.turns]
    value = {"id": "1", "image": "0.png", "conversations": turns}
    shard = tmp_path / "shard.jsonl"
    source = StreamSource("only", (shard,), images=tmp_path)

    def drawn(turn: int) -> Iterator[set[int]]:
        dataset = StreamDataset([source], tiny.processor.changed(template="v1_sq"), asking=QuestionDraws(0.5, seed=1))
        for number in range(6):
            encoded = dataset.encode(StreamedRow(0, shard, number, StreamRow(value), turn))
            yield asked_turns(encoded.labels, encoded.turns)

    first = list(drawn(0))
    assert list(drawn(0)) == first and list(drawn(1)) != first
