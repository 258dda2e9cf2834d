"""Training data of a run: opening datasets, samplers, loaders, and precomputed image features."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.data import feature_cache
from llava.data.collator import Collator
from llava.data.dataset import RowDataset, SFTDataset, StreamDataset
from llava.data.image_store import ImageIndex
from llava.data.loader import Loader, StepLoader, StreamLoader
from llava.data.mixture import Mixture, Shares, is_mixture, load_mixture, read_mixture, stream_sources
from llava.data.quarantine import GrowingQuarantine, Quarantine
from llava.data.records import load_samples
from llava.data.samplers import (
    ImageGroupedSampler,
    LengthGroupedSampler,
    MixtureSampler,
    ModalityGroupedSampler,
    RandomSampler,
    SequentialSampler,
    StepSampler,
)
from llava.data.validate import check_trainable
from llava.errors import ConfigError
from llava.imaging.anyres import KEEP
from llava.model.builder import LoadedModel
from llava.model.calibration import calibrate_projector
from llava.processing import LlavaMedProcessor
from llava.train.optimizer import part_of
from llava.train.pair_data import open_pairs
from llava.train.specs import ImageSpec, OrderSpec, RowsSpec, StreamSpec, WorkerSpec

logger = logging.getLogger(__name__)

ENOUGH_ROWS_PER_IMAGE = 1.5
"""Mean number of rows per image from which `--image-grouping auto` groups by image."""

MAX_QUESTIONS_PER_IMAGE = 8
MIN_IMAGES_PER_STEP = 8
"""Fewer distinct images in an optimizer step reduce accuracy on small datasets (docs/results.md, VQA-RAD)."""


def questions_per_image(spec: OrderSpec) -> int:
    """Return the number of rows per image group: as set, or as many as leave enough images in a step.

    Raises:
        ConfigError: the number is negative.
    """
    if spec.questions_per_image < 0:
        raise ConfigError(
            f"--questions-per-image is {spec.questions_per_image}; expected at least 1, or 0 for automatic"
        )
    if spec.questions_per_image:
        return spec.questions_per_image
    return min(MAX_QUESTIONS_PER_IMAGE, max(1, spec.global_batch // MIN_IMAGES_PER_STEP))


def make_sampler(dataset: Rows, spec: OrderSpec) -> tuple[StepSampler, str]:
    """Return the sampler and whether it groups by image (`on` or `off`).

    Raises:
        ConfigError: two orders are requested at once.
    """
    if spec.strategy not in ("random", "sequential", "group_by_length"):
        raise ConfigError(
            f"--train-sampling-strategy {spec.strategy} is not supported; "
            "expected random, sequential or group_by_length"
        )
    by_length = spec.by_length or spec.by_modality_length
    contradicted = by_length or spec.strategy == "sequential"
    wanted = spec.image_grouping or ("off" if contradicted else spec.default_grouping)
    if wanted == "on" and by_length:
        raise ConfigError("--image-grouping on and grouping by length contradict each other; set one of them")
    if wanted == "auto":
        pays = not by_length and questions_per_image(spec) > 1 and _rows_per_image(dataset) >= ENOUGH_ROWS_PER_IMAGE
        wanted = "on" if pays else "off"
    ranks = {"rank": spec.rank, "world_size": spec.world_size, "seed": spec.seed}

    def make(rows: Sequence[int]) -> StepSampler:
        return _order(dataset, spec, rows, grouped=wanted == "on", **ranks)

    if dataset.shares is None:
        return make(range(len(dataset))), wanted
    return MixtureSampler(dataset.shares, spec.sequences_per_step, make=make, **ranks), wanted


def _order(dataset: Rows, spec: OrderSpec, rows: Sequence[int], *, grouped: bool, **ranks: int) -> StepSampler:
    """Return the sampler of some rows; it yields positions in `rows`."""
    size = spec.sequences_per_step
    if grouped:
        groups = dataset.image_groups()
        count = questions_per_image(spec)
        return ImageGroupedSampler([groups[row] for row in rows], size, questions_per_image=count, **ranks)
    if spec.by_modality_length:
        lengths = dataset.modality_lengths()
        return ModalityGroupedSampler([lengths[row] for row in rows], size, **ranks)
    if spec.by_length:
        lengths = dataset.lengths()
        return LengthGroupedSampler([lengths[row] for row in rows], size, **ranks)
    if spec.strategy == "sequential":
        return SequentialSampler(len(rows), size, **ranks)
    return RandomSampler(len(rows), size, **ranks)


def order_of(sampler: StepSampler) -> str:
    """Return a text of all that determines the rows of a step, except data, seed and global batch."""
    if isinstance(sampler, MixtureSampler):
        inner = order_of(sampler.make([0] * sampler.num_rows))
        return f"{inner}, drawn with weights {', '.join(f'{weight:g}' for weight in sampler.weights)}"
    text = f"{type(sampler).__name__} of {sampler.num_rows} rows"
    if isinstance(sampler, ImageGroupedSampler):  # groups do not cross the shards of ranks
        text += f", up to {sampler.questions_per_image} of an image, number of ranks {sampler.world_size}"
    return text


def _rows_per_image(dataset: Rows) -> float:
    groups = Counter(group for group in dataset.image_groups() if group is not None)
    return sum(groups.values()) / len(groups) if groups else 0.0


NUM_CALIBRATION_IMAGES = 64

Rows = RowDataset[Any]
"""Map-style dataset of fine-tuning rows or of preference pairs."""


def open_rows(spec: RowsSpec, processor: LlavaMedProcessor) -> Rows:
    """Load rows or preference pairs into a dataset and check that each can be trained.

    Raises as `open_data` does.
    """
    return open_pairs(spec, processor) if spec.pairs else open_data(spec, processor)


def open_data(spec: RowsSpec, processor: LlavaMedProcessor) -> SFTDataset:
    """Load rows into a dataset and check that each can be trained.

    Raises:
        ConfigError: the file does not exist, or describes a stream.
        DataError: a row is unusable.
    """
    path = spec.path
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; expected rows in LLaVA format, or a mixture")
    mixture = read_mixture(path) if is_mixture(path) else None
    if mixture is not None and mixture.stream:
        raise ConfigError(f"{path} describes a stream; expected held-out rows that fit in memory")
    if mixture is not None:
        _refuse_folder(spec)
        _refuse_loader(spec)
    quarantine = Quarantine()
    folder = spec.image_folder if mixture is None else None  # the image names of a mixture are full paths
    index = ImageIndex.open(folder, dicom=processor.dicom)
    if mixture is None:
        samples = load_samples(path, skip_bad=spec.skip_bad, quarantine=quarantine, loader=spec.loader)
    else:
        samples = load_mixture(mixture.sources, skip_bad=spec.skip_bad, quarantine=quarantine)
    quarantine.path = spec.quarantine  # written once, by the check of all rows
    limit: dict[str, Any] = {"max_length": spec.max_length, "image_counts_as_one": spec.image_counts_as_one}
    checked = check_trainable(
        samples, folder, processor, **limit, skip_bad=spec.skip_bad, quarantine=quarantine, index=index
    )
    shares = None if mixture is None else Shares.of(checked.samples, mixture.sources)
    asking = None if spec.asking is None else spec.asking.fitting(processor.template)
    return SFTDataset(
        checked.samples, processor, shares=shares, asking=asking, image_folder=folder, index=index, **limit
    )


def open_training_data(spec: RowsSpec, processor: LlavaMedProcessor, *, stream: StreamSpec) -> Rows | StreamDataset:
    """Return the training dataset: a map-style one for a file or a mixture, or a stream.

    Raises:
        ConfigError: an option cannot be used with a stream, or a stream has no `--max-steps`.
    """
    path = spec.path
    if spec.pairs or not Path(path).is_file() or not is_mixture(path):
        return open_rows(spec, processor)
    _refuse_folder(spec)
    _refuse_loader(spec)
    mixture = read_mixture(path)
    return _open_stream(mixture, spec, processor, stream) if mixture.stream else open_data(spec, processor)


def _refuse_loader(spec: RowsSpec) -> None:
    if spec.loader != "default":
        raise ConfigError(
            f"--loader {spec.loader} reads one file of rows; {spec.path} is a mixture. Use --loader default"
        )


def _refuse_folder(spec: RowsSpec) -> None:
    """Reject an image folder with a mixture, which has one for each source.

    Raises:
        ConfigError: a folder is set.
    """
    flag, folder = spec.folder_flag, spec.explicit_folder
    if folder is not None:
        also = "; for a file of held-out rows use --eval-image-folder" if flag == "--image-folder" else ""
        raise ConfigError(f"{flag} {folder} has no effect: {spec.path} is a mixture; set `images` in its sources{also}")


def _open_stream(mixture: Mixture, spec: RowsSpec, processor: LlavaMedProcessor, stream: StreamSpec) -> StreamDataset:
    if stream.max_steps <= 0:
        raise ConfigError("a streaming mixture has no length; set --max-steps")
    if stream.unsupported:
        raise ConfigError(
            f"{spec.path} is a stream; omit {', '.join(stream.unsupported)}, which cannot be used with streams"
        )
    dataset = StreamDataset(
        stream_sources(mixture),
        processor,
        max_length=spec.max_length,
        image_counts_as_one=spec.image_counts_as_one,
        asking=None if spec.asking is None else spec.asking.fitting(processor.template),
    )
    dataset.probe()
    return dataset


def source_names(dataset: Rows | StreamDataset) -> tuple[str, ...]:
    """Return the names of a mixture's sources; empty for a single file."""
    if isinstance(dataset, StreamDataset):
        return tuple(source.name for source in dataset.sources)
    return () if dataset.shares is None else dataset.shares.names


def make_loader(
    dataset: Rows | StreamDataset,
    collator: Collator,
    order: OrderSpec,
    workers: WorkerSpec,
    *,
    quarantine: Path | None = None,
) -> tuple[Loader, str, str]:
    """Return the loader of whole steps, whether it groups by image (`on`, `off`), and its order as text.

    Args:
        dataset: the rows.
        collator: lays out a step.
        order: order of the rows.
        workers: worker processes.
        quarantine: file that lists the skipped rows of a stream; None stops at the first unusable row.
    """
    if isinstance(dataset, StreamDataset):
        stream = StreamLoader(
            dataset,
            collator,
            sequences_per_step=order.sequences_per_step,
            rank=order.rank,
            world_size=order.world_size,
            num_workers=workers.num_workers,
            prefetch_factor=workers.prefetch_factor,
            seed=order.seed,
            quarantine=None if quarantine is None else GrowingQuarantine(quarantine),
        )
        return stream, "off", f"stream of {len(dataset.sources)} sources"
    sampler, grouping = make_sampler(dataset, order)
    loader = StepLoader(
        sampler,
        collator,
        num_workers=workers.num_workers,
        prefetch_factor=workers.prefetch_factor,
        persistent_workers=workers.persistent,
        seed=order.seed,
    )
    return loader, grouping, order_of(sampler)


def warn_without_images(dataset: Rows | StreamDataset, network: nn.Module) -> None:
    """Warn if only parts that read images are trained, and no row has one."""
    trained = {part_of(name) for name, weight in network.named_parameters() if weight.requires_grad}
    if "language" not in trained and not any(sample.images for sample in dataset.samples):
        logger.warning("no row has an image, and only parts for images are trained: their weights do not change")


def prepare_images(dataset: Rows | StreamDataset, loaded: LoadedModel, spec: ImageSpec) -> Rows | StreamDataset:
    """Calibrate the projector and return the dataset with cached features of a frozen tower, if requested.

    Raises:
        ConfigError: `--calibrate-mm-projector` with a stream.
    """
    calibrates = spec.calibrates and not (spec.may_skip and _calibrates_not(dataset, loaded))
    if isinstance(dataset, StreamDataset):
        if calibrates:
            raise ConfigError("--calibrate-mm-projector cannot be used with a stream; omit it")
        return dataset
    if calibrates:
        fit_new_projector(dataset, loaded, seed=spec.seed)
    return with_cached_features(dataset, loaded, spec)


def _calibrates_not(dataset: Rows | StreamDataset, loaded: LoadedModel) -> bool:
    """Return whether rows cannot calibrate a projector: a stream, no images, or images of several sizes."""
    if isinstance(dataset, StreamDataset) or loaded.processor.image_mode == KEEP:
        return True
    return not any(sample.images for sample in dataset.samples)


def fit_new_projector(dataset: Rows, loaded: LoadedModel, *, seed: int) -> None:
    """Initialize the projector to match the features of the first images.

    Raises:
        ConfigError: no row has an image, or images have different sizes.
    """
    keys = dataset.image_keys(NUM_CALIBRATION_IMAGES)
    if not keys:
        raise ConfigError("--calibrate-mm-projector needs images, but no row has one; omit it")
    if loaded.processor.image_mode == KEEP:
        raise ConfigError(
            "--calibrate-mm-projector needs images of one size; it cannot be used with --image-aspect-ratio keep"
        )
    inputs = [dataset.pixels(key) for key in keys]  # [3, H, W] each, or tiles [K, 3, H, W]
    pixels = torch.cat([image if image.dim() == 4 else image[None] for image in inputs])
    calibrate_projector(loaded.model, pixels, seed=seed)


def with_cached_features(dataset: Rows, loaded: LoadedModel, spec: ImageSpec) -> Rows:
    """Return the dataset with a frozen tower's features from `--feature-cache-dir`, if they fit.

    Raises:
        ConfigError: the vision tower is trained, or features have different sizes.
    """
    folder = spec.cache_folder
    if folder is None or spec.cache_gb <= 0:
        return dataset
    if loaded.processor.has_variable_images:
        mode = loaded.processor.image_mode
        raise ConfigError(
            f"--feature-cache-dir needs features of one size; it cannot be used with --image-aspect-ratio {mode}"
        )
    if spec.trains_tower:
        raise ConfigError(
            "--feature-cache-dir needs a frozen vision tower; it cannot be used with --unfreeze-mm-vision-tower or "
            "--vit-lora-enable"
        )
    config = loaded.model.config
    settings = {"layer": config.vision_feature_layer, "select": config.vision_feature_select_strategy}
    cache = feature_cache.build_feature_cache(
        folder,
        dataset.image_keys(),
        tower=feature_cache.weights_hash(loaded.model.model.vision_tower.state_dict(), settings),
        pixels=dataset.pixels,
        features=loaded.model.tower_features,
        limit_gb=spec.cache_gb,
    )
    return dataset.with_features(cache)
