"""Every code block of the README and the tutorials runs, with tiny parts in place of the named ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava.utils import plugins
from tests.support.documents import (
    ELSEWHERE,
    ROOT,
    blocks,
    lines,
    run_document,
    write_rows,
    write_small_parts,
    write_studies,
)

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", *TUTORIALS]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    write_small_parts(folder)
    write_rows(folder)
    return folder


@pytest.fixture
def place(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder: parts, rows and files under the names that the documents use."""
    folder = shutil.copytree(prepared, tmp_path / "place", symlinks=True)
    for recipe in ("vqa-rad", "instruct"):
        (folder / "data" / recipe).mkdir()
        for name in ("train.json", "test.json", "images"):
            (folder / "data" / recipe / name).symlink_to(folder / name)
    (folder / "scripts").symlink_to(ROOT / "scripts")  # configurations of DeepSpeed
    drawn = folder / "runs" / "quickstart" / "data"
    drawn.mkdir(parents=True)
    (folder / "images" / "synthetic-test-0000.png").write_bytes((folder / "image.png").read_bytes())
    for name in ("train.json", "test.json", "images"):
        (drawn / name).symlink_to(folder / name)
    monkeypatch.chdir(folder)
    yield folder
    plugins.unload_plugins()


@pytest.mark.parametrize("name", ["README", "quickstart", "new_language_model", "many_gpus"])
def test_the_blocks_run(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [path] = [path for path in DOCUMENTS if path.stem == name]
    assert run_document(path, monkeypatch) >= 2


def test_the_blocks_of_the_metric_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_document(ROOT / "README.md", monkeypatch)  # the model that the tutorial evaluates
    assert run_document(ROOT / "docs" / "tutorials" / "own_metric.md", monkeypatch) == 3
    assert "right side" in (place / "runs" / "first" / "ward" / "ward" / "results.json").read_text()


def test_the_hospital_is_walked_and_no_record_number_is_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = write_studies(place)
    # A fixed salt: with a random one, no patient of twenty may fall into a part of a tenth.
    (place / "salt.txt").write_text("b" * 32 + "\n", encoding="ascii")
    assert run_document(ROOT / "docs" / "tutorials" / "hospital.md", monkeypatch) >= 5
    written = [path for part in ("data/hospital", "runs") for path in (place / part).rglob("*") if path.is_file()]
    assert (place / "runs" / "hospital-hf" / "config.json").is_file() and len(written) > 20
    for path in written:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path


def test_every_tutorial_is_run() -> None:
    assert {path.stem for path in TUTORIALS} == {
        "quickstart", "hospital", "new_language_model", "own_metric", "many_gpus"
    }  # fmt: skip


def test_lines_that_are_run_elsewhere_occur() -> None:
    shell = {line for path in DOCUMENTS for block in blocks(path) if block.language == "bash" for line in lines(block)}
    assert ELSEWHERE.keys() <= shell
