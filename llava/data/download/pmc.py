"""`llava/data/download_images.py` and `llava data images`: flags, and what is said in the end.

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

from llava.data.download.archives import Limits
from llava.data.download.client import Client, add_network_options, bases_from, network_options
from llava.data.download.failures import REASONS
from llava.data.download.missing import Filtered, Missing, MissingList, pair_ids, write_available
from llava.data.download.pmc_article import PARTIAL, ArticleJob, ImageOptions, ArticleOutcome, urls_of
from llava.data.download.pmc_list import Article, Figure, FigureList, read_lists
from llava.data.download.url_policy import check_base
from llava.errors import ConfigError, DataError, DownloadError
from llava.utils import log
from llava.utils.cli import ExampleFormatter, Parser
from llava.utils.files import hold
from llava.utils.jsonl import write_json
from llava.utils.log import progress_bar

WINDOW = 4
"""Articles a thread that are handed to the pool ahead of time."""


@dataclass(slots=True)
class DownloadSummary:
    """What became of all images that were wanted.

    Attributes:
        num_wanted: images that the lists ask for, and rows that cannot be used.
        num_there: images that were there before.
        num_taken: images that are new.
        num_archives: archives that were read.
        num_bytes: bytes that were read for it.
        missing: how many images are missing for each reason.
    """

    num_wanted: int = 0
    num_there: int = 0
    num_taken: int = 0
    num_archives: int = 0
    num_bytes: int = 0
    missing: dict[str, int] = field(default_factory=dict)

    @property
    def num_missing(self) -> int:
        """Images that are missing."""
        return sum(self.missing.values())

    @property
    def num_unexpected(self) -> int:
        """Images that are missing for another reason than that the archive does not offer them (any more)."""
        return sum(count for reason, count in self.missing.items() if not REASONS[reason].expected)


def fetch(wanted: FigureList, client: Client, options: ImageOptions) -> DownloadSummary:
    """Bring the wanted images into `options.images` and list the others in `options.missing`.

    Raises:
        DataError: a folder cannot be written, or `options.missing` is a file of another kind.
    """
    partial = options.images / PARTIAL
    try:
        options.images.mkdir(parents=True, exist_ok=True)
        folder = options.images.resolve()
        with (  # runs with lists of their own may share the folder, and the other way round
            hold(options.missing.with_name(f".{options.missing.name}.lock"), purpose="downloading images"),
            hold(folder.with_name(f".{folder.name}.lock"), purpose="downloading images"),
        ):
            shutil.rmtree(partial, ignore_errors=True)  # what a killed run was writing
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
    """One run over all articles."""

    def __init__(self, wanted: FigureList, client: Client, options: ImageOptions) -> None:
        self.wanted = wanted
        self.client = client
        self.options = options
        self.missing = MissingList(options.missing)
        self.summary = DownloadSummary(num_wanted=wanted.num_figures + len(wanted.bad))

    def run(self) -> DownloadSummary:
        """Work through the articles; the list of what is missing is in the order of the lists in the end."""
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
            self.client.close()  # threads in the middle of an archive stop at their next bytes
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
        """Yield images that are there, and outcomes as they come; only a few articles are in the pool at a time."""
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
        """Return the figures to fetch, and those known to be missing where asking again is no use."""
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
    """Whether an image file exists; images appear whole, so an empty one is another program's."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


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
        status = download_images(args)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command continues\n")
        status = 130
    if status:
        raise SystemExit(status)


def download_images(args: argparse.Namespace) -> int:
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


def report(summary: DownloadSummary, filtered: Sequence[Filtered], missing: Path, seconds: float) -> str:
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
