"""The model card of saved weights: parts, licenses, data hashes; and a card of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.model.builder import LoadedModel
from llava.model.checkpoint.model_card import MARK, NOT_STATED, license_of, model_parts, public_command, public_name
from llava.model.checkpoint.save import save_adapter, save_model, save_projector
from llava.model.lora import add_lora


def test_parts_and_their_licenses(tmp_path: Path, built: LoadedModel) -> None:
    folder = tmp_path / "parts"
    (folder / "lm" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (folder / "tower" / "LICENSE").write_text("MIT License\n\nCopyright\n")
    save_model(built.model, built.processor, tmp_path / "model", origin=built.origin)
    text = (tmp_path / "model" / "README.md").read_text()
    assert "language model: `lm`; license: apache-2.0" in text
    assert "vision tower: `tower`; license: LICENSE in its folder (MIT License)" in text
    assert text.startswith("---\n")
    assert "no training run wrote this folder" in text
    save_model(built.model, built.processor, tmp_path / "second", origin={"base": str(tmp_path / "model")})
    second = (tmp_path / "second" / "README.md").read_text()
    assert "base: `model`" in second
    assert str(tmp_path) not in text + second
    assert "license: apache-2.0" in second


def test_data_hashes_of_the_run_and_of_its_checkpoints(tmp_path: Path, built: LoadedModel) -> None:
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


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python train.py --data_path /hospital/ward 3/train.json", None),
        ("llava train --data /srv/clinic/a.json --lm lmsys/vicuna", "llava train --data a.json --lm lmsys/vicuna"),
        ("llava train --data=/srv/a.json,/srv/b.json", "llava train --data=a.json,b.json"),
        ("llava train '/My Hospital/x y.json' ~/runs", "llava train 'x y.json' runs"),
        ("llava train --data file:///srv/clinic/a.json", "llava train --data file://a.json"),
        ("llava train --base http://localhost:8000/v1 runs/first", None),
        ('train \'{"a": "/srv/clinic/a.json"}\'', 'train \'{"a": "a.json"}\''),
    ],
)
def test_paths_of_the_machine_are_not_in_the_command(command: str, expected: str | None) -> None:
    found = public_command(command)
    assert expected is None or found == expected
    assert not any(word in found for word in ("hospital", "srv", "clinic", "My Hospital", "~"))
    assert "http" not in command or found == command


def test_names_of_parts() -> None:
    names = {"lmsys/vicuna-7b-v1.5": "lmsys/vicuna-7b-v1.5", "/srv/clinic/lm": "lm", "~/lm": "lm", "../a/lm": "lm"}
    assert {name: public_name(name) for name in names} == names


def test_bases_that_name_each_other(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).mkdir()
        (tmp_path / one / "llava_origin.json").write_text(json.dumps({"base": str(tmp_path / other)}))
    found = [part.name for part in model_parts({"base": str(tmp_path / "a")})]
    assert found == ["a", "b", "a"]


def test_a_card_of_the_users_own_is_kept(tmp_path: Path, built: LoadedModel) -> None:
    network = add_lora(built, r=2)
    save_adapter(network, built.processor, tmp_path / "adapter", origin=built.origin)
    card = tmp_path / "adapter" / "README.md"
    assert "a LoRA adapter" in card.read_text()
    card.write_text(card.read_text().replace(MARK + "\n", "") + "My own words.\n")
    save_adapter(network, built.processor, tmp_path / "adapter", origin=built.origin)
    assert card.read_text().endswith("My own words.\n")


def test_licenses_that_are_not_stated(tmp_path: Path) -> None:
    assert license_of(str(tmp_path)) == NOT_STATED
    assert license_of("somebody/unknown") == NOT_STATED
    assert license_of("lmsys/vicuna-7b-v1.5") == "Llama 2 Community License"
