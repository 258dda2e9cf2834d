"""The `cluster` projector of STLLaVA-Med: patches gather in prototypes, each patch takes something of its own back.

    x [B, P, Dv] --soft assignment, T rounds--> centres [B, N, Dv] --hard assignment--> one centre a patch
    x + similarity * (mean of the patches of its centre) --MLP--> [B, P, D]           specification stllava-med 2

The number of tokens stays P. Parameters carry the published names, so files need no translation: what follows
`mm_projector.` in a published file is a name of this module's state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from llava.errors import ConfigError
from llava.utils.lookup import lookup

NORM_AXES = {"position": 1, "channel": 2}
"""Over what the keys [B, P, Dv] are normalised in the soft assignment; the published weights want `position`."""


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
            raise ConfigError(f"the cluster projector needs centres, got num_centers={num_centers} in {num_iters=}")
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
        """Project features [B, P, Dv] to [B, P, D]; images do not see each other."""
        values = self.f(features)
        centers = self._centers(features, values)
        gathered = self._gather(features, values, centers)
        projected: Tensor = self.mlp(features + gathered)
        return projected

    def _pool(self, tokens: Tensor) -> Tensor:
        """[B, P, Dv] to [B, N, Dv]: means of (overlapping) windows in raster order."""
        return F.adaptive_avg_pool1d(tokens.transpose(1, 2), self.num_centers).transpose(1, 2)

    def _centers(self, features: Tensor, values: Tensor) -> Tensor:
        """Centres [B, N, Dv] after the rounds of soft assignment; each is a SUM over patches, as published."""
        keys = _unit(self.v(features), axis=self.norm_axis)
        centers = self._pool(features)
        for _ in range(self.num_iters):
            scores = _unit(self.c(centers), axis=2) @ keys.transpose(1, 2)
            if self.temperature is not None:
                scores = scores / self.temperature.float()
            centers = scores.softmax(dim=1).to(values.dtype) @ values
        return centers

    def _gather(self, features: Tensor, values: Tensor, centers: Tensor) -> Tensor:
        """What each patch takes from its centre, [B, P, Dv]: its similarity times the mean of the centre's patches."""
        cosine = _unit(centers, axis=2) @ _unit(features, axis=2).transpose(1, 2)
        similarity, owner = torch.sigmoid(self.sim_beta.float() + self.sim_alpha.float() * cosine).max(dim=1)
        weight = similarity.to(values.dtype)[..., None]
        # One-hot products instead of a scatter: exact, and the same on every run on a GPU.
        member = F.one_hot(owner, self.num_centers).to(values.dtype)
        total = member.transpose(1, 2) @ (weight * values) + self._pool(values)
        mean = total / (member.sum(dim=1, dtype=torch.float32)[..., None] + 1)
        return weight * (member @ mean.to(values.dtype))


def _unit(tokens: Tensor, *, axis: int) -> Tensor:
    """Float32 vectors of length one along `axis`."""
    return F.normalize(tokens.float(), dim=axis)


def cluster_projector(vision: int, text: int, settings: dict[str, Any] | None) -> ClusterProjector:
    """The projector with the settings that a configuration holds (`projector_kwargs`).

    Raises:
        ConfigError: a setting is unknown or out of range.
    """
    known = {"num_centers", "num_iters", "norm", "temperature"}
    unknown = sorted(set(settings or {}) - known)
    if unknown:
        raise ConfigError(f"unknown settings of the cluster projector: {unknown}; known: {sorted(known)}")
    return ClusterProjector(vision, text, **(settings or {}))
