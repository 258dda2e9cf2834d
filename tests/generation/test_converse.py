"""Dialogues against one prompt at a time: same tokens, kept ids, and only new tokens computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from llava.constants import IGNORE_INDEX
from llava.data.encode import continuation, encode_prompt
from llava.errors import ConfigError, DataError
from llava.generation.engine import LocalEngine
from llava.generation.protocol import Dialogue, Prompt, Sampling, Script
from llava.generation.stopping import AnswerText, StopRule
from llava.model.builder import LoadedModel
from llava.samples import Conversation, Turn
from tests.support.generation_tools import engine_of
from tests.support.tiny import tiny_image, tiny_llava

SAMPLING = Sampling(max_new_tokens=9, temperature=1.0, logprobs=True)
QUESTIONS = ("And its size?", "", "Is it round? Say yes or no.")


@pytest.fixture(scope="module", params=["vicuna_v1", "chatml", "llava_med_v1.5:v1"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return tiny_llava(seed=3, template=request.param)


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return tiny_llava(seed=3)


def script(number: int, *follow_ups: str, images: int = 1) -> Script:
    marks = "<image>\n" * images
    conversation = Conversation((Turn("human", f"{marks}Case {number}?"),))
    pictures = tuple(tiny_image(number + index) for index in range(images))
    return Script(conversation, follow_ups, pictures, seed=100 + number)


def scripts() -> list[Script]:
    return [script(0, *QUESTIONS), script(1), script(2, QUESTIONS[0], images=2), script(3, *QUESTIONS, images=0)]


@torch.no_grad()
def check(engine: LocalEngine, script: Script, dialogue: Dialogue, sampling: Sampling) -> None:
    """Compare a dialogue with a plain forward pass over its tokens."""
    encoded = dialogue.encoded
    reading = engine.reader.read(Prompt(script.conversation, script.images))
    prompt = reading.encoded
    assert encoded.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert encoded.images == prompt.images and encoded.image_spans == prompt.image_spans
    pixels = [engine.reader.pixels(image) for image in reading.images]
    shown = {"pixel_values": torch.stack(pixels)} if pixels else {}
    logits = engine.model(input_ids=torch.tensor([encoded.input_ids]), use_cache=False, **shown).logits[0].double()
    logits[:, engine.processor.image_token_id] = -torch.inf
    logprobs = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
    written = [place for place, label in enumerate(encoded.labels) if label != IGNORE_INDEX]
    wanted = [float(logprobs[place - 1, encoded.input_ids[place]]) for place in written]
    assert [value for turn in dialogue.logprobs for value in turn] == pytest.approx(wanted, abs=1e-5)
    first = len(script.conversation.turns)
    for number, values in enumerate(dialogue.logprobs):
        own = [place for place in written if encoded.turns[place] == first + 2 * number]
        assert len(own) == len(values)
        text = AnswerText(StopRule.of(engine.processor, sampling), engine.processor.decode)
        assert dialogue.texts[number] == text.final([encoded.input_ids[place] for place in own])


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_a_dialogue_holds_what_the_model_read_and_wrote(loaded: LoadedModel, layout: str) -> None:
    engine = engine_of(loaded, layout=layout, max_slots=3)
    for given, [dialogue] in zip(scripts(), engine.converse(scripts(), SAMPLING), strict=True):
        assert len(dialogue.texts) == len(dialogue.finishes) == len(dialogue.logprobs) == len(given.follow_ups) + 1
        assert set(dialogue.finishes) <= {"stop", "length"} and dialogue.error is None
        check(engine, given, dialogue, SAMPLING)
    assert not engine.scheduler.has_work


def test_both_runners_hold_the_same_dialogues(llama: LoadedModel) -> None:
    sampling = replace(SAMPLING, n=2, temperature=0.7)
    slots, padded = (engine_of(llama, layout=layout).converse(scripts(), sampling) for layout in ("tree", "padded"))
    for ours, theirs in zip(slots, padded, strict=True):
        assert [one.encoded for one in ours] == [one.encoded for one in theirs]
        assert ours[0].encoded != ours[1].encoded


def test_a_dialogue_goes_on_as_its_conversation_would(loaded: LoadedModel) -> None:
    """Every turn equals the answer to a prompt of the same ids."""
    engine = engine_of(loaded)
    sampling = Sampling(max_new_tokens=9)
    [[dialogue]] = engine.converse([script(0, *QUESTIONS)], sampling)
    turns: tuple[Turn, ...] = (Turn("human", "<image>\nCase 0?"),)
    for question, text in zip((*QUESTIONS, ""), dialogue.texts, strict=True):
        [[alone]] = engine.generate([Prompt(Conversation(turns), (tiny_image(0),))], sampling)
        assert alone.text == text
        if not text.isascii() or text != text.strip():
            break  # a torn character is not encoded to the same ids again
        turns = (*turns, Turn("gpt", text), Turn("human", question))


def test_later_turns_compute_only_their_own_tokens(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(llama)
    given = [script(number, *QUESTIONS) for number in range(3)]
    runner, towers = engine.scheduler.runner, []
    original = llama.model.model.get_image_features

    def counting(pixel_values: torch.Tensor, **options: Any) -> object:
        towers.append(len(pixel_values))
        return original(pixel_values, **options)

    monkeypatch.setattr(llama.model.model, "get_image_features", counting)
    prefill, num_prefilled = runner.prefill, []

    def silent(text: str) -> object:
        raise AssertionError("text was tokenized during a turn")

    def prefilling(sequences: Any, images: Any) -> Any:
        row = prefill(sequences, images)
        num_prefilled.append(runner.num_read)
        monkeypatch.setattr(engine.processor, "text", silent)
        return row

    monkeypatch.setattr(runner, "prefill", prefilling)
    found = [dialogue for [dialogue] in engine.converse(given, SAMPLING)]
    [start] = num_prefilled
    prompts = 0
    for dialogue in found:
        first = next(place for place, label in enumerate(dialogue.encoded.labels) if label != IGNORE_INDEX)
        prompts += len(dialogue.encoded.input_ids) - first - 1  # the last token is never read
    assert runner.num_read - start == prompts and sum(towers) == 3


def test_an_end_token_that_is_missing_is_added_without_label(loaded: LoadedModel) -> None:
    engine = engine_of(loaded)
    stop = min(engine.processor.stop_token_ids, key=lambda token: token != engine.processor.eos_token_id)
    [[cut]] = engine.converse([script(0, "Next?")], Sampling(max_new_tokens=3, temperature=1.0))
    assert cut.finishes[0] == "length"
    written = [place for place, label in enumerate(cut.encoded.labels) if label != IGNORE_INDEX]
    after = written[2] + 1
    assert cut.encoded.input_ids[after] in engine.processor.stop_token_ids
    assert cut.encoded.labels[after] == IGNORE_INDEX and stop in engine.processor.stop_token_ids
    before = replace(cut.encoded, input_ids=cut.encoded.input_ids[:after])
    ended = replace(cut.encoded, input_ids=(*cut.encoded.input_ids[:after], stop))
    ids = continuation(before, "Next?", engine.processor)
    assert ids[1:] == continuation(ended, "Next?", engine.processor)
    assert cut.encoded.input_ids[after : written[3]] == ids


def test_a_continuation_is_that_of_the_template(loaded: LoadedModel) -> None:
    turns = (Turn("human", "First?"), Turn("gpt", "An answer."), Turn("human", "Second, with more: words?"))
    whole = encode_prompt(Conversation(turns), loaded.processor)
    place = max(p for p, turn in enumerate(whole.turns) if turn == 1 and whole.input_ids[p] in _ends(loaded))
    answered = replace(whole, input_ids=whole.input_ids[: place + 1])
    assert continuation(answered, turns[2].text, loaded.processor) == whole.input_ids[place + 1 :]


def _ends(loaded: LoadedModel) -> tuple[int, ...]:
    return loaded.processor.stop_token_ids


def test_every_script_has_its_own_seed(llama: LoadedModel) -> None:
    engine = engine_of(llama)
    same = [replace(script(0, "Next?"), seed=seed) for seed in (5, 5, 6)]
    first, second, other = (one.encoded for [one] in engine.converse(same, SAMPLING))
    assert first == second and first != other
    [[alone]] = engine.converse(same[2:], SAMPLING)
    assert alone.encoded == other


def test_a_dialogue_that_outgrows_the_context_says_so(llama: LoadedModel) -> None:
    room = len(engine_of(llama).reader.read(Prompt(script(0).conversation, (tiny_image(0),))).encoded.input_ids)
    engine = engine_of(llama, max_tokens=room + 12)
    [[dialogue]] = engine.converse([script(0, "A question that is too long?", "x")], SAMPLING)
    assert dialogue.finishes[1:] == ("error", "error") and dialogue.texts[1:] == ("", "")
    assert "answer 1 has no room" in str(dialogue.error) and dialogue.finishes[0] in ("length", "stop")
    [[broken]] = engine.converse([replace(script(0, "x"), images=())], SAMPLING)
    assert broken.finishes == ("error", "error") and "placeholders" in str(broken.error)


def test_what_dialogues_cannot_do_is_refused(llama: LoadedModel) -> None:
    engine = engine_of(llama)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"top_k": 5}, "top_k=5"),
        ({"repetition_penalty": 1.5}, r"repetition_penalty=1\.5"),
        ({"top_logprobs": 2}, "top_logprobs=0, got 2"),
    ]
    for options, words in refused:
        with pytest.raises(ConfigError, match=words):
            engine.converse([script(0)], replace(SAMPLING, **options))
    with pytest.raises(ConfigError, match="num_beams"):
        engine.converse([script(0)], Sampling(num_beams=2))
    with pytest.raises(DataError, match="follow-up"):
        engine.converse([script(0, "<image>\nThis one?")], SAMPLING)
    with pytest.raises(DataError, match="ends answers"):
        engine.converse([script(0, "a</s>b")], SAMPLING)
    textual = LoadedModel(llama.model, llama.processor.changed(template="v0"), llama.context_len)
    with pytest.raises(ConfigError, match="'v0'"):
        engine_of(textual).converse([script(0, "Next?")], SAMPLING)
