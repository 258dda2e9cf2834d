"""Controller and two workers as processes under load, while one worker and the controller are killed."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.cluster import Cluster, ServerProcess, cluster
from tests.support.crowd import CHAT, Crowd
from tests.support.waiting import until

GAUGES = ("llava_requests_running", "llava_requests_waiting", "llava_slots_in_use")
MODEL = "llava-med-mistral-tiny"


@pytest.fixture
def running(tiny_options: list[str], tmp_path: Path) -> Iterator[Cluster]:
    """A controller and two workers of a tiny model, with queues that a crowd fills."""
    limits = ["--max-running", "16", "--max-waiting", "40", "--prefix-cache-mb", "16"]
    with cluster(tmp_path, [*tiny_options, *limits], num_workers=2) as made:
        yield made


def image_of(shared: Path) -> str:
    path = shared / "oracles" / "llava-med-1.5-mistral" / "images" / "im0.png"
    return base64.b64encode(path.read_bytes()).decode()


def is_idle(server: ServerProcess) -> bool:
    """Return whether nothing runs, waits or holds a slot."""
    found = server.metrics()
    return found[GAUGES[0]] == 0 and all(found.get(name, 0) == 0 for name in GAUGES)  # a controller has the first only


async def killed_meanwhile(made: Cluster, crowd: Crowd, num: int) -> None:
    """Let a crowd ask; kill a worker after a quarter of its answers, and the controller after a half."""
    asking = asyncio.create_task(crowd.come(num, seconds=num / 20, seed=2))
    before = len(crowd.ends)
    for share, kill in ((0.25, made.workers[1].kill), (0.5, made.controller.kill)):
        while len(crowd.ends) - before < share * num and not asking.done():
            await asyncio.sleep(0.02)
        assert not asking.done(), "all requests were over before the kill"
        await asyncio.to_thread(kill)
    await asyncio.to_thread(made.start_controller)
    await asking


@pytest.mark.parametrize("num", [40, pytest.param(200, marks=pytest.mark.extended)])
def test_every_request_ends_while_processes_are_killed(running: Cluster, shared: Path, num: int) -> None:
    left, right = running.workers
    crowd = Crowd(MODEL, running.controller.url, [left.url, right.url], image_of(shared))
    asyncio.run(crowd.come(20, seconds=0.5, seed=1))
    assert len(crowd.ends) == 20 and crowd.num_broken == 0 and crowd.counts["answer"] >= 5
    early = left.anonymous_bytes()
    crowd.was_killed = running.was_killed
    asyncio.run(killed_meanwhile(running, crowd, num))
    assert len(crowd.ends) == 20 + num
    assert until(lambda: is_idle(left) and is_idle(running.controller)), left.metrics()
    counts = crowd.counts
    # On a slow machine, only patient clients of the worker that lives are sure of an answer: 3 of 40, 21 of 200. Four
    # clients in a hurry come before the first kill; later ones may be refused sooner, while no worker is known.
    assert counts["answer"] >= num / 16 and counts["left"] >= 2, counts
    assert counts.keys() <= {"answer", "left", "queue_full", "no_worker", "worker_lost"}, counts
    # The worker that lives comes back to the controller that was started again.
    assert until(lambda: running.controller.metrics()["llava_workers"] == 1)
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
    assert httpx2.post(running.controller.url + CHAT, json=body, timeout=60, trust_env=False).status_code == 200
    assert [path for path in running.temporary.rglob("*") if not path.is_dir()] == []
    assert [name for one in (left, running.controller) for name in one.open_files() if "temporary" in name] == []
    assert left.anonymous_bytes() < 1.1 * early + (32 << 20)
