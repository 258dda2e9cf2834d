"""Fingerprints of answer files: the settings they cover, and the refusal of other settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.eval import answering, model_vqa_med
from llava.generation import fingerprint
from tests.support.eval_fakes import FakeEngine, row, rows_of, write_vqa


def make_model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "llava_processor.json").write_text('{"template": "vicuna_v1", "system": null}')
    return folder


def make_adapter(folder: Path, base: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    (folder / "adapter_model.safetensors").write_bytes(b"adapter")
    (folder / "llava_origin.json").write_text(json.dumps({"base": str(base)}))
    return folder


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    questions, images = write_vqa(tmp_path, [row(index, "a.png", f"Q{index}?", "yes") for index in range(3)])
    monkeypatch.setattr(answering, "engine_of", lambda args: FakeEngine())
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, tmp_path / "copy")
    model = make_model(tmp_path / "first" / "model")
    words = ["--question-file", str(questions), "--image-folder", str(images), "--answers-file"]
    words += [str(tmp_path / "answers.jsonl"), "--model", str(model)]
    model_vqa_med.main(words)
    return words


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--temperature", "0.5"], r"sampling\.temperature"),
        (["--max-new-tokens", "7"], r"sampling\.max_new_tokens"),
        (["--conv-mode", "plain"], "template"),
        (["--bits", "8"], "bits"),
        (["--dtype", "float16"], "dtype"),
        (["--answer-prompter"], "answer prompter"),
        (["--image-folder", "copy"], "image folder"),
        (["--model-base", "owner/another"], "weights"),
    ],
)
def test_answers_with_other_settings_are_refused(words: list[str], tmp_path: Path, more: list[str], named: str) -> None:
    before = rows_of(tmp_path / "answers.jsonl")
    with pytest.raises(DataError, match=rf"answers with other {named}.*--resume False") as caught:
        model_vqa_med.main([*words, *more])
    assert "\n" not in str(caught.value)
    assert rows_of(tmp_path / "answers.jsonl") == before
    with pytest.raises(DataError, match=named):  # a refused run does not change the stored settings
        model_vqa_med.main([*words, *more])
    model_vqa_med.main([*words, *more, "--resume", "False"])
    model_vqa_med.main([*words, *more])
    with pytest.raises(DataError, match=named):
        model_vqa_med.main(words)


def test_another_model_of_the_same_name_is_refused(words: list[str], tmp_path: Path) -> None:
    twin = make_model(tmp_path / "second" / "model", b"other")
    with pytest.raises(DataError, match="answers with other weights;"):
        model_vqa_med.main([*words[:-1], str(twin)])
    make_model(tmp_path / "second" / "model")
    model_vqa_med.main([*words[:-1], str(twin)])


def test_system_text_and_image_of_a_question(words: list[str], tmp_path: Path) -> None:
    processor = tmp_path / "first" / "model" / "llava_processor.json"
    before = processor.read_text()
    processor.write_text('{"template": "vicuna_v1", "system": "Be brief."}')
    with pytest.raises(DataError, match="system text"):
        model_vqa_med.main(words)
    processor.write_text(before)
    write_vqa(tmp_path, [row(index, "b.png", f"Q{index}?", "yes") for index in range(3)])
    with pytest.raises(DataError, match="answers with other questions"):
        model_vqa_med.main(words)


def test_answers_without_settings_are_refused_and_paths_are_not_stored(words: list[str], tmp_path: Path) -> None:
    path = fingerprint.sidecar_path(tmp_path / "answers.jsonl")
    assert str(tmp_path) not in path.read_text() and len(json.loads(path.read_text())["fingerprint"]) == 64
    path.unlink()
    with pytest.raises(DataError, match=r"settings file answers\.jsonl\.settings\.json is missing; .* --resume False"):
        model_vqa_med.main(words)
    path.write_text("[]")
    with pytest.raises(DataError, match="not a settings file of answers"):
        model_vqa_med.main(words)


def test_hash_of_an_adapter_depends_on_its_base(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    first = fingerprint.checkpoint_hash(str(adapter))
    assert fingerprint.checkpoint_hash(str(adapter)) == first
    make_model(base, b"other weights")
    assert fingerprint.checkpoint_hash(str(adapter)) != first
    make_model(base)
    assert fingerprint.checkpoint_hash(str(adapter)) == first
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    assert fingerprint.checkpoint_hash(str(adapter)) != first
    base.rename(tmp_path / "moved")
    assert fingerprint.checkpoint_hash(str(adapter), str(tmp_path / "moved")) != first


def test_weights_are_read_once_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = make_model(tmp_path / "model"), []
    real = fingerprint.weights_sha256
    monkeypatch.setattr(fingerprint, "weights_sha256", lambda path: read.append(path) or real(path))
    first = fingerprint.weights_hash(model)
    assert fingerprint.weights_hash(str(model)) == first == real(model) and len(read) == 1
    make_model(model, b"others!!")
    assert fingerprint.weights_hash(model) != first and len(read) == 2
    assert fingerprint.weights_hash("owner/name") is None
