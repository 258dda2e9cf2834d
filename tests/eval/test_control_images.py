"""Controls: names, their images, and shuffled images of other patients."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import ConfigError, DataError
from llava.eval.control_images import control_image, parse_controls, shuffled_images
from llava.samples import Conversation, Sample, Turn


def sample(number: int, *, kind: str = "PRES", patient: object = None, image: str = "") -> Sample:
    meta = {"question_type": kind} | ({} if patient is None else {"patient": patient})
    turns = (Turn("human", "q"), Turn("gpt", "a"))
    return Sample(str(number), Conversation(turns), (image or f"{number}.png",), meta)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("blank", ("blank",)), ("noise, shuffle", ("shuffle", "noise")), ("none", ()), ("BLANK,blank", ("blank",))],
)
def test_names(text: str, expected: tuple[str, ...]) -> None:
    assert parse_controls(text) == expected


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown control 'gray'; known: blank, shuffle, noise, none"):
        parse_controls("blank,gray")


def test_images() -> None:
    blank, noise = control_image("blank"), control_image("noise")
    assert blank is not None and noise is not None and control_image("shuffle") is None
    assert blank.getcolors() == [(336 * 336, (127, 127, 127))]
    assert noise.tobytes() == control_image("noise").tobytes()  # type: ignore[union-attr]
    assert noise.getcolors(maxcolors=1000) is None


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 4)), min_size=1, max_size=30), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_shuffled_images_are_of_other_patients(rows: list[tuple[str, int]], seed: int) -> None:
    samples = [sample(n, kind=kind, patient=patient) for n, (kind, patient) in enumerate(rows)]
    if len({patient for _, patient in rows}) == 1:
        with pytest.raises(DataError, match="no other question with an image of another patient"):
            shuffled_images(samples, seed=seed)
        return
    shown = shuffled_images(samples, seed=seed)
    assert shown == shuffled_images(samples, seed=seed)
    owner = {one.images: one for one in samples}
    for own, other in zip(samples, shown, strict=True):
        source = owner[other.images]
        assert source.meta["patient"] != own.meta["patient"] and other.conversation == own.conversation
        has_own_type = any(
            one.meta["question_type"] == own.meta["question_type"] and one.meta["patient"] != own.meta["patient"]
            for one in samples
        )
        assert not has_own_type or source.meta["question_type"] == own.meta["question_type"]


def test_questions_about_one_image_are_one_patient() -> None:
    samples = [sample(0, image="a.png"), sample(1, image="./a.png"), sample(2, image="b.png")]
    assert [one.images for one in shuffled_images(samples)][:2] == [("b.png",)] * 2
    assert shuffled_images(samples)[2].images in (("a.png",), ("./a.png",))
