"""Trainable parts: adapters, frozen parts, marker rows, and a report of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llava.errors import ConfigError
from llava.model.builder import LoadedModel
from llava.model.checkpoint.weight_names import NEWLINE
from llava.model.tower_lora import TowerLora, set_tower_dropout, start_tower_lora, tower_linear_layers

PARTS = {
    "multi_modal_projector": "projector",
    NEWLINE: "projector",
    "vision_tower": "vision tower",
    "lora_": "adapter",
}
"""Title of the part that a parameter belongs to, by a fragment of its name; adapters of the tower have their own."""

LANGUAGE = "language_model."

UNCALLED = frozenset({"out_proj", "dt_proj"})
"""Layers of state-space mixers whose weights kernels read without calling them: an adapter would not be trained, and
would change the model when it is merged."""


def language_linear_layers(model: nn.Module) -> str | list[str]:
    """Return a regular expression for the linear layers inside the language model, or their names.

    Head, projector and tower are left out, as in the original trainers. A pattern instead of a list of names keeps the
    adapter's configuration short and valid for every depth.

    Raises:
        ConfigError: the language model has no linear layer.
    """
    names = [name for name, _ in model.named_modules() if LANGUAGE in name]
    wanted = {name for name in names if _takes_adapter(model, name)}
    if not wanted:
        raise ConfigError("the language model has no linear layers for LoRA; train all of it (--lora-enable False)")
    # The last part of a name is enough for most models; some reuse a layer's name for another module.
    for num_parts in (1, 2, 3):
        ends = {".".join(_inside(name).split(".")[-num_parts:]) for name in wanted}
        between = r".*\." if num_parts == 1 else r"(?:.*\.)?"
        pattern = rf"(?:.*\.)?language_model\.{between}(?:{'|'.join(map(re.escape, sorted(ends)))})"
        if {name for name in names if re.fullmatch(pattern, name)} == wanted:
            return pattern
    return sorted(wanted)


def _inside(name: str) -> str:
    """Return a module's name inside the language model."""
    return name.split(LANGUAGE, 1)[1]


def _takes_adapter(model: nn.Module, name: str) -> bool:
    """Return whether a module is a linear layer of the language model that peft can adapt."""
    module, last = model.get_submodule(name), name.rsplit(".", 1)[-1]
    if not isinstance(module, nn.Linear | Conv1D) or last == "lm_head":
        return False
    if last in UNCALLED and hasattr(model.get_submodule(name.rpartition(".")[0]), "A_log"):
        return False
    return _returns_one_tensor(module)


def _returns_one_tensor(module: nn.Module) -> bool:
    """Return whether a layer computes one tensor; a router that is a linear layer returns scores too."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward) or "transformers" not in type(module).__module__:
        return True  # quantized layers are other libraries'
    weight: Any = module.weight
    with torch.no_grad():
        return isinstance(module(weight.new_zeros(1, weight.shape[1])), Tensor)


def add_lora(
    loaded: LoadedModel,
    *,
    r: int = 64,
    alpha: int = 16,
    dropout: float = 0.05,
    bias: str = "none",
    target: str | None = None,
    targets: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    language: bool = True,
    tower: TowerLora | None = None,
) -> PeftModel:
    """Add one LoRA adapter to language model, tower or both.

    peft freezes the rest, and `freeze_for` unfreezes parts.

    Args:
        loaded: the model.
        r: rank.
        alpha: the adapter is scaled by alpha / r.
        dropout: dropout of the adapter's input.
        bias: which biases train: `none`, `all` or `lora_only`.
        target: regular expression for other layers than `language_linear_layers`.
        targets: names of layers, or one regular expression, that choose among `language_linear_layers`.
        options: other settings of peft's `LoraConfig`: `use_rslora`, `use_dora`, `init_lora_weights`,
            `modules_to_save`.
        language: whether the language model is adapted; the settings above are those of its adapter.
        tower: adapter of the vision tower, with a rank, scale and dropout of its own; None for none.

    Raises:
        ConfigError: no layer matches, or peft rejects a setting.
        CheckpointError: the tower's adapter cannot start from its weights.
    """
    patterns = [target or target_pattern(loaded.model, targets)] if language else []
    own: dict[str, Any] = dict(options or {}) if language else {}
    check_saved_modules(loaded.model, own.get("modules_to_save"))
    if tower is not None:
        layers = tower_linear_layers(loaded.model, all_blocks=tower.frozen)
        patterns.append(layers)
        own |= {"rank_pattern": {layers: tower.r}, "alpha_pattern": {layers: tower.alpha}}
    try:
        config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            bias=cast(Any, bias),
            target_modules=patterns[0] if len(patterns) == 1 else "|".join(f"(?:{pattern})" for pattern in patterns),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in loaded.model.modules()),
            task_type="CAUSAL_LM",
            **own,
        )
        network = cast(PeftModel, get_peft_model(cast(Any, loaded.model), config))
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"LoRA with r={r}, bias={bias!r} cannot be added: {error}") from error
    if tower is not None:
        set_tower_dropout(network, tower.dropout)
        start_tower_lora(network, tower)
    return network


def target_pattern(model: nn.Module, targets: Sequence[str] | None) -> str:
    """Return a regular expression for the layers that names, or one regular expression, choose.

    Raises:
        ConfigError: a name fits no linear layer of the language model; the message lists those that do.
    """
    whole = _as_pattern(language_linear_layers(model))
    if not targets or list(targets) == ["all-linear"]:
        return whole
    layers = [name for name, _ in model.named_modules() if re.fullmatch(whole, name)]
    known = sorted({name.rpartition(".")[2] for name in layers})
    patterns = [rf"(?:.*\.)?{re.escape(target)}" if re.fullmatch(r"[\w.]+", target) else target for target in targets]
    for target, pattern in zip(targets, patterns, strict=True):
        try:
            found = any(re.fullmatch(pattern, name) for name in layers)
        except re.error as error:
            raise ConfigError(f"--lora-target-modules {target}: not a regular expression ({error})") from None
        if not found:
            raise ConfigError(
                f"--lora-target-modules {target}: no linear layer of the language model has this name; expected one or "
                f"more of {', '.join(known)}, or a regular expression for whole names such as {layers[0]}"
            )
    chosen = "|".join(f"(?:{pattern})" for pattern in patterns)
    return f"(?={whole}$)(?:{chosen})"


def check_saved_modules(model: nn.Module, names: Sequence[str] | None) -> None:
    """Check that modules which train in full exist outside projector and tower.

    Raises:
        ConfigError: a name fits no module, or one that other options train.
    """
    for name in names or ():
        found = [path for path, _ in model.named_modules() if path.endswith(name)]
        if not found:
            raise ConfigError(f"--modules-to-save {name}: no such module; expected names such as embed_tokens, lm_head")
        if any("multi_modal_projector" in path or "vision_tower" in path for path in found):
            raise ConfigError(
                f"--modules-to-save {name} is in the projector or the tower; the projector trains anyway, and "
                "--unfreeze-mm-vision-tower trains the tower"
            )


def _as_pattern(layers: str | list[str]) -> str:
    return layers if isinstance(layers, str) else "|".join(map(re.escape, layers))


def freeze_for(
    model: nn.Module,
    *,
    projector_only: bool = False,
    freeze_backbone: bool = False,
    freeze_projector: bool = False,
    train_tower: bool = False,
    has_adapter: bool = False,
    freeze_tower_adapter: bool = False,
) -> None:
    """Set which parameters train; an adapter does, wherever it is.

    Args:
        model: the model, or a peft model around it.
        projector_only: stage 1; with markers, `train_marker_rows` adds their two rows.
        freeze_backbone: the language model's weights do not train (an adapter on it still does).
        freeze_projector: the projector does not train.
        train_tower: the vision tower trains too.
        has_adapter: language weights train through the adapter only, and biases where `add_lora` unfroze them.
        freeze_tower_adapter: the adapter of the vision tower does not train.

    Raises:
        ConfigError: no parameter would train.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if "lora_" in name:
            parameter.requires_grad_(not (freeze_tower_adapter and "vision_tower." in name))
        elif "multi_modal_projector." in name or name.endswith(NEWLINE):
            parameter.requires_grad_(not freeze_projector)
        elif "vision_tower." in name:
            parameter.requires_grad_(train_tower and not projector_only)
        elif has_adapter:
            parameter.requires_grad_(parameter.requires_grad and not projector_only)
        else:
            parameter.requires_grad_(not (projector_only or freeze_backbone))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("every part is frozen, so nothing would train; drop one of the --freeze-* flags")


def train_marker_rows(model: nn.Module, token_ids: Sequence[int]) -> list[nn.Parameter]:
    """Make only some embedding rows train: the markers of stage 1, in both roles if weights are tied.

    The gradient of every other row is set to zero, so momentum never moves one. Weight decay would: the table is marked
    by `is_marker_table`, and needs an optimizer group without decay (`train.optimizer` creates it).

    Args:
        model: the model, or a peft model around it; everything else keeps its state.
        token_ids: ids of the rows.

    Returns:
        The embedding parameters that now require gradients.

    Raises:
        ConfigError: `token_ids` is empty, or outside the vocabulary.
    """
    table: Any = cast(Any, model).get_input_embeddings().weight
    num_rows = int(getattr(table, "ds_shape", table.shape)[0])  # a table that ZeRO-3 spread over ranks looks empty
    if not token_ids or not all(0 <= token < num_rows for token in token_ids):
        raise ConfigError(f"marker rows {list(token_ids)} are not in the vocabulary of {num_rows} tokens")
    keep = torch.zeros(num_rows, 1, dtype=torch.bool)
    keep[list(token_ids)] = True

    def only_markers(gradient: Tensor) -> Tensor:
        return gradient * keep.to(gradient.device)

    table.requires_grad_(True)
    table.register_hook(only_markers)
    table.is_marker_table = True
    table.num_marker_rows = len(set(token_ids))
    return [table]


def trainable_report(model: nn.Module) -> str:
    """Return a table of the tensors, parameters and trained parameters of each part."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, parameter in model.named_parameters():
        part = next((title for key, title in PARTS.items() if key in name), "language model")
        part = "tower adapter" if part == "vision tower" and "lora_" in name else part
        counts[part][0] += 1
        counts[part][1] += _size(parameter)
        counts[part][2] += _num_trained(parameter)
    rows: list[tuple[Any, ...]] = [(part, *numbers) for part, numbers in sorted(counts.items())]
    rows.append(("total", *(sum(numbers[column] for numbers in counts.values()) for column in range(3))))
    lines = [f"{'part':<16}{'tensors':>9}{'parameters':>16}{'trained':>16}{'share':>9}"]
    for part, tensors, size, trained in rows:
        lines.append(f"{part:<16}{tensors:>9}{size:>16,}{trained:>16,}{trained / max(size, 1):>9.2%}")
    return "\n".join(lines) + "\n"


def _size(parameter: Any) -> int:
    """Return the number of weights in a tensor, also if it is sharded (ZeRO-3) or packed (4 bits)."""
    if (state := getattr(parameter, "quant_state", None)) is not None and getattr(state, "shape", None) is not None:
        return int(state.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _num_trained(parameter: Any) -> int:
    if not parameter.requires_grad:
        return 0
    width = getattr(parameter, "ds_shape", parameter.shape)[-1]
    return int(parameter.num_marker_rows * width) if hasattr(parameter, "num_marker_rows") else _size(parameter)
