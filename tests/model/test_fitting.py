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
