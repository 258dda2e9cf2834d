"""Check that weights are finite.

A diverged run leaves weights that answer with noise and raise no error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from llava.errors import CheckpointError
from llava.model.checkpoint.files.shards import TensorReader
from llava.model.checkpoint.formats import Checkpoint


def is_finite(tensor: Tensor) -> bool:
    """Return whether no value of a floating-point tensor is infinite or NaN, in one pass without a copy."""
    if tensor.numel() == 0:
        return True
    values = tensor.detach()
    # Extremes propagate NaN, and take a tenth of the time of `torch.isfinite` over all values (measured in bfloat16).
    extremes = torch.aminmax(values.float() if values.element_size() == 1 else values)
    return bool(torch.isfinite(torch.stack(extremes)).all())


def nonfinite_names(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Yield the names of the tensors that hold values which are not finite."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta and not is_finite(tensor):
            yield name


def stored_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in the files of a checkpoint, with its name there."""
    yield from TensorReader({**checkpoint.extra, **checkpoint.tensors})


@torch.no_grad()
def check_finite(tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Check that every weight is finite.

    Args:
        tensors: names and weights.
        source: the checkpoint, for the message.

    Raises:
        CheckpointError: one is not; names the tensor.
    """
    for name in nonfinite_names(tensors):
        raise CheckpointError(
            f"{source}: {name} holds values that are not finite, as after a training run that diverged; use an earlier "
            "checkpoint of that run. `llava checkpoint doctor --weights` lists all such tensors"
        )
