"""Conversation of a session of the web page: images with their windows, turns, requests and log lines.

files --PageImage--> images of the next question --request_body--> /v1/chat/completions
                                                 `--shown_image--> the pixels that the model gets
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from llava.errors import LlavaError
from llava.imaging.decode import decode_image, stored_format
from llava.imaging.dicom.header import integer_value, number_values, read_header
from llava.imaging.dicom.policy import PRESETS, DicomPolicy
from llava.utils.jsonl import append_record

LARGEST_SHOWN = 2048
"""Longest side of an image on the page in pixels; the model gets the whole image."""

WINDOWS = ("file", "full", *PRESETS, "custom")
"""Choices of the window of DICOM files."""


@dataclass(frozen=True)
class PageImage:
    """Image of a session.

    Attributes:
        name: name of the file, shown on the page only.
        content: bytes of the file.
        num_frames: number of frames; 0 for files other than DICOM.
        center: center of the window of the file, if it has one.
        width: width of that window.
        window: window as in requests.
        frame: frame, from 0.
        asked: window and frame with which the model has seen it.
    """

    name: str
    content: bytes
    num_frames: int = 0
    center: float = 0.0
    width: float = 0.0
    window: str = "file"
    frame: int = 0
    asked: tuple[str, int] | None = None

    @classmethod
    def of(cls, name: str, content: bytes) -> PageImage:
        """Return the image in a file.

        Raises:
            LlavaError: it cannot be decoded; the message says why.
        """
        decode_image(content)
        if stored_format(content) != "DICOM":
            return cls(name, content)
        tags = ("NumberOfFrames", "WindowCenter", "WindowWidth")
        header = read_header(content, tags, name=name, pixels=False)
        centers, widths = number_values(header, "WindowCenter"), number_values(header, "WindowWidth")
        center, width = (centers or [0.0])[0], (widths or [0.0])[0]
        return cls(name, content, max(1, integer_value(header, "NumberOfFrames", default=1)), center, width)

    @property
    def is_dicom(self) -> bool:
        """Whether window and frame have an effect."""
        return self.num_frames > 0

    @property
    def is_new(self) -> bool:
        """Whether this image has not been sent with the current window and frame."""
        return self.asked != (self.window, self.frame)

    def shown_image(self) -> Image.Image:
        """Return the pixels that the model gets."""
        policy = DicomPolicy(self.window, str(self.frame)) if self.is_dicom else DicomPolicy()
        return decode_image(self.content, dicom=policy).image

    def data_url(self) -> str:
        """Return the shown image for the page, scaled down if it is large."""
        image = self.shown_image()
        image.thumbnail((LARGEST_SHOWN, LARGEST_SHOWN))
        stream = io.BytesIO()
        image.save(stream, format="PNG", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()

    def part(self) -> dict[str, Any]:
        """Return the image as part of a message."""
        url = "data:application/octet-stream;base64," + base64.b64encode(self.content).decode()
        more = {"window": self.window, "frame": self.frame} if self.is_dicom else {}
        return {"type": "image_url", "image_url": {"url": url, **more}}

    @property
    def caption(self) -> str:
        """Window and frame as shown; "" for files other than DICOM."""
        return f"window {self.window}, frame {self.frame}" if self.is_dicom else ""

    @property
    def asked_caption(self) -> str:
        """Window and frame with which the model has seen it last; "" if it has not, and for other files."""
        return "" if self.asked is None else replace(self, window=self.asked[0], frame=self.asked[1]).caption


@dataclass
class PageTurn:
    """Question, its images and the answer."""

    question: str
    images: tuple[PageImage, ...] = ()
    answer: str = ""
    note: str = ""


@dataclass
class PageChat:
    """Conversation of one session."""

    images: list[PageImage] = field(default_factory=list)
    turns: list[PageTurn] = field(default_factory=list)
    selected: int = 0

    @property
    def current(self) -> PageImage | None:
        """Image in the viewer."""
        return self.images[self.selected] if 0 <= self.selected < len(self.images) else None

    def add(self, image: PageImage) -> None:
        """Add an image to the next question."""
        self.images.append(image)
        self.selected = len(self.images) - 1

    def change(self, *, window: str | None = None, frame: int | None = None) -> None:
        """Set window or frame of the image in the viewer.

        Raises:
            LlavaError: the window is not valid, or the frame does not exist.
        """
        if self.current is None or not self.current.is_dicom:
            return
        changed = replace(
            self.current,
            window=self.current.window if window is None else window,
            frame=self.current.frame if frame is None else frame,
        )
        changed.shown_image()
        self.images[self.selected] = changed

    def ask(self, question: str) -> PageTurn:
        """Begin a turn with the images that the model has not seen as they are now."""
        turn = PageTurn(question, tuple(image for image in self.images if image.is_new))
        self.images = [replace(image, asked=(image.window, image.frame)) for image in self.images]
        self.turns.append(turn)
        return turn

    def withdraw(self) -> PageTurn | None:
        """Remove the last turn and return it; its images belong to the next question again."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        again = {(image.name, image.content) for image in turn.images}
        self.images = [replace(one, asked=None) if (one.name, one.content) in again else one for one in self.images]
        return turn

    def request_body(self, model: str, *, temperature: float, top_p: float, max_tokens: int) -> dict[str, Any]:
        """Return the body of the request for the answer to the last turn."""
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            parts: list[dict[str, Any]] = [image.part() for image in turn.images]
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]})
            if turn is not self.turns[-1]:
                messages.append({"role": "assistant", "content": turn.answer})
        return {
            "model": model,
            "messages": messages,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "stream_options": {"include_usage": True},
        }

    def shown_messages(self) -> list[dict[str, str]]:
        """Return the turns as the page shows them, as plain text."""
        messages = []
        for turn in self.turns:
            images = f"[{len(turn.images)} image{'s' * (len(turn.images) > 1)}]\n" if turn.images else ""
            messages.append({"role": "user", "content": images + turn.question})
            if turn.answer or turn.note:
                note = f"\n\n({turn.note})" if turn.note else ""
                messages.append({"role": "assistant", "content": turn.answer + note})
        return messages

    def captions(self) -> list[str]:
        """Return windows and frames of all images that the model has seen, in any turn."""
        captions = [(place, image.asked_caption) for place, image in enumerate(self.images, 1)]
        is_only = len(self.images) == 1
        return [text if is_only else f"image {place}: {text}" for place, text in captions if text]


def note_of(chat: PageChat, usage: Mapping[str, Any] | None, seconds: float) -> str:
    """Return the line below an answer: time, tokens, and the windows of the images so far."""
    parts = [f"{seconds:.1f} s"]
    if usage:
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        parts.append(f"{usage['prompt_tokens']} tokens of prompt, {cached} of them cached")
        parts.append(f"{usage['completion_tokens']} tokens of answer")
    return "; ".join([*parts, *chat.captions()])


def phantom_png() -> bytes:
    """Return a drawn phantom of a section, the image of the examples."""
    image = Image.new("L", (256, 256))
    draw = ImageDraw.Draw(image)
    for box, gray in (
        ((28, 48, 228, 208), 90),
        ((40, 60, 216, 196), 40),
        ((62, 84, 112, 172), 15),
        ((144, 84, 194, 172), 15),
    ):
        draw.ellipse(box, fill=gray)
    draw.ellipse((118, 150, 140, 172), fill=220)
    draw.ellipse((158, 108, 174, 124), fill=150)
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


@dataclass(frozen=True)
class PageLog:
    """Lines of votes and conversations, in the layout of the original page.

    Attributes:
        folder: folder of the files; None stores nothing.
    """

    folder: Path | None = None

    def write(self, kind: str, chat: PageChat, model: str, *, ip: str = "", **more: Any) -> None:
        """Append a line of `kind`: chat, upvote, downvote or flag.

        Raises:
            LlavaError: the file cannot be written.
        """
        if self.folder is None:
            return
        now = datetime.now()
        messages = [pair for turn in chat.turns for pair in (["user", turn.question], ["assistant", turn.answer])]
        state = {
            "system": "",
            "roles": ["user", "assistant"],
            "messages": messages,
            "offset": 0,
            "sep": "",
            "sep2": None,
        }
        images = [hashlib.md5(image.content, usedforsecurity=False).hexdigest() for image in chat.images]
        line = {"tstamp": round(now.timestamp(), 4), "type": kind, "model": model, "state": state, "ip": ip, **more}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            append_record(self.folder / f"{now:%Y-%m-%d}-conv.json", {**line, "images": images} if images else line)
        except OSError as error:
            raise LlavaError(f"--log-conversations: {self.folder} cannot be written: {error.strerror}") from error
