"""Training data of a run: opening datasets, samplers, loaders, and precomputed image features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from llava.data import feature_cache
from llava.data.collator import Collator
from llava.data.dataset import SFTDataset, StreamDataset
from llava.data.image_store import ImageIndex
from llava.data.loader import StepLoader, StreamLoader
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
from llava.train.args import DataArguments, LlavaTrainingArguments, ModelArguments

ENOUGH_ROWS_PER_IMAGE = 1.5
"""Mean number of rows per image from which `--image-grouping auto` groups by image."""

MAX_QUESTIONS_PER_IMAGE = 8
MIN_IMAGES_PER_STEP = 8
"""Fewer distinct images in an optimizer step reduce accuracy on small datasets (docs/results.md, VQA-RAD)."""


def questions_per_image(args: LlavaTrainingArguments) -> int:
    """Return the number of rows per image group: as set, or as many as leave enough images in a step.

    Raises:
        ConfigError: the number is negative.
    """
    if args.questions_per_image < 0:
        raise ConfigError(
            f"--questions-per-image is {args.questions_per_image}; expected at least 1, or 0 for automatic"
        )
    if args.questions_per_image:
        return args.questions_per_image
    return min(MAX_QUESTIONS_PER_IMAGE, max(1, args.global_batch // MIN_IMAGES_PER_STEP))


def make_sampler(dataset: SFTDataset, args: LlavaTrainingArguments, default: str) -> tuple[StepSampler, str]:
    """Return the sampler and whether it groups by image (`on` or `off`).

    Raises:
        ConfigError: two orders are requested at once.
    """
    if args.train_sampling_strategy not in ("random", "sequential", "group_by_length"):
        raise ConfigError(
            f"--train-sampling-strategy {args.train_sampling_strategy} is not supported; "
            "expected random, sequential or group_by_length"
        )
    args.group_by_length |= args.train_sampling_strategy == "group_by_length"
    by_length = args.group_by_length or args.group_by_modality_length
    wanted = args.image_grouping or ("off" if by_length or args.train_sampling_strategy == "sequential" else default)
    if wanted == "on" and by_length:
        raise ConfigError("--image-grouping on and grouping by length contradict each other; set one of them")
    if wanted == "auto":
        pays = not by_length and questions_per_image(args) > 1 and _rows_per_image(dataset) >= ENOUGH_ROWS_PER_IMAGE
        wanted = "on" if pays else "off"
    ranks = {"rank": args.process_index, "world_size": args.world_size, "seed": args.seed}

    def make(rows: Sequence[int]) -> StepSampler:
        return _order(dataset, args, rows, grouped=wanted == "on", **ranks)

    if dataset.shares is None:
        return make(range(len(dataset))), wanted
    return MixtureSampler(dataset.shares, args.sequences_per_step, make=make, **ranks), wanted


def _order(
    dataset: SFTDataset, args: LlavaTrainingArguments, rows: Sequence[int], *, grouped: bool, **ranks: int
) -> StepSampler:
    """Return the sampler of some rows; it yields positions in `rows`."""
    size = args.sequences_per_step
    if grouped:
        groups = dataset.image_groups()
        count = questions_per_image(args)
        return ImageGroupedSampler([groups[row] for row in rows], size, questions_per_image=count, **ranks)
    if args.group_by_modality_length:
        lengths = dataset.modality_lengths()
        return ModalityGroupedSampler([lengths[row] for row in rows], size, **ranks)
    if args.group_by_length:
        lengths = dataset.lengths()
        return LengthGroupedSampler([lengths[row] for row in rows], size, **ranks)
    if args.train_sampling_strategy == "sequential":
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


def _rows_per_image(dataset: SFTDataset) -> float:
    groups = Counter(group for group in dataset.image_groups() if group is not None)
    return sum(groups.values()) / len(groups) if groups else 0.0


NUM_CALIBRATION_IMAGES = 64
QUARANTINE_FILES = ("quarantine.jsonl", "quarantine-eval.jsonl")
"""Files that list skipped rows: of the training data, and of the held-out data."""

RANK_QUARANTINE_FILE = "quarantine-{}.jsonl"
"""File of a stream's skipped rows on every rank except the first."""


def open_data(
    path: str, image_folder: str | None, data_args: DataArguments, args: LlavaTrainingArguments, loaded: LoadedModel
) -> SFTDataset:
    """Load rows into a dataset and check that each can be trained.

    Raises:
        ConfigError: the file does not exist, or describes a stream.
        DataError: a row is unusable.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; expected rows in LLaVA format, or a mixture")
    mixture = read_mixture(path) if is_mixture(path) else None
    if mixture is not None and mixture.stream:
        raise ConfigError(f"{path} describes a stream; expected held-out rows that fit in memory")
    if mixture is not None and path == data_args.eval_data_path:
        _refuse_folder(path, "--eval-image-folder", data_args.eval_image_folder)
    writes = args.should_save and data_args.skip_bad and not args.dry_run
    quarantine = Quarantine(args.run_folder / QUARANTINE_FILES[path == data_args.eval_data_path] if writes else None)
    folder = image_folder if mixture is None else None  # the image names of a mixture are full paths
    index = ImageIndex.open(folder, dicom=loaded.processor.dicom)
    if mixture is None:
        samples = load_samples(path, skip_bad=data_args.skip_bad, quarantine=quarantine)
    else:
        samples = load_mixture(mixture.sources, skip_bad=data_args.skip_bad, quarantine=quarantine)
    limit = args.model_max_length
    loaded.processor.image_counts_as_one = data_args.image_counts_as_one
    checked = check_trainable(
        samples,
        folder,
        loaded.processor,
        max_length=limit,
        skip_bad=data_args.skip_bad,
        quarantine=quarantine,
        index=index,
    )
    dataset = SFTDataset(checked.samples, loaded.processor, image_folder=folder, max_length=limit, index=index)
    if mixture is not None:
        dataset.shares = Shares.of(checked.samples, mixture.sources)
    return dataset


def open_training_data(
    data_args: DataArguments, args: LlavaTrainingArguments, loaded: LoadedModel
) -> SFTDataset | StreamDataset:
    """Return the training dataset: a map-style one for a file or a mixture, or a stream.

    Raises:
        ConfigError: an option cannot be used with a stream, or a stream has no `--max-steps`.
    """
    path = data_args.data_path
    if not Path(path).is_file() or not is_mixture(path):
        return open_data(path, data_args.image_folder, data_args, args, loaded)
    _refuse_folder(path, "--image-folder", data_args.image_folder)
    mixture = read_mixture(path)
    if mixture.stream:
        return _open_stream(mixture, data_args, args, loaded)
    return open_data(path, None, data_args, args, loaded)


def _refuse_folder(path: str, flag: str, folder: str | None) -> None:
    """Reject an image folder with a mixture, which has one for each source.

    Raises:
        ConfigError: `folder` is set.
    """
    if folder is not None:
        also = "; for a file of held-out rows use --eval-image-folder" if flag == "--image-folder" else ""
        raise ConfigError(f"{flag} {folder} has no effect: {path} is a mixture; set `images` in its sources{also}")


def _open_stream(
    mixture: Mixture, data_args: DataArguments, args: LlavaTrainingArguments, loaded: LoadedModel
) -> StreamDataset:
    if args.max_steps <= 0:
        raise ConfigError("a streaming mixture has no length; set --max-steps")
    unusable = {
        "--dry-run": args.dry_run,
        "--feature-cache-dir": data_args.feature_cache_dir is not None,
        "--image-grouping on": args.image_grouping == "on",
        "--group-by-length": args.group_by_length or args.train_sampling_strategy == "group_by_length",
        "--group-by-modality-length": args.group_by_modality_length,
    }
    if given := [name for name, is_given in unusable.items() if is_given]:
        raise ConfigError(
            f"{data_args.data_path} is a stream; omit {', '.join(given)}, which cannot be used with streams"
        )
    loaded.processor.image_counts_as_one = data_args.image_counts_as_one
    dataset = StreamDataset(stream_sources(mixture), loaded.processor, max_length=args.model_max_length)
    dataset.probe()
    args.ignore_data_skip = True  # a stream resumes from its saved position
    return dataset


def source_names(dataset: SFTDataset | StreamDataset) -> tuple[str, ...]:
    """Return the names of a mixture's sources; empty for a single file."""
    if isinstance(dataset, StreamDataset):
        return tuple(source.name for source in dataset.sources)
    return () if dataset.shares is None else dataset.shares.names


def make_loader(
    dataset: SFTDataset | StreamDataset,
    collator: Collator,
    args: LlavaTrainingArguments,
    *,
    skip_bad: bool,
    grouping: str,
) -> tuple[StepLoader | StreamLoader, str, str]:
    """Return the loader of whole steps, whether it groups by image (`on`, `off`), and its order as text."""
    if isinstance(dataset, StreamDataset):
        stream = StreamLoader(
            dataset,
            collator,
            sequences_per_step=args.sequences_per_step,
            rank=args.process_index,
            world_size=args.world_size,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            seed=args.seed,
            quarantine=GrowingQuarantine(args.run_folder / _quarantine_file(args.process_index)) if skip_bad else None,
        )
        return stream, "off", f"stream of {len(dataset.sources)} sources"
    sampler, grouping = make_sampler(dataset, args, grouping)
    loader = StepLoader(
        sampler,
        collator,
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        persistent_workers=args.dataloader_persistent_workers,
        seed=args.seed,
    )
    return loader, grouping, order_of(sampler)


def _quarantine_file(rank: int) -> str:
    return RANK_QUARANTINE_FILE.format(rank) if rank else QUARANTINE_FILES[0]


def prepare_images(
    dataset: SFTDataset | StreamDataset,
    loaded: LoadedModel,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: LlavaTrainingArguments,
) -> None:
    """Calibrate the projector and cache the features of a frozen vision tower, if requested.

    Raises:
        ConfigError: `--calibrate-mm-projector` with a stream.
    """
    if isinstance(dataset, StreamDataset):
        if model_args.calibrate_mm_projector:
            raise ConfigError("--calibrate-mm-projector cannot be used with a stream; omit it")
        return
    if model_args.calibrate_mm_projector:
        fit_new_projector(dataset, loaded, args)
    use_cache_of_features(dataset, loaded, model_args, data_args)


def fit_new_projector(dataset: SFTDataset, loaded: LoadedModel, args: LlavaTrainingArguments) -> None:
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
    calibrate_projector(loaded.model, pixels, seed=args.seed)


def use_cache_of_features(
    dataset: SFTDataset, loaded: LoadedModel, model_args: ModelArguments, data_args: DataArguments
) -> None:
    """Cache the features of a frozen vision tower in `--feature-cache-dir`, if they fit.

    Raises:
        ConfigError: the vision tower is trained, or features have different sizes.
    """
    folder = data_args.feature_cache_dir
    if folder is None or data_args.feature_cache_gb <= 0:
        return
    if loaded.processor.has_variable_images:
        mode = loaded.processor.image_mode
        raise ConfigError(
            f"--feature-cache-dir needs features of one size; it cannot be used with --image-aspect-ratio {mode}"
        )
    if model_args.unfreeze_mm_vision_tower:
        raise ConfigError(
            "--feature-cache-dir needs a frozen vision tower; it cannot be used with --unfreeze-mm-vision-tower"
        )
    config = loaded.model.config
    settings = {"layer": config.vision_feature_layer, "select": config.vision_feature_select_strategy}
    cache = feature_cache.build_feature_cache(
        folder,
        dataset.image_keys(),
        tower=feature_cache.weights_hash(loaded.model.model.vision_tower.state_dict(), settings),
        pixels=dataset.pixels,
        features=loaded.model.tower_features,
        limit_gb=data_args.feature_cache_gb,
    )
    dataset.use_features(cache)
