"""`sh download_data.sh` in a shell: mirrors, failures, exit status, kills and resuming."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava.data.download.files import file_problem
from llava.data.download.published import TABLE, read_table
from llava.errors import ConfigError
from tests.support.archive_files import article, package, rows
from tests.support.file_server import Fault, FileServer, serve
from tests.support.processes import run_command, started

ROOT = Path(__file__).resolve().parents[3]
QUICK = ["--rate", "0", "--first-wait", "0.01", "--max-wait", "0.05", "--stall-seconds", "0.5", "--max-attempts", "2"]
NAMES = ["alignment/a.json", "instruct/b.json", "eval/c.jsonl", "llava_med_image_urls.jsonl"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    """Serve four files, the last of which lists the figures of two articles, and write their table."""
    with serve() as state:
        contents = [random.Random(number).randbytes(40_000) for number in range(3)]
        contents.append("".join(json.dumps(row) + "\n" for number in (1, 2) for row in rows(number)).encode())
        table = []
        for name, data in zip(NAMES, contents, strict=True):
            state.files[f"/{name}"] = data
            table.append({"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        for number in (1, 2):
            state.files[f"/{package(number)}"] = article(number)
        (tmp_path / "table.json").write_text(json.dumps({"bases": [], "files": table}))
        yield state


def line(folder: Path, *words: str) -> list[str]:
    """Return a command line that works in `folder`."""
    table = ["--table", str(folder / "table.json"), "--data-dir", str(folder / "data")]
    return ["sh", "download_data.sh", *table, *QUICK, *words]


def sh(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line at the root of the repository."""
    settings = {**os.environ, **environment}
    return run_command(words, cwd=ROOT, env=settings, timeout=900)


def content(folder: Path) -> dict[str, bytes]:
    """Return all data files and images."""
    found = (path for path in sorted((folder / "data").rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder / "data")): path.read_bytes()
        for path in found
        if not path.name.startswith(".") and not path.name.endswith("summary.json")
    }


def test_files_and_images_from_a_mirror(server: FileServer, tmp_path: Path) -> None:
    done = sh(line(tmp_path, "--", "--pmc-base", server.address), LLAVA_DATA_BASE=server.address)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 files are present and verified" in done.stdout and "6 of 6 present" in done.stdout
    names = {f"images/{number}_F{figure}.jpg" for number in (1, 2) for figure in range(3)}
    assert set(content(tmp_path)) == {*NAMES, *names, "missing.jsonl"}
    assert all(content(tmp_path)[name] == server.files[f"/{name}"] for name in NAMES)
    assert {path.name for path in (tmp_path / "data").iterdir() if path.is_dir()} == {
        "alignment", "instruct", "eval", "images", "pmc_articles"
    }  # fmt: skip
    before = len(server.log)
    assert sh(line(tmp_path, "--base", server.address, "--", "--pmc-base", server.address)).returncode == 0
    assert len(server.log) == before, "a second run sends no request"


def test_failed_files_are_reported_and_do_not_stop_the_others(server: FileServer, tmp_path: Path) -> None:
    del server.files["/alignment/a.json"]
    server.files["/instruct/b.json"] = b"\0" * 40_000
    server.faults["/eval/c.jsonl"] = [Fault(cut_after=1000)]
    done = sh(line(tmp_path, "--base", server.address, "--images", "False"))
    assert done.returncode == 1
    assert "FAILED  alignment/a.json: not_found" in done.stdout
    assert "FAILED  instruct/b.json: wrong_content" in done.stdout and "sha256" in done.stdout
    assert "2 of 4 files are present and verified\nrerun the same command to resume; --base" in done.stdout
    assert set(content(tmp_path)) == set(NAMES[2:])
    assert "Traceback" not in done.stderr


def test_a_folder_as_mirror_needs_no_network(server: FileServer, tmp_path: Path) -> None:
    """Files and articles are read from the folder; with a dead proxy, any request would fail."""
    for path, data in server.files.items():
        target = tmp_path / "mirror" / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    done = sh(line(tmp_path, "--mirror-dir", str(tmp_path / "mirror")), HTTPS_PROXY="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr + done.stdout
    assert len(content(tmp_path)) == 4 + 6 + 1 and not server.log
    (tmp_path / "data" / "eval" / "c.jsonl").write_bytes(b"short")
    checked = sh(line(tmp_path, "--check"))
    assert checked.returncode == 1 and "FAILED  eval/c.jsonl: 5 bytes, expected 40000" in checked.stdout
    again = sh(line(tmp_path, "--base", f"file://{tmp_path}/mirror", "--images", "False"))
    assert again.returncode == 0
    assert (tmp_path / "data" / "eval" / "c.jsonl.unchecked").read_bytes() == b"short", "files of the user are kept"


def test_only_some_files_fetch_the_images_that_those_list(server: FileServer, tmp_path: Path) -> None:
    done = sh(line(tmp_path, "--base", server.address, "--only", "instruct"))
    assert done.returncode == 0 and "1 of 1 files are present and verified" in done.stdout, done.stdout + done.stderr
    assert "images: none downloaded; no list of images is selected" in done.stdout
    done = sh(line(tmp_path, "--base", server.address, "--only", "urls", "--", "--pmc-base", server.address))
    assert done.returncode == 0 and "6 of 6 present" in done.stdout, done.stdout + done.stderr
    asked = len(server.log)
    assert sh(line(tmp_path, "--base", server.address, "--only", "instruct")).returncode == 0
    assert len(server.log) == asked, "a list of another run is not used"


def test_renamed_files_are_not_replaced(server: FileServer, tmp_path: Path) -> None:
    words = line(tmp_path, "--base", server.address, "--only", "instruct", "--images", "False")
    target = tmp_path / "data" / "instruct" / "b.json"
    target.parent.mkdir(parents=True)
    for text in ("first", "second", "third"):
        target.write_text(text)
        assert sh(words).returncode == 0
    kept = {path.name: path.read_text() for path in target.parent.glob("*.unchecked*")}
    assert kept == {"b.json.unchecked": "first", "b.json.unchecked-2": "second", "b.json.unchecked-3": "third"}


def test_killed_and_resumed(server: FileServer, tmp_path: Path) -> None:
    """After a kill inside a file and inside an article, the next run downloads only the rest."""
    words = line(tmp_path, "--base", server.address, "--", "--pmc-base", server.address, "--cpus", "1")
    images, part = tmp_path / "data" / "images", tmp_path / "data" / "instruct" / "b.json.part"
    ready = [lambda: part.exists() and part.stat().st_size > 4000, lambda: len(list(images.glob("*.jpg"))) > 1]
    slow = {"/instruct/b.json": 2000, f"/{package(1)}": 700}
    for number, (path, piece) in enumerate(slow.items()):
        server.faults[path] = [Fault(pause=0.05, piece=piece)]
        with started(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            deadline = time.monotonic() + 240
            while not ready[number]() and time.monotonic() < deadline:
                time.sleep(0.01)
            run.send_signal(signal.SIGKILL)
        assert run.returncode == -signal.SIGKILL, "it ended before it was killed"
        server.faults.clear()
    assert any(request.path == "/instruct/b.json" and request.range for request in server.log), "not resumed"
    done = sh(words)
    assert done.returncode == 0, done.stderr
    assert server.asked("/alignment/a.json") == 1 and server.asked(f"/{package(1)}") <= 2
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "table.json").write_bytes((tmp_path / "table.json").read_bytes())
    assert sh(line(whole, "--base", server.address, "--", "--pmc-base", server.address)).returncode == 0
    assert content(tmp_path) == content(whole)


@pytest.mark.parametrize("words", [["--base", "/no/such/mirror"], ["--only", "nothing"], ["--table", "README.md"]])
def test_invalid_flags_have_a_message(tmp_path: Path, words: list[str]) -> None:
    done = sh(["sh", "download_data.sh", "--data-dir", str(tmp_path), *words])
    assert done.returncode == 2 and "llava: error:" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_python_has_a_message() -> None:
    done = sh(["sh", "download_data.sh"], PYTHON="/bin/false")
    assert done.returncode == 2 and "scripts/setup.sh" in done.stderr


def test_help_and_table_load_neither_torch_nor_transformers() -> None:
    done = sh(["sh", "download_data.sh", "--list"])
    assert done.returncode == 0 and done.stdout.count("llava_med") >= 9
    code = (
        "import sys\nfrom llava.data.download import published, pmc as pmc_program\n"
        "heavy = {'torch', 'transformers'} & sys.modules.keys()\nassert not heavy, heavy\n"
    )
    assert sh([str(ROOT / ".venv" / "bin" / "python"), "-c", code]).returncode == 0
    for words in (["sh", "download_data.sh", "--help"], ["python", "llava/data/download_images.py", "--help"]):
        done = sh(words, PATH=f"{ROOT}/.venv/bin:{os.environ['PATH']}")
        assert done.returncode == 0 and "example" in done.stdout and "exit status" in done.stdout


def test_the_table_is_complete_and_matches_the_released_files(shared: Path) -> None:
    table = read_table()
    assert len(table.files) == 9 and len({file.name for file in table.files}) == 9
    assert all(file.expected.size and len(file.expected.sha256 or "") == 64 for file in table.files)
    assert all(base.startswith("https://") for base in table.bases)
    released = [file for file in table.files if file.name.startswith("eval/")]
    folder = shared / "oracles" / "llava-med-eval"
    assert [file_problem(folder / Path(file.name).name, file.expected) for file in released] == ["", "", ""]
    specified = (shared / "specs" / "llava-med.md").read_text()
    for file in table.files:
        assert f"| data/{file.name} | {file.expected.size:,} | {file.expected.sha256} |" in specified


@pytest.mark.parametrize(
    "table",
    ["[]", "{}", '{"files": [{"name": "../x"}]}', '{"files": [{"name": "x", "size": "1"}]}', '{"files": [1]}', "text"],
)
def test_invalid_tables(tmp_path: Path, table: str) -> None:
    (tmp_path / "table.json").write_text(table)
    with pytest.raises(ConfigError, match="is not a table of files"):
        read_table(tmp_path / "table.json")
    assert TABLE.is_file()


def test_report_without_a_hash_names_the_verified_size(server: FileServer, tmp_path: Path) -> None:
    table = json.loads((tmp_path / "table.json").read_text())
    table["files"] = [{**table["files"][0], "sha256": None}]
    (tmp_path / "table.json").write_text(json.dumps(table))
    done = sh(line(tmp_path, "--base", server.address, "--images", "False"))
    assert done.returncode == 0 and "sha256 unknown: only the size is verified" in done.stdout
