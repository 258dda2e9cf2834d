"""`llava data split`: train, val and test splits that share no patient, or no image.

    rows --keys (patient, image)--> groups --hash of group and seed--> split of the whole group --> OUT/train.json ...

Without --stratify the split of a group depends on its name, the seed and the fractions only, so rows added later do not
move other groups. With --stratify FIELD the groups of each value of that field are ordered by hash and assigned by
number of rows. This keeps the fractions accurate in small datasets, but rows added later may move groups.

Rows are not changed, except that NaN, which is not valid JSON, becomes null. Images are not moved.

Command:
    llava data split all.json --by patient --fractions train=0.8,val=0.1,test=0.1 --out data/split
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.data.converters.output import MANIFEST, read_manifest, remove_splits, split_hash
from llava.data.converters.tables import json_rows, to_json_value
from llava.data.groups import UnionFind, image_name_key, is_known_name, most_frequent, written_name
from llava.errors import ConfigError, DataError
from llava.imaging.decode import content_digest, read_image_bytes
from llava.samples import row_images
from llava.utils import log
from llava.utils.cli import Parser, check_folder
from llava.utils.jsonl import file_text, open_atomic, write_json
from llava.utils.provenance import provenance_fields
from llava.utils.terminal import write_out


def unit_hash(group: str, *, seed: int) -> float:
    """Return a hash of group and seed as a number in [0, 1)."""
    digest = hashlib.sha256(f"{seed}\n{group}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def split_of(group: str, fractions: Mapping[str, float], *, seed: int) -> str:
    """Return the split of a group by its hash; `fractions` sum to 1."""
    return split_at(unit_hash(group, seed=seed), fractions)


def split_at(position: float, fractions: Mapping[str, float]) -> str:
    """Return the split whose interval of [0, 1) contains a position; intervals are in the order given."""
    upper, last = 0.0, ""
    for split, share in fractions.items():
        upper += share
        last = split if share > 0 else last
        if position < upper:
            return split
    return last  # rounding: the fractions may sum to slightly less than 1


def parse_fractions(text: str) -> dict[str, float]:
    """Parse `train=0.8,val=0.1,test=0.1` to a fraction by split.

    Raises:
        ConfigError: the text is malformed, a name repeats, a fraction is not in [0, 1], or the sum is not 1.
    """
    fractions: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        name = name.strip()
        if not equals or not name.isidentifier() or not 0 <= share <= 1 or name in fractions:
            raise ConfigError(
                f"--fractions: got {text!r}, expected distinct names with fractions: train=0.8,val=0.1,test=0.1"
            )
        fractions[name] = share
    if not math.isclose(sum(fractions.values()), 1.0, abs_tol=1e-6):
        raise ConfigError(f"--fractions: {text!r} sum to {sum(fractions.values()):g}, expected 1")
    return fractions


SPLIT_KEYS = ("patient", "image")
MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class SplitOptions:
    """Settings of a split.

    Attributes:
        by: what two splits must not share: one or both of `SPLIT_KEYS`.
        fractions: fraction of each split.
        seed: seed of the hash.
        key: field with the patient id.
        stratify: field whose values are distributed evenly; None for none.
        image_folder: folder of the images, which are then compared by their bytes; None compares their names
            as paths.
    """

    by: tuple[str, ...]
    fractions: Mapping[str, float]
    seed: int = 0
    key: str = "patient"
    stratify: str | None = None
    image_folder: str | None = None


def split_rows(rows: Sequence[Mapping[str, Any]], options: SplitOptions, *, name: str = "rows") -> list[str]:
    """Return the split of each row.

    Raises:
        DataError: a row lacks the key or the field to stratify; the message names the first such rows of `name`.
        ConfigError: a split with a fraction above 0 would be empty.
    """
    keys = _keys(rows, options, name)
    groups = UnionFind()
    for row_keys in keys:
        groups.join(row_keys)
    names = [groups.group(row_keys[0]) for row_keys in keys]
    if options.stratify is None:
        assigned = {group: split_of(group, options.fractions, seed=options.seed) for group in dict.fromkeys(names)}
    else:
        assigned = _stratified(rows, names, options, name)
    empty = [split for split, share in options.fractions.items() if share > 0 and split not in assigned.values()]
    if empty:
        raise ConfigError(
            f"--fractions: {', '.join(empty)} would be empty, as the rows form only {len(assigned)} groups; "
            "change --fractions or --seed, or pass --stratify"
        )
    return [assigned[group] for group in names]


def _keys(rows: Sequence[Mapping[str, Any]], options: SplitOptions, name: str) -> list[list[str]]:
    """Return the keys of each row; rows with a common key must be in the same split.

    Raises:
        DataError: rows have no key.
    """
    digests: dict[str, str] = {}
    keys: list[list[str]] = []
    lacking: list[int] = []
    for number, row in enumerate(rows):
        found: list[str] = []
        if "patient" in options.by:
            patient = written_name(row.get(options.key))
            found += [f"patient {patient}"] if patient and is_known_name(patient) else []
        if "image" in options.by:
            try:
                names = row_images(row)
                found += [f"image {key}" for ref in names for key in _identities(ref, options.image_folder, digests)]
            except DataError as error:
                raise DataError(f"{name}, row {number}: {error}") from error
        if not all(any(key.startswith(f"{way} ") for key in found) for way in options.by):
            lacking.append(number)
        keys.append(found)
    if lacking:
        fields = " or ".join(repr({"patient": options.key, "image": "image"}[way]) for way in options.by)
        first = ", ".join(map(str, lacking[:MAX_NAMED]))
        raise DataError(
            f"{name}: {len(lacking)} of {len(rows)} rows have no {fields}, for example row {first}. Without it, "
            "one patient could be in two splits. Add the field, set another one with --key, or remove the rows"
        )
    return keys


def _identities(ref: str, folder: str | None, known: dict[str, str]) -> tuple[str, ...]:
    """Return the digest of an image if its folder is known, else its name in the first spelling seen."""
    if folder is None:
        # A group is named after its smallest spelling, so that names of one spelling keep the split they have.
        return ref, known.setdefault(image_name_key(ref), ref)
    if ref not in known:
        known[ref] = content_digest(read_image_bytes(ref, folder))
    return (known[ref],)


def _stratified(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], options: SplitOptions, name: str
) -> dict[str, str]:
    """Return the split of each group, assigned by number of rows within each value of the field."""
    values: dict[str, list[str]] = {}
    for number, (row, group) in enumerate(zip(rows, names, strict=True)):
        value = row.get(str(options.stratify))
        if not isinstance(value, str | int) or value == "":
            raise DataError(f"{name}, row {number}: no text or integer in the field {options.stratify!r} of --stratify")
        values.setdefault(group, []).append(str(value))
    strata: dict[str, list[str]] = {}
    for group, group_values in values.items():
        strata.setdefault(str(most_frequent(group_values)), []).append(group)
    assigned: dict[str, str] = {}
    for groups in strata.values():
        ordered = sorted(groups, key=lambda group: (unit_hash(group, seed=options.seed), group))
        total = sum(len(values[group]) for group in ordered)
        before = 0
        for group in ordered:
            middle = (before + len(values[group]) / 2) / total
            assigned[group] = split_at(middle, options.fractions)
            before += len(values[group])
    return assigned


def read_rows(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of all files in order.

    Raises:
        DataError: a file or row cannot be read.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        for number, row in log.with_progress(json_rows(path), title=f"reading {Path(path).name}", unit="row"):
            if isinstance(row, DataError):
                raise DataError(f"{path}, row {number}: {row}")
            rows.append(row)
    if not rows:
        raise DataError(f"{', '.join(paths)}: no rows")
    return rows


def write_splits(out: Path, rows: Sequence[dict[str, Any]], places: Sequence[str], facts: Mapping[str, Any]) -> str:
    """Write one file per split, then the manifest; return a summary."""
    lines = [f"{'split':8}{'rows':>9}{'fraction':>10}  sha256 of the sorted ids"]
    splits: dict[str, dict[str, Any]] = {}
    for split in facts["fractions"]:
        chosen = [row for row, place in zip(rows, places, strict=True) if place == split]
        if not chosen:
            continue
        with open_atomic(out / f"{split}.json") as stream:
            stream.writelines(file_text(map(to_json_value, chosen)))  # unchanged, but NaN is not valid JSON
        identity = split_hash(str(row.get("id", "")) for row in chosen)
        splits[split] = {"rows": len(chosen), "ids_sha256": identity}
        lines.append(f"{split:8}{len(chosen):>9,}{len(chosen) / len(rows):>10.1%}  {identity}")
    write_json(out / MANIFEST, {**facts, "splits": splits})
    return "\n".join(lines) + "\n"


def _old_splits(out: Path) -> set[str]:
    """Return the splits in the manifest of an earlier output."""
    old = (read_manifest(out) or {}).get("splits")
    return {split for split in old if split.isidentifier()} if isinstance(old, dict) else set()


def make_parser() -> Parser:
    """Return the parser of `llava data split`."""
    parser = Parser(
        prog="llava data split",
        description="Split rows into train, val and test so that no two splits share a patient, or an image.",
    )
    parser.add_argument("files", nargs="+", help="files of rows in LLaVA format")
    parser.add_argument("--by", nargs="+", choices=SPLIT_KEYS, required=True, help="what two splits must not share")
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument("--fractions", default="train=0.8,val=0.1,test=0.1", help="fraction of each split")
    parser.add_argument("--seed", type=int, default=0, help="seed of the assignment of groups to splits")
    parser.add_argument("--key", default="patient", help="field with the patient id")
    parser.add_argument("--stratify", help="field whose values are distributed evenly over the splits")
    parser.add_argument("--image_folder", help="image folder: compare images by their bytes instead of their names")
    parser.add_switch("--overwrite", help="replace existing split files")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data split`.

    Raises:
        ConfigError: the options are inconsistent, or files would be replaced.
        DataError: a row cannot be used.
    """
    log.setup_logging()
    args = make_parser().parse_args(argv)
    check_folder(args.image_folder, "--image-folder")
    fractions = parse_fractions(args.fractions)
    out = Path(args.out)
    existing = [name for name in (*(f"{split}.json" for split in fractions), MANIFEST) if (out / name).exists()]
    if existing and not args.overwrite:
        raise ConfigError(f"{out} already contains {', '.join(existing)}; choose another --out or pass --overwrite")
    replaced = {(out / f"{split}.json").resolve() for split in fractions}
    if own := [path for path in args.files if Path(path).resolve() in replaced]:
        raise ConfigError(f"--out {out} would replace the input {own[0]}; choose another --out")
    rows = read_rows(args.files)
    by = tuple(way for way in SPLIT_KEYS if way in args.by)
    options = SplitOptions(by, fractions, args.seed, args.key, args.stratify, args.image_folder)
    places = split_rows(rows, options, name=", ".join(args.files))
    facts = {
        "by": list(by),
        "key": args.key if "patient" in by else None,
        "fractions": fractions,
        "seed": args.seed,
        "stratify": args.stratify,
        "made_by": provenance_fields(
            data={Path(path).name: path for path in args.files}, command=["llava", "data", "split"]
        ),
    }
    remove_splits(out, _old_splits(out) - set(places))
    write_out(write_splits(out, rows, places, facts))
