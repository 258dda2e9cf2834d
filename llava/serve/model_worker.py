"""Worker of the original three processes: one model; also speaks the OpenAI protocol.

python -m llava.serve.model_worker --host 0.0.0.0 --controller http://localhost:10000 --port 40000 \\
    --worker http://localhost:40000 --model-path ./checkpoints/LLaVA-Med-7B --multi-modal
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from llava.generation.options import add_engine_options
from llava.serve.options import WITHOUT_EFFECT, add_guard_options, add_loading_names, add_queue_options, hangups_ignored
from llava.utils.cli import Parser, run_program

SPINS = "1000"
"""Spins of a waiting GNU OpenMP thread before it sleeps, unless GOMP_SPINCOUNT is set."""


def add_model_options(parser: Parser) -> None:
    """Add the options of the model that a worker serves."""
    add_engine_options(parser, names=("--model-path",))
    parser.add_argument("--model-name", help="name under which the model is served; default: from the folder")
    add_loading_names(parser)


FIRST_HELP = {
    "model": ("--model-path", "--model-name", "--device", "--dtype", "--weights", "--num-gpus"),
    "addresses": ("--host", "--port", "--worker-address", "--controller-address", "--no-register"),
    "access": ("--api-keys", "--cluster-key", "--allow-image-url", "--image-folder"),
    "limits": ("--max-running", "--max-waiting", "--request-timeout"),
    "records": ("--audit-file", "--log-content"),
}
"""Options that the short help shows."""


def make_parser() -> Parser:
    """Return the argument parser of the worker."""
    parser = Parser(
        prog="python -m llava.serve.model_worker",
        description="Serve a model.",
        epilog="example: python -m llava.serve.model_worker --model-path runs/first --port 40000 "
        "--controller-address http://localhost:10000",
    )
    parser.add_argument("--host", default="localhost", help="name or address to listen on")
    parser.add_argument("--port", type=int, default=21002, help="port to listen on")
    parser.add_argument("--worker-address", help="URL under which others reach this worker; default: from --port")
    parser.add_argument("--controller-address", default="http://localhost:21001", help="URL of the controller")
    parser.add_switch("--no-register", help="never contact a controller")
    add_model_options(parser)
    add_queue_options(parser)
    add_guard_options(parser)
    for name in WITHOUT_EFFECT:
        option = f"--{name.replace('_', '-')}"
        if name == "stream_interval":
            parser.add_argument(option, type=int, default=None, help="without effect")
        else:
            parser.add_switch(option, default=False, help="without effect")
    parser.show_first(FIRST_HELP)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a worker until a signal."""
    args = make_parser().parse_args(argv)
    # Before torch is loaded. OpenMP's threads spin while they wait, and keep a processor from the thread that they wait
    # for: with images being read beside the model, 32 answers took 11 s in place of 2.5.
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    with hangups_ignored():
        from llava.serve.worker_run import run_worker

        raise SystemExit(run_worker(args))


if __name__ == "__main__":
    run_program(main)
