"""Parsing of the training command line into arguments, which build the specs of the other modules."""

from __future__ import annotations

import difflib
import json
import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from transformers import HfArgumentParser
from transformers.trainer_utils import IntervalStrategy

from llava.compat import parse_compat
from llava.errors import ConfigError
from llava.model.quantization import Quantization
from llava.train import legacy_flags, precision
from llava.train.args import DataArguments, LlavaTrainingArguments, ModelArguments
from llava.train.checkpointing import DEFAULT_OUTPUT
from llava.train.specs import ImageSpec, ModelSpec, ProvenanceSpec, ResumeSpec, RowsSpec, StreamSpec
from llava.utils.cli import with_dashes

logger = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.jsonl"
HELD_OUT_QUARANTINE_FILE = "quarantine-eval.jsonl"
RANK_QUARANTINE_FILE = "quarantine-{}.jsonl"
"""File of a stream's skipped rows on every rank except the first."""

FREE_MODEL_OPTIONS = frozenset({"model_name_or_path", "lora_weight_path", "mpt_attn_impl"})
"""Model options that a resumed run may change; weights are compared by `model_sha256`."""

DECISIVE_DATA_OPTIONS = ("image_aspect_ratio", "image_grid_pinpoints", "image_counts_as_one")
DECISIVE_TRAINING_OPTIONS = (
    "learning_rate", "mm_projector_lr", "mm_vision_tower_lr", "vision_tower_lr", "weight_decay", "lr_scheduler_type",
    "warmup_steps", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "model_max_length",
    "bf16", "fp16",
)  # fmt: skip


class Parsed(NamedTuple):
    """Arguments of a run."""

    model: ModelArguments
    data: DataArguments
    training: LlavaTrainingArguments

    def model_spec(self) -> ModelSpec:
        """Return the model to load or build."""
        model, data = self.model, self.data
        return ModelSpec(
            path=model.model_name_or_path,
            vision_tower=model.vision_tower,
            vision_tower_config=model.vision_tower_config,
            vision_tower_checkpoint=model.vision_tower_checkpoint,
            projector_type=model.mm_projector_type,
            projector_kwargs=model.projector_kwargs,
            projector_weights=model.pretrain_mm_mlp_adapter,
            select_layer=model.mm_vision_select_layer,
            select_feature=model.mm_vision_select_feature,
            use_im_start_end=model.mm_use_im_start_end,
            use_im_patch_token=model.mm_use_im_patch_token,
            template=model.version,
            system_file=model.system_file,
            image_mode=data.image_aspect_ratio,
            patch_merge_type=model.mm_patch_merge_type,
            image_grid_pinpoints=data.image_grid_pinpoints,
            image_size=model.image_size,
            dicom_window=data.dicom_window,
            dicom_frame=data.dicom_frame,
            fast_jpeg=data.fast_jpeg,
            quantization=Quantization(model.bits, model.double_quant, model.quant_type),
            seed=self.training.seed,
        )

    def training_rows(self) -> RowsSpec:
        """Return the training data."""
        data = self.data
        return self._rows(data.data_path, data.image_folder, "--image-folder", data.image_folder)

    def held_out_rows(self) -> RowsSpec | None:
        """Return the held-out rows, or None."""
        data = self.data
        if not data.eval_data_path:
            return None
        folder = data.eval_image_folder or data.image_folder
        return self._rows(data.eval_data_path, folder, "--eval-image-folder", data.eval_image_folder)

    def _rows(self, path: str, folder: str | None, flag: str, explicit: str | None) -> RowsSpec:
        data, training = self.data, self.training
        name = HELD_OUT_QUARANTINE_FILE if path == data.eval_data_path else QUARANTINE_FILE
        writes = training.should_save and data.skip_bad and not training.dry_run
        return RowsSpec(
            path,
            folder,
            folder_flag=flag,
            explicit_folder=explicit,
            max_length=training.model_max_length,
            image_counts_as_one=data.image_counts_as_one,
            skip_bad=data.skip_bad,
            quarantine=training.run_folder / name if writes else None,
        )

    def stream_spec(self) -> StreamSpec:
        """Return the settings that apply if the training data are a stream."""
        data, training = self.data, self.training
        unsupported = {
            "--dry-run": training.dry_run,
            "--feature-cache-dir": data.feature_cache_dir is not None,
            "--image-grouping on": training.image_grouping == "on",
            "--group-by-length": training.group_by_length,
            "--group-by-modality-length": training.group_by_modality_length,
        }
        rank = training.process_index
        file = training.run_folder / (RANK_QUARANTINE_FILE.format(rank) if rank else QUARANTINE_FILE)
        return StreamSpec(
            training.max_steps,
            tuple(name for name, is_given in unsupported.items() if is_given),
            quarantine=file if data.skip_bad else None,
        )

    def image_spec(self) -> ImageSpec:
        """Return the work on images before training."""
        return ImageSpec(
            calibrates=self.model.calibrate_mm_projector,
            seed=self.training.seed,
            trains_tower=self.model.unfreeze_mm_vision_tower,
            cache_folder=self.data.feature_cache_dir,
            cache_gb=self.data.feature_cache_gb,
        )

    def provenance_spec(self) -> ProvenanceSpec:
        """Return the facts for the provenance of the run."""
        training = self.training
        return ProvenanceSpec(
            data_path=self.data.data_path,
            eval_data_path=self.data.eval_data_path,
            model=self.model.model_name_or_path,
            global_batch=training.global_batch,
            seed=training.seed,
            loss_normalization=training.loss_normalization,
            precision="bfloat16" if training.bf16 else "float16" if training.fp16 else "float32",
            options=self.decisive_options(),
        )

    def decisive_options(self) -> dict[str, Any]:
        """Return the options that determine what a step computes."""
        found = {name: value for name, value in asdict(self.model).items() if name not in FREE_MODEL_OPTIONS}
        for name in ("vision_tower", "pretrain_mm_mlp_adapter", "system_file", "vision_tower_config"):
            if found.get(name):
                found[name] = Path(found[name]).name  # a run may be moved to another folder
        found |= {name: getattr(self.data, name) for name in DECISIVE_DATA_OPTIONS}
        found |= {name: getattr(self.training, name) for name in DECISIVE_TRAINING_OPTIONS}
        return _as_json(found)

    def resolved(self) -> dict[str, Any]:
        """Return all arguments by group, as JSON values."""
        training = cast(Any, self.training).to_dict()
        accumulation = self.training.requested_accumulation
        return _as_json(
            {
                "model": asdict(self.model),
                "data": asdict(self.data),
                "training": {**training, "gradient_accumulation_steps": accumulation},
            }
        )


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(json.dumps(values, default=str)))


def with_compat(parsed: Parsed) -> Parsed:
    """Return the arguments with the options that the names of `--compat` select.

    Raises:
        ConfigError: a name is unknown, or has no effect in training.
    """
    names = parse_compat(parsed.training.compat, "training")
    if "micro_batch_loss" in names:
        parsed = parsed._replace(training=parsed.training.changed(loss_normalization="micro_batches"))
    if "cut_before_images" in names:
        parsed = parsed._replace(data=replace(parsed.data, image_counts_as_one=True))
    return parsed


def with_validation(parsed: Parsed) -> Parsed:
    """Return the arguments with the defaults of validation: after every epoch, keeping the best checkpoint.

    Raises:
        ConfigError: validation or early stopping without held-out rows, or `--save-strategy best`.
    """
    data, args = parsed.data, parsed.training
    if args.save_strategy == "best":
        raise ConfigError(
            "--save-strategy best is not supported; expected no, steps or epoch. To keep the best checkpoint, use "
            "--eval-data-path FILE and --save-strategy epoch"
        )
    if data.eval_data_path is None:
        if args.eval_strategy != "no" or args.early_stopping_patience:
            raise ConfigError(
                "--eval-strategy and --early-stopping-patience need held-out rows; set --eval-data-path FILE"
            )
        return parsed
    if args.eval_strategy == "no" and args.evaluation_strategy is None:
        args = args.changed(eval_strategy=IntervalStrategy.EPOCH)
    every = args.eval_strategy == args.save_strategy == "epoch"
    together = args.eval_strategy == args.save_strategy == "steps" and args.eval_steps == args.save_steps
    if every or together:
        metric = args.metric_for_best_model or "eval_loss"
        args = args.changed(
            load_best_model_at_end=True,
            metric_for_best_model=metric,
            greater_is_better=False if "loss" in metric else args.greater_is_better is not False,
        )
    elif args.early_stopping_patience:
        raise ConfigError(
            "--early-stopping-patience needs --save-strategy and --eval-strategy both epoch, or both steps with "
            "--save-steps equal to --eval-steps"
        )
    else:
        logger.info(
            "the best checkpoint is kept only if --save-strategy and --eval-strategy are both epoch, or both steps"
        )
    return parsed._replace(training=args)


EXAMPLE = """example:
  llava train --model-name-or-path LM --vision-tower TOWER --data-path train.json --image-folder images \\
      --output-dir runs/first --num-train-epochs 1 --per-device-train-batch-size 16
"""


def _show_dashes(parser: HfArgumentParser) -> None:
    """Show options with dashes in the help; words have underscores when they are parsed."""
    for action in parser._actions:
        for name in action.option_strings:
            if "-" in name[2:]:  # with two spellings, a prefix of an option would be ambiguous
                parser._option_string_actions.pop(name, None)
        action.option_strings = list(dict.fromkeys(with_dashes(action.option_strings)))


def parse_training_args(argv: Sequence[str] | None = None, *, bf16: bool | Literal["auto"] = False) -> Parsed:
    """Return the arguments of a training command line.

    Args:
        argv: command line; None for that of the process.
        bf16: default of `--bf16`.

    Raises:
        ConfigError: an option is unknown, a value is invalid, or values contradict each other.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, LlavaTrainingArguments),  # type: ignore[arg-type]
        description="Train: stage 1 alignment, stage 2 instruction tuning, downstream fine-tuning, LoRA.",
        epilog=EXAMPLE,
    )
    precision.accept_auto(parser, default=bf16)
    words = [_underscored(word) for word in words]
    _show_dashes(parser)
    options = parser.parse_known_args(words)[0]
    choice = _chosen_bf16(options)
    parsed, unknown = _arguments(parser, [*words, "--bf16", str(choice)])
    if (agreed := precision.agreed(choice, world_size=parsed.training.world_size)) != choice:
        parsed, unknown = _arguments(parser, [*words, "--bf16", str(agreed)])
    if unknown:
        known = list(parser._option_string_actions)
        near = [match for word in unknown for match in difflib.get_close_matches(word, known, n=1)]
        hint = f"; did you mean {', '.join(with_dashes(near))}?" if near else ""
        raise ConfigError(f"unknown option: {' '.join(with_dashes(unknown))}{hint} (--help lists every option)")
    standard = (ModelArguments(model_name_or_path="x"), DataArguments(data_path="x"), LlavaTrainingArguments)
    legacy_flags.warn_without_effect(words, parsed, standard)
    parsed = with_validation(with_compat(parsed))
    training = parsed.training
    precision.warn_of_slow_bf16(
        parsed.model.model_name_or_path,
        bf16=training.bf16,
        device_type=training.device.type,
        resumed=options.bf16 == "auto",  # a choice of bfloat16 that is slow here was made elsewhere
    )
    return parsed


def _chosen_bf16(options: Namespace) -> bool:
    """Return the value of `--bf16` of a command line that transformers has not validated yet."""
    folder = Path(options.output_dir or DEFAULT_OUTPUT)
    return precision.chosen_bf16(
        options.bf16,
        model=options.model_name_or_path,
        fp16=options.fp16,
        use_cpu=options.use_cpu,
        resume=ResumeSpec(folder, options.resume_from_checkpoint, options.overwrite_output_dir),
    )


def _arguments(parser: HfArgumentParser, words: list[str]) -> tuple[Parsed, list[str]]:
    """Return the arguments and the unparsed words.

    Raises:
        ConfigError: a value is invalid; the message is the first line of the library's error.
    """
    try:
        *groups, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
        return Parsed(*groups), unknown
    except ConfigError:
        raise
    except (ValueError, ImportError, NotImplementedError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = lines[0] if lines else type(error).__name__
        raise ConfigError(f"invalid training option: {what} (--help lists every option)") from error


def _underscored(word: str) -> str:
    """Return `word` with its option name in the registered spelling; values are unchanged."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
