"""Arguments of a run as specs for other modules, and rules between options of different groups.

groups of arguments --with_compat, with_validation--> Parsed --> ModelSpec, RowsSpec, PartsSpec, ...
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from transformers.trainer_utils import IntervalStrategy

from llava.compat import parse_compat
from llava.data.image_negatives import ImageNegative
from llava.data.self_questioning import QuestionDraws
from llava.errors import ConfigError
from llava.model.quantization import Quantization
from llava.model.tower_lora import TowerLora
from llava.train.args import DataArguments, LlavaTrainingArguments, ModelArguments
from llava.train.preference_args import POLICY_INPUTS, PreferenceArguments
from llava.train.rollout_args import DRLLAVA, RolloutArguments, RolloutSpec, check_rollouts, decisive_options
from llava.train.specs import (
    FoundModel,
    ImageSpec,
    ModelSpec,
    PartsSpec,
    ProvenanceSpec,
    RatingSpec,
    RowsSpec,
    StreamSpec,
)
from llava.utils.cli import flag

logger = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.jsonl"
HELD_OUT_QUARANTINE_FILE = "quarantine-eval.jsonl"
RANK_QUARANTINE_FILE = "quarantine-{}.jsonl"
"""File of a stream's skipped rows on every rank except the first."""

FREE_MODEL_OPTIONS = frozenset({"model_name_or_path", "lora_weight_path", "mpt_attn_impl", "plugin"})
"""Model options that a resumed run may change; weights are compared by `model_sha256`, plug-ins by their hashes."""

DECISIVE_DATA_OPTIONS = (
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "image_counts_as_one",
    "train_empty_answers",
    "loader",
    "sq_r",
)
DECISIVE_NAMES = frozenset({"frozen_vit_lora", "shared_sq_draws"})
"""Names of `--compat` without an equivalent option."""

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
    preference: PreferenceArguments
    rollout: RolloutArguments = RolloutArguments()
    found: FoundModel | None = None

    def rollout_spec(self) -> RolloutSpec | None:
        """Return the settings of reinforcement learning, or None with another objective."""
        chosen = self.preference
        spec = self.rollout.spec(chosen.objective, ref_mode=chosen.ref_mode, beta=chosen.beta)
        published = DRLLAVA in parse_compat(self.training.compat, "training")
        return None if spec is None else replace(spec, published=published)

    def rating_spec(self) -> RatingSpec | None:
        """Return the settings of a reward model, or None with another objective."""
        chosen = self.preference
        if chosen.objective != "reward":
            return None
        return RatingSpec(chosen.reward_centering, self.rollout.reward_prompt_file, chosen.image_to_caption_file)

    def model_spec(self) -> ModelSpec:
        """Return the model to load or build."""
        model, data = self.model, self.data
        return ModelSpec(
            path=model.model_name_or_path,
            vision_tower=model.vision_tower,
            vision_tower_config=model.vision_tower_config,
            vision_tower_checkpoint=model.vision_tower_checkpoint,
            projector_type=model.mm_projector_type or "linear",
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
            trains_empty=data.train_empty_answers,
            dicom_window=data.dicom_window,
            dicom_frame=data.dicom_frame,
            fast_jpeg=data.fast_jpeg,
            quantization=Quantization(model.bits, model.double_quant, model.quant_type),
            seed=self.training.seed,
            found=self.found,
        )

    def training_rows(self) -> RowsSpec:
        """Return the training data."""
        data = self.data
        rows = self._rows(data.data_path, data.image_folder, "--image-folder", data.image_folder)
        asking = QuestionDraws(data.sq_r, seed=self.training.seed, shared="shared_sq_draws" in self.compat)
        return rows if rows.pairs else replace(rows, asking=asking)

    @property
    def compat(self) -> frozenset[str]:
        """Names of `--compat` that hold in training."""
        return parse_compat(self.training.compat, "training")

    def parts_spec(self) -> PartsSpec:
        """Return the parts of the model that train."""
        model = self.model
        language = {
            "r": model.lora_r,
            "alpha": model.lora_alpha,
            "dropout": model.lora_dropout,
            "bias": model.lora_bias,
            "targets": model.lora_target_modules,
            "options": {
                "use_rslora": model.use_rslora,
                "use_dora": model.use_dora,
                "init_lora_weights": {"true": True, "false": False}.get(
                    start := model.init_lora_weights.lower(), start
                ),
                "modules_to_save": model.modules_to_save,
            },
        }
        return PartsSpec(
            lora=language if model.lora_enable else None,
            tower_lora=self.tower_lora() if model.vit_lora_enable else None,
            projector_only=model.tune_mm_mlp_adapter,
            freeze_backbone=model.freeze_backbone,
            freeze_projector=model.freeze_mm_mlp_adapter,
            train_tower=model.unfreeze_mm_vision_tower,
            checkpoints_activations=bool(self.training.gradient_checkpointing),
        )

    def tower_lora(self) -> TowerLora:
        """Return the settings of the vision tower's adapter."""
        model = self.model
        published = 0.2 if self.preference.spec() is None else 0.1  # as the original trainers hard-code it
        dropout = published if model.lora_dropout_vit is None else model.lora_dropout_vit
        frozen = "frozen_vit_lora" in self.compat
        return TowerLora(model.lora_r_vit, model.lora_alpha_vit, dropout, frozen, weights=model.pretrain_lora)

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
        pairs = self.preference.spec()
        damage = None if pairs is None else pairs.image_negative
        return RowsSpec(
            path,
            folder,
            folder_flag=flag,
            explicit_folder=explicit,
            max_length=training.model_max_length,
            image_counts_as_one=data.image_counts_as_one,
            loader=data.loader,
            skip_bad=data.skip_bad,
            quarantine=training.run_folder / name if writes else None,
            pairs=pairs is not None or self.preference.objective == "reward",
            labeled=pairs is not None and pairs.is_kto,
            negative=None if damage is None else ImageNegative(damage, training.seed),
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
            calibrates=bool(self.model.calibrate_mm_projector),
            may_skip=self.training.calibrates_by_default,
            seed=self.training.seed,
            trains_tower=self.model.unfreeze_mm_vision_tower or self.model.vit_lora_enable,
            cache_folder=self.data.feature_cache_dir,
            cache_gb=self.data.feature_cache_gb,
        )

    def provenance_spec(self) -> ProvenanceSpec:
        """Return the facts for the provenance of the run."""
        training, rollouts = self.training, self.rollout_spec()
        return ProvenanceSpec(
            data_path=self.data.data_path,
            eval_data_path=self.data.eval_data_path,
            model=self.model.model_name_or_path,
            global_batch=training.global_batch if rollouts is None else rollouts.step_batch,
            seed=training.seed,
            loss_normalization=training.loss_normalization,
            precision="bfloat16" if training.bf16 else "float16" if training.fp16 else "float32",
            options=self.decisive_options(),
        )

    def decisive_options(self) -> dict[str, Any]:
        """Return the options that determine what a step computes."""
        found = {name: value for name, value in asdict(self.model).items() if name not in FREE_MODEL_OPTIONS}
        for name in ("vision_tower", "pretrain_mm_mlp_adapter", "pretrain_lora", "system_file", "vision_tower_config"):
            if found.get(name):
                found[name] = Path(found[name]).name  # a run may be moved to another folder
        found |= {name: getattr(self.data, name) for name in DECISIVE_DATA_OPTIONS}
        found |= {name: getattr(self.training, name) for name in DECISIVE_TRAINING_OPTIONS}
        found["compat"] = sorted(self.compat & DECISIVE_NAMES)
        found |= self.preference.decisive_options() | decisive_options(self.rollout, self.rollout_spec())
        return _as_json(found)

    def resolved(self) -> dict[str, Any]:
        """Return all arguments by group, as JSON values."""
        training = cast(Any, self.training).to_dict()
        accumulation = self.training.requested_accumulation
        return _as_json(
            {
                "model": asdict(self.model),
                "data": asdict(self.data),
                "preference": asdict(self.preference),
                "rollout": asdict(self.rollout),
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
    names = parsed.compat
    if "micro_batch_loss" in names:
        parsed = parsed._replace(training=parsed.training.changed(loss_normalization="micro_batches"))
    if "cut_before_images" in names:
        parsed = parsed._replace(data=replace(parsed.data, image_counts_as_one=True))
    if "policy_reference_inputs" in names:
        parsed = parsed._replace(preference=replace(parsed.preference, ref_mode=POLICY_INPUTS))
    if "policy_dropout" in names:
        parsed = parsed._replace(preference=replace(parsed.preference, disable_dropout=False))
    if "empty_answers" in names:
        parsed = parsed._replace(data=replace(parsed.data, train_empty_answers=True))
    return parsed


def check_pairs(parsed: Parsed) -> None:
    """Check that other options fit preference training, and name pair options without effect otherwise.

    Raises:
        ConfigError: the loss of micro-batches, or parts that train beside `--ref-mode adapter_off`.
    """
    if names := parsed.preference.without_effect():
        logger.warning("accepted without effect: %s; they need --objective dpo", ", ".join(names))
    parsed.rollout.warn_without_effect(parsed.preference.objective)
    if (rollouts := parsed.rollout_spec()) is not None:
        check_rollouts(rollouts, parsed.rollout, world_size=parsed.training.world_size)
        _name_unused_batches(parsed.training)
    spec, model, args = parsed.preference.spec(), parsed.model, parsed.training
    if spec is None:
        return
    if parsed.data.sq_r is not None:
        logger.warning(
            "accepted without effect: --sq-r; questions are asked in fine-tuning, not in preference training"
        )
    if args.micro_batch:
        raise ConfigError(
            "--loss-normalization micro_batches is a mean over tokens; it cannot be used with --objective dpo"
        )
    if spec.image_negative not in (None, "swap") and parsed.data.feature_cache_dir is not None:
        raise ConfigError(
            f"--image-negative {spec.image_negative} makes images whose features are not cached; omit "
            "--feature-cache-dir"
        )
    if spec.ref_mode == "adapter_off":
        _check_adapter_off(model, is_sharded=args.is_sharded)


def _name_unused_batches(args: LlavaTrainingArguments) -> None:
    """Log the batch options that were changed, which reinforcement learning does not use."""
    given = {
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.requested_accumulation,
    }
    standard = {field.name: field.default for field in fields(args)}
    if changed := [flag(name) for name, value in given.items() if value != standard[name]]:
        logger.info("not used in reinforcement learning: %s; --step-batch-size sets the batch", ", ".join(changed))


def _check_adapter_off(model: ModelArguments, *, is_sharded: bool) -> None:
    """Check that the initial policy can be derived from the policy: no adapter, or small trained parts.

    Raises:
        ConfigError: whole parts train, or the adapter does not start as nothing.
    """
    has_small_parts = model.lora_enable or model.tune_mm_mlp_adapter or model.freeze_backbone
    wanted = {"--lora-enable True": has_small_parts,
              "--unfreeze-mm-vision-tower False": model.tune_mm_mlp_adapter or not model.unfreeze_mm_vision_tower,
              "no --pretrain-lora": model.pretrain_lora is None,
              "no --init-lora-weights false": model.init_lora_weights.lower() != "false",
              "no --deepspeed or --fsdp": not is_sharded}  # fmt: skip
    if missing := [name for name, is_given in wanted.items() if not is_given]:
        raise ConfigError(
            "--ref-mode adapter_off switches a new adapter off and copies what else trains, which must be small: "
            f"expected {', '.join(missing)}; or use --ref-mode cached"
        )


def with_validation(parsed: Parsed) -> Parsed:
    """Return the arguments with validation defaults: after every epoch, keeping the best checkpoint.

    Raises:
        ConfigError: validation or early stopping without held-out rows, or `--save-strategy best`.
    """
    data, args = parsed.data, parsed.training
    if args.save_strategy == "best":
        raise ConfigError(
            "--save-strategy best is not supported; expected no, steps or epoch. To keep the best checkpoint, use "
            "--eval-data-path FILE and --save-strategy epoch"
        )
    if data.eval_data_path is None and data.eval_vqa_path is None:
        if args.eval_strategy != "no" or args.early_stopping_patience:
            raise ConfigError(
                "--eval-strategy and --early-stopping-patience need held-out rows; set --eval-data-path FILE or, for "
                "questions, --eval-vqa-path FILE"
            )
        return parsed
    if args.eval_strategy == "no" and args.evaluation_strategy is None:
        args = args.changed(eval_strategy=IntervalStrategy.EPOCH)
    if data.eval_data_path is None and not args.metric_for_best_model:
        if args.early_stopping_patience:
            raise ConfigError(
                "--early-stopping-patience with --eval-vqa-path alone needs --metric-for-best-model, for example "
                "eval_vqa_closed_accuracy"
            )
        return parsed._replace(training=args)  # question scores are only logged; the last checkpoint is kept
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
