"""Options of preference training, and the frozen specification that they build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from llava.data.image_negatives import CHOICES
from llava.errors import ConfigError
from llava.train.bounds import check_bounds
from llava.train.legacy_flags import option
from llava.train.objectives.pairs import PairLossSpec
from llava.train.objectives.sft import OBJECTIVES
from llava.train.preference_losses import WITHOUT_REFERENCE
from llava.train.rollout_args import ALGORITHMS
from llava.utils.cli import flag
from llava.utils.provenance import file_sha256

KTO = "kto"
"""Loss of single answers, which is not added to losses of pairs."""

OTHER_OBJECTIVES = ("dpo", *ALGORITHMS, "reward")
"""Objectives on other rows than `OBJECTIVES`."""

REF_MODES = ("cached", "adapter_off", "copy", "none")

POLICY_INPUTS = "policy_inputs"
"""Mode of `--compat policy_reference_inputs`: a copy that sees the embeddings of the policy, as published."""


def default_beta(names: Sequence[str]) -> float:
    """Return the default of `--beta`: that of SimPO where no other of the losses has one."""
    return 2.0 if "simpo" in names and set(names) <= WITHOUT_REFERENCE else 0.1


@dataclass(frozen=True, slots=True)
class PreferenceSpec:
    """Preference training.

    Attributes:
        losses: losses of a pair.
        ref_mode: `cached`, `adapter_off`, `copy`, `none` where no loss needs a reference, or `POLICY_INPUTS`.
        ref_logprobs: file of log-probabilities under the reference, or None.
        disable_dropout: train without dropout.
        image_negative: kind of the damaged images (`llava.data.image_negatives`), or None.
    """

    losses: PairLossSpec
    ref_mode: str
    ref_logprobs: str | None
    disable_dropout: bool
    image_negative: str | None = None
    kto_weights: tuple[float, float] = (1.0, 1.0)

    @property
    def is_kto(self) -> bool:
        """Whether single answers are trained instead of pairs."""
        return self.losses.names == (KTO,)


@dataclass(frozen=True)
class PreferenceArguments:
    """Options for the objective; those of pairs have no effect in fine-tuning."""

    objective: str = option(
        "sft",
        "sft: fine-tuning; dpo: preference training on pairs of answers; grpo, rloo, ppo: reinforcement learning with "
        "the reward of --rules; reward: a reward model on pairs; or an objective of a plug-in",
    )
    pref_loss: list[str] | None = option(  # noqa: RUF009 -- a field
        None,
        "losses of a pair, added: sigmoid (DPO, the default), robust, hinge, ipo, sigmoid_norm, simpo, orpo, bco_pair, "
        "mdpo, sft; or kto alone, of pairs or of single answers with a label",
    )
    pref_loss_weights: list[float] | None = option(None, "weight of each loss; default: 1")  # noqa: RUF009
    beta: float | None = option(None, "strength of the reference; default: 0.1, or 2.0 for simpo, with sft too")
    simpo_gamma: float = option(1.0, "margin that simpo asks for")
    orpo_lambda: float = option(0.1, "weight of the odds term of orpo")
    label_smoothing: float = option(0.0, "share of pairs whose sides are assumed to be swapped, below 0.5")
    kto_weights: list[float] | None = option(  # noqa: RUF009
        None, "weights of good and of bad answers in kto; default: 1 1"
    )
    anchor_delta: float = option(0.0, "reward that the anchor term of mdpo asks for")
    ref_mode: str = option(
        "cached",
        "reference: cached (log-probabilities of the policy as it starts, computed once), adapter_off (the policy "
        "without its adapter, in every step), copy (a second model), or none (simpo, orpo, sft)",
    )
    ref_logprobs: str | None = option(
        None, "file of log-probabilities under another reference, written by `llava preferences score`"
    )
    image_negative: str = option(
        "none",
        "damaged image of mdpo: crop (at most 20 % of the image), noise, blank, or swap (the image of another row, so "
        "of another patient)",
    )
    reward_centering: float = option(1e-3, "weight of the squared sum of both rewards of a pair (objective reward)")
    image_to_caption_file: str | None = option(
        None, "JSON file {image: [captions]} of facts for --reward-prompt-file (objective reward)"
    )
    disable_dropout: bool = option(True, "train pairs without dropout, which the reference does not have either")

    def __post_init__(self) -> None:
        if self.objective not in (*OBJECTIVES, *OTHER_OBJECTIVES):
            known = ", ".join((*OBJECTIVES, *OTHER_OBJECTIVES))
            raise ConfigError(f"--objective is {self.objective!r}; expected one of {known}")
        check_bounds(vars(self))
        if self.ref_mode not in (*REF_MODES, POLICY_INPUTS):
            raise ConfigError(f"--ref-mode is {self.ref_mode!r}; expected {', '.join(REF_MODES[:-1])} or none")
        if self.objective == "dpo":
            self._check_losses()
            self._check_reference()

    def _check_losses(self) -> None:
        losses = self._losses()
        if KTO in losses.names and losses.names != (KTO,):
            raise ConfigError(f"--pref-loss {' '.join(losses.names)}: kto is a loss of single answers; use it alone")
        weights = self.kto_weights or [1.0, 1.0]
        if len(weights) != 2:
            raise ConfigError(f"--kto-weights is {weights}; expected two numbers of at least 0, such as 1 1")
        if losses.names != (KTO,):
            losses.functions()  # rejects unknown names and a wrong number of weights
        if len(set(losses.names)) < len(losses.names):
            raise ConfigError(f"--pref-loss {' '.join(losses.names)} names a loss twice; name each once")
        if self.image_negative not in CHOICES:
            raise ConfigError(f"--image-negative is {self.image_negative!r}; expected {', '.join(CHOICES)}")
        if ("mdpo" in losses.names) != (self.image_negative != "none"):
            raise ConfigError(
                "--pref-loss mdpo and --image-negative need each other: the loss compares with a damaged image; "
                "expected both, for example --pref-loss mdpo --image-negative crop, or neither"
            )
        if not losses.beta > 0:
            raise ConfigError(f"--beta is {losses.beta}; expected a number above 0, such as 0.1")

    def _check_reference(self) -> None:
        if self._losses().names == (KTO,) and self.ref_logprobs is not None:
            raise ConfigError("--ref-logprobs cannot hold the mismatched answers of kto; omit it")
        needs = self._losses().needs_reference()
        if needs and self.ref_mode == "none":
            raise ConfigError(
                f"--ref-mode none: --pref-loss {' '.join(self._losses().names)} compares with a reference; expected "
                "cached, adapter_off or copy, or the losses simpo, orpo, sft"
            )
        if self.ref_logprobs is not None and (not needs or self.ref_mode != "cached"):
            raise ConfigError(
                "--ref-logprobs has an effect only with --ref-mode cached and a loss that compares with a reference; "
                "omit it"
            )

    def _losses(self) -> PairLossSpec:
        names = tuple(self.pref_loss or ("sigmoid",))
        return PairLossSpec(
            names=names,
            weights=tuple(self.pref_loss_weights or ()),
            beta=self.beta if self.beta is not None else default_beta(names),
            label_smoothing=self.label_smoothing,
            simpo_gamma=self.simpo_gamma,
            orpo_lambda=self.orpo_lambda,
            anchor_delta=self.anchor_delta,
        )

    def spec(self) -> PreferenceSpec | None:
        """Return the specification of preference training, or None in fine-tuning."""
        if self.objective != "dpo":
            return None
        losses = self._losses()
        mode = self.ref_mode if losses.needs_reference() else "none"
        if losses.names == (KTO,) and mode == "cached":
            mode = "copy"  # mismatched answers change with the step, so they cannot be computed once
        good, bad = self.kto_weights or (1.0, 1.0)
        damage = None if self.image_negative == "none" else self.image_negative
        return PreferenceSpec(losses, mode, self.ref_logprobs, self.disable_dropout, damage, (good, bad))

    def decisive_options(self) -> dict[str, Any]:
        """Return the options that determine what a step computes; a file counts by its content.

        Raises:
            ConfigError: the file of `--ref-logprobs` does not exist.
        """
        spec = self.spec()
        if self.objective == "reward":
            return {"objective": self.objective, "reward_centering": self.reward_centering}
        if spec is None:
            return {"objective": self.objective}
        try:
            digest = None if spec.ref_logprobs is None else file_sha256(spec.ref_logprobs)
        except OSError as error:
            raise ConfigError(f"--ref-logprobs {spec.ref_logprobs}: cannot be read ({error.strerror})") from error
        losses = {"pref_loss": list(spec.losses.names), "pref_loss_weights": list(spec.losses.weights)}
        others = {name: value for name, value in asdict(spec.losses).items() if name not in ("names", "weights")}
        return {
            "objective": self.objective,
            **losses,
            **others,
            "ref_mode": spec.ref_mode,
            "ref_logprobs": digest,
            "disable_dropout": spec.disable_dropout,
            "image_negative": spec.image_negative,
            "kto_weights": list(spec.kto_weights),
        }

    def without_effect(self) -> list[str]:
        """Return the options that were set but have no effect, since the objective is fine-tuning."""
        if self.objective == "dpo":
            return []
        standard = PreferenceArguments()
        rated = ("reward_centering", "image_to_caption_file") if self.objective == "reward" else ()
        used = ("objective", *rated, *(("beta", "ref_mode") if self.objective in ALGORITHMS else ()))
        names = [field.name for field in fields(self) if field.name not in used]
        return [flag(name) for name in names if getattr(self, name) != getattr(standard, name)]
