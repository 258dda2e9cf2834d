"""A processor that does not fit its model."""

from __future__ import annotations

import pytest

from llava.errors import CheckpointError
from llava.model.fitting import check_processor
from tests.support.tiny import tiny_llava


@pytest.mark.parametrize(("mode", "is_refused"), [("square", True), ("pad", True), ("keep", False)])
def test_the_input_size_is_bounded_where_it_is_used(mode: str, is_refused: bool) -> None:
    """Image mode `keep` does not use it, so it prepares no image of that size."""
    loaded = tiny_llava()
    processor = loaded.processor.changed(image_mode=mode)
    check_processor(loaded.model, processor, "model")
    processor.image_processor.crop_size = {"height": 10**6, "width": 10**6}
    if is_refused:
        with pytest.raises(
            CheckpointError, match=r"model: preprocessor_config\.json makes images of 1000000 x 1000000"
        ):
            check_processor(loaded.model, processor, "model")
    else:
        check_processor(loaded.model, processor, "model")


@pytest.mark.parametrize(("mode", "is_refused"), [("square", True), ("pad", False)])
def test_a_processor_that_keeps_the_shapes_of_images_is_refused(mode: str, is_refused: bool) -> None:
    """Mode `pad` makes each image square before."""
    loaded = tiny_llava()
    loaded.processor.image_processor.do_center_crop = False
    processor = loaded.processor.changed(image_mode=mode)
    if is_refused:
        with pytest.raises(CheckpointError, match="keeps the shapes of images; expected all of 28 x 28 pixels"):
            check_processor(loaded.model, processor, "model")
    else:
        check_processor(loaded.model, processor, "model")


def test_a_model_that_selects_no_layer_is_refused() -> None:
    loaded = tiny_llava()
    loaded.model.config.vision_feature_layer = []
    with pytest.raises(CheckpointError, match="selects no layer of the tower"):
        check_processor(loaded.model, loaded.processor, "model")
    loaded.model.config.vision_feature_layer = [-1, -2]
    check_processor(loaded.model, loaded.processor, "model")
