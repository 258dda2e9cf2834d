"""Every quantity of every oracle folder that is changed, made NaN or removed fails the comparison.

One change of each kind on the quick files; `python -m tests.support.corruptions` tries more, on all files.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fidelity.folder import Oracle
from tests.support.corruptions import corruptions, lines_after

QUICK = (
    "anyres.json", "cluster_projector.npz", "forward.npz", "grads.json", "image_keep_shapes.json",
    "image_preprocess.npz", "lora_forward.npz", "preprocess.json", "prompts.json", "tower.npz", "vit_lora_note.json",
)  # fmt: skip
FOLDERS = ("llava-1.2.2", "llava-med-1.0", "llava-med-1.5-mistral", "llava-rad", "stllava-med")


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("check", QUICK)
def test_every_kind_of_corruption_is_noticed(shared: Path, folder: str, check: str) -> None:
    oracle = Oracle(shared / "oracles" / folder)
    if not oracle.has(check):
        return
    tried = corruptions(oracle, check, per_kind=1)
    missed = [c for c in tried if not any(line.status == "FAIL" for line in lines_after(oracle, check, c))]
    assert len(tried) >= 2 and not missed, [(c.kind, c.where) for c in missed]
