"""The engine of a worker without server: the time of the same prompts in a process of its own.

EngineProcess: request bodies --a line of JSON--> python -m benchmarks.serving_engine FOLDER TOKENS --> seconds

Engines with the settings of a worker and with those of `llava eval` answer each list of requests.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from llava.generation.loading import open_engine
from llava.generation.protocol import Prompt, Sampling
from llava.samples import Conversation, Turn

SETTINGS: dict[str, dict[str, Any]] = {
    "as a worker": {"prefill_chunk": 512, "prefix_cache_mb": 512},
    "as a batch": {},
}
"""Arguments of `LocalEngine` by name."""


class EngineProcess:
    """Engines in a process of their own, which import and load once."""

    def __init__(self, folder: Path, num_tokens: int) -> None:
        """Answer with this many tokens each, with the model in `folder`."""
        words = [sys.executable, "-m", "benchmarks.serving_engine", str(folder), str(num_tokens)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        """Use the process."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.process.communicate()

    def seconds(self, bodies: Sequence[Any]) -> dict[str, float]:
        """Return the seconds that the engine with each of `SETTINGS` needs for request bodies.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(list(bodies)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of the engine ended with status {self.process.wait()}")
        found: dict[str, float] = json.loads(line)
        return found


def prompt_of(body: Any) -> Prompt:
    """Return the prompt of a request with one image and one text."""
    image, text = body["messages"][0]["content"]
    data = base64.b64decode(image["image_url"]["url"].split(",", 1)[1])
    return Prompt(Conversation((Turn("human", "<image>\n" + text["text"]),)), (data,))


def main() -> None:
    """Answer the requests of each line of standard input."""
    folder, num_tokens = sys.argv[1:]
    engines = {name: open_engine(folder, device="cpu", max_slots=32, **settings) for name, settings in SETTINGS.items()}
    sampling = Sampling(max_new_tokens=int(num_tokens))
    is_warm = False
    for line in sys.stdin:
        prompts = [prompt_of(body) for body in json.loads(line)]
        seconds = {}
        for name, engine in engines.items():
            if not is_warm:
                text_only = Prompt(Conversation((Turn("human", "warm up"),)), ())
                engine.generate([text_only], Sampling(max_new_tokens=2))
            start = time.perf_counter()
            engine.generate(prompts, sampling)
            seconds[name] = time.perf_counter() - start
        is_warm = True
        sys.stdout.write(json.dumps(seconds) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
