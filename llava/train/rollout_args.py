"""Options of reinforcement learning, names of the original command, and the resulting specification."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llava.errors import ConfigError
from llava.symbolic.cue_lists import EXTRACTOR_VERSION, cues_sha256
from llava.symbolic.read_settings import STYLES
from llava.symbolic.rules import load_rules, shipped
from llava.symbolic.settings import PRESETS
from llava.train.bounds import check_bounds
from llava.train.legacy_flags import option
from llava.utils.cli import flag
from llava.utils.lookup import lookup
from llava.utils.provenance import file_sha256

logger = logging.getLogger(__name__)

ALGORITHMS = ("grpo", "rloo", "ppo")

KL_COEF = {"grpo": 0.0, "rloo": 0.05, "ppo": 0.1}
CLIP_HIGH = {"grpo": 0.28, "rloo": 0.2, "ppo": 0.2}
GROUP_SIZE = {"grpo": 8, "rloo": 8, "ppo": 1}
"""Defaults that depend on the objective."""

WITHOUT_EFFECT = (
    "reward_base_model_name",
    "reward_model_name_or_path",
    "reward_model_per_device_batch_size",
    "reward_prompt_file",
    "length_bonus_score",
    "correct_bonus_score",
    "clean_tokens_after_eos",
)
"""Options of the original command that do not change anything, since the reward is symbolic; the reward model starts
the value model with `--init-value-with-reward True`."""

DRLLAVA = "drllava"
"""Name in `--compat`: score at the last padded position, KL clamped at 0, padding in means."""


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """Reinforcement learning with a symbolic reward.

    Attributes:
        algorithm: `grpo`, `rloo` or `ppo`.
        rules: rule file, or the name of a shipped one.
        preset: settings of the reward; None for those of the rule file.
        priors: file of counts, `none` for no balance, or None to count the training table.
        group_size: G, dialogues of one prompt.
        rollout_batch: dialogues of a rollout on all ranks.
        step_batch: dialogues of an optimizer step on all ranks.
        slots: dialogues that one process generates at a time.
        row_batch: dialogues of a forward pass of an update; None for as many as fit.
        passes: passes over each rollout.
        response_len: longest answer in tokens.
        query_len: longest first question in tokens, images not counted; longer ones are left out. 0: no limit.
        temperature: divisor of the logits, when sampling and in every log-probability.
        styles: orders of the questions, drawn equally; empty for those of the rule file.
        splits: rows with another value of `split` are left out.
        kl_coef: strength of the KL penalty: in the loss (grpo) or in the reward.
        kl_estimator: `k3` or `k1`, in the loss of grpo.
        kl_target: KL per dialogue that the strength is adapted to; 0 keeps it.
        kl_horizon: dialogues in which the strength adapts.
        clip_low: largest decrease of a ratio.
        clip_high: largest increase of a ratio.
        clip_value: largest change of a value.
        value_coef: weight of the value loss.
        gamma: discount of a turn (grpo) or of a token (ppo).
        lam: decay of the advantage estimator.
        whiten_rewards: divide rewards per token by their deviation.
        whiten_over: ranks that statistics are taken over, `full_batch` or `per_gpu`.
        no_stop_penalty: reward of a dialogue with an answer that did not end; None for no penalty.
        adds_penalty: whether it is added to the reward, which it replaces otherwise.
        aggregation: mean of the token losses, see `losses.edge_weights`.
        scale: scale of group advantages, `group` or `none`.
        credit: `turn` or `dialogue`: whether each turn has its own advantage.
        more_prompts: most prompts that replace groups without spread.
        shuffled_rewards: give the dialogues of a group the rewards of one another, as a control.
        value_model: `adapter`, `head` or a folder.
        ref_mode: `cached`, `adapter_off`, `copy` or `none`.
        published: reproduce the published position, clamp and padding.
        engine: URL of a server that samples the dialogues; None samples with the policy.
    """

    algorithm: str
    rules: str
    preset: str | None
    priors: str | None
    group_size: int
    rollout_batch: int
    step_batch: int
    slots: int
    row_batch: int | None
    passes: int
    response_len: int
    query_len: int
    temperature: float
    styles: tuple[str, ...]
    splits: tuple[str, ...]
    kl_coef: float
    kl_estimator: str
    kl_target: float
    kl_horizon: int
    clip_low: float
    clip_high: float
    clip_value: float
    value_coef: float
    gamma: float
    lam: float
    whiten_rewards: bool
    whiten_over: str
    no_stop_penalty: float | None
    adds_penalty: bool
    aggregation: str
    scale: str
    credit: str
    more_prompts: int
    shuffled_rewards: bool
    value_model: str
    ref_mode: str
    published: bool = False
    engine: str | None = None

    @property
    def prompts(self) -> int:
        """Prompts of a rollout on all ranks."""
        return self.rollout_batch // self.group_size

    @property
    def updates(self) -> int:
        """Optimizer steps of each rollout."""
        return self.passes * self.parts

    @property
    def parts(self) -> int:
        """Optimizer steps of one pass over a rollout."""
        return self.rollout_batch // self.step_batch


@dataclass(frozen=True)
class RolloutArguments:
    """Options of reinforcement learning; they have no effect with other objectives."""

    rules: str | None = option(None, "rule file, or the name of a shipped rule set, that gives the reward")
    preset: str | None = option(None, f"settings of the reward: {', '.join(PRESETS)}; default: the rule file's")
    priors: str | None = option(
        None, "file {node: {value: count}} that balances rare values, or none; default: counted from the training data"
    )
    num_generations: int | None = option(None, "dialogues of one prompt; default: 8, or 1 for ppo")
    rollout_batch_size: int = option(64, "dialogues of a rollout on all processes")
    step_batch_size: int | None = option(None, "dialogues of an optimizer step; default: the whole rollout")
    rollout_per_device_batch_size: int = option(32, "dialogues that a process generates at a time")
    step_per_device_batch_size: int | None = option(
        None, "dialogues of a forward pass of an update; default: as many as --max-tokens-per-row allows"
    )
    noptepochs: int = option(1, "passes over each rollout")
    response_len: int = option(64, "longest answer in tokens")
    query_len: int = option(0, "longest first question in tokens, images not counted; others are left out; 0: all")
    temperature: float = option(1.0, "divisor of the logits, in sampling and in every log-probability")
    top_p: float = option(1.0, "only 1 is accepted: other values sample from a distribution that is not trained")
    top_k: int = option(0, "only 0 is accepted, for the same reason")
    styles: list[str] | None = option(None, f"orders of the questions: {', '.join(STYLES)}")  # noqa: RUF009
    train_splits: str = option("train", "values of the key `split` of the rows that are used, with commas")
    kl_coef: float | None = option(None, "strength of the KL penalty; default: 0 grpo, 0.05 rloo, 0.1 ppo")
    kl_estimator: str = option("k3", "estimate of the KL divergence in the loss of grpo: k3 or k1")
    kl_target: float = option(0.0, "KL of a dialogue that --kl-coef is adapted to; 0: fixed")
    kl_horizon: int = option(10000, "dialogues in which --kl-coef adapts")
    clip_low: float = option(0.2, "largest decrease of a probability ratio")
    clip_high: float | None = option(None, "largest increase of a probability ratio; default: 0.28 grpo, else 0.2")
    cliprange_value: float = option(0.2, "largest change of a value in an update")
    vf_coef: float = option(0.1, "weight of the value loss")
    gamma: float = option(1.0, "discount of a turn (grpo) or of a token (ppo)")
    lam: float = option(1.0, "decay of the advantage estimator of ppo")
    whiten_rewards: bool = option(False, "divide rewards per token by their deviation (ppo)")
    whitening_async_stats: str = option("full_batch", "statistics of whitening: full_batch (all processes) or per_gpu")
    penalize_no_stop_token: bool = option(False, "apply --penalty-reward-value to dialogues with an unfinished answer")
    penalty_reward_value: float = option(-1.0, "reward of an unfinished answer, with --penalize-no-stop-token")
    relative_stop_token_penalty: bool = option(True, "add that penalty to the reward, instead of replacing the reward")
    aggregation: str = option("token", "mean of the token losses of grpo: token, sequence or constant")
    scale_rewards: str = option("group", "scale of the advantages of grpo: group, or none")
    credit: str = option("turn", "turn: each turn of grpo has its own advantage; dialogue: one for all")
    dynamic_sampling: int = option(0, "most prompts a rollout that replace groups without spread")
    shuffled_rewards: bool = option(False, "control: the dialogues of a group get the rewards of one another")
    value_model: str = option("adapter", "value model of ppo: adapter, head, or a folder")
    init_value_with_reward: bool = option(False, "start the value model of ppo from --reward-model-name-or-path")
    reward_model_name_or_path: str | None = option(None, "reward model, see --init-value-with-reward")
    reward_base_model_name: str | None = option(None, "accepted without effect: the reward is symbolic")
    reward_model_per_device_batch_size: int | None = option(None, "accepted without effect: the reward is symbolic")
    reward_prompt_file: str | None = option(None, "rating question of --objective reward; no effect on rules")
    length_bonus_score: float | None = option(None, "accepted without effect, which it has in the original")
    correct_bonus_score: float | None = option(None, "accepted without effect, which it has in the original")
    engine: str | None = option(
        None, "URL of a server that samples the dialogues, with weights that stay as they are; default: the policy"
    )
    clean_tokens_after_eos: bool | None = option(None, "accepted without effect: an answer ends at its end token")

    def __post_init__(self) -> None:
        check_bounds(vars(self))

    def spec(self, objective: str, *, ref_mode: str = "cached", beta: float | None = None) -> RolloutSpec | None:
        """Return the specification, or None if the objective is no reinforcement learning.

        Args:
            objective: value of `--objective`.
            ref_mode: value of `--ref-mode`.
            beta: value of `--beta`, another name of `--kl-coef`.
        """
        if objective not in ALGORITHMS:
            return None
        size = self.num_generations or GROUP_SIZE[objective]
        starts_value = self.init_value_with_reward and self.reward_model_name_or_path
        coef = self.kl_coef if self.kl_coef is not None else beta
        return RolloutSpec(
            algorithm=objective,
            rules=self.rules or "",
            preset=self.preset,
            priors=self.priors,
            group_size=size,
            rollout_batch=self.rollout_batch_size,
            step_batch=self.step_batch_size or self.rollout_batch_size,
            slots=self.rollout_per_device_batch_size,
            row_batch=self.step_per_device_batch_size,
            passes=self.noptepochs,
            response_len=self.response_len,
            query_len=self.query_len,
            temperature=self.temperature,
            styles=tuple(self.styles or ()),
            splits=tuple(part.strip() for part in self.train_splits.split(",")),
            kl_coef=KL_COEF[objective] if coef is None else coef,
            kl_estimator=self.kl_estimator,
            kl_target=self.kl_target,
            kl_horizon=self.kl_horizon,
            clip_low=self.clip_low,
            clip_high=CLIP_HIGH[objective] if self.clip_high is None else self.clip_high,
            clip_value=self.cliprange_value,
            value_coef=self.vf_coef,
            gamma=self.gamma,
            lam=self.lam,
            whiten_rewards=self.whiten_rewards,
            whiten_over=self.whitening_async_stats,
            no_stop_penalty=self.penalty_reward_value if self.penalize_no_stop_token else None,
            adds_penalty=self.relative_stop_token_penalty,
            aggregation=self.aggregation,
            scale=self.scale_rewards,
            credit=self.credit,
            more_prompts=self.dynamic_sampling,
            shuffled_rewards=self.shuffled_rewards,
            value_model=str(self.reward_model_name_or_path) if starts_value else self.value_model,
            ref_mode=ref_mode,
            engine=self.engine,
        )

    def warn_without_effect(self, objective: str) -> None:
        """List every option that was set but has no effect, in one warning."""
        standard = RolloutArguments()
        changed = [field.name for field in fields(self) if getattr(self, field.name) != getattr(standard, field.name)]
        if objective not in ALGORITHMS:
            changed = [name for name in changed if objective != "reward" or name != "reward_prompt_file"]
            if changed:
                names = ", ".join(map(flag, changed))
                logger.warning("accepted without effect: %s; they need --objective grpo, rloo or ppo", names)
            return
        used = {"reward_model_name_or_path"} if self.init_value_with_reward else set()
        if found := [flag(name) for name in WITHOUT_EFFECT if name in changed and name not in used]:
            logger.warning("accepted without effect, since the reward is symbolic: %s", ", ".join(found))


def check_rollouts(spec: RolloutSpec, arguments: RolloutArguments, *, world_size: int) -> None:
    """Check the options of reinforcement learning.

    Raises:
        ConfigError: a value is out of range, or batch sizes do not divide each other.
    """
    if not spec.rules:
        raise ConfigError(
            f"--objective {spec.algorithm} needs --rules FILE; expected a rule file or {', '.join(shipped())}"
        )
    if arguments.top_p != 1.0 or arguments.top_k != 0:
        raise ConfigError(
            f"--top-p {arguments.top_p:g} --top-k {arguments.top_k} with --objective {spec.algorithm}: cut-off answers "
            "are drawn from another distribution than the one whose probabilities are trained; expected --top-p 1 "
            "--top-k 0"
        )
    _check_choices(spec)
    _check_combinations(spec, arguments)
    if spec.algorithm != "ppo" and spec.group_size < 2:
        raise ConfigError(
            f"--num-generations {spec.group_size}: a group of one dialogue has no advantage; expected at least 2 with "
            f"--objective {spec.algorithm}"
        )
    divisions = [
        ("--rollout-batch-size", spec.rollout_batch, "--num-generations", spec.group_size),
        ("--step-batch-size", spec.step_batch, "--num-generations", spec.group_size),
        ("--rollout-batch-size", spec.rollout_batch, "--step-batch-size", spec.step_batch),
        ("--rollout-batch-size", spec.rollout_batch, "processes x --num-generations", world_size * spec.group_size),
        ("--step-batch-size", spec.step_batch, "processes x --num-generations", world_size * spec.group_size),
    ]
    for whole, size, part, divisor in divisions:
        if size % divisor:
            raise ConfigError(f"{whole} {size} is not a multiple of {part} {divisor}; expected a multiple")


def _check_combinations(spec: RolloutSpec, arguments: RolloutArguments) -> None:
    """Refuse options that would have no effect, or another one, with this algorithm."""
    if spec.algorithm == "grpo" and spec.kl_target:
        raise ConfigError(
            f"--kl-target {spec.kl_target:g} adapts the KL penalty of the reward, but grpo has its own in the loss; "
            "use --kl-coef, or --objective ppo or rloo"
        )
    if spec.kl_target and not spec.kl_coef:
        raise ConfigError(
            f"--kl-target {spec.kl_target:g} adapts --kl-coef, which stays 0 if it starts there; use a --kl-coef such "
            "as 0.05, or leave --kl-target out"
        )
    if spec.shuffled_rewards and spec.group_size < 2:
        raise ConfigError(
            f"--shuffled-rewards True shuffles within a group, but --num-generations is {spec.group_size}; expected at "
            "least 2"
        )
    if spec.algorithm == "ppo" and spec.more_prompts:
        raise ConfigError(
            f"--dynamic-sampling {spec.more_prompts} replaces groups whose rewards are equal, but ppo has no groups; "
            "leave it out, or use --objective grpo or rloo"
        )
    if spec.published and spec.algorithm != "ppo":
        raise ConfigError(
            f"--compat {DRLLAVA} is the published position, clamp and padding of ppo, but --objective is "
            f"{spec.algorithm}; leave it out, or use --objective ppo"
        )
    if arguments.init_value_with_reward and (spec.algorithm != "ppo" or not arguments.reward_model_name_or_path):
        raise ConfigError(
            "--init-value-with-reward True starts the value model of --objective ppo from "
            f"--reward-model-name-or-path; got --objective {spec.algorithm} and "
            f"{arguments.reward_model_name_or_path or 'no path'}"
        )


def _check_choices(spec: RolloutSpec) -> None:
    choices = {
        "--aggregation": (spec.aggregation, ("token", "sequence", "constant")),
        "--scale-rewards": (spec.scale, ("group", "none")),
        "--credit": (spec.credit, ("turn", "dialogue")),
        "--kl-estimator": (spec.kl_estimator, ("k1", "k3")),
        "--whitening-async-stats": (spec.whiten_over, ("full_batch", "per_gpu")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ConfigError(f"{name} is {value!r}; expected {' or '.join(known)}")
    for style in spec.styles:
        lookup(dict.fromkeys(STYLES), style, "style")
    if spec.preset is not None:
        lookup(PRESETS, spec.preset, "preset")
    if spec.value_model not in ("adapter", "head") and not Path(spec.value_model).is_dir():
        raise ConfigError(f"--value-model {spec.value_model}: no such folder; expected adapter, head or a folder")


def decisive_options(arguments: RolloutArguments, spec: RolloutSpec | None) -> dict[str, Any]:
    """Return the options that determine what a run computes; files count by their content."""
    if spec is None:
        return {}
    sizes = ("rollout_per_device_batch_size", "step_per_device_batch_size")  # these do not change results
    kept = [field.name for field in fields(arguments) if field.name not in (*WITHOUT_EFFECT, *sizes, "engine")]
    found = {name: getattr(arguments, name) for name in kept}
    priors = Path(spec.priors or "")
    # The URL does not matter, but whether a server samples does: its weights are not those of the policy.
    found |= {} if spec.engine is None else {"engine": "a server"}
    return found | {
        "rules": rules_label(spec.rules),
        "priors": file_sha256(priors) if priors.is_file() else spec.priors,
        "num_generations": spec.group_size,
        "step_batch_size": spec.step_batch,
        "kl_coef": spec.kl_coef,
        "clip_high": spec.clip_high,
        "value_model": Path(spec.value_model).name,
        "ref_mode": spec.ref_mode,
    }


def rules_label(path: str) -> str:
    """Return name and hash of a rule file with its phrases, and what else decides how it reads an answer.

    Raises:
        DataError: it is not a valid rule file.
    """
    rules = load_rules(path)
    phrases = rules.dialogue.phrases_file
    parts = [rules.sha256, file_sha256(phrases) if phrases is not None and phrases.is_file() else ""]
    digest = hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
    reading = f"extractor {EXTRACTOR_VERSION}, cues sha256 {cues_sha256(rules.primary.language)[:16]}"
    return f"{rules.id} {rules.version}".strip() + f", sha256 {digest}, {reading}"
