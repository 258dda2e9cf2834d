"""Settings of the symbolic reward, and its named presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Formula = Literal["mean", "sum", "chain", "acs"]
Mode = Literal["adjacent", "pairwise", "global"]
Gate = Literal["none", "multiply", "primary"]


@dataclass(frozen=True, slots=True)
class Consistency:
    """Bonus for answers that agree with each other.

    Attributes:
        mode: `adjacent` (neighbors in the asked order), `pairwise` (all pairs) or `global` (one valid path).
        weight: weight of the bonus.
        gate: `none`, `multiply` (by the mean correctness) or `primary` (only with a correct primary node).
    """

    mode: Mode = "global"
    weight: float = 0.5
    gate: Gate = "multiply"


@dataclass(frozen=True, slots=True)
class LengthPenalty:
    """Length penalty `weight * min(cap, max(0, |length - reference| - tolerance) / scale)`, in characters."""

    tolerance: float = 40.0
    scale: float = 100.0
    cap: float = 10.0
    weight: float = 0.1


@dataclass(frozen=True, slots=True)
class FormatPenalty:
    """Penalties (at most 0) of an answer without an end token, an empty one, and one that repeats itself.

    Attributes:
        repeat_n: words of an n-gram.
        repeat_max: occurrences of an n-gram that are allowed.
        repeat: penalty of more occurrences.
    """

    missing_eos: float = -0.5
    empty: float = -0.5
    repeat_n: int = 4
    repeat_max: int = 3
    repeat: float = -0.25


@dataclass(frozen=True, slots=True)
class RewardSettings:
    """Settings of the reward.

    Attributes:
        formula: `mean` of the terms, or a sum as the originals published it.
        correct: credit of the true value.
        wrong: credit of another value.
        no_match: credit of an answer without a value.
        abstain_wrong: credit of abstaining although the value can be determined.
        partial: whether confusable values earn their credit.
        void: whether an answer that is unfinished, empty or at the length cap counts as one without a value.
        balance: whether credits are multiplied by the inverse frequency of the true value, if priors are given.
    """

    formula: Formula = "mean"
    correct: float = 1.0
    wrong: float = 0.0
    no_match: float = -0.5
    abstain_wrong: float = 0.0
    partial: bool = True
    void: bool = True
    balance: bool = True
    consistency: Consistency = field(default_factory=Consistency)
    length: LengthPenalty = field(default_factory=LengthPenalty)
    format: FormatPenalty = field(default_factory=FormatPenalty)


DEFAULT = RewardSettings()

ORIGINAL = RewardSettings(
    formula="sum",
    partial=False,
    void=False,
    balance=False,
    consistency=Consistency(mode="adjacent", weight=1.0, gate="none"),
    length=LengthPenalty(weight=0.0),
    format=FormatPenalty(missing_eos=0.0, empty=0.0, repeat=0.0),
)
"""Reward of Dr-LLaVA as released in November 2024."""


def _like_original(formula: Formula, no_match: float) -> RewardSettings:
    return RewardSettings(
        formula=formula,
        no_match=no_match,
        partial=False,
        void=False,
        balance=False,
        consistency=ORIGINAL.consistency,
        length=ORIGINAL.length,
        format=ORIGINAL.format,
    )


PRESETS: dict[str, RewardSettings] = {
    "default": DEFAULT,
    "drllava-2024-11": ORIGINAL,
    "drllava-chain": _like_original("chain", -0.5),
    "drllava-acs": _like_original("acs", -1.0),
}
"""Settings by name; the last three reproduce Dr-LLaVA's rewards."""
