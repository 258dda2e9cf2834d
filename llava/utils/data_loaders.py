"""Loaders of LLaVA-Rad's annotation files by name, under the published `llava.utils.data_loaders`.

>>> from llava.utils import data_loaders
>>> rows = data_loaders.load_rows("mimic_test_findings", "chat_test.json")  # doctest: +SKIP
>>> rows = data_loaders.mimic_test_findings("chat_test.json")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

RECORDS, SAMPLES = "llava.data.records", "llava.samples"
"""Modules imported at first use, since this module is on a lower level."""


def load_rows(name: str, path: str) -> list[dict[str, Any]]:
    """Return the rows that a loader keeps, with `id`, `image` and `conversations`.

    Raises:
        ConfigError: the loader is unknown.
        DataError: the file cannot be used.
    """
    to_row: Callable[[Any], dict[str, Any]] = importlib.import_module(SAMPLES).to_row
    return [to_row(sample) for sample in importlib.import_module(RECORDS).load_samples(path, loader=name)]


def __getattr__(name: str) -> Any:
    """Return the loader of a name as a function of the path.

    Raises:
        AttributeError: the name is unknown.
    """
    if name.startswith("__") or name not in importlib.import_module(RECORDS).LOADERS:
        raise AttributeError(f"module 'llava.utils.data_loaders' has no loader {name!r}")
    return partial(load_rows, name)
