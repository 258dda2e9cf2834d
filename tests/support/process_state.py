"""What every test begins with and cannot leave changed: log, environment, random numbers, settings of torch."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Iterator

import numpy as np
import torch

from llava.utils import log


@contextlib.contextmanager
def fresh_state() -> Iterator[None]:
    """Begin with a log as at the start of Python and the same random numbers; afterwards take back what was changed."""
    folder, variables = os.getcwd(), dict(os.environ)
    dtype, num_threads = torch.get_default_dtype(), torch.get_num_threads()
    is_deterministic, computes_gradients = torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()
    reset_log()
    seed_all(0)
    try:
        yield
    finally:
        reset_log()
        os.chdir(folder)
        restore_environment(variables)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(computes_gradients)
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        if torch.are_deterministic_algorithms_enabled() != is_deterministic:
            torch.use_deterministic_algorithms(is_deterministic)


def reset_log() -> None:
    """Let the log of the package write nowhere, and forget which warnings it has written."""
    logger = logging.getLogger("llava")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate, logger.disabled = True, False
    logging.disable(logging.NOTSET)
    log._SEEN.clear()


def seed_all(seed: int) -> None:
    """Set the random numbers of Python, numpy and torch, so that no test depends on those before it."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def restore_environment(variables: dict[str, str]) -> None:
    """Give the environment its earlier variables, except the one in which pytest names the current test."""
    for name in os.environ.keys() - variables.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    for name, value in variables.items():
        if os.environ.get(name) != value and name != "PYTEST_CURRENT_TEST":
            os.environ[name] = value
