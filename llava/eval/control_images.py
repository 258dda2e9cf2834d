"""Controls of an evaluation: the same questions about another image.

    blank    one gray square for all questions
    noise    one image of random pixels for all questions
    shuffle  the image of another question of the same type, never of the same patient

A model that uses its images scores lower on each; what remains is due to the questions alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from llava.constants import BLANK_SIZE, GRAY
from llava.data.groups import GROUP_FIELDS, field_key, image_name_key, is_known_name, written_name
from llava.errors import ConfigError, DataError
from llava.samples import Sample

CONTROLS = ("blank", "shuffle", "noise")
"""Controls by name, in the order of tables."""

NO_CONTROLS = "none"
NUM_TRIES = 64
_GROUP_KEYS = frozenset(map(field_key, GROUP_FIELDS))


def parse_controls(text: str) -> tuple[str, ...]:
    """Return the controls of a list such as `blank,shuffle`; `none` is empty.

    Raises:
        ConfigError: a name is unknown.
    """
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    if words in ([NO_CONTROLS], []):
        return ()
    for word in words:
        if word not in CONTROLS:
            raise ConfigError(f"--controls: unknown control {word!r}; known: {', '.join(CONTROLS)}, {NO_CONTROLS}")
    return tuple(name for name in CONTROLS if name in words)


def control_image(name: str) -> Image.Image | None:
    """Return the image that a control shows for all questions; None if it differs by question."""
    if name == "blank":
        return Image.new("RGB", (BLANK_SIZE,) * 2, GRAY)
    if name == "noise":
        pixels = np.random.default_rng(0).integers(0, 256, (BLANK_SIZE, BLANK_SIZE, 3), dtype=np.uint8)
        return Image.fromarray(pixels)
    return None


def shuffled_images(samples: Sequence[Sample], *, seed: int = 0) -> list[Sample]:
    """Return the samples, each with the images of another one.

    The other one has the same question type and as many images, and differs in image and in every field that names a
    patient or a study. A type without such a question takes one of another type.

    Raises:
        DataError: a sample has no partner.
    """
    by_kind: dict[tuple[str, int], list[Sample]] = {}
    by_number: dict[int, list[Sample]] = {}
    for sample in samples:
        by_kind.setdefault(_kind(sample), []).append(sample)
        by_number.setdefault(len(sample.images), []).append(sample)
    found = []
    for sample in samples:
        draw = random.Random(f"{seed} {sample.id}")
        other = _partner(sample, by_kind[_kind(sample)], draw) or _partner(sample, by_number[len(sample.images)], draw)
        if sample.images and other is None:
            raise DataError(
                f"--controls shuffle: question {sample.id!r} has no other question with an image of another patient; "
                "leave shuffle out"
            )
        found.append(sample if other is None else replace(sample, images=other.images))
    return found


def _kind(sample: Sample) -> tuple[str, int]:
    return str(sample.meta.get("question_type") or sample.meta.get("answer_type") or ""), len(sample.images)


def _partner(sample: Sample, others: Sequence[Sample], draw: random.Random) -> Sample | None:
    """Return a random sample about another patient; None without one."""
    groups = _groups(sample)
    for _ in range(NUM_TRIES):
        other = draw.choice(others)
        if groups.isdisjoint(_groups(other)):
            return other
    fitting = [other for other in others if groups.isdisjoint(_groups(other))]
    return draw.choice(fitting) if fitting else None


def _groups(sample: Sample) -> frozenset[tuple[str, str]]:
    """Return the images and the known names of patient and study of a sample."""
    named = {(field_key(name), written_name(value)) for name, value in sample.meta.items()}
    known = {(key, name) for key, name in named if key in _GROUP_KEYS and name and is_known_name(name)}
    return frozenset(known | {("image", image_name_key(name)) for name in sample.images})
