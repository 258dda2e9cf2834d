"""Events that another thread sets: all are set, with one wake-up of the loop while it is busy."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from llava.serve.wake_ups import WakeUps


def test_events_of_a_busy_loop_need_one_wake_up() -> None:
    async def run() -> tuple[int, list[bool]]:
        loop, wake_ups = asyncio.get_running_loop(), WakeUps()
        events, num = [asyncio.Event() for _ in range(20)], 0
        original = loop.call_soon_threadsafe

        def counted(*args: Any, **options: Any) -> Any:
            nonlocal num
            num += 1
            return original(*args, **options)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        thread = threading.Thread(target=lambda: [wake_ups.set(loop, event) for event in events])
        thread.start()
        thread.join()  # the loop is busy meanwhile
        async with asyncio.timeout(30):
            await asyncio.gather(*(event.wait() for event in events))
        for event in events[:2]:
            event.clear()
        wake_ups.set(loop, events[0])
        async with asyncio.timeout(30):
            await events[0].wait()
        return num, [event.is_set() for event in events]

    num, are_set = asyncio.run(run())
    assert num == 2 and are_set == [True, False] + [True] * 18
