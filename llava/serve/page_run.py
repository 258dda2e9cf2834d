"""Start of the web page: private temporary folder, no outside requests, guard rails, server."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.errors import ConfigError
from llava.serve.options import checked_port, checked_url, host_of, public_hosts, url_of
from llava.utils.log import setup_logging
from llava.utils.lookup import require

if TYPE_CHECKING:
    from llava.serve.page import PageServer

logger = logging.getLogger(__name__)

FOLDER_PREFIX = "llava-page-"
MAX_UPLOAD = 64 << 20

# Gradio's page refers to third-party servers; under this policy browsers load nothing from them.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; connect-src 'self'; "
    "worker-src 'self' blob:; frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)


def run_page(args: argparse.Namespace) -> int:
    """Serve the page until a signal; return the exit status.

    Raises:
        ConfigError: an option is wrong, or the port is taken.
        MissingDependency: a package of the extra `serve` is missing.
    """
    if args.concurrency_count < 1:
        raise ConfigError(f"--concurrency-count is {args.concurrency_count}; expected at least 1")
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "serve")
    from llava.serve.listen import PASSING_SECONDS, ServerRun, bind

    setup_logging()
    given = [f"--{name}" for name in ("share", "moderate") if getattr(args, name)]
    if given:
        logger.warning("without effect here: %s; nothing leaves this server", ", ".join(given))
    controller, hosts = checked_url(args.controller_url, "--controller-url"), public_hosts(args)
    sockets = bind(args.host, checked_port(args.port))
    url = url_of(args.host, sockets[0].getsockname()[1])
    with private_folder():
        require("gradio", "serve")
        from llava.serve.admission import Admission
        from llava.serve.page import PageServer
        from llava.serve.page_chat import PageLog

        folder = args.log_folder if args.log_conversations else None
        server = PageServer(
            controller, Admission(max_running=1 << 30), PageLog(folder), reloads=args.model_list_mode == "reload"
        )
        app = make_page_app(server, hosts | {host_of(url)}, num_handlers=args.concurrency_count, is_embedded=args.embed)
        run = ServerRun(app, server.admission, drain_seconds=args.drain_seconds + 2 * PASSING_SECONDS)
        return run.run(sockets, url=url)


def make_page_app(
    server: PageServer, hosts: frozenset[str], *, num_handlers: int = 10, is_embedded: bool = False
) -> ASGIApp:
    """Return the application of the page, with its gate."""
    import gradio

    from llava.serve.application import Health, guarded, make_app
    from llava.serve.gate import GateSettings
    from llava.serve.metrics import ServerMetrics
    from llava.serve.page import ChatPage
    from llava.serve.page_view import SCRIPT, STYLE

    page = ChatPage(server, num_handlers=num_handlers, is_embedded=is_embedded)
    page.blocks.queue(default_concurrency_limit=num_handlers, api_open=False)
    metrics = ServerMetrics({}, has_model=False)
    is_draining = server.admission
    app = make_app("llava page", metrics, Health(lambda: "draining" if is_draining.is_draining else "", lambda: ""))
    mounted = gradio.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        theme=page.theme,
        css=STYLE,
        head=SCRIPT,
        max_file_size=MAX_UPLOAD,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        show_error=True,
    )
    settings = GateSettings(hosts=hosts)
    return WithPolicy(guarded(mounted, settings, metrics))


class WithPolicy:
    """ASGI middleware that adds the content security policy to every response."""

    def __init__(self, app: ASGIApp) -> None:
        """Add the policy to the responses of `app`."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        await self.app(scope, receive, with_policy)


@contextmanager
def private_folder() -> Iterator[Path]:
    """Use a temporary folder for uploads; remove it, and those of killed pages, at the end."""
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{FOLDER_PREFIX}*"):
        number = left.name.removeprefix(FOLDER_PREFIX).partition("-")[0]
        if number.isdecimal() and not Path(f"/proc/{number}").exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-"))
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
