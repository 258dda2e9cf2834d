"""Everything the training commands accept, as three dataclasses; old names are fields with help of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from llava.compat import help_text
from llava.errors import ConfigError
from llava.imaging.dicom.policy import DEFAULT, FRAME_HELP, KEPT, WINDOW_HELP
from llava.imaging.jpeg import HELP as FAST_JPEG_HELP
from llava.train import legacy_flags


def option(default: Any, help_text: str) -> Any:
    """A field with help."""
    return field(default=default, metadata={"help": help_text})


@dataclass
class ModelArguments:
    """Which model is trained, and which parts of it."""

    model_name_or_path: str = option("", "language model (with --vision_tower), or a folder that this package wrote")
    version: str | None = option(None, "conversation template; default: the checkpoint's own, v0 for a new model")
    system_file: str | None = option(None, "text file that replaces the template's system text; saved with the model")
    vision_tower: str | None = option(None, "vision encoder: folder, hub name, or hf-hub:OWNER/MODEL (open_clip)")
    vision_tower_config: str | None = option(None, "open_clip model configuration (JSON) of the vision encoder")
    vision_tower_checkpoint: str | None = option(None, "open_clip weights of the vision encoder")
    mm_vision_select_layer: int = option(-2, "hidden state of the tower that is used")
    mm_vision_select_feature: str = option("patch", "patch, or cls_patch to keep the class token")
    mm_projector_type: str = option("linear", "linear, mlpKx_gelu, cluster or identity")
    mm_cluster_num_centers: int = option(256, "prototypes of the cluster projector")
    mm_cluster_iters: int = option(2, "rounds of soft assignment of the cluster projector")
    mm_use_im_start_end: bool = option(False, "write marker tokens around each image")
    mm_use_im_patch_token: bool = option(False, "add the patch token that old vocabularies hold")
    mm_patch_merge_type: str | None = option(
        None,
        "flat, spatial or spatial_unpad: how the tiles of anyres are joined; default: the checkpoint's own, or flat",
    )
    calibrate_mm_projector: bool = option(False, "fit a new projector's scale to the pictures and words at hand")
    pretrain_mm_mlp_adapter: str | None = option(None, "projector file or folder to start from")
    tune_mm_mlp_adapter: bool = option(False, "stage 1: train the projector only (and the marker rows)")
    freeze_mm_mlp_adapter: bool = option(False, "keep the projector as it is")
    freeze_backbone: bool = option(False, "keep the language model as it is")
    unfreeze_mm_vision_tower: bool = option(False, "train the vision tower too")
    image_size: int | None = option(None, "pixels on a side of the model's input; default: the tower's own")
    lora_enable: bool = option(False, "train a LoRA adapter on the language model")
    lora_r: int = option(64, "rank of the adapter")
    lora_alpha: int = option(16, "scale of the adapter")
    lora_dropout: float = option(0.05, "dropout inside the adapter")
    lora_bias: str = option("none", "none, all or lora_only")
    lora_weight_path: str = option("", "accepted for old command lines")
    bits: int = option(16, "4 or 8 quantize the language model (with --lora_enable)")
    double_quant: bool = option(True, "quantize the quantization constants too")
    quant_type: str = option("nf4", "nf4 or fp4")
    mpt_attn_impl: str | None = option(None, "accepted for old command lines")

    @property
    def projector_kwargs(self) -> dict[str, Any] | None:
        """Settings of the projector, where its type has any."""
        if self.mm_projector_type != "cluster":
            return None
        return {"num_centers": self.mm_cluster_num_centers, "num_iters": self.mm_cluster_iters}

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise ConfigError("--model_name_or_path is missing: a language model, or a folder that this package wrote")
        if self.system_file is not None and not Path(self.system_file).is_file():
            raise ConfigError(f"--system_file {self.system_file}: no such file; expected a text file")
        if self.bits != 16 and not self.lora_enable:
            raise ConfigError(f"--bits {self.bits} trains only with --lora_enable True: quantized weights do not train")
        if self.tune_mm_mlp_adapter and self.freeze_mm_mlp_adapter:
            raise ConfigError("--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter contradict each other; give one")
        if self.calibrate_mm_projector and self.pretrain_mm_mlp_adapter:
            raise ConfigError("--calibrate_mm_projector draws a new projector, --pretrain_mm_mlp_adapter names one")
        if self.tune_mm_mlp_adapter and self.lora_enable:
            raise ConfigError("--tune_mm_mlp_adapter trains the projector only; leave --lora_enable for stage 2")


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str = option("", "rows in LLaVA format: a JSON array or JSON lines")
    image_folder: str | None = option(None, "folder that image names are relative to")
    image_aspect_ratio: str | None = option(
        None, "square (crop), pad, resize, keep or anyres (tiles); default: the checkpoint's own, or square"
    )
    image_grid_pinpoints: str | None = option(
        None, "sizes in pixels that anyres chooses from, '[[336, 672], [672, 336]]'; default: those of LLaVA 1.6"
    )
    dicom_window: str | None = option(None, WINDOW_HELP.replace("%", "%%") + KEPT)
    dicom_frame: str | None = option(None, FRAME_HELP + KEPT)
    fast_jpeg: bool | None = option(None, FAST_JPEG_HELP)
    eval_data_path: str | None = option(None, "held-out rows for validation while training")
    eval_image_folder: str | None = option(None, "image folder of the held-out rows; default: --image_folder")
    skip_bad: bool = option(False, "leave unusable rows out and list them in quarantine.jsonl instead of stopping")
    feature_cache_dir: str | None = option(None, "folder for features of a frozen tower, computed once")
    feature_cache_gb: float = option(4.0, "largest size of that folder; 0 switches it off")
    image_counts_as_one: bool = option(
        False, "--model_max_length counts an image as one token, as LLaVA-Rad cut its rows; default: all its tokens"
    )
    lazy_preprocess: bool = option(False, "accepted for old command lines: rows are always read lazily")
    is_multimodal: bool = option(False, "accepted for old command lines: rows say whether they have images")

    def __post_init__(self) -> None:
        if not self.data_path:
            raise ConfigError("--data_path is missing: a JSON array or JSON lines in LLaVA format")
        DEFAULT.changed(self.dicom_window, self.dicom_frame)  # a wrong word is refused before anything is loaded


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """transformers' training arguments, the seeds' own, and old names for both."""

    optim: str = option("adamw_torch", "optimizer")
    bf16: bool = option(False, "True, False or auto (bfloat16 autocast where it is at least 1.25x faster, measured)")
    remove_unused_columns: bool = option(False, "kept for old command lines")
    model_max_length: int = option(512, "longest sequence in tokens, images included; longer text is shortened")
    cache_dir: str | None = option(None, "accepted for old command lines; set HF_HOME instead")
    mm_projector_lr: float | None = option(None, "learning rate of the projector")
    mm_vision_tower_lr: float | None = option(None, "learning rate of the vision tower")
    vision_tower_lr: float | None = option(None, "the same as --mm_vision_tower_lr")
    logging_nan_inf_filter: bool = option(False, "hide steps without a finite loss behind earlier ones")
    group_by_modality_length: bool = option(False, "rows of one kind and of similar length in one step")
    group_by_length: bool = option(False, "rows of similar length in one step")
    image_grouping: str = option("", "on, off or auto: draw rows image by image so that they share it")
    questions_per_image: int = option(
        0,
        "rows of one image drawn together when grouping by image; 0: up to 8, with 8 images in a step at least",
    )
    prefix_sharing: str = option("on", "off computes every row on its own (independent dropout)")
    loss_normalization: str = option(
        "tokens",
        "tokens: mean over all supervised tokens of a step; micro_batches: mean of the means of its micro-batches, "
        "without the place holder's logit, as the published trainers computed it",
    )
    compat: str = option("none", help_text("training"))
    max_tokens_per_row: int = option(8192, "tokens of one forward pass; more rows, same loss")
    early_stopping_patience: int = option(0, "stop after so many validations without a better one; 0: never")
    eval_answers: int = option(64, "held-out questions answered and scored at each validation; 0: loss only")
    dry_run: bool = option(False, "token table, memory, 20 real steps, predicted hours; writes no model")
    log_row_ids: bool = option(False, "write the number of every trained row to row_ids-RANK.jsonl (row_ids-0.jsonl)")
    evaluation_strategy: str | None = option(None, "old name of --eval_strategy")
    warmup_ratio: float | None = option(None, "old form of --warmup_steps below 1")
    fsdp_transformer_layer_cls_to_wrap: str | None = option(None, "old place of the same field in --fsdp_config")
    force_fsdp: bool = option(False, "accepted for old command lines")
    overwrite_output_dir: bool = option(False, "start anew even where a checkpoint could be resumed")
    requested_accumulation: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        legacy_flags.settle(self)
        # One batch of the trainer is a whole optimiser step: its rows are laid out together and accumulated by us.
        self.requested_accumulation = self.gradient_accumulation_steps
        self.gradient_accumulation_steps = 1
        # The trainer connects every trained weight to the loss itself; DDP may not look for unused ones as well.
        self.ddp_find_unused_parameters = False
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.n_gpu > 1:
            legacy_flags.use_one_gpu(self)
        if self.image_grouping not in ("", "on", "off", "auto"):
            raise ConfigError(f"--image_grouping is {self.image_grouping!r}; expected on, off or auto")
        if self.loss_normalization not in ("tokens", "micro_batches"):
            raise ConfigError(f"--loss_normalization is {self.loss_normalization!r}; expected tokens or micro_batches")
        if self.prefix_sharing not in ("on", "off"):
            raise ConfigError(f"--prefix_sharing is {self.prefix_sharing!r}; expected on or off")

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimiser step on one rank: batch size times accumulation."""
        return self.per_device_train_batch_size * self.requested_accumulation

    @property
    def micro_batch(self) -> int | None:
        """Sequences of one published micro-batch, where the loss is the mean of the means of those; else None."""
        return self.per_device_train_batch_size if self.loss_normalization == "micro_batches" else None

    @property
    def global_batch(self) -> int:
        """Sequences of one optimiser step on all ranks."""
        return self.sequences_per_step * int(self.world_size)

    @property
    def run_folder(self) -> Path:
        """Where the run writes."""
        assert self.output_dir is not None
        return Path(self.output_dir)


Parsed = tuple[ModelArguments, DataArguments, LlavaTrainingArguments]
