"""Ties of the cluster projector: patches whose two best centers differ by less than rounding.

A recorded number then follows one way of rounding, and another processor may compute the other one.
"""

from __future__ import annotations

from itertools import chain, combinations

import torch
from torch import Tensor

from llava.model.multimodal_projector import ClusterProjector

Place = tuple[int, int]
"""Image and patch."""

TIE = 2.0**-22
"""Difference of similarities up to which a patch is tied: four units in the last place of numbers from 0.5 to 1."""

MAX_TIED = 8
"""Largest number of tied patches of which every way is tried."""


class SwappedProjector(ClusterProjector):
    """Projector in which some patches join their second best center."""

    swapped: tuple[Place, ...] = ()
    tied: list[Place]

    def owners(self, similarity: Tensor) -> Tensor:
        """Return the center that each patch joins, [B, P]."""
        best = super().owners(similarity)
        others = self.masked(similarity.detach(), best)
        self.tied = (similarity.detach().amax(dim=1) - others.amax(dim=1) < TIE).nonzero().tolist()
        second = super().owners(others)
        for image, patch in self.swapped:
            best[image, patch] = second[image, patch]
        return best

    def masked(self, similarity: Tensor, best: Tensor) -> Tensor:
        """Return similarities [B, N, P] without those of the best center and of its equals."""
        first = self.first_equal(similarity.shape[2], similarity.device)
        return similarity.masked_fill(first[None, :, None] == best[:, None, :], -torch.inf)


def closest(projector: ClusterProjector, features: Tensor, recorded: Tensor) -> ClusterProjector:
    """Return the projector with the way of rounding its ties that comes closest to recorded values.

    Args:
        projector: the projector, with the published norm and no temperature.
        features: [B, P, Dv].
        recorded: [B, P, D].
    """
    widths = projector.mlp[0].in_features, projector.mlp[2].out_features
    swapped = SwappedProjector(*widths, num_centers=projector.num_centers, num_iters=projector.num_iters)
    swapped.load_state_dict(projector.state_dict())
    with torch.no_grad():
        swapped(features)
        tied = [(image, patch) for image, patch in swapped.tied[:MAX_TIED]]
        best, least = (), torch.inf
        for ways in chain.from_iterable(combinations(tied, size) for size in range(len(tied) + 1)):
            swapped.swapped = ways
            difference = float((swapped(features) - recorded).abs().max())
            if difference < least:
                best, least = ways, difference
    swapped.swapped = best
    return swapped
