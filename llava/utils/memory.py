"""Memory that this process may still use, within the limits of its cgroups (containers, systemd)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
FILES = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
"""Files with the limit and the use of a cgroup, by controller: version 2 has one hierarchy without a name."""


def available_memory(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Return the available memory in bytes, of the machine or of a cgroup of this process that has less.

    Args:
        root: folder of the cgroups.
        membership: file that names those of this process.
    """
    return min([int(psutil.virtual_memory().available), *_left_by_cgroups(root, membership)])


def _left_by_cgroups(root: Path, membership: Path) -> Iterator[int]:
    for line in _text(membership).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        controller = "memory" if "memory" in controllers.split(",") else controllers
        if controller not in FILES:
            continue
        top = root / controller
        group = top / path.strip("/")
        # Each limit includes the groups below. A container may see its own group as the top of the hierarchy.
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield from _left(folder, *FILES[controller])


def _left(folder: Path, limit_name: str, use_name: str) -> Iterator[int]:
    limit, used = _text(folder / limit_name), _text(folder / use_name)
    if limit.isdigit() and used.isdigit():
        # Pages of files that were not used lately are released when memory is needed.
        yield max(0, int(limit) - max(0, int(used) - _inactive_files(folder)))


def _inactive_files(folder: Path) -> int:
    pairs = dict(line.partition(" ")[::2] for line in _text(folder / "memory.stat").splitlines())
    found = pairs.get("total_inactive_file") or pairs.get("inactive_file", "")
    return int(found) if found.isdigit() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError):
        return ""
