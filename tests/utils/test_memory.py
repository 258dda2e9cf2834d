"""Available memory: the limits of cgroups count."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from llava.utils.memory import available_memory


def written(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("line", "folder", "files"),
    [
        ("0::/a/b", "a/b", {"memory__max": "9000\n", "memory__current": "2000\n"}),
        ("0::/a/b", "a", {"memory__max": "9000\n", "memory__current": "2000\n"}),
        ("0::/unseen/container", "", {"memory__max": "9000\n", "memory__current": "2000\n"}),
        ("4:memory:/a", "memory/a", {"memory__limit_in_bytes": "9000\n", "memory__usage_in_bytes": "2000\n"}),
        ("4:cpu,memory:/a", "memory", {"memory__limit_in_bytes": "9000\n", "memory__usage_in_bytes": "2000\n"}),
    ],
)
def test_the_limit_of_a_cgroup_counts(line: str, folder: str, files: dict[str, str], tmp_path: Path) -> None:
    membership = tmp_path / "self"
    membership.write_text(f"1:cpu:/x\n{line}\n")
    written(tmp_path / "root" / folder, **files, memory__stat="anon 5\ninactive_file 500\n")
    assert available_memory(tmp_path / "root", membership) == 7500


@pytest.mark.parametrize("limit", ["max\n", "9223372036854771712\n"])
def test_a_group_without_a_limit_leaves_that_of_the_machine(limit: str, tmp_path: Path) -> None:
    membership = tmp_path / "self"
    membership.write_text("0::/\n")
    written(tmp_path / "root", memory__max=limit, memory__current="1\n")
    assert 9000 < available_memory(tmp_path / "root", membership) <= psutil.virtual_memory().total
    assert available_memory(tmp_path / "none", tmp_path / "none") > 9000
