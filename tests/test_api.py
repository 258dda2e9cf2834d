"""Python API on a tiny saved model: all forms of messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava import api
from llava.errors import DataError, GenerationError
from llava.generation.protocol import Prompt, Sampling
from llava.model.builder import LoadedModel
from llava.model.checkpoint.save import save_model
from llava.samples import Conversation, Turn
from tests.support.tiny import tiny_image, tiny_llava


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_llava(seed=3)


@pytest.fixture(scope="module")
def folder(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(loaded.model, loaded.processor, path)
    return path


@pytest.fixture(scope="module")
def assistant(folder: Path) -> api.LlavaPredictor:
    return api.load_predictor(folder, device="cpu")


def test_every_form_of_messages_says_the_same(assistant: api.LlavaPredictor, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    tiny_image(1).save(path)
    forms = [
        assistant.chat("What?", tiny_image(1), max_new_tokens=12),
        assistant.chat("What?", [path], max_new_tokens=12),
        assistant.chat("<image>\nWhat?", path.read_bytes(), max_new_tokens=12),
        assistant.chat([{"role": "user", "content": "What?"}], str(path), max_new_tokens=12),
        assistant.chat([Turn("human", "What?")], path, max_new_tokens=12),
    ]
    assert len(set(forms)) == 1
    assert "".join(assistant.stream("What?", path, max_new_tokens=12)) == forms[0]


def test_a_conversation_goes_on(assistant: api.LlavaPredictor) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Two?"},
    ]
    turns = (Turn("human", "<image>\nOne?"), Turn("gpt", "yes"), Turn("human", "Two?"))
    prompt = Prompt(Conversation(turns, "Be short."), (tiny_image(2),))
    [[expected]] = assistant.engine.generate([prompt], Sampling(max_new_tokens=12))
    assert assistant.chat(messages, tiny_image(2), max_new_tokens=12) == expected.text


def test_a_score_is_of_the_answer_alone(assistant: api.LlavaPredictor) -> None:
    messages = [Turn("human", "One?"), Turn("gpt", "long before"), Turn("human", "Two?")]
    score = assistant.score(messages, "yes", tiny_image(0))
    assert list(score.turns) == [3] and score.num_tokens == len(" yes") + 1
    assert score.logprob == pytest.approx(sum(score.turns.values()))
    [[answer]] = assistant.engine.generate(
        [Prompt(Conversation((Turn("human", "One?"),)))], Sampling(max_new_tokens=3, logprobs=True)
    )
    assert answer.logprobs is not None and assistant.score("One?", "zzz").logprob < sum(answer.logprobs)


@pytest.mark.parametrize(
    ("messages", "images", "words"),
    [
        ("<image> <image>", ["a.png"], "2 <image> placeholders for 1"),
        ([{"role": "user"}], [], "message 0"),
        ([{"role": "robot", "content": "a"}], [], r"message 0: expected .* got dict of length 2$"),
        ([Turn("human", "a"), Turn("gpt", "b")], [], "question"),
        ([Turn("human", "a"), Turn("human", "b")], [], "message 1"),
        ([Turn("human", "a"), {"role": "system", "content": "late"}], [], "first message"),
        ([], [], "question"),
    ],
)
def test_messages_that_cannot_be_used(
    assistant: api.LlavaPredictor, messages: api.Messages, images: list[str], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        assistant.chat(messages, images)


def test_a_missing_image_is_an_error_that_names_the_request(assistant: api.LlavaPredictor) -> None:
    with pytest.raises(GenerationError, match=r"request 1: .*absent\.png"):
        assistant.chat_many([("a?", ()), ("b?", "absent.png")], max_new_tokens=2)
