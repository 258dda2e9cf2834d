"""Recorded generations: greedy, beams, repetition penalty."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.fidelity.folder import IMAGE_MARK, MAX_LISTED, Differences, Line, Oracle, mismatches
from benchmarks.fidelity.numbers import expanded, inputs_of, row_output
from benchmarks.fidelity.original_rows import sentencepiece_of
from benchmarks.fidelity.texts import templates_of
from llava.chat_template import Segment
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN
from llava.data.encode import Encoded, kept_sizes, tokenize_segments
from llava.generation.beam_search import penalize_repeats
from llava.generation.engine import LocalEngine
from llava.generation.prompt_encoder import EncodedPrompt, PromptReader, cut_prompt, sizes_of
from llava.generation.protocol import Completion, Prompt, Sampling
from llava.model.builder import LoadedModel
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation, Turn

MARGIN = 1e-3
"""If the two best logits differ by less than this, rounding may decide, so the case cannot fail."""

MARGIN_TOLERANCE = 2e-4
"""Tolerance of a recorded margin: that of two logits."""

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

SETTINGS = ("mode", "template", "gen_kwargs")
"""Recorded settings of a case that have a default."""

PENALTIES = {"rep": 1.3}
"""Repetition penalties of recorded modes that do not state theirs."""


@dataclass(frozen=True)
class Run:
    """Recorded case of `generate.json`, and what our model does with it.

    Attributes:
        case: the recorded case.
        ours: our answer; None if we encode the prompt as other ids.
        margins: margin of the two likeliest tokens that we compute before each recorded token, up to an image token.
        num_compared: number of recorded tokens before an image token, which the originals could generate and we never.
    """

    case: dict[str, Any]
    ours: tuple[int, ...] | None
    margins: tuple[float, ...]
    num_compared: int

    @property
    def is_equal(self) -> bool:
        """Whether our tokens are the recorded ones, up to a generated image token."""
        recorded = _new_ids(self.case)
        if self.ours is None:
            return False
        if self.num_compared < len(recorded):
            return list(self.ours[: self.num_compared]) == recorded[: self.num_compared]
        return list(self.ours) == recorded

    @property
    def name(self) -> str:
        """Name of the case in the report."""
        return f"{self.case['id']}{'/' + self.case['template'] if 'template' in self.case else ''}"


def generation(oracle: Oracle) -> Iterator[Line]:
    """Compare the new token ids and margins of every case of `generate.json`, by mode and by checkpoint."""
    _check_settings(oracle.json("generate.json"))
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    longest = max((len(_new_ids(case)) for case in oracle.json("generate.json")), default=0)
    for case in oracle.json("generate.json"):
        groups.setdefault((case.get("checkpoint", ""), case.get("mode", "greedy")), []).append(case)
    for (checkpoint, mode), cases in groups.items():
        name = f"{mode} {checkpoint.rpartition('/')[2]}".rstrip()
        runs = _runs(oracle, checkpoint, cases, longest)
        unequal = [run for run in runs if not run.is_equal]
        # Only margins that we compute ourselves can excuse another token.
        wrong = [run.name for run in unequal if run.ours is None or not min(run.margins) < MARGIN]
        note = f"{len(cases) - len(unequal)} of {len(cases)} equal"
        note += f", {len(unequal) - len(wrong)} where rounding decides" if len(unequal) > len(wrong) else ""
        num_cut = sum(run.num_compared < len(_new_ids(run.case)) for run in runs)
        note += f", {num_cut} up to a generated image token" if num_cut else ""
        unread = sum(run.ours is None for run in runs)
        note += f", {unread} prompts read otherwise" if unread else ""
        num_ids = sum(len(_new_ids(case)) for case in cases)
        yield mismatches(f"generated ids {name}", wrong, note, count=num_ids)
        if any("text" in case for case in cases):
            yield _texts(oracle, checkpoint, name, cases)
        yield from _margins(name, runs)


def _check_settings(cases: Sequence[dict[str, Any]]) -> None:
    """Check that cases state the same settings: the default of one that a single case lacks may give the same answer.

    Raises:
        ValueError: some cases state a setting and some do not.
    """
    for name in SETTINGS:
        lacking = [str(number) for number, case in enumerate(cases) if name not in case]
        if 0 < len(lacking) < len(cases):
            raise ValueError(f"{name} is stated by other cases but not by {', '.join(lacking[:MAX_LISTED])}")


def _runs(oracle: Oracle, checkpoint: str, cases: Sequence[dict[str, Any]], longest: int) -> list[Run]:
    """Return our answers to recorded cases, and our margins."""
    folder = oracle.model(checkpoint or None)
    loaded = oracle.loaded(folder)
    engines: dict[tuple[str | None, bool], LocalEngine] = {}
    runs = []
    for case in cases:
        way = case.get("template"), "beams_count_prompt" in oracle.compat and _holds_prompt(case)
        if way not in engines:
            engines[way] = _engine(loaded, folder, oracle.compat, template=way[0], beams_count_prompt=way[1])
        found, prompt = _answer(oracle, engines[way], case, longest)
        margins = () if prompt is None else _margins_of(loaded, prompt, case)
        new, image_token = _new_ids(case), loaded.processor.image_token_id
        until = new.index(image_token) if image_token in new else len(new)
        runs.append(Run(case, None if found is None else found.token_ids, margins, until))
    return runs


def _margins_of(loaded: LoadedModel, prompt: EncodedPrompt, case: dict[str, Any]) -> tuple[float, ...]:
    """Return the margins of the two likeliest tokens before each token of the recorded answer."""
    image_token = loaded.processor.image_token_id
    new = _new_ids(case)
    new = new[: new.index(image_token) + 1] if image_token in new else new
    contents = [image.content for image in prompt.images if isinstance(image.content, Image.Image)]
    images = inputs_of(loaded.processor, contents) if contents else {}
    with torch.no_grad():
        scores = row_output(loaded, [*prompt.encoded.input_ids, *new[:-1]], images).logits[0, -max(1, len(new)) :]
    if image_token == scores.shape[1] - 1:  # our placeholder, which the original's vocabulary lacks
        scores = scores[:, :image_token]
    before = [new[:number] for number in range(len(scores))]
    best = penalize_repeats(scores.float(), before, _sampling(case, 1).repetition_penalty).topk(2, dim=1).values
    return tuple((best[:, 0] - best[:, 1]).tolist())


def _margins(name: str, runs: Sequence[Run]) -> Iterator[Line]:
    """Compare the recorded margins, the smallest along each answer.

    Those of a beam search are also over the beams that were dropped, so only the first margin bounds them; so does the
    first part of an answer with an image token, which cannot be fed to our model.
    """
    found, bounded = Differences(), []
    for run in runs:
        recorded = run.case.get("min_top2_margin")
        if recorded is None or not run.margins:
            continue
        if len(run.margins) == max(1, len(_new_ids(run.case))) and _sampling(run.case, 1).num_beams == 1:
            found.add(min(run.margins), recorded)
        else:
            bounded.append((run.name, 0 < recorded <= run.margins[0] + MARGIN_TOLERANCE))
    if found.num_compared:
        yield found.line(f"margins {name}", MARGIN_TOLERANCE)
    if bounded:
        wrong = [where for where, is_within in bounded if not is_within]
        yield mismatches(f"bounds of margins {name}", wrong, f"{len(bounded)} values", count=len(bounded))


def _texts(oracle: Oracle, checkpoint: str, name: str, cases: Sequence[dict[str, Any]]) -> Line:
    """Compare the recorded text of the recorded ids."""
    processor = oracle.loaded(oracle.model(checkpoint or None)).processor
    wrong = [case["id"] for case in cases if not _is_text(processor, case)]
    return mismatches(f"generated text {name}", wrong, f"{len(cases)} texts", count=len(cases))


def _is_text(processor: LlavaMedProcessor, case: dict[str, Any]) -> bool:
    """Return whether the recorded text is that of the ids, apart from incomplete characters and white space."""
    ids = _new_ids(case)
    texts = [processor.tokenizer.decode(ids, skip_special_tokens=True), _sentencepiece_text(processor, ids)]
    stop = case.get("stop") or ""
    ends = {_plain(part) for text in texts for part in (text, text.strip().removesuffix(stop))}
    return _plain(case["text"]) in ends


def _sentencepiece_text(processor: LlavaMedProcessor, ids: Sequence[int]) -> str:
    """Return the text of ids as the slow tokenizers of the originals write it; empty without a sentencepiece model."""
    model = sentencepiece_of(processor)
    if model is None:
        return ""
    text, run = "", list[int]()
    for token in ids:
        if token < model.get_piece_size():
            run += [] if model.is_control(token) or model.is_unknown(token) else [token]
            continue
        text += model.decode(run) + str(processor.tokenizer.convert_ids_to_tokens(token))
        run = []
    return text + str(model.decode(run))


def _plain(text: str) -> str:
    return "".join(text.replace(HALF, "").split())


class RecordedReader(PromptReader):
    """Encoder of the text of a recorded prompt as it is, without our template."""

    def read(self, prompt: Prompt) -> EncodedPrompt:
        """Return tokens and images of a prompt whose only turn is the whole text, up to the longest input."""
        whole = self.uncut(prompt)
        encoded = cut_prompt(whole.encoded, self.longest)
        return EncodedPrompt(encoded, whole.images[: len(encoded.images)])

    def uncut(self, prompt: Prompt) -> EncodedPrompt:
        """Return all tokens and images of a prompt whose only turn is the whole text."""
        images = tuple(self._image(image) for image in prompt.images)
        sizes = sizes_of(images)
        draft = tokenize_segments([Segment(prompt.conversation.turns[0].text, False, 0)], self.processor, sizes)
        ids, keys = tuple(draft.ids), tuple(image.key for image in images)
        nothing = (IGNORE_INDEX,) * len(ids)
        encoded = Encoded(ids, nothing, (0,) * len(ids), tuple(draft.image_spans), keys)
        return EncodedPrompt(replace(encoded, image_sizes=kept_sizes(self.processor, sizes)), images)


def _engine(
    loaded: LoadedModel, folder: Path, compat: frozenset[str], *, template: str | None, beams_count_prompt: bool
) -> LocalEngine:
    processor = loaded.processor.changed(template=None if template is None else templates_of(template)[0])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    longest = config.get("tokenizer_model_max_length") if "cut_prompt" in compat else None
    reader = RecordedReader(processor, max_tokens=MAX_TOKENS, longest=longest)
    return LocalEngine(loaded.model, processor, reader=reader, beams_count_prompt=beams_count_prompt)


def _answer(
    oracle: Oracle, engine: LocalEngine, case: dict[str, Any], longest: int
) -> tuple[Completion | None, EncodedPrompt | None]:
    """Return our answer to the recorded prompt, and the prompt; None if we encode it as other ids."""
    processor = engine.processor
    text = PATCHED.sub(IMAGE_TOKEN, case["prompt"])
    images = tuple(oracle.images(case["id"])[: text.count(IMAGE_TOKEN)])
    prompt = Prompt(Conversation((Turn("human", text),)), images)
    assert isinstance(engine.reader, RecordedReader)
    ours = list(engine.reader.uncut(prompt).encoded.input_ids)
    counts = processor.count_image_tokens(len(images), [image.size for image in images])
    if ours != expanded(processor, case["input_ids"], counts):
        return None, None
    return engine.generate([prompt], _sampling(case, longest))[0][0], engine.reader.read(prompt)


def _holds_prompt(case: dict[str, Any]) -> bool:
    """Return whether the recorded ids include the prompt, as transformers once returned them."""
    ids, prompt = case.get("output_ids", []), case["input_ids"]
    return bool(ids[: len(prompt)] == prompt)


def _sampling(case: dict[str, Any], longest: int) -> Sampling:
    """Return the recorded sampling; without a recorded length limit it is the longest answer of the file.

    Raises:
        ValueError: the recorded mode is unknown, or contradicts the recorded options.
    """
    mode, options = case.get("mode", "greedy"), case.get("gen_kwargs") or {}
    beams = re.fullmatch(r"beam(\d+)", mode)
    if beams is None and mode not in ("greedy", *PENALTIES):
        raise ValueError(f"the recorded mode {mode!r} is unknown; known are greedy, beam<N>, {', '.join(PENALTIES)}")
    num_beams = int(beams[1]) if beams else 1
    penalty = options.get("repetition_penalty", PENALTIES.get(mode, 1.0))
    if options.get("num_beams", num_beams) != num_beams or (penalty != 1.0) != (mode in PENALTIES):
        raise ValueError(f"the recorded mode {mode!r} contradicts the recorded options {options}")
    return Sampling(
        max_new_tokens=options.get("max_new_tokens", longest), num_beams=num_beams, repetition_penalty=penalty
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
    questions = oracle.lines(QUESTIONS)
    recorded = {str(row["question_id"]): row["text"].strip() for row in oracle.lines(ANSWERS)}
    loaded = oracle.loaded(oracle.model())
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
    asked = {str(row["question_id"]): row["text"].replace(IMAGE_TOKEN, "").strip() for row in questions}
    prompts = {str(row["question_id"]): row.get("prompt") for row in oracle.lines(ANSWERS)}
    wrong += [key for key in asked.keys() | prompts.keys() if asked.get(key) != prompts.get(key) and key not in wrong]
    yield mismatches("answers", wrong, note, count=len(recorded))


def _question(oracle: Oracle, row: dict[str, Any]) -> Prompt:
    images = row.get("image") or []
    names = [images] if isinstance(images, str) else images
    text = row["text"].replace(IMAGE_TOKEN, "").strip()
    marked = f"{IMAGE_TOKEN}\n" * len(names) + text
    return Prompt(Conversation((Turn("human", marked),)), tuple(str(oracle.path / "images" / name) for name in names))
