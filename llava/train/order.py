"""In which order rows are drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llava.data.dataset import SFTDataset
from llava.data.mixture_sampler import MixtureSampler
from llava.data.samplers import (
    ImageGroupedSampler,
    LengthGroupedSampler,
    ModalityGroupedSampler,
    RandomSampler,
    SequentialSampler,
    StepSampler,
)
from llava.errors import ConfigError
from llava.train.args import LlavaTrainingArguments

ENOUGH_ROWS_PER_IMAGE = 1.5
"""`auto` groups by image where rows outnumber images at least so much."""

MAX_QUESTIONS_PER_IMAGE = 8
MIN_IMAGES_PER_STEP = 8
"""Fewer different images in an optimiser step cost accuracy on small sets (docs/results.md, VQA-RAD)."""


def questions_per_image(args: LlavaTrainingArguments) -> int:
    """Rows of one image that are drawn together: as asked for, else as many as leave enough images in a step.

    Raises:
        ConfigError: the number asked for is negative.
    """
    if args.questions_per_image < 0:
        raise ConfigError(f"--questions_per_image is {args.questions_per_image}; expected 1 or more, or 0 to choose")
    if args.questions_per_image:
        return args.questions_per_image
    return min(MAX_QUESTIONS_PER_IMAGE, max(1, args.global_batch // MIN_IMAGES_PER_STEP))


def make_sampler(dataset: SFTDataset, args: LlavaTrainingArguments, default: str) -> tuple[StepSampler, str]:
    """The sampler, and a word for it: `on` (grouped by image) or `off`.

    Raises:
        ConfigError: two orders are asked for at once.
    """
    if args.train_sampling_strategy not in ("random", "sequential", "group_by_length"):
        raise ConfigError(
            f"--train_sampling_strategy {args.train_sampling_strategy} is not known here; "
            "expected random, sequential or group_by_length"
        )
    args.group_by_length |= args.train_sampling_strategy == "group_by_length"
    by_length = args.group_by_length or args.group_by_modality_length
    wanted = args.image_grouping or ("off" if by_length or args.train_sampling_strategy == "sequential" else default)
    if wanted == "on" and by_length:
        raise ConfigError("--image_grouping on and grouping by length contradict each other; give one")
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
    """The order of some rows, which it counts by their place in `rows`."""
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


def describe(sampler: StepSampler) -> str:
    """All that decides which rows a step holds, apart from data, seed and global batch."""
    if isinstance(sampler, MixtureSampler):
        inner = describe(sampler.make([0] * sampler.num_rows))
        return f"{inner}, drawn with weights {', '.join(f'{weight:g}' for weight in sampler.weights)}"
    text = f"{type(sampler).__name__} of {sampler.num_rows} rows"
    if isinstance(sampler, ImageGroupedSampler):  # its groups are cut where a rank's share ends
        text += f", up to {sampler.questions_per_image} of an image, number of ranks {sampler.world_size}"
    return text


def _rows_per_image(dataset: SFTDataset) -> float:
    groups = Counter(group for group in dataset.image_groups() if group is not None)
    return sum(groups.values()) / len(groups) if groups else 0.0
