"""Queue of a server: limits, turns by key, time limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from llava.errors import ConfigError
from llava.serve.admission import Admission, Place
from llava.serve.failures import RequestError


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def granted(*places: Place) -> list[bool]:
    return [place.granted.is_set() for place in places]


def test_sequences_up_to_the_limit_run_and_the_rest_waits() -> None:
    queue = Admission(max_running=3, max_waiting=2)
    places = [queue.enter("k", 2), queue.enter("k", 1), queue.enter("k", 1), queue.enter("k", 1)]
    assert granted(*places) == [True, True, False, False]
    assert (queue.num_running, queue.num_running_requests, queue.num_waiting, queue.num_requests) == (3, 2, 2, 5)
    with pytest.raises(RequestError) as caught:
        queue.enter("other", 1)
    assert (caught.value.code, caught.value.headers) == ("queue_full", {"Retry-After": "1"})
    queue.leave(places[1])
    queue.leave(places[1])
    assert granted(*places) == [True, True, True, False]


def test_keys_are_served_in_turn() -> None:
    queue = Admission(max_running=1)
    first = queue.enter("a", 1)
    waiting = {name: queue.enter(name[0], 1) for name in ("a1", "a2", "a3", "b1", "c1")}
    order = []
    queue.leave(first)
    while waiting:
        [name] = [name for name, place in waiting.items() if place.granted.is_set()]
        order.append(name)
        queue.leave(waiting.pop(name))
    assert order == ["a1", "b1", "c1", "a2", "a3"]


def test_a_key_at_its_own_limit_does_not_hold_up_others() -> None:
    queue = Admission(max_running=4)
    places = [queue.enter("a", 1, max_running=1), queue.enter("a", 1, max_running=1), queue.enter("b", 1)]
    assert granted(*places) == [True, False, True]


def test_a_key_at_its_own_limit_does_not_fill_the_queue_of_others() -> None:
    queue = Admission(max_running=4, max_waiting=2)
    places = [queue.enter("a", 1, max_running=1) for _ in range(3)]
    assert granted(*places, queue.enter("b", 2)) == [True, False, False, True]
    with pytest.raises(RequestError, match="2 requests are waiting"):
        queue.enter("a", 1, max_running=1)
    with pytest.raises(RequestError, match="2 requests are waiting"):
        queue.enter("c", 2)


def test_a_place_that_fits_does_not_overtake_one_that_only_waits_for_room() -> None:
    queue = Admission(max_running=4, max_waiting=2)
    queue.enter("a", 3)
    large, small = queue.enter("b", 2), queue.enter("c", 1)
    assert granted(large, small) == [False, False]


def test_a_request_of_more_sequences_than_its_key_may_run_is_refused() -> None:
    queue = Admission(max_running=32)
    with pytest.raises(RequestError) as caught:
        queue.enter("a", 16, max_running=1)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "n") and queue.num_requests == 0


def test_a_large_request_is_not_overtaken_for_ever() -> None:
    queue = Admission(max_running=4)
    small = queue.enter("a", 2)
    large, later = queue.enter("b", 4), queue.enter("c", 1)
    assert granted(large, later) == [False, False]
    queue.leave(small)
    assert granted(large, later) == [True, False]


def test_a_request_of_more_sequences_than_can_run_takes_all() -> None:
    queue = Admission(max_running=2)
    assert granted(queue.enter("a", 16)) == [True] and queue.num_running == 2


def test_a_place_that_is_left_while_waiting_is_free() -> None:
    queue = Admission(max_running=1, max_waiting=1)
    first, second = queue.enter("a", 1), queue.enter("a", 1)
    queue.leave(second)
    third = queue.enter("a", 1)
    queue.leave(first)
    assert granted(second, third) == [False, True] and queue.num_waiting == 0


def test_draining_refuses_new_requests_only() -> None:
    queue = Admission(max_running=1)
    first, second = queue.enter("a", 1), queue.enter("a", 1)
    queue.is_draining = True
    with pytest.raises(RequestError) as caught:
        queue.enter("a", 1)
    assert caught.value.code == "draining"
    queue.leave(first)
    assert granted(second) == [True]


def test_waiting_beats_until_granted_and_ends_at_the_deadline() -> None:
    async def work() -> None:
        queue = Admission(max_running=1)
        first, second = queue.enter("a", 1), queue.enter("a", 1)
        beats = 0
        async for _ in queue.waits(second, deadline=time.monotonic() + 120, beat=0.02):
            beats += 1
            if beats == 2:
                queue.leave(first)
        assert beats == 2 and granted(second) == [True]
        third = queue.enter("a", 1)
        with pytest.raises(RequestError) as caught:
            async for _ in queue.waits(third, deadline=time.monotonic() + 0.05, beat=0.02):
                pass
        assert caught.value.code == "timeout"

    run(work())


@pytest.mark.parametrize("num_turns", range(4))
def test_a_client_that_leaves_at_the_moment_of_its_grant_is_not_answered(num_turns: int) -> None:
    async def work() -> None:
        queue = Admission(max_running=1)
        first, second = queue.enter("a", 1), queue.enter("a", 1)

        async def wait() -> None:
            async for _ in queue.waits(second, deadline=time.monotonic() + 120, beat=60):
                pass

        task = asyncio.create_task(wait())
        while not second.granted._waiters:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        queue.leave(first)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task

    run(work())


@pytest.mark.parametrize("limits", [{"max_running": 0}, {"max_waiting": -1}])
def test_limits_out_of_range(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="--max-running"):
        Admission(**limits)
