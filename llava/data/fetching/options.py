"""The flags that every downloading command has, and what becomes of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from llava.data.download.client import NetworkOptions
from llava.data.download.url_policy import check_base, split_bases
from llava.utils.cli import Parser

DEFAULTS = NetworkOptions()


def add_network_options(parser: Parser) -> None:
    """Add the flags of `NetworkOptions`."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--rate", type=float, default=DEFAULTS.per_second, help="requests a second and host; 0: no limit"
    )
    group.add_argument(
        "--max-attempts",
        type=int,
        default=DEFAULTS.max_attempts,
        help="how often a file that makes no progress is asked for",
    )
    group.add_argument(
        "--first-wait", type=float, default=DEFAULTS.first_wait, help="seconds before asking again; doubles"
    )
    group.add_argument(
        "--max-wait",
        type=float,
        default=DEFAULTS.max_wait,
        help="longest wait, also when a server asks for a longer one",
    )
    group.add_argument(
        "--stall-seconds",
        type=float,
        default=DEFAULTS.stall_seconds,
        help="give up a server that is this long too slow",
    )
    group.add_argument(
        "--min-speed", type=float, default=DEFAULTS.min_speed, help="bytes a second that are not too slow"
    )
    group.add_argument(
        "--user-agent", default=DEFAULTS.user_agent, help="how to introduce oneself; add an e-mail address on long runs"
    )


def network_options(args: argparse.Namespace) -> NetworkOptions:
    """Return what the flags say."""
    return NetworkOptions(
        user_agent=args.user_agent,
        per_second=args.rate,
        max_attempts=args.max_attempts,
        first_wait=args.first_wait,
        max_wait=args.max_wait,
        stall_seconds=args.stall_seconds,
        min_speed=args.min_speed,
    )


def bases_from(given: Sequence[str] | None, variable: str) -> list[str]:
    """Return the bases of a flag, or else those of an environment variable.

    Raises:
        ConfigError: one of them is neither an http(s) address nor a folder.
    """
    return [check_base(base) for base in given or split_bases(os.environ.get(variable, ""))]
