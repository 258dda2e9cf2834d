"""Specifications that the entry of training passes to its other modules; all are frozen.

command line --parsing--> arguments --args.Parsed--> specs --run--> model, data, optimizer, checkpointing
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.image_negatives import ImageNegative
from llava.data.self_questioning import QuestionDraws
from llava.model.checkpoint.formats import Checkpoint
from llava.model.quantization import Quantization
from llava.model.tower_lora import TowerLora


class FoundModel(NamedTuple):
    """Result of opening `--model-name-or-path`: a llava checkpoint, or None for a language model."""

    checkpoint: Checkpoint | None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Checkpoint to load or parts to build a model from; None keeps the value of the checkpoint.

    Attributes:
        path: language model, or a llava checkpoint.
        vision_tower: folder or hub name of the vision tower.
        vision_tower_config: open_clip model configuration of the vision tower.
        vision_tower_checkpoint: open_clip weights of the vision tower.
        projector_type: type of a new projector.
        projector_kwargs: keyword arguments of that type.
        projector_weights: file or folder that the projector is initialized from.
        select_layer: hidden state of the vision tower that the projector receives.
        select_feature: `patch` or `cls_patch`.
        use_im_start_end: write marker tokens around each image.
        use_im_patch_token: add the token `<im_patch>` of old vocabularies.
        template: conversation template.
        system_file: text file that replaces the system prompt of the template.
        image_mode: how images are shaped for the vision tower.
        patch_merge_type: how the tiles of `anyres` are joined.
        image_grid_pinpoints: image sizes that `anyres` chooses from.
        image_size: side of the input image in pixels.
        trains_empty: train answers without text.
        dicom_window: window of DICOM files.
        dicom_frame: frame of DICOM files.
        fast_jpeg: decode large JPEG files at a smaller scale.
        quantization: quantization of the language model.
        seed: seed of new weights.
        found: what was found at `path`; None if it has not been opened.
    """

    path: str
    vision_tower: str | None
    vision_tower_config: str | None
    vision_tower_checkpoint: str | None
    projector_type: str
    projector_kwargs: dict[str, Any] | None
    projector_weights: str | None
    select_layer: int
    select_feature: str
    use_im_start_end: bool
    use_im_patch_token: bool
    template: str | None
    system_file: str | None
    image_mode: str | None
    patch_merge_type: str | None
    image_grid_pinpoints: str | None
    image_size: int | None
    trains_empty: bool
    dicom_window: str | None
    dicom_frame: str | None
    fast_jpeg: bool | None
    quantization: Quantization
    seed: int
    found: FoundModel | None = None


@dataclass(frozen=True, slots=True)
class PartsSpec:
    """Parts of the model that train.

    Attributes:
        lora: settings of the language model's adapter, see `llava.model.lora.add_lora`; None without one.
        tower_lora: settings of the vision tower's adapter; None without one.
        projector_only: train the projector and marker rows only, beside an adapter.
        freeze_backbone: the language model's weights do not train.
        freeze_projector: the projector does not train.
        train_tower: the vision tower trains as well.
        checkpoints_activations: activations are computed again in the backward pass.
    """

    lora: dict[str, Any] | None
    tower_lora: TowerLora | None
    projector_only: bool
    freeze_backbone: bool
    freeze_projector: bool
    train_tower: bool
    checkpoints_activations: bool


@dataclass(frozen=True, slots=True)
class RowsSpec:
    """File of rows, and how it is checked.

    Attributes:
        path: rows in LLaVA format, or a mixture.
        image_folder: folder that image names are relative to; the images of a mixture have full paths.
        folder_flag: flag that set a folder for these rows, which a mixture rejects.
        explicit_folder: value of that flag, or None.
        max_length: longest sequence in tokens.
        image_counts_as_one: count each image as one token of `max_length`.
        loader: layout of the rows, a name in `llava.data.records.LOADERS`.
        skip_bad: skip unusable rows.
        quarantine: file that lists the skipped rows; None writes none.
        pairs: whether the rows are preference pairs.
        asking: which later questions are trained; None for none but those that the rows name.
        negative: damaged images of preference pairs, or None.
        labeled: whether the file may hold single answers with labels instead of pairs.
    """

    path: str
    image_folder: str | None
    folder_flag: str
    explicit_folder: str | None
    max_length: int
    image_counts_as_one: bool = False
    loader: str = "default"
    skip_bad: bool = False
    quarantine: Path | None = None
    pairs: bool = False
    asking: QuestionDraws | None = None
    negative: ImageNegative | None = None
    labeled: bool = False


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """Settings of a run whose rows are streamed.

    Attributes:
        max_steps: number of optimizer steps; a stream has no length.
        unsupported: flags of this run that cannot be used with a stream.
        quarantine: file of this rank that lists the skipped rows; None without `--skip-bad`.
    """

    max_steps: int
    unsupported: tuple[str, ...]
    quarantine: Path | None


@dataclass(frozen=True, slots=True)
class OrderSpec:
    """Order of the rows.

    Attributes:
        image_grouping: `on`, `off`, `auto`, or empty for the default.
        default_grouping: value of `image_grouping` where nothing contradicts it.
        questions_per_image: rows in a group of one image; 0 for automatic.
        strategy: `random`, `sequential` or `group_by_length`.
        by_length: rows of similar length in one step.
        by_modality_length: rows of one modality and similar length in one step.
        sequences_per_step: sequences of one optimizer step on one rank.
        seed: seed of the order.
        rank: rank of this process.
        world_size: number of processes.
    """

    image_grouping: str
    default_grouping: str
    questions_per_image: int
    strategy: str
    by_length: bool
    by_modality_length: bool
    sequences_per_step: int
    seed: int
    rank: int
    world_size: int

    @property
    def global_batch(self) -> int:
        """Sequences of one optimizer step on all ranks."""
        return self.sequences_per_step * self.world_size


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Worker processes of the loader: number, prefetched batches, and whether they outlive an epoch."""

    num_workers: int
    prefetch_factor: int | None
    persistent: bool


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """Work on images before training.

    Attributes:
        calibrates: initialize the projector to match the features of the first images.
        may_skip: leave a projector as it is where the rows do not allow to calibrate it, instead of stopping.
        seed: seed of that projector.
        trains_tower: whether the vision tower is trained, so that its features cannot be cached.
        cache_folder: folder that caches the features of the vision tower; None for no cache.
        cache_gb: largest size of the cache in GB.
    """

    calibrates: bool
    seed: int
    trains_tower: bool
    cache_folder: str | None
    cache_gb: float
    may_skip: bool = False


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """Learning rate of each part, and weight decay; rates change every `steps_per_rate` optimizer steps."""

    language: float
    projector: float
    tower: float
    weight_decay: float
    steps_per_rate: int = 1


@dataclass(frozen=True, slots=True)
class RatingSpec:
    """Reward model.

    Attributes:
        centering: weight of the squared sum of both rewards of a pair.
        prompt_file: text file of a rating question after each conversation, or None.
        caption_file: JSON file of the captions of each image, for the slot of that question, or None.
    """

    centering: float
    prompt_file: str | None
    caption_file: str | None


@dataclass(frozen=True, slots=True)
class ResumeSpec:
    """Where a run looks for the checkpoint to resume from.

    Attributes:
        folder: output folder.
        checkpoint: value of `--resume-from-checkpoint`: a folder, or a word for on or off.
        overwrites: start from the beginning even if a checkpoint could be resumed.
        needs_mark: the loaders unpickle, so an unmarked checkpoint after a marked one is passed over.
    """

    folder: Path
    checkpoint: str | bool | None
    overwrites: bool
    needs_mark: bool = False

    @property
    def starts_over(self) -> bool:
        """Whether checkpoints of an earlier run in the output folder are ignored."""
        return self.overwrites or self.checkpoint in ("False", "false", False)


@dataclass(frozen=True, slots=True)
class ProvenanceSpec:
    """Facts of a run that its arguments determine.

    Attributes:
        data_path: training data.
        eval_data_path: held-out rows, or None.
        model: path of the model.
        global_batch: sequences of one optimizer step on all ranks.
        seed: seed of the run.
        loss_normalization: `tokens` or `micro_batches`.
        precision: `bfloat16`, `float16` or `float32`.
        options: options that determine what a step computes.
    """

    data_path: str
    eval_data_path: str | None
    model: str
    global_batch: int
    seed: int
    loss_normalization: str
    precision: str
    options: Mapping[str, Any]
