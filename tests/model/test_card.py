"""The card beside saved weights: parts, licences, data hashes; and whose text it is."""

from __future__ import annotations

import json
from pathlib import Path

from llava.model.building import Loaded
from llava.model.card import MARK, NOT_STATED, licence_of
from llava.model.checkpoint import save_adapter, save_model, save_projector
from llava.model.lora import add_lora


def test_parts_and_their_licences(tmp_path: Path, built: Loaded) -> None:
    parts = tmp_path / "parts"
    (parts / "lm" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (parts / "tower" / "LICENSE").write_text("MIT License\n\nCopyright\n")
    save_model(built.model, built.processor, tmp_path / "model", origin=built.origin)
    text = (tmp_path / "model" / "README.md").read_text()
    assert f"language model: `{parts / 'lm'}`; licence: apache-2.0" in text
    assert f"vision tower: `{parts / 'tower'}`; licence: LICENSE in its folder (MIT License)" in text
    assert text.startswith("---\n")
    assert "no training run wrote this folder" in text
    save_model(built.model, built.processor, tmp_path / "second", origin={"base": str(tmp_path / "model")})
    second = (tmp_path / "second" / "README.md").read_text()
    assert f"base: `{tmp_path / 'model'}`" in second
    assert "licence: apache-2.0" in second


def test_data_hashes_of_the_run_and_of_its_checkpoints(tmp_path: Path, built: Loaded) -> None:
    run = tmp_path / "run"
    run.mkdir()
    facts = {"data_path": "x/train.json", "data_sha256": "d" * 64, "model_sha256": "m" * 64, "seed": 7, "command": "go"}
    (run / "provenance.json").write_text(json.dumps(facts))
    save_projector(built.model, built.processor, run, origin=built.origin)
    save_projector(built.model, built.processor, run / "checkpoint-5", origin=built.origin)
    for folder in (run, run / "checkpoint-5"):
        text = (folder / "README.md").read_text()
        assert f"training data `train.json`: sha256 `{'d' * 64}`" in text
        assert f"weights at the start: sha256 `{'m' * 64}`" in text
        assert "seed 7" in text


def test_a_card_of_ones_own_stays(tmp_path: Path, built: Loaded) -> None:
    network = add_lora(built, r=2)
    save_adapter(network, built.processor, tmp_path / "adapter", origin=built.origin)
    card = tmp_path / "adapter" / "README.md"
    assert "a LoRA adapter" in card.read_text()
    card.write_text(card.read_text().replace(MARK + "\n", "") + "My own words.\n")
    save_adapter(network, built.processor, tmp_path / "adapter", origin=built.origin)
    assert card.read_text().endswith("My own words.\n")


def test_licences_that_are_not_stated(tmp_path: Path) -> None:
    assert licence_of(str(tmp_path)) == NOT_STATED
    assert licence_of("somebody/unknown") == NOT_STATED
    assert licence_of("lmsys/vicuna-7b-v1.5") == "Llama 2 Community License"
