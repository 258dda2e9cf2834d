"""Terminal chat with a rule-based engine."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from llava.errors import DataError, GenerationError
from llava.generation.protocol import Completion, Prompt, Sampling
from llava.serve.cli import Chat, chat_loop, make_parser


class Echo:
    """Engine that answers with the numbers of turns and images, one character at a time."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        raise NotImplementedError

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        self.prompts.append(prompt)
        if "fail" in prompt.conversation.turns[-1].text:
            raise GenerationError("no answer")
        text = f"turns {len(prompt.conversation.turns)}, images {len(prompt.images)}"
        yield from (text[:end] for end in range(1, len(text) + 1))


@pytest.fixture
def image_file(tmp_path: Path) -> str:
    path = tmp_path / "image.png"
    Image.new("RGB", (8, 8), (200, 10, 10)).save(path)
    return str(path)


def test_the_placeholder_is_in_the_first_question_only(image_file: str) -> None:
    engine = Echo()
    chat = Chat(engine, Sampling())
    chat.show(image_file)
    out = io.StringIO()
    assert chat.ask("What is this?", out) == "turns 1, images 1"
    assert chat.ask("And that?", out) == "turns 3, images 1"
    assert out.getvalue() == "turns 1, images 1\nturns 3, images 1\n"
    texts = [turn.text for turn in engine.prompts[-1].conversation.turns]
    assert texts == ["<image>\nWhat is this?", "turns 1, images 1", "And that?"]


def test_without_an_image_the_prompt_has_no_placeholder_but_the_system_prompt() -> None:
    engine = Echo()
    assert Chat(engine, Sampling(), system="Be short.").ask("Hello", io.StringIO()) == "turns 1, images 0"
    assert engine.prompts[0].conversation.turns[0].text == "Hello"
    assert engine.prompts[0].conversation.system == "Be short."


def test_commands(image_file: str) -> None:
    engine = Echo()
    out = io.StringIO()
    lines = [
        "one\n",
        "two\n",
        "/reset\n",
        "three\n",
        f"/image {image_file}\n",
        "four\n",
        "/what\n",
        "/quit\n",
        "never\n",
    ]
    chat_loop(Chat(engine, Sampling()), lines, out)
    sizes = [(len(prompt.conversation.turns), len(prompt.images)) for prompt in engine.prompts]
    assert sizes == [(1, 0), (3, 0), (1, 0), (1, 1)]
    assert "/reset" in out.getvalue()


def test_errors_are_shown_and_leave_the_conversation_as_it_was() -> None:
    engine = Echo()
    out = io.StringIO()
    chat = Chat(engine, Sampling())
    chat_loop(chat, ["one", "fail", "/image absent.png", "two", ""], out)
    assert "error: no answer" in out.getvalue() and "absent.png" in out.getvalue()
    assert len(engine.prompts[-1].conversation.turns) == 3
    with pytest.raises(DataError, match="/image FILE"):
        chat.ask("<image> again", out)


def test_both_spellings_of_the_options() -> None:
    args = make_parser().parse_args(["--model_path", "m", "--image-file", "i", "--max_new_tokens", "7"])
    assert (args.model, args.image, args.max_new_tokens) == ("m", "i", 7)


def test_options_of_the_original_command() -> None:
    words = (
        "--model-path m --model-base b --image-file i --device cpu --conv-mode v1 --temperature 0.2 --load-8bit --debug"
    )
    args = make_parser().parse_args(words.split())
    assert (args.model, args.model_base, args.conv_mode, args.bits) == ("m", "b", "v1", 8)
    old = make_parser().parse_args(["--model-name", "m", "--num-gpus", "1", "--conv-template", "v1"])
    assert (old.model, old.conv_mode, old.bits, old.num_gpus) == ("m", "v1", 16, 1)


@pytest.mark.parametrize("name", ["foo", "nn"])
def test_an_unknown_precision_is_a_usage_error(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--model", "m", "--dtype", name])
    assert "bfloat16" in capsys.readouterr().err
