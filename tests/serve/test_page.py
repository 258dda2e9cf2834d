"""The page as a server: answers of a session, stop, uploads, and what its responses allow."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytest.importorskip("gradio")

from llava.serve.admission import Admission
from llava.serve.page import PageServer
from llava.serve.page_chat import PageChat
from llava.serve.page_run import FOLDER_PREFIX, make_page_app, private_folder
from tests.support.served import MODEL, ScriptedEngine, scripted_app, served
from tests.support.waiting import until


async def asked(server: PageServer, chat: PageChat, *, stop_after: int = 0) -> list[str]:
    """Return the answers that the page shows one after another."""
    chat.ask("What?")
    body = chat.request_body(MODEL, temperature=0, top_p=1, max_tokens=8)
    shown: list[str] = []
    async for _ in server.answer(chat, body, "session"):
        shown.append(chat.turns[-1].answer)
        if stop_after and len(shown) == stop_after:
            server.stop("session")
    return shown


def test_an_answer_grows_and_has_a_note() -> None:
    with served(scripted_app(ScriptedEngine(["a", "b", "c"]))) as url:
        server, chat = PageServer(url, Admission()), PageChat()
        shown = asyncio.run(asked(server, chat))
        assert shown[-1] == "abc" and "3 tokens of answer" in chat.turns[0].note
        assert server.admission.num_requests == 0


def test_stop_reaches_the_worker() -> None:
    engine = ScriptedEngine(["a", "b"])
    engine.pause_after = 1
    with served(scripted_app(engine)) as url:
        server, chat = PageServer(url, Admission()), PageChat()
        asyncio.run(asked(server, chat, stop_after=2))
        assert chat.turns[0].note.startswith("stopped") and until(lambda: engine.handles[0].is_cancelled)


def test_an_answer_that_outlives_the_page_says_why() -> None:
    engine = ScriptedEngine(["a", "b"])
    engine.pause_after = 1
    with served(scripted_app(engine)) as url:
        server, chat = PageServer(url, Admission()), PageChat()

        async def ask() -> None:
            chat.ask("What?")
            async for _ in server.answer(chat, chat.request_body(MODEL, temperature=0, top_p=1, max_tokens=8), "s"):
                if chat.turns[0].answer:
                    server.admission.end()

        asyncio.run(ask())
        assert chat.turns[0].answer == "a" and chat.turns[0].note.startswith("error: the server is shutting down")
        assert until(lambda: engine.handles[0].is_cancelled) and server.admission.num_requests == 0


def test_failures_show_their_reason() -> None:
    with served(scripted_app(ScriptedEngine(), max_running=1)) as url:
        server, chat = PageServer(url, Admission()), PageChat()
        chat.ask("an <image> in text")
        asyncio.run(asked(server, chat))
        assert "error: " in chat.turns[-1].note
    server, chat = PageServer("http://127.0.0.1:9", Admission()), PageChat()
    asyncio.run(asked(server, chat))
    assert "does not answer" in chat.turns[0].note
    assert server.models() == ([], "No worker: http://127.0.0.1:9 does not answer (ConnectError)")


def test_the_temporary_folder_is_private_and_gone_at_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "before")
    left = tmp_path / f"{FOLDER_PREFIX}99999999-old"
    left.mkdir()
    with private_folder() as folder:
        assert not left.exists() and folder.stat().st_mode & 0o777 == 0o700
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
    assert list(tmp_path.iterdir()) == []


def test_the_page_loads_nothing_from_elsewhere_and_knows_its_name() -> None:
    app: Any = make_page_app(PageServer("http://127.0.0.1:9", Admission()), frozenset())
    with served(app) as url, httpx2.Client(base_url=url, timeout=120, trust_env=False) as client:
        response = client.get("/")
        policy = response.headers["content-security-policy"]
        assert response.status_code == 200 and "default-src 'self'" in policy and "http" not in policy
        assert "llava-frame" in response.text
        assert client.get("/ready").status_code == 200
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
