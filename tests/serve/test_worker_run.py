"""A worker loads its model in a thread that ends, so that only the model's thread has threads of OpenMP."""

from __future__ import annotations

import threading

import pytest

from llava.errors import CheckpointError
from llava.serve.worker_run import in_ended_thread


def test_a_model_is_loaded_in_a_thread_that_has_ended() -> None:
    thread = in_ended_thread(threading.current_thread)
    assert thread is not threading.current_thread() and not thread.is_alive()


def test_errors_of_loading_reach_the_caller() -> None:
    def failing() -> None:
        raise CheckpointError("no such folder")

    with pytest.raises(CheckpointError, match="no such folder"):
        in_ended_thread(failing)
