"""Supervised fine-tuning from the command line.

command line -> model and processor -> rows, checked -> loader -> trainer -> weights, metrics, curve
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from llava.constants import IMAGE_TOKEN
from llava.data.collator import Collator, RowData
from llava.data.dataset import SFTDataset
from llava.data.flat_batch import Layout
from llava.data.loader import StepLoader, StreamLoader
from llava.generation.layout_check import choose_layout
from llava.model import lora
from llava.model.builder import LoadedModel
from llava.model.checkpoint.save import check_not_own_base
from llava.train import checkpointing, data, dry_run, precision
from llava.train.args import DataArguments, LlavaTrainingArguments, ModelArguments, Parsed
from llava.train.callbacks import MetricsCallback, row_ids_file
from llava.train.checkpointing import Kind, hooks_for
from llava.train.model import open_model, whole_weights
from llava.train.objectives.base import Objective
from llava.train.objectives.sft import OBJECTIVES
from llava.train.parsing import parse_training_args
from llava.train.ranks import lost_ranks_in_one_line
from llava.train.trainer import LlavaTrainer
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
    model_args, data_args, args = parsed
    set_seed(args.seed)
    with whole_weights(args):
        loaded = open_model(model_args, data_args, args)
        network, kind = freeze_and_adapt(loaded, model_args, args)
        layout = layout_of(loaded, args)
    dataset = data.open_training_data(data_args, args, loaded)
    data.prepare_images(dataset, loaded, model_args, data_args, args)
    collator = replace(make_collator(dataset, loaded, layout, args), micro_batch=args.micro_batch)
    loader, grouping, drawn = data.make_loader(
        dataset, collator, args, skip_bad=data_args.skip_bad, grouping=image_grouping
    )
    provenance = checkpointing.run_provenance(parsed, layout, grouping, drawn, kind)
    resume = checkpointing.checkpoint_to_resume(parsed, provenance)
    if resume and isinstance(loader, StreamLoader):
        loader.restore(Path(resume))
    trainer = make_trainer(parsed, loaded, (network, kind), loader, collator, source_names=data.source_names(dataset))
    if args.dry_run:
        assert isinstance(dataset, SFTDataset)  # a dry run rejects streams
        run_dry(trainer, dataset, args, steps_per_epoch=len(loader))
        return
    report = lora.trainable_report(network)
    if args.should_save:
        logger.info("%s, layout %s, image grouping %s\n%s", drawn, layout, grouping, report)
        checkpointing.write_start(parsed, provenance, report)
    if (step := checkpointing.stopped_early(resume, args.early_stopping_patience)) is not None:
        logger.info("the run stopped early at step %d; nothing is left to train", step)
        args.max_steps = step
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
    """Return the trainer with its callbacks and, if requested, validation."""
    _, data_args, args = parsed
    network, kind = trained
    if precision.stores_frozen_in_bf16(args):  # now: cached features and the calibrated projector need float32 weights
        num_cast = precision.hold_frozen_in_bf16(network, kind)
        logger.info(
            "%.1f million frozen weights are stored in bf16; trained and saved weights stay float32", num_cast / 1e6
        )
    hooks = hooks_for(kind, network, loaded)
    if data_args.eval_data_path:
        hooks.validate = make_validation(data_args.eval_data_path, data_args, args, loaded, collator.layout)
    if args.log_row_ids:
        ids = row_ids_file(args.run_folder, args.process_index)
        hooks.on_step = lambda step, number: append_record(ids, {"step": number + 1, "rows": step.row_ids})
    metrics = MetricsCallback(args.run_folder)
    callbacks: list[TrainerCallback] = [metrics]
    if args.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
        args.restore_callback_states_from_checkpoint = True  # keeps its counter over a resume
    trainer = LlavaTrainer(
        network,
        args,
        loader=loader,
        collator=collator,
        objective=make_objective(loaded, args, num_sources=max(1, len(source_names))),
        hooks=hooks,
        source_names=source_names,
        callbacks=callbacks,
    )
    metrics.trainer = trainer
    return trainer


def make_validation(
    path: str, data_args: DataArguments, args: LlavaTrainingArguments, loaded: LoadedModel, layout: Layout
) -> Callable[[nn.Module], dict[str, float]]:
    """Return a function that computes the loss on all held-out rows and the scores of some answers."""
    folder = data_args.eval_image_folder or data_args.image_folder
    held_out = data.open_data(path, folder, data_args, args, loaded)
    ranks = {"rank": args.process_index, "world_size": args.world_size}
    is_sharded = bool(args.deepspeed or args.fsdp)
    folder = None if held_out.shares is not None else folder  # the image names of a mixture are full paths
    loss = HeldOutLoss(
        make_collator(held_out, loaded, layout, args),
        make_objective(loaded, args),
        batch_size=args.per_device_eval_batch_size,
        sharded=is_sharded,
        **ranks,
    )
    if is_sharded and args.eval_answers:
        logger.warning(
            "--eval-answers is ignored: weights are sharded over ranks, so validation computes the loss only"
        )
    if is_sharded or not args.eval_answers:
        return loss
    answers = HeldOutAnswers(
        held_out.samples,
        loaded.processor,
        image_folder=folder,
        num_rows=args.eval_answers,
        layout=layout,
        max_length=args.model_max_length,
        **ranks,
    )
    return lambda model: {**loss(model), **answers(model)}


def run_dry(trainer: LlavaTrainer, dataset: SFTDataset, args: LlavaTrainingArguments, *, steps_per_epoch: int) -> None:
    """Run a dry run: print token and memory tables, take a few steps, print a time forecast."""
    total_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    assert trainer.model is not None
    logger.info("%s\n%s", dry_run.token_table(dataset), dry_run.memory_table(trainer.model))
    timer = dry_run.StepTimer()
    trainer.remove_callback(MetricsCallback)
    trainer.hooks.on_step = None
    trainer.add_callback(timer)
    dry_run.shorten_run(args)
    with torch.random.fork_rng():
        trainer.train()
    logger.info("%s", dry_run.time_forecast(timer, total_steps))
