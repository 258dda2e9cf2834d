"""Replay of recorded training runs of the original projects with our trainer.

train_log.json (command line, row order), init/, base_llm/ --our trainer--> loss of every micro-batch, last weights
                                                                            | differences
                                               recorded losses and out/RUN -+
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, set_seed

from benchmarks.fidelity import grown_vocabulary
from benchmarks.fidelity.counted_masks import CountedMaskDataset
from benchmarks.fidelity.recorded_weights import current_name, differences, put, shares
from benchmarks.fidelity.shifted_images import ShiftedImages
from benchmarks.fidelity.weight_bounds import WeightBounds
from llava.data.flat_batch import FlatBatch
from llava.data.loader import StepLoader
from llava.data.samplers import Step, StepSampler
from llava.model.builder import LoadedModel
from llava.model.checkpoint.load_parts import load_projector, read_tensors
from llava.train.data import open_data
from llava.train.model import open_model
from llava.train.objectives.base import Objective, ObjectiveOutput
from llava.train.parsing import Parsed, parse_training_args
from llava.train.run import freeze_and_adapt, layout_of, make_collator, make_trainer

LOG_FILE = "train_log.json"

IMAGE_MARK = -200
"""Token id of an image placeholder in the originals."""

PATHS = ("model_name_or_path", "vision_tower", "vision_tower_config", "vision_tower_checkpoint", "image_folder")
"""Options of recorded command lines that name files beside the log."""

DROPPED = (
    "no_cuda",
    "loader",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "pretrain_mm_mlp_adapter",
    "data_aug",
    "sq_r",
)
"""Recorded options without effect here: devices, saving, and parts that the starting weights replace."""

CUT_BEFORE_IMAGES = ("loader", "sq_r")
"""Options of the trainers of LLaVA-Rad and STLLaVA-Med, which cut rows before they insert images."""

MED_1_0_TEMPLATES = {"v0": "default", "v1": "vicuna_v1_1"}
"""Template that LLaVA-Med 1.0 trains, by its `--version`."""

MAX_ATTEMPTS, CLOSE_ENOUGH = 8, 1e-6
"""Limits of the search for a random starting row."""

LOSS_TOLERANCE = 1e-5
"""Tolerance of a micro-batch loss of about 7: 20 units in the last place of float32."""


@dataclass(frozen=True, slots=True)
class Replay:
    """Replayed run.

    Attributes:
        losses: our losses of the micro-batches.
        recorded: recorded losses of the micro-batches.
        weights: largest difference to the recorded last weights, by name.
        shares: the same in units of the rounding bound of each weight, see `weight_bounds`; at most 1 is expected.
        bounds: bounds of the entries of the trained weights, by our name.
        trained: our last weights, by our name.
        head_row: starting row of the head found by search, if it was random.
    """

    losses: list[float]
    recorded: list[float]
    weights: dict[str, float]
    shares: dict[str, float]
    bounds: dict[str, Tensor]
    trained: dict[str, Tensor]
    head_row: Tensor | None = None

    @property
    def loss_difference(self) -> float:
        """Largest difference of a micro-batch loss."""
        # torch's maximum, because Python's skips NaN.
        return float((torch.tensor(self.losses) - torch.tensor(self.recorded)).abs().max())

    @property
    def projector_share(self) -> float:
        """Largest difference of a weight of the projector in units of its bound."""
        return max(value for name, value in self.shares.items() if "mm_projector" in name)


class RecordedOrder(StepSampler):
    """Sampler of the rows of a recorded run, all epochs as one.

    Args:
        order: row numbers in the recorded order, at least as many as were trained on.
        num_rows: number of rows of the data set; no micro-batch holds rows of two epochs.
        micro_batch: rows per micro-batch.
        accumulation: micro-batches per step.
        num_steps: number of recorded steps.
    """

    def __init__(
        self, order: Sequence[int], num_rows: int, *, micro_batch: int, accumulation: int, num_steps: int
    ) -> None:
        super().__init__(num_rows, micro_batch * accumulation)
        epochs = [order[start : start + num_rows] for start in range(0, len(order), num_rows)]
        micro = [list(epoch[at : at + micro_batch]) for epoch in epochs for at in range(0, len(epoch), micro_batch)]
        grouped = [micro[at : at + accumulation] for at in range(0, num_steps * accumulation, accumulation)]
        self.steps = [[row for part in group for row in part] for group in grouped]

    def __len__(self) -> int:
        return len(self.steps)

    def plan(self, generator: torch.Generator) -> Iterator[Step]:
        """Yield the recorded steps."""
        return iter([[rows] for rows in self.steps])


class Recording:
    """Objective that also records the loss of every row, which is one micro-batch here."""

    def __init__(self, objective: Objective, accumulation: int) -> None:
        self.objective = objective
        self.accumulation = accumulation
        self.losses: list[float] = []

    def __call__(self, model: Any, batch: FlatBatch, *, num_items: Tensor) -> ObjectiveOutput:
        """Return the output of the objective and record its loss."""
        output = self.objective(model, batch, num_items=num_items)
        self.losses.append(float(output.loss.detach()) * self.accumulation)
        return output


def runs(folder: Path) -> dict[str, str | None]:
    """Return the recorded runs of a folder with the reason why each cannot be replayed, or None."""
    logs = json.loads((folder / LOG_FILE).read_text(encoding="utf-8"))
    return {run: _not_built(_options(log["argv"])) for run, log in sorted(logs.items())}


def _not_built(options: Mapping[str, str]) -> str | None:
    if options.get("vit_lora_enable", "False") != "False":
        return "LoRA on the vision tower is not built yet"
    if float(options.get("sq_r", "0")) > 0:
        return "self-questioning is not built yet"
    return None


def replay(folder: Path, run: str, scratch: Path, *, loss_normalization: str = "micro_batches") -> Replay:
    """Return the replay of a recorded run.

    Args:
        folder: folder with `train_log.json` and the files it names.
        run: key of the log; its starting weights are `init/RUN.bin`.
        scratch: an empty folder for the files of the run.
        loss_normalization: `micro_batches` as the originals, or `tokens`, the default of this package.
    """
    log = json.loads((folder / LOG_FILE).read_text(encoding="utf-8"))[run]
    options = _options(log["argv"])
    base, final = folder / options["model_name_or_path"], folder / options["output_dir"]
    init = folder / "init" / f"{run}.bin"
    options["loss_normalization"] = loss_normalization
    job = _Job(folder, scratch, options, log["order"], init)
    if options["version"] == "v1_sq":
        text = system_text(log["first_input_ids"][0][0], base)
        (scratch / "system.txt").write_text(text, encoding="utf-8")
        options |= {"version": "v1", "system_file": str(scratch / "system.txt")}
    if not grown_vocabulary.is_grown(final):
        return _compared(_run(job), log["micro_losses"], final)
    # One row of the head was random and is not recorded; search the one from which the run ends as recorded.
    start = grown_vocabulary.Start(base, final)
    for attempt in range(MAX_ATTEMPTS):
        options["model_name_or_path"] = str(start.write(scratch / f"lm-{attempt}"))
        ended = _run(replace(job, med_1_0=True))
        if start.correct(ended.trained) < CLOSE_ENOUGH:
            break
    head = current_name(grown_vocabulary.HEAD)
    if head in ended.bounds:  # the search limits the precision of that row
        ended.bounds[head][start.patch] += CLOSE_ENOUGH
    return replace(_compared(ended, log["micro_losses"], final), head_row=start.head_row)


@dataclass(frozen=True, slots=True)
class _Ended:
    """Finished run: losses of the micro-batches, last trained weights and their bounds."""

    losses: list[float]
    trained: dict[str, Tensor]
    bounds: dict[str, Tensor]


def _compared(ended: _Ended, recorded: list[float], final: Path) -> Replay:
    return Replay(
        ended.losses,
        recorded,
        differences(ended.trained, final),
        shares(ended.trained, final, ended.bounds),
        ended.bounds,
        ended.trained,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """Inputs of a run: folders, options, row order, starting weights, and whether it is LLaVA-Med 1.0's."""

    folder: Path
    scratch: Path
    options: dict[str, str]
    order: list[int]
    init: Path
    med_1_0: bool = False


def _run(job: _Job) -> _Ended:
    """Train once and return the finished run."""
    parsed = parse_training_args(_command_line(job))
    set_seed(parsed.training.seed)
    args = parsed.training
    loaded = open_model(parsed.model_spec())
    if job.med_1_0:
        loaded.processor.strip_around_images, loaded.processor.placement = True, "as_written"
    load_projector(loaded.model, job.init)
    network, kind = freeze_and_adapt(loaded, parsed.model, args)
    put(network, {name: tensor for name, tensor in read_tensors(job.init).items() if "lora_" in name})
    rows = args.per_device_train_batch_size * args.requested_accumulation
    bounds = WeightBounds(network, rows * args.model_max_length)
    losses = _train(parsed, loaded, (network, kind), job, bounds)
    return _Ended(
        losses, {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}, bounds.bounds
    )


def _options(argv: Sequence[str]) -> dict[str, str]:
    """Return option names and values of a recorded command line; options without a value are on."""
    found: dict[str, str] = {}
    name = ""
    for text in argv:
        if text.startswith("--"):
            name = text.removeprefix("--")
            found[name] = "True"
        else:
            found[name] = text
    return found


def _rows(folder: Path, path: str, scratch: Path) -> Path:
    """Return the data file; a path with a remark about images means the rows with an image."""
    name, _, remark = path.partition(" ")
    if not remark:
        return folder / name
    rows = [row for row in json.loads((folder / name).read_text(encoding="utf-8")) if "image" in row]
    (scratch / name).write_text(json.dumps(rows), encoding="utf-8")
    return scratch / name


def _command_line(job: _Job) -> list[str]:
    options, folder = job.options, job.folder
    changed = {name: value for name, value in options.items() if name not in DROPPED}
    for name in PATHS:
        if name in changed and (folder / changed[name]).exists():
            changed[name] = str(folder / changed[name])
    changed |= {
        "data_path": str(_rows(folder, options["data_path"], job.scratch)),
        "output_dir": str(job.scratch / "run"),
        "overwrite_output_dir": "True",
        "save_strategy": "no",
        "use_cpu": "True",
        "image_counts_as_one": str(any(name in options for name in CUT_BEFORE_IMAGES)),
    }
    if job.med_1_0:
        changed |= {"mm_use_im_patch_token": "True", "version": MED_1_0_TEMPLATES[options["version"]]}
    return [text for name, value in changed.items() for text in (f"--{name}", value)]


def _train(
    parsed: Parsed, loaded: LoadedModel, trained: tuple[nn.Module, Any], job: _Job, bounds: WeightBounds
) -> list[float]:
    args, spec = parsed.training, parsed.training_rows()
    dataset = open_data(spec, loaded.processor)
    if job.med_1_0 and loaded.processor.template.form.closing:
        dataset = CountedMaskDataset(
            dataset.samples,
            loaded.processor,
            image_folder=spec.image_folder,
            max_length=spec.max_length,
            image_counts_as_one=spec.image_counts_as_one,
        )
    sampler = RecordedOrder(
        job.order,
        len(dataset),
        micro_batch=args.per_device_train_batch_size,
        accumulation=args.requested_accumulation,
        num_steps=args.max_steps,
    )
    collator = replace(make_collator(dataset, loaded, layout_of(loaded, args), args), micro_batch=args.micro_batch)
    if job.med_1_0:
        collator = ShiftedImages.of(collator)
    trainer = make_trainer(parsed, loaded, trained, StepLoader(sampler, collator), collator)
    recording = Recording(trainer.objective, args.requested_accumulation)
    trainer.objective = recording
    trainer.add_callback(bounds)
    trainer.train()
    return recording.losses


def system_text(ids: Sequence[int], language_model: Path) -> str:
    """Return the system prompt at the start of recorded ids, which distinguishes `v1_sq` from `v1`."""
    until_image = list(ids)[1 : list(ids).index(IMAGE_MARK)] if IMAGE_MARK in ids else list(ids)[1:]
    text = str(AutoTokenizer.from_pretrained(language_model).decode(until_image))
    return text.split(" USER:", 1)[0].strip()
