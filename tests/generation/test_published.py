"""The snippet of the published model card runs, and gives the engine's answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.data.report_rows import report_question
from llava.errors import DataError
from llava.generation.loading import open_engine
from llava.generation.protocol import Prompt, Sampling
from llava.model.checkpoint.save import save_model
from llava.samples import Conversation, Turn
from llava.utils import data_loaders
from tests.support.tiny import tiny_image, tiny_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model of template v1."""
    path = tmp_path_factory.mktemp("model")
    loaded = tiny_llava(template="v1")
    save_model(loaded.model, loaded.processor, str(path))
    return path


def snippet(model_path: str, image: Image.Image, query: str) -> tuple[str, torch.Tensor]:
    """Return the answer as the model card computes it, and the ids of the prompt."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.conversation import SeparatorStyle, conv_templates
    from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from llava.utils import disable_torch_init

    disable_torch_init()
    name = get_model_name_from_path(model_path)
    tokenizer, model, image_processor, context_len = load_pretrained_model(model_path, None, name, device="cpu")
    assert context_len == 2048
    conv = conv_templates["v1"].copy()
    conv.append_message(conv.roles[0], query)
    conv.append_message(conv.roles[1], None)
    ids = tokenizer_image_token(conv.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)
    stop = conv.sep if conv.sep_style != SeparatorStyle.TWO else conv.sep2
    with torch.inference_mode():
        output_ids = model.generate(
            ids,
            images=image_processor.preprocess(image, return_tensors="pt")["pixel_values"][0].unsqueeze(0).half(),
            do_sample=False,
            temperature=0,
            max_new_tokens=12,
            use_cache=True,
            stopping_criteria=[KeywordsStoppingCriteria([stop], tokenizer, ids)],
        )
    assert torch.equal(output_ids[:, : ids.shape[1]], ids)
    return tokenizer.batch_decode(output_ids[:, ids.shape[1] :], skip_special_tokens=True)[0].strip(), ids


def test_the_snippet_gives_the_answer_of_the_engine(folder: Path) -> None:
    image, query = tiny_image(3), f"<image>\n{report_question('findings', 'cough')}"
    answer, ids = snippet(str(folder), image, query)
    engine = open_engine(str(folder), device="cpu")
    prompt = Prompt(Conversation((Turn("human", query),)), (image,))
    [[expected]] = engine.generate([prompt], Sampling(max_new_tokens=12))
    assert answer == expected.text
    encoded = engine.reader.read(prompt).encoded.input_ids
    token, number = engine.processor.image_token_id, engine.processor.num_image_tokens
    place = ids[0].tolist().index(-200)
    assert list(encoded) == [*ids[0, :place].tolist(), *[token] * number, *ids[0, place + 1 :].tolist()]


def test_images_are_counted(folder: Path) -> None:
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(str(folder), None, "any", device="cpu")
    ids = tokenizer_image_token("<image> and <image>", tokenizer, return_tensors="pt")[None]
    pixels = process_images([tiny_image(1), tiny_image(2)], processor)
    assert model.generate(ids, images=pixels, max_new_tokens=2).shape[1] <= ids.shape[1] + 2
    with pytest.raises(DataError, match="2 ids -200 for 1 images"):
        model.generate(ids, images=pixels[:1], max_new_tokens=2)


def test_unknown_names_are_attribute_errors() -> None:
    import llava.conversation
    import llava.mm_utils

    for module in (llava.mm_utils, llava.conversation, data_loaders):
        with pytest.raises(AttributeError, match="nothing"):
            _ = module.nothing  # type: ignore[attr-defined]


def test_a_chat_with_answers_is_the_training_text() -> None:
    from llava.conversation import conv_templates

    chat = conv_templates["v1"].copy()
    chat.append_message("USER", "q")
    chat.append_message("ASSISTANT", "a")
    assert chat.get_prompt().endswith("questions. USER: q ASSISTANT: a</s>") and not conv_templates["v1"].messages
    assert conv_templates["v0"].roles == ("Human", "Assistant")


def test_loaders_by_their_published_names(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "old"}, {"from": "gpt", "value": "Clear."}]
    row = {"id": "1_2", "image": "mimic/p1/a.jpg", "view": "AP", "reason": None, "conversations": turns}
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([row]))
    [found] = data_loaders.mimic_train_findings(str(path))
    assert found["image"] == "p1/a.jpg" and found == data_loaders.load_rows("mimic_train_findings", str(path))[0]
    assert found["conversations"][0]["value"] == f"<image>\n{report_question('findings', None)}"
