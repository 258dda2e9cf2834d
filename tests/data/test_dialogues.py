"""Questions about one image, joined to dialogues."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.dialogues import joined_dialogues, main
from llava.data.records import load_samples
from llava.errors import ConfigError
from llava.samples import Conversation, Sample, Turn


def question(number: int, image: str | None = "a.png", *, split: str = "train", kind: str = "CLOSED") -> Sample:
    text = f"<image>\nQ{number}" if image else f"Q{number}"
    meta = {"split": split, "answer_type": kind, "organ": "head"}
    conversation = Conversation((Turn("human", text), Turn("gpt", f"A{number}")))
    return Sample(str(number), conversation, (image,) if image else (), meta)


def test_a_dialogue_shows_the_image_once_and_keeps_ids_and_types() -> None:
    rows = [question(0), question(1, kind="OPEN"), question(2)]
    [dialogue] = joined_dialogues(rows, num_turns=5)
    texts = [turn.text for turn in dialogue.conversation.turns]
    order = [int(number) for number in dialogue.meta["question_ids"]]
    expected = [text for number in order for text in (f"Q{number}", f"A{number}")]
    assert texts == [f"<image>\n{expected[0]}", *expected[1:]]
    assert dialogue.images == ("a.png",)
    assert dialogue.meta["answer_types"] == [rows[number].meta["answer_type"] for number in order]
    assert dialogue.meta["organ"] == "head" and "answer_type" not in dialogue.meta


def test_dialogues_are_of_equal_length_where_possible() -> None:
    found = joined_dialogues([question(n) for n in range(11)], num_turns=5)
    assert [len(d.conversation.turns) // 2 for d in found] == [4, 4, 3]


def test_splits_are_never_joined() -> None:
    rows = [question(n, split="train" if n % 2 else "test") for n in range(6)]
    for dialogue in joined_dialogues(rows, num_turns=9):
        assert {int(number) % 2 == 1 for number in dialogue.meta["question_ids"]} == {dialogue.meta["split"] == "train"}


def test_other_rows_stay_as_they_are() -> None:
    several = Sample("s", Conversation((*question(0).conversation.turns, *question(1).conversation.turns)), ("a.png",))
    rows = [several, question(2, None), question(3, None), question(4)]
    assert joined_dialogues(rows, num_turns=5) == rows


def test_a_placeholder_inside_a_later_question_leaves_a_space() -> None:
    turns = (Turn("human", "Is <image>\nnormal?"), Turn("gpt", "no"))
    rows = [Sample(str(n), Conversation(turns), ("a.png",)) for n in range(2)]
    [dialogue] = joined_dialogues(rows, num_turns=2)
    assert dialogue.conversation.turns[2].text == "Is normal?"


@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["a.png", "b.png", None]), st.sampled_from(["train", "test"])), max_size=20
    ),
    num_turns=st.integers(1, 6),
    seed=st.integers(0, 3),
)
def test_every_question_is_kept_once_beside_its_answer(
    rows: list[tuple[str | None, str]], num_turns: int, seed: int
) -> None:
    samples = [question(number, image, split=split) for number, (image, split) in enumerate(rows)]
    found = joined_dialogues(samples, num_turns=num_turns, seed=seed)
    pairs: Counter[Any] = Counter()
    for sample in found:
        turns = sample.conversation.turns
        assert len(turns) <= 2 * num_turns and sum(turn.text.count("<image>") for turn in turns) == len(sample.images)
        for asked, answer in zip(turns[::2], turns[1::2], strict=True):
            pairs[asked.text.removeprefix("<image>\n"), answer.text, sample.images] += 1
    expected = Counter((f"Q{n}", f"A{n}", (image,) if image else ()) for n, (image, _) in enumerate(rows))
    assert pairs == expected
    assert joined_dialogues(samples, num_turns=num_turns, seed=seed) == found


def test_the_command_writes_rows_that_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "id": number,
            "image": "a.png",
            "answer_type": "OPEN",
            "conversations": [{"from": "human", "value": f"<image>\nQ{number}"}, {"from": "gpt", "value": "A"}],
        }
        for number in range(3)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    main([str(tmp_path / "rows.json"), "--turns", "2", "--out", str(tmp_path / "out.json")])
    assert "3 rows: 3 questions in 2 dialogues, 0 rows unchanged" in capsys.readouterr().out
    found = load_samples(tmp_path / "out.json")
    assert sorted(number for sample in found for number in sample.meta["question_ids"]) == [0, 1, 2]
    assert len({sample.id for sample in found}) == 2
    with pytest.raises(ConfigError, match="--turns must be at least 1"):
        main([str(tmp_path / "rows.json"), "--turns", "0", "--out", str(tmp_path / "out.json")])
