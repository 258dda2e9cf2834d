"""Old names of training options, as the base class of the training arguments.

Old options are translated before transformers checks the new ones; options without effect are listed in one warning.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from llava.errors import ConfigError
from llava.train.early_checks import check_json, check_launched
from llava.utils.cli import flag

logger = logging.getLogger(__name__)

UNSUPPORTED: dict[str, str] = {
    "label_smoothing_factor": "omit it: the loss is plain cross-entropy",
    "data_seed": "omit it: --seed also determines the order of the rows",
    "dataloader_drop_last": "omit it: every row is trained, if necessary in a smaller last step",
    "include_num_input_tokens_seen": "omit it: metrics.jsonl holds the tokens per second",
    "neftune_noise_alpha": "omit it: its noise depends on the sequence length, and a row holds several sequences",
    "use_liger_kernel": "omit it: it has no kernels for these models, and only supervised tokens reach the "
    "language-model head",
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
    "data_aug": "omit it: the original passes it to the loader of the tower, where it means a device; images of "
    "medicine must not be mirrored or inverted",
    "num_latents": "",
    "qav_loss": "",
    "loss_alpha": "",
}
"""Unsupported fields and advice; a field with advice is rejected, the others are listed in one warning."""
# Rejected are fields that would change the loss or crash.

OFF_WORDS = ("no", "false")
"""Lowercase values that leave a rejected field off."""


def option(default: Any, help_text: str) -> Any:
    """Return a dataclass field with a default and a help text."""
    return field(default=default, metadata={"help": help_text})


@dataclass
class LegacyTrainingArguments(TrainingArguments):
    """Options of transformers' `Trainer` with the old names that published commands use.

    Raises:
        ConfigError: two names of one option have different values, or a value is not supported.
    """

    mm_vision_tower_lr: float | None = option(None, "learning rate of the vision tower")
    vision_tower_lr: float | None = option(None, "alias of --mm-vision-tower-lr")
    evaluation_strategy: str | None = option(None, "alias of --eval-strategy")
    warmup_ratio: float | None = option(None, "alias of --warmup-steps with a value below 1")
    fsdp_transformer_layer_cls_to_wrap: str | None = option(None, "alias of the field with this name in --fsdp-config")
    cache_dir: str | None = option(None, "accepted without effect; set HF_HOME instead")
    force_fsdp: bool = option(False, "accepted without effect")
    data_aug: bool = option(False, "only False is accepted")
    num_latents: int = option(256, "accepted without effect")
    qav_loss: bool = option(False, "accepted without effect")
    loss_alpha: float = option(0.5, "accepted without effect")

    def __post_init__(self) -> None:
        _refuse_unsupported(self)
        check_json(vars(self))
        if self.deepspeed:
            check_launched("--deepspeed")
        _apply_aliases(self)
        _set_device(self)
        _set_fsdp(self)
        _set_reports(self)
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.n_gpu > 1:
            _use_one_gpu(self)


def _apply_aliases(args: LegacyTrainingArguments) -> None:
    if args.evaluation_strategy is not None:
        if args.eval_strategy not in ("no", args.evaluation_strategy):
            raise ConfigError(
                f"--evaluation-strategy {args.evaluation_strategy} and --eval-strategy {args.eval_strategy} differ; "
                "set one of them"
            )
        args.eval_strategy = args.evaluation_strategy
    if args.warmup_ratio:
        if args.warmup_steps and args.warmup_steps != args.warmup_ratio:
            raise ConfigError(
                f"--warmup-ratio {args.warmup_ratio} and --warmup-steps {args.warmup_steps} differ; set one of them"
            )
        args.warmup_steps = args.warmup_ratio
    if args.vision_tower_lr is not None:
        if args.mm_vision_tower_lr not in (None, args.vision_tower_lr):
            raise ConfigError(
                f"--vision-tower-lr {args.vision_tower_lr} and --mm-vision-tower-lr {args.mm_vision_tower_lr} differ; "
                "set one of them"
            )
        args.mm_vision_tower_lr = args.vision_tower_lr


def _refuse_unsupported(args: LegacyTrainingArguments) -> None:
    for name, advice in UNSUPPORTED.items():
        if not advice:
            continue
        value = getattr(args, name)
        is_default = value == getattr(type(args), name)
        if not is_default and str(value).lower() not in OFF_WORDS:
            raise ConfigError(f"{flag(name)} {value} is not supported; {advice}")


def _set_device(args: LegacyTrainingArguments) -> None:
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not torch.accelerator.is_available():
        args.use_cpu = True
    is_ampere = has_gpu and torch.cuda.get_device_capability()[0] >= 8
    if args.tf32 and not is_ampere:
        logger.warning("--tf32 is ignored: it needs an NVIDIA GPU of the Ampere generation or later")
        args.tf32 = None


def _set_fsdp(args: LegacyTrainingArguments) -> None:
    wraps = args.fsdp_transformer_layer_cls_to_wrap
    if not args.fsdp or args.fsdp == "no":
        return
    if args.use_cpu:
        logger.warning("--fsdp is ignored: it needs GPUs; this run uses plain data parallelism (DDP)")
        args.fsdp = None
        args.fsdp_config = None
        return
    if wraps:
        config: dict[str, Any] = dict(args.fsdp_config) if isinstance(args.fsdp_config, dict) else {}
        config.setdefault("transformer_layer_cls_to_wrap", [wraps])
        args.fsdp_config = config


def _set_reports(args: LegacyTrainingArguments) -> None:
    given = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or [])
    wanted = dict.fromkeys(name for text in given for name in re.findall(r"[\w-]+", text))
    kept = []
    for name in wanted:
        if name in ("none", "all"):
            continue
        if importlib.util.find_spec(name) is None:
            logger.warning(
                "--report-to %s is ignored: the package is not installed; metrics are in metrics.jsonl", name
            )
            continue
        if name == "wandb" and not os.environ.get("WANDB_API_KEY"):
            _keep_wandb_offline()
        kept.append(name)
    args.report_to = kept or "none"


def _keep_wandb_offline() -> None:
    """Set wandb to offline mode, unless WANDB_MODE is set."""
    # Without an API key wandb would ask for one and wait.
    if os.environ.setdefault("WANDB_MODE", "offline") == "offline":
        logger.warning(
            "--report-to wandb: WANDB_API_KEY is not set, so the run is written to wandb/offline-run-*; upload it with "
            "`wandb sync`, or set WANDB_API_KEY (or WANDB_MODE=online after `wandb login`)"
        )


def _use_one_gpu(args: LegacyTrainingArguments) -> None:
    """Restrict the process to one GPU."""
    # `DataParallel` would split the flat batch, whose sequences share one row.
    logger.warning(
        "%d GPUs are visible, but one process uses only the first. To use all, run torchrun --nproc_per_node=%d ...",
        args.n_gpu,
        args.n_gpu,
    )
    args._n_gpu = 1


def warn_without_effect(
    words: Sequence[str], given: Sequence[Mapping[str, Any] | object], defaults: Sequence[object]
) -> None:
    """List every field that was set and has no effect, in one warning.

    Args:
        words: the command line; fields that only transformers changed are not listed.
        given: the parsed groups.
        defaults: the default of each group.
    """
    found = [
        flag(name)
        for values, standard in zip(given, defaults, strict=True)
        for name, advice in UNSUPPORTED.items()
        if not advice
        and hasattr(values, name)
        and getattr(values, name) != getattr(standard, name, None)
        and is_named(name, words)
    ]
    if found:
        logger.warning("accepted without effect: %s", ", ".join(found))


def is_named(name: str, words: Sequence[str]) -> bool:
    """Return whether a word is the option, a prefix of it, or its `--no_` form."""
    options = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
    return any(f"--{form}{name}".startswith(option) for option in options for form in ("", "no_"))
