from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from llava.constants import PROCESSOR_FILE
from llava.data.encode import encode
from llava.errors import CheckpointError, ConfigError
from llava.imaging.dicom.policy import DicomPolicy
from llava.model.builder import LoadedModel
from llava.processing import LlavaMedProcessor
from tests.support.text_tools import KINDS, byte_level, llama_like, make_processor, talk


def clip(size: int = 28) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def with_images(mode: str = "square") -> LlavaMedProcessor:
    return LlavaMedProcessor(llama_like(), clip(), template="v1", image_mode=mode, num_image_tokens=4)


@pytest.mark.parametrize("mode", ["square", "pad", "resize"])
def test_pixels(mode: str) -> None:
    left_red = Image.new("RGB", (60, 30), "black")
    left_red.paste("red", (0, 0, 20, 30))
    pixels = with_images(mode).pixels([left_red, Image.new("L", (5, 9))])
    assert (pixels.shape, pixels.dtype) == ((2, 3, 28, 28), torch.float32)
    reds = (pixels[0, 0, 14] > 1.0).sum().item()
    assert reds in {"square": range(4, 6), "pad": range(8, 11), "resize": range(8, 11)}[mode]


def test_no_images_give_an_empty_batch() -> None:
    assert with_images().pixels([]).shape == (0, 3, 28, 28)


def test_fingerprint_changes_with_every_constant() -> None:
    same = [with_images().image_fingerprint for _ in range(2)]
    assert same[0] == same[1]
    other = LlavaMedProcessor(llama_like(), clip(14), template="v1", num_image_tokens=4)
    assert len({same[0], with_images("pad").image_fingerprint, other.image_fingerprint}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_processor_is_the_same(tmp_path: Path, kind: str) -> None:
    tokenizer, mark = KINDS[kind]()
    processor = LlavaMedProcessor(
        tokenizer,
        clip(),
        template="v1",
        image_mode="pad",
        num_image_tokens=4,
        placement="as_written",
        system="Be kurz ≥.",
        prefix_mark=mark,
    )
    processor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob(".processor-*"))
    loaded = LlavaMedProcessor.from_pretrained(tmp_path)
    conversation = talk("What <image> is?", " A lung", "Why?", "So </s> x")
    image = Image.new("RGB", (40, 30), "blue")
    assert encode(conversation, loaded, images=["k"], max_length=None) == encode(
        conversation, processor, images=["k"], max_length=None
    )
    assert torch.equal(loaded.pixels([image]), processor.pixels([image]))
    assert loaded.image_fingerprint == processor.image_fingerprint
    assert (loaded.template, loaded.text.prefix_mark) == (processor.template, processor.text.prefix_mark)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert json.loads((again / PROCESSOR_FILE).read_text()) == json.loads((tmp_path / PROCESSOR_FILE).read_text())


def test_begin_of_text_is_saved(tmp_path: Path) -> None:
    """A sentencepiece folder without the key means yes; the folder that transformers saves from it says no."""
    tokenizer = byte_level()
    assert not LlavaMedProcessor(tokenizer, None, template="v1", num_image_tokens=1).text.bos_ids
    processor = LlavaMedProcessor(tokenizer, None, template="v1", num_image_tokens=1, add_bos=True)
    processor.save_pretrained(tmp_path)
    assert LlavaMedProcessor.from_pretrained(tmp_path).text.bos_ids == (tokenizer.bos_token_id,)


def test_special_ids() -> None:
    processor = LlavaMedProcessor(byte_level(), None, template="chatml", num_image_tokens=2)
    known = processor.tokenizer.get_vocab()
    assert processor.image_token_id == known["<image>"]
    assert processor.eos_token_id == known["<|im_end|>"]
    assert processor.pad_token_id == known["<|endoftext|>"]
    assert processor.stop_token_ids == (known["<|im_end|>"],)
    patches = make_processor(num_image_tokens=2).tokenizer
    assert LlavaMedProcessor(patches, None, template="v0", num_image_tokens=1).stop_token_ids == (2,)
    assert LlavaMedProcessor(patches, None, template="v1", num_image_tokens=1).pad_token_id == 0


def test_template_can_be_replaced() -> None:
    processor = make_processor(system="S")
    assert processor.template.prompt(talk("Q")).startswith("S USER")
    other = processor.changed(template="mistral_instruct")
    assert other.template.prompt(talk("Q")) == "[INST] Q [/INST]"


def test_chat_template_can_be_replaced() -> None:
    processor = make_processor()
    before = processor.tokenizer.chat_template, processor.template
    text = (
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    other = processor.changed(template="auto", chat_template=text)
    assert other.template.prompt(talk("Q")) == "[user]Q</s>[assistant]"
    assert other.tokenizer.chat_template == text
    assert (processor.tokenizer.chat_template, processor.template) == before


def test_decode_leaves_special_tokens_out() -> None:
    processor = make_processor()
    assert processor.decode([*processor.text(" A lung ≥ 2.").ids, 2]).strip() == "A lung ≥ 2."


def test_worker_processes_can_have_it() -> None:
    processor = make_processor()
    copy = pickle.loads(pickle.dumps(processor))
    conversation = talk("Q", "A")
    assert encode(conversation, copy, max_length=None) == encode(conversation, processor, max_length=None)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=PROCESSOR_FILE):
        LlavaMedProcessor.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="unknown image placement 'back'; known: as_written, front"):
        make_processor(placement="back")
    with pytest.raises(ConfigError, match="unknown image mode"):
        make_processor(image_mode="round")
    with pytest.raises(ConfigError, match="expected at least 1"):
        make_processor(num_image_tokens=0)
    with pytest.raises(ConfigError, match="has neither <image> nor <im_patch>"):
        LlavaMedProcessor(llama_like(added=()), None, template="v1", num_image_tokens=1)
    with pytest.raises(ConfigError, match="for text only"):
        make_processor().pixels([Image.new("RGB", (4, 4))])
    (tmp_path / PROCESSOR_FILE).write_text('{"template": "v1"}')
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        LlavaMedProcessor.from_pretrained(tmp_path)


def test_naming_the_template_in_use_keeps_the_system_text() -> None:
    processor = make_processor(system="S")
    name = processor.template.name
    same = processor.changed(template=name)
    assert same.system == same.template.system == "S"
    assert processor.changed(template=name, system="T").template.system == "T"
    other = "plain" if name != "plain" else "v1"
    assert processor.changed(template=other).system is None


CHANGES: dict[str, dict[str, Any]] = {
    "template": {"template": "mistral_instruct"},
    "system": {"system": "Another."},
    "image mode": {"image_mode": "pad"},
    "placement": {"placement": "as_written"},
    "stripping": {"strip_around_images": True},
    "DICOM": {"dicom": DicomPolicy("lung", "middle")},
    "JPEG": {"fast_jpeg": True},
    "padding": {"random_padding": True},
}


@pytest.mark.parametrize("setting", CHANGES)
def test_a_changed_processor_leaves_the_first_as_it_was(tiny: LoadedModel, setting: str) -> None:
    processor = tiny.processor
    names = ("template", "system", "image_mode", "image_grid", "placement", "strip_around_images", "dicom", "fast_jpeg")
    names = (*names, "random_padding", "image_fingerprint", "tokenizer", "image_processor")
    before = {name: getattr(processor, name) for name in names}
    made = processor.changed(**CHANGES[setting])
    assert {name: getattr(processor, name) for name in names} == before
    assert {name: getattr(made, name) for name in names} != before
    assert {name: getattr(processor.changed(), name) for name in names} == before


def test_changes_are_checked(tiny: LoadedModel) -> None:
    for change, message in (
        ({"template": "none"}, "none"),
        ({"image_mode": "round"}, "unknown image mode 'round'"),
        ({"placement": "back"}, "unknown image placement 'back'"),
        ({"fast_jpeg": "yes"}, "fast_jpeg is 'yes'; expected true or false"),
        ({"image_mode": "anyres", "image_grid_pinpoints": [[30, 30]]}, "a multiple of 28"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny.processor.changed(**change)  # type: ignore[arg-type]
