"""Data-dependent initialization of a projector: scaled to its inputs and to the word embeddings.

    tower features --(standardized per channel)--> random projection --> around the mean word, as long as a word

The output of a fresh projector is dominated by what all images have in common, and a run of a few minutes would spend
its steps on removing it. The weights stay random; only scale and offset are fitted, on some training images and
without labels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from llava.errors import ConfigError
from llava.model.modeling import LlavaMedForConditionalGeneration

BATCH_SIZE = 16


@torch.no_grad()
def calibrate_projector(model: LlavaMedForConditionalGeneration, pixels: Tensor, *, seed: int) -> None:
    """Reinitialize a model's projector, fitted to images and word embeddings.

    Args:
        model: its projector is a sequence of linear layers with activations between them.
        pixels: [N, 3, H, W] of typical images.
        seed: seed of the weights.

    Raises:
        ConfigError: the projector has no linear layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = torch.cat([model.tower_features(batch) for batch in pixels.split(BATCH_SIZE)])
        words = cast(nn.Embedding, model.get_input_embeddings()).weight
        fit_projector(model.model.multi_modal_projector, features, words)


@torch.no_grad()
def fit_projector(projector: nn.Module, features: Tensor, words: Tensor) -> None:
    """Initialize a projector in place, with fitted scale and offset; the current random state is used.

    Args:
        projector: maps [N, P, Dv] to [N, P, D]; a sequence of linear layers with activations between them.
        features: [N, P, Dv] of typical images.
        words: [V, D] embeddings of the language model.

    Raises:
        ConfigError: the projector has no linear layer.
    """
    layers = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ConfigError("the projector has no linear layers; only a projector with linear layers can be calibrated")
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
