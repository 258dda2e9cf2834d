"""The readable story of a training run.

command line -> model and processor -> rows, checked -> loader -> trainer -> weights, metrics, curve
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from llava.constants import IMAGE_TOKEN
from llava.data import feature_cache
from llava.data.flat_batch import Layout
from llava.data.image_store import ImageIndex
from llava.data.quarantine import Quarantine
from llava.data.records import load_samples
from llava.data.sft import SFTDataset
from llava.data.trainable import check_trainable
from llava.errors import ConfigError
from llava.generation.layout_check import choose_layout
from llava.image_grids import KEEP
from llava.model import lora
from llava.model.building import Loaded
from llava.model.calibration import calibrate
from llava.model.checkpoint import refuse_own_base
from llava.train import dry_run, order, run_folder
from llava.train.args import DataArguments, LlavaTrainingArguments, ModelArguments
from llava.train.callbacks import MetricsCallback, row_ids_file
from llava.train.evaluation import HeldOutLoss
from llava.train.held_out_answers import HeldOutAnswers
from llava.train.loader import Collator, StepLoader
from llava.train.objectives import OBJECTIVES, Objective
from llava.train.opening import open_model, whole_weights
from llava.train.parsing import Parsed, parse
from llava.train.saving import Kind, hooks_for
from llava.train.trainer import LlavaTrainer
from llava.utils import log
from llava.utils.jsonl import append

logger = logging.getLogger(__name__)

NUM_CALIBRATION_PICTURES = 64
QUARANTINE_FILES = ("quarantine.jsonl", "quarantine-eval.jsonl")
"""Where rows that were left out are listed: those of the training data, those held out."""


def run_sft(argv: Sequence[str] | None = None, *, image_grouping: str = "auto") -> None:
    """Train by supervised fine-tuning; every training command ends here.

    Args:
        argv: command line; that of the process when None.
        image_grouping: what an absent `--image_grouping` means.

    Raises:
        LlavaError: arguments, data or checkpoints cannot be used; nothing has been written then.
    """
    log.setup()
    parsed = parse(argv)
    model_args, data_args, args = parsed
    set_seed(args.seed)
    with whole_weights(args):
        loaded = open_model(model_args, data_args, args)
        network, kind = prepare(loaded, model_args, args)
        layout = layout_of(loaded, args)
    dataset = open_data(data_args.data_path, data_args.image_folder, data_args, args, loaded)
    if model_args.calibrate_mm_projector:
        calibrate_projector(dataset, loaded, args)
    use_cache_of_features(dataset, loaded, model_args, data_args)
    sampler, grouping = order.make_sampler(dataset, args, image_grouping)
    collator = replace(make_collator(dataset, loaded, layout, args), micro_batch=args.micro_batch)
    provenance = run_folder.describe(parsed, layout, grouping, order.describe(sampler), kind)
    resume = run_folder.checkpoint_to_resume(parsed, provenance)
    loader = StepLoader(sampler, collator, num_workers=args.dataloader_num_workers, seed=args.seed)
    trainer = make_trainer(parsed, loaded, (network, kind), loader, collator)
    if args.dry_run:
        rehearse(trainer, dataset, args, steps_per_epoch=len(sampler))
        return
    report = lora.trainable_report(network)
    if args.should_save:
        logger.info("%s rows, layout %s, image grouping %s\n%s", len(dataset), layout, grouping, report)
        run_folder.write_start(parsed, provenance, report)
    if (step := run_folder.stopped_early(resume, args.early_stopping_patience)) is not None:
        logger.info("the run had stopped early at step %d; nothing is left to train", step)
        args.max_steps = step
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    if args.should_save:
        run_folder.write_end(args.run_folder)


def prepare(loaded: Loaded, model_args: ModelArguments, args: LlavaTrainingArguments) -> tuple[nn.Module, Kind]:
    """Decide what trains; returns the network (a peft model with LoRA) and how it is saved."""
    network: nn.Module = loaded.model
    if model_args.lora_enable or model_args.tune_mm_mlp_adapter:
        refuse_own_base(args.run_folder, loaded.origin)
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


def layout_of(loaded: Loaded, args: LlavaTrainingArguments) -> Layout:
    """Tree, flat or padded: the first that this kind of language model computes exactly."""
    found = choose_layout(loaded.model.config)
    return "flat" if found == "tree" and args.prefix_sharing == "off" else found


def open_data(
    path: str, image_folder: str | None, data_args: DataArguments, args: LlavaTrainingArguments, loaded: Loaded
) -> SFTDataset:
    """Load rows and make sure, before anything is trained, that each can be."""
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; expected rows in LLaVA format")
    writes = args.should_save and data_args.skip_bad and not args.dry_run
    quarantine = Quarantine(args.run_folder / QUARANTINE_FILES[path == data_args.eval_data_path] if writes else None)
    index = ImageIndex.open(image_folder, dicom=loaded.processor.dicom)
    samples = load_samples(path, skip_bad=data_args.skip_bad, quarantine=quarantine)
    limit = args.model_max_length
    loaded.processor.image_counts_as_one = data_args.image_counts_as_one
    checked = check_trainable(
        samples,
        image_folder,
        loaded.processor,
        max_length=limit,
        skip_bad=data_args.skip_bad,
        quarantine=quarantine,
        index=index,
    )
    return SFTDataset(checked.samples, loaded.processor, image_folder=image_folder, max_length=limit, index=index)


def calibrate_projector(dataset: SFTDataset, loaded: Loaded, args: LlavaTrainingArguments) -> None:
    """Draw the projector anew, fitted to the first pictures of the data.

    Raises:
        ConfigError: no row has a picture.
    """
    keys = dataset.image_keys(NUM_CALIBRATION_PICTURES)
    if not keys:
        raise ConfigError("--calibrate_mm_projector needs pictures, and no row has one")
    if loaded.processor.image_mode == KEEP:
        raise ConfigError("--calibrate_mm_projector needs pictures of one size; not with --image_aspect_ratio keep")
    pictures = [dataset.pixels(key) for key in keys]  # one picture each, or its tiles
    pixels = torch.cat([picture if picture.dim() == 4 else picture[None] for picture in pictures])
    calibrate(loaded.model, pixels, seed=args.seed)


def use_cache_of_features(
    dataset: SFTDataset, loaded: Loaded, model_args: ModelArguments, data_args: DataArguments
) -> None:
    """Compute the features of a frozen tower once, in the folder that was named, if they fit."""
    folder = data_args.feature_cache_dir
    if folder is None or data_args.feature_cache_gb <= 0:
        return
    if loaded.processor.has_variable_images:
        mode = loaded.processor.image_mode
        raise ConfigError(f"--feature_cache_dir keeps features of one size; not with --image_aspect_ratio {mode}")
    if model_args.unfreeze_mm_vision_tower:
        raise ConfigError("--feature_cache_dir keeps features of a frozen tower; not with --unfreeze_mm_vision_tower")
    config = loaded.model.config
    settings = {"layer": config.vision_feature_layer, "select": config.vision_feature_select_strategy}
    cache = feature_cache.build(
        folder,
        dataset.image_keys(),
        tower=feature_cache.weights_hash(loaded.model.model.vision_tower.state_dict(), settings),
        pixels=dataset.pixels,
        features=loaded.model.tower_features,
        limit_gb=data_args.feature_cache_gb,
    )
    dataset.use_features(cache)


def make_collator(dataset: SFTDataset, loaded: Loaded, layout: Layout, args: LlavaTrainingArguments) -> Collator:
    """The collator of a data set for this model."""
    processor = loaded.processor
    return Collator(dataset, processor.image_token_id, processor.pad_token_id, layout, args.max_tokens_per_row)


def make_objective(loaded: Loaded, args: LlavaTrainingArguments) -> Objective:
    """What is minimised; as published, a place holder that is no word of the published vocabulary takes no part."""
    processor = loaded.processor
    is_ours = processor.tokenizer.get_vocab().get(IMAGE_TOKEN) == processor.image_token_id
    return OBJECTIVES["sft"](without=processor.image_token_id if args.micro_batch and is_ours else None)


def make_trainer(
    parsed: Parsed, loaded: Loaded, trained: tuple[nn.Module, Kind], loader: StepLoader, collator: Collator
) -> LlavaTrainer:
    """The trainer with its callbacks and, where asked for, validation."""
    _, data_args, args = parsed
    network, kind = trained
    hooks = hooks_for(kind, network, loaded)
    if data_args.eval_data_path:
        hooks.validate = make_validation(data_args.eval_data_path, data_args, args, loaded, collator.layout)
    if args.log_row_ids:
        ids = row_ids_file(args.run_folder, args.process_index)
        hooks.on_step = lambda step, number: append(ids, {"step": number + 1, "rows": step.row_ids})
    metrics = MetricsCallback(args.run_folder)
    callbacks: list[TrainerCallback] = [metrics]
    if args.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
        args.restore_callback_states_from_checkpoint = True  # how long it has waited survives a resume
    trainer = LlavaTrainer(
        network,
        args,
        loader=loader,
        collator=collator,
        objective=make_objective(loaded, args),
        hooks=hooks,
        callbacks=callbacks,
    )
    metrics.trainer = trainer
    return trainer


def make_validation(
    path: str, data_args: DataArguments, args: LlavaTrainingArguments, loaded: Loaded, layout: Layout
) -> Callable[[nn.Module], dict[str, float]]:
    """Loss on all held-out rows, and scores of answers to some of them."""
    folder = data_args.eval_image_folder or data_args.image_folder
    held_out = open_data(path, folder, data_args, args, loaded)
    ranks = {"rank": args.process_index, "world_size": args.world_size}
    is_sharded = bool(args.deepspeed or args.fsdp)
    loss = HeldOutLoss(
        make_collator(held_out, loaded, layout, args),
        make_objective(loaded, args),
        batch_size=args.per_device_eval_batch_size,
        sharded=is_sharded,
        **ranks,
    )
    if is_sharded and args.eval_answers:
        logger.warning(
            "held-out questions are not answered while weights are sharded over ranks; only their loss counts"
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


def rehearse(trainer: LlavaTrainer, dataset: SFTDataset, args: LlavaTrainingArguments, *, steps_per_epoch: int) -> None:
    """The dry run: tables, a few real steps, a forecast."""
    asked = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    assert trainer.model is not None
    logger.info("%s\n%s", dry_run.token_table(dataset), dry_run.memory_table(trainer.model))
    timer = dry_run.StepTimer()
    trainer.remove_callback(MetricsCallback)
    trainer.hooks.on_step = None
    trainer.add_callback(timer)
    dry_run.shorten(args)
    with torch.random.fork_rng():
        trainer.train()
    logger.info("%s", dry_run.forecast(timer, asked))
