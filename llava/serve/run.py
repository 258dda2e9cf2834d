"""`llava serve`: controller, worker and page as one service that restarts failed processes and drains.

llava serve --model-path runs/first --port 8000
    python -m llava.serve.controller          http://127.0.0.1:8000/v1
    python -m llava.serve.model_worker        http://127.0.0.1:8001
    python -m llava.serve.gradio_web_server   http://127.0.0.1:8002
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from llava.errors import ConfigError, MissingDependency
from llava.generation.options import IMAGE_HELP, MORE_MODEL_HELP
from llava.serve.model_worker import add_model_options
from llava.serve.options import (
    add_guard_options,
    add_queue_options,
    check_guards,
    checked_port,
    hangups_ignored,
    url_of,
)
from llava.serve.supervisor import Service, Supervisor
from llava.utils.cli import Parser
from llava.utils.config_file import with_config
from llava.utils.log import setup_logging

LOOPBACK = "127.0.0.1"

FIRST_HELP = {
    "model": ("--model-path", "--model-name", "--device", "--dtype", "--weights", "--num-gpus"),
    "addresses": ("--host", "--port", "--page-port", "--no-page"),
    "access": ("--public-host", "--api-keys", "--allow-image-url", "--image-folder"),
    "limits": ("--max-running", "--max-waiting", "--request-timeout", "--max-body-mb"),
    "records": ("--audit-file", "--log-content", "--log-conversations"),
}
"""Options that `llava serve --help` shows."""

MORE_HELP = {
    "model": (*MORE_MODEL_HELP, "--load-8bit", "--load-4bit"),
    "images": (*IMAGE_HELP, "--max-images", "--max-pixels"),
    "addresses": ("--worker-port",),
    "access": ("--cluster-key", "--cors-origin"),
    "limits": ("--kv-cache-mb", "--prefix-cache-mb", "--prefill-chunk", "--share-prefix-cache", "--drain-seconds"),
    "records": ("--log-folder",),
}  # fmt: skip
"""Options that `llava serve --help all` shows too, by the same topics."""


def make_parser() -> Parser:
    """Return the argument parser of `llava serve`."""
    parser = Parser(prog="llava serve", description="Serve a model: API, worker and web page.")
    parser.add_argument("--host", default=LOOPBACK, help="address of API and page; the worker stays on loopback")
    parser.add_argument("--port", type=int, default=8000, help="port of the API")
    parser.add_argument("--worker-port", type=int, help="port of the worker; default: --port + 1")
    parser.add_argument("--page-port", type=int, help="port of the page; default: --port + 2")
    parser.add_switch("--no-page", help="start no web page")
    parser.add_switch("--log-conversations", help="store votes and conversations of the page; they identify patients")
    parser.add_argument("--log-folder", type=Path, default=Path("."), help="folder of --log-conversations")
    add_model_options(parser)
    add_queue_options(parser)
    add_guard_options(parser)
    parser.show_first(FIRST_HELP, MORE_HELP)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava serve` until a signal."""
    parser = make_parser()
    args = parser.parse_args(with_config(parser, argv))
    setup_logging()
    with hangups_ignored():
        services = services_of(args)
        raise SystemExit(Supervisor(services, ready_line(args, services), drain_seconds=args.drain_seconds).run())


def ready_line(args: argparse.Namespace, services: Sequence[Service]) -> str:
    """Return the line that is printed once everything answers."""
    urls = {service.name: service.url for service in services}
    page = f" page={urls['page']}" if "page" in urls else ""
    return f"ready api={urls['controller']}/v1{page}"


def services_of(args: argparse.Namespace) -> list[Service]:
    """Return the processes to run.

    Raises:
        ConfigError: an option is wrong, a port is taken, or the checkpoint does not exist.
        MissingDependency: a package of the extra is missing.
    """
    check_guards(args)
    _check_packages(has_page=not args.no_page)
    _check_model(args.model)
    port = checked_port(args.port)
    worker_port = checked_port(args.port + 1 if args.worker_port is None else args.worker_port, "--worker-port")
    page_port = checked_port(args.port + 2 if args.page_port is None else args.page_port, "--page-port")
    used = [(args.host, port), (LOOPBACK, worker_port), *([] if args.no_page else [(args.host, page_port)])]
    if len({number for _, number in used}) < len(used):
        raise ConfigError(f"--port {port}, --worker-port {worker_port} and --page-port {page_port} must differ")
    _check_ports(used)
    name = "127.0.0.1" if args.host in ("0.0.0.0", "") else args.host
    api, worker = url_of(name, port), url_of(LOOPBACK, worker_port)
    guards = words_of(add_guard_options, args)
    controller_words = ["--host", args.host, "--port", str(port), *guards]
    worker_words = ["--host", LOOPBACK, "--port", str(worker_port), "--controller-address", api]
    worker_words += ["--worker-address", worker, *words_of(add_model_options, args)]
    worker_words += [*words_of(add_queue_options, args), *guards]
    services = [
        Service("controller", "llava.serve.controller", controller_words, api, ready_path="/ready"),
        Service("worker", "llava.serve.model_worker", worker_words, worker, ready_path="/ready"),
    ]
    if not args.no_page:
        page_words = ["--host", args.host, "--port", str(page_port), "--controller-url", api]
        page_words += [word for host in args.public_host for word in ("--public-host", host)]
        page_words += ["--drain-seconds", str(args.drain_seconds), "--log-folder", str(args.log_folder)]
        page_words += ["--log-conversations"] if args.log_conversations else []
        services.append(
            Service("page", "llava.serve.gradio_web_server", page_words, url_of(name, page_port), ready_path="/ready")
        )
    return services


def words_of(add_options: Callable[[Parser], None], args: argparse.Namespace) -> list[str]:
    """Return the words of a command line that give a child the options that `add_options` adds."""
    parser = Parser(add_help=False)
    add_options(parser)
    words: list[str] = []
    done: set[str] = set()
    for action in parser._actions:
        value = getattr(args, action.dest)
        if action.dest in done:
            continue  # alias for the same value
        done.add(action.dest)
        if value == action.default:
            continue
        words += [f"{action.option_strings[0]}={one}" for one in (value if isinstance(value, list) else [value])]
    return words


def _check_packages(*, has_page: bool) -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client", *(["gradio"] if has_page else [])):
        if importlib.util.find_spec(package) is None:
            more = "; or pass --no-page" if package == "gradio" else ""
            raise MissingDependency(f"{package} is required; install it with: pip install 'llava[serve]'{more}")


def _check_model(path: str) -> None:
    is_path = path.startswith((".", "/", "~")) or path.count("/") != 1
    if is_path and not Path(path).exists():
        raise ConfigError(f"--model-path {path} does not exist; expected the folder of a checkpoint")


def _check_ports(used: Sequence[tuple[str, int]]) -> None:
    from llava.serve.listen import bind

    for host, port in used:
        for made in bind(host, port):
            made.close()
