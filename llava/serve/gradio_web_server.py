"""Web page of the original three processes.

python -m llava.serve.gradio_web_server --controller http://localhost:10000
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava.serve.options import hangups_ignored
from llava.utils.cli import Parser, run_program


def make_parser() -> Parser:
    """Return the argument parser of the page."""
    parser = Parser(
        prog="python -m llava.serve.gradio_web_server",
        description="Web page for chats about images.",
        epilog="example: python -m llava.serve.gradio_web_server --controller-url http://localhost:10000",
    )
    parser.add_argument("--host", default="127.0.0.1", help="name or address to listen on")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.add_argument("--controller-url", default="http://localhost:21001", help="URL of the controller")
    parser.add_argument("--concurrency-count", type=int, default=10, help="answers that run at a time")
    parser.add_argument(
        "--model-list-mode", choices=["once", "reload"], default="reload", help="when the models are asked for"
    )
    parser.add_argument("--public-host", action="append", default=[], help="host name under which browsers ask; repeat")
    parser.add_switch("--embed", help="leave out title and notice, for a page inside another one")
    parser.add_switch("--log-conversations", help="store conversations and votes; they identify patients")
    parser.add_argument("--log-folder", type=Path, default=Path("."), help="folder of --log-conversations")
    parser.add_argument("--drain-seconds", type=float, default=30.0, help="time of running answers after SIGTERM")
    parser.add_switch("--share", help="without effect: the page is never published elsewhere")
    parser.add_switch("--moderate", help="without effect: texts are never sent elsewhere")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the page until a signal."""
    args = make_parser().parse_args(argv)
    with hangups_ignored():
        from llava.serve.page_run import run_page

        raise SystemExit(run_page(args))


if __name__ == "__main__":
    run_program(main)
