"""Our trainer repeats recorded training runs: the loss of every micro-batch and the last weights."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from benchmarks.fidelity.grown_vocabulary import HEAD, Start
from benchmarks.fidelity.published import counted_v0
from benchmarks.fidelity.recorded_weights import current_name
from benchmarks.fidelity.shifted_images import EMPTY, shifted
from benchmarks.fidelity.trajectories import LOG_FILE, Replay, replay, runs, system_text, tolerances_of
from llava.data.encode import Encoded, encode
from llava.model.builder import build_model
from llava.model.checkpoint.load_parts import read_tensors
from llava.samples import from_row, with_placeholders

RUNS = [
    ("llava-1.2.2", "stage1_projector"),
    ("llava-1.2.2", "stage2_full"),
    ("llava-1.2.2", "stage2_lora"),
    ("llava-med-1.0", "stage1_projector_v0"),
    ("llava-med-1.0", "stage2_full_v0"),
    ("llava-med-1.0", "stage2_full_v1"),
    ("llava-rad", "stage1_projector"),
    ("llava-rad", "stage2_full"),
    ("llava-rad", "stage2_lora"),
    ("stllava-med", "full_sq0"),
    ("stllava-med", "lora_vitlora_sq05"),
]

V1_SQ_SYSTEM = "d6856b8f1a91aa2ef01877d2d089a64846392ec9a9c954518335755ebbc71dc5"


@cache
def replayed(folder: Path, run: str) -> Replay:
    """Return the replay of a run, made once for all tests."""
    with TemporaryDirectory() as scratch:
        return replay(folder, run, Path(scratch))


@pytest.mark.parametrize(("folder", "run"), RUNS)
def test_losses_and_last_weights(shared: Path, folder: str, run: str) -> None:
    found = replayed(shared / "oracles" / folder, run)
    assert len(found.losses) == len(found.recorded)
    loss_tolerance, largest_share = tolerances_of(run)
    assert found.loss_difference <= loss_tolerance
    assert not {name: share for name, share in found.shares.items() if not share <= largest_share}  # not even NaN
    log = json.loads((shared / "oracles" / folder / LOG_FILE).read_text())[run]
    assert len(found.weights) == len(log["trainable"])  # every weight that the original trained was compared


def test_every_recorded_run_is_replayed(shared: Path) -> None:
    folders = [folder for folder in sorted((shared / "oracles").iterdir()) if (folder / LOG_FILE).is_file()]
    assert [(folder.name, run) for folder in folders for run in runs(folder)] == sorted(RUNS)


def test_the_default_is_another_training(shared: Path, tmp_path: Path) -> None:
    """The mean over all tokens of a step is not the mean of the means of its micro-batches."""
    found = replay(shared / "oracles" / "llava-1.2.2", "stage2_full", tmp_path, loss_normalization="tokens")
    assert found.projector_share > 100


def test_the_row_that_had_to_be_found_is_the_one_of_stage_one(shared: Path) -> None:
    """Both recorded runs of version v0 began with the same random row; stage 1 saved it untouched."""
    folder = shared / "oracles" / "llava-med-1.0"
    saved = read_tensors(folder / "out" / "stage1" / "pytorch_model.bin")[HEAD]
    start = Start(folder / "base_llm", folder / "out" / "stage2_v0")
    found = replayed(folder, "stage2_full_v0")
    assert found.head_row is not None
    bound = found.bounds[current_name(HEAD)][start.patch]
    assert ((start.head_row - saved[start.patch]).abs() > bound).all()
    assert ((found.head_row - saved[start.patch]).abs() <= bound).all()


def test_labels_by_counting(shared: Path, tmp_path: Path) -> None:
    folder = shared / "oracles" / "llava-med-1.0"
    lm = Start(folder / "base_llm", folder / "out" / "stage2_v0").write(tmp_path / "lm")
    options = {"use_im_start_end": True, "use_im_patch_token": True, "placement": "as_written"}
    processor = build_model(str(lm), str(folder / "vision_tower"), template="default", **options).processor
    processor.strip_around_images = True
    patch = processor.tokenizer.convert_tokens_to_ids("<im_patch>")
    recorded = json.loads((folder / "preprocess.json").read_text())["version=v0,template=default"]
    for row in json.loads((folder / "data.json").read_text()):
        if row["id"] == "gpt_first":
            continue  # `from_row` leaves out an answer before the first question
        sample = from_row(row)
        conversation = with_placeholders(sample)
        encoded = encode(conversation, processor, images=["key"] * len(sample.images), max_length=320)
        ids = [patch if token == processor.image_token_id else token for token in encoded.input_ids]
        assert ids == recorded[row["id"]]["input_ids"], row["id"]
        assert counted_v0(encoded.input_ids, conversation, processor) == recorded[row["id"]]["labels"], row["id"]


def test_images_move_up_past_text_only_rows() -> None:
    def row(*images: str) -> Encoded:
        return Encoded(input_ids=(1,), labels=(1,), turns=(0,), images=images)

    batch = [row("a"), row(), row("b"), row("c"), row()]
    assert [each.images for each in shifted(batch)] == [("a",), (), (EMPTY,), ("b",), ()]


def test_the_recorded_system_text_is_the_published_one(shared: Path) -> None:
    folder = shared / "oracles" / "stllava-med"
    ids = json.loads((folder / LOG_FILE).read_text())["full_sq0"]["first_input_ids"][0][0]
    assert hashlib.sha256(system_text(ids, folder / "base_llm").encode()).hexdigest() == V1_SQ_SYSTEM
