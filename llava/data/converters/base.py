"""What every dataset command does around its reader: flags, sources, progress, checks, summary.

    argv --> Sources + Output --> for event in read(job): output.add(event) --> files, manifest --> summary

A finished folder with the same settings is left as it is; one with other settings is refused without --overwrite.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.data.converters.dataset_cards import DatasetCard, SplitSize
from llava.data.converters.items import SPLITS, Event
from llava.data.converters.output import MANIFEST, PLACEMENTS, ConverterOutput, read_manifest, remove_splits
from llava.data.converters.sources import Sources
from llava.errors import ConfigError, DataError
from llava.imaging.decode import content_digest
from llava.utils import log
from llava.utils.cli import Parser
from llava.utils.provenance import stamp

logger = logging.getLogger(__name__)

UNPACKED = ".unpacked_archives"
UNFINISHED = ".unfinished"
NOT_SETTINGS = ("out", "overwrite", "expect")
"""Flags that do not change what is written."""


@dataclass(slots=True)
class Job:
    """What a reader works with; it fills in `variant` and `inputs`.

    Attributes:
        sources: what the user gave.
        args: the command's flags.
        is_full: whether enough rows of a split are written.
        card: the data set.
        variant: which published form was found: key into the card's sizes.
        inputs: annotation files that were read, by name.
        facts: anything else for the manifest.
    """

    sources: Sources
    args: argparse.Namespace
    is_full: Callable[[str], bool]
    card: DatasetCard
    variant: str = ""
    inputs: dict[str, Path] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def require_file(self, *names: str) -> Path:
        """Return one of these files, and note it as an input.

        Raises:
            DataError: none is there; says how to get the data set.
        """
        path = self.sources.file(*names)
        if path is None:
            raise DataError(self.missing(" or ".join(names)))
        self.inputs[path.name] = path
        return path

    def missing(self, what: str) -> str:
        """Return the message that something is not in what the user gave."""
        where = ", ".join(str(path) for path in [*self.sources.roots, *self.sources.files])
        return f"{where}: no {what} there.\nHow to get {self.card.name} ({self.card.homepage}): {self.card.how_to_get}"


@dataclass(frozen=True, slots=True)
class Converter:
    """A dataset command.

    Attributes:
        command: its name, as in `llava data COMMAND`.
        card: what is known about the data set.
        read: yields what it finds.
        add_options: adds the command's own flags.
        example: one line for its help.
    """

    command: str
    card: DatasetCard
    read_events: Callable[[Job], Iterator[Event]]
    add_options: Callable[[Parser], None] = lambda parser: None
    example: str = ""


def make_parser(reader: Converter) -> Parser:
    """Return the parser of a dataset command."""
    card = reader.card
    parser = Parser(
        prog=f"llava data {reader.command}",
        description=f"{card.name} to train.json, test.json and images/. Licence: {card.license}. "
        f"Where from: {card.homepage}. {card.how_to_get}",
        epilog=f"example: {reader.example}",
    )
    parser.add_argument("paths", nargs="+", help="folders, archives or files as downloaded")
    add_output_options(parser)
    reader.add_options(parser)
    return parser


def add_output_options(parser: Parser) -> None:
    """Add the flags that say where rows and pictures go."""
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--images", choices=PLACEMENTS, default="link", help="pictures: second names of the files, or copies"
    )
    parser.add_argument("--limit", type=int, help="write at most this many rows of each split")
    parser.add_switch("--skip_bad", help="leave rows out that cannot be used, and list them in skipped.jsonl")
    parser.add_switch("--overwrite", help="write a folder again that was made with other settings")
    parser.add_argument("--expect", help="manifest of an earlier output: its splits must have the same ids")


def run_converter(reader: Converter, argv: Sequence[str] | None = None) -> None:
    """Run a dataset command: parse its flags, write the folder, print a summary.

    Raises:
        DataError: a file or row cannot be used.
        ConfigError: the flags or the folder do not fit.
    """
    run_with_args(reader, make_parser(reader).parse_args(argv))


def run_with_args(reader: Converter, args: argparse.Namespace) -> None:
    """Do what `run` does, with flags that are parsed."""
    log.setup()
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {args.limit}")
    expected = _expected(args.expect)
    out = Path(args.out)
    settings = _settings(reader, args)
    _check_place(out, args.paths, overwrite=args.overwrite)
    old = _finished(out, settings, overwrite=args.overwrite)
    if old is not None:
        _compare(old, expected)
        sys.stdout.write(
            f"{out} is finished already, with the same settings; --overwrite makes it anew, for example when what was "
            f"downloaded has changed\n{manifest_summary(old)}"
        )
        return
    _begin(out)
    sources = Sources(args.paths, out / UNPACKED)
    with ConverterOutput(out, images=args.images, limit=args.limit, skip_bad=args.skip_bad) as output:
        job = Job(sources, args, output.is_full, reader.card)
        for event in log.progress(reader.read_events(job), title=f"reading {reader.card.name}", unit="row"):
            output.add(event)
        remove_splits(out, {*SPLITS} - {split for split, count in output.counts.items() if count.ids})
        manifest = output.finish(_facts(reader.card, job, settings, output))
    shutil.rmtree(out / UNPACKED, ignore_errors=True)
    (out / UNFINISHED).unlink(missing_ok=True)
    for line in manifest["differs"]:
        logger.warning("%s", line)
    sys.stdout.write(manifest_summary(manifest))
    _compare(manifest, expected)


def _settings(reader: Converter, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the output depends on, in the form in which JSON gives it back.

    Where things lie on this machine is nobody's business elsewhere: of the places only names and a hash are kept.
    """
    chosen = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    places = json.dumps([os.path.realpath(path) for path in (*args.paths, chosen.pop("image_root", ""))])
    where = {"paths": [Path(path).name for path in args.paths], "places": content_digest(places.encode())[:16]}
    settings: dict[str, Any] = json.loads(json.dumps({"reader": reader.command, **chosen, **where}))
    return settings


def _finished(out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest if the folder is finished with these settings; None when it is to be written.

    Raises:
        ConfigError: it was finished with others, and `overwrite` is off.
    """
    old = read_manifest(out)
    if old is None or overwrite:
        return None
    if old.get("settings") != settings:
        known = old.get("settings") if isinstance(old.get("settings"), dict) else {}
        other = sorted(name for name in {*settings, *(known or {})} if settings.get(name) != (known or {}).get(name))
        raise ConfigError(f"{out} was made with another {', '.join(other)}; choose another --out or give --overwrite")
    return old


def _check_place(out: Path, paths: Sequence[str], *, overwrite: bool) -> None:
    """Make sure that nobody's files are replaced.

    Raises:
        ConfigError: the output folder is one of the downloads, or holds split files that were not made here.
    """
    if any(Path(path).resolve() == out.resolve() for path in paths):
        raise ConfigError(f"--out {out} is the downloaded folder itself; choose another, its files would be replaced")
    there = [f"{split}.json" for split in SPLITS if (out / f"{split}.json").exists()]
    known = (out / MANIFEST).exists() or (out / UNFINISHED).exists()
    if there and not known and not overwrite:
        raise ConfigError(f"{out} holds {', '.join(there)} not made here; choose another --out or give --overwrite")


def _begin(out: Path) -> None:
    """Mark the folder as one that is being written: without a manifest it is not finished."""
    out.mkdir(parents=True, exist_ok=True)
    (out / UNFINISHED).touch()
    (out / MANIFEST).unlink(missing_ok=True)


def _facts(card: DatasetCard, job: Job, settings: Mapping[str, Any], output: ConverterOutput) -> dict[str, Any]:
    own = stamp(data=job.inputs, command=["llava", "data", str(settings["reader"])])
    whole = job.args.limit is None
    return {
        "dataset": card.name,
        "homepage": card.homepage,
        "license": card.license,
        "variant": job.variant,
        "settings": settings,
        "made_by": own,
        **job.facts,
        **_against_known(card, job.variant, output, whole=whole),
    }


def _against_known(card: DatasetCard, variant: str, output: ConverterOutput, *, whole: bool) -> dict[str, Any]:
    """Return which published sizes and hashes were compared, and how the output differs from them."""
    sizes, pins = card.sizes.get(variant, {}), card.pins.get(variant, {})
    if not whole or not (sizes or pins):
        return {"compared_with_published": [], "differs": []}
    differs = []
    for split, size in sizes.items():
        found = _size(output, split)
        if found != size:
            differs.append(f"{card.name} {split}: published {size._asdict()}, found {found._asdict()}")
    for split, pin in pins.items():
        if split not in output.counts or output.counts[split].summary()["ids_sha256"] != pin:
            differs.append(f"{card.name} {split}: the ids are not those of the published split")
    compared = [*(["sizes"] if sizes else []), *(["split hashes"] if pins else [])]
    return {"compared_with_published": compared, "differs": differs}


def _size(output: ConverterOutput, split: str) -> SplitSize:
    if split not in output.counts:
        return SplitSize(0, 0, 0, 0)
    count = output.counts[split]
    kinds: Mapping[str, int] = count.values.get("answer_type", {})
    return SplitSize(len(count.ids), kinds.get("OPEN", 0), kinds.get("CLOSED", 0), len(count.images))


def _expected(path: str | None) -> dict[str, str]:
    """Return the split hashes of an earlier manifest.

    Raises:
        ConfigError: the file is no manifest.
    """
    if path is None:
        return {}
    manifest = read_manifest(Path(path).parent if Path(path).name == MANIFEST else path)
    if manifest is None or not isinstance(manifest.get("splits"), dict):
        raise ConfigError(f"--expect {path}: no manifest.json of an earlier output there")
    return {split: counts["ids_sha256"] for split, counts in manifest["splits"].items() if counts["rows"]}


def _compare(manifest: Mapping[str, Any], expected: Mapping[str, str]) -> None:
    """Compare split hashes with those of an earlier output.

    Raises:
        DataError: they differ.
    """
    found = {split: counts["ids_sha256"] for split, counts in manifest["splits"].items()}
    wrong = [split for split, pin in expected.items() if found.get(split) != pin]
    if wrong:
        raise DataError(f"the ids of {', '.join(wrong)} are not those of the expected manifest; the data differ")


def manifest_summary(manifest: Mapping[str, Any]) -> str:
    """Return one screen about an output: rows, pictures and kinds of answers of each split, and its hash."""
    lines = [f"{manifest['dataset']}  (licence: {manifest['license']})"]
    lines.append(f"{'split':8}{'rows':>9}{'images':>9}{'open':>9}{'closed':>9}  sha256 of the sorted ids")
    for split in SPLITS:
        if split in manifest["splits"]:
            counts = manifest["splits"][split]
            kinds = counts.get("answer_type", {})
            numbers = (counts["rows"], counts["images"], kinds.get("OPEN", 0), kinds.get("CLOSED", 0))
            lines.append(f"{split:8}" + "".join(f"{number:>9,}" for number in numbers) + f"  {counts['ids_sha256']}")
            lines += [f"{'':8}left out: {n:,} ({cause})" for cause, n in counts.get("excluded", {}).items()]
    if manifest["skipped_rows"]:
        lines.append(f"{manifest['skipped_rows']:,} rows could not be used: skipped.jsonl")
    if manifest["renamed_ids"]:
        lines.append(f"{manifest['renamed_ids']:,} repeated ids got a number")
    if manifest["compared_with_published"]:
        what = " and ".join(manifest["compared_with_published"])
        lines.append(f"published {what}: {'they DIFFER, see the warnings' if manifest['differs'] else 'equal'}")
    else:
        lines.append("no published sizes or hashes to compare with; the hashes above are in manifest.json")
    return "\n".join(lines) + "\n"
