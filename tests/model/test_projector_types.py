"""Declarations of projectors: names and shapes, their checks, and the form for transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava.errors import ConfigError
from llava.model.checkpoint.export_hf import projector_obstacles
from llava.model.multimodal_projector import build_projector
from llava.model.projector_types import PROJECTOR_TYPES, declared_shapes, find_type
from llava.utils import plugins

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plugin.py"
HEAD = "from llava import plugins\n"
pytestmark = pytest.mark.usefixtures("no_plugins")


def config_of(projector: str) -> Any:
    return SimpleNamespace(
        projector_type=projector,
        vision_feature_layer=-2,
        vision_config=SimpleNamespace(hidden_size=4),
        text_config=SimpleNamespace(hidden_size=6),
    )


BUILDS = {
    "p1": ("nn.Linear", "{'weight': (t, v)}", r"other weights than it declares: bias \(6,\); correct its shapes"),
    "p2": ("lambda v, t: 3", "{}", "is built as int; expected a torch module"),
    "p3": ("lambda v, t: 1 / 0", "{}", "cannot be built: ZeroDivisionError: division by zero"),
    "p4": ("lambda v, t: nn.BatchNorm1d(t, affine=False)", "{'running_mean': (t,), 'running_var': (t,), "
           "'num_batches_tracked': ()}", "saves num_batches_tracked, which is no weight of its own"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILDS)
def test_projectors_that_are_not_as_declared(tmp_path: Path, name: str) -> None:
    build, shapes, message = BUILDS[name]
    code = f"from torch import nn\nplugins.add_projector({name!r}, {build}, lambda v, t: {shapes})\n"
    (tmp_path / "own.py").write_text(HEAD + code)
    plugins.load_plugins([str(tmp_path / "own.py")])
    with pytest.raises(ConfigError, match=message) as error:
        build_projector(config_of(name))
    assert "\n" not in str(error.value)


def test_shapes_that_follow_from_an_unknown_width(tmp_path: Path) -> None:
    shapes = "{'a': (t, v // 2), 'b': (min(v, 512), v + t), 'c': (7,)} if v % 32 == 0 else 1 / 0"
    code = f"plugins.add_projector('p', print, lambda v, t: {shapes})\n"
    (tmp_path / "own.py").write_text(HEAD + code)
    plugins.load_plugins([str(tmp_path / "own.py")])
    assert declared_shapes(PROJECTOR_TYPES["p"], None, 10) == {"a": (10, -1), "b": (-1, -1), "c": (7,)}
    with pytest.raises(ConfigError, match="its shapes fail for the widths 33 and 10: ZeroDivisionError"):
        declared_shapes(PROJECTOR_TYPES["p"], 33, 10)


@pytest.mark.parametrize(
    ("function", "activation", "message"),
    [
        ("torch.tanh", "relu", "computes something else"),
        ("torch.relu", "rellu", "'rellu', which transformers does not"),
    ],
)
def test_an_export_does_not_believe_a_wrong_declaration(
    tmp_path: Path, function: str, activation: str, message: str
) -> None:
    code = EXAMPLE.read_text().replace("torch.relu", function).replace('"relu"', repr(activation))
    (tmp_path / "own.py").write_text(code)
    plugins.load_plugins([str(tmp_path / "own.py")])
    projector = PROJECTOR_TYPES["two-layers"].build
    assert projector is not None
    [found] = projector_obstacles("two-layers", projector(4, 6))
    assert message in found


@pytest.mark.parametrize("name", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "identity", "cluster"])
def test_types_of_this_package_declare_their_weights(name: str) -> None:
    config: Any = SimpleNamespace(
        projector_type=name,
        projector_kwargs=None,
        vision_feature_layer=-2,
        vision_config=SimpleNamespace(hidden_size=6),
        text_config=SimpleNamespace(hidden_size=6 if name == "identity" else 10),
    )
    kind = find_type(name)
    assert kind is not None
    got = {key: tuple(value.shape) for key, value in build_projector(config).state_dict().items()}
    assert got == kind.shapes(6, config.text_config.hidden_size)
    unknown = declared_shapes(kind, None, 10)
    assert all(size == -1 or size in (1, 10) for shape in unknown.values() for size in shape)
