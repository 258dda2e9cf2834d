"""Controller of the original three processes; also speaks the OpenAI protocol.

python -m llava.serve.controller --host localhost --port 21001 --dispatch-method shortest_queue
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence

from llava.serve.options import add_guard_options, checked_port, hangups_ignored, url_of
from llava.serve.registry import DISPATCH, Registry
from llava.utils.cli import Parser, run_program
from llava.utils.log import setup_logging
from llava.utils.lookup import require


def make_parser() -> Parser:
    """Return the argument parser of the controller."""
    parser = Parser(
        prog="python -m llava.serve.controller",
        description="Pass requests on to workers.",
        epilog="example: python -m llava.serve.controller --host 0.0.0.0 --port 10000",
    )
    parser.add_argument("--host", default="localhost", help="name or address to listen on")
    parser.add_argument("--port", type=int, default=21001, help="port to listen on")
    parser.add_argument(
        "--dispatch-method", choices=sorted(DISPATCH), default="shortest_queue", help="choice of a worker"
    )
    parser.add_argument(
        "--affinity-slack",
        type=int,
        default=4,
        help="requests by which the queue of the worker that has an image may be longer than the shortest one",
    )
    add_guard_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a controller until a signal."""
    args = make_parser().parse_args(argv)
    with hangups_ignored():
        raise SystemExit(run_controller(args))


def run_controller(args: argparse.Namespace) -> int:
    """Pass requests on to workers until a signal; return the exit status.

    Raises:
        ConfigError: an option is wrong, or the port is taken.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "serve")
    from llava.serve.controller_app import Controller, make_controller_app
    from llava.serve.guards import gate_settings
    from llava.serve.listen import PASSING_SECONDS, ServerRun, bind

    setup_logging()
    settings = gate_settings(args, urls=[url_of(args.host, args.port)])
    registry = Registry(
        time.monotonic, args.dispatch_method, draw=random.Random(), affinity_slack=max(0, args.affinity_slack)
    )
    sockets = bind(args.host, checked_port(args.port))
    controller = Controller(registry, settings, tuple(args.cors_origin))
    run = ServerRun(
        make_controller_app(controller),
        controller.admission,
        drain_seconds=args.drain_seconds + PASSING_SECONDS,
        keys=settings.keys,
        on_start=controller.watch,
    )
    return run.run(sockets, url=url_of(args.host, sockets[0].getsockname()[1]))


if __name__ == "__main__":
    run_program(main)
