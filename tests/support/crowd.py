"""Many clients of servers that may be killed: each asks once, some leave, and each tells how its request ended.

"answer"        a complete answer
"left"          the client closed the connection
a code          an error of `llava.serve.failures.CODES`, in the form of the protocol
"broken"        the connection broke; a client whose server was killed then asks the controller again
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from llava.serve.client import split_frames
from llava.serve.failures import CODES, FRAME_STATUSES

CHAT, GENERATE = "/v1/chat/completions", "/worker_generate_stream"
MOST_SECONDS = 240.0
AGAIN_SECONDS = 0.3
HURRY_SECONDS = 0.01
"""What every sixth client waits: too short for an answer on any machine."""


@dataclass
class Crowd:
    """Clients and how their requests ended.

    Attributes:
        model: name of the model.
        controller: URL of the controller.
        workers: URLs of the workers, which every second client asks directly.
        image: base64 of an image.
        was_killed: returns whether the server at a URL was killed since a time.
        ends: how the request of each client ended.
        num_broken: connections that broke.
    """

    model: str
    controller: str
    workers: Sequence[str]
    image: str
    was_killed: Callable[[str, float], bool] = lambda url, since: False
    ends: list[str] = field(default_factory=list)
    num_broken: int = 0

    async def come(self, num: int, *, seconds: float, seed: int) -> None:
        """Let this many clients ask at random times."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx2.AsyncClient(timeout=MOST_SECONDS, trust_env=False, limits=limits) as http:
            draws = [random.Random(seed * 10_000 + number) for number in range(num)]
            await asyncio.gather(*(self._client(http, number, draw, seconds) for number, draw in enumerate(draws)))

    @property
    def counts(self) -> Counter[str]:
        """Number of requests by their ends."""
        return Counter(self.ends)

    async def _client(self, http: httpx2.AsyncClient, number: int, draw: random.Random, seconds: float) -> None:
        await asyncio.sleep(draw.random() * seconds)
        url = self.controller if number % 2 else self.workers[number // 2 % len(self.workers)]
        path, body = self._request(draw)
        patience = draw.random() * 1.5 if draw.random() < 1 / 3 else None
        if number % 6 == 0:
            patience = HURRY_SECONDS
        while (end := await self._attempt(http, url + path, body, patience)) == "broken":
            self.num_broken += 1
            url = self.controller
            await asyncio.sleep(AGAIN_SECONDS)
        self.ends.append(end)

    async def _attempt(self, http: httpx2.AsyncClient, url: str, body: dict[str, Any], patience: float | None) -> str:
        start = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                response = await http.post(url, json=body)
        except TimeoutError:
            return "left"
        except httpx2.TransportError as error:
            server = url.removesuffix(CHAT).removesuffix(GENERATE)
            assert self.was_killed(server, start), f"{server} broke a connection ({type(error).__name__})"
            return "broken"
        return end_of_chat(response, body) if url.endswith(CHAT) else end_of_frames(response)

    def _request(self, draw: random.Random) -> tuple[str, dict[str, Any]]:
        """Return path and body of a request in one of the two protocols, with or without an image."""
        text = f"Question {draw.randrange(30)}: what is shown?"
        length, has_image = draw.randrange(20, 200), draw.random() < 0.6
        if draw.random() < 0.4:
            prompt = f"[INST] {'<image>' * has_image} {text} [/INST]"
            images = [self.image] * has_image
            body = {"model": self.model, "prompt": prompt, "images": images, "max_new_tokens": length}
            return GENERATE, {**body, "temperature": draw.choice([0, 1])}
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{self.image}"}}
        content = [*[part] * has_image, {"type": "text", "text": text}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": length}
        return CHAT, {**body, "stream": draw.random() < 0.6, "n": draw.choice([1, 1, 1, 3])}


def end_of_chat(response: httpx2.Response, body: dict[str, Any]) -> str:
    """Return how a chat request ended, from its whole response."""
    if response.status_code != 200:
        return code_of(response.json(), response.status_code)
    if not body["stream"]:
        choices = response.json()["choices"]
        assert [choice["finish_reason"] in ("stop", "length") for choice in choices] == [True] * body["n"]
        return "answer"
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    if lines[-1] == "[DONE]":
        chunks = [json.loads(line) for line in lines[:-1]]
        ends = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
        assert sum(end is not None for end in ends) == body["n"]
        return "answer"
    return code_of(json.loads(lines[-1]), None)


def end_of_frames(response: httpx2.Response) -> str:
    """Return how a request of the old protocol ended, from its whole response."""
    frames = list(split_frames(iter([response.content])))
    last = frames[-1]
    if last["error_code"] == 0:
        assert response.status_code == 200 and last["finish_reason"] in ("stop", "length")
        return "answer"
    code = last["detail"]
    assert response.status_code == (CODES[code][0] if code in FRAME_STATUSES and len(frames) == 1 else 200)
    return str(code)


def code_of(body: Any, status: int | None) -> str:
    """Return the code of an error body, after checks of its form and its status."""
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    expected = CODES[error["code"]]
    assert error["type"] == expected[1] and status in (None, expected[0])
    return str(error["code"])
