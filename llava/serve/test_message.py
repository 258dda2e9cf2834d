"""Test message to a model: prints the models, the worker and the growing answer.

python -m llava.serve.test_message --model-name LLaVA-Med-7B --controller http://localhost:10000
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.errors import LlavaError
from llava.serve.options import checked_url
from llava.utils.cli import Parser, run_program
from llava.utils.terminal import visible_message, write_out

MESSAGE = "Tell me a story with more than 1000 words."


def make_parser() -> Parser:
    """Return the argument parser of the command."""
    parser = Parser(
        prog="python -m llava.serve.test_message",
        description="Send a test message to a model.",
        epilog="example: python -m llava.serve.test_message --model-name NAME --controller-address http://localhost:10000",
    )
    parser.add_argument("--controller-address", default="http://localhost:21001", help="URL of the controller")
    parser.add_argument("--worker-address", help="URL of a worker; default: the controller names one")
    parser.add_argument("--model-name", default="facebook/opt-350m", help="name of the model")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="largest number of tokens of the answer")
    parser.add_argument("--message", default=MESSAGE, help="the message")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Send a message and print the answer while it grows; status 1 with the reason without an answer."""
    args = make_parser().parse_args(argv)
    try:
        ask(args.controller_address, args.worker_address, args.model_name, args.message, args.max_new_tokens)
    except LlavaError as error:
        sys.stdout.flush()
        sys.stderr.write(f"llava: error: {visible_message(str(error))}\n")
        raise SystemExit(1) from None


def ask(controller: str, worker: str | None, model: str, message: str, max_new_tokens: int) -> str:
    """Print models, worker and answer; return the answer.

    Raises:
        ServerUnavailable: a server cannot be reached, or no worker serves the model.
        ServerRefusal: the worker answers with an error.
    """
    from llava.serve.client import ServerClient, ServerUnavailable

    address = worker
    if address is None:
        client = ServerClient(checked_url(controller, "--controller-address"))
        client.refresh()
        models = client.models()
        write_out(f"Models: {models}\n")
        address = client.worker_address(model)
        write_out(f"worker_addr: {address}\n")
        if not address:
            raise ServerUnavailable(f"--model-name {model}: no worker serves it; the models are {models}")
    answer = ""
    # The OpenAI protocol, because the worker knows the template of its model.
    body = {"model": model, "messages": [{"role": "user", "content": message}], "max_tokens": max_new_tokens}
    for chunk in ServerClient(checked_url(address, "--worker-address")).stream_chat(body):
        for choice in chunk.get("choices", []):
            piece = str(choice.get("delta", {}).get("content") or "")
            answer += piece
            write_out(piece)
            sys.stdout.flush()
    write_out("\n")
    return answer


if __name__ == "__main__":
    run_program(main)
