"""Ranges of the sampling parameters, and imports of the protocol."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from llava.errors import ConfigError
from llava.generation.protocol import Sampling


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"num_beams": 0},
        {"n": 0},
        {"stop": ("a", "")},
        {"stop": "a"},
    ],
)
def test_values_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    [name] = wrong
    with pytest.raises(ConfigError, match=name):
        Sampling(**wrong)


def test_the_limits_themselves_are_allowed() -> None:
    assert Sampling(max_new_tokens=1, temperature=0.0, top_p=1.0, top_k=0, num_beams=1, n=1).stop == ()


def test_importing_the_protocol_loads_no_torch() -> None:
    code = "import sys, llava.generation.protocol; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
