"""Replay of recorded training runs of the original projects with our trainer.

train_log.json (command line, row order), init/, base_llm/ --our trainer--> loss of every micro-batch, last weights
                                                                            | differences
                                               recorded losses and out/RUN -+
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, TrainerCallback, set_seed

from benchmarks.fidelity import grown_vocabulary
from benchmarks.fidelity.counted_masks import CountedMaskDataset
from benchmarks.fidelity.folder import IMAGE_MARK
from benchmarks.fidelity.recorded_weights import current_name, differences, put, shares
from benchmarks.fidelity.shifted_images import ShiftedImages
from benchmarks.fidelity.weight_bounds import WeightBounds
from llava.data.encode import Encoded
from llava.data.flat_batch import FlatBatch
from llava.data.loader import StepLoader
from llava.data.samplers import Step, StepSampler
from llava.model.builder import LoadedModel
from llava.model.checkpoint.load_parts import load_projector, read_tensors
from llava.train.data import open_data
from llava.train.model import open_model
from llava.train.objectives.base import Objective, ObjectiveOutput
from llava.train.parsed import Parsed
from llava.train.parsing import parse_training_args
from llava.train.parts import freeze_and_adapt
from llava.train.run import layout_of, make_collator, make_objective, make_trainer

LOG_FILE = "train_log.json"

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
)
"""Recorded options without effect here: devices, saving, and parts that the starting weights replace."""

CUT_BEFORE_IMAGES = ("loader", "sq_r")
"""Options of the trainers of LLaVA-Rad and STLLaVA-Med, which cut rows before they insert images."""

ASKING, SELF_QUESTIONING = "v1_sq", "frozen_vit_lora,shared_sq_draws"
"""Template of the runs of STLLaVA-Med, and what they do by `--compat`."""

MED_1_0_TEMPLATES = {"v0": "default", "v1": "vicuna_v1_1"}
"""Template that LLaVA-Med 1.0 trains, by its `--version`."""

MAX_ATTEMPTS, CLOSE_ENOUGH = 8, 1e-6
"""Limits of the search for a random starting row."""

LOSS_TOLERANCE = 1e-5
"""Tolerance of a micro-batch loss of about 7: 20 units in the last place of float32."""

TIED = {"lora_vitlora_sq05": (2e-5, 60.0)}
"""Runs with wider limits: tolerance of their losses, and the largest share of a weight's bound.

The first recorded loss of this run is 5.2e-6 from that in float64, ours 1e-7; of its last weights those of the
projector differ most, by up to 31 of their bounds. Probably a patch joined another of several equal prototypes, which
rounding decides: 256 prototypes of 16 patches are equal in groups, and drawing among equal ones changes the loss by up
to 4e-3.
"""


def tolerances_of(run: str) -> tuple[float, float]:
    """Return the tolerance of the losses of a run, and the largest share of a weight's bound."""
    return TIED.get(run, (LOSS_TOLERANCE, 1.0))


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
        log: our ids, learning rates and groups of the run.
        head_row: starting row of the head found by search, if it was random.
    """

    losses: list[float]
    recorded: list[float]
    weights: dict[str, float]
    shares: dict[str, float]
    bounds: dict[str, Tensor]
    trained: dict[str, Tensor]
    log: TrainingLog
    head_row: Tensor | None = None

    @property
    def loss_difference(self) -> float:
        """Largest difference of a micro-batch loss."""
        return largest_gap(self.losses, self.recorded)

    @property
    def projector_share(self) -> float:
        """Largest difference of a weight of the projector in units of its bound."""
        return max(value for name, value in self.shares.items() if "mm_projector" in name)


def largest_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the largest difference of two lists, NaN if one holds NaN.

    Raises:
        ValueError: their lengths differ.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(theirs)} values are recorded, expected {len(ours)}")
    # torch's maximum, because Python's skips NaN.
    return float((torch.tensor(ours) - torch.tensor(theirs)).abs().max())


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


class TrainingLog(TrainerCallback):
    """Callback that keeps what else a log of the originals holds.

    Attributes:
        ids: ids of every trained row in the notation of the originals, in their order.
        rates: smallest and largest learning rate of each step.
        groups: learning rate at the start and weight decay of every trained parameter, by our name.
    """

    def __init__(self, network: nn.Module) -> None:
        self.names = {parameter: name for name, parameter in network.named_parameters()}
        self.ids: list[list[int]] = []
        self.rates: list[tuple[float, float]] = []
        self.groups: dict[str, tuple[float, float]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Add the coming step."""
        groups = [group for group in given["optimizer"].param_groups if group["params"]]
        rates = [float(group["lr"]) for group in groups]
        self.rates.append((min(rates), max(rates)))
        for group in groups:
            values = float(group["initial_lr"]), float(group["weight_decay"])
            self.groups |= {self.names[parameter]: values for parameter in group["params"]}

    def add_rows(self, rows: Sequence[Encoded]) -> None:
        """Add the ids of rows, with one mark for each image."""
        for row in rows:
            ids = list(row.input_ids)
            for start, stop in reversed(row.image_spans):
                ids[start:stop] = [IMAGE_MARK]
            self.ids.append(ids)


class Recording:
    """Objective that also records the loss of every row, which is one micro-batch here."""

    def __init__(self, objective: Objective, accumulation: int) -> None:
        self.objective = objective
        self.accumulation = accumulation
        self.losses: list[float] = []

    @property
    def denominators(self) -> tuple[str, ...]:
        """Return those of the objective."""
        return self.objective.denominators

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Return those of the objective."""
        return self.objective.metric_names

    def count(self, batch: FlatBatch) -> Tensor:
        """Return the counts of the objective."""
        return self.objective.count(batch)

    def __call__(self, model: Any, batch: FlatBatch, *, num_items: Tensor) -> ObjectiveOutput:
        """Return the output of the objective and record its loss."""
        output = self.objective(model, batch, num_items=num_items)
        self.losses.append(float(output.loss.detach()) * self.accumulation)
        return output


def runs(folder: Path) -> list[str]:
    """Return the recorded runs of a folder."""
    return sorted(json.loads((folder / LOG_FILE).read_text(encoding="utf-8")))


def replay(
    folder: Path,
    run: str,
    scratch: Path,
    *,
    loss_normalization: str = "micro_batches",
    shifts_images: bool = True,
    compat: str = SELF_QUESTIONING,
) -> Replay:
    """Return the replay of a recorded run.

    Args:
        folder: folder with `train_log.json` and the files it names.
        run: key of the log; its starting weights are `init/RUN.bin`.
        scratch: an empty folder for the files of the run.
        loss_normalization: `micro_batches` as the originals, or `tokens`, the default of this package.
        shifts_images: whether images of LLaVA-Med 1.0 move past text-only rows, as in its runs.
        compat: names of `--compat` for the runs of STLLaVA-Med.
    """
    log = json.loads((folder / LOG_FILE).read_text(encoding="utf-8"))[run]
    options = options_of(log["argv"])
    base, final = folder / options["model_name_or_path"], folder / options["output_dir"]
    init = folder / "init" / f"{run}.bin"
    options["loss_normalization"] = loss_normalization
    job = _Job(folder, scratch, options, log["order"], init, shifts_images)
    if options["version"] == ASKING:
        options["compat"] = compat
        text = system_text(log["first_input_ids"][0][0], base)
        (scratch / "system.txt").write_text(text, encoding="utf-8")
        options["system_file"] = str(scratch / "system.txt")
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
    log: TrainingLog


def _compared(ended: _Ended, recorded: list[float], final: Path) -> Replay:
    return Replay(
        ended.losses,
        recorded,
        differences(ended.trained, final),
        shares(ended.trained, final, ended.bounds),
        ended.bounds,
        ended.trained,
        ended.log,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """Inputs of a run: folders, options, row order, starting weights, and whether it is LLaVA-Med 1.0's, with its
    assignment of images."""

    folder: Path
    scratch: Path
    options: dict[str, str]
    order: list[int]
    init: Path
    shifts_images: bool = True
    med_1_0: bool = False


def _run(job: _Job) -> _Ended:
    """Train once and return the finished run."""
    parsed = parse_training_args(_command_line(job))
    set_seed(parsed.training.seed)
    args = parsed.training
    loaded = open_model(parsed.model_spec())
    if job.med_1_0:
        loaded = replace(loaded, processor=loaded.processor.changed(strip_around_images=True, placement="as_written"))
    load_projector(loaded.model, job.init)
    network, kind = freeze_and_adapt(loaded, parsed.parts_spec(), folder=args.run_folder)
    put(network, {name: tensor for name, tensor in read_tensors(job.init).items() if "lora_" in name})
    rows = args.per_device_train_batch_size * args.requested_accumulation
    bounds, log = WeightBounds(network, rows * args.model_max_length), TrainingLog(network)
    losses = _train(parsed, loaded, (network, kind), job, (bounds, log))
    trained = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad or "lora_" in name}
    return _Ended(losses, trained, bounds.bounds, log)


def options_of(argv: Sequence[str]) -> dict[str, str]:
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
    parsed: Parsed,
    loaded: LoadedModel,
    trained: tuple[nn.Module, Any],
    job: _Job,
    watching: tuple[WeightBounds, TrainingLog],
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
    random.seed(args.seed)  # drawn questions are those of the run, which starts from the same state
    watching[1].add_rows([dataset[row] for step in sampler.steps for row in step])
    if job.med_1_0 and job.shifts_images:
        collator = ShiftedImages.of(collator)
    recording = Recording(make_objective(loaded, args), args.requested_accumulation)
    trainer = make_trainer(parsed, loaded, trained, StepLoader(sampler, collator), collator, objective=recording)
    for callback in watching:
        trainer.add_callback(callback)
    random.seed(args.seed)
    trainer.train()
    return recording.losses


def system_text(ids: Sequence[int], language_model: Path) -> str:
    """Return the system prompt at the start of recorded ids, which distinguishes `v1_sq` from `v1`."""
    until_image = list(ids)[1 : list(ids).index(IMAGE_MARK)] if IMAGE_MARK in ids else list(ids)[1:]
    text = str(AutoTokenizer.from_pretrained(language_model).decode(until_image))
    return text.split(" USER:", 1)[0].strip()
