"""Reinforcement learning from the command line.

command line -> model -> cases -> rollouts, as the trainer asks for updates -> weights, rollouts.jsonl, metrics, curves
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import TrainerCallback, set_seed

from llava.data.collator import Collator, RowData, StepBatch
from llava.data.flat_batch import Layout
from llava.errors import ConfigError
from llava.generation.engine import LocalEngine
from llava.generation.kv_buffers import context_length
from llava.generation.remote import RemoteEngine
from llava.imaging.decode import resolve_image_path
from llava.model.builder import LoadedModel
from llava.model.value_head import ActorCritic, shared_copy
from llava.processing import LlavaMedProcessor
from llava.symbolic.rubric import Priors, check_priors, count_values
from llava.symbolic.rules import load_rules
from llava.symbolic.structure import RuleSet
from llava.train import checkpointing, precision, preference
from llava.train.args import LlavaTrainingArguments
from llava.train.callbacks import MetricsCallback, ScreenCallback
from llava.train.checkpointing import Kind, hooks_for, with_value
from llava.train.counts import TrainingCounts
from llava.train.model import open_model, whole_weights
from llava.train.objectives.policy import PolicyLoss, PolicyLossSpec
from llava.train.parsed import Parsed
from llava.train.parts import freeze_and_adapt
from llava.train.rollout.cases import RolloutCase, read_cases
from llava.train.rollout.episodes import Scoring
from llava.train.rollout.files import ROLLOUTS_FILE
from llava.train.rollout.loader import CaseOrder, RolloutDataset, RolloutLoader, checked_lengths
from llava.train.rollout.records import NAMES, RolloutCallback, RolloutWriter, keep_rollouts
from llava.train.rollout.rollout import Converse, Roller
from llava.train.rollout.scoring import RolloutScorer
from llava.train.rollout.value import make_critic
from llava.train.rollout_args import RolloutSpec
from llava.train.run_start import check_trusted, is_finished, write_start
from llava.train.signals import SaveOnSignal
from llava.train.specs import PartsSpec
from llava.train.trainer import LlavaTrainer
from llava.utils.files import Claim
from llava.utils.jsonl import read_object, write_json

logger = logging.getLogger(__name__)

PRIORS_FILE = "priors.json"


@dataclass(frozen=True, slots=True)
class _Networks:
    """Networks of a run; see `RolloutScorer`."""

    loaded: LoadedModel
    policy: nn.Module
    kind: Kind
    reference: nn.Module | None
    adapter_off: bool
    critic: ActorCritic | None


class RunTools(NamedTuple):
    """Functions that every kind of training uses; see `llava.train.run`."""

    layout_of: Callable[[LoadedModel, LlavaTrainingArguments], Layout]
    make_collator: Callable[[RowData, LoadedModel, Layout, LlavaTrainingArguments], Collator]
    train_and_save: Callable[[LlavaTrainer, LlavaTrainingArguments, str | None], None]


def run_rollouts(
    parsed: Parsed,
    spec: RolloutSpec,
    tools: RunTools,
    claim: Claim | None = None,
    *,
    given: Mapping[str, Any] | None = None,
) -> None:
    """Train by reinforcement learning as the arguments say.

    Raises:
        LlavaError: arguments, rules, data or checkpoints are unusable; nothing has been written in this case.
    """
    check_setting(parsed)
    rules = load_rules(spec.rules)
    if len(rules.nodes) < 2:
        raise ConfigError(f"--rules {spec.rules}: one node; expected at least two, whose answers must fit each other")
    cases: Sequence[RolloutCase] = read_cases(parsed.data.data_path, rules, splits=spec.splits)
    set_seed(parsed.training.seed)
    with whole_weights(getattr(parsed.training, "hf_deepspeed_config", None)):  # set only with --deepspeed
        networks = open_networks(parsed, spec)
    folder = parsed.data.image_folder
    dataset = RolloutDataset(cases, rules, networks.loaded.processor, image_folder=folder)
    cases = checked_lengths(dataset, spec, context=context_length(networks.policy))
    args = with_rollout_steps(parsed.training, spec, num_cases=len(cases))  # epochs count the cases that are left
    layout = tools.layout_of(networks.loaded, args)
    collator = tools.make_collator(dataset, networks.loaded, layout, args)
    counts, priors = TrainingCounts(), priors_of(spec, rules, cases)
    scorer = make_scorer(networks, collator, spec, args)
    converse = conversing(networks, spec, args, layout, model=str(parsed.model.model_name_or_path))
    find_image = partial(resolve_image_path, root=folder)
    roller = Roller(spec, Scoring(rules, spec, priors), scorer, converse, find_image, seed=args.seed, **args.ranks)
    writer = RolloutWriter(args.run_folder, counts, rank=int(args.process_index), slots=spec.slots)
    order = CaseOrder(cases, args.seed)
    loader = RolloutLoader(roller.rollout, order, collator, spec, seed=args.seed, on_rollout=writer, **args.ranks)
    text = f"{spec.algorithm}, {len(cases)} cases, {spec.prompts} prompts x {spec.group_size} in a rollout"
    facts = parsed.provenance_spec()
    provenance = checkpointing.run_provenance(facts, layout=layout, grouping="off", order=text, trains=networks.kind)
    resume = checkpointing.checkpoint_to_resume(args.resume_spec(), provenance)
    if resume and args.is_sharded:
        check_trusted(args, resume)
    if resume:
        loader.restore(Path(resume))
    if is_finished(args, provenance, total_steps=args.max_steps):
        return
    trainer = make_trainer(networks, spec, loader, collator, counts=counts, args=args, rules=rules, claim=claim)
    if args.should_save:
        write_start(parsed, provenance, cast(nn.Module, trainer.model), given)
        if priors is not None:
            write_json(args.run_folder / PRIORS_FILE, priors)
        keep_rollouts(args.run_folder / ROLLOUTS_FILE, loader.position.rollout)
    tools.train_and_save(trainer, args, resume)


def check_setting(parsed: Parsed) -> None:
    """Check that the other options fit reinforcement learning.

    Raises:
        ConfigError: one does not.
    """
    args, model = parsed.training, parsed.model
    config = getattr(args, "hf_deepspeed_config", None)
    refused = {
        "--fsdp": bool(args.fsdp),
        "--deepspeed with ZeRO stage 3": config is not None and config.is_zero3(),
    }
    for name, is_given in refused.items():
        if is_given:
            raise ConfigError(
                f"{name}: answers are sampled by a whole model in each process, but the weights are sharded; use "
                "--deepspeed with stage 2 or less, or LoRA without it"
            )
    unfit = {
        "--tune-mm-mlp-adapter": model.tune_mm_mlp_adapter,
        "--unfreeze-mm-vision-tower": model.unfreeze_mm_vision_tower,
        "--eval-data-path (use `llava eval --rules` after training)": parsed.data.eval_data_path is not None,
        "--feature-cache-dir": parsed.data.feature_cache_dir is not None,
        "--dry-run": args.dry_run,
        "--loss-normalization micro_batches": args.micro_batch is not None,
    }
    if found := [name for name, is_given in unfit.items() if is_given]:
        raise ConfigError(f"reinforcement learning does not use {', '.join(found)}; omit it")


def with_rollout_steps(args: LlavaTrainingArguments, spec: RolloutSpec, *, num_cases: int) -> LlavaTrainingArguments:
    """Return the arguments with optimizer steps where the user counted rollouts: steps, saves and logs."""
    rollouts = args.max_steps if args.max_steps > 0 else math.ceil(num_cases * args.num_train_epochs / spec.prompts)
    if args.log_lines:  # a rollout takes long enough to log each one
        args = args.changed(logging_steps=1)
    counted = {name: getattr(args, name) for name in ("save_steps", "logging_steps")}
    steps = {name: value * spec.updates if value >= 1 else value for name, value in counted.items()}
    return args.changed(max_steps=rollouts * spec.updates, ignore_data_skip=True, **steps)


def open_networks(parsed: Parsed, spec: RolloutSpec) -> _Networks:
    """Load the policy; freeze and adapt it; add reference and value model.

    Raises:
        ConfigError: the reference is the policy without an adapter that is not all that trains.
    """
    args = parsed.training
    loaded = open_model(parsed.model_spec())
    parts = parsed.parts_spec()
    parts = replace(parts, freeze_projector=spec.ref_mode != "copy" or parts.freeze_projector)
    policy, kind = freeze_and_adapt(loaded, parts, folder=args.run_folder)
    preference.disable_dropout(policy)
    if precision.stores_frozen_in_bf16(bf16=args.bf16, device_type=args.device.type, sharded=args.is_sharded):
        precision.hold_frozen_in_bf16(policy, kind)
    reference, text = _reference(policy, spec, is_adapter=_is_adapter_only(parts))
    if reference is not None:
        reference.to(args.device).requires_grad_(False).eval()
    logger.info("reference: %s; the projector is %s", text, "frozen" if parts.freeze_projector else "trained")
    critic = make_critic(policy, spec, parts) if spec.algorithm == "ppo" else None
    return _Networks(loaded, policy, kind, reference, text == ADAPTER_OFF, critic)


def _is_adapter_only(parts: PartsSpec) -> bool:
    """Return whether only new adapters train, so that the policy without them is the initial policy."""
    own, tower = parts.lora, parts.tower_lora
    language = parts.freeze_backbone if own is None else own["bias"] == "none"
    is_random = own is not None and own["options"]["init_lora_weights"] is False
    is_new = not (is_random or (tower is not None and tower.weights is not None))
    return language and is_new and parts.freeze_projector and not parts.train_tower


ADAPTER_OFF = "the policy without its adapter"


def _reference(policy: nn.Module, spec: RolloutSpec, *, is_adapter: bool) -> tuple[nn.Module | None, str]:
    """Return the frozen reference, if it needs weights of its own, and what it is."""
    if spec.ref_mode == "none" or (spec.ref_mode == "cached" and not is_adapter and not spec.kl_coef):
        if spec.kl_coef:
            raise ConfigError(f"--ref-mode none: --kl-coef {spec.kl_coef} needs a reference; expected cached or copy")
        return None, "none"
    if spec.ref_mode != "copy" and is_adapter:
        return None, ADAPTER_OFF
    if spec.ref_mode == "adapter_off":
        raise ConfigError(
            "--ref-mode adapter_off needs --lora-enable True, --lora-bias none and a new adapter (no --pretrain-lora, "
            "no --init-lora-weights false); or use --ref-mode copy"
        )
    return shared_copy(policy), "a frozen copy of the policy as it starts"


def priors_of(spec: RolloutSpec, rules: RuleSet, cases: Sequence[RolloutCase]) -> Priors | None:
    """Return the counts that balance rare values: of a file, or of the training data.

    Raises:
        DataError: the file is unusable.
    """
    if spec.priors == "none":
        return None
    if spec.priors is not None:
        return check_priors(rules, read_object(spec.priors))
    whole = [case.truth for case in cases if len(case.truth) == len(rules.nodes)]
    return cast(Priors, count_values(rules, whole)) if whole else None


def autocast_of(args: LlavaTrainingArguments) -> Callable[[], AbstractContextManager[Any]]:
    """Return the context in which updates compute, for rollouts and scores."""
    if not args.bf16:
        return nullcontext
    return lambda: torch.autocast(args.device.type, dtype=torch.bfloat16)


def make_scorer(
    networks: _Networks, collator: Collator, spec: RolloutSpec, args: LlavaTrainingArguments
) -> RolloutScorer:
    """Return what computes log-probabilities and values before an update."""
    return RolloutScorer(
        networks.policy,
        collator,
        args.device,
        networks.loaded.processor.image_token_id,
        spec.temperature,
        reference=networks.reference,
        adapter_off=networks.adapter_off,
        critic=networks.critic,
        precision=autocast_of(args),
    )


def conversing(
    networks: _Networks, spec: RolloutSpec, args: LlavaTrainingArguments, layout: Layout, *, model: str
) -> Converse:
    """Return `converse` of the server of `--engine`, or of an engine around the policy, made on first use."""
    if spec.engine is not None:
        return sampling_server(spec.engine, model, networks.loaded.processor, spec).converse
    engines: list[LocalEngine] = []
    context = autocast_of(args)

    def converse(scripts: Any, sampling: Any) -> Any:
        if not engines:
            engines.append(LocalEngine(networks.policy, networks.loaded.processor, max_slots=spec.slots, layout=layout))
        with context():
            return engines[0].converse(scripts, sampling)

    return converse


def sampling_server(url: str, model: str, processor: LlavaMedProcessor, spec: RolloutSpec) -> RemoteEngine:
    """Return the engine of the server that samples the dialogues of a run.

    Raises:
        ConfigError: it serves several models, none of them under the name of `model`.
        GenerationError: it cannot be reached.
    """
    options: dict[str, Any] = {"processor": processor, "max_concurrency": spec.slots}
    try:
        engine = RemoteEngine(url, Path(model).name, **options)
    except ConfigError:
        engine = RemoteEngine(url, **options)  # the only model, under another name
    logger.warning(
        "%s samples the dialogues with the fixed weights of %s, while the policy changes; ratios are "
        "computed with its log-probabilities",
        *(engine.server.url, engine.facts.name),
    )
    return engine


def make_objective(spec: RolloutSpec, rules: RuleSet, *, without: int) -> PolicyLoss:
    """Return the losses of the algorithm."""
    return PolicyLoss(
        PolicyLossSpec(
            ratio="sequence" if spec.algorithm == "rloo" else "token",
            aggregation=spec.aggregation if spec.algorithm == "grpo" else "token",
            max_length=spec.response_len * len(rules.nodes),
            clip_low=spec.clip_low,
            clip_high=spec.clip_high,
            kl_coef=spec.kl_coef if spec.algorithm == "grpo" else 0.0,
            kl_estimator=spec.kl_estimator,
            value_coef=spec.value_coef if spec.algorithm == "ppo" else None,
            clip_value=spec.clip_value,
            temperature=spec.temperature,
            counts_padding=spec.published,
            old_is_sampler=spec.engine is not None,
        ),
        without=without,
    )


def make_trainer(
    networks: _Networks,
    spec: RolloutSpec,
    loader: RolloutLoader,
    collator: Collator,
    *,
    counts: TrainingCounts,
    args: LlavaTrainingArguments,
    rules: RuleSet,
    claim: Claim | None,
) -> LlavaTrainer:
    """Return the trainer with its callbacks."""
    objective = make_objective(spec, rules, without=networks.loaded.processor.image_token_id)
    before_write = None if claim is None else claim.check
    names = (*objective.metric_names, *NAMES)
    callbacks: list[TrainerCallback] = [
        MetricsCallback(args.run_folder, counts, names, before_write=before_write),
        RolloutCallback(args.run_folder, counts),
    ]
    if args.save_on_signal:
        callbacks.append(SaveOnSignal())

    def count_rows(step: StepBatch, _: int) -> None:
        counts.add_metrics({"update_rows": torch.tensor([float(len(step.rows)), 1.0], dtype=torch.float64)})

    hooks = hooks_for(
        networks.kind,
        networks.policy,
        networks.loaded,
        on_step=count_rows,
        before_write=before_write,
        may_load=lambda checkpoint: check_trusted(args, checkpoint),
    )
    return LlavaTrainer(
        networks.critic or networks.policy,
        args,
        loader=loader,
        collator=collator,
        objective=objective,
        rates=replace(args.optimizer_spec(), steps_per_rate=spec.updates),
        hooks=hooks if networks.critic is None else with_value(hooks, networks.critic.value_state()),
        counts=counts,
        callbacks=[*callbacks, ScreenCallback()],
    )
