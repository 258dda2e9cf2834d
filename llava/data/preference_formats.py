"""Layouts of preference rows: those of STLLaVA-Med, its judge, TRL, LLaMA-Factory and ms-swift.

JSON row --read_preference (layout by its fields)--> Preference --PREFERENCE_WRITERS[layout]--> JSON row
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError
from llava.samples import Conversation, Preference, Sample, Turn, from_row, image_names, type_and_length

Row = Mapping[str, Any]


def is_preference_row(row: Row) -> bool:
    """Return whether the fields of a row are those of a pair in any layout."""
    sides = (
        {"chosen_conversations"},
        {"q", "p", "r"},
        {"rejected_response"},
        {"rejected_messages"},
        {"chosen", "rejected"},
    )
    return any(names <= row.keys() for names in sides)


def layout_of_row(row: Row) -> str:
    """Return the layout of a preference row, a name in `PREFERENCE_WRITERS`.

    Raises:
        DataError: the fields are of no known layout.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a JSON object, got {type(row).__name__}")
    if "chosen_conversations" in row:
        return "published"
    if row.keys() >= {"q", "p", "r"}:
        return "judge"
    if "rejected_response" in row or "rejected_messages" in row:
        return "ms-swift"
    if row.keys() >= {"chosen", "rejected"}:
        return "llama-factory" if {"conversations", "instruction"} & row.keys() else "trl"
    raise DataError(
        f"not a preference row: it has {', '.join(map(repr, row)) or 'no fields'}; expected chosen_conversations and "
        "reject_conversations (STLLaVA-Med), q, p and r (its judge), chosen and rejected (TRL, LLaMA-Factory), or "
        "messages and rejected_response (ms-swift)"
    )


def read_preference(row: Row, *, default_id: str) -> Preference:
    """Return the pair of a JSON row of any layout.

    Args:
        row: the decoded JSON object.
        default_id: id of a row without one.

    Raises:
        DataError: a field is missing or invalid, or the sides cannot be compared; the message names the field.
    """
    found = _READERS[layout_of_row(row)](row, default_id)
    _check_sides(found)
    return found


def _check_sides(pair: Preference) -> None:
    """Check that both sides ask the same and answer differently.

    Raises:
        DataError: they do not.
    """
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    for name, side in sides.items():
        if len(side.turns) % 2:
            raise DataError(f"the {name} side ends with a question; expected an answer")
        for turn in side.turns[1::2]:
            if not turn.text.strip():
                raise DataError(f"the {name} side has an empty answer")
    asked = [[turn.text for turn in side.turns[::2]] for side in sides.values()]
    if asked[0] != asked[1] or pair.chosen.system != pair.rejected.system:
        raise DataError("the sides have different questions; expected the same human turns in chosen and rejected")
    if [turn.text.strip() for turn in pair.chosen.turns] == [turn.text.strip() for turn in pair.rejected.turns]:
        raise DataError("the chosen and the rejected answer are equal")


def _weight(row: Row) -> float:
    value = row.get("weight", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise DataError(f"field 'weight' must be a number of at least 0, got {type_and_length(value)}")
    return float(value)


def _images(row: Row, *names: str) -> tuple[str, ...]:
    """Return the images of the first of these fields that is set; entries may be `{"path": name}`."""
    for name in names:
        value = row.get(name)
        if value not in (None, "", []):
            entries = value if isinstance(value, list) else [value]
            paths = [entry.get("path") if isinstance(entry, Mapping) else entry for entry in entries]
            try:
                return image_names(paths)
            except DataError:
                raise DataError(
                    f"field {name!r} must hold file names or objects with a 'path', got {type_and_length(value)}"
                ) from None
    return ()


def _pair(
    row: Row, sides: tuple[Sequence[Turn], Sequence[Turn]], images: tuple[str, ...], used: set[str], default_id: str,
    *, system: str | None = None,
) -> Preference:  # fmt: skip
    raw_id = row.get("id")
    meta = {name: value for name, value in row.items() if name not in used | {"id", "weight"}}
    chosen, rejected = (Conversation(tuple(side), system) for side in sides)
    identity = default_id if raw_id is None else str(raw_id)
    return Preference(identity, chosen, rejected, images, _weight(row), meta)


def _read_published(row: Row, default_id: str) -> Preference:
    sides: list[Sample] = []
    for name in ("chosen_conversations", "reject_conversations"):
        if name not in row:
            raise DataError(f"field {name!r} is missing")
        rest = {key: value for key, value in row.items() if key not in ("chosen_conversations", "reject_conversations")}
        try:
            sides.append(from_row({**rest, "conversations": row[name]}, default_id=default_id))
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
    chosen, rejected = sides
    meta = {name: value for name, value in chosen.meta.items() if name not in ("id", "weight")}
    return Preference(chosen.id, chosen.conversation, rejected.conversation, chosen.images, _weight(row), meta)


def _read_judged(row: Row, default_id: str) -> Preference:
    question = _text(row, "q")
    sides = tuple((Turn("human", question), Turn("gpt", _text(row, name))) for name in ("p", "r"))
    return _pair(row, (sides[0], sides[1]), _images(row, "img"), {"q", "p", "r", "img"}, default_id)


def _read_trl(row: Row, default_id: str) -> Preference:
    prompt = _messages(row.get("prompt", []), "prompt")
    sides = [[*prompt, *_messages(row[name], name, role="assistant")] for name in ("chosen", "rejected")]
    return _from_messages(row, sides, _images(row, "images", "image"), {"prompt", "chosen", "rejected"}, default_id)


def _read_llama_factory(row: Row, default_id: str) -> Preference:
    if "conversations" in row:
        prompt = _messages(row["conversations"], "conversations")
    else:
        parts = [row.get(name) or "" for name in ("instruction", "input")]
        prompt = [("user", "\n".join(str(part) for part in parts if part))]
    if isinstance(row.get("system"), str) and row["system"]:
        prompt = [("system", row["system"]), *prompt]
    answers = [_messages([row[n]] if isinstance(row[n], Mapping) else row[n], n, role="assistant")
               for n in ("chosen", "rejected")]  # fmt: skip
    used = {"conversations", "instruction", "input", "system", "chosen", "rejected"}
    return _from_messages(row, [prompt + side for side in answers], _images(row, "images", "image"), used, default_id)


def _read_swift(row: Row, default_id: str) -> Preference:
    chosen = _messages(row.get("messages", []), "messages")
    if "rejected_messages" in row:
        rejected = _messages(row["rejected_messages"], "rejected_messages")
    else:
        rejected = [*chosen[:-1], ("assistant", _text(row, "rejected_response"))]
    if row.get("rejected_images") not in (None, [], row.get("images")):
        raise DataError("the sides have different images ('rejected_images'); expected the same for both answers")
    used = {"messages", "rejected_messages", "rejected_response", "rejected_images"}
    return _from_messages(row, [chosen, rejected], _images(row, "images", "image"), used, default_id)


_READERS: dict[str, Callable[[Row, str], Preference]] = {
    "published": _read_published,
    "judge": _read_judged,
    "trl": _read_trl,
    "llama-factory": _read_llama_factory,
    "ms-swift": _read_swift,
}

Message = tuple[str, str]
"""Role and text of a chat message."""

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(f"field {name!r} must be text, got {type_and_length(value)}")
    return value


def _messages(value: Any, name: str, *, role: str = "user") -> list[Message]:
    """Return the messages of a field: a text of `role`, or a list in either of the two usual layouts."""
    if isinstance(value, str):
        return [(role, value)]
    if not isinstance(value, list):
        raise DataError(f"field {name!r} must be text or a list of messages, got {type_and_length(value)}")
    found: list[Message] = []
    for index, message in enumerate(value):
        speaker = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
        known = _ROLES.get(speaker) if isinstance(speaker, str) else None
        if known is None:
            raise DataError(f"{name}[{index}] must have a role of {', '.join(_ROLES)}, got {type_and_length(speaker)}")
        found.append((known, _content(message.get("content", message.get("value")), f"{name}[{index}]")))
    return found


def _content(value: Any, where: str) -> str:
    """Return the text of a message; its image parts become placeholders."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(part, Mapping) for part in value):
        raise DataError(f"{where} must have text or a list of parts as content, got {type_and_length(value)}")
    texts = [IMAGE_TOKEN if part.get("type") in ("image", "image_url") else str(part.get("text", "")) for part in value]
    return "\n".join(texts)


def _from_messages(
    row: Row, sides: Sequence[list[Message]], images: tuple[str, ...], used: set[str], default_id: str
) -> Preference:
    """Return the pair of two lists of messages, which may begin with a system prompt and must alternate."""
    systems, turns = [], []
    for name, messages in zip(("chosen", "rejected"), sides, strict=True):
        systems.append(messages[0][1] if messages and messages[0][0] == "system" else None)
        rest = messages if systems[-1] is None else messages[1:]
        if not rest or [role for role, _ in rest] != [("user", "assistant")[n % 2] for n in range(len(rest))]:
            raise DataError(f"the {name} side must alternate user and assistant, starting with a question")
        turns.append([Turn("human" if role == "user" else "gpt", text) for role, text in rest])
    pair = _pair(row, (turns[0], turns[1]), images, used | {"images", "image"}, default_id, system=systems[0])
    return replace(pair, rejected=replace(pair.rejected, system=systems[1]))


def conversation_of(row: Row, *, default_id: str) -> tuple[Sample, float]:
    """Return the sample of a row with one answer, and its weight.

    The row has `prompt` and `completion`, `messages`, or `conversations`.

    Raises:
        DataError: a field is missing or invalid, or the row does not end with an answer that has text.
    """
    if "completion" in row or "prompt" in row:
        answer = _messages(row.get("completion", []), "completion", role="assistant")
        messages = [*_messages(row.get("prompt", []), "prompt"), *answer]
    else:
        name = "messages" if "messages" in row else "conversations"
        messages = _messages(row.get(name, []), name)
    used = {"prompt", "completion", "messages", "conversations"}
    pair = _from_messages(row, [messages, messages], _images(row, "images", "image"), used, default_id)
    sample = pair.sides()[0]
    if len(sample.conversation.turns) % 2 or not sample.conversation.turns[-1].text.strip():
        raise DataError("the row does not end with an answer that has text")
    return sample, pair.weight


def _shared_fields(pair: Preference, images: str) -> dict[str, Any]:
    """Return the fields that all layouts share: id, images as a list, weight, and other fields of the row."""
    row: dict[str, Any] = {"id": pair.id}
    if pair.images:
        row[images] = list(pair.images)
    if pair.weight != 1.0:
        row["weight"] = pair.weight
    return {**row, **pair.meta}


def _written(side: Conversation, speaker: str, text: str, roles: tuple[str, str, str]) -> list[dict[str, str]]:
    """Return the turns of a side; `roles` are the names of system, human and gpt."""
    system = [] if side.system is None else [{speaker: roles[0], text: side.system}]
    return system + [{speaker: roles[1 if turn.role == "human" else 2], text: turn.text} for turn in side.turns]


def _chat(side: Conversation) -> list[dict[str, str]]:
    return _written(side, "role", "content", ("system", "user", "assistant"))


def _with_parts(message: Mapping[str, str]) -> dict[str, Any]:
    """Return a chat message whose placeholders, if it has any, are image parts."""
    texts = [text.strip() for text in message["content"].split(IMAGE_TOKEN)]
    if len(texts) == 1:
        return dict(message)
    parts: list[dict[str, str]] = []
    for index, text in enumerate(texts):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": text}] if text else []
    return {**message, "content": parts}


def _share(side: Conversation) -> list[dict[str, str]]:
    return _written(side, "from", "value", ("system", "human", "gpt"))


def _num_shared(pair: Preference) -> int:
    """Return the number of leading turns that both sides share; the last of them is a question."""
    same = 0
    while same + 1 < len(pair.chosen.turns) and pair.chosen.turns[: same + 1] == pair.rejected.turns[: same + 1]:
        same += 1
    return same


def _to_published(pair: Preference) -> dict[str, Any]:
    row = _shared_fields(pair, "image")
    if len(pair.images) == 1:
        row["image"] = pair.images[0]
    return {**row, "chosen_conversations": _share(pair.chosen), "reject_conversations": _share(pair.rejected)}


def _to_judge(pair: Preference) -> dict[str, Any]:
    if len(pair.chosen.turns) != 2 or pair.chosen.system is not None or len(pair.images) > 1:
        raise DataError("a judge line holds one question about at most one image; use --to published, trl or ms-swift")
    row = _shared_fields(pair, "img")
    if pair.images:
        row["img"] = pair.images[0]
    return {**row, "q": pair.chosen.turns[0].text, "p": pair.chosen.turns[1].text, "r": pair.rejected.turns[1].text}


def _to_trl(pair: Preference) -> dict[str, Any]:
    shared = _num_shared(pair) + (pair.chosen.system is not None)
    chosen, rejected = ([_with_parts(message) for message in _chat(side)] for side in (pair.chosen, pair.rejected))
    sides = {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    return {**_shared_fields(pair, "images"), **sides}


def _to_llama_factory(pair: Preference) -> dict[str, Any]:
    chosen, rejected = pair.chosen.turns, pair.rejected.turns
    if chosen[:-1] != rejected[:-1]:
        raise DataError("a LLaMA-Factory row can differ in its last answer only; use --to published, trl or ms-swift")
    system = {} if pair.chosen.system is None else {"system": pair.chosen.system}
    return {
        **_shared_fields(pair, "images"),
        **system,
        "conversations": _share(Conversation(chosen[:-1])),
        "chosen": {"from": "gpt", "value": chosen[-1].text},
        "rejected": {"from": "gpt", "value": rejected[-1].text},
    }


def _to_swift(pair: Preference) -> dict[str, Any]:
    row = {**_shared_fields(pair, "images"), "messages": _chat(pair.chosen)}
    if pair.chosen.turns[:-1] == pair.rejected.turns[:-1]:
        return {**row, "rejected_response": pair.rejected.turns[-1].text}
    return {**row, "rejected_messages": _chat(pair.rejected)}


PREFERENCE_WRITERS: dict[str, Callable[[Preference], dict[str, Any]]] = {
    "published": _to_published,
    "judge": _to_judge,
    "trl": _to_trl,
    "llama-factory": _to_llama_factory,
    "ms-swift": _to_swift,
}
"""Writers of rows by layout."""
