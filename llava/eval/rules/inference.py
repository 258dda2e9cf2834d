"""Resumable file of conversations: one line each, written as soon as its batch is finished.

RuleDialogue, ... --minus held--> pending --by image, equal ones once--> batches --Engine.converse--> lines, in order
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from llava.constants import BLANK_SIZE, GRAY
from llava.errors import ConfigError, DataError
from llava.eval.inference import AnswerOptions
from llava.eval.rules.cases import RuleDialogue
from llava.generation import fingerprint
from llava.generation.protocol import Engine, ImageRef, Script
from llava.imaging.decode import resolve_image_path
from llava.samples import Conversation, Turn
from llava.utils import jsonl, log
from llava.utils.json_rows import read_records

logger = logging.getLogger(__name__)


class DialogueRun:
    """Run that fills one file of conversations; the pending ones are known before a model is loaded."""

    def __init__(self, dialogues: Sequence[RuleDialogue], out: Path, *, resume: bool, options: AnswerOptions) -> None:
        self.dialogues = dialogues
        self.out = out
        self.options = options
        self.rows: dict[str, dict[str, Any]] = self._resumed() if resume else {}
        if not resume or not out.exists():
            jsonl.write_records(out, [])
        self.precisions = set(fingerprint.read_precisions(out)) if self.rows else set()
        fingerprint.write_settings(out, self._settings(), precisions=self.precisions)

    @property
    def pending(self) -> list[RuleDialogue]:
        """Conversations that were not held, grouped by image."""
        groups: dict[str, list[RuleDialogue]] = {}
        for dialogue in self.dialogues:
            if dialogue.id not in self.rows:
                groups.setdefault(dialogue.image, []).append(dialogue)
        return [dialogue for group in groups.values() for dialogue in group]

    def finish(self, engine: Engine | None, *, batch_size: int = 64) -> list[dict[str, Any]]:
        """Hold the pending conversations, rewrite the file in order, and return its rows.

        Raises:
            ConfigError: conversations are pending and `engine` is None, or the template cannot hold conversations.
        """
        if batch_size < 1:
            raise ConfigError(f"--batch-size must be at least 1, got {batch_size}")
        pending = self.pending
        if pending and engine is None:
            raise ConfigError(f"{len(pending)} conversations are pending, but engine is None; pass an engine")
        if engine is not None and pending:
            if precision := getattr(engine, "precision", None):
                self.precisions.add(precision)
                fingerprint.write_settings(self.out, self._settings(), precisions=self.precisions)
            title = "blank image" if self.options.blank_images else "conversations"
            with log.progress_bar(len(self.dialogues), title=title, unit="conversation") as bar:
                bar.update(len(self.rows))
                groups = self._equal(pending)
                for first in range(0, len(groups), batch_size):
                    batch = groups[first : first + batch_size]
                    self._hold(engine, batch)
                    bar.update(sum(map(len, batch)))
        rows = [self.rows[dialogue.id] for dialogue in self.dialogues]
        jsonl.write_records(self.out, rows)
        failed = sum("error" in row for row in rows)
        if failed:
            logger.warning("%d of %d conversations failed; the key error of each row has the reason", failed, len(rows))
        return rows

    def _equal(self, pending: Sequence[RuleDialogue]) -> list[list[RuleDialogue]]:
        """Return conversations in groups that get the same answers and are held once.

        They are greedy, with equal questions about the same image; many of those about the gray image are.
        """
        options = self.options
        if options.sampling.temperature > 0:
            return [[dialogue] for dialogue in pending]
        groups: dict[tuple[str, tuple[str, ...]], list[RuleDialogue]] = {}
        for dialogue in pending:
            image = "" if options.blank_images else dialogue.image
            groups.setdefault((image, dialogue.questions), []).append(dialogue)
        return list(groups.values())

    def _hold(self, engine: Engine, batch: Sequence[Sequence[RuleDialogue]]) -> None:
        """Hold a batch of conversations and append the rows of all that are equal to them."""
        scripts: list[Script] = []
        asked: list[Sequence[RuleDialogue]] = []
        for equal in batch:
            first = equal[0]
            try:
                images = self._images(first)
            except DataError as error:
                for dialogue in equal:
                    self._write(dialogue, [], [], str(error))
                continue
            conversation = Conversation((Turn("human", first.questions[0]),))
            scripts.append(Script(conversation, first.questions[1:], images))
            asked.append(equal)
        held = engine.converse(scripts, self.options.sampling) if scripts else []
        for equal, (answer, *_) in zip(asked, held, strict=True):
            for dialogue in equal:
                self._write(dialogue, answer.texts, answer.finishes, answer.error)

    def _images(self, dialogue: RuleDialogue) -> tuple[ImageRef, ...]:
        if self.options.blank_images:
            return (Image.new("RGB", (BLANK_SIZE,) * 2, GRAY),)
        path = resolve_image_path(dialogue.image, self.options.image_folder)
        if not path.is_file():
            raise DataError(f"image {path.name!r} is not in the image folder")
        return (str(path),)

    def _write(self, dialogue: RuleDialogue, texts: Sequence[str], finishes: Sequence[str], error: str | None) -> None:
        """Append the row of a conversation.

        Turns that were not reached have empty answers and the finish `error`.
        """
        missing = len(dialogue.asked) - len(texts)
        row = {
            "id": dialogue.id,
            "image": "blank" if self.options.blank_images else dialogue.image,
            "questions": list(dialogue.questions),
            "answers": [text.strip() for text in texts] + [""] * missing,
            "finishes": [*finishes, *["error"] * missing],
            "model_id": self.options.model_id,
        }
        if error is not None:
            row["error"] = error
        self.rows[dialogue.id] = row
        jsonl.append_record(self.out, row)

    def _settings(self) -> dict[str, Any]:
        """Return all settings that the answers depend on."""
        options = self.options
        asked = [(dialogue.id, dialogue.image, dialogue.questions) for dialogue in self.dialogues]
        return {
            **options.settings,
            "sampling": asdict(options.sampling),
            "blank images": options.blank_images,
            "image folder": None if options.blank_images else fingerprint.folder_name(options.image_folder),
            "questions": fingerprint.json_sha256(asked),
        }

    def _resumed(self) -> dict[str, dict[str, Any]]:
        """Return the rows of an earlier run without errors, after checking that they belong to this run."""
        if not self.out.exists():
            return {}
        jsonl.drop_incomplete_line(self.out)
        known = {dialogue.id: dialogue for dialogue in self.dialogues}
        kept = {}
        for index, row in enumerate(read_records(self.out)):
            dialogue = known.get(str(row.get("id")))
            if dialogue is None or row.get("questions") != list(dialogue.questions):
                raise DataError(
                    f"{self.out}, row {index}: a conversation of another run. Name another folder, or start over with "
                    "--resume False"
                )
            if "error" not in row:
                kept[dialogue.id] = row
        if kept:
            fingerprint.check_settings(self.out, self._settings())
        return kept
