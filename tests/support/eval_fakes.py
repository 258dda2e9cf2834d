"""Engine without a model, and small data, for tests of evaluation and serving."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from llava.errors import GenerationError
from llava.generation.protocol import Completion, Prompt, Sampling


class FakeEngine:
    """Engine that answers from a table or with the shown image, and records its prompts."""

    def __init__(self, answers: Mapping[str, str] | None = None, *, broken: str | None = None, stop_after: int = -1):
        self.answers = dict(answers or {})
        self.broken = broken
        self.stop_after = stop_after
        self.batches: list[list[Prompt]] = []

    @property
    def questions(self) -> list[str]:
        return [self.text_of(prompt) for batch in self.batches for prompt in batch]

    @staticmethod
    def text_of(prompt: Prompt) -> str:
        return prompt.conversation.turns[-1].text.replace("<image>", "").strip()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        if self.stop_after == 0:
            raise KeyboardInterrupt
        self.stop_after -= 1
        if any(self.broken is not None and self.broken in self.text_of(prompt) for prompt in prompts):
            raise GenerationError("the fake engine was told to fail")
        self.batches.append(list(prompts))
        return [[self.complete(prompt)] for prompt in prompts]

    def complete(self, prompt: Prompt) -> Completion:
        looked = [image if isinstance(image, str) else "blank" for image in prompt.images]
        if "blank" in looked:
            return Completion(text="no", token_ids=(1,), finish="stop")
        shown = " ".join(Path(image).name for image in looked)
        return Completion(text=self.answers.get(self.text_of(prompt), f"saw {shown}"), token_ids=(1,), finish="stop")

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        yield self.complete(prompt).text


def row(
    identity: object, image: str, question: str, answer: object, *, kind: str = "CLOSED", types: str = "PRES"
) -> dict:
    """Return a VQA row in the published format."""
    return {
        "id": identity,
        "image": image,
        "conversations": [{"from": "human", "value": f"{question}\n<image>"}, {"from": "gpt", "value": answer}],
        "answer_type": kind,
        "question_type": types,
    }


def write_vqa(folder: Path, rows: Sequence[dict]) -> tuple[Path, Path]:
    """Write rows and a small image for each image name; return the file and the image folder."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(sorted({entry["image"] for entry in rows})):
        Image.new("RGB", (40, 30), (10 * index % 256, 80, 160)).save(images / name)
    path = folder / "test.json"
    path.write_text(json.dumps(list(rows)))
    return path, images


def rows_of(path: Path) -> list[dict]:
    """Return the rows of an answer file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
