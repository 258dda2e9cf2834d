"""Projectors from tower features [N, P, Dv] to language-model inputs [N, P, D], one token per patch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from llava.errors import ConfigError
from llava.model.config import LlavaMedConfig
from llava.model.projector_types import MLP, PROJECTOR_TYPES, differing_weights, find_type, known_types
from llava.utils.lookup import lookup
from llava.utils.plugins import failure_text

NORM_AXES = {"position": 1, "channel": 2}
"""Axis over which the soft assignment normalizes the keys [B, P, Dv]; the published weights need `position`."""


class ClusterProjector(nn.Module):
    """Prototype extractor, then a two-layer MLP.

    Args:
        vision: Dv, width of a tower feature.
        text: D, width of a language-model input.
        num_centers: N; may exceed the number of patches, which are then pooled up.
        num_iters: T, rounds of soft assignment.
        norm: key of `NORM_AXES`. Over positions all assignments start out nearly even; new models may do better with
            `channel`.
        temperature: softness of the soft assignment, learned from this start; None is the published form without one.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(
        self,
        vision: int,
        text: int,
        *,
        num_centers: int = 256,
        num_iters: int = 2,
        norm: str = "position",
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        if num_centers < 1 or num_iters < 0:
            raise ConfigError(f"the cluster projector needs centers, got num_centers={num_centers} in {num_iters=}")
        if temperature is not None and temperature <= 0:
            raise ConfigError(f"the temperature of the cluster projector must be above 0, got {temperature}")
        self.num_centers = num_centers
        self.num_iters = num_iters
        self.norm_axis = lookup(NORM_AXES, norm, "norm of the cluster projector")
        self.sim_alpha = nn.Parameter(torch.ones(1, 1, 1))
        self.sim_beta = nn.Parameter(torch.zeros(1, 1, 1))
        self.c = nn.Linear(vision, vision)
        self.v = nn.Linear(vision, vision)
        self.f = nn.Linear(vision, vision)
        self.ln_1 = nn.LayerNorm(vision)
        self.mlp = nn.Sequential(nn.Linear(vision, text), QuickGELUActivation(), nn.Linear(text, text))
        self.temperature = None if temperature is None else nn.Parameter(torch.full((1, 1, 1), float(temperature)))

    def forward(self, features: Tensor) -> Tensor:
        """Project features [B, P, Dv] to [B, P, D]; images are independent of each other."""
        values = self.f(features)
        centers = self._centers(features, values)
        gathered = self._gather(features, values, centers)
        projected: Tensor = self.mlp(features + gathered)
        return projected

    def _pool(self, tokens: Tensor) -> Tensor:
        """Pool [B, P, Dv] to [B, N, Dv]: means of (overlapping) windows in raster order."""
        return F.adaptive_avg_pool1d(tokens.transpose(1, 2), self.num_centers).transpose(1, 2)

    def _centers(self, features: Tensor, values: Tensor) -> Tensor:
        """Return centers [B, N, Dv] after soft assignment; each is a SUM over patches, as published."""
        keys = _unit(self.v(features), axis=self.norm_axis)
        centers = self._pool(features)
        for _ in range(self.num_iters):
            scores = _unit(self.c(centers), axis=2) @ keys.transpose(1, 2)
            if self.temperature is not None:
                scores = scores / self.temperature.float()
            centers = scores.softmax(dim=1).to(values.dtype) @ values
        return centers

    def owners(self, similarity: Tensor) -> Tensor:
        """Return the center that each patch joins, [B, P], for similarities [B, N, P]."""
        return self.first_equal(similarity.shape[2], similarity.device)[similarity.argmax(dim=1)]

    def first_equal(self, num_patches: int, device: torch.device) -> Tensor:
        """Return for each center the first one that began with the same window of patches, [N]."""
        # With more centers than patches these are equal but for rounding, which depends on the processor and must not
        # decide which patches share a center.
        centers = torch.arange(self.num_centers, device=device)
        starts = centers * num_patches // self.num_centers
        stops = ((centers + 1) * num_patches + self.num_centers - 1) // self.num_centers
        is_first = torch.ones_like(centers, dtype=torch.bool)
        is_first[1:] = (starts[1:] != starts[:-1]) | (stops[1:] != stops[:-1])
        return torch.where(is_first, centers, 0).cummax(dim=0).values

    def _gather(self, features: Tensor, values: Tensor, centers: Tensor) -> Tensor:
        """Return for each patch its similarity times the mean of its center's patches, [B, P, Dv]."""
        cosine = _unit(centers, axis=2) @ _unit(features, axis=2).transpose(1, 2)
        similarity = torch.sigmoid(self.sim_beta.float() + self.sim_alpha.float() * cosine)
        owner = self.owners(similarity)
        weight = similarity.gather(1, owner[:, None])[:, 0].to(values.dtype)[..., None]
        # One-hot products instead of a scatter: exact, and the same on every run on a GPU.
        member = F.one_hot(owner, self.num_centers).to(values.dtype)
        total = member.transpose(1, 2) @ (weight * values) + self._pool(values)
        mean = total / (member.sum(dim=1, dtype=torch.float32)[..., None] + 1)
        return weight * (member @ mean.to(values.dtype))


def _unit(tokens: Tensor, *, axis: int) -> Tensor:
    """Return float32 vectors of length one along `axis`."""
    return F.normalize(tokens.float(), dim=axis)


def cluster_projector(vision: int, text: int, settings: dict[str, Any] | None) -> ClusterProjector:
    """Return the projector with a configuration's settings (`projector_kwargs`).

    Raises:
        ConfigError: a setting is unknown or out of range.
    """
    known = {"num_centers", "num_iters", "norm", "temperature"}
    unknown = sorted(set(settings or {}) - known)
    if unknown:
        raise ConfigError(f"unknown settings of the cluster projector: {unknown}; known: {sorted(known)}")
    return ClusterProjector(vision, text, **(settings or {}))


def _widths(config: LlavaMedConfig) -> tuple[int, int]:
    """Return the widths of a tower feature and of a language-model input."""
    layers = config.vision_feature_layer
    num_layers = len(layers) if isinstance(layers, list) else 1
    vision: Any = config.vision_config
    text: Any = config.text_config
    return num_layers * vision.hidden_size, text.hidden_size


def linear(config: LlavaMedConfig) -> nn.Module:
    """Return one linear layer (LLaVA-Med 1.0)."""
    return nn.Linear(*_widths(config))


def mlp_gelu(config: LlavaMedConfig) -> nn.Module:
    """Return the projector `mlpKx_gelu`: K linear layers with GELU between them (LLaVA 1.5)."""
    match = MLP.fullmatch(config.projector_type)
    assert match is not None
    depth = int(match[1])
    vision, text = _widths(config)
    widths = [vision] + [text] * depth
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.GELU(), nn.Linear(inner, outer)]
    return nn.Sequential(*layers[1:])


class Identity(nn.Module):
    """Projector that returns tower features unchanged; tower and language model must be equally wide."""

    def forward(self, features: Tensor) -> Tensor:
        """Return `features` [N, P, D] unchanged."""
        return features


def identity(config: LlavaMedConfig) -> nn.Module:
    """Return the identity projector; tower and language model must be equally wide."""
    vision, text = _widths(config)
    if vision != text:
        raise ConfigError(f"projector 'identity' needs equal widths, got tower {vision} and language model {text}")
    return Identity()


def cluster(config: LlavaMedConfig) -> nn.Module:
    """Return a prototype extractor and an MLP (STLLaVA-Med)."""
    return cluster_projector(*_widths(config), config.projector_kwargs)


PROJECTORS: dict[str, Callable[[LlavaMedConfig], nn.Module]] = {
    "linear": linear,
    "mlpKx_gelu": mlp_gelu,
    "identity": identity,
    "cluster": cluster,
}


def check_projector_type(projector_type: str) -> Callable[[LlavaMedConfig], nn.Module]:
    """Return the function that builds a projector type.

    Raises:
        ConfigError: the type is unknown.
    """
    if projector_type == "mlpKx_gelu":
        raise ConfigError("projector type 'mlpKx_gelu' needs its number of layers, for example mlp2x_gelu")
    kind = find_type(projector_type)
    if kind is None:
        raise ConfigError(f"unknown projector type {projector_type!r}; known: {known_types()}")
    return PROJECTORS["mlpKx_gelu" if MLP.fullmatch(kind.name) else kind.name] if kind.build is None else plugged


def plugged(config: LlavaMedConfig) -> nn.Module:
    """Return the projector of a plug-in.

    Raises:
        ConfigError: it is not a module, or its weights are not the declared ones.
    """
    kind, (vision, text) = PROJECTOR_TYPES[config.projector_type], _widths(config)
    assert kind.build is not None
    try:
        module = kind.build(vision, text)
    except Exception as error:  # of a plug-in; LLAVA_TRACEBACK shows where
        raise ConfigError(f"projector {kind.name!r} cannot be built: {failure_text(error)}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"projector {kind.name!r} is built as {type(module).__name__}; expected a torch module")
    got = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if differs := differing_weights(kind, got, vision, text):
        some = ", ".join(f"{name} {got.get(name, 'absent')}" for name in differs[:3])
        raise ConfigError(f"projector {kind.name!r} has other weights than it declares: {some}; correct its shapes")
    if buffers := sorted(got.keys() - dict(module.named_parameters()).keys()):
        raise ConfigError(
            f"projector {kind.name!r} saves {buffers[0]}, which is no weight of its own; register it with "
            "persistent=False, or do not share it"
        )
    return module


def build_projector(config: LlavaMedConfig) -> nn.Module:
    """Return the projector that `config.projector_type` names.

    Raises:
        ConfigError: the type is unknown or does not fit the widths.
    """
    return check_projector_type(config.projector_type)(config)
