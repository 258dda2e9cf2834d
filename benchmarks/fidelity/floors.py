"""Smallest numbers of comparisons and values of the recorded folders, so that a removed number is noticed.

folder (by name, or by the commit in its description) --known--> floors of its files --below--> a failed line
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.fidelity.folder import Line, Oracle

ROW_DIGESTS = frozenset(
    ("0df807c2", "42f436c3", "50907a93", "55dfd0cb", "a3e662f5", "bc44b38e", "cb3b211c", "ccffa476")
)
"""Starts of the SHA-256 of the recorded conversations, the same in all folders."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Recorded folder.

    Attributes:
        commit: start of the commit of the original that its description names.
        floors: smallest number of compared quantities and values of each file.
    """

    commit: str
    floors: Mapping[str, tuple[int, int]]


RECORDINGS: dict[str, Recording] = {
    "llava-1.2.2": Recording(
        "806cfe03d841",
        {
            "forward.npz": (25, 228992),
            "lora_forward.npz": (2, 67201),
            "grads.json": (2, 26),
            "prompts.json": (2, 86),
            "preprocess.json": (2, 94706),
            "image_preprocess.npz": (3, 263424),
            "anyres.json": (1, 5),
            "generate.json": (6, 440),
            "train_log.json": (9, 95),
        },
    ),
    "llava-med-1.0": Recording(
        "b9a98a736d2e",
        {
            "forward.npz": (19, 198988),
            "prompts.json": (2, 48),
            "preprocess.json": (2, 25302),
            "image_preprocess.npz": (3, 94085),
            "image_keep_shapes.json": (2, 10),
            "generate.json": (7, 282),
            "train_log.json": (9, 77),
        },
    ),
    "llava-med-1.5-mistral": Recording(
        "d406e3fc7c3d",
        {
            "forward.npz": (25, 144804),
            "prompts.json": (3, 86),
            "image_preprocess.npz": (6, 169344),
            "generate.json": (9, 528),
            "questions.jsonl": (1, 7),
        },
    ),
    "llava-rad": Recording(
        "1fc44096cc57",
        {
            "forward.npz": (19, 164035),
            "lora_forward.npz": (2, 67201),
            "grads.json": (2, 26),
            "prompts.json": (2, 68),
            "preprocess.json": (2, 45966),
            "image_preprocess.npz": (1, 47040),
            "tower.npz": (2, 16160),
            "generate.json": (6, 160),
            "train_log.json": (9, 95),
        },
    ),
    "stllava-med": Recording(
        "9113c41f13de",
        {
            "forward.npz": (20, 179753),
            "prompts.json": (2, 68),
            "preprocess.json": (2, 55992),
            "cluster_projector.npz": (6, 17194),
            "dpo.json": (2, 20),
            "dpo.npz": (5, 40),
            "dpo_metrics.json": (3, 42),
            "vit_lora_note.json": (1, 48),
            "train_log.json": (6, 155),
        },
    ),
    "llava-med-eval": Recording("", {"expected_metrics.json": (3, 24)}),
}
"""Recorded folders by name."""


def known(oracle: Oracle) -> Recording | None:
    """Return the recording that a folder is, or is what is left of; None for a folder with other conversations."""
    text = (oracle.path / "README.md").read_text(encoding="utf-8") if oracle.has("README.md") else ""
    named = RECORDINGS.get(oracle.path.resolve().name)
    described = [recording for recording in RECORDINGS.values() if recording.commit and recording.commit in text]
    if oracle.has("data.json") and not {row_digest(row) for row in oracle.json("data.json")} <= ROW_DIGESTS:
        return None
    return described[0] if described else named


def row_digest(row: Any) -> str:
    """Return the start of the SHA-256 of a row."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def missing(recording: Recording | None, compared: Mapping[str, Sequence[Line]]) -> Iterator[Line]:
    """Yield a failed line for each file of which fewer quantities or values were compared than are recorded.

    Args:
        recording: the folder; None if it is unknown, then every file must give at least one line.
        compared: lines of each file.
    """
    floors = dict.fromkeys(compared, (1, 0)) if recording is None else recording.floors
    for name, (num_lines, num_values) in floors.items():
        lines = compared.get(name, ())
        if any(line.lacks_weights for line in lines):
            continue  # said in its line
        done = [line for line in lines if line.status != "skipped" or recording is None]
        values = sum(line.count for line in done)
        if len(done) < num_lines or values < num_values:
            note = f"compared {len(done)} quantities with {values} values, recorded are {num_lines} with {num_values}"
            yield Line(f"recorded numbers of {name}", None, "FAIL", note)
