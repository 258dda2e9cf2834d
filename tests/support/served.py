"""Servers in this process for tests: an application on a free port, and an engine that follows a script.

with served(app) as url: ...                       real sockets, a thread of its own
engine = ScriptedEngine(["one ", "two"])           each answer is these pieces; `hold` keeps them back
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from llava.generation.protocol import Prompt, Sampling
from llava.imaging.dicom.policy import DEFAULT_POLICY
from llava.serve.admission import Admission
from llava.serve.answering import AnswerService, ServedModel
from llava.serve.gate import GateSettings
from llava.serve.image_inputs import ImageLimits
from llava.serve.listen import bind
from llava.serve.worker import make_worker_app

MODEL = "scripted"


@contextlib.contextmanager
def served(app: Any, beside: Callable[[], Coroutine[Any, Any, None]] | None = None) -> Iterator[str]:
    """Serve an application on a free loopback port; yield its URL."""
    sockets = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=1))

    async def run() -> None:
        task = asyncio.create_task(beside()) if beside is not None else None
        await server.serve(sockets=sockets)
        if task is not None:
            task.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)


@dataclass(frozen=True)
class ScriptedCounts:
    """Counts of tokens."""

    prompt: int = 3
    cached: int = 1
    generated: int = 0


@dataclass
class ScriptedEvent:
    """Event of one answer."""

    index: int
    text: str
    answer: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    finish: str | None = None
    error: str | None = None
    cause: Exception | None = None
    counts: ScriptedCounts = field(default_factory=ScriptedCounts)
    top_logprobs: tuple[Any, ...] = ()


@dataclass
class ScriptedHandle:
    """Handle of a submitted prompt."""

    events: list[ScriptedEvent] = field(default_factory=list)
    is_cancelled: bool = False
    is_over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def requests(self) -> list[Any]:
        """Requests with the tokens of the prompt."""
        return [type("Request", (), {"encoded": type("Encoded", (), {"input_ids": (7, 8, 9)})})]

    def take(self) -> list[ScriptedEvent]:
        """Return the events since the last call."""
        with self.lock:
            found, self.events = self.events, []
        return found

    def cancel(self) -> None:
        """Note that the client is gone."""
        self.is_cancelled = True


class ScriptedEngine:
    """Engine whose answers are the same pieces, each a token.

    Attributes:
        prompts: prompts and parameters as submitted.
        handles: their handles.
        hold: while cleared, answers stop before their next piece.
        failure: raised as the cause of an error, instead of an answer.
        pause_after: number of pieces after which `hold` is cleared.
    """

    def __init__(self, pieces: Sequence[str] = ("Hello", " world"), *, failure: Exception | None = None) -> None:
        self.pieces = pieces
        self.failure = failure
        self.pause_after = 0
        self.prompts: list[tuple[Prompt, Sampling]] = []
        self.handles: list[ScriptedHandle] = []
        self.hold = threading.Event()
        self.hold.set()

    def submit(self, prompt: Prompt, sampling: Sampling, *, key: str, notify: Callable[[], None]) -> ScriptedHandle:
        """Answer in a thread."""
        self.prompts.append((prompt, sampling))
        handle = ScriptedHandle()
        self.handles.append(handle)
        threading.Thread(target=self._answer, args=(handle, sampling, notify), daemon=True).start()
        return handle

    def _answer(self, handle: ScriptedHandle, sampling: Sampling, notify: Callable[[], None]) -> None:
        answer = ""
        for number, piece in enumerate(self.pieces, 1):
            while not self.hold.wait(0.01):
                if handle.is_cancelled:
                    return
            answer += piece
            is_last = number == len(self.pieces)
            with handle.lock:
                for index in range(sampling.n):
                    event = ScriptedEvent(index, piece, answer, (number,), (-0.5,) if sampling.logprobs else ())
                    event.finish = "stop" if is_last else None
                    event.counts = ScriptedCounts(generated=number * sampling.n)
                    if self.failure is not None:
                        event.finish, event.error, event.cause = "error", str(self.failure), self.failure
                    handle.events.append(event)
            handle.is_over = is_last
            if handle.is_cancelled:
                return
            if number == self.pause_after:
                self.hold.clear()
            notify()
            if self.failure is not None:
                return


class WordTokenizer:
    """Tokenizer that knows the texts of single tokens only."""

    def convert_ids_to_tokens(self, token_id: int) -> str:
        """Return the text of a token."""
        return f"t{token_id}"

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of tokens."""
        return "".join(f"t{token_id}" for token_id in token_ids)


def scripted_service(engine: Any, **settings: Any) -> AnswerService:
    """Return a service, with a context of 100 tokens unless `context` is given."""
    model = ServedModel(MODEL, settings.pop("context", 100), "v1", "abc", frozenset({"<image>", "</s>"}))
    admission = Admission(max_running=settings.pop("max_running", 32), max_waiting=settings.pop("max_waiting", 64))
    images = ImageLimits(dicom=DEFAULT_POLICY, **settings.pop("images", {}))
    return AnswerService(engine, model, admission=admission, images=images, **settings)


def scripted_app(engine: Any, *, gate: GateSettings | None = None, **settings: Any) -> Any:
    """Return the application of a worker on a scripted engine."""
    return make_worker_app(scripted_service(engine, **settings), gate or GateSettings(), WordTokenizer())
