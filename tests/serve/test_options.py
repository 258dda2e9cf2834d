"""What the server commands share: SIGHUP ends no server that is still starting."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from llava.serve import controller, gradio_web_server, model_worker, run
from llava.serve.options import hangups_ignored


def test_a_signal_is_ignored_until_the_end() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with hangups_ignored():
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == before


@pytest.mark.parametrize(
    ("main", "start"),
    [
        (controller.main, "llava.serve.controller.run_controller"),
        (model_worker.main, "llava.serve.worker_run.run_worker"),
        (gradio_web_server.main, "llava.serve.page_run.run_page"),
        (run.main, "llava.serve.run.services_of"),
    ],
)
def test_every_server_starts_without_the_default(
    main: Callable[[list[str]], None], start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(args: object) -> None:
        raise SystemExit(signal.getsignal(signal.SIGHUP))

    monkeypatch.setattr(start, started)
    with pytest.raises(SystemExit) as ended:
        main([] if main in (controller.main, gradio_web_server.main) else ["--model-path", "none"])
    assert ended.value.code == signal.SIG_IGN
