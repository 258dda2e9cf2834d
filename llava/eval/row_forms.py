"""Formats of answer rows: what a run writes for a question, and how a resumed run recognizes it.

AnswerRows     {question_id, prompt, text, answer_id, model_id, metadata}, of VQA and chat; known by question_id
FindingsRows   {id, query, reference, prediction, index, ...}, of chest X-ray reports; ids repeat, known by index
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llava.eval.questions import Question, answer_row
from llava.generation.protocol import Completion
from llava.samples import Sample

Row = dict[str, Any]

NO_REASON = "the engine gave no reason"


class RowForm(Protocol):
    """Rows of one kind of answer file."""

    def row(self, asked: Question, completion: Completion) -> Row:
        """Return the row of an answer; with finish `error` it has an error and no text."""
        ...

    def id_of(self, row: Mapping[str, Any]) -> str:
        """Return the id of the question that a row answers."""
        ...

    def difference(self, asked: Question, row: Mapping[str, Any]) -> str | None:
        """Return why a row with the id of a question answers another one; None if it answers it."""
        ...

    def error_of(self, row: Mapping[str, Any]) -> str | None:
        """Return the error of a row without an answer; None if it has one."""
        ...


class AnswerRows:
    """Rows with the six keys of the published answer files."""

    def __init__(self, model_id: str, metadata: Mapping[str, Any]) -> None:
        """Write rows of a model; `metadata` is that of every row."""
        self.model_id = model_id
        self.metadata = dict(metadata)

    def row(self, asked: Question, completion: Completion) -> Row:
        """Return the row of an answer."""
        metadata = dict(self.metadata)
        if completion.finish == "error":
            metadata["error"] = completion.error or NO_REASON
        elif completion.finish == "length":
            metadata["finish"] = "length"
        text = "" if completion.finish == "error" else completion.text.strip()
        return answer_row(asked, text, model_id=self.model_id, metadata=metadata)

    def id_of(self, row: Mapping[str, Any]) -> str:
        """Return `question_id` as text."""
        return str(row.get("question_id"))

    def difference(self, asked: Question, row: Mapping[str, Any]) -> str | None:
        """Return why a row answers another question."""
        if row.get("prompt") != asked.prompt:
            return f"the question with id {asked.id!r} has another text"
        if row.get("model_id") != self.model_id:
            return f"answered by {row.get('model_id')!r}, expected {self.model_id!r}"
        metadata = row.get("metadata")
        if not isinstance(metadata, dict) or metadata.get("image") != self.metadata.get("image"):
            return "answered with another image (blank or not)"
        return None

    def error_of(self, row: Mapping[str, Any]) -> str | None:
        """Return the error of a row without an answer."""
        if "error" in row["metadata"]:
            return str(row["metadata"]["error"])
        return None if isinstance(row.get("text"), str) else "no text"


class FindingsRows:
    """Rows of LLaVA-Rad's prediction files: its four keys, then the row's origin and the finish reason."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        """Write rows about samples; the question of sample `i` has the id `i`."""
        self.samples = samples

    def row(self, asked: Question, completion: Completion) -> Row:
        """Return the row of an answer."""
        index = int(asked.id)
        sample = self.samples[index]
        answers = [turn.text for turn in sample.conversation.turns if turn.role == "gpt"]
        failed = completion.finish == "error"
        row = {
            "id": sample.meta.get("id", sample.id),
            "query": asked.prompt,
            "reference": answers[0] if answers else "",
            "prediction": "" if failed else completion.text.strip(),
            "index": index,
            "image": asked.images[0] if len(asked.images) == 1 else list(asked.images),
            "view": _text_or_none(sample.meta.get("view")),
            "generate_method": _text_or_none(sample.meta.get("generate_method")),
            "num_new_tokens": len(completion.token_ids),
            "stop_reason": completion.finish,
        }
        return {**row, "error": completion.error or NO_REASON} if failed else row

    def id_of(self, row: Mapping[str, Any]) -> str:
        """Return `index` as text."""
        return str(row.get("index"))

    def difference(self, asked: Question, row: Mapping[str, Any]) -> str | None:
        """Return why a row answers another question."""
        sample = self.samples[int(asked.id)]
        if str(row.get("id")) != sample.id:
            return f"row {asked.id} of the questions has the id {sample.id!r}, got {row.get('id')!r}"
        if row.get("query") != asked.prompt:
            return f"row {asked.id} of the questions has another text"
        return None

    def error_of(self, row: Mapping[str, Any]) -> str | None:
        """Return the error of a row without an answer."""
        if "error" in row:
            return str(row["error"])
        return None if isinstance(row.get("prediction"), str) else "no prediction"


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None
