"""Figures of one article from the first source that has them, each decoded before it is kept.

urls_of --> single figures | archive (streamed up to the last listed figure) | local archive
                    |--Taken--> decodes? --> images/.partial/... --> images/PAIR_ID.jpg
                    +--reason--> next source; after the last one: Missing
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from llava.data.download.archives import IMAGE_ENDINGS, ArchiveLimits, Taken, image_stem, iter_members
from llava.data.download.client import TRANSIENT, Client
from llava.data.download.files import Expected, fetch_file
from llava.data.download.missing import Missing
from llava.data.download.pmc_list import Article, Figure
from llava.data.download.transfer import REASONS, RemoteFile, most_telling
from llava.data.download.url_policy import is_local, join_url, local_path, redacted_url
from llava.errors import ArchiveError, DataError, DownloadError
from llava.imaging import decode

FIRST_VERSION = ".1"
"""Version suffix on servers of single figures; the archives of the published list hold the first version."""

PARTIAL = ".partial"
"""Subfolder of incomplete images in the folder of images."""

PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """Sources and targets of images.

    Attributes:
        images: folder of the images.
        archives: folder of archives; existing ones are read and never deleted, new ones are stored only with `keep`.
        missing: file that lists the missing images.
        archive_bases: mirrors with the archives in their published layout; None: the URL of each archive in the list.
        figure_bases: servers of single figures, tried before the archives.
        keep: store downloaded archives.
        num_threads: articles at a time.
        retry_missing: retry images that are known to be missing.
        limits: limits of an archive.
        max_archive: size in bytes of the largest archive that is downloaded.
    """

    images: Path
    archives: Path
    missing: Path
    archive_bases: tuple[str, ...] | None = None
    figure_bases: tuple[str, ...] = ()
    keep: bool = False
    num_threads: int = 4
    retry_missing: bool = False
    limits: ArchiveLimits = field(default_factory=ArchiveLimits)
    max_archive: int = 16 << 30


@dataclass(slots=True)
class ArticleOutcome:
    """Counts of one article: new images, bytes read, archives opened, and the missing images."""

    num_taken: int = 0
    num_bytes: int = 0
    num_archives: int = 0
    missing: list[Missing] = field(default_factory=list)


def urls_of(article: Article, options: ImageOptions) -> list[str]:
    """Return the URLs that an article is searched at, in order; folders of single figures come first."""
    if options.archive_bases is None:
        archives = [article.url]
    else:
        archives = [join_url(base, article.package) for base in options.archive_bases]
    return [*_figure_folders(article, options), *archives]


def _figure_folders(article: Article, options: ImageOptions) -> list[str]:
    name = article.file_name.removesuffix(".tar.gz")
    return [join_url(base, name + FIRST_VERSION) for base in options.figure_bases]


class ArticleJob:
    """Download of one article.

    Args:
        article: the article.
        figures: figures to download.
        client: HTTP client.
        options: sources and targets.
    """

    def __init__(self, article: Article, figures: Sequence[Figure], client: Client, options: ImageOptions) -> None:
        self.article = article
        self.client = client
        self.options = options
        self.outcome = ArticleOutcome()
        self._left = {figure.pair_id: figure for figure in figures}
        self._problems: dict[str, dict[str, str]] = {figure.pair_id: {} for figure in figures}

    def run(self) -> ArticleOutcome:
        """Try the sources in order until all figures are downloaded.

        Raises:
            OSError: an image cannot be written.
        """
        kept = self.options.archives / self.article.file_name
        urls = urls_of(self.article, self.options)
        singles = set(_figure_folders(self.article, self.options))
        for url in [str(kept)] * kept.is_file() + urls:
            if self._left and not self.client.stopped.is_set():
                self._ask(self._single_figures if url in singles else self._archive, url)
        for pair_id, figure in self._left.items():
            problems = self._problems[pair_id]
            reason = most_telling(problems) if problems else "cut_off"
            detail = problems.get(reason, "stopped")
            self.outcome.missing.append(Missing.of(figure, self.article.url, reason, detail, urls))
        return self.outcome

    def _ask(self, reader: Callable[[str, list[str]], Iterator[Taken]], url: str) -> None:
        """Download the figures that one source has."""
        by_member: dict[str, list[Figure]] = {}
        for figure in self._left.values():
            by_member.setdefault(figure.member, []).append(figure)
        try:
            for taken in reader(url, list(by_member)):
                for figure in by_member[taken.name]:
                    self._settle(figure, taken, url)
        except (DownloadError, ArchiveError) as error:
            for pair_id in self._left:
                self._problems[pair_id].setdefault(error.reason, str(error))

    def _settle(self, figure: Figure, taken: Taken, url: str) -> None:
        """Write a figure, or record why it cannot be used."""
        reason, detail = taken.reason, f"{redacted_url(url)}: {REASONS[taken.reason].text}" if taken.reason else ""
        if not reason:
            try:
                decode.load_image(taken.data)
            except DataError as error:
                reason, detail = "broken_image", f"{redacted_url(url)}: {error}"
        if reason:
            self._problems[figure.pair_id].setdefault(reason, detail)
            return
        self._write(figure, taken.data)
        self.outcome.num_taken += 1
        del self._left[figure.pair_id]

    def _write(self, figure: Figure, data: bytes) -> None:
        """Write an image to the subfolder of incomplete ones, then rename it."""
        temporary = self.options.images / PARTIAL / figure.file_name
        temporary.write_bytes(data)
        os.replace(temporary, self.options.images / figure.file_name)

    def _archive(self, url: str, members: list[str]) -> Iterator[Taken]:
        """Yield the members from one archive, then a reason for each member that it does not contain."""
        left = set(members)
        for taken in self._members(url, members):
            left.discard(taken.name)
            yield taken
        yield from (Taken(name, reason="not_in_archive") for name in sorted(left))

    def _members(self, url: str, members: list[str]) -> Iterator[Taken]:
        kept = self.options.archives / self.article.file_name
        if is_local(url):
            yield from self._from_file(local_path(url), members)
        elif self.options.keep:
            expected = Expected(max_bytes=self.options.max_archive)
            fetch_file(self.client, [url], kept, expected=expected)
            try:
                yield from self._from_file(kept, members)
            except ArchiveError:
                kept.unlink(missing_ok=True)  # a damaged archive is not stored
                raise
        else:
            remote = RemoteFile(self.client, url, max_bytes=self.options.max_archive)
            try:
                yield from self._named(iter_members(remote, members, self.options.limits), url)
            finally:
                self._count(remote.num_fetched)
                remote.close()

    def _from_file(self, path: Path, members: list[str]) -> Iterator[Taken]:
        source = _FileSource(path)
        with closing(source):
            try:
                yield from self._named(iter_members(source, members, self.options.limits), str(path))
            finally:
                self._count(source.num_read)

    def _named(self, taken: Iterator[Taken], url: str) -> Iterator[Taken]:
        """Yield the figures of an archive; errors name the archive."""
        try:
            yield from taken
        except ArchiveError as error:
            raise ArchiveError(f"{redacted_url(url)}: {error}", reason=error.reason) from error

    def _count(self, num_bytes: int) -> None:
        self.outcome.num_archives += num_bytes > 0
        self.outcome.num_bytes += num_bytes

    def _single_figures(self, url: str, members: list[str]) -> Iterator[Taken]:
        """Yield the members, each from its own file under `url`."""
        for member in members:
            name = member.rsplit("/", 1)[-1]
            if image_stem(name) == name:
                name += IMAGE_ENDINGS[0]
            try:
                yield Taken(member, self._single(join_url(url, name)))
            except DownloadError as error:
                if error.reason in TRANSIENT:  # a failure of the server, not of this figure
                    raise
                yield Taken(member, reason=error.reason)

    def _single(self, url: str) -> bytes:
        limit = self.options.limits.max_figure
        if is_local(url):
            path = local_path(url)
            if not path.is_file():
                raise DownloadError(f"{path}: missing", reason="not_found")
            if path.stat().st_size > limit:
                raise DownloadError(f"{path}: more than {limit} bytes", reason="too_large")
            source = _FileSource(path)
            with closing(source):
                return b"".join(iter(source.read, b""))
        remote = RemoteFile(self.client, url, max_bytes=limit)
        try:
            return b"".join(remote)
        finally:
            self.outcome.num_bytes += remote.num_fetched
            remote.close()


class _FileSource:
    """Bytes of a local archive in pieces.

    Raises:
        DownloadError: the file is missing or cannot be read (also raised by `read`).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.num_read = 0
        try:
            self._stream = path.open("rb")
        except FileNotFoundError as error:
            raise DownloadError(f"{path}: missing", reason="not_found") from error
        except OSError as error:
            raise DownloadError(f"{path}: {error.strerror}", reason="refused") from error

    def read(self) -> bytes:
        """Return the next bytes; empty at the end."""
        try:
            piece = self._stream.read(PIECE)
        except OSError as error:
            raise DownloadError(f"{self._path}: {error.strerror}", reason="refused") from error
        self.num_read += len(piece)
        return piece

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
