"""The images of the PMC articles: every article is looked through once, and only the listed figures are kept.

    lists --read_lists--> articles --threads--> ArticleJob --> images/PAIR_ID.jpg      or a line of missing.jsonl

Nothing is done twice: images that are there are not asked for again, nor is what is known to be gone. A run that was
killed leaves whole images only, and the next one goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from llava.data.download.client import Client
from llava.data.download.failures import REASONS
from llava.data.download.missing import Missing, MissingList
from llava.data.download.pmc_article import PARTIAL, ArticleJob, ImageOptions, Outcome, addresses_of
from llava.data.download.pmc_list import Article, Figure, FigureList
from llava.data.file_lock import hold
from llava.errors import DataError, DownloadError
from llava.utils.log import progress_bar

WINDOW = 4
"""Articles a thread that are handed to the pool ahead of time."""


@dataclass(slots=True)
class Summary:
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


def fetch(wanted: FigureList, client: Client, options: ImageOptions) -> Summary:
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
        self.summary = Summary(num_wanted=wanted.num_figures + len(wanted.bad))

    def run(self) -> Summary:
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

    def _note(self, num_there: int, outcome: Outcome) -> None:
        self.missing.add(outcome.missing)
        self.summary.num_there += num_there
        self.summary.num_taken += outcome.num_taken
        self.summary.num_bytes += outcome.num_bytes
        self.summary.num_archives += outcome.num_archives

    def _outcomes(self, pool: ThreadPoolExecutor) -> Iterator[tuple[int, Outcome]]:
        """Yield images that are there, and outcomes as they come; only a few articles are in the pool at a time."""
        running: set[Future[Outcome]] = set()
        for article in self.wanted.articles:
            figures, known = self._still_wanted(article)
            yield len(article.figures) - len(figures) - len(known), Outcome(missing=known)
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
        tried = addresses_of(article, self.options)
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
