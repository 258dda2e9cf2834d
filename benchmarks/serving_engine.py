"""The engine of a worker without server: the time of the same prompts in a process of its own.

python -m benchmarks.serving_engine FOLDER TOKENS < lists of request bodies --> seconds of each list
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.generation.loading import open_engine
from llava.generation.protocol import Prompt, Sampling
from llava.samples import Conversation, Turn


def engine_seconds(folder: Path, batches: Sequence[Any], num_tokens: int) -> list[float]:
    """Return the seconds that an engine in a new process needs for each batch of request bodies."""
    words = [sys.executable, "-m", "benchmarks.serving_engine", str(folder), str(num_tokens)]
    found = subprocess.run(words, input=json.dumps(batches), capture_output=True, text=True, check=True)
    seconds: list[float] = json.loads(found.stdout.splitlines()[-1])
    return seconds


def prompt_of(body: Any) -> Prompt:
    """Return the prompt of a request with one image and one text."""
    image, text = body["messages"][0]["content"]
    data = base64.b64decode(image["image_url"]["url"].split(",", 1)[1])
    return Prompt(Conversation((Turn("human", "<image>\n" + text["text"]),)), (data,))


def main() -> None:
    """Answer the batches of standard input with the settings of a worker."""
    folder, num_tokens = sys.argv[1:]
    engine = open_engine(folder, device="cpu", max_slots=32, prefill_chunk=512, prefix_cache_mb=512)
    sampling = Sampling(max_new_tokens=int(num_tokens))
    seconds = []
    for bodies in json.load(sys.stdin):
        prompts = [prompt_of(body) for body in bodies]
        engine.generate(prompts[:1], Sampling(max_new_tokens=2))
        start = time.perf_counter()
        engine.generate(prompts, sampling)
        seconds.append(time.perf_counter() - start)
    sys.stdout.write(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main()
