"""Supervised fine-tuning from the command line.

command line -> model and processor -> rows, checked -> loader -> trainer -> weights, metrics, curve
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from llava.constants import IMAGE_TOKEN
from llava.data.collator import Collator, RowData
from llava.data.dataset import SFTDataset, StreamDataset
from llava.data.flat_batch import Layout
from llava.data.loader import StepLoader, StreamLoader
from llava.generation.layout_check import choose_layout
from llava.model import lora
from llava.model.builder import LoadedModel
from llava.model.checkpoint.save import check_not_own_base
from llava.train import checkpointing, data, dry_run, precision
from llava.train.args import LlavaTrainingArguments, ModelArguments
from llava.train.callbacks import MetricsCallback, row_ids_file
from llava.train.checkpointing import Kind, hooks_for
from llava.train.model import open_model, whole_weights
from llava.train.objectives.base import Objective
from llava.train.objectives.sft import OBJECTIVES
from llava.train.parsing import Parsed, parse_training_args
from llava.train.ranks import lost_ranks_in_one_line
from llava.train.trainer import LlavaTrainer, TrainingCounts, Validate, WatchStep
from llava.train.validation import HeldOutAnswers, HeldOutLoss
from llava.utils import log
from llava.utils.jsonl import append_record

logger = logging.getLogger(__name__)


def run_sft(
    argv: Sequence[str] | None = None, *, image_grouping: str = "auto", bf16: bool | Literal["auto"] = "auto"
) -> None:
    """Train by supervised fine-tuning; entry point of every training command.

    Args:
        argv: command line; None for that of the process.
        image_grouping: default of `--image-grouping`.
        bf16: default of `--bf16`.

    Raises:
        LlavaError: arguments, data or checkpoints are unusable; nothing has been written in this case.
    """
    log.setup_logging()
    parsed = parse_training_args(argv, bf16=bf16)
    args = parsed.training
    set_seed(args.seed)
    with whole_weights(getattr(args, "hf_deepspeed_config", None)):  # set only with --deepspeed
        loaded = open_model(parsed.model_spec())
        network, kind = freeze_and_adapt(loaded, parsed.model, args)
        layout = layout_of(loaded, args)
    stream = parsed.stream_spec()
    dataset = data.open_training_data(parsed.training_rows(), loaded.processor, stream=stream)
    if isinstance(dataset, StreamDataset):  # it resumes from its saved position
        parsed = parsed._replace(training=args.changed(ignore_data_skip=True))
    data.prepare_images(dataset, loaded, parsed.image_spec())
    collator = replace(make_collator(dataset, loaded, layout, args), micro_batch=args.micro_batch)
    order, workers = args.order_spec(image_grouping), args.worker_spec()
    loader, grouping, drawn = data.make_loader(dataset, collator, order, workers, quarantine=stream.quarantine)
    facts = parsed.provenance_spec()
    provenance = checkpointing.run_provenance(facts, layout=layout, grouping=grouping, order=drawn, trains=kind)
    resume = checkpointing.checkpoint_to_resume(args.resume_spec(), provenance)
    if resume and isinstance(loader, StreamLoader):
        loader.restore(Path(resume))
    names = data.source_names(dataset)
    if args.dry_run:
        run_dry(parsed, loaded, (network, kind), loader, collator, source_names=names)
        return
    last_step = checkpointing.stopped_early(resume, args.early_stopping_patience)
    ending = parsed if last_step is None else parsed._replace(training=parsed.training.changed(max_steps=last_step))
    trainer = make_trainer(ending, loaded, (network, kind), loader, collator, source_names=names)
    report = lora.trainable_report(network)
    if args.should_save:
        logger.info("%s, layout %s, image grouping %s\n%s", drawn, layout, grouping, report)
        checkpointing.write_start(
            args.resume_spec(), facts, arguments=parsed.resolved(), provenance=provenance, report=report
        )
    if last_step is not None:
        logger.info("the run stopped early at step %d; nothing is left to train", last_step)
    train_and_save(trainer, args, resume)


def train_and_save(trainer: LlavaTrainer, args: LlavaTrainingArguments, resume: str | None) -> None:
    """Train from the start or from checkpoint `resume`, save the weights, and add their hash to the provenance."""
    with lost_ranks_in_one_line():
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        trainer.save_state()
    if args.should_save:
        checkpointing.write_end(args.run_folder)


def freeze_and_adapt(
    loaded: LoadedModel, model_args: ModelArguments, args: LlavaTrainingArguments
) -> tuple[nn.Module, Kind]:
    """Freeze what is not trained; return the network (a peft model with LoRA) and the trained part."""
    network: nn.Module = loaded.model
    if model_args.lora_enable or model_args.tune_mm_mlp_adapter:
        check_not_own_base(args.run_folder, loaded.origin)
    if model_args.lora_enable:
        network = lora.add_lora(
            loaded,
            r=model_args.lora_r,
            alpha=model_args.lora_alpha,
            dropout=model_args.lora_dropout,
            bias=model_args.lora_bias,
        )
    lora.freeze_for(
        network,
        projector_only=model_args.tune_mm_mlp_adapter,
        freeze_backbone=model_args.freeze_backbone,
        freeze_projector=model_args.freeze_mm_mlp_adapter,
        train_tower=model_args.unfreeze_mm_vision_tower,
        has_adapter=model_args.lora_enable,
    )
    markers = [token for token in loaded.processor.marker_ids if token is not None]
    if model_args.tune_mm_mlp_adapter and loaded.model.config.use_im_start_end:
        lora.train_marker_rows(network, markers)
    if args.gradient_checkpointing and not all(p.requires_grad for p in loaded.model.parameters()):
        cast(Any, loaded.model).enable_input_require_grads()
    cast(Any, loaded.model.config.text_config).use_cache = False
    if model_args.tune_mm_mlp_adapter:
        return network, "projector"
    return network, "adapter" if model_args.lora_enable else "model"


def layout_of(loaded: LoadedModel, args: LlavaTrainingArguments) -> Layout:
    """Return the first layout (tree, flat, padded) that this language model computes exactly."""
    found = choose_layout(loaded.model.config)
    return "flat" if found == "tree" and args.prefix_sharing == "off" else found


def make_collator(dataset: RowData, loaded: LoadedModel, layout: Layout, args: LlavaTrainingArguments) -> Collator:
    """Return the collator of a dataset for this model."""
    processor = loaded.processor
    return Collator(dataset, processor.image_token_id, processor.pad_token_id, layout, args.max_tokens_per_row)


def make_objective(loaded: LoadedModel, args: LlavaTrainingArguments, *, num_sources: int = 1) -> Objective:
    """Return the objective; with micro-batches it excludes the logit of our image placeholder."""
    # The vocabulary of the original trainers has no image placeholder.
    processor = loaded.processor
    is_ours = processor.tokenizer.get_vocab().get(IMAGE_TOKEN) == processor.image_token_id
    absent = processor.image_token_id if args.micro_batch and is_ours else None
    return OBJECTIVES["sft"](without=absent, num_sources=num_sources)


def make_trainer(
    parsed: Parsed,
    loaded: LoadedModel,
    trained: tuple[nn.Module, Kind],
    loader: StepLoader | StreamLoader,
    collator: Collator,
    *,
    source_names: Sequence[str] = (),
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
    callbacks: list[TrainerCallback] = [] if args.dry_run else [MetricsCallback(args.run_folder, counts, source_names)]
    if args.early_stopping_patience and not args.dry_run:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    return LlavaTrainer(
        network,
        args,
        loader=loader,
        collator=collator,
        objective=make_objective(loaded, args, num_sources=max(1, len(source_names))),
        rates=args.optimizer_spec(),
        hooks=hooks_for(
            kind,
            network,
            loaded,
            validate=make_validation(parsed, loaded, collator.layout),
            on_step=None if args.dry_run or not args.log_row_ids else log_of_rows(args),
        ),
        counts=counts,
        callbacks=callbacks,
    )


def log_of_rows(args: LlavaTrainingArguments) -> WatchStep:
    """Return a function that writes the row numbers of a step (`--log-row-ids`)."""
    path = row_ids_file(args.run_folder, args.process_index)
    return lambda step, number: append_record(path, {"step": number + 1, "rows": step.row_ids})


def make_validation(parsed: Parsed, loaded: LoadedModel, layout: Layout) -> Validate | None:
    """Return a function that computes the loss on all held-out rows and the scores of some answers.

    Without held-out rows it is None.
    """
    args, spec = parsed.training, parsed.held_out_rows()
    if spec is None:
        return None
    held_out = data.open_data(spec, loaded.processor)
    loss = HeldOutLoss(
        make_collator(held_out, loaded, layout, args),
        make_objective(loaded, args),
        batch_size=args.per_device_eval_batch_size,
        sharded=args.is_sharded,
        **args.ranks,
    )
    if args.is_sharded and args.eval_answers:
        logger.warning(
            "--eval-answers is ignored: weights are sharded over ranks, so validation computes the loss only"
        )
    if args.is_sharded or not args.eval_answers:
        return loss
    answers = HeldOutAnswers(
        held_out.samples,
        loaded.processor,
        image_folder=None if held_out.shares is not None else spec.image_folder,  # those of a mixture are full paths
        num_rows=args.eval_answers,
        layout=layout,
        max_length=args.model_max_length,
        **args.ranks,
    )
    return lambda model: {**loss(model), **answers(model)}


def run_dry(
    parsed: Parsed,
    loaded: LoadedModel,
    trained: tuple[nn.Module, Kind],
    loader: StepLoader | StreamLoader,
    collator: Collator,
    *,
    source_names: Sequence[str],
) -> None:
    """Run a dry run: print token and memory tables, take a few steps, print a time forecast."""
    dataset, args = collator.dataset, parsed.training
    assert isinstance(dataset, SFTDataset)  # a dry run rejects streams
    short = parsed._replace(training=args.changed(**dry_run.SHORTENED))
    trainer = make_trainer(short, loaded, trained, loader, collator, source_names=source_names)
    total_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(loader))
    logger.info("%s\n%s", dry_run.token_table(dataset), dry_run.memory_table(trained[0]))
    timer = dry_run.StepTimer()
    trainer.add_callback(timer)
    with torch.random.fork_rng():
        trainer.train()
    logger.info("%s", dry_run.time_forecast(timer, total_steps))
