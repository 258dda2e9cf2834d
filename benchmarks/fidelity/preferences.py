"""Recorded preference training: rows, log-probabilities in both forms of the reference, losses, metrics, gradients.

The original's reference receives the embeddings of the policy (`--compat policy_reference_inputs`); the record has the
values with the reference's own embeddings too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks.fidelity.folder import IMAGE_MARK, Differences, Line, MissingWeightsError, Oracle, mismatches, within
from benchmarks.fidelity.numbers import GRADIENT_TOLERANCE, LOSS_TOLERANCE, TINY
from benchmarks.fidelity.recorded_weights import current_name
from llava.data.encode import Encoded
from llava.data.flat_batch import FlatBatch, flatten
from llava.data.preference import PreferenceDataset, read_preferences
from llava.model.builder import LoadedModel
from llava.model.checkpoint.load import load_checkpoint
from llava.model.lora import freeze_for
from llava.train.objectives.pairs import PairLoss, PairLossSpec
from llava.train.preference import share_inputs
from llava.train.reference import sequence_logprobs

POLICY, REFERENCE, LENGTH = "out/dpo_policy", "out/full", 640
"""Folders of the recorded models, and the maximum length of rows."""

SUM_TOLERANCE = 1e-4
"""Tolerance of sums of log-probabilities, which are up to 270 and recorded in float32."""

SIDES = ("chosen", "rejected")
SHORT = {"chosen": "chosen", "rejected": "reject"}
"""Names of the sides in arrays of tokens."""

OVER_PADDING = ("logits/chosen", "logits/rejected")
"""Metrics that are means over padding too, which this package does not compute."""

OUR_METRICS = {"policy_logps": "logps", "rewards": "rewards"}


@dataclass(frozen=True)
class Recorded:
    """Recorded pairs with the models of the record."""

    policy: LoadedModel
    reference: LoadedModel
    dataset: PreferenceDataset
    batch: FlatBatch

    @property
    def token(self) -> int:
        return self.policy.processor.image_token_id

    def published(self) -> Tensor:
        """Return the log-probabilities [N, 2] under the reference that sees the policy's embeddings."""
        network = copy.deepcopy(self.reference.model)
        share_inputs(network, self.policy.model)
        return self.sums(network)

    @torch.no_grad()
    def sums(self, network: Any) -> Tensor:
        """Return the log-probabilities [N, 2] of both sides under a network."""
        return sequence_logprobs(network, self.batch, without=self.token).view(-1, 2)


def recorded_pairs(oracle: Oracle) -> Recorded:
    """Return the pairs and models of the record.

    Raises:
        MissingWeightsError: a model has no weights.
    """
    if "dpo models" not in oracle.contents:
        found = {}
        for name in (POLICY, REFERENCE):
            if not (oracle.path / name / "pytorch_model.bin").is_file():
                raise MissingWeightsError(f"{name} holds no weights (expected pytorch_model.bin)")
            found[name] = load_checkpoint(
                oracle.path / name,
                base=str(oracle.path / "base_llm"),
                vision_tower=str(oracle.path / "vision_tower"),
                template="v1",
                dtype=torch.float32,
            )
        policy = found[POLICY]
        pairs = read_preferences(oracle.path / "dpo.json")
        folder = oracle.path / "images"
        dataset = PreferenceDataset(pairs, policy.processor, image_folder=folder, max_length=LENGTH)
        sequences = [sequence for row in range(len(dataset)) for sequence in dataset[row]]
        images, token = dataset.images_for(sequences), policy.processor.image_token_id
        batch = flatten(sequences, images, image_token_id=token, unit_sizes=[2] * len(dataset))
        oracle.contents["dpo models"] = Recorded(policy, found[REFERENCE], dataset, batch)
    made: Recorded = oracle.contents["dpo models"]
    return made


def rows(oracle: Oracle) -> Iterator[Line]:
    """Compare ids and labels of both sides of every pair in `dpo.json` with the recorded batch."""
    recorded, arrays = recorded_pairs(oracle), oracle.arrays("dpo.npz")
    wrong: dict[str, list[str]] = {"token ids": [], "labels": []}
    for row in range(len(recorded.dataset)):
        for side, encoded in zip(SIDES, recorded.dataset[row], strict=True):
            mask = arrays[f"{SHORT[side]}_attention_mask"][row]
            ids, labels = _original_form(encoded)
            theirs = [arrays[f"{SHORT[side]}_{name}"][row][mask].tolist() for name in ("input_ids", "labels")]
            name = f"{recorded.dataset.preferences[row].id} {side}"
            wrong["token ids"] += [] if ids == theirs[0] else [name]
            wrong["labels"] += [] if labels == theirs[1] else [name]
    num = 2 * len(recorded.dataset)
    for quantity, names in wrong.items():
        yield mismatches(f"pairs {quantity}", names, f"{num} sides", count=num)


def _original_form(encoded: Encoded) -> tuple[list[int], list[int]]:
    """Return ids and labels in which each image is one mark, as the original holds them."""
    starts = {start for start, _ in encoded.image_spans}
    inside = {place for start, stop in encoded.image_spans for place in range(start, stop)}
    kept = [place for place in range(len(encoded.input_ids)) if place not in inside or place in starts]
    ids = [IMAGE_MARK if place in starts else encoded.input_ids[place] for place in kept]
    return ids, [encoded.labels[place] for place in kept]


def log_probabilities(oracle: Oracle) -> Iterator[Line]:
    """Compare `dpo.npz`: log-probabilities of policy and reference, and the loss of every pair."""
    recorded, arrays = recorded_pairs(oracle), oracle.arrays("dpo.npz")
    beta = float(oracle.json("dpo_metrics.json")["beta"])
    policy = recorded.sums(recorded.policy.model)
    published = recorded.published()
    values = {
        "policy_{}_logps": policy,
        "ref_{}_logps_own_embeddings": recorded.sums(recorded.reference.model),
        "ref_{}_logps_as_published": published,
    }
    for pattern, ours in values.items():
        found = Differences()
        for side, name in enumerate(SIDES):
            found.add(ours[:, side].numpy(), arrays[pattern.format(name)])
        yield found.line(f"dpo {pattern.format('*')}", SUM_TOLERANCE)
    margins = {"losses": policy - published, "losses_reference_free": policy}
    for name, ratios in margins.items():
        found = Differences()
        found.add((-logsigmoid(beta * (ratios[:, 0] - ratios[:, 1]))).numpy(), arrays[name])
        yield found.line(f"dpo {name}", 4 * beta * SUM_TOLERANCE)


def step(oracle: Oracle) -> Iterator[Line]:
    """Compare `dpo_metrics.json`: loss, metrics and gradient norms of one step with the published reference."""
    recorded, stated = recorded_pairs(oracle), oracle.json("dpo_metrics.json")
    ids = [pair.id for pair in recorded.dataset.preferences]
    if stated["rows"] != ids:
        raise LookupError(f"the step has rows {stated['rows']}, expected {ids}")
    published = recorded.published()
    network = recorded.policy.model
    freeze_for(network)
    objective = PairLoss(
        PairLossSpec(beta=stated["beta"]), reference=lambda batch: published.view(-1), without=recorded.token
    )
    output = objective(network, recorded.batch, num_items=objective.count(recorded.batch))
    output.loss.backward()
    loss = abs(float(output.loss.detach()) - stated["loss"])
    yield within("dpo loss", loss, LOSS_TOLERANCE, "the mean over the pairs")
    means = {name: float(total / count) for name, (total, count) in output.metrics.items()}
    yield _metrics(stated["metrics"], means, published)
    norms = {name: float(p.grad.norm()) for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    network.requires_grad_(False)
    found = Differences()
    for old, norm in stated["grad_norms"].items():
        found.add(norms.get(current_name(old), 0.0) / max(norm, TINY), norm / max(norm, TINY))
    yield found.line("dpo gradients", GRADIENT_TOLERANCE, "norms, relative")


def _metrics(theirs: dict[str, float], ours: dict[str, float], published: Tensor) -> Line:
    """Return the line of the recorded metrics, except those over padding."""
    found = Differences()
    for name, value in theirs.items():
        kind, _, side = name.partition("/")
        if name in OVER_PADDING:
            continue
        if kind == "referece_logps":  # as the original spells it
            mine = float(published[:, SIDES.index(side)].mean())
        else:
            mine = ours[f"{OUR_METRICS[kind]}/{side}"]
        found.add(np.asarray([mine]), np.asarray([value]))
    note = f"{found.num_compared} metrics; not computed: {', '.join(OVER_PADDING)}, means over padding"
    return within("dpo metrics", found.largest, SUM_TOLERANCE, note, count=found.num_compared)
