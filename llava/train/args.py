"""Options of the training commands, as three dataclasses; old option names are fields too.

Arguments are complete at construction. Only the entry of training uses them; other modules take the specs of `specs`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from llava.compat import compat_help
from llava.errors import ConfigError
from llava.imaging.dicom.policy import CHECKPOINT_DEFAULT_HELP, DEFAULT_POLICY, DICOM_FRAME_HELP, DICOM_WINDOW_HELP
from llava.imaging.jpeg import FAST_JPEG_HELP
from llava.train.attention_choice import FLASH, TREE, check_attention
from llava.train.bounds import check_bounds
from llava.train.legacy_flags import LegacyTrainingArguments, option
from llava.train.specs import OptimizerSpec, OrderSpec, ResumeSpec, WorkerSpec
from llava.utils.plugins import PLUGIN_HELP

LORA_STARTS = ("true", "gaussian", "orthogonal", "false")
"""Values of `--init-lora-weights`."""


@dataclass(frozen=True)
class ModelArguments:
    """Options for the model and for which of its parts are trained."""

    model_name_or_path: str = option("", "language model (with --vision-tower), or a llava checkpoint")
    version: str | None = option(
        None,
        "conversation template: auto (that of the language model), FILE.jinja or a name; default: the template of the "
        "checkpoint, or v0 for a new model",
    )
    system_file: str | None = option(None, "text file that replaces the template's system prompt; saved with the model")
    vision_tower: str | None = option(None, "vision tower: folder, hub name, or hf-hub:OWNER/MODEL (open_clip)")
    vision_tower_config: str | None = option(None, "open_clip model configuration (JSON) of the vision tower")
    vision_tower_checkpoint: str | None = option(None, "open_clip weights of the vision tower")
    mm_vision_select_layer: int = option(-2, "hidden state of the vision tower that the projector receives")
    mm_vision_select_feature: str = option("patch", "patch, or cls_patch to keep the class token")
    mm_projector_type: str | None = option(
        None, "linear, mlpKx_gelu, cluster, identity, or a type of a plug-in; default: linear"
    )
    mm_cluster_num_centers: int = option(256, "prototypes of the cluster projector")
    mm_cluster_iters: int = option(2, "iterations of soft assignment of the cluster projector")
    mm_use_im_start_end: bool = option(False, "write marker tokens around each image")
    mm_use_im_patch_token: bool = option(False, "add the <im_patch> token of old vocabularies")
    mm_patch_merge_type: str | None = option(
        None,
        "flat, spatial or spatial_unpad: how anyres tiles are joined; default: the value of the checkpoint, or flat",
    )
    calibrate_mm_projector: bool | None = option(
        None, "initialize a new projector to match the scale of image features and word embeddings"
    )
    pretrain_mm_mlp_adapter: str | None = option(None, "projector file or folder to initialize from")
    tune_mm_mlp_adapter: bool = option(
        False, "stage 1: train only the projector (and the embeddings of the image markers)"
    )
    freeze_mm_mlp_adapter: bool = option(False, "freeze the projector")
    freeze_backbone: bool = option(False, "freeze the language model")
    unfreeze_mm_vision_tower: bool = option(False, "train the vision tower as well")
    image_size: int | None = option(
        None, "side of the model's input image in pixels; default: that of the vision tower"
    )
    lora_enable: bool = option(False, "train a LoRA adapter on the language model")
    lora_r: int = option(64, "rank of the LoRA adapter")
    lora_alpha: int = option(16, "scale of the LoRA adapter")
    lora_dropout: float = option(0.05, "dropout of the LoRA adapter")
    lora_bias: str = option("none", "biases to train: none, all or lora_only")
    lora_target_modules: list[str] | None = option(  # noqa: RUF009 -- a field
        None, "layers of the language model to adapt: names such as q_proj v_proj, or a regular expression"
    )
    use_rslora: bool = option(False, "scale the LoRA adapter by alpha / sqrt(r) instead of alpha / r")
    use_dora: bool = option(False, "DoRA: also train the length of every adapted weight row")
    init_lora_weights: str = option("true", "start of the LoRA adapter: true, gaussian, orthogonal or false")
    modules_to_save: list[str] | None = option(  # noqa: RUF009 -- a field
        None, "modules to train in full beside the LoRA adapter, and to save with it: embed_tokens, lm_head"
    )
    lora_weight_path: str = option("", "accepted without effect")
    vit_lora_enable: bool = option(False, "train a LoRA adapter on the vision tower, below the selected layer")
    lora_r_vit: int = option(64, "rank of the vision tower's LoRA adapter")
    lora_alpha_vit: int = option(32, "scale of the vision tower's LoRA adapter")
    lora_dropout_vit: float | None = option(
        None, "dropout of the vision tower's LoRA adapter; default: 0.2, in preference training 0.1"
    )
    pretrain_lora: str | None = option(
        None, "LoRA adapter of a vision tower to start from (with --vit-lora-enable): a file, or its folder"
    )
    bits: int = option(16, "4 or 8 quantizes the language model (with --lora-enable)")
    double_quant: bool = option(True, "quantize the quantization constants as well")
    quant_type: str = option("nf4", "4-bit data type: nf4 or fp4")
    mpt_attn_impl: str | None = option(None, "accepted without effect")
    plugin: list[str] | None = option(None, PLUGIN_HELP)  # noqa: RUF009 -- a field

    @property
    def projector_kwargs(self) -> dict[str, Any] | None:
        """Keyword arguments of the projector type, or None if it takes none."""
        if self.mm_projector_type != "cluster":
            return None
        return {"num_centers": self.mm_cluster_num_centers, "num_iters": self.mm_cluster_iters}

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise ConfigError("--model-name-or-path is missing; expected a language model or a llava checkpoint")
        check_bounds(vars(self))
        if self.system_file is not None and not Path(self.system_file).is_file():
            raise ConfigError(f"--system-file {self.system_file}: no such file; expected a text file")
        if self.init_lora_weights.lower() not in LORA_STARTS:
            raise ConfigError(
                f"--init-lora-weights is {self.init_lora_weights!r}; expected {', '.join(LORA_STARTS[:-1])} or "
                f"{LORA_STARTS[-1]} (pissa, olora and others change the base, which an adapter's folder does not hold)"
            )
        if self.bits != 16 and not self.lora_enable:
            raise ConfigError(f"--bits {self.bits}: quantized weights cannot be trained; add --lora-enable True")
        if self.tune_mm_mlp_adapter and self.freeze_mm_mlp_adapter:
            raise ConfigError(
                "--tune-mm-mlp-adapter and --freeze-mm-mlp-adapter contradict each other; set one of them"
            )
        if self.calibrate_mm_projector and self.pretrain_mm_mlp_adapter:
            raise ConfigError(
                "--calibrate-mm-projector initializes a projector, --pretrain-mm-mlp-adapter loads one; set one of them"
            )
        if self.vit_lora_enable and self.unfreeze_mm_vision_tower:
            raise ConfigError(
                "--vit-lora-enable trains an adapter of the vision tower, --unfreeze-mm-vision-tower the tower itself; "
                "set one of them"
            )
        if self.pretrain_lora and not self.vit_lora_enable:
            raise ConfigError(
                f"--pretrain-lora {self.pretrain_lora} needs --vit-lora-enable True; to use the adapter unchanged, "
                "merge it into the tower (llava checkpoint merge-lora) and pass that folder as --vision-tower"
            )
        if self.tune_mm_mlp_adapter and self.lora_enable:
            raise ConfigError("--tune-mm-mlp-adapter trains only the projector; use --lora-enable in stage 2")


@dataclass(frozen=True)
class DataArguments:
    """Options for the training data and the images."""

    data_path: str = option("", "rows in LLaVA format: a JSON array or JSON lines; or a mixture (YAML)")
    image_folder: str | None = option(None, "folder that image names are relative to")
    image_aspect_ratio: str | None = option(
        None, "square (crop), pad, resize, keep or anyres (tiles); default: the value of the checkpoint, or square"
    )
    image_grid_pinpoints: str | None = option(
        None, "image sizes in pixels that anyres chooses from, '[[336, 672], [672, 336]]'; default: those of LLaVA 1.6"
    )
    dicom_window: str | None = option(None, DICOM_WINDOW_HELP.replace("%", "%%") + CHECKPOINT_DEFAULT_HELP)
    dicom_frame: str | None = option(None, DICOM_FRAME_HELP + CHECKPOINT_DEFAULT_HELP)
    fast_jpeg: bool | None = option(None, FAST_JPEG_HELP)
    eval_data_path: str | None = option(None, "held-out rows for validation during training")
    eval_vqa_path: str | None = option(
        None, "questions to answer at each validation: closed accuracy, open recall and length; preference training too"
    )
    eval_image_folder: str | None = option(None, "image folder of the held-out rows; default: --image-folder")
    loader: str = option(
        "default",
        "layout of the rows: default, or a selection of LLaVA-Rad's annotation files (mimic_train_findings, "
        "mimic_test_findings, mimic_cxr_all_frontal_findings, mimic_cxr_all_views_findings)",
    )
    skip_bad: bool = option(False, "skip unusable rows and list them in quarantine.jsonl instead of stopping")
    feature_cache_dir: str | None = option(None, "folder that caches the features of a frozen vision tower")
    feature_cache_gb: float = option(4.0, "largest size of --feature-cache-dir in GB; 0 disables the cache")
    image_counts_as_one: bool = option(
        False,
        "count an image as one token of --model-max-length, as LLaVA-Rad truncated its rows; default: all its tokens",
    )
    train_empty_answers: bool = option(
        False,
        "train answers without text, so that the model learns to answer nothing; default: they are not trained, and "
        "rows without another answer are left out",
    )
    sq_r: float | None = option(
        None,
        "share of the later questions about an image that are trained, drawn again in every epoch, with a template "
        "that asks (v1_sq, chatml_sq); default: 0.3",
    )
    lazy_preprocess: bool = option(False, "accepted without effect: rows are always read lazily")
    is_multimodal: bool = option(False, "accepted without effect: each row states its images")

    def __post_init__(self) -> None:
        if not self.data_path:
            raise ConfigError(
                "--data-path is missing; expected a file of rows in LLaVA format (JSON array or JSON lines)"
            )
        check_bounds(vars(self))
        DEFAULT_POLICY.changed(
            self.dicom_window, self.dicom_frame
        )  # rejects an invalid value before anything is loaded


@dataclass
class LlavaTrainingArguments(LegacyTrainingArguments):
    """Options of transformers' `Trainer`, of the original trainers, and of this package."""

    optim: str = option("adamw_torch", "optimizer")
    bf16: bool = option(False, "True, False or auto: bfloat16 autocast where it is at least 1.25x faster (measured)")
    remove_unused_columns: bool = option(False, "kept for published commands")
    model_max_length: int = option(512, "longest sequence in tokens, images included; longer text is truncated")
    mm_projector_lr: float | None = option(None, "learning rate of the projector")
    logging_nan_inf_filter: bool = option(False, "replace a non-finite loss in the log by the mean of earlier steps")
    group_by_modality_length: bool = option(False, "rows of one modality and similar length in one optimizer step")
    group_by_length: bool = option(False, "rows of similar length in one optimizer step")
    image_grouping: str = option(
        "", "on, off or auto: group the rows of one image so that its tokens are computed once"
    )
    questions_per_image: int = option(
        0,
        "rows of one image in a group when grouping by image; 0: up to 8, with at least 8 images in a step",
    )
    attn_implementation: str = option(
        TREE,
        "attention of the language model: tree (computes shared prefixes once), or transformers' own sdpa, eager or "
        "flash_attention_2 (a padded row for every sequence)",
    )
    prefix_sharing: str = option("on", "on, or off to compute every row separately (independent dropout)")
    loss_normalization: str = option(
        "tokens",
        "tokens: mean over all supervised tokens of a step; micro_batches: mean of the means of its micro-batches, "
        "without the logit of the image placeholder, as the original trainers computed it",
    )
    compat: str = option("none", compat_help("training"))
    max_tokens_per_row: int = option(8192, "largest number of tokens in one forward pass; does not change the loss")
    early_stopping_patience: int = option(0, "stop after this many validations without improvement; 0: never")
    eval_answers: int = option(64, "held-out questions to answer and score at each validation; 0: loss only")
    dry_run: bool = option(False, "print token counts and memory, run 20 steps, forecast the hours; writes no model")
    log_lines: int = option(0, "log about this many times in the run, with --logging-steps chosen for it; 0: off")
    log_row_ids: bool = option(False, "write the number of every trained row to row_ids-RANK.jsonl (row_ids-0.jsonl)")
    overwrite_output_dir: bool = option(False, "start from the beginning even if a checkpoint could be resumed")
    trust_checkpoint: bool = option(
        False,
        "resume with --deepspeed or --fsdp from a checkpoint that was not written here; loading it can run code in it",
    )
    save_on_signal: bool = option(
        False, "on SIGTERM, save a checkpoint at the end of the step and stop with status 143; rerun to resume"
    )
    requested_accumulation: int = field(default=0, init=False)
    calibrates_by_default: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_bounds(vars(self))
        # One batch of the trainer is a whole optimizer step: LlavaTrainer lays out its rows and accumulates gradients.
        self.requested_accumulation = self.gradient_accumulation_steps
        self.gradient_accumulation_steps = 1
        # LlavaTrainer connects every trained weight to the loss, so DDP must not search for unused ones.
        self.ddp_find_unused_parameters = False
        self.group_by_length |= self.train_sampling_strategy == "group_by_length"
        if self.early_stopping_patience:
            self.restore_callback_states_from_checkpoint = True  # keeps the callback's counter across a resume
        super().__post_init__()
        if self.save_on_signal and self.save_only_model:
            raise ConfigError("--save-on-signal saves a checkpoint to resume from; remove --save-only-model")
        if self.image_grouping not in ("", "on", "off", "auto"):
            raise ConfigError(f"--image-grouping is {self.image_grouping!r}; expected on, off or auto")
        if self.loss_normalization not in ("tokens", "micro_batches"):
            raise ConfigError(f"--loss-normalization is {self.loss_normalization!r}; expected tokens or micro_batches")
        check_attention(self.attn_implementation)
        if self.attn_implementation == FLASH and not (self.bf16 or self.fp16):
            raise ConfigError(f"--attn-implementation {FLASH} computes in half precision; add --bf16 True")
        if self.prefix_sharing not in ("on", "off"):
            raise ConfigError(f"--prefix-sharing is {self.prefix_sharing!r}; expected on or off")

    def changed(self, **values: Any) -> Self:
        """Return a copy with other values, which are not checked."""
        # `dataclasses.replace` would run `__post_init__` on values that it has already translated.
        copied = copy.copy(self)
        for name, value in values.items():
            setattr(copied, name, value)
        return copied

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step on one rank: batch size times accumulation."""
        return self.per_device_train_batch_size * self.requested_accumulation

    @property
    def micro_batch(self) -> int | None:
        """Sequences of one published micro-batch if the loss is averaged per micro-batch, else None."""
        return self.per_device_train_batch_size if self.loss_normalization == "micro_batches" else None

    @property
    def global_batch(self) -> int:
        """Sequences of one optimizer step on all ranks."""
        return self.sequences_per_step * int(self.world_size)

    @property
    def run_folder(self) -> Path:
        """Output folder of the run."""
        assert self.output_dir is not None
        return Path(self.output_dir)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of this process and number of processes."""
        return {"rank": int(self.process_index), "world_size": int(self.world_size)}

    @property
    def is_sharded(self) -> bool:
        """Whether DeepSpeed or FSDP shards weights or optimizer state."""
        return bool(self.deepspeed or self.fsdp)

    def optimizer_spec(self) -> OptimizerSpec:
        """Return learning rates and weight decay; a part without its own rate uses `learning_rate`."""
        rate = self.learning_rate
        projector, tower = (
            rate if own is None else own  # 0 is a valid rate
            for own in (self.mm_projector_lr, self.mm_vision_tower_lr)
        )
        return OptimizerSpec(rate, projector, tower, weight_decay=self.weight_decay)

    def order_spec(self, default_grouping: str) -> OrderSpec:
        """Return the order of the rows; `default_grouping` is the default of `--image-grouping`."""
        return OrderSpec(
            image_grouping=self.image_grouping,
            default_grouping=default_grouping,
            questions_per_image=self.questions_per_image,
            strategy=self.train_sampling_strategy,
            by_length=self.group_by_length,
            by_modality_length=self.group_by_modality_length,
            sequences_per_step=self.sequences_per_step,
            seed=self.seed,
            **self.ranks,
        )

    def worker_spec(self) -> WorkerSpec:
        """Return the worker processes of the loader."""
        return WorkerSpec(
            self.dataloader_num_workers, self.dataloader_prefetch_factor, self.dataloader_persistent_workers
        )

    def resume_spec(self) -> ResumeSpec:
        """Return where the checkpoint to resume from is."""
        needs_mark = self.is_sharded and not self.trust_checkpoint
        return ResumeSpec(self.run_folder, self.resume_from_checkpoint, self.overwrite_output_dir, needs_mark)
