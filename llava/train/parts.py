"""Parts of a model that a run trains: adapters, frozen weights, marker rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import nn

from llava.model import lora
from llava.model.builder import LoadedModel
from llava.model.checkpoint.save import check_not_own_base
from llava.train.checkpointing import Kind
from llava.train.specs import PartsSpec


def freeze_and_adapt(loaded: LoadedModel, spec: PartsSpec, *, folder: Path) -> tuple[nn.Module, Kind]:
    """Add the adapters and freeze the parts that are not trained.

    Args:
        loaded: the model.
        spec: what trains.
        folder: output folder of the run.

    Returns:
        The network (a peft model with an adapter), and what is saved.
    """
    network: nn.Module = loaded.model
    is_adapted = spec.lora is not None or spec.tower_lora is not None
    if is_adapted or spec.projector_only:
        check_not_own_base(folder, loaded.origin)
    if is_adapted:
        network = lora.add_lora(loaded, language=spec.lora is not None, tower=spec.tower_lora, **(spec.lora or {}))
    lora.freeze_for(
        network,
        projector_only=spec.projector_only,
        freeze_backbone=spec.freeze_backbone,
        freeze_projector=spec.freeze_projector,
        train_tower=spec.train_tower,
        has_adapter=spec.lora is not None,
        freeze_tower_adapter=spec.tower_lora is not None and spec.tower_lora.frozen,
    )
    markers = [token for token in loaded.processor.marker_ids if token is not None]
    if spec.projector_only and loaded.model.config.use_im_start_end:
        lora.train_marker_rows(network, markers)
    if spec.checkpoints_activations and not all(p.requires_grad for p in loaded.model.parameters()):
        cast(Any, loaded.model).enable_input_require_grads()
    cast(Any, loaded.model.config.text_config).use_cache = False
    if is_adapted:
        return network, "adapter"
    return network, "projector" if spec.projector_only else "model"
