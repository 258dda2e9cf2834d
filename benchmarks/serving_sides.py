"""Processes and requests of the benchmark of serving: our worker and controller, the peers, and a client.

save_folders: a random 24M model that writes letters in our format, and its export
Process:      a server on a free port, ready when it answers
Servers:      the servers of a run, each started when a part first needs it
asked:        requests at given times --SSE--> times of pieces and the answer of each
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import httpx2
import numpy as np
import torch
from PIL import Image
from tokenizers import normalizers

from benchmarks import common
from benchmarks.eval_throughput import make_processor
from llava.model.checkpoint.save import save_model
from llava.model.checkpoint.tools.convert import convert_checkpoint

START_SECONDS = 900.0
"""Time in which a server must answer: on a loaded machine the imports alone take minutes."""

NUM_NEW_TOKENS = 32
CONTEXT = 8192
"""Context of the model: sixteen images have 4,096 tokens."""

KV_CACHE_MB, PREFIX_CACHE_MB = 2048, 512
"""Limits of our worker's caches."""

SMALL_CACHE_MB = 64
"""Limit of the prefix cache while memory is measured: the first requests fill it."""

Body = dict[str, Any]


def save_folders(folder: Path, shape: str = "24m") -> tuple[Path, Path]:
    """Write the model in our format and its export; return both folders."""
    ours, export = folder / "ours", folder / "export"
    model, processor = common.our_model(shape=shape), make_processor()
    model.config.text_config.max_position_embeddings = CONTEXT
    # Answers of plain letters, before which the template's space is no token, have the same tokens when they are sent
    # back as history, as those of real models have.
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("[/INST] ", "[/INST]")
    letters = processor.tokenizer.convert_tokens_to_ids(list(string.ascii_letters))
    others = torch.ones(len(model.lm_head.weight), dtype=torch.bool)
    others[letters] = False
    with common.quiet(), torch.no_grad():
        model.lm_head.weight[others] = 0.0
        save_model(model, processor, ours)
        convert_checkpoint(ours, export, "hf")
    return ours, export


class Process:
    """Server in a process of its own."""

    def __init__(self, words: Sequence[str], port: int, model: str, ready: str = "/v1/models") -> None:
        """Start `python WORDS`; `model` is the name under which it serves."""
        self.url, self.model, self.ready = f"http://127.0.0.1:{port}", model, ready
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, *words], env=environment, stdout=subprocess.DEVNULL, stderr=self.log
        )

    def __enter__(self) -> Self:
        """Wait until it answers.

        Raises:
            RuntimeError: it ended, or does not answer in time.
        """
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit and self.process.poll() is None:
            try:
                if httpx2.get(self.url + self.ready, trust_env=False, timeout=5).status_code == 200:
                    return self
            except httpx2.HTTPError:
                time.sleep(0.2)
        status = self.process.poll()
        self.process.kill()
        reason = f"exit status {status}" if status is not None else f"no answer within {START_SECONDS:.0f} s"
        raise RuntimeError(f"{self.url}: the server did not start ({reason}): {self.last_line()}")

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def last_line(self) -> str:
        """Return the last line of its log."""
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "no log")

    def anonymous_bytes(self) -> int:
        """Return its resident anonymous memory."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

    def metric(self, name: str) -> float:
        """Return a value of `/metrics`."""
        lines = httpx2.get(self.url + "/metrics", trust_env=False, timeout=60).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def free_port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        return int(made.getsockname()[1])


def our_worker(folder: Path, *words: str) -> Process:
    """Start our worker without a controller, unless `words` name one."""
    port = free_port()
    register = [] if "--controller-address" in words else ["--no-register"]
    limits = ["--kv-cache-mb", str(KV_CACHE_MB), "--prefix-cache-mb", str(PREFIX_CACHE_MB)]
    options = ["--port", str(port), "--model-path", str(folder), *limits, *register, *words]
    return Process(["-m", "llava.serve.model_worker", "--host", "127.0.0.1", *options], port, folder.name, "/ready")


def our_controller(port: int) -> Process:
    """Start our controller."""
    words = ["-m", "llava.serve.controller", "--host", "127.0.0.1", "--port", str(port)]
    return Process(words, port, "ours", "/health")


def transformers_server(export: Path) -> Process:
    """Start `transformers serve`."""
    port = free_port()
    start = "from transformers.cli.transformers import main; main()"
    options = ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    return Process(["-c", start, "serve", str(export), *options], port, str(export), "/health")


def originals_worker(export: Path) -> Process:
    """Start a worker that answers one request at a time."""
    port = free_port()
    return Process(["-m", "benchmarks.serving_peer", str(export), str(port)], port, str(export))


class Servers:
    """Servers of a run; each is started when a part first needs it."""

    def __init__(self, shape: str, stack: ExitStack) -> None:
        """Serve a model of this shape (`common.SHAPES`), and its export by peers; `stack` ends them."""
        self._shape = shape
        self._stack = stack
        self._found: dict[str, Process] = {}

    @cached_property
    def folders(self) -> tuple[Path, Path]:
        """The model in our format, and its export."""
        return save_folders(Path(self._stack.enter_context(tempfile.TemporaryDirectory())), self._shape)

    @property
    def ours(self) -> Process:
        """Our worker, which is registered with `through`."""
        return self._started("ours", lambda: our_worker(self.folders[0], "--controller-address", self.through.url))

    @property
    def small_cache(self) -> Process:
        """Another worker of ours, with a small prefix cache."""
        return self._started(
            "small cache", lambda: our_worker(self.folders[0], "--prefix-cache-mb", str(SMALL_CACHE_MB))
        )

    @property
    def through(self) -> Process:
        """Our controller."""
        process = self._started("controller", lambda: our_controller(free_port()))
        process.model = self.folders[0].name
        return process

    @property
    def peers(self) -> dict[str, Process]:
        """The peers by name."""
        made: dict[str, Callable[[], Process]] = {
            "transformers": lambda: transformers_server(self.folders[1]),
            "one at a time": lambda: originals_worker(self.folders[1]),
        }
        return {name: self._started(name, make) for name, make in made.items()}

    def _started(self, name: str, make: Callable[[], Process]) -> Process:
        if name not in self._found:
            start = time.monotonic()
            process = self._stack.enter_context(make())
            if name != "controller":
                asked(process, [{"messages": [question(WARM_UP, 0)]}])  # the first request loads code
            self._found[name] = process
            common.say(f"{name}: ready after {time.monotonic() - start:.0f} s")
        return self._found[name]


WARM_UP = 1 << 30
"""Seed of the image of first requests, which no other request has."""


def image_part(seed: int) -> Body:
    """Return a random image of 224 pixels as a part of a message, JPEG in base64."""
    noise = np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((common.IMAGE_SIZE,) * 2, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()},
    }


def question(image: int | None, seed: int) -> Body:
    """Return a user's message about an image, with a random text.

    A letter is a token here: the text has 9 to 19, as nine of ten questions of VQA-RAD have tokens of SmolLM2.
    """
    draw = random.Random(seed)
    text = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(9, 19)))
    parts = [] if image is None else [image_part(image)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@dataclass
class Reply:
    """Answer of a request, with the times of its pieces in seconds since it was sent."""

    pieces: list[float] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0
    prompt: int = 0
    cached: int = 0

    @property
    def first(self) -> float:
        """Time to the first piece of text."""
        return self.pieces[0]


async def _ask(client: httpx2.AsyncClient, side: Process, body: Body, delay: float, reply: Reply) -> None:
    await asyncio.sleep(delay)
    start = time.perf_counter()
    whole = {"model": side.model, "stream": True, "max_tokens": NUM_NEW_TOKENS, "temperature": 0, **body}
    async with client.stream("POST", side.url + "/v1/chat/completions", json=whole) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{side.url}: status {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(f"{side.url}: {chunk['error']}")
            delta = chunk["choices"][0]["delta"].get("content") if chunk.get("choices") else None
            if delta:
                reply.pieces.append(time.perf_counter() - start)
                reply.text += delta
            if chunk.get("usage"):
                reply.prompt = chunk["usage"]["prompt_tokens"]
                reply.cached = (chunk["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    reply.seconds = time.perf_counter() - start


def asked(side: Process, bodies: Sequence[Body], delays: Sequence[float] = ()) -> tuple[list[Reply], float]:
    """Send requests at once, or after delays; return their replies and the seconds until the last one."""
    replies = [Reply() for _ in bodies]

    async def run() -> float:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(timeout=600, trust_env=False, limits=limits) as client:
            waits = delays or [0.0] * len(bodies)
            tasks = zip(bodies, waits, replies, strict=True)
            start = time.perf_counter()  # making a client takes as long as some answers
            await asyncio.gather(*(_ask(client, side, body, wait, reply) for body, wait, reply in tasks))
            return time.perf_counter() - start

    return replies, asyncio.run(run())
