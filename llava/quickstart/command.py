"""Command `llava quickstart`; torch is imported after the options are parsed."""

from __future__ import annotations

from collections.abc import Sequence

from llava.quickstart.settings import parse_settings
from llava.utils import log


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava quickstart`."""
    settings, restart = parse_settings(argv)
    log.setup_logging()
    from llava.quickstart.run import run_quickstart  # takes seconds, for which --help does not wait

    run_quickstart(settings, restart=restart)
