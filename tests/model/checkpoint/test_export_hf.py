"""Exports load with transformers alone: equal ids, equal pixels, equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava.conversation import TEMPLATES
from llava.data.encode import encode_prompt
from llava.errors import CheckpointError
from llava.model.builder import LoadedModel
from llava.model.checkpoint.assemble import LoadOptions
from llava.model.checkpoint.export_hf import export_hf, hf_obstacles
from llava.model.checkpoint.formats import Checkpoint
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_adapter, save_model
from llava.model.checkpoint.tools.convert import convert_checkpoint
from llava.model.lora import add_lora, freeze_for
from llava.samples import Conversation, Turn
from tests.support.legacy_folders import write_lora
from tests.support.model_tools import batch, logits, shake, trained
from tests.support.tiny import tiny_image, tiny_llava

ASKED = 'What  is this?\nSay in "quotes" {it}.'
ANSWER, AGAIN = "Yes it is.", "And now?"


def talk() -> Conversation:
    return Conversation((Turn("human", f"<image>\n{ASKED}"), Turn("gpt", ANSWER), Turn("human", AGAIN)))


def messages() -> list[dict[str, Any]]:
    question = [{"type": "image"}, {"type": "text", "text": ASKED}]
    answer = [{"type": "text", "text": ANSWER}]
    again = [{"type": "text", "text": AGAIN}]
    turns = (("user", question), ("assistant", answer), ("user", again))
    return [{"role": role, "content": content} for role, content in turns]


def library_inputs(folder: Path, image: Image.Image) -> dict[str, torch.Tensor]:
    """Return the model inputs that plain transformers computes for the conversation."""
    processor: Any = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(messages(), add_generation_prompt=True)
    return dict(processor(images=[image], text=text, return_tensors="pt"))


def check(loaded: LoadedModel, folder: Path, image: Image.Image) -> None:
    """Compare ids, pixels and logits of the export with ours."""
    inputs = library_inputs(folder, image)
    ids = encode_prompt(talk(), loaded.processor, images=["image"]).input_ids
    assert inputs["input_ids"][0].tolist() == list(ids)
    pixels = loaded.processor.pixels([image])
    assert torch.equal(inputs["pixel_values"], pixels)
    library, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        theirs = library(**inputs).logits
        ours = loaded.model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2", "vit"])
def test_every_tower(tmp_path: Path, tower: str) -> None:
    loaded = tiny_llava(tower=tower, image_mode="pad", tie=tower == "vit")
    export_hf(loaded, tmp_path)
    check(loaded, tmp_path, tiny_image(3, 40).resize((40, 25)))
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("lm", ["mistral", "qwen2"])
def test_language_models_and_features(tmp_path: Path, lm: str, feature: str) -> None:
    loaded = tiny_llava(lm=lm, template="mistral_instruct", select_feature=feature, system="Be brief.")
    export_hf(loaded, tmp_path)
    check(loaded, tmp_path, tiny_image(3))


@pytest.mark.parametrize("template", [name for name, template in TEMPLATES.items() if not template.drops_questions])
def test_every_template(tmp_path: Path, template: str) -> None:
    """The chat template writes the same as our template, also with markers."""
    loaded = tiny_llava(template=template, use_im_start_end=template == "v0")
    export_hf(loaded, tmp_path)
    inputs = library_inputs(tmp_path, tiny_image(1))
    ids = encode_prompt(talk(), loaded.processor, images=["image"]).input_ids
    assert inputs["input_ids"][0].tolist() == list(ids)


@pytest.mark.parametrize(
    ("oracle", "folder"), [("llava-1.2.2", "out/stage2"), ("llava-med-1.5-mistral", "llava-med-mistral-tiny")]
)
def test_recorded_checkpoints(shared: Path, tmp_path: Path, oracle: str, folder: str) -> None:
    """Sentencepiece tokenizers give the same prefix marks and the same mark after an image."""
    root = shared / "oracles" / oracle
    loaded = load_checkpoint(root / folder, vision_tower=str(root / "vision_tower"))
    export_hf(loaded, tmp_path)
    with Image.open(root / "images" / "im1.png") as image:
        check(loaded, tmp_path, image.convert("RGB"))
    again = load_checkpoint(tmp_path)
    before = loaded.model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.model.state_dict().items())
    text = " two  spaces </s>and <unk>\nmore"
    assert again.processor.text(text).ids == loaded.processor.text(text).ids
    assert again.processor.template.name == loaded.processor.template.name
    assert again.processor.image_mode == loaded.processor.image_mode == "pad"


def test_a_linear_projector_is_exported_with_a_second_layer_that_changes_nothing(tmp_path: Path) -> None:
    loaded = tiny_llava(projector="linear", image_mode="pad")
    export_hf(loaded, tmp_path)
    check(loaded, tmp_path, tiny_image(3, 40))
    features = torch.randn(2, 4, 32)
    library = LlavaForConditionalGeneration.from_pretrained(tmp_path).model.multi_modal_projector
    assert torch.equal(library(features), loaded.model.model.multi_modal_projector(features))
    again = load_checkpoint(tmp_path)
    assert again.model.config.projector_type == "linear"
    ours, theirs = (model.model.state_dict() for model in (loaded, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("family", ["qwen2.5", "llama3"])
def test_a_chat_template_is_exported(tmp_path: Path, family: str, system: str | None) -> None:
    loaded = tiny_llava(template=family, image_mode="pad", system=system)
    export_hf(loaded, tmp_path)
    check(loaded, tmp_path, tiny_image(3, 40))
    assert load_checkpoint(tmp_path).processor.template.name == family


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"projector": "cluster"}, "cluster"),
        ({"build_size": 56}, "input size"),
        ({"projector": "identity", "build_size": 56}, "identity.*input size"),
    ],
)
def test_errors_name_the_reason_and_nothing_is_written(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    loaded = tiny_llava(**options)
    assert hf_obstacles(loaded)
    with pytest.raises(CheckpointError, match=reason) as caught:
        export_hf(loaded, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_our_adapter_for_plain_peft(tmp_path: Path, built: LoadedModel) -> None:
    network = add_lora(built, r=4, alpha=8)
    freeze_for(network, has_adapter=True)
    shake(trained(network))
    network.eval()
    save_adapter(network, built.processor, tmp_path / "ours", origin=built.origin)
    convert_checkpoint(tmp_path / "ours", tmp_path / "out", "peft")
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out" / "base")
    inputs = {name: tensor for name, tensor in batch(built).items() if name != "labels"}
    with torch.no_grad():
        plain = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()(**inputs).logits
    torch.testing.assert_close(adapted, logits(built), rtol=0, atol=1e-5)
    assert (adapted - plain).abs().max() > 0.01
    convert_checkpoint(tmp_path / "ours", tmp_path / "merged", "hf")
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, logits(built), rtol=0, atol=1e-5)


def test_legacy_adapter_for_plain_peft(tmp_path: Path) -> None:
    source = write_lora(tmp_path)
    options = LoadOptions(base=str(tmp_path / "lm"))
    convert_checkpoint(source, tmp_path / "out", "peft", options)
    loaded = load_checkpoint(source, base=str(tmp_path / "lm"), merge=False)
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out" / "base")
    inputs = {name: tensor for name, tensor in batch(loaded).items() if name != "labels"}
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()(**inputs).logits
    torch.testing.assert_close(adapted, logits(loaded), rtol=0, atol=1e-5)


SWITCHED_OFF = [
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_resize": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5},
]


@pytest.mark.parametrize("changes", SWITCHED_OFF)
def test_preprocessing_that_is_switched_off_stays_off(
    tmp_path: Path, tiny: LoadedModel, changes: dict[str, Any]
) -> None:
    export_hf(tiny, tmp_path / "hf")
    for name in ("preprocessor_config.json", "processor_config.json"):
        content = json.loads((tmp_path / "hf" / name).read_text())
        (content if name.startswith("pre") else content["image_processor"]).update(changes)
        (tmp_path / "hf" / name).write_text(json.dumps(content))
    loaded = load_checkpoint(tmp_path / "hf")
    check(loaded, tmp_path / "hf", tiny_image(3, 40))
    export_hf(loaded, tmp_path / "again")
    check(loaded, tmp_path / "again", tiny_image(3, 40))


def test_images_that_would_keep_their_sizes_are_rejected(tmp_path: Path, tiny: LoadedModel) -> None:
    export_hf(tiny, tmp_path)
    for file in (tmp_path / "processor_config.json", tmp_path / "preprocessor_config.json"):
        off = '"do_resize": false, "do_center_crop": false,'
        text = file.read_text().replace('"do_resize": true,', off).replace('"do_center_crop": true,', "")
        file.write_text(text)
    with pytest.raises(CheckpointError, match="do_resize and do_center_crop are both false"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("chat_template", "name"),
    [
        ("{{ 'USER: ' }}{{ 'ASSISTANT:' }}", "vicuna_v1"),
        ("<|im_start|>user", "chatml_direct"),
        ("[INST] <<SYS>>", "llava_llama_2"),
        ("Q: A:", "vicuna_v1"),
    ],
)
def test_an_unknown_chat_template_is_guessed_with_a_warning(
    tmp_path: Path, tiny: LoadedModel, caplog: pytest.LogCaptureFixture, chat_template: str, name: str
) -> None:
    export_hf(tiny, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["llava_source"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(chat_template)
    assert load_checkpoint(tmp_path).processor.template.name == name
    assert caplog.text.count("using template vicuna_v1. To use another one, pass --template") == (
        chat_template == "Q: A:"
    )


def test_folders_that_transformers_saved(tmp_path: Path, tiny: LoadedModel) -> None:
    """Folders of transformers 5 have its own names and none of our extra keys."""
    export_hf(tiny, tmp_path / "export")
    library = LlavaForConditionalGeneration.from_pretrained(tmp_path / "export")
    del library.config.llava_source
    library.save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(tmp_path / "export").save_pretrained(tmp_path / "saved")
    assert Checkpoint.open(tmp_path / "saved").kind == "hf_llava"
    again = load_checkpoint(tmp_path / "saved")
    assert torch.equal(logits(again), logits(tiny))
    assert again.processor.template.name == "vicuna_v1"
    save_model(again.model, again.processor, tmp_path / "ours")
    assert torch.equal(logits(load_checkpoint(tmp_path / "ours")), logits(tiny))
