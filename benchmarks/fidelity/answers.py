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
from llava.generation.prompt_encoder import EncodedPrompt, PromptReader, cut_prompt, sizes_of
from llava.generation.protocol import Completion, Prompt, Sampling
from llava.model.builder import LoadedModel
from llava.samples import Conversation, Turn

MARGIN = 1e-3
"""If the two best logits differ by less than this, rounding may decide, so the case cannot fail."""

ANSWERS = "out/answers.jsonl"
"""File with the answers to the questions of `QUESTIONS`, as text."""

QUESTIONS = "questions.jsonl"

HALF = "\ufffd"
"""Character written for bytes that do not form a character."""

LONGEST_ANSWER = 128
"""Number of tokens generated to find the token limit of the recorded answers."""

MAX_TOKENS = 4096
"""Recorded prompts may be longer than the small models' context."""

PATCHED = re.compile(r"<im_start>(<im_patch>)+<im_end>")
"""Image in the text of a prompt of LLaVA-Med 1.0."""

PENALTIES = {"rep": 1.3}
"""Repetition penalties of recorded modes that do not state theirs."""


def generation(oracle: Oracle) -> Iterator[Line]:
    """Compare the new token ids of every case of `generate.json`, by mode and by checkpoint."""
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
    """Encoder of the text of a recorded prompt as it is, without our template."""

    def read(self, prompt: Prompt) -> EncodedPrompt:
        """Return tokens and images of a prompt whose only turn is the whole text."""
        images = tuple(self._image(image) for image in prompt.images)
        sizes = sizes_of(images)
        draft = tokenize_segments([Segment(prompt.conversation.turns[0].text, False, 0)], self.processor, sizes)
        ids, keys = tuple(draft.ids), tuple(image.key for image in images)
        nothing = (IGNORE_INDEX,) * len(ids)
        encoded = Encoded(ids, nothing, (0,) * len(ids), tuple(draft.image_spans), keys)
        encoded = cut_prompt(replace(encoded, image_sizes=kept_sizes(self.processor, sizes)), self.longest)
        return EncodedPrompt(encoded, images[: len(encoded.images)])


def _engine(loaded: LoadedModel, folder: Path, compat: frozenset[str]) -> LocalEngine:
    engine = LocalEngine(loaded.model, loaded.processor, max_tokens=MAX_TOKENS)
    reader = RecordedReader(loaded.processor, max_tokens=MAX_TOKENS)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    reader.longest = config.get("tokenizer_model_max_length") if "cut_prompt" in compat else None
    engine.reader = engine.scheduler.reader = reader
    return engine


def _answer(oracle: Oracle, engine: LocalEngine, case: dict[str, Any], longest: int) -> Completion | None:
    """Return our answer to the recorded prompt; None if we encode it as other ids."""
    processor = engine.processor
    text = PATCHED.sub(IMAGE_TOKEN, case["prompt"])
    images = tuple(oracle.images(case["id"])[: text.count(IMAGE_TOKEN)])
    prompt = Prompt(Conversation((Turn("human", text),)), images)
    if "template" in case:
        processor.use_template(fitting(case["template"])[0])
    ours = engine.reader.read(prompt).encoded.input_ids
    counts = processor.count_image_tokens(len(images), [image.size for image in images])
    theirs = expanded(processor, case["input_ids"], counts)
    if list(ours) != theirs[: len(ours)] or not ("cut_prompt" in oracle.compat or len(ours) == len(theirs)):
        return None
    engine.beams_count_prompt = "beams_count_prompt" in oracle.compat and _holds_prompt(case)
    return engine.generate([prompt], _sampling(case, longest))[0][0]


def _holds_prompt(case: dict[str, Any]) -> bool:
    """Return whether the recorded ids include the prompt, as transformers once returned them."""
    ids, prompt = case.get("output_ids", []), case["input_ids"]
    return bool(ids[: len(prompt)] == prompt)


def _sampling(case: dict[str, Any], longest: int) -> Sampling:
    """Return the recorded sampling; without a recorded length limit it is the longest answer of the file."""
    mode, options = case.get("mode", "greedy"), case.get("gen_kwargs") or {}
    beams = re.search(r"beam(\d+)", mode)
    return Sampling(
        max_new_tokens=options.get("max_new_tokens", longest),
        num_beams=options.get("num_beams", int(beams[1]) if beams else 1),
        repetition_penalty=options.get("repetition_penalty", PENALTIES.get(mode, 1.0)),
    )


def _new_ids(case: dict[str, Any]) -> list[int]:
    """Return the recorded ids without the prompt."""
    if "new_ids" in case:
        return list(case["new_ids"])
    ids, prompt = case["output_ids"], case["input_ids"]
    if _holds_prompt(case):
        return list(ids[len(prompt) :])
    return list(ids[1:] if ids[0] == prompt[0] and IMAGE_MARK not in ids else ids)


def answer_file(oracle: Oracle) -> Iterator[Line]:
    """Compare our answers to `questions.jsonl` with those of the original's evaluation program as text.

    Its token limit is not recorded, so the limit at which most answers are equal is used.
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
    # Ours drops the bytes of an incomplete character; the original shows them as a replacement character.
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
