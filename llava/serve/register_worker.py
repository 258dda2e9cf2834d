"""Registration of a worker with a controller by hand.

python -m llava.serve.register_worker --controller-address http://localhost:21001 --worker-name http://localhost:21002
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.serve.options import checked_url
from llava.utils.cli import Parser, run_program


def make_parser() -> Parser:
    """Return the argument parser of the command."""
    parser = Parser(
        prog="python -m llava.serve.register_worker",
        description="Register a worker with a controller.",
        epilog="example: python -m llava.serve.register_worker --controller-address http://localhost:10000 "
        "--worker-name http://localhost:40000",
    )
    parser.add_argument("--controller-address", default="http://localhost:21001", help="URL of the controller")
    parser.add_argument("--worker-name", required=True, help="URL of the worker")
    parser.add_switch("--check-heart-beat", help="drop the worker when it sends no heartbeats")
    parser.add_argument("--cluster-key", help="file with the key of the cluster; needed across machines")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Register a worker; status 2 with the reason if the controller refuses."""
    args = make_parser().parse_args(argv)
    from pathlib import Path

    from llava.errors import ConfigError
    from llava.serve.client import ServerClient
    from llava.serve.keys import read_cluster_key

    worker = checked_url(args.worker_name, "--worker-name")
    key = "" if args.cluster_key is None else read_cluster_key(Path(args.cluster_key))
    client = ServerClient(checked_url(args.controller_address, "--controller-address"), cluster_key=key)
    body = {"worker_name": worker, "check_heart_beat": args.check_heart_beat, "worker_status": None}
    client.post("/register_worker", body)
    if not client.is_known(worker):
        raise ConfigError(f"--worker-name {worker}: the controller cannot reach the worker, or it reports no status")


if __name__ == "__main__":
    run_program(main)
