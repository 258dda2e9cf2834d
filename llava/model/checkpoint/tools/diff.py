"""Compare two checkpoints by tensors under our names and by settings (`llava checkpoint diff A B`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava.model.checkpoint.files.shards import TensorReader
from llava.model.checkpoint.formats import Checkpoint, our_name
from llava.model.checkpoint.tools.inspection import local_path
from llava.model.checkpoint.weight_names import TIMM_TOWER, TOWER, is_buffer
from llava.utils.cli import Parser
from llava.utils.faults import sensible
from llava.utils.terminal import visible, write_out

if TYPE_CHECKING:
    from torch import Tensor

IGNORED_KEYS = frozenset({"transformers_version", "_name_or_path"})


@dataclass(frozen=True, slots=True)
class Difference:
    """Name of a tensor or setting that differs, and how."""

    name: str
    how: str


class CheckpointWeights:
    """Tensors of every file of a checkpoint under our names, without computed tables.

    A tower's adapter in its own folder counts as part of the adapter around it, as in our format; copies of it among
    the language model's (STLLaVA-Med) are ignored. A tower under timm's names is renamed to ours.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        entries = {**checkpoint.extra, **checkpoint.tensors}
        self._files = {our_name(checkpoint, name) or name: name for name in entries if not is_buffer(name)}
        if (tower := checkpoint.tower) is not None:
            entries |= tower.tensors
            self._files |= {our_name(tower, name) or name: name for name in tower.tensors}
        self._reader = TensorReader(entries)
        self._split: dict[str, Tensor] = {}
        if checkpoint.has_timm_tower:
            self._split_tower()

    def _split_tower(self) -> None:
        from llava.model.checkpoint.legacy.load import timm_tower

        fused = {ours: name for ours, name in self._files.items() if name.startswith(TIMM_TOWER)}
        self._files = {ours: name for ours, name in self._files.items() if ours not in fused}
        self._split = timm_tower({TOWER + n.removeprefix(TIMM_TOWER): self._reader.read(n) for n in fused.values()})

    @property
    def names(self) -> set[str]:
        """Our names of all tensors."""
        return {*self._files, *self._split}

    def read(self, name: str) -> Tensor:
        """Return one tensor by our name; it must not be modified."""
        return self._split[name] if name in self._split else self._reader.read(self._files[name])


def differences(ours: CheckpointWeights, theirs: CheckpointWeights) -> Iterator[Difference]:
    """Yield the tensors that only one checkpoint has, or whose shape, dtype or values differ."""
    for name in sorted(ours.names | theirs.names):
        if name not in theirs.names:
            yield Difference(name, "only in the first")
        elif name not in ours.names:
            yield Difference(name, "only in the second")
        elif how := _compare(ours.read(name), theirs.read(name)):
            yield Difference(name, how)


def _compare(first: Tensor, second: Tensor) -> str | None:
    """Return how two tensors of one name differ, or None."""
    import torch

    if first.shape != second.shape:
        return f"shape {tuple(first.shape)} and {tuple(second.shape)}"
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in (first, second)]
    note = "" if first.dtype == second.dtype else " and ".join(dtypes)
    if torch.equal(first.to(second.dtype), second) and torch.equal(second.to(first.dtype), first):
        return f"{note}, equal values" if note else None
    gap = (first.double() - second.double()).abs()
    return f"{note + ', ' if note else ''}largest difference {float(gap.max()):.3g}, mean {float(gap.mean()):.3g}"


def _settings(first: dict[str, Any], second: dict[str, Any]) -> Iterator[Difference]:
    for key in sorted((set(first) | set(second)) - IGNORED_KEYS):
        if first.get(key) != second.get(key):
            yield Difference(f"config.json: {key}", f"{_short(first.get(key))} and {_short(second.get(key))}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava checkpoint diff`; the exit status is 1 when tensors differ."""
    parser = Parser(
        prog="llava checkpoint diff", description="Compare two checkpoints; exit status 1 if a tensor differs."
    )
    parser.add_argument("first", help="checkpoint folder, weight file or hub name, of any format")
    parser.add_argument("second", help="the one it is compared with")
    args = parser.parse_args(argv)
    first, second = (Checkpoint.open(local_path(name)) for name in (args.first, args.second))
    with sensible(f"{args.first} or {args.second}", "compared"):
        ours, theirs = CheckpointWeights(first), CheckpointWeights(second)
        tensors = list(differences(ours, theirs))
        settings = list(_settings(first.config, second.config))
    for difference in (*tensors, *settings):
        write_out(visible(f"{difference.name}: {difference.how}") + "\n")
    total = len(ours.names | theirs.names)
    write_out(f"{total - len(tensors)} of {total} tensors are equal\n")
    if tensors:
        raise SystemExit(1)
