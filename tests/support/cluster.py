"""Controller and workers as processes of their own, with a temporary folder of their own, for tests.

with cluster(folder, model_words, num_workers=2) as made:
    made.controller.kill(); made.start_controller()
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from tests.support.ports import free_ports
from tests.support.processes import started

READY_SECONDS = 180.0
"""Time in which a process must answer; the imports alone take long on a busy machine."""


@dataclass
class ServerProcess:
    """One process of a cluster.

    Attributes:
        url: URL of its server.
        log: file with what it writes.
        killed: when it was killed, by `time.monotonic`.
    """

    url: str
    log: Path
    process: subprocess.Popen[str]
    killed: float | None = None

    def kill(self) -> None:
        """End it at once."""
        self.killed = time.monotonic()
        self.process.kill()
        self.process.wait()

    def wait_ready(self, path: str) -> None:
        """Wait until a path answers 200."""
        limit = time.monotonic() + READY_SECONDS
        while time.monotonic() < limit and self.process.poll() is None:
            try:
                if httpx2.get(self.url + path, timeout=20, trust_env=False).status_code == 200:
                    return
            except httpx2.HTTPError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"{self.url} is not ready: {self.log.read_text()[-2000:]}")

    def metrics(self) -> dict[str, float]:
        """Return the values of metrics without labels."""
        lines = httpx2.get(f"{self.url}/metrics", timeout=120, trust_env=False).text.splitlines()
        pairs = (line.split() for line in lines if not line.startswith("#") and "{" not in line)
        return {name: float(value) for name, value in pairs}

    def anonymous_bytes(self) -> int:
        """Return its resident anonymous memory."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

    def open_files(self) -> list[str]:
        """Return the paths of its open files; deleted ones end with ` (deleted)`."""
        found = []
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                found.append(os.readlink(link))
            except FileNotFoundError:
                continue  # closed in the meantime
        return found


@dataclass
class Cluster:
    """Controller and workers; see `cluster`."""

    folder: Path
    words: Sequence[str]
    ports: list[int]
    stack: ExitStack
    workers: list[ServerProcess] = field(default_factory=list)
    controllers: list[ServerProcess] = field(default_factory=list)
    back: float = 0.0

    @property
    def temporary(self) -> Path:
        """Temporary folder of all processes."""
        return self.folder / "temporary"

    @property
    def controller(self) -> ServerProcess:
        """The controller that was started last."""
        return self.controllers[-1]

    def start_controller(self) -> None:
        """Start a controller on the port of the one before."""
        self.back = float("inf")
        self.controllers.append(self._start("controller", self.ports[0], []))
        self.controller.wait_ready("/health")
        self.back = time.monotonic()

    def was_killed(self, url: str, since: float) -> bool:
        """Return whether the server at a URL was killed, and was not there again at that time."""
        if url == self.controller.url:
            return self.controller.killed is not None or (len(self.controllers) > 1 and since < self.back)
        return any(worker.url == url and worker.killed is not None for worker in self.workers)

    def start_workers(self) -> None:
        """Start the workers at the same time and wait until the controller knows them."""
        self.start_controller()
        for port in self.ports[1:]:
            url = f"http://127.0.0.1:{port}"
            words = ["--controller-address", self.controller.url, "--worker-address", url, *self.words]
            self.workers.append(self._start("model_worker", port, words))
        for worker in self.workers:
            worker.wait_ready("/ready")
        limit = time.monotonic() + READY_SECONDS
        while self.controller.metrics()["llava_workers"] < len(self.workers):
            assert time.monotonic() < limit, "the workers do not register"
            time.sleep(0.1)

    def _start(self, module: str, port: int, words: Sequence[str]) -> ServerProcess:
        command = [sys.executable, "-m", f"llava.serve.{module}", "--host", "127.0.0.1", "--port", str(port), *words]
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **settings, "TMPDIR": str(self.temporary)}
        log = self.folder / f"{module}-{port}-{len(self.controllers)}.log"
        with log.open("wb") as opened:
            process = self.stack.enter_context(started(command, env=environment, stdout=opened, stderr=opened))
        return ServerProcess(f"http://127.0.0.1:{port}", log, process)


@contextmanager
def cluster(folder: Path, words: Sequence[str], *, num_workers: int) -> Iterator[Cluster]:
    """Start a controller and workers with these options; end all of them afterwards."""
    with ExitStack() as stack:
        made = Cluster(folder, words, free_ports(1 + num_workers), stack)
        made.temporary.mkdir()
        made.start_workers()
        yield made
