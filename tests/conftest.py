"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported: recorded values and bit equality hold on a CPU, and forked ranks cannot use CUDA. Commands
# that the tests start inherit it. `benchmarks.gpu_throughput` checks a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from llava.model import precision
from llava.model.builder import LoadedModel, build_model
from llava.utils.plugins import unload_plugins
from tests.support.fast_python import fast_python
from tests.support.process_state import fresh_state
from tests.support.runs import write_parts, write_uneven
from tests.support.tiny import tiny_llava, write_tiny_lm, write_tiny_tower

ROOT = Path(__file__).resolve().parent.parent

# A busy machine is no failure, and the same commit has the same examples every time; `--hypothesis-profile explore`
# draws others.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("tests", settings.get_profile("explore"), derandomize=True)
settings.load_profile("tests")


# These start threads, processes, servers and browsers, and wait for them on a machine that has other work too.
RUN_TWICE = ("tests/commands/", "tests/distributed/", "tests/generation/", "tests/serve/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run a failed test of threads or processes once more; the summary counts it as a rerun."""
    for item in items:
        if item.nodeid.startswith(RUN_TWICE):
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_collection() -> None:
    """Collect no garbage while tests are imported, which leaves none."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave what the imports made out of garbage collections, of which every training asks for several."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """No test depends on what another one left in the process."""
    with fresh_state():
        yield


@pytest.fixture(autouse=True)
def equal_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test in this process depends on how fast this CPU is with half precision."""
    monkeypatch.setattr(precision, "_measured", lambda *_: 1.0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and oracles; tests that need it are skipped where it is absent."""
    path = Path(os.environ.get("LLAVA_SHARED", "../shared"))
    path = path if path.is_absolute() else ROOT / path
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; set LLAVA_SHARED")
    return path


@pytest.fixture
def tiny() -> LoadedModel:
    """A fresh tiny random model with its processor."""
    return tiny_llava()


@pytest.fixture
def built(tmp_path: Path) -> LoadedModel:
    """A model whose parts stay on disk (in `parts/`), as adapters and projectors need them; with markers."""
    lm = write_tiny_lm(tmp_path / "parts" / "lm")
    tower = write_tiny_tower(tmp_path / "parts" / "tower")
    loaded = build_model(str(lm), str(tower), projector_type="mlp2x_gelu", use_im_start_end=True)
    loaded.model.eval()
    return loaded


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts and data of short training runs: `lm`, `tower`, `vqa`, and `uneven.json`, some rows of which are text."""
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    write_uneven(folder)
    return folder


@pytest.fixture
def no_plugins() -> Iterator[None]:
    """Begin without plug-ins, and leave none to other tests."""
    unload_plugins()
    yield
    unload_plugins()


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A `python` for scripts and launchers that starts in a fraction of a second, see `tests.support.fast_python`."""
    with fast_python(tmp_path_factory.mktemp("bin") / "bin") as program:
        yield program
