"""Initial model of a run, and options that a checkpoint determines."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from llava.errors import CheckpointError, ConfigError, LlavaError
from llava.imaging.decode import load_image
from llava.model.checkpoint.export_hf import export_hf
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_model
from llava.train.run import run_sft
from tests.support.legacy_folders import write_legacy, write_lora
from tests.support.runs import arguments, train, write_parts, write_uneven
from tests.support.tiny import tiny_llava, write_tiny_tower


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts, and `ours`: a model of this package without markers."""
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    loaded = tiny_llava("linear")
    save_model(loaded.model, loaded.processor, folder / "ours", origin=loaded.origin)
    write_tiny_tower(folder / "other_tower", "dinov2")
    return folder


def refused(parts: Path, tmp_path: Path, error: type[LlavaError], match: str, **changed: object) -> None:
    with pytest.raises(error, match=match):
        train(arguments(parts, tmp_path / "run", **changed))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("*.safetensors"))


def test_what_cannot_start_is_refused(parts: Path, tmp_path: Path) -> None:
    refused(parts, tmp_path, ConfigError, "Pass --vision-tower", vision_tower=None)
    refused(parts, tmp_path, ConfigError, "no such file", data_path=tmp_path / "none.json")
    refused(parts, tmp_path, ConfigError, "no such file", data_path=tmp_path)
    refused(parts, tmp_path, CheckpointError, "no such folder", vision_tower=tmp_path / "none")
    refused(parts, tmp_path, ConfigError, "select_layer is -9", mm_vision_select_layer=-9)
    refused(parts, tmp_path, CheckpointError, "projector", pretrain_mm_mlp_adapter=parts / "lm")
    both = {"freeze_backbone": True, "freeze_mm_mlp_adapter": True}
    refused(parts, tmp_path, ConfigError, "nothing would train", **both)
    contradiction = {"image_grouping": "on", "group_by_length": True}
    refused(parts, tmp_path, ConfigError, "contradict", **contradiction)


def test_markers_cannot_be_added_later(parts: Path, tmp_path: Path) -> None:
    ours = {"model_name_or_path": parts / "ours", "mm_use_im_start_end": True}
    refused(parts, tmp_path, ConfigError, "without marker tokens", **ours)


def test_options_that_a_checkpoint_decided_are_named(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = {"model_name_or_path": parts / "ours", "vision_tower": parts / "other_tower"}
    with caplog.at_level(logging.WARNING):
        options = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "cls_patch", "image_size": 56}
        train(arguments(parts, tmp_path, **ours, **options))
    ignored = [record.message.split()[0] for record in caplog.records if "is ignored: " in record.message]
    assert ignored == ["--vision-tower", "--mm-projector-type", "--mm-vision-select-feature", "--image-size"]


def test_a_tower_beside_a_checkpoint_that_holds_its_own(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Published commands always name a vision tower; a model of transformers keeps its own."""
    export_hf(tiny_llava(), tmp_path / "hf")
    with caplog.at_level(logging.WARNING):
        options = {"model_name_or_path": tmp_path / "hf", "vision_tower": parts / "other_tower"}
        train(arguments(parts, tmp_path / "run", **options))
    assert any(record.message.startswith("--vision-tower is ignored: ") for record in caplog.records)
    assert load_checkpoint(tmp_path / "run").model.config.vision_config.model_type == "clip_vision_model"


@pytest.mark.parametrize("mode", [None, "pad"])
def test_the_image_mode_of_a_checkpoint_stays_unless_another_is_asked_for(
    parts: Path, tmp_path: Path, mode: str | None
) -> None:
    train(arguments(parts, tmp_path, model_name_or_path=parts / "ours", vision_tower=None, image_aspect_ratio=mode))
    again = load_checkpoint(tmp_path)
    assert again.processor.image_mode == again.model.config.image_aspect_ratio == (mode or "square")


def test_a_new_projector_is_calibrated_on_the_images(parts: Path, tmp_path: Path) -> None:
    stage1 = {"tune_mm_mlp_adapter": True, "mm_projector_type": "mlp2x_gelu", "learning_rate": 0.0}
    train(arguments(parts, tmp_path, **stage1, calibrate_mm_projector=True))
    loaded = load_checkpoint(tmp_path)
    images = [load_image(path) for path in sorted((parts / "vqa" / "images").iterdir())]
    outputs = loaded.model.get_image_features(loaded.processor.pixels(images), return_dict=True).pooler_output
    found = torch.cat(list(outputs))
    words = loaded.model.get_input_embeddings().weight
    torch.testing.assert_close(found.mean(dim=0), words.mean(dim=0), rtol=0, atol=1e-4)
    text_only = parts / "text.json"
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]
    text_only.write_text(json.dumps([{"id": "0", "conversations": turns}]))
    refused(parts, tmp_path, ConfigError, "no row has one", data_path=text_only, calibrate_mm_projector=True)


def test_template_and_system_text_are_replaced_and_saved(parts: Path, tmp_path: Path) -> None:
    text = tmp_path / "system.txt"
    text.write_text("You read images.\n")
    options = {"model_name_or_path": parts / "ours", "version": "v1", "system_file": text, "vision_tower": None}
    train(arguments(parts, tmp_path / "run", **options))
    processor = load_checkpoint(tmp_path / "run").processor
    assert processor.template.name == "v1" and processor.template.system == "You read images."


def test_rows_are_grouped_by_image_where_it_pays(parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uneven = {"data_path": write_uneven(tmp_path), "image_folder": tmp_path / "images"}
    with caplog.at_level(logging.INFO):
        run_sft(arguments(parts, tmp_path / "shared", per_device_train_batch_size=16), image_grouping="auto")
        run_sft(arguments(parts, tmp_path / "few", per_device_train_batch_size=8), image_grouping="auto")
        run_sft(arguments(parts, tmp_path / "off", image_grouping="off"), image_grouping="auto")
        run_sft(arguments(parts, tmp_path / "length", group_by_length=True), image_grouping="auto")
        run_sft(arguments(parts, tmp_path / "kind", **uneven, group_by_modality_length=True), image_grouping="auto")
    found = [
        record.message.split("image grouping ")[1][:3] for record in caplog.records if "grouping" in record.message
    ]
    assert [word.strip() for word in found] == ["on", "off", "off", "off", "off"]


@pytest.mark.parametrize(("kind", "trained"), [("placeholder", "model"), ("patch_token", "model"), ("lora", "adapter")])
def test_training_goes_on_from_published_layouts(parts: Path, tmp_path: Path, kind: str, trained: str) -> None:
    """Training continues from published checkpoints with their own vision tower and projector."""
    folder = write_lora(tmp_path) if kind == "lora" else write_legacy(tmp_path, style=kind)
    options = {"lora_enable": True} if trained == "adapter" else {}
    start = load_checkpoint(folder, base=str(tmp_path / "lm") if kind == "lora" else None)
    if kind == "lora":
        (folder / "adapter_config.json").write_text(
            json.dumps(
                json.loads((folder / "adapter_config.json").read_text())
                | {"base_model_name_or_path": str(tmp_path / "lm")}
            )
        )
    train(arguments(parts, tmp_path / "run", model_name_or_path=folder, vision_tower=None, learning_rate=0, **options))
    end = load_checkpoint(tmp_path / "run")
    assert end.processor.template.name == start.processor.template.name
    weights = end.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in start.model.state_dict().items())


def add_secret(settings: Path, name: str) -> None:
    """Turn a file into a link to a copy elsewhere that holds a secret."""
    (settings.parent.parent / "private").mkdir(exist_ok=True)
    target = settings.parent.parent / "private" / name
    content = json.loads(settings.read_text()) if settings.is_file() else {}
    target.write_text(json.dumps({**content, "token": "of a machine"}))
    settings.unlink(missing_ok=True)
    settings.symlink_to(target)


@pytest.mark.parametrize(
    "linked",
    [
        "lm/config.json",
        "lm/tokenizer_config.json",
        "lm/generation_config.json",
        "lm/special_tokens_map.json",
        "tower/config.json",
        "tower/preprocessor_config.json",
        "ours/llava_processor.json",
        "ours/config.json",
        "ours/notes.txt",
    ],
)
def test_a_link_out_of_a_folder_that_training_reads_is_refused(tmp_path: Path, linked: str) -> None:
    parts = write_parts(tmp_path / "parts")
    loaded = tiny_llava("linear")
    save_model(loaded.model, loaded.processor, parts / "ours", origin=loaded.origin)
    add_secret(parts / linked, "secret.json")
    start = {"model_name_or_path": parts / "ours"} if linked.startswith("ours") else {}
    refused(parts, tmp_path, CheckpointError, r"is a link to .*private/secret\.json, outside the checkpoint", **start)
    assert not (tmp_path / "run").exists() or not any(
        b"of a machine" in file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()
    )


@pytest.mark.parametrize("kind", [{"lora_enable": True, "lora_r": 2}, {"tune_mm_mlp_adapter": True}])
def test_a_link_out_of_what_a_part_builds_on_is_refused(tmp_path: Path, kind: dict[str, object]) -> None:
    parts = write_parts(tmp_path / "parts")
    train(arguments(parts, tmp_path / "part", max_steps=1, **kind))
    add_secret(parts / "lm" / "generation_config.json", "secret.json")
    refused(
        parts, tmp_path, CheckpointError, r"lm/generation_config\.json is a link", model_name_or_path=tmp_path / "part"
    )


@pytest.mark.parametrize("relative", [False, True])
def test_a_link_out_of_the_base_of_a_published_adapter_is_refused(tmp_path: Path, relative: bool) -> None:
    parts, folder = write_parts(tmp_path / "parts"), write_lora(tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "../lm" if relative else str(tmp_path / "lm")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    add_secret(tmp_path / "lm" / "generation_config.json", "secret.json")
    refused(parts, tmp_path, CheckpointError, r"lm/generation_config\.json is a link", model_name_or_path=folder)


@pytest.mark.parametrize("linked", ["lm/model.safetensors", "tower/model.safetensors"])
def test_links_to_weights_and_of_whole_folders_are_trained_on(tmp_path: Path, linked: str) -> None:
    parts = write_parts(tmp_path / "parts")
    (parts / linked).rename(tmp_path / "weights.safetensors")
    (parts / linked).symlink_to(tmp_path / "weights.safetensors")
    (parts / "lm").rename(tmp_path / "real")
    (parts / "lm").symlink_to(tmp_path / "real", target_is_directory=True)
    train(arguments(parts, tmp_path / "run", max_steps=1))
    assert (tmp_path / "run" / "model.safetensors").is_file()


CRAFTED: list[tuple[str, list[str], object]] = [
    ("tower/preprocessor_config.json", ["crop_size"], {"height": {}, "width": 28}),
    ("tower/preprocessor_config.json", ["crop_size"], {"height": 28, "width": [[1]]}),
    ("tower/preprocessor_config.json", ["crop_size"], -1),
    ("tower/preprocessor_config.json", ["image_std"], [0, 0, 0]),
    ("tower/preprocessor_config.json", ["resample"], None),
    ("tower/config.json", ["num_attention_heads"], 3),
    ("tower/config.json", ["model_type"], [[1]]),
    ("lm/config.json", ["attention_dropout"], 1.5),
    ("lm/config.json", ["num_attention_heads"], "4"),
    ("lm/tokenizer.json", ["pre_tokenizer"], []),
    ("lm/tokenizer.json", ["model"], 7),
]


@pytest.mark.parametrize(("file", "place", "value"), CRAFTED)
def test_crafted_parts_of_a_new_model_are_one_line(tmp_path: Path, file: str, place: list[str], value: object) -> None:
    parts = write_parts(tmp_path / "parts")
    content = json.loads((parts / file).read_text())
    content[place[0]] = value
    (parts / file).write_text(json.dumps(content))
    with pytest.raises(LlavaError) as caught:
        train(arguments(parts, tmp_path / "run"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert not (tmp_path / "run" / "model.safetensors").exists()
