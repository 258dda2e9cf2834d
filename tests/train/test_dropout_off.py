"""Validation draws no random numbers and does not switch quantized layers."""

from __future__ import annotations

import torch
from torch import nn

from llava.train.validation import dropout_off


class _Functional(nn.Module):
    """Dropout that reads the mode of its module, as attention layers do."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(values, 0.5, training=self.training)


class _Quantized(nn.Module):
    pass


_Quantized.__module__ = "bitsandbytes.nn.modules"


def test_every_dropout_is_off_and_quantized_layers_keep_their_mode() -> None:
    model = nn.ModuleList([_Functional(), nn.Dropout(0.5), _Quantized(), nn.Linear(2, 2).eval()])
    ones = torch.ones(100)
    with dropout_off(model):
        assert torch.equal(model[0](ones), ones) and torch.equal(model[1](ones), ones)
        assert [module.training for module in model] == [False, False, True, False]
    assert [module.training for module in model] == [True, True, True, False]
