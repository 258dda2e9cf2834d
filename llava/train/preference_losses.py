"""Preference losses per pair, as pure functions of log-probabilities summed over trained tokens.

Notation: chosen answer w, rejected answer l, log-probability of an answer under the policy minus that under the
reference r(w), r(l); logistic function s. All functions take tensors [B] of any float dtype and return [B], float32 for
half precision; values and gradients are finite wherever the inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from llava.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Pairs:
    """Log-probabilities of B pairs of answers.

    Attributes:
        chosen, rejected: [B] sums over the trained tokens under the policy.
        chosen_tokens, rejected_tokens: [B] numbers of trained tokens.
        ref_chosen, ref_rejected: [B] the same sums under the reference; None without a reference.
        negative, ref_negative: [B] chosen answer beside a damaged image, under the policy and the reference; None
            without such an image.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    negative: Tensor | None = None
    ref_negative: Tensor | None = None

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """Return r(w) and r(l)."""
        return _log_ratio(self.chosen, self.ref_chosen), _log_ratio(self.rejected, self.ref_rejected)

    def margin(self) -> Tensor:
        """Return r(w) - r(l)."""
        chosen, rejected = self.log_ratios()
        return chosen - rejected

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the log-probability per token of both answers under the policy."""
        chosen, rejected = _wide(self.chosen), _wide(self.rejected)
        return _per_token(chosen, self.chosen_tokens), _per_token(rejected, self.rejected_tokens)


def _wide(values: Tensor) -> Tensor:
    """Return float64 unchanged and other dtypes as float32, in which squares of large margins are finite."""
    return values if values.dtype == torch.float64 else values.float()


def _log_ratio(policy: Tensor, reference: Tensor | None) -> Tensor:
    if reference is None:
        raise ConfigError(
            "this preference loss needs log-probabilities under a reference model, but none were given; "
            "use --ref-mode cached, adapter_off or copy, or a loss without a reference (simpo, orpo, sft)"
        )
    return _wide(policy) - _wide(reference)


def _per_token(values: Tensor, tokens: Tensor) -> Tensor:
    return values / tokens.to(values.dtype).clamp(min=1.0)


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """Return the cross-entropy of preferences that are wrong with probability `label_smoothing`."""
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def sigmoid(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Return the DPO loss (arXiv 2305.18290, eq. 7), in its conservative form with label smoothing."""
    return _smoothed(beta * pairs.margin(), label_smoothing)


def robust(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Return the robust DPO loss (arXiv 2403.00409), unbiased for labels flipped with that probability.

    Raises:
        ConfigError: `label_smoothing` is 0.5 or more, where the loss has no value or favors the rejected answer.
    """
    if label_smoothing >= 0.5:
        raise ConfigError(f"--label-smoothing is {label_smoothing}; the robust loss needs less than 0.5")
    logits = beta * pairs.margin()
    clean, flipped = logsigmoid(logits), logsigmoid(-logits)
    return (label_smoothing * flipped - (1 - label_smoothing) * clean) / (1 - 2 * label_smoothing)


def hinge(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """Return the hinge loss of the margin (SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657)."""
    return relu(1 - beta * pairs.margin())


def ipo(pairs: Pairs, beta: float = 0.1, average: bool = True) -> Tensor:
    """Return the IPO loss (arXiv 2310.12036, eq. 17); beta is its tau.

    Args:
        pairs: the pairs.
        beta: the margin to reach is 1 / (2 beta).
        average: use log-ratios per token, as the authors ran it; False uses sums, as the paper prints it.
    """
    chosen, rejected = pairs.log_ratios()
    if average:
        chosen, rejected = _per_token(chosen, pairs.chosen_tokens), _per_token(rejected, pairs.rejected_tokens)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def sigmoid_norm(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Return the DPO loss of log-ratios per token, which does not reward longer answers."""
    chosen, rejected = pairs.log_ratios()
    margin = _per_token(chosen, pairs.chosen_tokens) - _per_token(rejected, pairs.rejected_tokens)
    return _smoothed(beta * margin, label_smoothing)


def simpo(pairs: Pairs, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Return the SimPO loss (arXiv 2405.14734, eq. 6), without a reference; gamma is the target margin."""
    chosen, rejected = pairs.means()
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(pairs: Pairs, weight: float = 0.1) -> Tensor:
    """Return the ORPO loss (arXiv 2403.07691, eq. 6): mean NLL plus `weight` times the odds-ratio term."""
    chosen, rejected = pairs.means()
    return -chosen - weight * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logps: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of log p."""
    # A certain answer has infinite odds; the nearest probability below 1 is used instead.
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    near_one = torch.log(-torch.expm1(logps))  # exact where p is near 1, the other form where p is small
    return logps - torch.where(logps > -math.log(2), near_one, torch.log1p(-torch.exp(logps)))


def bco_pair(pairs: Pairs, beta: float = 0.1, shift: float = 0.0) -> Tensor:
    """Return the BCO loss of both answers (arXiv 2404.04656); `shift` is subtracted from the rewards."""
    chosen, rejected = pairs.log_ratios()
    return -logsigmoid(beta * chosen - shift) - logsigmoid(shift - beta * rejected)


def mdpo(pairs: Pairs, beta: float = 0.1, anchor: float = 0.0) -> Tensor:
    """Return the mDPO loss (arXiv 2406.11839): response, image and anchor terms with equal weights.

    Raises:
        ConfigError: the pairs have no damaged image.
    """
    if pairs.negative is None:
        raise ConfigError("the mdpo loss needs a damaged image for each pair; set --image-negative")
    chosen, rejected = pairs.log_ratios()
    negative = _log_ratio(pairs.negative, pairs.ref_negative)
    return (
        -logsigmoid(beta * (chosen - rejected))
        - logsigmoid(beta * (chosen - negative))
        - logsigmoid(beta * chosen - anchor)
    )


def sft(pairs: Pairs) -> Tensor:
    """Return the negative log-likelihood of the chosen answer, a sum over its tokens."""
    # The objective divides it by the chosen tokens of the step, not by its pairs.
    return -_wide(pairs.chosen)


PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "sigmoid_norm": sigmoid_norm,
    "simpo": simpo,
    "orpo": orpo,
    "bco_pair": bco_pair,
    "mdpo": mdpo,
    "sft": sft,
}

WITHOUT_REFERENCE = frozenset({"simpo", "orpo", "sft"})
"""Losses that use the policy only."""


def kto(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return the KTO loss (arXiv 2402.01306, eq. 8) of single answers, [B].

    Args:
        logps: [B] log-probabilities of the answers under the policy.
        ref_logps: [B] the same under the reference.
        desirable: [B] bool, whether each answer is a good one.
        kl: estimated divergence of policy and reference, a scalar; negative estimates count as 0; no gradient.
        beta: strength of the reference.
        desirable_weight: weight of good answers.
        undesirable_weight: weight of bad answers.
    """
    rewards = _log_ratio(logps, ref_logps)
    margin = beta * (rewards - _wide(kl).detach().clamp(min=0.0))
    good, bad = desirable_weight * torch.sigmoid(-margin), undesirable_weight * torch.sigmoid(margin)
    return torch.where(desirable.bool(), good, bad)
