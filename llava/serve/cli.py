"""`llava chat`: questions about a picture in the terminal, answers as they are written.

llava chat --model runs/first --image picture.png
llava chat --model runs/first --image picture.png --question "What is shown?"

    typed line --> conversation so far + pictures --engine.stream--> answer --> joins the conversation
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError, LlavaError
from llava.generation.options import add_engine_options, engine_of
from llava.generation.protocol import Engine, ImageRef, Prompt, Sampling
from llava.imaging.decode import load as load_image
from llava.imaging.decode import read_bytes
from llava.samples import Conversation, Turn
from llava.utils.cli import Parser
from llava.utils.jsonl import read_text

HELP = """\
Ask a question and press enter. Commands:
  /image FILE   show another picture and begin anew
  /reset        begin anew with the same picture
  /help         this text
  /quit         end (so does an empty line or the end of input)
"""


@dataclass(slots=True)
class Chat:
    """A conversation about at most one picture; the picture's mark is in the first question."""

    engine: Engine
    sampling: Sampling
    image: ImageRef | None = None
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def show(self, path: str) -> None:
        """Take another picture and begin anew.

        Raises:
            DataError: the picture cannot be read.
        """
        self.image = read_picture(path)
        self.turns.clear()

    def ask(self, question: str, out: TextIO) -> str:
        """Write the answer to `out` while it grows, and keep question and answer in the conversation.

        Raises:
            GenerationError: no answer could be generated; the conversation stays as it was.
            DataError: the question writes an image mark itself.
        """
        if IMAGE_TOKEN in question:
            raise DataError(f"a question must not contain {IMAGE_TOKEN}; /image FILE shows a picture")
        mark = f"{IMAGE_TOKEN}\n" if self.image is not None and not self.turns else ""
        turns = [*self.turns, Turn("human", mark + question)]
        prompt = Prompt(Conversation(tuple(turns), self.system), () if self.image is None else (self.image,))
        answer = written = ""
        for answer in self.engine.stream(prompt, self.sampling):
            if answer.startswith(written):
                out.write(answer[len(written) :])
                out.flush()
                written = answer
        out.write("\n")
        self.turns = [*turns, Turn("gpt", answer)]
        return answer


def read_picture(path: str) -> bytes:
    """Return the bytes of a picture, which the model's processor decodes; it is decoded here once to complain early.

    Raises:
        DataError: the picture cannot be read.
    """
    content = read_bytes(path, None)
    try:
        load_image(content)
    except DataError as error:
        raise type(error)(str(error).replace("given as bytes", path, 1)) from error
    return content


def talk(chat: Chat, lines: Iterable[str], out: TextIO, *, prompt: str = "> ") -> None:
    """Answer lines until one is empty, says /quit, or there are no more; errors are shown and the talk goes on."""
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
            out.write(f"error: {error}\n")
        out.write(prompt)
        out.flush()


def make_parser() -> Parser:
    """Return the options of `llava chat`."""
    parser = Parser(prog="llava chat", description="Ask a model about a picture, in the terminal.")
    add_engine_options(parser)
    parser.add_argument("--image", "--image-file", help="picture to talk about")
    parser.add_argument("--question", help="ask this one question, print the answer and end")
    parser.add_argument("--system", help="file with a system text to use in the place of the template's")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of probability that is sampled from")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava chat`."""
    args = make_parser().parse_args(argv)
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed if args.temperature > 0 else None,
    )
    image = None if args.image is None else read_picture(args.image)
    system = None if args.system is None else read_text(args.system).strip()
    chat = Chat(engine_of(args), sampling, image, system)
    if args.question is not None:
        chat.ask(args.question, sys.stdout)
        return
    sys.stdout.write(f"{Path(args.model).resolve().name}{f' on {args.image}' if args.image else ''}\n{HELP}")
    talk(chat, sys.stdin, sys.stdout)
