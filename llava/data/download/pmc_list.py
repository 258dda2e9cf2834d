"""Reader of lists of figures, grouped by PMC article.

    llava_med_image_urls.jsonl   pmc_tar_url, image_file_path, pair_id  --+
                                                                          +--> Article(url, figures), each once
    ..._fig_captions.json        {domain: [{pair_id, graphic_ref}]}     --+

Caption files are accepted too, because the published list lacks the 50 images of the chat evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.download.archives import plain_name
from llava.data.download.url_policy import redacted_url, url_origin
from llava.errors import BrokenFileError, DataError, DownloadError
from llava.samples import type_and_length
from llava.utils.json_rows import MAX_ROW, decode_row, iter_lists, iter_rows
from llava.utils.jsonl import READ_ERRORS, open_decompressed

ARCHIVE_HOSTS = ("ftp.ncbi.nlm.nih.gov",)
"""Hosts that a list may name without `--allow-host`."""

ARCHIVE_BASE = "https://ftp.ncbi.nlm.nih.gov/pub/pmc/"
PACKAGES = "oa_package/"
"""Folder of the archives under a base, on the original server and on every mirror."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+\-]{0,199}")


class Figure(NamedTuple):
    """Wanted image: `member` of the archive becomes `pair_id`.jpg; `place` is its row in the lists."""

    pair_id: str
    member: str
    place: int

    @property
    def file_name(self) -> str:
        """Name of the image file."""
        return f"{self.pair_id}.jpg"


@dataclass(slots=True)
class Article:
    """Archive of one article with the figures wanted from it."""

    url: str
    figures: list[Figure] = field(default_factory=list)

    @property
    def package(self) -> str:
        """Path of the archive under a base (`oa_package/aa/bb/PMC1.tar.gz`)."""
        _, found, tail = self.url.partition(f"/{PACKAGES}")
        return PACKAGES + tail if found else self.file_name

    @property
    def file_name(self) -> str:
        """File name of the archive (`PMC1.tar.gz`)."""
        return self.url.rstrip("/").rsplit("/", 1)[-1]


class BadListRow(NamedTuple):
    """Invalid row of a list."""

    place: int
    pair_id: str
    detail: str


@dataclass(slots=True)
class FigureList:
    """Content of lists of figures.

    Attributes:
        articles: each archive once, in order of appearance.
        bad: invalid rows.
        num_repeated: number of rows that repeat an earlier one.
    """

    articles: list[Article] = field(default_factory=list)
    bad: list[BadListRow] = field(default_factory=list)
    num_repeated: int = 0

    @property
    def num_figures(self) -> int:
        """Number of wanted images."""
        return sum(len(article.figures) for article in self.articles)


def read_lists(
    paths: Sequence[str | Path],
    *,
    only: Collection[str] | None = None,
    max_images: int | None = None,
    allowed_hosts: Collection[str] = (),
) -> FigureList:
    """Return the articles that lists name.

    Args:
        paths: lists of either kind, plain or gzipped.
        only: pair ids to keep; None keeps all.
        max_images: keep only the first images.
        allowed_hosts: hosts that the untrusted lists may name in addition to `ARCHIVE_HOSTS`.

    Raises:
        DataError: a list cannot be read, or has no rows.
    """
    found = FigureList()
    articles: dict[str, Article] = {}
    members: dict[str, tuple[str, str]] = {}
    hosts = {host.lower() for host in (*ARCHIVE_HOSTS, *allowed_hosts)}
    place = -1
    for place, (where, row) in enumerate(row for path in paths for row in _rows(Path(path))):
        try:
            url, figure = _figure(row, place, hosts)
        except DataError as error:
            found.bad.append(BadListRow(place, _id_of(row), f"{where}: {error}"))
            continue
        if only is not None and figure.pair_id not in only:
            continue
        article = articles.get(url)
        url = url if article is None else article.url  # share one string between all rows of an archive
        known = members.setdefault(figure.pair_id, (url, figure.member))
        if known != (url, figure.member):
            found.bad.append(BadListRow(place, figure.pair_id, f"{where}: pair_id is also the id of another figure"))
        elif article is not None and any(other.pair_id == figure.pair_id for other in article.figures):
            found.num_repeated += 1
        elif max_images is None or len(members) <= max_images:
            if article is None:
                article = articles[url] = Article(url)
                found.articles.append(article)
            article.figures.append(figure)
        else:
            break
    if place < 0:
        names = ", ".join(map(str, paths))
        raise DataError(f"{names}: no rows; expected rows with pmc_tar_url, image_file_path, pair_id")
    return found


def _id_of(row: Any) -> str:
    """Return the id of any JSON value; empty if it has none."""
    pair_id = row.get("pair_id") if isinstance(row, dict) else None
    return pair_id if isinstance(pair_id, str) else ""


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield `(where, row)`; a line that is not JSON yields its text as the row."""
    try:
        with open_decompressed(path) as stream:
            first = stream.readline(MAX_ROW)
        if _is_captions(first):
            for domain, index, caption in iter_lists(path):
                yield f"{path}, {domain} {index}", _list_row(caption)
            return
        for number, row in iter_rows(path, lines=True):
            if isinstance(row, BrokenFileError):
                raise BrokenFileError(f"{path}, row {number}: {row}") from row
            yield f"{path}, row {number}", "not JSON" if isinstance(row, DataError) else row
    except FileNotFoundError:
        raise DataError(f"{path}: file not found; `sh download_data.sh` downloads the published list") from None
    except READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _is_captions(line: bytes) -> bool:
    """Return whether a file's first line begins an object with one list per domain."""
    row = decode_row(line.decode("utf-8-sig", "surrogateescape"))
    if isinstance(row, dict):
        return "pair_id" not in row and any(isinstance(value, list) for value in row.values())
    return line.lstrip().startswith(b"{")


def _list_row(caption: Any) -> Any:
    """Return a figure of a caption file as a row of a list."""
    reference = caption.get("graphic_ref") if isinstance(caption, dict) else None
    parts = reference.split("/") if isinstance(reference, str) else []
    if len(parts) < 4:
        return {"pair_id": caption.get("pair_id")} if isinstance(caption, dict) else caption
    folder, package = "/".join(parts[:-2]), parts[-2]
    return {
        "pmc_tar_url": f"{ARCHIVE_BASE}{PACKAGES}{folder}/{package}.tar.gz",
        "image_file_path": f"{package}/{parts[-1]}",
        "pair_id": caption.get("pair_id"),
    }


def _figure(row: Any, place: int, hosts: Collection[str]) -> tuple[str, Figure]:
    """Return the archive URL and the figure of a row.

    Raises:
        DataError: a field is missing, invalid or unsafe.
    """
    if not isinstance(row, dict):
        raise DataError(f"expected a JSON object, got {type_and_length(row)}")
    for key in ("pmc_tar_url", "image_file_path", "pair_id"):
        if not isinstance(row.get(key), str) or not row[key]:
            raise DataError(f"field {key!r} must be text, got {type_and_length(row.get(key))}")
    pair_id, member, url = row["pair_id"], plain_name(row["image_file_path"]), row["pmc_tar_url"]
    if not _FILE_NAME.fullmatch(pair_id):
        raise DataError(
            "field 'pair_id' must be usable as a file name: at most 200 letters, digits, '_', '.', '+' or '-'"
        )
    if member is None:
        raise DataError("field 'image_file_path' must be a relative path without '..'")
    if url.startswith("ftp://"):  # mirrors and proxies do not support ftp; the server has the same files under https
        url = "https://" + url.removeprefix("ftp://")
    return _checked(url, hosts), Figure(pair_id, member, place)


def _checked(url: str, hosts: Collection[str]) -> str:
    try:
        host, _ = url_origin(url)
    except DownloadError as error:
        raise DataError(f"field 'pmc_tar_url': {error}") from error
    if host not in hosts:
        raise DataError(f"field 'pmc_tar_url': host {host} is not allowed; pass --allow-host {host} to allow it")
    if not _FILE_NAME.fullmatch(Article(url).file_name) or plain_name(Article(url).package) is None:
        raise DataError(f"field 'pmc_tar_url': {redacted_url(url)} does not end with the name of an archive")
    return url
