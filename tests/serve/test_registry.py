"""Registry of workers with a fake clock."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from llava.errors import ConfigError
from llava.serve.registry import EXPIRY_SECONDS, Registry, WorkerStatus


@dataclass
class Clock:
    """Clock that a test sets."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def registry(dispatch: str = "shortest_queue", **settings: object) -> Registry:
    return Registry(Clock(), dispatch, random.Random(0), **settings)  # type: ignore[arg-type]


def add(table: Registry, name: str, *models: str, speed: float = 1, queue: int = 0, beats: bool = True) -> None:
    table.register(name, WorkerStatus(models, speed, queue), check_heart_beat=beats)


def test_the_shortest_queue_by_speed_gets_the_request_and_is_counted() -> None:
    table = registry()
    add(table, "slow", "m", speed=1, queue=2)
    add(table, "fast", "m", speed=4, queue=4)
    assert [table.choose("m") for _ in range(6)] == ["fast"] * 4 + ["slow", "fast"]


def test_the_lottery_draws_by_speed_and_none_from_workers_without() -> None:
    table = registry("lottery")
    add(table, "a", "m", speed=3)
    add(table, "b", "m", speed=1)
    drawn = [table.choose("m") for _ in range(400)]
    assert 250 < drawn.count("a") < 350
    idle = registry("lottery")
    add(idle, "a", "m", speed=0)
    assert idle.choose("m") == ""


def test_only_workers_of_the_model_that_have_not_failed_are_chosen() -> None:
    table = registry()
    add(table, "a", "m")
    add(table, "b", "other")
    assert table.choose("m", excluded={"a"}) == "" and table.choose("none") == ""
    assert table.models() == ["m", "other"]


def test_a_silent_worker_is_dropped_after_the_limit_unless_it_sends_no_heartbeats() -> None:
    clock = Clock()
    table = Registry(clock)
    add(table, "beats", "m")
    add(table, "quiet", "m", beats=False)
    clock.now += EXPIRY_SECONDS
    assert table.expire() == []
    clock.now += 0.1
    assert table.expire() == ["beats"] and table.names == ["quiet"]


def test_a_heartbeat_keeps_a_worker_and_sets_its_queue() -> None:
    clock = Clock()
    table = Registry(clock)
    add(table, "a", "m")
    clock.now += EXPIRY_SECONDS
    assert table.beat("a", 5) and not table.beat("unknown", 0)
    clock.now += 1
    assert table.expire() == [] and table.status().queue_length == 5


def test_finished_requests_are_counted_down_but_not_below_zero() -> None:
    table = registry()
    add(table, "a", "m")
    table.choose("m")
    table.finish("a")
    table.finish("a")
    table.finish("unknown")
    assert table.status().queue_length == 0


def test_requests_about_one_image_go_to_one_worker_until_its_queue_is_longer() -> None:
    table = registry(affinity_slack=2)
    add(table, "a", "m")
    add(table, "b", "m")
    assert [table.choose("m", affinity="image") for _ in range(4)] == ["a", "a", "a", "b"]
    table.remove("b")
    assert table.choose("m", affinity="image") == "a"


def test_the_sum_can_be_registered_as_a_worker() -> None:
    table = registry()
    add(table, "a", "m", "n", speed=1.5, queue=2)
    add(table, "b", "m", speed=1.5, queue=3)
    assert table.status().as_json() == {"model_names": ["m", "n"], "speed": 3, "queue_length": 5}
    assert WorkerStatus.of(table.status().as_json()) == table.status()


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"model_names": "m"},
        {"model_names": [1]},
        {"model_names": ["m"], "speed": True},
        {"model_names": ["m"], "speed": -1},
        {"model_names": ["m"], "speed": float("nan")},
        {"model_names": ["m"], "speed": 10**400},
        {"model_names": ["m"], "speed": 1e308},
        {"model_names": ["\ud800"]},
        {"model_names": [""]},
        {"model_names": ["m"], "queue_length": -1},
        {"model_names": ["m"], "queue_length": 1.5},
    ],
)
def test_a_wrong_status_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="worker_status"):
        WorkerStatus.of(value)


def test_an_unknown_dispatch_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="lottery, shortest_queue"):
        registry("fastest")
