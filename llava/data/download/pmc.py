"""Command `llava data images` (`llava/data/download_images.py`): figures of PMC articles.

flags --> FigureList, Client, ImageOptions --fetch--> DownloadSummary --> text, JSON, filtered data files, exit status
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from llava.data.download.archives import ArchiveLimits
from llava.data.download.client import Client, add_network_options, bases_from, network_options
from llava.data.download.missing import Filtered, Missing, MissingList, pair_ids, write_available
from llava.data.download.pmc_article import PARTIAL, ArticleJob, ArticleOutcome, ImageOptions, urls_of
from llava.data.download.pmc_list import Article, Figure, FigureList, read_lists
from llava.data.download.transfer import REASONS
from llava.data.download.url_policy import check_base
from llava.errors import ConfigError, DataError, DownloadError
from llava.utils import log
from llava.utils.cli import ExampleFormatter, Parser
from llava.utils.files import hold_lock
from llava.utils.jsonl import write_json
from llava.utils.log import progress_bar
from llava.utils.terminal import write_out

WINDOW = 4
"""Articles per thread that are queued ahead of time."""


@dataclass(slots=True)
class DownloadSummary:
    """Counts of a download.

    Attributes:
        num_wanted: images that the lists name, plus invalid rows.
        num_there: images that existed before the run.
        num_taken: new images.
        num_archives: archives that were read.
        num_bytes: bytes that were read.
        missing: number of missing images by reason.
    """

    num_wanted: int = 0
    num_there: int = 0
    num_taken: int = 0
    num_archives: int = 0
    num_bytes: int = 0
    missing: dict[str, int] = field(default_factory=dict)

    @property
    def num_missing(self) -> int:
        """Number of missing images."""
        return sum(self.missing.values())

    @property
    def num_unexpected(self) -> int:
        """Number of missing images, without those that are no longer offered."""
        return sum(count for reason, count in self.missing.items() if not REASONS[reason].expected)


def fetch(wanted: FigureList, client: Client, options: ImageOptions) -> DownloadSummary:
    """Download the wanted images to `options.images` and list missing ones in `options.missing`.

    Raises:
        DataError: a folder cannot be written, or `options.missing` is a file of another kind.
    """
    partial = options.images / PARTIAL
    try:
        options.images.mkdir(parents=True, exist_ok=True)
        folder = options.images.resolve()
        with (  # two locks: runs may share the folder of images but not the list of missing ones, and vice versa
            hold_lock(options.missing.with_name(f".{options.missing.name}.lock"), purpose="downloading images"),
            hold_lock(folder.with_name(f".{folder.name}.lock"), purpose="downloading images"),
        ):
            shutil.rmtree(partial, ignore_errors=True)  # incomplete images of a killed run
            partial.mkdir()
            try:
                return _Run(wanted, client, options).run()
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except DownloadError:
        raise
    except OSError as error:
        raise DataError(f"{error.filename or options.images} cannot be written: {error.strerror or error}") from error


class _Run:
    """Run over all articles."""

    def __init__(self, wanted: FigureList, client: Client, options: ImageOptions) -> None:
        self.wanted = wanted
        self.client = client
        self.options = options
        self.missing = MissingList(options.missing)
        self.summary = DownloadSummary(num_wanted=wanted.num_figures + len(wanted.bad))

    def run(self) -> DownloadSummary:
        """Process all articles and return the counts."""
        self.missing.add([Missing.of_bad_row(row) for row in self.wanted.bad])
        bar = progress_bar(self.wanted.num_figures, title="images", unit="image")
        pool = ThreadPoolExecutor(self.options.num_threads)
        try:
            for num_there, outcome in self._outcomes(pool):
                self._note(num_there, outcome)
                bar.update(num_there + outcome.num_taken + len(outcome.missing))
                bar.set_postfix_str(
                    f"{self.summary.num_bytes / 1e6:.1f} MB, {len(self.missing)} missing", refresh=False
                )
        except BaseException:
            self.client.close()  # threads that are reading an archive stop at their next chunk
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            bar.close()
        self.summary.missing = self.missing.finish()
        return self.summary

    def _note(self, num_there: int, outcome: ArticleOutcome) -> None:
        self.missing.add(outcome.missing)
        self.summary.num_there += num_there
        self.summary.num_taken += outcome.num_taken
        self.summary.num_bytes += outcome.num_bytes
        self.summary.num_archives += outcome.num_archives

    def _outcomes(self, pool: ThreadPoolExecutor) -> Iterator[tuple[int, ArticleOutcome]]:
        """Yield numbers of existing images with outcomes, in order of completion; the queue is bounded."""
        running: set[Future[ArticleOutcome]] = set()
        for article in self.wanted.articles:
            figures, known = self._still_wanted(article)
            yield len(article.figures) - len(figures) - len(known), ArticleOutcome(missing=known)
            if not figures:
                continue
            running.add(pool.submit(ArticleJob(article, figures, self.client, self.options).run))
            if len(running) >= WINDOW * self.options.num_threads:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from ((0, future.result()) for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from ((0, future.result()) for future in done)

    def _still_wanted(self, article: Article) -> tuple[list[Figure], list[Missing]]:
        """Return the figures to download, and those known to be missing for a lasting reason."""
        figures, known = [], []
        tried = urls_of(article, self.options)
        for figure in article.figures:
            before = self.missing.known(figure.pair_id)
            if is_there(self.options.images / figure.file_name):
                continue
            if before is not None and not self.options.retry_missing and before.settles(figure, tried):
                known.append(replace(before, place=figure.place))
            else:
                figures.append(figure)
        return figures, known


def is_there(path: Path) -> bool:
    """Return whether an image file exists and is not empty."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


FIGURE_BASE = "https://pmc-oa-opendata.s3.amazonaws.com/"
"""PMC's server of single figures, with paths like PMC9000000.1/J-1-2-g001.jpg."""

ARCHIVE_VARIABLE, FIGURE_VARIABLE = "LLAVA_PMC_BASE", "LLAVA_FIGURE_BASE"
"""Environment variables with mirrors of archives and of single figures."""

EPILOG = """
example:
  python llava/data/download_images.py --input-path data/llava_med_image_urls.jsonl \\
      --only data/instruct/llava_med_instruct_10k.json --filter-json data/instruct/llava_med_instruct_10k.json
exit status: 0 no image is missing, except those no longer offered; 1 images are missing; 2 cannot start
"""

FIRST_HELP = {
    "images": ["--input-path", "--only", "--max-images", "--images-output-path", "--filter-json", "--missing"],
    "runs": ["--retry-missing", "--strict", "--remove-pmc", "--cpus"],
    "sources (any of these flags replaces all default sources)": ["--mirror-dir", "--pmc-base", "--figure-base"],
    "network": ["--rate", "--max-attempts", "--user-agent"],
}
"""Options of the short help by topic."""


def make_parser(prog: str = "llava data images") -> Parser:
    """Return the parser; the published script has the name `download_images.py`."""
    parser = Parser(
        prog=prog,
        description="Download the listed figures of PMC articles; rerun the same command to resume.",
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
        help="folder of archives; existing ones are used and never deleted",
    )
    parser.add_switch("--remove_pmc", default=True, help="do not store downloaded archives")
    add("--cpus", type=int, default=4, help="articles at a time; -1: number of processors")
    add("--only", nargs="+", metavar="FILE", help="download only the images that the rows of these data files name")
    add("--max-images", type=int, help="download only the first N images of the lists")
    add("--filter-json", nargs="+", default=[], metavar="FILE", help="write FILE.available.json without missing images")
    add("--missing", help="list of missing images with reasons (default: missing.jsonl beside the folder of images)")
    parser.add_switch("--retry-missing", help="retry images that an earlier run found to be gone or broken")
    parser.add_switch(
        "--strict", help="exit with status 1 also if images are missing because they are no longer offered"
    )
    sources = parser.add_argument_group("sources (any of these flags replaces all default sources)")
    sources.add_argument("--mirror-dir", help="folder with oa_package/aa/bb/PMC1.tar.gz; the same as --pmc-base FOLDER")
    sources.add_argument(
        "--pmc-base", nargs="+", metavar="BASE", help=f"mirrors of the archives (or {ARCHIVE_VARIABLE})"
    )
    sources.add_argument(
        "--figure-base", nargs="+", metavar="BASE", help=f"mirrors with PMC1.1/FIGURE.jpg (or {FIGURE_VARIABLE})"
    )
    sources.add_argument(
        "--allow-host", nargs="+", default=[], metavar="HOST", help="further hosts that the lists may name"
    )
    limits = parser.add_argument_group("limits of an archive")
    standard = ArchiveLimits()
    limits.add_argument("--max-members", type=int, default=standard.max_members, help="number of files and folders")
    limits.add_argument("--max-unpacked", type=int, default=standard.max_unpacked, help="unpacked size in bytes")
    limits.add_argument("--max-ratio", type=float, default=standard.max_ratio, help="ratio of unpacked to packed bytes")
    add_network_options(parser)
    parser.show_first(FIRST_HELP)
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str = "llava data images") -> None:
    """Run the command, under the name `prog`.

    Raises:
        SystemExit: with status 1 if images are missing, see `--strict`.
    """
    log.setup_logging()
    args = make_parser(prog).parse_args(argv)
    try:
        status = download_images(args)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; rerun the same command to resume\n")
        status = 130
    if status:
        raise SystemExit(status)


def download_images(args: argparse.Namespace) -> int:
    """Run the download that the flags describe and return the exit status."""
    options, bases = image_options(args)
    if gone := [path for path in args.filter_json if not Path(path).is_file()]:
        raise ConfigError(f"--filter-json {gone[0]} is not a file")
    only = None if args.only is None else pair_ids(args.only)
    wanted = read_lists(args.input_path, only=only, max_images=args.max_images, allowed_hosts=args.allow_host)
    write_out(f"{wanted.num_figures} images of {len(wanted.articles)} articles are wanted{_hours(wanted, args.rate)}\n")
    sys.stdout.flush()
    start = time.monotonic()
    with Client(network_options(args), bases=bases, num_connections=options.num_threads) as client:
        summary = fetch(wanted, client, options)
    filtered = [write_available(Path(path), options.images) for path in args.filter_json]
    write_out(report(summary, filtered, options.missing, time.monotonic() - start))
    write_json(options.missing.with_suffix(".summary.json"), asdict(summary))
    return int(summary.num_missing > 0 if args.strict else summary.num_unexpected > 0)


def _hours(wanted: FigureList, rate: float) -> str:
    """Return the text about the minimum time of a long run; empty for a short one."""
    hours = len(wanted.articles) / rate / 3600 if rate else 0.0
    return (
        f"; at {rate:g} requests per second and host, at least {hours:.0f} hours, in any number of runs"
        if hours > 1
        else ""
    )


def image_options(args: argparse.Namespace) -> tuple[ImageOptions, list[str]]:
    """Return the options that the flags describe, and the bases that the user named.

    Raises:
        ConfigError: a base or a number is invalid.
    """
    if args.cpus == 0 or args.cpus < -1:
        raise ConfigError(f"--cpus must be at least 1, or -1 for the number of processors; got {args.cpus}")
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
        limits=ArchiveLimits(max_members=args.max_members, max_unpacked=args.max_unpacked, max_ratio=args.max_ratio),
    )
    return options, archives + figures


def report(summary: DownloadSummary, filtered: Sequence[Filtered], missing: Path, seconds: float) -> str:
    """Return the text printed at the end."""
    here = summary.num_there + summary.num_taken
    lines = [
        f"images: {here} of {summary.num_wanted} present ({summary.num_taken} new); {summary.num_archives} archives, "
        f"{summary.num_bytes / 1e6:.1f} MB in {seconds:.0f} s"
    ]
    if summary.missing:
        lines.append(f"missing: {summary.num_missing}, listed in {missing}")
        lines += [f"  {count:>8}  {reason:<16}{REASONS[reason].text}" for reason, count in summary.missing.items()]
        if any(not REASONS[reason].lasting for reason in summary.missing):
            lines.append("rerun the same command to retry the transient failures")
    for path, num_kept, num_dropped in filtered:
        lines.append(f"{path}: {num_kept} rows kept, {num_dropped} rows with missing images left out")
    return "\n".join(lines) + "\n"
