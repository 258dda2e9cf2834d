"""Contents of adapters of transformers' Llava, and reasons why one cannot be used; without torch.

peft, TRL, LLaMA-Factory and ms-swift write the same files, under names of any version of transformers:

    base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight      since 4.52
    base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight      before
    base_model.model.model.multi_modal_projector.linear_1.weight                       a weight that was trained whole
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llava.model.checkpoint.formats import ADAPTER_CONFIG_FILE, Checkpoint
from llava.model.checkpoint.weight_names import HF_PREFIXES, PEFT_PREFIX, renamed_prefix

OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` that also change the base: such an adapter was not trained on its published weights."""

UNSUPPORTED = (
    *("use_qalora", "alora_invocation_tokens", "layer_replication", "trainable_token_indices", "target_parameters"),
    *("use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
"""Settings under which an adapter is more than matrices of layers and weights that were trained whole."""

MATRIX = re.compile(
    r"(?P<layer>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(?:\.default)?(?P<rest>\.weight|\.bias)?"
)
PAIRS = (("A", "B"), ("embedding_A", "embedding_B"))
WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
"""Parts of a name that peft's wrappers add to a weight's own."""


@dataclass(slots=True)
class AdaptedLayer:
    """Adapted layer: its name in the base, and the tensors of the file by their part (`A`, `B.bias`, ...)."""

    base_name: str
    parts: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class HfAdapterFile:
    """Content of an adapter of transformers' Llava.

    Attributes:
        layers: adapted layers by our names.
        replaced: tensors of the file that replace a weight, by our name of the weight.
        unknown: tensors of the file that belong to no part of the model.
    """

    layers: dict[str, AdaptedLayer] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def strange_settings(config: Mapping[str, Any], unsupported: Collection[str]) -> list[str]:
    """Return the settings of an adapter_config.json that change more than LoRA's matrices do, in words."""
    strange = [f"{key} {str(config[key])[:60]}" for key in unsupported if config.get(key)]
    if config.get("peft_type") != "LORA":
        strange.append(f"peft_type {config.get('peft_type')!r}")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(OTHER_BASES):
        strange.append(f"init_lora_weights {start!r}, which changes the base too")
    return strange


def read_hf_adapter(checkpoint: Checkpoint) -> HfAdapterFile:
    """Sort the tensors of an adapter file by what they belong to."""
    content = HfAdapterFile()
    for name in checkpoint.tensors:
        bare = name.removeprefix(PEFT_PREFIX)
        matrix = MATRIX.fullmatch(bare)
        weight = WRAPPERS.sub("", bare) if matrix is None else f"{matrix['layer']}.weight"
        ours = renamed_prefix(weight, HF_PREFIXES)
        if ours is None or "lora_" in weight:
            content.unknown.append(name)
        elif matrix is None:
            content.replaced[ours] = name
        else:
            layer = content.layers.setdefault(ours.removesuffix(".weight"), AdaptedLayer(matrix["layer"]))
            bias = ".bias" if matrix["rest"] == ".bias" else ""
            layer.parts[matrix["part"] + bias] = name
    return content


def setting_of(config: Mapping[str, Any], name: str, patterns: str, base_name: str) -> Any:
    """Return the rank or alpha of a layer: of the first pattern that matches its name, else the default."""
    found = config.get(patterns) or {}
    # As peft matches them: a pattern is a regular expression for the end of a name.
    return next((value for key, value in found.items() if re.match(rf"(.*\.)?({key})$", base_name)), config.get(name))


def hf_adapter_refusals(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the reasons why an adapter of transformers' Llava cannot be used, from settings and headers."""
    config, content = checkpoint.adapter, read_hf_adapter(checkpoint)
    if strange := strange_settings(config, UNSUPPORTED):
        yield (
            f"{ADAPTER_CONFIG_FILE}: {', '.join(strange)}; expected LoRA. Merge it with peft's merge_and_unload, and "
            "pass the whole model"
        )
        return
    if content.unknown:
        yield f"tensor {content.unknown[0]} belongs to no part of transformers' Llava"
    if not content.layers:
        yield "it holds no LoRA matrices"
    for name, layer in content.layers.items():
        if problem := _layer_problem(checkpoint, layer):
            yield f"{name}: {problem}"
            return


def _layer_problem(checkpoint: Checkpoint, layer: AdaptedLayer) -> str | None:
    pair = next((pair for pair in PAIRS if {*pair} <= layer.parts.keys()), None)
    if pair is None:
        return "only one of LoRA's two matrices is there"
    r = setting_of(checkpoint.adapter, "r", "rank_pattern", layer.base_name)
    alpha = setting_of(checkpoint.adapter, "lora_alpha", "alpha_pattern", layer.base_name)
    if not _is_number(r) or not isinstance(r, int) or r < 1 or not _is_number(alpha):
        return f"r is {r!r}, lora_alpha {alpha!r}; expected numbers as in training"
    down, up = (checkpoint.tensors[layer.parts[part]].shape for part in pair)
    if len(down) != 2 or len(up) != 2 or (down[0], up[1]) != (r, r):
        return f"matrices {down} and {up} do not have the rank r = {r} of {ADAPTER_CONFIG_FILE}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
