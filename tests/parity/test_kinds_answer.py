"""A batch of four mixed prompts answers as single prompts do, for every published kind of checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fidelity.folder import loaded_from
from llava.generation.engine import LocalEngine
from llava.generation.protocol import Completion, Prompt, Sampling
from llava.samples import Conversation, Turn
from tests.parity.test_forward import ADAPTERS, RECORDED, Recorded
from tests.support.generation_tools import assert_same_answers

PROJECTORS = (
    Recorded("llava-1.2.2", "out/stage1", base="base_llm"),
    Recorded("llava-rad", "out/stage1", base="base_llm"),
    Recorded("llava-med-1.0", "out/stage1"),
)
CASES = (*RECORDED, *ADAPTERS, *PROJECTORS, Recorded("stllava-med", "out/llava-lora", base="base_llm"))
SAMPLING = Sampling(max_new_tokens=12)
LONG = "Lobe axial resonance no radiograph impression cardiac in lower histology cells left large. "


def prompts(folder: Path) -> list[Prompt]:
    def ask(text: str, *images: str) -> Prompt:
        paths = tuple(str(folder / "images" / name) for name in images)
        return Prompt(Conversation((Turn("human", text),)), paths)

    return [
        ask("Is there a lesion?"),
        ask("<image>\n<image>\nWhich is larger?", "im0.png", "im1.png"),
        ask("<image>\n" + LONG * 5, "im2.png"),
        ask("<image>\nWhere?", "im3.png"),
    ]


@pytest.mark.parametrize("recorded", CASES, ids=lambda case: f"{case.oracle}:{case.folder}")
def test_a_batch_of_four_is_four_single_runs(shared: Path, recorded: Recorded) -> None:
    oracle = shared / "oracles" / recorded.oracle
    loaded = loaded_from(oracle, recorded.folder, recorded.base)
    engine = LocalEngine(loaded.model, loaded.processor, max_slots=4)
    together = engine.generate(prompts(oracle), SAMPLING)
    alone: list[list[Completion]] = [
        LocalEngine(loaded.model, loaded.processor, max_slots=1).generate([prompt], SAMPLING)[0]
        for prompt in prompts(oracle)
    ]
    for prompt, found, wanted in zip(prompts(oracle), together, alone, strict=True):
        assert_same_answers(engine, [prompt], found, wanted, SAMPLING)
    assert len({answer[0].token_ids for answer in together}) > 1
