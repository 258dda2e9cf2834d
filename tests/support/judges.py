"""Judges without a model, and small chat evaluations, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llava.judging.store import JudgeReply, Messages, NoReply

DOMAINS = ("chest_xray", "mri", "ct_scan", "histology", "gross")


def question(number: int, *, domains: Sequence[str] = ("mri",), kind: str = "conversation", **fields: Any) -> dict:
    """Return a chat question; its figure is number // 2."""
    return {
        "question_id": number,
        "image": f"{number // 2}.jpg",
        "pair_id": str(number // 2),
        "text": f"What is object {number}?\n<image>",
        "gpt4_answer": f"Reference {number}.",
        "fig_caption": f"Drawing {number // 2}.",
        "fig_label": "Figure 1",
        "in_text_mention": [{"tokens": f"Object {number} is drawn .", "entities": []}],
        "domain": {name: name in domains for name in DOMAINS},
        "type": kind,
        **fields,
    }


def answer(number: int, text: str = "", **metadata: Any) -> dict:
    text = text or f"Answer {number}."
    return {
        "question_id": number,
        "prompt": "",
        "text": text,
        "answer_id": "a",
        "model_id": "m",
        "metadata": metadata,
    }


def write_lines(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class FakeJudge:
    """Judge that replies by a rule, records its requests, and stops after some replies."""

    def __init__(self, rule: Callable[[Messages], str | None], *, stop_after: int = -1) -> None:
        self.rule = rule
        self.stop_after = stop_after
        self.asked: list[Messages] = []

    def __call__(self, requests: Sequence[Messages]) -> Iterator[tuple[int, JudgeReply]]:
        for place, messages in reversed(list(enumerate(requests))):  # the order of replies is not guaranteed
            if self.stop_after == 0:
                raise KeyboardInterrupt
            self.stop_after -= 1
            self.asked.append(messages)
            reply = self.rule(messages)
            yield place, NoReply("status 500") if reply is None else reply
