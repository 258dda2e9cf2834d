"""Recorded preference training of the original: every quantity is compared, and a changed number is seen."""

from __future__ import annotations

from pathlib import Path

from benchmarks.fidelity import __main__, preferences
from benchmarks.fidelity.folder import Oracle

FILES = ("dpo.json", "dpo.npz", "dpo_metrics.json")


def test_every_quantity_is_the_recorded_one(shared: Path) -> None:
    oracle = Oracle(shared / "oracles" / "stllava-med")
    lines = {line.quantity: line for name in FILES for line in __main__.CHECKS[name](oracle)}
    assert len(lines) == 10 and {line.status for line in lines.values()} == {"ok"}, lines
    assert lines["dpo gradients"].count == 33 and lines["dpo metrics"].count == 8
    metrics = oracle.json("dpo_metrics.json")
    metrics["loss"] += 1e-3
    metrics["metrics"]["rewards/margins"] += 1e-2
    metrics["grad_norms"]["lm_head.weight"] *= 1.01
    oracle.arrays("dpo.npz")["ref_chosen_logps_as_published"][0] += 0.1
    again = [line for check in (preferences.log_probabilities, preferences.step) for line in check(oracle)]
    failed = {line.quantity for line in again if line.status == "FAIL"}
    assert failed == {"dpo ref_*_logps_as_published", "dpo loss", "dpo metrics", "dpo gradients"}


def test_the_two_forms_of_the_reference_differ(shared: Path) -> None:
    recorded = preferences.recorded_pairs(Oracle(shared / "oracles" / "stllava-med"))
    own = recorded.sums(recorded.reference.model)
    assert float((recorded.published() - own).abs().max()) > 1
