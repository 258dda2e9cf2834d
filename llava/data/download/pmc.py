"""`llava/data/download_images.py` and `llava data images`: flags, and what is said in the end.

flags --> FigureList, Client, ImageOptions --fetch--> Summary --> text, JSON, filtered data files, exit status
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llava.data.available_rows import Filtered, pair_ids, write_available
from llava.data.download.archives import Limits
from llava.data.download.client import Client
from llava.data.download.failures import REASONS
from llava.data.download.pmc_article import ImageOptions
from llava.data.download.pmc_list import FigureList, read_lists
from llava.data.download.url_policy import check_base
from llava.data.fetching.options import add_network_options, bases_from, network_options
from llava.data.pmc_images import Summary, fetch
from llava.errors import ConfigError
from llava.utils import log
from llava.utils.cli import ExampleFormatter, Parser
from llava.utils.jsonl import write_json

FIGURE_BASE = "https://pmc-oa-opendata.s3.amazonaws.com/"
"""PMC's own server of single figures: PMC9000000.1/J-1-2-g001.jpg."""

ARCHIVE_VARIABLE, FIGURE_VARIABLE = "LLAVA_PMC_BASE", "LLAVA_FIGURE_BASE"

EPILOG = """
example:
  python llava/data/download_images.py --input_path data/llava_med_image_urls.jsonl \\
      --only data/instruct/llava_med_instruct_10k.json --filter-json data/instruct/llava_med_instruct_10k.json
exit status: 0 all images are there, or those that are not are no longer offered; 1 others are missing; 2 cannot start
"""


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="download_images.py",
        description="Fetch the listed figures of PMC articles; continues where an earlier run stopped.",
        epilog=EPILOG,
        formatter_class=ExampleFormatter,
    )
    add = parser.add_argument
    add(
        "--input_path",
        nargs="+",
        default=["data/llava_med_image_urls.jsonl"],
        help="lists of figures, or caption files",
    )
    add("--images_output_path", default="data/images/", help="folder of the images")
    add(
        "--pmc_output_path",
        default="data/pmc_articles/",
        help="folder of archives: those in it are used, never deleted",
    )
    parser.add_switch("--remove_pmc", default=True, help="do not keep archives that are fetched (true: none is stored)")
    add("--cpus", type=int, default=4, help="articles at a time; -1: as many as processors")
    add("--only", nargs="+", metavar="FILE", help="fetch only the images that the rows of these data files name")
    add("--max-images", type=int, help="fetch the first so many images of the lists")
    add("--filter-json", nargs="+", default=[], metavar="FILE", help="write FILE.available.json without missing images")
    add("--missing", help="list of what is missing and why (default: missing.jsonl beside the folder of images)")
    parser.add_switch("--retry-missing", help="ask again for what an earlier run found to be gone or broken")
    parser.add_switch("--strict", help="exit status 1 also when images are missing because nobody offers them any more")
    sources = parser.add_argument_group("sources (any of them replaces all defaults; nothing else is asked then)")
    sources.add_argument("--mirror-dir", help="folder with oa_package/aa/bb/PMC1.tar.gz; the same as --pmc-base FOLDER")
    sources.add_argument(
        "--pmc-base", nargs="+", metavar="BASE", help=f"mirrors of the archives (or {ARCHIVE_VARIABLE})"
    )
    sources.add_argument(
        "--figure-base", nargs="+", metavar="BASE", help=f"mirrors with PMC1.1/FIGURE.jpg (or {FIGURE_VARIABLE})"
    )
    sources.add_argument("--allow-host", nargs="+", default=[], metavar="HOST", help="hosts that a list may name")
    limits = parser.add_argument_group("limits of an archive")
    standard = Limits()
    limits.add_argument("--max-members", type=int, default=standard.max_members, help="files and folders")
    limits.add_argument("--max-unpacked", type=int, default=standard.max_unpacked, help="bytes, unpacked")
    limits.add_argument("--max-ratio", type=float, default=standard.max_ratio, help="unpacked to packed bytes")
    add_network_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        SystemExit: with status 1 when images are missing that should not be.
    """
    log.setup()
    args = make_parser().parse_args(argv)
    try:
        status = run(args)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command continues\n")
        status = 130
    if status:
        raise SystemExit(status)


def run(args: argparse.Namespace) -> int:
    """Do what the flags say and return the exit status."""
    options, bases = image_options(args)
    if gone := [path for path in args.filter_json if not Path(path).is_file()]:
        raise ConfigError(f"--filter-json {gone[0]}: no such file")
    only = None if args.only is None else pair_ids(args.only)
    wanted = read_lists(args.input_path, only=only, max_images=args.max_images, allowed_hosts=args.allow_host)
    sys.stdout.write(
        f"{wanted.num_figures} images of {len(wanted.articles)} articles are wanted{_hours(wanted, args.rate)}\n"
    )
    sys.stdout.flush()
    start = time.monotonic()
    with Client(network_options(args), bases=bases, num_connections=options.num_threads) as client:
        summary = fetch(wanted, client, options)
    filtered = [write_available(Path(path), options.images) for path in args.filter_json]
    sys.stdout.write(report(summary, filtered, options.missing, time.monotonic() - start))
    write_json(options.missing.with_suffix(".summary.json"), asdict(summary))
    return int(summary.num_missing > 0 if args.strict else summary.num_unexpected > 0)


def _hours(wanted: FigureList, rate: float) -> str:
    """Say how long a long run takes at least."""
    hours = len(wanted.articles) / rate / 3600 if rate else 0.0
    return (
        f"; {rate:g} requests a second and host: at least {hours:.0f} hours, in as many runs as you like"
        if hours > 1
        else ""
    )


def image_options(args: argparse.Namespace) -> tuple[ImageOptions, list[str]]:
    """Return the options, and the bases that the user named.

    Raises:
        ConfigError: a base or a number cannot be used.
    """
    if args.cpus == 0 or args.cpus < -1:
        raise ConfigError(f"--cpus must be at least 1, or -1 for as many as there are processors; got {args.cpus}")
    archives = bases_from(args.pmc_base, ARCHIVE_VARIABLE)
    if args.mirror_dir is not None:
        archives.insert(0, check_base(args.mirror_dir))
    figures = bases_from(args.figure_base, FIGURE_VARIABLE)
    default = not archives and not figures
    images = Path(args.images_output_path)
    options = ImageOptions(
        images=images,
        archives=Path(args.pmc_output_path),
        missing=Path(args.missing) if args.missing else images.parent / "missing.jsonl",
        archive_bases=None if default else tuple(archives),
        figure_bases=(FIGURE_BASE,) if default else tuple(figures),
        keep=not args.remove_pmc,
        num_threads=(os.cpu_count() or 1) if args.cpus == -1 else args.cpus,
        retry_missing=args.retry_missing,
        limits=Limits(max_members=args.max_members, max_unpacked=args.max_unpacked, max_ratio=args.max_ratio),
    )
    return options, archives + figures


def report(summary: Summary, filtered: Sequence[Filtered], missing: Path, seconds: float) -> str:
    """Return what is said in the end."""
    here = summary.num_there + summary.num_taken
    lines = [
        f"images: {here} of {summary.num_wanted} are there ({summary.num_taken} new); {summary.num_archives} archives, "
        f"{summary.num_bytes / 1e6:.1f} MB in {seconds:.0f} s"
    ]
    if summary.missing:
        lines.append(f"missing: {summary.num_missing}, listed in {missing}")
        lines += [f"  {count:>8}  {reason:<16}{REASONS[reason].text}" for reason, count in summary.missing.items()]
        if any(not REASONS[reason].lasting for reason in summary.missing):
            lines.append("the same command asks again for what may come yet")
    for path, num_kept, num_dropped in filtered:
        lines.append(f"{path}: {num_kept} rows with their images, {num_dropped} without left out")
    return "\n".join(lines) + "\n"
