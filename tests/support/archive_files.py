"""Synthetic archives of articles as PMC packs them, and a mirror of them."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

from tests.support.tiny import tiny_image


def jpeg(seed: int, ending: str = "JPEG") -> bytes:
    """Return the bytes of a small image file."""
    stream = io.BytesIO()
    tiny_image(seed).save(stream, ending)
    return stream.getvalue()


def plain(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    """Return a regular member of an archive."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    return entry, data


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    """Return a member that is a link, device or folder."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry, b""


def tar(members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """Return an uncompressed archive."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for entry, data in members:
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def tar_gz(members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a compressed archive."""
    return gzip.compress(tar(members, form), 1, mtime=0)


def package(number: int) -> str:
    """Return the path of an article's archive in a mirror."""
    return f"oa_package/{number % 256:02x}/0a/PMC{number}.tar.gz"


def article(number: int, num_figures: int = 3) -> bytes:
    """Return an archive with a text, thumbnails and figures."""
    name = f"PMC{number}"
    members = [special(f"{name}/", tarfile.DIRTYPE), plain(f"{name}/text.nxml", b"<article/>" * 500)]
    for figure in range(num_figures):
        members.append(plain(f"{name}/J-1-g{figure:03}.gif", jpeg(figure, "GIF")))
        members.append(plain(f"{name}/J-1-g{figure:03}.jpg", jpeg(number * 100 + figure)))
    return tar_gz([*members, plain(f"{name}/paper.pdf", b"%PDF" + bytes(20_000))])


def rows(number: int, num_figures: int = 3, base: str = "https://ftp.ncbi.nlm.nih.gov/pub/pmc") -> list[dict[str, str]]:
    """Return the rows of an article in the figure list."""
    return [
        {
            "pmc_tar_url": f"{base}/{package(number)}",
            "image_file_path": f"PMC{number}/J-1-g{figure:03}.jpg",
            "pair_id": f"{number}_F{figure}",
        }
        for figure in range(num_figures)
    ]


def write_list(path: Path, content: list[dict[str, str]]) -> Path:
    """Return a figure list."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path
