"""Types of projectors: names and shapes of their weights, without torch.

    type --shapes(width of a tower feature, of a language-model input)--> {name: shape}
    names of weights --type_of--> type

Building, inspecting, converting and exporting a model read these declarations, so a type of a plug-in needs no edit
elsewhere. `llava/model/multimodal_projector.py` builds the types of this package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from llava.errors import ConfigError
from llava.utils.plugins import failure_text

Shape = tuple[int, ...]
MLP = re.compile(r"mlp([1-9][0-9]?)x_gelu")  # at most 99 layers: a configuration may state millions
TRIAL_WIDTHS = (64, 1_048_576)
"""Substitutes for a width that a checkpoint does not state; sizes that differ between them depend on it."""

TRIAL = (64, 128)
"""Widths for the names of weights."""

LAYERS = ("linear_1.", "linear_2.")
"""Beginnings of names in transformers' Llava."""

RESERVED = (*LAYERS, "lora_", "mm_projector.", "vision_tower.", "language_model.", "inv_freq", "position_ids")
"""Parts of names by which the formats recognize other weights."""


@dataclass(frozen=True, slots=True)
class TransformersForm:
    """Two linear layers with biases around an activation, which transformers' Llava can hold.

    Attributes:
        first: beginning of the names of the first layer, such as `0.`; `weight` and `bias` follow.
        second: beginning of the names of the second layer; None if it is the identity.
        activation: name of the activation in transformers (`gelu`, `relu`, `silu`, `linear`).
    """

    first: str
    second: str | None
    activation: str

    def names(self) -> dict[str, str]:
        """Return the name of each layer there by the beginning of its names here."""
        second = {} if self.second is None else {self.second: LAYERS[1]}
        return {self.first: LAYERS[0], **second}


@dataclass(frozen=True, slots=True)
class ProjectorType:
    """Type of projector.

    Attributes:
        name: name in `--mm-projector-type` and in configurations.
        shapes: returns name and shape of every weight for the widths of a tower feature and of a language-model input.
        build: of a plug-in: returns the module for these widths; it maps [N, P, Dv] to [N, P, D].
        transformers: how transformers' Llava holds it; None if it cannot.
        fits_calibration: whether it is a sequence of linear layers, which `--calibrate-mm-projector` starts.
    """

    name: str
    shapes: Callable[[int, int], Mapping[str, Shape]]
    build: Callable[[int, int], Any] | None = None
    transformers: TransformersForm | None = None
    fits_calibration: bool = False


def _linear(vision: int, text: int) -> dict[str, Shape]:
    return {"weight": (text, vision), "bias": (text,)}


def _layers(place: str, vision: int, text: int) -> dict[str, Shape]:
    return {f"{place}.{name}": shape for name, shape in _linear(vision, text).items()}


def _cluster(vision: int, text: int) -> dict[str, Shape]:
    found: dict[str, Shape] = {"sim_alpha": (1, 1, 1), "sim_beta": (1, 1, 1)}
    for name in ("c", "v", "f"):
        found |= _layers(name, vision, vision)
    found |= {"ln_1.weight": (vision,), "ln_1.bias": (vision,)}
    return found | _layers("mlp.0", vision, text) | _layers("mlp.2", text, text)


def _mlp(depth: int) -> ProjectorType:
    def shapes(vision: int, text: int) -> dict[str, Shape]:
        found: dict[str, Shape] = {}
        for layer in range(depth):
            found |= _layers(str(2 * layer), text if layer else vision, text)
        return found

    form = TransformersForm("0.", "2.", "gelu") if depth == 2 else None
    return ProjectorType(f"mlp{depth}x_gelu", shapes, transformers=form, fits_calibration=True)


PROJECTOR_TYPES: dict[str, ProjectorType] = {
    kind.name: kind
    for kind in (
        ProjectorType("linear", _linear, transformers=TransformersForm("", None, "linear"), fits_calibration=True),
        ProjectorType("identity", lambda vision, text: {}),
        ProjectorType("cluster", _cluster),
    )
}
"""Types by name; `mlpKx_gelu` is a type for every K, see `find_type`."""


def find_type(name: str) -> ProjectorType | None:
    """Return a type by name, or None."""
    match = MLP.fullmatch(name)
    return _mlp(int(match[1])) if match else PROJECTOR_TYPES.get(name)


def known_types() -> str:
    """Return the known names, for messages."""
    own = [name for name, kind in PROJECTOR_TYPES.items() if kind.build is not None]
    return ", ".join(["linear", "mlpKx_gelu (such as mlp2x_gelu)", "cluster", "identity", *own])


def declared_shapes(kind: ProjectorType, vision: int | None, text: int) -> dict[str, Shape]:
    """Return the shapes of a type; -1 is a size that follows from a width that is not known (None).

    Raises:
        ConfigError: the function of a plug-in fails for these widths.
    """
    if vision is not None:
        return _shapes(kind, vision, text)
    one, other = (_shapes(kind, width, text) for width in TRIAL_WIDTHS)
    return {
        name: tuple(size if size == same else -1 for size, same in zip(shape, other.get(name, ()), strict=False))
        for name, shape in one.items()
    }


def _shapes(kind: ProjectorType, vision: int, text: int) -> dict[str, Shape]:
    try:
        return {name: tuple(shape) for name, shape in kind.shapes(vision, text).items()}
    except Exception as error:  # of a plug-in
        raise ConfigError(
            f"projector {kind.name!r}: its shapes fail for the widths {vision} and {text}: {failure_text(error)}"
        ) from error


def type_of(names: Collection[str], named: str | None = None) -> str | None:
    """Return the type whose weights have these names, or None.

    Args:
        names: names of the weights.
        named: the type that the configuration names; a plug-in's type wins over another one with the same names.
    """
    found = set(names)
    own = {name: kind for name, kind in PROJECTOR_TYPES.items() if kind.build is not None}
    if named in own and set(_shapes(own[named], *TRIAL)) == found:
        return named
    if not found:
        return "identity"
    if found == {"weight", "bias"}:
        return "linear"
    if "sim_alpha" in found:
        return "cluster"
    layers = sorted({int(name.split(".")[0]) for name in found if re.fullmatch(r"\d+\.(weight|bias)", name)})
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    if found == expected and layers == list(range(0, 2 * len(layers), 2)):
        return f"mlp{len(layers)}x_gelu"
    return next((name for name, kind in own.items() if set(_shapes(kind, *TRIAL)) == found), None)


def check_type(kind: ProjectorType) -> None:
    """Check the declaration of a plug-in's type.

    Raises:
        ConfigError: a name is reserved, a shape is not one, or the form for transformers names other weights.
    """
    shapes = kind.shapes(*TRIAL)
    if not isinstance(shapes, Mapping) or kind.build is None or MLP.fullmatch(kind.name) or kind.name == "mlpKx_gelu":
        raise ConfigError(f"projector {kind.name!r}: expected a name of its own, build, and shapes as a table")
    for name, shape in shapes.items():
        if found := [mark for mark in RESERVED if mark in name]:
            raise ConfigError(f"projector {kind.name!r}: {name} holds {found[0]!r}, which stands for other weights")
        if not isinstance(shape, tuple) or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ConfigError(f"projector {kind.name!r}: the shape of {name} is {shape!r}; expected whole numbers")
    if kind.transformers is not None:
        _check_form(kind, kind.transformers, set(shapes))


def _check_form(kind: ProjectorType, form: TransformersForm, names: set[str]) -> None:
    expected = {f"{start}{part}" for start in form.names() for part in ("weight", "bias")}
    if expected != names or (form.second is None) != (form.activation == "linear"):
        raise ConfigError(
            f"projector {kind.name!r}: its form for transformers has the weights {', '.join(sorted(expected))} and the "
            f"activation {form.activation}, the projector has {', '.join(sorted(names))}; expected the same weights, "
            "and a second layer unless the activation is linear"
        )


def differing_weights(kind: ProjectorType, got: Mapping[str, Shape], vision: int, text: int) -> list[str]:
    """Return the weights whose shape differs between a module and its declaration, or that one lacks."""
    declared = _shapes(kind, vision, text)
    return sorted(name for name in declared.keys() | got.keys() if declared.get(name) != got.get(name))
