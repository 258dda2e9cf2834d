"""Bounds of the numeric options of `llava train`, checked before torch and again with the arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava.errors import ConfigError
from llava.utils.cli import flag

MAX_RATE = 1e30
"""Largest learning rate and weight decay: optimizers convert them to float32."""

MAX_SEED = 2**32 - 1
"""Largest seed that numpy takes."""

MAX_COUNT = 1_000_000
MAX_TOKENS = 2**31 - 1
MAX_SIDE = 16_384
"""Largest side of a model's input image in pixels."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Allowed values of a numeric option.

    Attributes:
        least: smallest value.
        most: largest value.
        above: whether `least` itself is too small.
        below: whether `most` itself is too large.
        other: a further allowed value.
        whole: whether values of 1 and more are whole; smaller ones are a share of the run.
    """

    least: float
    most: float
    above: bool = False
    below: bool = False
    other: float | None = None
    whole: bool = False

    def allows(self, value: float) -> bool:
        """Return whether a value is allowed; NaN is not."""
        if value == self.other:
            return True
        if not self.least <= value <= self.most:
            return False
        if (self.above and value == self.least) or (self.below and value == self.most):
            return False
        return not self.whole or value < 1 or value == int(value)

    def __str__(self) -> str:
        low = f"above {self.least:.10g}" if self.above else f"from {self.least:.10g}"
        high = f"below {self.most:.10g}" if self.below else f"{self.most:.10g}"
        text = f"a number {low} to {high}"
        if self.whole:
            text += " (a share of the run below 1, else whole)"
        return text if self.other is None else f"{text}, or {self.other:.10g}"


RATE = Bound(0, MAX_RATE)
SHARE = Bound(0, 1)
DROPOUT = Bound(0, 1, below=True)
SEED = Bound(0, MAX_SEED)
COUNT = Bound(1, MAX_COUNT)
COUNT_OR_NONE = Bound(0, MAX_COUNT)
STEPS = Bound(0, 1e12, above=True, whole=True)
FINITE = Bound(-MAX_RATE, MAX_RATE)

BOUNDS: dict[str, Bound] = {
    # model
    "mm_vision_select_layer": Bound(-1000, 1000),
    "mm_cluster_num_centers": COUNT,
    "mm_cluster_iters": COUNT_OR_NONE,
    "image_size": Bound(1, MAX_SIDE),
    "bits": Bound(4, 16),
    "lora_r": COUNT,
    "lora_alpha": COUNT,
    "lora_dropout": DROPOUT,
    "lora_r_vit": COUNT,
    "lora_alpha_vit": COUNT,
    "lora_dropout_vit": DROPOUT,
    # data
    "feature_cache_gb": Bound(0, 1e9),
    "sq_r": SHARE,
    "model_max_length": Bound(2, MAX_TOKENS),  # a token of the prompt and one of the answer
    "max_tokens_per_row": Bound(1, MAX_TOKENS),
    "questions_per_image": COUNT_OR_NONE,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "eval_accumulation_steps": COUNT,
    "gradient_accumulation_steps": COUNT,
    "dataloader_num_workers": Bound(0, 10_000),
    "dataloader_prefetch_factor": COUNT,
    # optimization
    "num_train_epochs": Bound(0, MAX_COUNT, above=True),
    "max_steps": Bound(1, 1e12, other=-1),
    "learning_rate": RATE,
    "mm_projector_lr": RATE,
    "mm_vision_tower_lr": RATE,
    "vision_tower_lr": RATE,
    "warmup_steps": Bound(0, 1e12, whole=True),
    "warmup_ratio": SHARE,
    "weight_decay": RATE,
    "adam_beta1": DROPOUT,
    "adam_beta2": DROPOUT,
    "adam_epsilon": Bound(1e-38, 1),  # smaller numbers are 0 in float32
    "max_grad_norm": RATE,
    "label_smoothing_factor": DROPOUT,
    "neftune_noise_alpha": RATE,
    "seed": SEED,
    "data_seed": SEED,
    # logging
    "logging_steps": STEPS,
    "log_lines": COUNT_OR_NONE,
    "eval_steps": STEPS,
    "eval_delay": Bound(0, 1e12),
    "eval_answers": Bound(0, 1e12),
    "early_stopping_patience": COUNT_OR_NONE,
    "save_steps": STEPS,
    "save_total_limit": COUNT,
    # machine
    "torch_empty_cache_steps": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": Bound(1, 1e9),
    "master_port": Bound(0, 65_535),
    "local_rank": Bound(0, MAX_COUNT, other=-1),
    # preferences and reinforcement learning; `--objective` decides which further rules hold
    "pref_loss_weights": RATE,
    "kto_weights": RATE,
    "beta": RATE,
    "simpo_gamma": FINITE,
    "orpo_lambda": FINITE,
    "label_smoothing": Bound(0, 0.5, below=True),
    "anchor_delta": FINITE,
    "reward_centering": RATE,
    "num_generations": COUNT,
    "rollout_batch_size": COUNT,
    "step_batch_size": COUNT,
    "rollout_per_device_batch_size": COUNT,
    "step_per_device_batch_size": COUNT,
    "reward_model_per_device_batch_size": COUNT,
    "noptepochs": COUNT,
    "response_len": Bound(1, MAX_TOKENS),
    "query_len": Bound(0, MAX_TOKENS),
    "temperature": Bound(0, 1e6, above=True),
    "top_p": Bound(0, 1, above=True),
    "top_k": Bound(0, MAX_TOKENS),
    "kl_coef": RATE,
    "kl_target": RATE,
    "kl_horizon": Bound(1, 1e12),
    "clip_low": RATE,
    "clip_high": RATE,
    "cliprange_value": RATE,
    "vf_coef": RATE,
    "gamma": SHARE,
    "lam": SHARE,
    "penalty_reward_value": FINITE,
    "dynamic_sampling": COUNT_OR_NONE,
    "length_bonus_score": FINITE,
    "correct_bonus_score": FINITE,
    "num_latents": FINITE,
    "loss_alpha": FINITE,
}
"""Allowed values by name with underscores; a test compares the names with the table of options."""


def check_bounds(options: Mapping[str, Any]) -> None:
    """Check the numbers among the given options.

    Raises:
        ConfigError: a number is outside its bounds, or not a number.
    """
    for name, value in options.items():
        if bound := BOUNDS.get(name):
            for number in value if isinstance(value, list | tuple) else [value]:
                is_number = isinstance(number, int | float) and not isinstance(number, bool)
                if is_number and not bound.allows(number):
                    raise ConfigError(f"{flag(name)} is {_shown(number)}; expected {bound}")


def _shown(number: float) -> str:
    """Return a number as text; a whole number of thousands of digits is shortened."""
    if isinstance(number, int) and abs(number) >= 10**30:
        return f"{'-' if number < 0 else ''}a whole number of {len(str(abs(number)))} digits"
    return str(number)
