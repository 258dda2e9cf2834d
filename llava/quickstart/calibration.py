"""A better start for a projector: scaled to the features it will see and to the words it will stand among.

    tower features --(standardised per channel)--> random projection --> around the mean word, as long as a word

A fresh projector passes on mostly what all pictures have in common, and a run of a few minutes spends its steps on
removing it. The weights stay random; only scale and offset are fitted, on some training pictures and without labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llava.data.images import load as load_image
from llava.errors import ConfigError
from llava.model.building import Loaded

BATCH_SIZE = 16


@torch.no_grad()
def tower_features(loaded: Loaded, paths: Sequence[Path]) -> Tensor:
    """Return the tower's features of pictures, [N, P, Dv]."""
    batches = [paths[start : start + BATCH_SIZE] for start in range(0, len(paths), BATCH_SIZE)]
    return torch.cat(
        [
            loaded.model.tower_features(loaded.processor.pixels([load_image(path) for path in batch]))
            for batch in batches
        ]
    )


@torch.no_grad()
def calibrate(projector: nn.Module, features: Tensor, words: Tensor) -> None:
    """Fit scale and offset of a projector in place.

    Args:
        projector: maps [N, P, Dv] to [N, P, D]; a chain of linear layers with activations between them.
        features: [N, P, Dv] of typical pictures.
        words: [V, D] embeddings of the language model.

    Raises:
        ConfigError: the projector has no linear layer.
    """
    layers = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ConfigError("only a projector with linear layers can be calibrated")
    first, last = layers[0], layers[-1]
    rows = features.flatten(0, 1).float()
    for layer in layers:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        cast(Tensor, layer.bias).zero_()
    first.weight.div_(rows.std(dim=0).clamp_min(1e-6))
    first.bias.copy_(-(first.weight @ rows.mean(dim=0)))
    outputs = cast(Any, projector)(features).flatten(0, 1).float()
    center = outputs.mean(dim=0)
    scale = words.float().norm(dim=1).mean() / (outputs - center).norm(dim=1).mean()
    last.weight.mul_(scale)
    last.bias.copy_((last.bias - center) * scale + words.float().mean(dim=0))
