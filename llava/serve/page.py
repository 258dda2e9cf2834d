"""Web page of a controller: chat about images, with viewer, DICOM windows, votes and a stop button.

Importing this module needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from llava.errors import LlavaError
from llava.serve.admission import Admission
from llava.serve.client import ServerClient, chat_chunks
from llava.serve.page_chat import WINDOWS, PageChat, PageImage, PageLog, note_of, phantom_png
from llava.serve.page_sliders import CENTERS, NO_WIDTH, WIDTHS, sliders_of
from llava.serve.page_uploads import Uploads
from llava.serve.page_view import NOTICE, viewer_html

POLL_SECONDS = 5.0
"""Interval at which the page asks for the models again, to find new workers."""

STOPPED = "stopped"
NUM_ANSWERED = 6
"""Number of components that an answer changes."""

EXAMPLES = ("What does the image show?", "Is the image symmetric? Please answer yes or no.")
"""Questions about a drawn phantom."""


@dataclass
class PageServer:
    """State shared by all sessions of the page.

    Attributes:
        url: URL of the controller.
        admission: counts running answers, so that they can end before the page does.
        log: votes and conversations.
        num_votes: votes by kind; nothing else of them is kept without a log.
        reloads: whether the list of models is asked for again.
        stops: events that stop the answers of sessions.
        discarded: sessions whose running answer is not shown any more.
        uploads: files that sessions sent.
    """

    url: str
    admission: Admission
    log: PageLog = field(default_factory=PageLog)
    num_votes: dict[str, int] = field(default_factory=dict)
    reloads: bool = True
    stops: dict[str, asyncio.Event] = field(default_factory=dict)
    discarded: set[str] = field(default_factory=set)
    uploads: Uploads = field(default_factory=Uploads)

    def __post_init__(self) -> None:
        self.client = ServerClient(self.url)

    def models(self) -> tuple[list[str], str]:
        """Return the names of the models, and the problem if there are none."""
        try:
            names = self.client.models()
        except LlavaError as error:
            return [], f"No worker: {error}"
        return names, "" if names else "No worker is running. The page looks for one every few seconds."

    async def answer(self, chat: PageChat, body: dict[str, Any], session: str) -> AsyncGenerator[None, None]:
        """Add the answer to the last turn while it grows; yield whenever it has grown."""
        turn, started, usage = chat.turns[-1], time.monotonic(), None
        stop = self.stops.setdefault(session, asyncio.Event())
        stop.clear()
        self.discarded.discard(session)
        place = self.admission.enter("page", 1)
        chunks = chat_chunks(self.url, body)
        reason = ""
        try:
            async with aclosing(chunks):
                while (chunk := await self._next(chunks, stop)) is not None:
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices", []):
                        turn.answer += choice.get("delta", {}).get("content") or ""
                    yield
            reason = STOPPED if stop.is_set() else ""
        except LlavaError as error:
            reason = f"error: {error}"
        finally:
            self.admission.leave(place)
        turn.note = "; ".join(part for part in (reason, note_of(chat, usage, time.monotonic() - started)) if part)
        yield

    async def _next(self, chunks: AsyncGenerator[dict[str, Any], None], stop: asyncio.Event) -> dict[str, Any] | None:
        async with self.admission.limited():
            return await _next_unless(chunks, stop)

    def stop(self, session: str) -> None:
        """Stop the answer of a session, at the worker too."""
        if session in self.stops:
            self.stops[session].set()

    def discard(self, session: str) -> None:
        """Stop the answer of a session and show nothing more of it."""
        self.discarded.add(session)
        self.stop(session)

    def forget(self, session: str) -> None:
        """Stop and forget a session that was closed."""
        self.discard(session)
        self.stops.pop(session, None)
        self.uploads.forget(session)


async def _next_unless(chunks: AsyncGenerator[dict[str, Any], None], stop: asyncio.Event) -> dict[str, Any] | None:
    """Return the next chunk; None at the end, or when `stop` is set first."""
    following = asyncio.ensure_future(anext(chunks, None))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return following.result() if following.done() and not stop.is_set() else None
    finally:
        for task in (following, stopping):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


class ChatPage:
    """Components of the page and their handlers."""

    def __init__(self, server: PageServer, *, num_handlers: int, is_embedded: bool = False) -> None:
        """Build the page.

        Args:
            server: what sessions share.
            num_handlers: answers that run at a time.
            is_embedded: whether title and notice are left out, for a page inside another one.
        """
        self.server = server
        self.num_handlers = num_handlers
        theme_fonts = ["system-ui", "sans-serif"]
        self.theme = gr.themes.Default(font=theme_fonts, font_mono=["monospace"])
        with gr.Blocks(title="llava", analytics_enabled=False, delete_cache=(60, 60)) as self.blocks:
            self.chat = gr.State(PageChat())
            if not is_embedded:
                gr.Markdown(f"# Medical image chat\n{NOTICE}")
            with gr.Row():
                self.model = gr.Dropdown([], label="Model", interactive=True, scale=4, min_width=200)
                self.refresh = gr.Button("Refresh models", scale=1, min_width=120)
            self.status = gr.Markdown("", elem_id="llava-status")
            with gr.Row():
                with gr.Column(min_width=320):
                    self._add_viewer()
                with gr.Column(min_width=320):
                    self._add_chat()
            self._connect()

    def _add_viewer(self) -> None:
        self.viewer = gr.HTML(viewer_html(PageChat()), label="Image")
        self.selected = gr.Radio([], label="Image in the viewer", visible=False)
        with gr.Group(visible=False) as self.dicom:
            self.window = gr.Dropdown(list(WINDOWS), value="file", label="DICOM window")
            self.center = gr.Slider(*CENTERS, value=0, step=1, label="Window level (center)")
            self.width = gr.Slider(*WIDTHS, value=NO_WIDTH, step=1, label="Window width")
            self.frame = gr.Slider(0, 1, value=0, step=1, label="Frame", visible=False)

    def _add_chat(self) -> None:
        # Plain text: Markdown in an answer could load images from elsewhere.
        self.bot = gr.Chatbot(
            label="Conversation", height=430, render_markdown=False, sanitize_html=True, buttons=["copy"]
        )
        self.question = gr.MultimodalTextbox(
            label="Question",
            placeholder="Ask about the images. Enter sends, Escape stops.",
            file_count="multiple",
            sources=["upload"],
            submit_btn="Send",
            stop_btn=False,
            elem_id="llava-question",
        )
        with gr.Row():
            self.stop = gr.Button("Stop", elem_id="llava-stop", min_width=90)
            self.again = gr.Button("Regenerate", min_width=90)
            self.edit = gr.Button("Edit last question", min_width=90)
            self.clear = gr.Button("Clear", min_width=90)
        with gr.Row():
            self.votes = [gr.Button(label, interactive=False, min_width=90) for label in ("Upvote", "Downvote", "Flag")]
        with gr.Accordion("Parameters", open=False):
            self.temperature = gr.Slider(0, 1, value=0.2, step=0.1, label="Temperature")
            self.top_p = gr.Slider(0.1, 1, value=0.7, step=0.1, label="Top P")
            self.max_tokens = gr.Slider(64, 1024, value=512, step=64, label="Max output tokens")
        self.examples = [gr.Button(f"Example: {question}", min_width=200) for question in EXAMPLES]

    def _connect(self) -> None:
        shown = [self.chat, self.viewer, self.selected, self.dicom, self.window, self.center, self.width, self.frame]
        models = [self.model, self.status]
        self.blocks.load(self._load, None, models, show_progress="hidden")
        self.refresh.click(self._models, self.model, models, show_progress="hidden")
        if self.server.reloads:
            gr.Timer(POLL_SECONDS).tick(self._models, self.model, models, show_progress="hidden")
        self.question.change(
            self._add_files, [self.question, self.chat], [self.question, *shown], show_progress="hidden"
        )
        for button, question in zip(self.examples, EXAMPLES, strict=True):
            button.click(self._example(question), self.chat, [self.question, *shown], show_progress="hidden")
        self.selected.input(self._select, [self.selected, self.chat], shown, show_progress="hidden")
        self.window.input(
            self._set_window, [self.window, self.center, self.width, self.chat], shown, show_progress="hidden"
        )
        for slider in (self.center, self.width):
            slider.release(self._set_level, [self.center, self.width, self.chat], shown, show_progress="hidden")
        self.frame.release(self._set_frame, [self.frame, self.chat], shown, show_progress="hidden")
        settings = [self.model, self.temperature, self.top_p, self.max_tokens]
        answered = [self.chat, self.bot, self.question, *self.votes]
        limits: dict[str, Any] = {"concurrency_limit": self.num_handlers, "show_progress": "hidden"}
        self.question.submit(self._ask, [self.question, self.chat, *settings], answered, **limits)
        self.again.click(self._ask_again, [self.chat, *settings], answered, **limits)
        self.stop.click(self._stop, None, None, queue=False, show_progress="hidden")
        self.edit.click(self._edit, self.chat, [self.chat, self.bot, self.question], show_progress="hidden")
        self.clear.click(self._clear, None, [*answered, *shown[1:]], show_progress="hidden")
        for kind, button in zip(("upvote", "downvote", "flag"), self.votes, strict=True):
            button.click(self._vote(kind), [self.chat, self.model], self.votes, show_progress="hidden")
        self.blocks.unload(self._unload)

    def _load(self, request: gr.Request) -> tuple[Any, str]:
        names, problem = self.server.models()
        wanted = request.query_params.get("model", "")
        value = wanted if wanted in names else (names[0] if names else None)
        return gr.update(choices=names, value=value), problem

    def _models(self, value: str | None) -> tuple[Any, str]:
        names, problem = self.server.models()
        kept = value if value in names else (names[0] if names else None)
        return gr.update(choices=names, value=kept), problem

    def _add_files(self, question: dict[str, Any], chat: PageChat, request: gr.Request) -> list[Any]:
        files = question.get("files") or []
        if not files:
            return [gr.skip()] * 9
        for name, content in self.server.uploads.take(files, request.session_hash or ""):
            try:
                chat.add(PageImage.of(name, content))
            except LlavaError as error:
                gr.Warning(str(error))
        return [{"text": question.get("text", ""), "files": []}, *self._shown(chat)]

    def _example(self, question: str) -> Any:
        def show(chat: PageChat) -> list[Any]:
            chat.add(PageImage.of("phantom.png", phantom_png()))
            return [{"text": question, "files": []}, *self._shown(chat)]

        return show

    def _shown(self, chat: PageChat) -> list[Any]:
        """Return the updates of viewer and controls."""
        image = chat.current
        labels = [f"{place + 1}: {one.name}" for place, one in enumerate(chat.images)]
        is_dicom = image is not None and image.is_dicom
        window = image.window if image is not None else "file"
        sliders = sliders_of(image)
        frames = image.num_frames if image is not None else 0
        return [
            chat,
            viewer_html(chat),
            gr.update(choices=labels, value=labels[chat.selected] if labels else None, visible=len(labels) > 1),
            gr.update(visible=is_dicom),
            gr.update(value=window if window in WINDOWS else "custom"),
            *(gr.update(minimum=one.minimum, maximum=one.maximum, step=one.step, value=one.value) for one in sliders),
            gr.update(maximum=max(1, frames - 1), value=image.frame if image is not None else 0, visible=frames > 1),
        ]

    def _select(self, label: str, chat: PageChat) -> list[Any]:
        chat.selected = int(label.partition(":")[0]) - 1
        return self._shown(chat)

    def _changed(self, chat: PageChat, **change: Any) -> list[Any]:
        try:
            chat.change(**change)
        except LlavaError as error:
            gr.Warning(str(error))
        return self._shown(chat)

    def _set_window(self, window: str, center: float, width: float, chat: PageChat) -> list[Any]:
        return self._changed(chat, window=_window_of(center, width) if window == "custom" else window)

    def _set_level(self, center: float, width: float, chat: PageChat) -> list[Any]:
        return self._changed(chat, window=_window_of(center, width))

    def _set_frame(self, frame: float, chat: PageChat) -> list[Any]:
        return self._changed(chat, frame=int(frame))

    async def _ask(  # noqa: PLR0917  # the page passes values by position
        self,
        question: dict[str, Any],
        chat: PageChat,
        model: str,
        temperature: float,
        top_p: float,
        max_tokens: float,
        request: gr.Request,
    ) -> AsyncGenerator[list[Any], None]:
        text = (question.get("text") or "").strip()
        if not text and not any(image.is_new for image in chat.images):
            yield [gr.skip()] * NUM_ANSWERED
            return
        chat.ask(text)
        async for update in self._answer(chat, model, (temperature, top_p, max_tokens), request):
            yield update

    async def _ask_again(  # noqa: PLR0917
        self,
        chat: PageChat,
        model: str,
        temperature: float,
        top_p: float,
        max_tokens: float,
        request: gr.Request,
    ) -> AsyncGenerator[list[Any], None]:
        if not chat.turns:
            yield [gr.skip()] * NUM_ANSWERED
            return
        chat.turns[-1].answer = chat.turns[-1].note = ""
        async for update in self._answer(chat, model, (temperature, top_p, max_tokens), request):
            yield update

    async def _answer(
        self, chat: PageChat, model: str, settings: tuple[float, float, float], request: gr.Request
    ) -> AsyncGenerator[list[Any], None]:
        temperature, top_p, max_tokens = settings
        off = [gr.update(interactive=False)] * 3
        yield [chat, chat.shown_messages(), {"text": "", "files": []}, *off]
        turn = chat.turns[-1]
        if not model:
            turn.note = "error: no worker is running"
            yield [chat, chat.shown_messages(), gr.skip(), *off]
            return
        body = chat.request_body(model, temperature=temperature, top_p=top_p, max_tokens=int(max_tokens))
        started, session = time.time(), request.session_hash or ""
        async for _ in self.server.answer(chat, body, session):
            if session in self.server.discarded:
                return
            yield [chat, chat.shown_messages(), gr.skip(), *off]
        failed = turn.note.startswith("error:")
        self._log("chat", chat, model, start=round(started, 4), finish=round(time.time(), 4))
        yield [chat, chat.shown_messages(), gr.skip(), *[gr.update(interactive=not failed)] * 3]

    async def _stop(self, request: gr.Request) -> None:
        self.server.stop(request.session_hash or "")

    async def _unload(self, request: gr.Request) -> None:
        self.server.forget(request.session_hash or "")

    async def _edit(self, chat: PageChat, request: gr.Request) -> list[Any]:
        self.server.discard(request.session_hash or "")
        turn = chat.withdraw()
        text = "" if turn is None else turn.question
        return [chat, chat.shown_messages(), {"text": text, "files": []}]

    async def _clear(self, request: gr.Request) -> list[Any]:
        self.server.discard(request.session_hash or "")
        shown = self._shown(PageChat())
        off = [gr.update(interactive=False)] * 3
        return [shown[0], [], {"text": "", "files": []}, *off, *shown[1:]]

    def _vote(self, kind: str) -> Any:
        def vote(chat: PageChat, model: str) -> list[Any]:
            self.server.num_votes[kind] = self.server.num_votes.get(kind, 0) + 1
            self._log(kind, chat, model)
            return [gr.update(interactive=False)] * 3

        return vote

    def _log(self, kind: str, chat: PageChat, model: str, **more: Any) -> None:
        try:
            self.server.log.write(kind, chat, model, **more)
        except LlavaError as error:
            gr.Warning(str(error))


def _window_of(center: float, width: float) -> str:
    return f"{center:.10g},{width:.10g}"
