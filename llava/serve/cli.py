"""Terminal chat about an image (`llava chat`).

A conversation continues until `/reset` or `/image`.

    llava chat --model runs/first --image xray.png
    llava chat --model runs/first --image xray.png --question "What is shown?"
    llava chat --engine http://localhost:8000/v1 --image xray.png
    python -m llava.serve.cli --model-path runs/first --image-file xray.png

    typed line --> conversation so far + image --engine.stream--> answer --> appended to the conversation
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError, LlavaError
from llava.generation.options import IMAGE_HELP, MORE_MODEL_HELP, add_engine_options, connected, engine_of
from llava.generation.protocol import Engine, ImageRef, Prompt, Sampling
from llava.imaging.decode import load_image, read_image_bytes
from llava.samples import Conversation, Turn
from llava.serve.options import add_loading_names
from llava.utils.cli import Parser, run_program
from llava.utils.config_file import with_config
from llava.utils.jsonl import read_text
from llava.utils.terminal import visible_message, write_out

HELP = """\
Ask a question and press enter. Commands:
  /image FILE   load another image and start a new conversation
  /reset        start a new conversation with the same image
  /help         show this text
  /quit         end the chat (as does an empty line or the end of input)
"""


@dataclass(slots=True)
class Chat:
    """Conversation about at most one image, whose placeholder is in the first question."""

    engine: Engine
    sampling: Sampling
    image: ImageRef | None = None
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def show(self, path: str) -> None:
        """Load another image and start a new conversation.

        Raises:
            DataError: the image cannot be read.
        """
        self.image = read_image(path)
        self.turns.clear()

    def ask(self, question: str, out: TextIO) -> str:
        """Write the answer to `out` while it is generated, and append question and answer to the conversation.

        Raises:
            GenerationError: no answer could be generated; the conversation is unchanged.
            DataError: the question contains an image placeholder.
        """
        if IMAGE_TOKEN in question:
            raise DataError(f"the question contains {IMAGE_TOKEN}; remove it, and use /image FILE to load an image")
        placeholder = f"{IMAGE_TOKEN}\n" if self.image is not None and not self.turns else ""
        turns = [*self.turns, Turn("human", placeholder + question)]
        prompt = Prompt(Conversation(tuple(turns), self.system), () if self.image is None else (self.image,))
        answer = written = ""
        for answer in self.engine.stream(prompt, self.sampling):
            if answer.startswith(written):
                write_out(answer[len(written) :], out)
                out.flush()
                written = answer
        out.write("\n")
        self.turns = [*turns, Turn("gpt", answer)]
        return answer


def read_image(path: str) -> bytes:
    """Return the bytes of an image file.

    Raises:
        DataError: the image cannot be read.
    """
    content = read_image_bytes(path, None)
    try:
        load_image(content)  # the processor decodes it again; this reports errors before a model is loaded
    except DataError as error:
        raise type(error)(str(error).replace("given as bytes", path, 1)) from error
    return content


def chat_loop(chat: Chat, lines: Iterable[str], out: TextIO, *, prompt: str = "> ") -> None:
    """Answer lines until an empty line, /quit or end of input; errors are shown and the chat continues."""
    out.write(prompt)
    out.flush()
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        if command in ("", "/quit"):
            return
        try:
            if command == "/image":
                chat.show(rest.strip())
            elif command == "/reset":
                chat.turns.clear()
            elif command.startswith("/"):
                out.write(HELP)
            else:
                chat.ask(line.strip(), out)
        except LlavaError as error:
            out.write(f"error: {visible_message(str(error))}\n")
        out.write(prompt)
        out.flush()


FIRST_HELP = {
    "model": ("--model", "--engine", "--device", "--dtype", "--weights"),
    "chat": ("--image", "--question", "--system", "--max-new-tokens", "--temperature"),
}
"""Options that `llava chat --help` shows."""

MORE_HELP = {
    "model": (*MORE_MODEL_HELP, "--conv-template", "--load-8bit", "--load-4bit", "--num-gpus"),
    "chat": ("--top-p", "--seed", "--debug"),
    "images": IMAGE_HELP,
}
"""Options that `llava chat --help all` shows too, by the same topics."""


def make_parser() -> Parser:
    """Return the argument parser of `llava chat`."""
    parser = Parser(prog="llava chat", description="Chat with a model about an image in the terminal.")
    add_engine_options(parser, remote=True)
    add_loading_names(parser)
    parser.add_argument("--conv-template", dest="conv_mode", help="as --conv-mode")
    parser.add_switch("--debug", help="without effect")
    parser.add_argument("--image", "--image-file", help="image file")
    parser.add_argument("--question", help="ask one question, print the answer and exit")
    parser.add_argument("--system", help="text file that replaces the template's system prompt")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 for greedy decoding")
    parser.add_argument("--top-p", type=float, default=1.0, help="probability mass for nucleus sampling")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="maximum number of tokens in an answer")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    parser.show_first(FIRST_HELP, MORE_HELP)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava chat`."""
    parser = make_parser()
    args = connected(parser.parse_args(with_config(parser, argv)))
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed if args.temperature > 0 else None,
    )
    image = None if args.image is None else read_image(args.image)
    system = None if args.system is None else read_text(args.system).strip()
    # As a server does, so that later turns compute only their own tokens and answers are the same.
    engine = engine_of(args, num_gpus=args.num_gpus, prefill_chunk=512, prefix_cache_mb=512, is_fixed=True)
    chat = Chat(engine, sampling, image, system)
    if args.question is not None:
        chat.ask(args.question, sys.stdout)
        return
    write_out(f"{Path(args.model).resolve().name}{f' on {args.image}' if args.image else ''}\n{HELP}")
    chat_loop(chat, sys.stdin, sys.stdout)


if __name__ == "__main__":
    run_program(main)
