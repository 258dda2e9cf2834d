"""Images of any shape in the model: against transformers' LLaVA-NeXT, in batches, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from llava.data.encode import Encoded, encode
from llava.data.flat_batch import Layout, flatten, target_logits
from llava.data.image_batch import ImageBatch, batch_images, join_images
from llava.errors import ConfigError
from llava.generation.engine import LocalEngine
from llava.generation.protocol import Prompt, Sampling
from llava.imaging.anyres import MERGE_TYPES, ImageGrid
from llava.model.anyres import merge_tiles
from llava.model.builder import LoadedModel, build_model
from llava.model.checkpoint.export_hf import hf_obstacles
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_adapter, save_model, save_projector
from llava.model.lora import add_lora
from llava.samples import Conversation, Turn
from tests.support.tiny import tiny_image, tiny_llava, write_tiny_lm, write_tiny_tower

PINPOINTS = [[56, 28], [28, 56], [56, 56], [84, 28]]
SIZES = [(40, 28), (28, 45), (33, 33), (90, 28), (28, 28)]
"""Sizes of images; a tile has 28 pixels per side and 2 x 2 patches."""


def numbered_image(number: int) -> Image.Image:
    return tiny_image(number, 64).resize(SIZES[number % len(SIZES)])


def tiled(merge: str = "spatial_unpad", **options: Any) -> LoadedModel:
    return tiny_llava(image_mode="anyres", patch_merge_type=merge, image_grid_pinpoints=PINPOINTS, **options)


def kept(**options: Any) -> LoadedModel:
    return tiny_llava(image_mode="keep", **options)


LOADED = {merge: lambda merge=merge: tiled(merge) for merge in MERGE_TYPES} | {"keep": kept}


@pytest.mark.parametrize("merge", ["flat", "spatial_unpad"])
def test_tiles_are_merged_as_transformers_merges_them(merge: str) -> None:
    grid = ImageGrid("anyres", 28, 4, merge, tuple((w, h) for w, h in PINPOINTS))
    counts = [columns * rows + 1 for columns, rows in map(grid.shape, SIZES)]
    features, newline = torch.randn(sum(counts), 4, 6), torch.randn(6)
    ours = merge_tiles(features, SIZES, grid, newline)
    assert [len(each) for each in ours] == [grid.count(size) for size in SIZES]
    if merge == "flat":
        assert torch.equal(torch.cat(ours), features.flatten(0, 1))
        return
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=28, patch_size=14),
        image_grid_pinpoints=[[height, width] for width, height in PINPOINTS],
    )
    theirs, _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        features.split(counts),
        torch.tensor([[height, width] for width, height in SIZES]),
        vision_feature_select_strategy="default",
        image_newline=newline,
    )
    parts = theirs.split([len(each) for each in ours]) if isinstance(theirs, Tensor) else theirs
    assert all(torch.equal(mine, other) for mine, other in zip(ours, parts, strict=True))


def test_spatial_is_the_image_row_by_row() -> None:
    grid = ImageGrid("anyres", 28, 4, "spatial", ((56, 28),))
    numbered = torch.arange(12.0).view(3, 4, 1)
    [merged] = merge_tiles(numbered, [(40, 20)], grid, None)
    assert merged.flatten().tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]


def test_tiles_of_other_images_are_rejected() -> None:
    grid = ImageGrid("anyres", 28, 4, "flat", ((56, 28),))
    with pytest.raises(ConfigError, match="have 3 tiles, got 2"):
        merge_tiles(torch.zeros(2, 4, 6), [(40, 20)], grid, None)


def sequence(loaded: LoadedModel, *numbers: int, text: str = "What is it?") -> tuple[Encoded, dict[str, Tensor]]:
    """Return a conversation about some images, and their model inputs."""
    images = {str(number): numbered_image(number) for number in numbers}
    marks = "<image>\n" * len(numbers)
    conversation = Conversation((Turn("human", marks + text), Turn("gpt", f"it is {len(text)}")))
    sizes = [each.size for each in images.values()]
    encoded = encode(conversation, loaded.processor, images=list(images), sizes=sizes, max_length=None)
    return encoded, {key: loaded.processor.preprocess(each) for key, each in images.items()}


def together(loaded: LoadedModel, rows: list[tuple[Encoded, dict[str, Tensor]]], layout: Layout) -> list[Tensor]:
    images = {key: tensor for _, found in rows for key, tensor in found.items()}
    encoded = [each for each, _ in rows]
    batch = flatten(encoded, images, image_token_id=loaded.processor.image_token_id, layout=layout)
    with torch.no_grad():
        logits = target_logits(loaded.model, batch)[batch.edge_target]
    return [logits[batch.edge_sequence == number] for number in range(len(rows))]


@pytest.mark.parametrize("mode", LOADED)
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_rows_with_images_of_many_shapes_equal_single_rows(mode: str, layout: Layout) -> None:
    loaded = LOADED[mode]()
    rows = [sequence(loaded, *numbers) for numbers in ((0,), (1, 3), (), (2,), (4,))]
    rows.append(sequence(loaded, 0, text="And this, is it the same?"))
    lengths = {stop - start for encoded, _ in rows for start, stop in encoded.image_spans}
    assert len(lengths) > 1
    for found, row in zip(together(loaded, rows, layout), rows, strict=True):
        [alone] = together(loaded, [row], "padded")
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", LOADED)
def test_answers_are_the_same_alone_and_together(mode: str) -> None:
    loaded = LOADED[mode]()
    engine = LocalEngine(loaded.model, loaded.processor)
    prompts = [
        Prompt(
            Conversation((Turn("human", "<image>\n" * len(numbers) + "What?"),)), tuple(map(numbered_image, numbers))
        )
        for numbers in ((0,), (1, 3), (), (2, 2), (4,))
    ]
    sampling = Sampling(max_new_tokens=6)
    found = [answer.token_ids for [answer] in engine.generate(prompts, sampling)]
    assert found == [engine.generate([prompt], sampling)[0][0].token_ids for prompt in prompts]
    beams = engine.generate(prompts[:1], Sampling(max_new_tokens=4, num_beams=2))
    assert len(beams[0][0].token_ids) == 4 or beams[0][0].finish == "stop"


@pytest.mark.parametrize("projector", ["linear", "cluster", "identity"])
@pytest.mark.parametrize("mode", ["keep", "anyres"])
def test_other_projectors_take_such_images(projector: str, mode: str) -> None:
    loaded = tiny_llava(projector, image_mode=mode, image_grid_pinpoints=PINPOINTS)
    rows = [sequence(loaded, 0), sequence(loaded, 1)]
    for found, row in zip(together(loaded, rows, "tree"), rows, strict=True):
        torch.testing.assert_close(found, together(loaded, [row], "padded")[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tower", ["siglip", "dinov2", "vit"])
@pytest.mark.parametrize("mode", ["keep", "anyres"])
def test_other_towers_take_such_images(tower: str, mode: str) -> None:
    loaded = tiny_llava(tower=tower, image_mode=mode, image_grid_pinpoints=PINPOINTS)
    assert together(loaded, [sequence(loaded, 0, 1)], "tree")[0].isfinite().all()


def test_the_newline_embedding_is_trained_and_initialized_as_published() -> None:
    loaded = tiled(lm_sizes={"hidden_size": 32})
    newline = loaded.model.model.image_newline
    assert newline.shape == (32,) and 0.1 < float(newline.std()) < 0.3  # 1 / sqrt(32) is 0.18
    encoded, images = sequence(loaded, 0)
    batch = flatten([encoded], images, image_token_id=loaded.processor.image_token_id)
    target_logits(loaded.model, batch).sum().backward()
    assert newline.grad is not None and newline.grad.abs().max() > 0
    assert tiled("spatial").model.model.image_newline is None


def parts(tmp_path: Path) -> tuple[str, str]:
    return str(write_tiny_lm(tmp_path / "lm")), str(write_tiny_tower(tmp_path / "tower"))


def built(tmp_path: Path, **options: Any) -> LoadedModel:
    loaded = build_model(
        *parts(tmp_path),
        image_mode="anyres",
        patch_merge_type="spatial_unpad",
        image_grid_pinpoints=PINPOINTS,
        template="vicuna_v1",
        **options,
    )
    loaded.model.eval()
    return loaded


@pytest.mark.parametrize("kind", ["model", "projector", "adapter"])
def test_saved_and_loaded(tmp_path: Path, kind: str) -> None:
    loaded = built(tmp_path)
    with torch.no_grad():
        loaded.model.model.image_newline.add_(1.0)
    before = together(loaded, [sequence(loaded, 0, 1)], "tree")[0]
    target = tmp_path / "saved"
    if kind == "model":
        save_model(loaded.model, loaded.processor, target, origin=loaded.origin)
    elif kind == "projector":
        save_projector(loaded.model, loaded.processor, target, origin=loaded.origin)
    else:
        save_adapter(add_lora(loaded, r=2), loaded.processor, target, origin=loaded.origin)
    again = load_checkpoint(target)
    assert again.processor.image_grid == loaded.processor.image_grid
    assert again.model.config.patch_merge_type == "spatial_unpad"
    assert again.model.config.image_grid_pinpoints == PINPOINTS
    torch.testing.assert_close(together(again, [sequence(again, 0, 1)], "tree")[0], before)


@pytest.mark.parametrize("mode", ["flat", "spatial_unpad", "keep"])
def test_what_transformers_llava_cannot_do_is_not_exported(mode: str) -> None:
    found = " ".join(hf_obstacles(LOADED[mode]()))
    assert "image mode" in found
    assert ("spatial_unpad" in found) == (mode == "spatial_unpad")


def test_batches_of_images_are_joined() -> None:
    small, large = torch.ones(3, 2, 5), torch.ones(3, 4, 3)
    assert batch_images([]) == ImageBatch(None, None) and not batch_images([]).keywords()
    both = join_images(batch_images([small], [(1, 2)]), batch_images([large], [(3, 4)]))
    assert both.pixel_values.shape == (2, 3, 4, 5) and both.image_sizes.tolist() == [[1, 2], [3, 4]]
    assert float(both.pixel_values.sum()) == 30 + 36
    tiles = join_images(batch_images([torch.ones(3, 3, 2, 2)], [(1, 2)]), batch_images([]))
    assert tiles.pixel_values.shape == (3, 3, 2, 2)
