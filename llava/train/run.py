"""Training from the command line: fine-tuning, and preference training on pairs.

command line -> model and processor -> rows, checked -> loader -> trainer -> weights, metrics, curve
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from llava.constants import IMAGE_TOKEN
from llava.data.collator import Collator, Complete, RowData
from llava.data.dataset import RowDataset
from llava.data.flat_batch import Layout
from llava.data.labeled import with_mismatched
from llava.data.loader import Loader
from llava.data.records import load_samples
from llava.errors import ConfigError
from llava.generation.layout_check import choose_layout
from llava.model.attention import use_library_attention
from llava.model.builder import LoadedModel
from llava.model.rope import shared_context
from llava.model.value_head import ValueModel
from llava.train import checkpointing, data, dry_run, precision, preference
from llava.train.args import LlavaTrainingArguments
from llava.train.attention_choice import TREE
from llava.train.callbacks import ChosenCallback, MetricsCallback, ScreenCallback, row_ids_file
from llava.train.checkpointing import Kind, hooks_for, with_value
from llava.train.counts import TrainingCounts
from llava.train.defaults import PUBLISHED, Defaults
from llava.train.model import open_model, whole_weights
from llava.train.notes import log_end, log_template
from llava.train.objectives.base import Objective
from llava.train.objectives.reward import PairwiseReward
from llava.train.objectives.sft import OBJECTIVES
from llava.train.parsed import Parsed
from llava.train.parsing import parse_training_args
from llava.train.parts import freeze_and_adapt
from llava.train.ranks import lost_ranks_in_one_line
from llava.train.reference_cache import ReferenceScorer
from llava.train.reward_model import with_rating
from llava.train.rollout.run import RunTools, run_rollouts
from llava.train.run_start import check_trusted, is_finished, num_steps, own_folder, with_new_model, write_start
from llava.train.signals import STOPPED, SaveOnSignal, StoppedBySignal
from llava.train.trainer import LlavaTrainer, Validate, WatchStep
from llava.train.validation import HeldOutAnswers, HeldOutLoss
from llava.utils import log
from llava.utils.files import Claim
from llava.utils.jsonl import append_record

logger = logging.getLogger(__name__)


def run_sft(
    argv: Sequence[str] | None = None,
    *,
    image_grouping: str = "auto",
    bf16: bool | Literal["auto"] = "auto",
    defaults: Defaults = PUBLISHED,
    given: Mapping[str, Any] | None = None,
) -> None:
    """Train with the objective of `--objective`, by default SFT; entry point of every training command.

    Args:
        argv: command line; None for that of the process.
        image_grouping: default of `--image-grouping`.
        bf16: default of `--bf16`.
        defaults: other defaults of the command.
        given: options of `llava train`, which `resolved.yaml` records.

    Raises:
        LlavaError: arguments, data or checkpoints are unusable, or another run writes into the output folder; nothing
            has been written in this case.
    """
    log.setup_logging()
    parsed = with_new_model(parse_training_args(argv, bf16=bf16, log_lines=defaults.log_lines), defaults)
    with own_folder(parsed.training) as claim:
        if (rollouts := parsed.rollout_spec()) is not None:
            run_rollouts(parsed, rollouts, RunTools(layout_of, make_collator, train_and_save), claim, given=given)
        else:
            run_parsed(parsed, image_grouping, claim, given=given)


def run_parsed(
    parsed: Parsed, image_grouping: str, claim: Claim | None = None, *, given: Mapping[str, Any] | None = None
) -> None:
    """Train as the arguments say; `image_grouping` is the default of `--image-grouping`."""
    args = parsed.training
    set_seed(args.seed)
    with whole_weights(getattr(args, "hf_deepspeed_config", None)):  # set only with --deepspeed
        loaded = open_model(parsed.model_spec())
        network, kind = freeze_and_adapt(loaded, parsed.parts_spec(), folder=args.run_folder)
        layout = layout_of(loaded, args)
    log_template(loaded.processor)
    pairs = parsed.preference.spec()
    if pairs is not None and pairs.disable_dropout:
        preference.disable_dropout(network)
    stream = parsed.stream_spec()
    dataset = with_rating(
        data.open_training_data(parsed.training_rows(), loaded.processor, stream=stream), parsed.rating_spec()
    )
    data.warn_without_images(dataset, network)
    dataset = data.prepare_images(dataset, loaded, parsed.image_spec())
    if parsed.preference.spec() is not None:
        epochs = num_epochs(args, len(dataset))
        dataset = with_reference(dataset, parsed, loaded, network, layout, epochs=epochs)
    collator = make_collator(dataset, loaded, layout, args)
    collator = replace(collator, micro_batch=args.micro_batch, complete=completed_units(parsed))
    order, workers = args.order_spec(image_grouping), args.worker_spec()
    loader, grouping, drawn = data.make_loader(dataset, collator, order, workers, quarantine=stream.quarantine)
    args = with_log_lines(args.changed(ignore_data_skip=args.ignore_data_skip or loader.resumes_itself), loader)
    parsed = parsed._replace(training=args)
    facts = parsed.provenance_spec()
    provenance = checkpointing.run_provenance(facts, layout=layout, grouping=grouping, order=drawn, trains=kind)
    resume = checkpointing.checkpoint_to_resume(args.resume_spec(), provenance)
    if resume and args.is_sharded:
        check_trusted(args, resume)
    if resume:
        loader.restore(Path(resume))
    names = data.source_names(dataset)
    if args.dry_run:
        run_dry(parsed, loaded, (network, kind), loader, collator, source_names=names)
        return
    if is_finished(args, provenance, total_steps=num_steps(args, loader)):
        return
    last_step = checkpointing.stopped_early(resume, args.early_stopping_patience)
    ending = parsed if last_step is None else parsed._replace(training=parsed.training.changed(max_steps=last_step))
    trainer = make_trainer(ending, loaded, (network, kind), loader, collator, source_names=names, claim=claim)
    if args.should_save:
        write_start(parsed, provenance, network, given)
    if last_step is not None:
        logger.info("the run stopped early at step %d; nothing is left to train", last_step)
    train_and_save(trainer, args, resume)


def with_log_lines(args: LlavaTrainingArguments, loader: Loader) -> LlavaTrainingArguments:
    """Return the arguments with the steps between two logs that give `--log-lines` logs."""
    return args.changed(logging_steps=max(1, num_steps(args, loader) // args.log_lines)) if args.log_lines else args


def train_and_save(trainer: LlavaTrainer, args: LlavaTrainingArguments, resume: str | None) -> None:
    """Train from the start or from checkpoint `resume`, save the weights, and record their hash.

    Raises:
        SystemExit: with status `STOPPED`, after SIGTERM with `--save-on-signal`.
    """
    with lost_ranks_in_one_line():
        try:
            trainer.train(resume_from_checkpoint=resume)
        except StoppedBySignal as stop:
            logger.warning("SIGTERM: checkpoint-%d is saved; rerun the same command to resume from it", stop.step)
            raise SystemExit(STOPPED) from None
        trainer.save_model()
        trainer.save_state()
    if args.should_save:
        checkpointing.write_end(args.run_folder)
        log_end(trainer)


def layout_of(loaded: LoadedModel, args: LlavaTrainingArguments) -> Layout:
    """Return the first layout (tree, flat, padded) that this language model computes exactly.

    Raises:
        ConfigError: the language model does not have the attention of `--attn-implementation`.
    """
    if args.attn_implementation != TREE:
        use_library_attention(loaded.model, args.attn_implementation)
        logger.info("attention %s: every sequence is a padded row of its own", args.attn_implementation)
        return "padded"
    found = choose_layout(loaded.model.config)
    return "flat" if found == "tree" and args.prefix_sharing == "off" else found


def make_collator(dataset: RowData, loaded: LoadedModel, layout: Layout, args: LlavaTrainingArguments) -> Collator:
    """Return the collator of a dataset for this model."""
    processor, context = loaded.processor, shared_context(loaded.model.config)
    return Collator(
        dataset,
        processor.image_token_id,
        processor.pad_token_id,
        layout,
        args.max_tokens_per_row,
        alone_above=None if context is None else context.length,
    )


def make_objective(
    loaded: LoadedModel, args: LlavaTrainingArguments, *, name: str = "sft", source_names: Sequence[str] = ()
) -> Objective:
    """Return the objective; with micro-batches it excludes the logit of our image placeholder."""
    # The vocabulary of the original trainers has no image placeholder.
    processor = loaded.processor
    is_ours = processor.tokenizer.get_vocab().get(IMAGE_TOKEN) == processor.image_token_id
    absent = processor.image_token_id if args.micro_batch and is_ours else None
    asks = processor.template.asked_header() is not None
    return OBJECTIVES.get(name, OBJECTIVES["sft"])(without=absent, source_names=source_names, asks=asks)


def completed_units(parsed: Parsed) -> Complete | None:
    """Return the function that adds to the units of a step what depends on the step, or None."""
    pairs = parsed.preference.spec()
    return with_mismatched if pairs is not None and pairs.is_kto else None


def num_epochs(args: LlavaTrainingArguments, num_rows: int) -> int:
    """Return the number of epochs that a run of rows begins."""
    steps = math.ceil(num_rows / args.global_batch)
    return max(1, math.ceil(args.max_steps / steps if args.max_steps > 0 else args.num_train_epochs))


def with_reference(
    dataset: Any, parsed: Parsed, loaded: LoadedModel, network: nn.Module, layout: Layout, *, epochs: int = 1
) -> Any:
    """Return pairs with their reference log-probabilities, if the objective reads them from the rows."""
    args, spec = parsed.training, parsed.preference.spec()
    if spec is None or spec.ref_mode != "cached":
        return dataset
    scorer = None
    if spec.ref_logprobs is None and not args.dry_run:
        scorer = ReferenceScorer.of(network, precision=parsed.provenance_spec().precision, device=args.device)
    collator = make_collator(dataset, loaded, layout, args)
    where: dict[str, Any] = {"folder": None if args.dry_run else args.run_folder, "scorer": scorer, **args.ranks}
    size = args.per_device_train_batch_size
    return preference.with_reference(dataset, spec, network, collator, **where, batch_size=size, epochs=epochs)


def choose_objective(
    parsed: Parsed, loaded: LoadedModel, network: nn.Module, *, source_names: Sequence[str] = ()
) -> Objective:
    """Return the objective of training that the arguments name."""
    pairs, rating = parsed.preference.spec(), parsed.rating_spec()
    if rating is not None:
        return PairwiseReward(centering=rating.centering)
    if pairs is None:
        chosen = parsed.preference.objective
        return make_objective(loaded, parsed.training, name=chosen, source_names=source_names)
    return preference.make_preference_loss(pairs, network, parsed.training.device)


def _writing_callbacks(
    parsed: Parsed, counts: TrainingCounts, objective: Objective, before_write: Callable[[], None] | None
) -> list[TrainerCallback]:
    """Return the callbacks that write metrics or decide when to stop; a dry run has none of them."""
    args = parsed.training
    if args.dry_run:
        return []
    # `ChosenCallback` is first, since the metrics clear the counts.
    callbacks: list[TrainerCallback] = [] if parsed.preference.spec() is None else [ChosenCallback(counts)]
    callbacks.append(MetricsCallback(args.run_folder, counts, objective.metric_names, before_write=before_write))
    if args.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    if args.save_on_signal:
        callbacks.append(SaveOnSignal())
    return callbacks


def make_trainer(
    parsed: Parsed,
    loaded: LoadedModel,
    trained: tuple[nn.Module, Kind],
    loader: Loader,
    collator: Collator,
    *,
    source_names: Sequence[str] = (),
    objective: Objective | None = None,
    claim: Claim | None = None,
) -> LlavaTrainer:
    """Return the trainer with its callbacks and, if requested, validation; a dry run writes no metrics."""
    args = parsed.training
    network, kind = trained
    # Here and not earlier: cached features and the calibrated projector need float32 weights.
    if precision.stores_frozen_in_bf16(bf16=args.bf16, device_type=args.device.type, sharded=args.is_sharded):
        num_cast = precision.hold_frozen_in_bf16(network, kind)
        logger.info(
            "%.1f million frozen weights are stored in bf16; trained and saved weights stay float32", num_cast / 1e6
        )
    counts = TrainingCounts()
    objective = objective or choose_objective(parsed, loaded, network, source_names=source_names)
    before_write = None if claim is None else claim.check
    rewarding = None if parsed.rating_spec() is None else ValueModel(network)
    hooks = hooks_for(
        kind,
        network,
        loaded,
        validate=make_validation(parsed, loaded, network, objective, collator.layout),
        on_step=None if args.dry_run or not args.log_row_ids else log_of_rows(args),
        before_write=before_write,
        may_load=lambda checkpoint: check_trusted(args, checkpoint),
    )
    return LlavaTrainer(
        network if rewarding is None else rewarding,
        args,
        loader=loader,
        collator=collator,
        objective=objective,
        rates=args.optimizer_spec(),
        hooks=hooks if rewarding is None else with_value(hooks, rewarding.head_state()),
        counts=counts,
        callbacks=[*_writing_callbacks(parsed, counts, objective, before_write), ScreenCallback()],
    )


def log_of_rows(args: LlavaTrainingArguments) -> WatchStep:
    """Return a function that writes the row numbers of a step (`--log-row-ids`)."""
    path = row_ids_file(args.run_folder, args.process_index)
    return lambda step, number: append_record(path, {"step": number + 1, "rows": step.row_ids})


def make_validation(
    parsed: Parsed, loaded: LoadedModel, network: nn.Module, objective: Objective, layout: Layout
) -> Validate | None:
    """Return a function that computes the loss on all held-out rows and the scores of some answers.

    Without held-out rows it is None. Held-out pairs give the loss and the metrics of `objective`.
    """
    args, spec = parsed.training, parsed.held_out_rows()
    watched = watched_questions(parsed, loaded, layout)
    if spec is None:
        return watched
    held_out = with_rating(data.open_rows(spec, loaded.processor), parsed.rating_spec())
    held_out = with_reference(held_out, parsed, loaded, network, layout)
    loss = HeldOutLoss(
        replace(make_collator(held_out, loaded, layout, args), complete=completed_units(parsed)),
        objective if spec.pairs else make_objective(loaded, args, name=parsed.preference.objective),
        batch_size=args.per_device_eval_batch_size,
        sharded=args.is_sharded,
        **args.ranks,
    )
    if args.is_sharded and args.eval_answers:
        logger.warning(
            "--eval-answers is ignored: weights are sharded over ranks, so validation computes the loss only"
        )
    if args.is_sharded or not args.eval_answers or spec.pairs:
        return loss if watched is None else lambda model: {**loss(model), **watched(model)}
    ranks: dict[str, Any] = args.ranks
    answers = HeldOutAnswers(
        held_out.samples,
        loaded.processor,
        # Image names of a mixture are full paths.
        image_folder=None if held_out.shares is not None else spec.image_folder,
        num_rows=args.eval_answers,
        layout=layout,
        max_length=args.model_max_length,
        page_folder=args.run_folder,
        **ranks,
    )
    parts: list[Validate] = [loss, answers] if watched is None else [loss, answers, watched]
    return lambda model: {name: value for part in parts for name, value in part(model).items()}


def watched_questions(parsed: Parsed, loaded: LoadedModel, layout: Layout) -> Validate | None:
    """Return a function that answers and scores the questions of `--eval-vqa-path`, or None.

    Raises:
        ConfigError: the weights are sharded over ranks, or `--eval-answers` is 0.
    """
    args, path = parsed.training, parsed.data.eval_vqa_path
    if path is None:
        return None
    if args.is_sharded or not args.eval_answers:
        why = "--eval-answers is 0" if not args.is_sharded else "weights are sharded over ranks"
        raise ConfigError(f"--eval-vqa-path {path}: no question can be answered, since {why}; omit it")
    folder = parsed.data.eval_image_folder or parsed.data.image_folder
    samples = load_samples(path, image_folder=folder)
    settings: dict[str, Any] = {"image_folder": folder, "num_rows": args.eval_answers, "layout": layout, **args.ranks}
    length = args.model_max_length
    return HeldOutAnswers(samples, loaded.processor, **settings, max_length=length, watches_length=True)


def run_dry(
    parsed: Parsed,
    loaded: LoadedModel,
    trained: tuple[nn.Module, Kind],
    loader: Loader,
    collator: Collator,
    *,
    source_names: Sequence[str],
) -> None:
    """Run a dry run: print token and memory tables, take a few steps, print a time forecast."""
    dataset, args = collator.dataset, parsed.training
    assert isinstance(dataset, RowDataset)  # a dry run rejects streams
    short = parsed._replace(training=args.changed(**dry_run.SHORTENED))
    trainer = make_trainer(short, loaded, trained, loader, collator, source_names=source_names)
    total_steps = num_steps(args, loader)
    logger.info("%s\n%s", dry_run.token_table(dataset), dry_run.memory_table(trained[0]))
    timer = dry_run.StepTimer()
    trainer.add_callback(timer)
    with torch.random.fork_rng():
        trainer.train()
    logger.info("%s", dry_run.time_forecast(timer, total_steps))
