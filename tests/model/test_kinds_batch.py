"""A batch of four mixed prompts (text only, two images, long, short) equals single runs, for every kind that loads.

The checkpoints are written here; recorded published ones are in `tests/parity/test_kinds_answer.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.generation.engine import LocalEngine
from llava.generation.protocol import Prompt, Sampling
from llava.model.builder import LoadedModel, build_model
from llava.model.checkpoint.export_hf import export_hf
from llava.model.checkpoint.formats import KINDS, Checkpoint
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_adapter, save_model, save_projector
from llava.model.checkpoint.tools.convert import convert_checkpoint
from llava.model.lora import add_lora, freeze_for
from llava.samples import Conversation, Turn
from tests.support.legacy_folders import write_legacy, write_lora, write_projector_only
from tests.support.model_tools import shake, trained
from tests.support.tiny import tiny_image, write_tiny_lm, write_tiny_tower

SAMPLING = Sampling(max_new_tokens=8)
LONG = "The left lobe is larger than the right one and shows no lesion at all. "


def legacy(**options: Any) -> Callable[[Path], LoadedModel]:
    return lambda root: load_checkpoint(write_legacy(root, **options))


def parts_of_others(write: Callable[..., Path], **options: Any) -> Callable[[Path], LoadedModel]:
    return lambda root: load_checkpoint(write(root, **options), base=str(root / "lm"))


def ours(root: Path) -> LoadedModel:
    lm, tower = write_tiny_lm(root / "lm"), write_tiny_tower(root / "tower")
    return build_model(str(lm), str(tower), projector_type="mlp2x_gelu", use_im_start_end=True)


def model(root: Path) -> LoadedModel:
    loaded = ours(root)
    save_model(loaded.model, loaded.processor, root / "out", origin=loaded.origin)
    return load_checkpoint(root / "out")


def projector(root: Path) -> LoadedModel:
    loaded = ours(root)
    save_projector(loaded.model, loaded.processor, root / "out", origin=loaded.origin)
    return load_checkpoint(root / "out")


def adapter(root: Path, *, merge: bool) -> LoadedModel:
    loaded = ours(root)
    network = add_lora(loaded, r=4, alpha=8)
    freeze_for(network, has_adapter=True)
    shake(trained(network))
    save_adapter(network, loaded.processor, root / "out", origin=loaded.origin)
    return load_checkpoint(root / "out", merge=merge)


def hf_llava(root: Path) -> LoadedModel:
    export_hf(load_checkpoint(write_legacy(root)), root / "out")
    return load_checkpoint(root / "out")


def hf_adapter(root: Path) -> LoadedModel:
    loaded = ours(root)
    network = add_lora(loaded, r=4, alpha=8)
    freeze_for(network, has_adapter=True)
    shake(trained(network))
    save_adapter(network, loaded.processor, root / "lora", origin=loaded.origin)
    convert_checkpoint(root / "lora", root / "peft", "peft")
    return load_checkpoint(root / "peft" / "adapter")


MAKERS: dict[str, Callable[[Path], LoadedModel]] = {
    "legacy, mlp, tower inside": legacy(),
    "legacy, bin shards, linear, tower beside": legacy(
        projector="linear", tower_inside=False, safe=False, num_shards=3
    ),
    "legacy, cluster": legacy(projector="cluster", model_type="llama"),
    "legacy, mistral": legacy(lm="mistral"),
    "legacy, patch tokens": legacy(style="patch_token", projector="linear", tower_inside=False, old_buffers=True),
    "legacy, tiles": legacy(
        image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=[[28, 56], [56, 28]]
    ),
    "legacy_adapter": parts_of_others(write_lora),
    "legacy_adapter, and one of the tower": parts_of_others(write_lora, tower_adapter=True, safe=False),
    "legacy_projector": parts_of_others(write_projector_only),
    "model": model,
    "projector": projector,
    "adapter": lambda root: adapter(root, merge=True),
    "adapter, not merged": lambda root: adapter(root, merge=False),
    "hf_llava": hf_llava,
    "hf_adapter": hf_adapter,
}


def prompts(folder: Path) -> list[Prompt]:
    for number in range(4):
        tiny_image(number).save(folder / f"{number}.png")

    def ask(text: str, *numbers: int) -> Prompt:
        return Prompt(Conversation((Turn("human", text),)), tuple(str(folder / f"{number}.png") for number in numbers))

    return [
        ask("Is there a lesion?"),
        ask("<image>\n<image>\nWhich is larger?", 0, 1),
        ask("<image>\n" + LONG * 2, 2),
        ask("<image>\nWhere?", 3),
    ]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_batch_of_four_is_four_single_runs(tmp_path: Path, kind: str) -> None:
    loaded = MAKERS[kind](tmp_path)
    loaded.model.eval()
    asked = prompts(tmp_path)
    together = LocalEngine(loaded.model, loaded.processor, max_slots=4).generate(asked, SAMPLING)
    alone = [
        LocalEngine(loaded.model, loaded.processor, max_slots=1).generate([prompt], SAMPLING)[0] for prompt in asked
    ]
    assert together == alone
    assert len({answer[0].token_ids for answer in together}) > 1


def test_every_kind_of_a_whole_model_is_here() -> None:
    only_parts = {"tower_adapter", "vision_tower", "language_model"}
    assert {name.split(",")[0] for name in MAKERS} == set(KINDS) - only_parts


def test_the_kinds_are_what_they_say(tmp_path: Path) -> None:
    for name in ("model", "projector", "adapter", "hf_llava"):
        MAKERS[name](tmp_path / name)
        assert Checkpoint.open(tmp_path / name / "out").kind == name
