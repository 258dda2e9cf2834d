"""Command line shared by all dataset converters: options, input files, progress, checks and summary.

    argv --> Sources + ConverterOutput --> for event in read_events(job): output.add(event) --> files, manifest, summary

A finished folder with the same settings is left as it is; with other settings, --overwrite is required.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
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
from llava.utils.provenance import provenance_fields
from llava.utils.terminal import write_out

logger = logging.getLogger(__name__)

UNPACKED = ".unpacked_archives"
UNFINISHED = ".unfinished"
NOT_SETTINGS = ("out", "overwrite", "expect")
"""Options that do not change what is written."""


@dataclass(slots=True)
class Job:
    """Inputs and options of one conversion; the converter fills in `variant`, `inputs` and `facts`.

    Attributes:
        sources: input folders and files.
        args: options of the command.
        is_full: whether a split has reached the row limit.
        card: description of the dataset.
        variant: published variant that was found: a key into the card's sizes.
        inputs: annotation files that were read, by name.
        facts: further entries for the manifest.
    """

    sources: Sources
    args: argparse.Namespace
    is_full: Callable[[str], bool]
    card: DatasetCard
    variant: str = ""
    inputs: dict[str, Path] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def require_file(self, *names: str) -> Path:
        """Return the first of these files that exists, and record it as an input.

        Raises:
            DataError: none of them exists; the message says how to get the dataset.
        """
        path = self.sources.file(*names)
        if path is None:
            raise DataError(self.missing(" or ".join(names)))
        self.inputs[path.name] = path
        return path

    def missing(self, what: str) -> str:
        """Return the error message for a file that is not in the input paths."""
        where = ", ".join(str(path) for path in [*self.sources.roots, *self.sources.files])
        return f"{where}: no {what} found.\nHow to get {self.card.name} ({self.card.homepage}): {self.card.how_to_get}"


@dataclass(frozen=True, slots=True)
class Converter:
    """Dataset converter: one `llava data` command.

    Attributes:
        command: name, as in `llava data COMMAND`.
        card: description of the dataset.
        read_events: yields the rows of the dataset.
        add_options: adds the options of this command.
    """

    command: str
    card: DatasetCard
    read_events: Callable[[Job], Iterator[Event]]
    add_options: Callable[[Parser], None] = lambda parser: None


def make_parser(converter: Converter) -> Parser:
    """Return the parser of a dataset command."""
    card = converter.card
    parser = Parser(
        prog=f"llava data {converter.command}",
        description=f"Convert {card.name} to train.json, test.json and images/. License: {card.license}. "
        f"Homepage: {card.homepage}. {card.how_to_get}",
    )
    parser.add_argument("paths", nargs="+", help="downloaded folders, archives or files")
    add_output_options(parser)
    converter.add_options(parser)
    return parser


def add_output_options(parser: Parser) -> None:
    """Add the options for the output folder, images and limits."""
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument("--images", choices=PLACEMENTS, default="link", help="hard-link the image files, or copy them")
    parser.add_argument("--limit", type=int, help="write at most this many rows of each split")
    parser.add_switch("--skip_bad", help="skip rows that cannot be used, and list them in skipped.jsonl")
    parser.add_switch("--overwrite", help="rewrite a folder that was written with other settings")
    parser.add_argument("--expect", help="manifest of an earlier output; the splits must have the same ids")


def run_converter(converter: Converter, argv: Sequence[str] | None = None) -> None:
    """Run a dataset command: parse the options, write the output folder and print a summary.

    Raises:
        DataError: a file or row cannot be used.
        ConfigError: the options are inconsistent or the output folder cannot be used.
    """
    run_with_args(converter, make_parser(converter).parse_args(argv))


def run_with_args(converter: Converter, args: argparse.Namespace) -> None:
    """Run a dataset command with parsed options; see `run_converter`."""
    log.setup_logging()
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {args.limit}")
    expected = _expected(args.expect)
    out = Path(args.out)
    settings = _settings(converter, args)
    _check_output_folder(out, args.paths, overwrite=args.overwrite)
    old = _finished(out, settings, overwrite=args.overwrite)
    if old is not None:
        _compare(old, expected)
        write_out(
            f"{out} is already complete with the same settings. Pass --overwrite to rewrite it, for example if the "
            f"downloaded files changed.\n{manifest_summary(old)}"
        )
        return
    _begin(out)
    sources = Sources(args.paths, out / UNPACKED)
    with ConverterOutput(out, images=args.images, limit=args.limit, skip_bad=args.skip_bad) as output:
        job = Job(sources, args, output.is_full, converter.card)
        for event in log.with_progress(converter.read_events(job), title=f"reading {converter.card.name}", unit="row"):
            output.add(event)
        remove_splits(out, {*SPLITS} - {split for split, count in output.counts.items() if count.ids})
        manifest = output.finish(_facts(converter.card, job, settings, output))
    shutil.rmtree(out / UNPACKED, ignore_errors=True)
    (out / UNFINISHED).unlink(missing_ok=True)
    for line in manifest["differs"]:
        logger.warning("%s", line)
    write_out(manifest_summary(manifest))
    _compare(manifest, expected)


def _settings(converter: Converter, args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that determine the output, as they look after a round trip through JSON."""
    # The manifest is shared with the data, so it has file names and a hash instead of the paths of this machine.
    chosen = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    places = json.dumps([os.path.realpath(path) for path in (*args.paths, chosen.pop("image_root", ""))])
    where = {"paths": [Path(path).name for path in args.paths], "places": content_digest(places.encode())[:16]}
    settings: dict[str, Any] = json.loads(json.dumps({"reader": converter.command, **chosen, **where}))
    return settings


def _finished(out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest if the folder is complete with these settings; None if it must be written.

    Raises:
        ConfigError: it was written with other settings and `overwrite` is off.
    """
    old = read_manifest(out)
    if old is None or overwrite:
        return None
    if old.get("settings") != settings:
        known = old.get("settings") if isinstance(old.get("settings"), dict) else {}
        other = sorted(name for name in {*settings, *(known or {})} if settings.get(name) != (known or {}).get(name))
        raise ConfigError(
            f"{out} was written with another {', '.join(other)}; choose another --out or pass --overwrite"
        )
    return old


def _check_output_folder(out: Path, paths: Sequence[str], *, overwrite: bool) -> None:
    """Check that the output folder does not contain files of other origin.

    Raises:
        ConfigError: the output folder is one of the inputs, or holds split files that no converter wrote.
    """
    if any(Path(path).resolve() == out.resolve() for path in paths):
        raise ConfigError(
            f"--out {out} is the downloaded folder itself, whose files would be replaced; choose another --out"
        )
    there = [f"{split}.json" for split in SPLITS if (out / f"{split}.json").exists()]
    known = (out / MANIFEST).exists() or (out / UNFINISHED).exists()
    if there and not known and not overwrite:
        raise ConfigError(
            f"{out} contains {', '.join(there)} of another origin; choose another --out or pass --overwrite"
        )


def _begin(out: Path) -> None:
    """Mark the folder as incomplete: remove the manifest, which is written last."""
    out.mkdir(parents=True, exist_ok=True)
    (out / UNFINISHED).touch()
    (out / MANIFEST).unlink(missing_ok=True)


def _facts(card: DatasetCard, job: Job, settings: Mapping[str, Any], output: ConverterOutput) -> dict[str, Any]:
    own = provenance_fields(data=job.inputs, command=["llava", "data", str(settings["reader"])])
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
    """Return which published sizes and hashes were compared, and the differences."""
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
        ConfigError: the file is not a manifest.
    """
    if path is None:
        return {}
    manifest = read_manifest(Path(path).parent if Path(path).name == MANIFEST else path)
    if manifest is None or not isinstance(manifest.get("splits"), dict):
        raise ConfigError(f"--expect {path}: no manifest.json of an earlier output found")
    return {split: counts["ids_sha256"] for split, counts in manifest["splits"].items() if counts["rows"]}


def _compare(manifest: Mapping[str, Any], expected: Mapping[str, str]) -> None:
    """Check that the split hashes equal those of an earlier output.

    Raises:
        DataError: a hash differs.
    """
    found = {split: counts["ids_sha256"] for split, counts in manifest["splits"].items()}
    wrong = [split for split, pin in expected.items() if found.get(split) != pin]
    if wrong:
        raise DataError(f"the ids of {', '.join(wrong)} differ from those of the --expect manifest, so the data differ")


def manifest_summary(manifest: Mapping[str, Any]) -> str:
    """Return a summary of an output: rows, images, answer types and hash of each split."""
    lines = [f"{manifest['dataset']}  (license: {manifest['license']})"]
    lines.append(f"{'split':8}{'rows':>9}{'images':>9}{'open':>9}{'closed':>9}  sha256 of the sorted ids")
    for split in SPLITS:
        if split in manifest["splits"]:
            counts = manifest["splits"][split]
            kinds = counts.get("answer_type", {})
            numbers = (counts["rows"], counts["images"], kinds.get("OPEN", 0), kinds.get("CLOSED", 0))
            lines.append(f"{split:8}" + "".join(f"{number:>9,}" for number in numbers) + f"  {counts['ids_sha256']}")
            lines += [f"{'':8}excluded: {n:,} ({cause})" for cause, n in counts.get("excluded", {}).items()]
    if manifest["skipped_rows"]:
        lines.append(f"{manifest['skipped_rows']:,} rows could not be used; see skipped.jsonl")
    if manifest["renamed_ids"]:
        lines.append(f"{manifest['renamed_ids']:,} repeated ids got a numeric suffix")
    if manifest["compared_with_published"]:
        what = " and ".join(manifest["compared_with_published"])
        lines.append(f"published {what}: {'DIFFERENT, see the warnings' if manifest['differs'] else 'equal'}")
    else:
        lines.append("no published sizes or hashes to compare with; the hashes above are in manifest.json")
    return "\n".join(lines) + "\n"
