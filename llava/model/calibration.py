"""A better start for a projector: scaled to the features it will see and to the words it will stand among.

    tower features --(standardised per channel)--> random projection --> around the mean word, as long as a word

A fresh projector passes on mostly what all pictures have in common, and a run of a few minutes spends its steps on
removing it. The weights stay random; only scale and offset are fitted, on some training pictures and without labels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from llava.errors import ConfigError
from llava.model.modeling import LlavaMedForConditionalGeneration

BATCH_SIZE = 16


@torch.no_grad()
def calibrate(model: LlavaMedForConditionalGeneration, pixels: Tensor, *, seed: int) -> None:
    """Draw a model's projector anew, fitted to pictures and words.

    Args:
        model: its projector is a chain of linear layers with activations between them.
        pixels: [N, 3, H, W] of typical pictures.
        seed: of the weights.

    Raises:
        ConfigError: the projector has no linear layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = torch.cat([model.tower_features(batch) for batch in pixels.split(BATCH_SIZE)])
        words = cast(nn.Embedding, model.get_input_embeddings()).weight
        fit(model.model.multi_modal_projector, features, words)


@torch.no_grad()
def fit(projector: nn.Module, features: Tensor, words: Tensor) -> None:
    """Fit scale and offset of a projector in place; its weights are drawn from the current random state.

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
