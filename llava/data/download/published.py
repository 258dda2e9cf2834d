"""Command `llava data download` (`sh download_data.sh`): the published data files and their images.

published_files.json: name, size, sha256 --fetch_file, from the first base that has it--> data/NAME
                                         --download_images--> data/images/
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.data.download.archives import plain_name
from llava.data.download.client import Client, add_network_options, bases_from, network_options
from llava.data.download.files import Expected, fetch_file, file_problem
from llava.data.download.url_policy import check_base, join_url, redacted_url
from llava.errors import ConfigError, DataError, DownloadError
from llava.utils import log
from llava.utils.cli import ExampleFormatter, Parser
from llava.utils.files import hold_lock
from llava.utils.log import progress_bar
from llava.utils.terminal import write_out

logger = logging.getLogger(__name__)

TABLE = Path(__file__).with_name("published_files.json")
"""Default table of the published files."""

BASE_VARIABLE = "LLAVA_DATA_BASE"
"""Environment variable with mirrors of the data files."""

FOLDERS = ("alignment", "instruct", "eval", "pmc_articles", "images")
IMAGE_LISTS = ("llava_med_image_urls.jsonl", "eval/llava_med_eval_qa50_fig_captions.json")
"""Files that name images; the captions name the 50 images of the chat evaluation, which the list lacks."""

FORWARDED = ("rate", "max_attempts", "first_wait", "max_wait", "stall_seconds", "min_speed", "user_agent")
"""Network options that are passed on to download_images.py."""

EPILOG = """
examples:
  sh download_data.sh                                     everything, as published
  sh download_data.sh --only instruct                     these files, and the images that they list
  sh download_data.sh --mirror-dir /mnt/mirror            from a folder, without network access
  sh download_data.sh -- --only data/instruct/llava_med_instruct_10k.json     flags after -- go to download_images.py
exit status: 0 all files are present and verified; 1 some are not; 2 cannot start
"""


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """File of the table: its path under a base and under the data folder, expected content, description."""

    name: str
    expected: Expected
    what: str


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """Published files and the bases they were published under."""

    bases: tuple[str, ...]
    files: tuple[PublishedFile, ...]


def read_table(path: Path = TABLE) -> PublishedTable:
    """Return the table of published files in a JSON file.

    Raises:
        ConfigError: the file is not such a table.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(_file(row) for row in content["files"])
        return PublishedTable(tuple(map(str, content.get("bases", ()))), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not a table of files ({type(error).__name__}: {error}); expected "
            '{"bases": [...], "files": [{"name", "size", "sha256"}]}'
        ) from error


def _file(row: dict[str, Any]) -> PublishedFile:
    name, size, digest = row["name"], row.get("size"), row.get("sha256")
    if plain_name(name) != name:
        raise ValueError(f"{name!r} is not a relative path without '..'")
    if not isinstance(size, int | None) or not isinstance(digest, str | None):
        raise ValueError(f"{name}: size must be a number and sha256 text, or null if unknown")
    return PublishedFile(name, Expected(size, digest, max_bytes=size), str(row.get("what", "")))


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="llava data download",
        description="Download the published data files, verify size and sha256, then download their images. A failed "
        "file does not stop the others; rerun the same command to resume.",
        epilog=EPILOG,
        formatter_class=ExampleFormatter,
    )
    add = parser.add_argument
    add("--data-dir", default="data", help="folder of the files")
    add(
        "--base",
        nargs="+",
        metavar="BASE",
        help=f"mirrors, tried in this order instead of the published bases (or {BASE_VARIABLE})",
    )
    add("--mirror-dir", help="folder of a mirror, for files and archives; the same as --base FOLDER --pmc-base FOLDER")
    add(
        "--only",
        nargs="+",
        metavar="WORD",
        help="only files whose name contains one of these words, and the images that they list",
    )
    add("--table", help="another table of files; default: the published one")
    parser.add_switch("--list", help="print the table and exit")
    parser.add_switch("--check", help="verify the existing files and download nothing")
    parser.add_switch("--images", default=True, help="also download the images (about 69 GB)")
    add_network_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        SystemExit: with status 1 if a file or an image is missing.
    """
    log.setup_logging()
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    args = make_parser().parse_args(words[:split])
    try:
        status = download_data(args, words[split + 1 :])
    except KeyboardInterrupt:
        sys.stderr.write("stopped; rerun the same command to resume\n")
        status = 130
    if status:
        raise SystemExit(status)


def download_data(args: argparse.Namespace, image_words: Sequence[str]) -> int:
    """Run the download that the flags describe and return the exit status.

    Args:
        args: parsed flags.
        image_words: further flags of download_images.py.
    """
    table = read_table(Path(args.table or TABLE))
    files = chosen(table.files, args.only)
    data = Path(args.data_dir)
    if args.list:
        write_out(listing(table, files))
        return 0
    if args.check:
        problems = {file.name: problem for file in files if (problem := file_problem(data / file.name, file.expected))}
        write_out(report(files, problems))
        return int(bool(problems))
    problems = download(files, table, data, args)
    status = fetch_images(files, data, args, image_words) if args.images else 0
    return max(status, int(bool(problems)))


def chosen(files: Sequence[PublishedFile], words: Sequence[str] | None) -> list[PublishedFile]:
    """Return the files whose name contains one of the words; all files without words.

    Raises:
        ConfigError: no file matches.
    """
    found = [file for file in files if words is None or any(word in file.name for word in words)]
    if not found:
        names = ", ".join(file.name for file in files)
        raise ConfigError(f"--only {' '.join(words or ())} matches no file; known files: {names}")
    return found


def download(
    files: Sequence[PublishedFile], table: PublishedTable, data: Path, args: argparse.Namespace
) -> dict[str, str]:
    """Download the missing files, print a report, and return the problems of files that are still missing."""
    named = bases_from(args.base, BASE_VARIABLE)
    if args.mirror_dir is not None:
        named.insert(0, check_base(args.mirror_dir))
    bases = named or list(table.bases)
    try:
        for folder in FOLDERS:
            (data / folder).mkdir(parents=True, exist_ok=True)
        with (
            hold_lock(data / ".download.lock", purpose="downloading data files"),
            progress_bar(sum(file.expected.size or 0 for file in files), title="data files", unit="B") as bar,
            Client(network_options(args), bases=named) as client,
        ):
            bar.unit_scale = True
            problems = _fetch_all(files, bases, data, client, bar.update)
    except OSError as error:
        raise DataError(f"{error.filename or data} cannot be written: {error.strerror or error}") from error
    write_out(report(files, problems))
    if problems:
        write_out("rerun the same command to resume; --base URL or --mirror-dir FOLDER selects another source\n")
    return problems


def _fetch_all(
    files: Sequence[PublishedFile], bases: Sequence[str], data: Path, client: Client, on_bytes: Any
) -> dict[str, str]:
    problems: dict[str, str] = {}
    for file in files:
        target = data / file.name
        problem = file_problem(target, file.expected)
        if not problem:
            on_bytes(target.stat().st_size)
            continue
        if problem != "missing":
            aside = _free_name(target)
            logger.warning("%s: %s; it is renamed to %s and downloaded again", target, problem, aside.name)
            target.replace(aside)
        try:
            urls = [join_url(base, file.name) for base in bases]
            source = fetch_file(client, urls, target, expected=file.expected, on_bytes=on_bytes)
            logger.info("%s: from %s", file.name, redacted_url(source))
        except DownloadError as error:
            problems[file.name] = f"{error.reason}: {error}"
    return problems


def _free_name(target: Path) -> Path:
    """Return an unused name beside a file; files that earlier runs renamed are not replaced."""
    first = target.with_name(f"{target.name}.unchecked")
    others = (target.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([first], others) if not name.exists())


def fetch_images(files: Sequence[PublishedFile], data: Path, args: argparse.Namespace, words: Sequence[str]) -> int:
    """Download the images that files list and return the exit status, which is 0 if no list is present.

    Args:
        files: selected files; the lists among them are used.
        data: folder of the files.
        args: flags of this command.
        words: further flags of download_images.py.
    """
    from llava.data.download import pmc

    lists = [str(data / file.name) for file in files if file.name in IMAGE_LISTS and (data / file.name).is_file()]
    if not lists:
        write_out(f"images: none downloaded; no list of images is selected ({', '.join(IMAGE_LISTS)})\n")
        return 0
    flags = ["--input-path", *lists, "--images-output-path", str(data / "images")]
    flags += ["--pmc-output-path", str(data / "pmc_articles")]
    flags += [] if args.mirror_dir is None else ["--mirror-dir", args.mirror_dir]
    for name in FORWARDED:
        flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return pmc.download_images(pmc.make_parser().parse_args([*flags, *words]))


def listing(table: PublishedTable, files: Sequence[PublishedFile]) -> str:
    """Return the table as text."""
    lines = [f"bases: {' '.join(table.bases)}"]
    for file in files:
        digest = file.expected.sha256 or "sha256 unknown: size only"
        size = "unknown size" if file.expected.size is None else f"{file.expected.size:,}"
        lines.append(f"{file.name}\n    {size:>13}  {digest}\n    {file.what}")
    return "\n".join(lines) + "\n"


def report(files: Sequence[PublishedFile], problems: dict[str, str]) -> str:
    """Return one line per file, and a last line with the counts."""
    lines = []
    for file in files:
        if file.name in problems:
            lines.append(f"FAILED  {file.name}: {problems[file.name]}")
        elif file.expected.sha256 is None:
            lines.append(
                f"ok      {file.name} (sha256 unknown: {'only the size is' if file.expected.size else 'not'} verified)"
            )
        else:
            lines.append(f"ok      {file.name}")
    lines.append(f"{len(files) - len(problems)} of {len(files)} files are present and verified")
    return "\n".join(lines) + "\n"
