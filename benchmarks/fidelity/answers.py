"""Recorded generations: greedy, beams, repetition penalty."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.fidelity.folder import IMAGE_MARK, Line, Oracle, loaded_from
from benchmarks.fidelity.numbers import expanded
from benchmarks.fidelity.texts import fitting
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN
from llava.conversation import Segment
from llava.data.encode import Encoded, kept_sizes, tokenize_segments
from llava.generation.engine import LocalEngine
from llava.generation.prompt_encoder import PromptReader, Reading, cut, sizes_of
from llava.generation.protocol import Completion, Prompt, Sampling
from llava.model.builder import Loaded
from llava.samples import Conversation, Turn

MARGIN = 1e-3
"""Where the two best logits come closer than this, rounding may decide: such a case cannot fail."""

ANSWERS = "out/answers.jsonl"
"""Answers to the questions of a file, as text."""

QUESTIONS = "questions.jsonl"

HALF = "\ufffd"
"""Stands for bytes that are no character."""

LONGEST_ANSWER = 128
"""Tokens that are generated to find out how many a recorded answer has."""

MAX_TOKENS = 4096
"""Recorded prompts may be longer than the small models' context."""

PATCHED = re.compile(r"<im_start>(<im_patch>)+<im_end>")
"""A picture in the text of a prompt of the first version."""

PENALTIES = {"rep": 1.3}
"""Of the recorded ways that do not say it."""


def generation(oracle: Oracle) -> Iterator[Line]:
    """`generate.json`: the new token ids of every case, by way of choosing and by checkpoint."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    longest = max((len(_new_ids(case)) for case in oracle.json("generate.json")), default=0)
    for case in oracle.json("generate.json"):
        groups.setdefault((case.get("checkpoint", ""), case.get("mode", "greedy")), []).append(case)
    for (checkpoint, mode), cases in groups.items():
        folder = oracle.model(checkpoint or None)
        loaded = loaded_from(oracle.path, str(folder.relative_to(oracle.path)))
        engine = _engine(loaded, folder, oracle.compat)
        usual = loaded.processor.template.name, loaded.processor.system
        wrong, close, read = [], 0, 0
        for case in cases:
            found = _answer(oracle, engine, case, longest)
            read += found is None
            if found is None or list(found.token_ids) != _new_ids(case):
                close += found is not None and case["min_top2_margin"] < MARGIN
                if found is None or case["min_top2_margin"] >= MARGIN:
                    wrong.append(f"{case['id']}{'/' + case['template'] if 'template' in case else ''}")
        loaded.processor.use_template(usual[0], system=usual[1])
        note = f"{len(cases) - len(wrong) - close} of {len(cases)} equal"
        note += f", {close} where rounding decides" if close else ""
        note += f", {read} prompts read otherwise" if read else ""
        note += f"; differ {', '.join(wrong)}" if wrong else ""
        name = f"generated ids {mode} {checkpoint.rpartition('/')[2]}".rstrip()
        yield Line(name, float(len(wrong)), "FAIL" if wrong else "ok", note)


class RecordedReader(PromptReader):
    """Reads the text of a recorded prompt as it stands, not as our template would have written it."""

    def read(self, prompt: Prompt) -> Reading:
        """Tokens and pictures of a prompt whose only turn is the whole text."""
        pictures = tuple(self._picture(image) for image in prompt.images)
        sizes = sizes_of(pictures)
        draft = tokenize_segments([Segment(prompt.conversation.turns[0].text, False, 0)], self.processor, sizes)
        ids, keys = tuple(draft.ids), tuple(picture.key for picture in pictures)
        nothing = (IGNORE_INDEX,) * len(ids)
        encoded = Encoded(ids, nothing, (0,) * len(ids), tuple(draft.image_spans), keys)
        encoded = cut(replace(encoded, image_sizes=kept_sizes(self.processor, sizes)), self.longest)
        return Reading(encoded, pictures[: len(encoded.images)])


def _engine(loaded: Loaded, folder: Path, compat: frozenset[str]) -> LocalEngine:
    engine = LocalEngine(loaded.model, loaded.processor, max_tokens=MAX_TOKENS)
    reader = RecordedReader(loaded.processor, max_tokens=MAX_TOKENS)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    reader.longest = config.get("tokenizer_model_max_length") if "cut_prompt" in compat else None
    engine.reader = engine.scheduler.reader = reader
    return engine


def _answer(oracle: Oracle, engine: LocalEngine, case: dict[str, Any], longest: int) -> Completion | None:
    """Our answer to the recorded prompt; None if we read other ids in it."""
    processor = engine.processor
    text = PATCHED.sub(IMAGE_TOKEN, case["prompt"])
    pictures = tuple(oracle.pictures(case["id"])[: text.count(IMAGE_TOKEN)])
    prompt = Prompt(Conversation((Turn("human", text),)), pictures)
    if "template" in case:
        processor.use_template(fitting(case["template"])[0])
    ours = engine.reader.read(prompt).encoded.input_ids
    counts = processor.count_image_tokens(len(pictures), [picture.size for picture in pictures])
    theirs = expanded(processor, case["input_ids"], counts)
    if list(ours) != theirs[: len(ours)] or not ("cut_prompt" in oracle.compat or len(ours) == len(theirs)):
        return None
    engine.beams_count_prompt = "beams_count_prompt" in oracle.compat and _holds_prompt(case)
    return engine.generate([prompt], _sampling(case, longest))[0][0]


def _holds_prompt(case: dict[str, Any]) -> bool:
    """Whether the prompt was recorded with the answer, as transformers did before it counted the answer alone."""
    ids, prompt = case.get("output_ids", []), case["input_ids"]
    return bool(ids[: len(prompt)] == prompt)


def _sampling(case: dict[str, Any], longest: int) -> Sampling:
    """The recorded way of choosing; the longest answer of the file tells how long one might be."""
    mode, options = case.get("mode", "greedy"), case.get("gen_kwargs") or {}
    beams = re.search(r"beam(\d+)", mode)
    return Sampling(
        max_new_tokens=options.get("max_new_tokens", longest),
        num_beams=options.get("num_beams", int(beams[1]) if beams else 1),
        repetition_penalty=options.get("repetition_penalty", PENALTIES.get(mode, 1.0)),
    )


def _new_ids(case: dict[str, Any]) -> list[int]:
    """Recorded ids without the prompt."""
    if "new_ids" in case:
        return list(case["new_ids"])
    ids, prompt = case["output_ids"], case["input_ids"]
    if _holds_prompt(case):
        return list(ids[len(prompt) :])
    return list(ids[1:] if ids[0] == prompt[0] and IMAGE_MARK not in ids else ids)


def answer_file(oracle: Oracle) -> Iterator[Line]:
    """`questions.jsonl` and `out/answers.jsonl`: the answers of the original's evaluation program, as text.

    How many tokens it was allowed is not recorded: it is the number at which most answers are equal.
    """
    if not oracle.has(ANSWERS):
        yield Line("answers", None, "FAIL", f"{ANSWERS} is not there")
        return
    questions = _lines(oracle.path / QUESTIONS)
    recorded = {str(row["question_id"]): row["text"].strip() for row in _lines(oracle.path / ANSWERS)}
    loaded = loaded_from(oracle.path, str(oracle.model().relative_to(oracle.path)))
    engine = LocalEngine(loaded.model, loaded.processor)
    found = engine.generate([_question(oracle, row) for row in questions], Sampling(max_new_tokens=LONGEST_ANSWER))
    ours = {str(row["question_id"]): answer.token_ids for row, [answer] in zip(questions, found, strict=True)}

    def unequal(limit: int) -> list[str]:
        texts = {key: loaded.processor.decode(ids[:limit]).strip() for key, ids in ours.items()}
        return sorted(key for key in texts.keys() | recorded.keys() if texts.get(key) != recorded.get(key))

    limit = min(range(1, LONGEST_ANSWER + 1), key=lambda limit: len(unequal(limit)))
    wrong = unequal(limit)
    note = f"{len(ours) - len(wrong)} of {len(ours)} equal, cut at {limit} tokens"
    # Ours drops the bytes of a character that is not whole; the original shows them as one that says so.
    if half := [key for key in recorded if key not in wrong and recorded[key].endswith(HALF)]:
        note += f", {len(half)} half_characters"
        wrong += [] if "half_characters" in oracle.compat else half
    note += f"; differ {', '.join(wrong)}" if wrong else ""
    yield Line("answers", float(len(wrong)), "FAIL" if wrong else "ok", note)


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _question(oracle: Oracle, row: dict[str, Any]) -> Prompt:
    images = row.get("image") or []
    names = [images] if isinstance(images, str) else images
    text = row["text"].replace(IMAGE_TOKEN, "").strip()
    marked = f"{IMAGE_TOKEN}\n" * len(names) + text
    return Prompt(Conversation((Turn("human", marked),)), tuple(str(oracle.path / "images" / name) for name in names))
