"""Loader of reinforcement learning: rolls out when the last rollout is used up, and saves its state.

    RolloutLoader --next--> a rollout, written to disk --> its updates, one `StepBatch` each

A checkpoint inside the updates of a rollout holds the rollout, so a resumed run samples nothing twice.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.data.collator import Collator, StepBatch
from llava.data.dataset import RowDataset
from llava.data.encode import Encoded, Unit, encode, follow_up
from llava.data.image_store import ImageIndex
from llava.errors import CheckpointError, ConfigError, DataError
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation, Sample
from llava.symbolic.structure import RuleSet
from llava.train.rollout.advantages import KlControl
from llava.train.rollout.cases import RolloutCase, interview, seed_of
from llava.train.rollout.episodes import RolloutEpisode, constant_nodes
from llava.train.rollout.rollout import Rollout
from llava.train.rollout_args import RolloutSpec
from llava.utils.jsonl import write_json

STATE_FILE = "rollout_state-{}.json"
"""File in a checkpoint with the position of one rank, and its sequences of a rollout that is not used up."""

MAX_EQUAL = 20
"""Rollouts in a row without any group with spread after which a run stops."""


logger = logging.getLogger(__name__)

NUM_DRAWN = 8
"""Dialogues of a case whose lengths are checked before training; orders and wordings are drawn for each rollout."""


class RolloutDataset(RowDataset[Encoded]):
    """Cases as rows: images by key, and dialogues with reference answers that replace missing rows.

    Args:
        cases: the cases.
        rules: the rules.
        processor: turns conversations into tokens and images into pixels.
        image_folder: folder that image names are relative to.

    Raises:
        ConfigError: answers of the processor's template do not end with a token, so dialogues cannot be continued.
        DataError: an image is missing or does not decode; the message names the row.
    """

    def __init__(
        self, cases: Sequence[RolloutCase], rules: RuleSet, processor: LlavaMedProcessor, *, image_folder: str | None
    ) -> None:
        follow_up("x", processor)  # check here, before minutes of preparation, instead of at the first rollout
        self.cases = cases
        self.rules = rules
        index = ImageIndex.open(image_folder, dicom=processor.dicom)
        broken = index.verify(list(dict.fromkeys(case.image for case in cases)))
        for case in cases:
            if case.image in broken:
                raise DataError(f"{case.origin}: {broken[case.image]}")
        super().__init__([_sample(case, rules) for case in cases], processor, index=index)
        for case in cases:  # later, images are found by the keys of sequences
            self.store.key(case.image)

    def __getitem__(self, row: int) -> Encoded:
        return self._encoded(row, self.samples[row].conversation)

    def drawn(self, row: int, styles: Sequence[str]) -> Iterator[tuple[Encoded, int]]:
        """Yield some dialogues about a case, as rollouts draw them, with their number of questions."""
        case = self.cases[row]
        for seed in range(1 if case.is_dialogue else NUM_DRAWN):
            asked = interview(case, self.rules, seed=seed, styles=styles)
            yield self._encoded(row, asked.answered), len(asked.questions)

    def _encoded(self, row: int, conversation: Conversation) -> Encoded:
        images = self.samples[row].images
        keys = [self.store.key(ref) for ref in images]
        return encode(conversation, self.processor, images=keys, sizes=self.store.sizes(images), max_length=None)


def _sample(case: RolloutCase, rules: RuleSet) -> Sample:
    return Sample(case.id, interview(case, rules, seed=0).answered, (case.image,), origin=case.origin)


def checked_lengths(dataset: RolloutDataset, spec: RolloutSpec, *, context: int) -> Sequence[RolloutCase]:
    """Return the cases whose first questions are no longer than `query_len`, as far as they were drawn.

    Raises:
        DataError: a dialogue may become longer than the context of the model, or no case is left.
    """
    kept = []
    for number, case in enumerate(dataset.cases):
        first = 0
        for encoded, num_turns in dataset.drawn(number, spec.styles):
            trained = [place for place, label in enumerate(encoded.labels) if label >= 0]
            asked = len(encoded.input_ids) - len(trained)
            if asked + num_turns * spec.response_len > context:
                raise DataError(
                    f"{case.origin}: {asked} tokens of questions and images and {num_turns} answers of up to "
                    f"{spec.response_len} tokens exceed the model's context of {context}; use a shorter --response-len "
                    "or fewer questions"
                )
            first = max(first, trained[0] - sum(stop - start for start, stop in encoded.image_spans))
        if not spec.query_len or first <= spec.query_len:
            kept.append(case)
    if num_long := len(dataset.cases) - len(kept):
        logger.warning("%d of %d cases have a longer first question than --query-len %d and are left out", num_long,
                       len(dataset.cases), spec.query_len)  # fmt: skip
    if not kept:
        raise DataError(f"every first question is longer than --query-len {spec.query_len}; raise it")
    return kept


@dataclass
class CaseOrder:
    """Endless case order, shuffled every epoch by the run's seed; `place` counts the cases used so far."""

    cases: Sequence[RolloutCase]
    seed: int
    place: int = 0
    _epoch: int = -1
    _order: list[int] = field(default_factory=list)

    def __call__(self) -> RolloutCase:
        """Return the next case."""
        epoch, index = divmod(self.place, len(self.cases))
        if epoch != self._epoch:
            self._order, self._epoch = list(range(len(self.cases))), epoch
            random.Random(seed_of(self.seed, "epoch", epoch)).shuffle(self._order)
        self.place += 1
        return self.cases[self._order[index]]


@dataclass(slots=True)
class _Position:
    """State of a loader: rollouts, updates of the last one, used cases, KL strength, spreadless rollouts."""

    rollout: int = 0
    update: int = 0
    place: int = 0
    kl_coef: float = 0.0
    num_equal: int = 0


class RolloutLoader:
    """Endless loader of updates; see `data.loader.Loader`.

    Args:
        make: makes the rollout of a step.
        order: order of the cases.
        collator: lays out the sequences of an update.
        spec: the algorithm and its sizes.
        seed: seed of the run.
        on_rollout: called with each rollout before it is learned from; writes it.
        rank: rank of this process.
        world_size: number of processes.
    """

    resumes_itself = True
    num_bad = 0

    def __init__(
        self,
        make: Callable[[int, Callable[[], RolloutCase], KlControl], Rollout],
        order: CaseOrder,
        collator: Collator,
        spec: RolloutSpec,
        *,
        seed: int,
        on_rollout: Callable[[Rollout, float], None],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.make = make
        self.order = order
        self.collator = collator
        self.spec = spec
        self.seed = seed
        self.on_rollout = on_rollout
        self.rank, self.world_size = rank, world_size
        self.control = KlControl(spec.kl_coef, target=spec.kl_target, horizon=spec.kl_horizon)
        self.position = _Position(kl_coef=spec.kl_coef)
        self.units: dict[int, Unit] = {}
        """Sequences of this rank that are learned from, by prompt."""

        self.num_groups = 0

    def __iter__(self) -> Iterator[StepBatch]:
        """Yield updates; a new rollout is made by the policy as it is then."""
        while True:
            if self.position.rollout == 0 or self.position.update >= self.spec.updates:
                self._roll_out()
            self.position.update += 1
            yield self._update(self.position.update - 1)

    def _roll_out(self) -> None:
        position = self.position
        coef = self.control.coef
        found = self.make(position.rollout + 1, self.order, self.control)
        self.on_rollout(found, coef)
        self._check_spread(found)
        self.position = _Position(found.step, 0, self.order.place, self.control.coef, self.position.num_equal)
        self.num_groups = found.num_groups
        dropped = {(episode.group, episode.sample) for episode in found.episodes if episode.dropped}
        units: dict[int, list[Encoded]] = {}
        for (group, sample), encoded in sorted(found.own.items(), key=lambda item: item[0]):
            if (group, sample) not in dropped:
                units.setdefault(group, []).append(encoded)
        self.units = {group: tuple(members) for group, members in units.items()}

    def _check_spread(self, found: Rollout) -> None:
        """Stop after many rollouts in which every group has equal rewards.

        Raises:
            DataError: nothing can be learned; the message names the nodes whose answers never differ.
        """
        has_any = any(not episode.dropped for episode in found.episodes)
        self.position.num_equal = 0 if has_any else self.position.num_equal + 1
        if self.position.num_equal >= MAX_EQUAL:
            raise DataError(
                f"step {found.step}: in {MAX_EQUAL} rollouts in a row all dialogues of every group earned the same, so "
                f"nothing can be learned; {_constant_text(found.episodes)}. Raise --temperature, "
                "start from a less trained model, or ask about nodes that vary"
            )

    def _update(self, number: int) -> StepBatch:
        """Return one update of the last rollout: a part of its prompts, the same on every number of ranks."""
        epoch, part = divmod(number, self.spec.parts)
        order = list(range(self.num_groups))
        if self.spec.parts > 1:
            random.Random(seed_of(self.seed, self.position.rollout, "updates", epoch)).shuffle(order)
        start, stop = (len(order) * k // self.spec.parts for k in (part, part + 1))
        groups = sorted(group for group in order[start:stop] if group in self.units)
        units = [self.units[group] for group in groups]
        sequences = [sequence for unit in units for sequence in unit]
        images: Mapping[str, Tensor] = self.collator.dataset.images_for(sequences) if units else {}
        size = max(1, (self.spec.row_batch or len(sequences) or 1) // self.spec.group_size)
        parts = [units[first : first + size] for first in range(0, len(units), size)]
        rows = [row for some in parts for row in self.collator.rows(some, images, self.collator.max_tokens_per_row)]
        return StepBatch(units, images, rows, [])

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the order of the cases has its own epochs."""

    def __len__(self) -> int:
        raise TypeError("a loader of rollouts has no length; set the number of steps")

    def save(self, folder: Path) -> None:
        """Write the position of this rank, and its sequences of a rollout that is not used up."""
        is_open = self.position.update < self.spec.updates
        units = {str(group): [asdict(encoded) for encoded in unit] for group, unit in self.units.items()}
        content = {
            "ranks": self.world_size,
            **asdict(self.position),
            "num_groups": self.num_groups,
            "units": units if is_open else {},
        }
        write_json(folder / STATE_FILE.format(self.rank), content)

    def restore(self, folder: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            CheckpointError: the file is missing or broken.
            ConfigError: it was written with another number of ranks.
        """
        path = folder / STATE_FILE.format(self.rank)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = list(asdict(self.position))
            position = _Position(**{name: content[name] for name in names})
            units = {int(group): tuple(map(_encoded, unit)) for group, unit in content["units"].items()}
            num_groups, ranks = int(content["num_groups"]), int(content["ranks"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} does not hold the position of a run ({error}); remove this checkpoint to resume from an "
                "earlier one, or start over with --overwrite-output-dir"
            ) from error
        if ranks != self.world_size:
            raise ConfigError(
                f"{folder} was written by {ranks} processes, this run has {self.world_size}; resume with as many"
            )
        self.position, self.units, self.num_groups = position, units, num_groups
        self.order.place, self.control.coef = position.place, position.kl_coef


def _constant_text(episodes: Sequence[RolloutEpisode]) -> str:
    found = constant_nodes(episodes)
    if not found:
        return "the answers differ, but not their rewards"
    return "answers never differ in " + "; ".join(f"{node} ({values})" for node, values in found.items())


def _encoded(value: Mapping[str, Any]) -> Encoded:
    """Return the sequence that `asdict` made JSON of."""
    fixed: dict[str, Any] = {name: tuple(value[name]) for name in ("input_ids", "labels", "turns", "images")}
    pairs: dict[str, Any] = {
        name: tuple((int(a), int(b)) for a, b in value[name]) for name in ("image_spans", "image_sizes")
    }
    columns = {str(name): tuple(map(float, numbers)) for name, numbers in value["columns"].items()}
    others = {name: value[name] for name in ("num_cut", "source", "weight", "numbers")}
    return Encoded(**fixed, **pairs, columns=columns, **others)
