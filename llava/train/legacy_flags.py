"""The seeds' flags in today's words (architecture 3.2). Everything that has no effect is named in ONE warning."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava.errors import ConfigError
from llava.utils.jsonl import NOT_JSON

if TYPE_CHECKING:
    from llava.train.args import LlavaTrainingArguments

logger = logging.getLogger(__name__)

UNSUPPORTED: dict[str, str] = {
    "label_smoothing_factor": "leave it out: the loss is the plain cross-entropy",
    "data_seed": "leave it out: --seed decides the order of the rows too",
    "dataloader_drop_last": "leave it out: every row is trained, in a short last step if need be",
    "include_num_input_tokens_seen": "leave it out: metrics.jsonl holds the tokens per second",
    "neftune_noise_alpha": "leave it out: its noise depends on the length of one sequence, and a row here holds many",
    "use_liger_kernel": "leave it out: its kernels know no model of this family, and only supervised tokens reach the "
    "language-model head already",
    "auto_find_batch_size": "",
    "dataloader_in_order": "",
    "dataloader_multiprocessing_context": "",
    "dataloader_pin_memory": "",
    "torch_empty_cache_steps": "",
    "cache_dir": "",
    "force_fsdp": "",
    "liger_kernel_config": "",
    "lazy_preprocess": "",
    "is_multimodal": "",
    "lora_weight_path": "",
    "mpt_attn_impl": "",
}
"""Accepted fields that decide nothing here, and what to do instead of those whose loss would be promised or that would
crash: these are refused. The others are named in one warning."""

OFF_WORDS = ("no", "false")
"""Words, in small letters, that ask a refused field for nothing."""

CONFIG_FILES = ("deepspeed", "fsdp_config")
"""Fields that hold the name of a JSON file, or JSON itself."""

JSON_FIELDS = (*CONFIG_FILES, "accelerator_config", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs")
"""Fields that may hold JSON itself."""


def settle(args: LlavaTrainingArguments) -> None:
    """Translate old fields before transformers checks the new ones.

    Raises:
        ConfigError: two names of one field differ, or a field asks for what is not there.
    """
    _refuse_unsupported(args)
    _check_values(args)
    if args.evaluation_strategy is not None:
        if args.eval_strategy not in ("no", args.evaluation_strategy):
            raise ConfigError(
                f"--evaluation_strategy {args.evaluation_strategy} and --eval_strategy {args.eval_strategy} differ; "
                "give one"
            )
        args.eval_strategy = args.evaluation_strategy
    if args.warmup_ratio:
        if args.warmup_steps and args.warmup_steps != args.warmup_ratio:
            raise ConfigError(f"--warmup_ratio {args.warmup_ratio} and --warmup_steps {args.warmup_steps}; give one")
        args.warmup_steps = args.warmup_ratio
    if args.vision_tower_lr is not None:
        if args.mm_vision_tower_lr not in (None, args.vision_tower_lr):
            raise ConfigError(
                f"--vision_tower_lr {args.vision_tower_lr} and --mm_vision_tower_lr {args.mm_vision_tower_lr} differ; "
                "give one"
            )
        args.mm_vision_tower_lr = args.vision_tower_lr
    _settle_device(args)
    _settle_fsdp(args)
    _settle_reports(args)


def _refuse_unsupported(args: LlavaTrainingArguments) -> None:
    for name, advice in UNSUPPORTED.items():
        if not advice:
            continue
        value = getattr(args, name)
        is_default = value == getattr(type(args), name)
        if not is_default and str(value).lower() not in OFF_WORDS:
            raise ConfigError(f"--{name} {value} is not supported; {advice}")


def _check_values(args: LlavaTrainingArguments) -> None:
    if args.max_tokens_per_row < 1:
        raise ConfigError(f"--max_tokens_per_row is {args.max_tokens_per_row}; expected at least 1 (default 8192)")
    for name in JSON_FIELDS:
        value = getattr(args, name)
        if not isinstance(value, str) or not value:
            continue
        is_json = value.lstrip().startswith("{")
        if name in CONFIG_FILES and not is_json and not Path(value).is_file():
            raise ConfigError(f"--{name} {value}: no such file; expected a JSON file")
        if is_json or name in CONFIG_FILES:
            _check_json(name, value, value if is_json else None)


def _check_json(name: str, value: str, text: str | None) -> None:
    """Make sure that an option is a JSON object, written on the command line (`text`) or in the file it names."""
    try:
        content = json.loads(text if text is not None else Path(value).read_text(encoding="utf-8"))
    except (OSError, *NOT_JSON) as error:
        raise ConfigError(f"--{name} {value}: not JSON: {error}; expected a JSON object") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--{name} {value}: expected a JSON object, got {type(content).__name__}")


def _settle_device(args: LlavaTrainingArguments) -> None:
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not torch.accelerator.is_available():
        args.use_cpu = True
    is_ampere = has_gpu and torch.cuda.get_device_capability()[0] >= 8
    if args.tf32 and not is_ampere:
        logger.warning("--tf32 needs an NVIDIA GPU of the Ampere generation or later and is ignored here")
        args.tf32 = None


def _settle_fsdp(args: LlavaTrainingArguments) -> None:
    wraps = args.fsdp_transformer_layer_cls_to_wrap
    if not args.fsdp or args.fsdp == "no":
        return
    if args.use_cpu:
        logger.warning("--fsdp shards on GPUs only; without one this runs as plain data parallel (DDP)")
        args.fsdp = None
        args.fsdp_config = None
        return
    if wraps:
        config: dict[str, Any] = dict(args.fsdp_config) if isinstance(args.fsdp_config, dict) else {}
        config.setdefault("transformer_layer_cls_to_wrap", [wraps])
        args.fsdp_config = config


def _settle_reports(args: LlavaTrainingArguments) -> None:
    wanted = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or [])
    kept = []
    for name in wanted:
        if name in ("none", "all"):
            continue
        if importlib.util.find_spec(name if name != "tensorboard" else "tensorboard") is None:
            logger.warning("--report_to %s: the package is not installed; metrics stay in metrics.jsonl", name)
            continue
        if name == "wandb" and not os.environ.get("WANDB_API_KEY"):
            _keep_wandb_offline()
        kept.append(name)
    args.report_to = kept or "none"


def _keep_wandb_offline() -> None:
    """Without a key wandb would ask for one and wait; whoever has set its mode has decided."""
    if os.environ.setdefault("WANDB_MODE", "offline") == "offline":
        logger.warning(
            "--report_to wandb: WANDB_API_KEY is not set, so the run stays in the folder wandb/offline-run-*; upload "
            "it with `wandb sync`, or set WANDB_API_KEY (or WANDB_MODE=online after `wandb login`)"
        )


def use_one_gpu(args: LlavaTrainingArguments) -> None:
    """One process trains on one GPU; `DataParallel` would tear the flat batch apart."""
    logger.warning(
        "%d GPUs are visible to one process; it uses the first. To use all: torchrun --nproc_per_node=%d ...",
        args.n_gpu,
        args.n_gpu,
    )
    args._n_gpu = 1


def warn_without_effect(
    words: Sequence[str], given: Sequence[Mapping[str, Any] | object], defaults: Sequence[object]
) -> None:
    """Name every accepted field that was set and has no effect, in one warning.

    Args:
        words: the command line; transformers changes some fields by itself, and those nobody asked for.
        given: the parsed groups.
        defaults: what the fields of each are when nobody sets them.
    """
    found = [
        f"--{name}"
        for values, standard in zip(given, defaults, strict=True)
        for name, advice in UNSUPPORTED.items()
        if not advice
        and hasattr(values, name)
        and getattr(values, name) != getattr(standard, name, None)
        and _is_named(name, words)
    ]
    if found:
        logger.warning("accepted without effect: %s", ", ".join(found))


def _is_named(name: str, words: Sequence[str]) -> bool:
    """A word is the option, its beginning, or its `--no_` form."""
    options = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
    return any(f"--{form}{name}".startswith(option) for option in options for form in ("", "no_"))
