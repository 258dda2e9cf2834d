"""Download of figures from a faulty mirror, in one process and in killed processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.download import pmc
from llava.data.download.client import Client, NetworkOptions
from llava.data.download.pmc import fetch
from llava.data.download.pmc_article import ImageOptions
from llava.data.download.pmc_list import read_lists
from llava.errors import ConfigError, DataError
from llava.utils.files import hold_lock
from tests.support.archive_files import article, jpeg, package, plain, rows, special, tar_gz, write_list
from tests.support.file_server import Fault, FileServer, serve
from tests.support.processes import run_command, started

ROOT = Path(__file__).resolve().parents[3]
QUICK = ["--rate", "0", "--first-wait", "0.01", "--max-wait", "0.05", "--stall-seconds", "0.3", "--max-attempts", "3"]


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve() as state:
        yield state


def offer(server: FileServer, *numbers: int) -> list[dict[str, str]]:
    """Put articles on the server and return their rows of the list."""
    for number in numbers:
        server.files[f"/{package(number)}"] = article(number)
    return [row for number in numbers for row in rows(number)]


def flags(folder: Path, *bases: str) -> list[str]:
    """Return the flags of a run in `folder` against mirrors."""
    paths = ["--input_path", str(folder / "list.jsonl"), "--images_output_path", str(folder / "images")]
    return [*paths, "--pmc_output_path", str(folder / "pmc"), "--pmc-base", *bases, *QUICK]


def run(words: list[str]) -> int:
    """Return the exit status of a run in this process."""
    return pmc.download_images(pmc.make_parser().parse_args(words))


def missing(folder: Path) -> dict[str, str]:
    """Return the reason of each missing image."""
    lines = (folder / "missing.jsonl").read_text().splitlines()
    return {row["pair_id"]: row["reason"] for row in map(json.loads, lines)}


def image_files(folder: Path) -> dict[str, bytes]:
    """Return all files in the folder of images."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / "images").rglob("*"))}


def test_each_article_is_fetched_once_and_only_listed_figures_stay(server: FileServer, tmp_path: Path) -> None:
    wanted = offer(server, 1, 2)
    random.Random(0).shuffle(wanted)
    write_list(tmp_path / "list.jsonl", [row for row in wanted if row["pair_id"] != "2_F1"] * 2)
    assert run(flags(tmp_path, server.address)) == 0
    expected = {f"images/{n}_F{f}.jpg": jpeg(n * 100 + f) for n in (1, 2) for f in range(3) if (n, f) != (2, 1)}
    assert image_files(tmp_path) == dict(sorted(expected.items()))
    assert sorted(request.path for request in server.log) == [f"/{package(1)}", f"/{package(2)}"]
    assert missing(tmp_path) == {} and not (tmp_path / "pmc").exists()


def test_second_run_sends_no_request(server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_list(tmp_path / "list.jsonl", [*offer(server, 1), *rows(9)])
    assert run(flags(tmp_path, server.address)) == 0
    before, listed = len(server.log), (tmp_path / "missing.jsonl").read_bytes()
    assert run(flags(tmp_path, server.address)) == 0
    assert len(server.log) == before and (tmp_path / "missing.jsonl").read_bytes() == listed
    assert "images: 3 of 6 present (0 new)" in capsys.readouterr().out
    run([*flags(tmp_path, server.address), "--retry-missing"])
    assert len(server.log) == before + 1, "retried only on request"
    run(flags(tmp_path, server.address, server.address + "/second"))
    assert server.asked(f"/second/{package(9)}") == 1, "a new mirror is tried"


def break_articles(server: FileServer) -> list[dict[str, str]]:
    """Offer articles 1 to 9, of which only the first and the last are intact."""
    wanted = offer(server, *range(1, 10))
    data = server.files[f"/{package(2)}"]
    server.files[f"/{package(2)}"] = data[:-200] + bytes(200)
    del server.files[f"/{package(3)}"]
    server.faults[f"/{package(4)}"] = [Fault(status=500, always=True)]
    server.faults[f"/{package(5)}"] = [Fault(stall_after=300, always=True)]
    server.files[f"/{package(6)}"] = tar_gz([plain("PMC6/J-1-g000.jpg", jpeg(1)[:-300]), plain("PMC6/x", b"")])
    server.files[f"/{package(7)}"] = tar_gz([special("PMC7/J-1-g000.jpg", tarfile.SYMTYPE, "/etc/passwd")])
    server.files[f"/{package(8)}"] = b"<html>moved</html>"
    return wanted


REASONS_OF = {
    "3_F0": "not_found", "4_F0": "unavailable", "5_F2": "stalled", "6_F0": "broken_image", "6_F1": "not_in_archive",
    "7_F0": "unsafe_member", "7_F1": "not_in_archive", "8_F2": "not_an_archive", "odd_1": "bad_row",
    "../odd": "bad_row",
}  # fmt: skip


def test_runs_with_separate_lists_take_turns_in_one_folder(server: FileServer, tmp_path: Path) -> None:
    """The second run would otherwise remove the incomplete images of the first."""
    write_list(tmp_path / "list.jsonl", offer(server, 1))
    writing = tmp_path / "images" / ".partial" / "2_F0.jpg"
    writing.parent.mkdir(parents=True)
    writing.write_bytes(b"half")
    other = [*flags(tmp_path, server.address), "--missing", str(tmp_path / "other.jsonl")]
    with ThreadPoolExecutor(1) as pool:
        with hold_lock(tmp_path / ".images.lock", purpose="a test"):
            running = pool.submit(run, other)
            time.sleep(0.3)
            assert writing.exists() and not running.done()
        assert running.result(timeout=120) == 0
    assert set(image_files(tmp_path)) == {f"images/1_F{figure}.jpg" for figure in range(3)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--filter-json", "none.json"], r"--filter-json .* is not a file"),
        (["--rate", "nan"], "finite"),
        (["--stall-seconds", "nan"], "finite"),
        (["--max-wait", "nan"], "finite"),
    ],
)
def test_invalid_flags_are_refused_at_the_start(
    server: FileServer, tmp_path: Path, words: list[str], message: str
) -> None:
    write_list(tmp_path / "list.jsonl", offer(server, 1))
    with pytest.raises(ConfigError, match=message):
        run([*flags(tmp_path, server.address), *words])
    assert not (tmp_path / "images").exists()


def test_every_failure_is_listed_and_the_rest_is_downloaded(
    server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {**rows(1)[0], "pair_id": "odd_1", "image_file_path": "../../x.jpg"}
    wanted = [*break_articles(server), odd, {**odd, "pair_id": "../odd"}]
    write_list(tmp_path / "list.jsonl", wanted)
    assert run(flags(tmp_path, server.address)) == 1
    found = missing(tmp_path)
    assert {pair_id: found[pair_id] for pair_id in REASONS_OF} == REASONS_OF
    names = set(image_files(tmp_path))
    assert names >= {f"images/{n}_F{f}.jpg" for n in (1, 9) for f in range(3)}
    assert {f"images/{row['pair_id']}.jpg" for row in wanted} - names == {f"images/{pair_id}.jpg" for pair_id in found}
    assert {path.name for path in tmp_path.iterdir()} <= {
        "list.jsonl", "images", "missing.jsonl", "missing.summary.json", ".missing.jsonl.lock", ".images.lock"
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "missing:" in out and "stalled" in out
    summary = json.loads((tmp_path / "missing.summary.json").read_text())
    assert summary["num_archives"] == 7, "nine articles, one is gone and one is unavailable"
    assert summary["num_there"] + summary["num_taken"] + sum(summary["missing"].values()) == summary["num_wanted"]


def test_transient_failures_are_retried(server: FileServer, tmp_path: Path) -> None:
    write_list(tmp_path / "list.jsonl", break_articles(server))
    run(flags(tmp_path, server.address))
    server.faults.clear()
    server.log.clear()
    assert run(flags(tmp_path, server.address)) == 1
    assert sorted({request.path for request in server.log}) == [f"/{package(4)}", f"/{package(5)}"]
    assert not {reason for reason in missing(tmp_path).values()} & {"unavailable", "stalled"}


@pytest.mark.parametrize(("broken", "status"), [([3], 0), ([3, 4], 1)])
def test_the_exit_status(server: FileServer, tmp_path: Path, broken: list[int], status: int) -> None:
    break_articles(server)
    write_list(tmp_path / "list.jsonl", [row for number in [1, *broken] for row in rows(number)])
    assert run(flags(tmp_path, server.address)) == status
    assert run([*flags(tmp_path, server.address), "--strict"]) == 1


def test_mirrors_complete_each_other(server: FileServer, tmp_path: Path) -> None:
    """The first mirror is a folder that lacks an article and holds another one damaged."""
    write_list(tmp_path / "list.jsonl", offer(server, 1, 2, 3))
    for number, size in ((1, None), (2, -500)):
        path = tmp_path / "mirror" / package(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(article(number)[:size])
    words = [*flags(tmp_path, server.address), "--mirror-dir", str(tmp_path / "mirror")]
    assert run(words) == 0 and len(image_files(tmp_path)) == 9
    assert server.asked(f"/{package(1)}") == 0 and server.asked(f"/{package(3)}") == 1


def test_single_figures_are_tried_first_and_archives_fill_the_gaps(server: FileServer, tmp_path: Path) -> None:
    write_list(tmp_path / "list.jsonl", offer(server, 1))
    for figure in range(2):
        server.files[f"/one/PMC1.1/J-1-g{figure:03}.jpg"] = jpeg(100 + figure)
    words = [*flags(tmp_path, server.address), "--figure-base", f"{server.address}/one"]
    assert run(words) == 0 and len(image_files(tmp_path)) == 3
    assert server.asked(f"/{package(1)}") == 1


def test_kept_archives_are_used_and_never_deleted(server: FileServer, tmp_path: Path) -> None:
    write_list(tmp_path / "list.jsonl", offer(server, 1, 2))
    (tmp_path / "pmc").mkdir()
    (tmp_path / "pmc" / "PMC1.tar.gz").write_bytes(article(1))
    assert run([*flags(tmp_path, server.address), "--remove_pmc", "False"]) == 0
    assert [request.path for request in server.log] == [f"/{package(2)}"]
    assert sorted(path.name for path in (tmp_path / "pmc").iterdir()) == ["PMC1.tar.gz", "PMC2.tar.gz"]
    assert (tmp_path / "pmc" / "PMC2.tar.gz").read_bytes() == article(2)


def test_number_of_connections_is_limited(server: FileServer, tmp_path: Path) -> None:
    """The server notices the end of a client late, so it may count each of the two twice."""
    wanted = offer(server, *range(1, 13))
    write_list(tmp_path / "list.jsonl", [{**row, "image_file_path": "PMC/none.jpg"} for row in wanted])
    for number in range(1, 13):
        server.faults[f"/{package(number)}"] = [Fault(pause=0.02, piece=500)]
    assert run([*flags(tmp_path, server.address), "--cpus", "2"]) == 0
    assert 2 <= server.most_at_once <= 4
    assert set(missing(tmp_path).values()) == {"not_in_archive"}


def test_only_and_filter(server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only images of the data file are downloaded, and the filtered copy keeps the other rows unchanged."""
    write_list(tmp_path / "list.jsonl", [*offer(server, 1, 2), *rows(9)])
    data = [{"id": "é", "image": "1_F0.jpg", "conversatons": []}, {"id": 2, "image": "9_F0.jpg"}, {"id": 3, "n": None}]
    data.append({"id": 4, "image": ["1_F0.jpg", "9_F1.jpg"]})
    (tmp_path / "train.json").write_text(json.dumps(data))
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, data)))
    files = [str(tmp_path / "train.json"), str(tmp_path / "train.jsonl")]
    assert run([*flags(tmp_path, server.address), "--only", *files, "--filter-json", *files]) == 0
    assert list(image_files(tmp_path)) == ["images/1_F0.jpg"] and server.asked(f"/{package(2)}") == 0
    assert json.loads((tmp_path / "train.available.json").read_text()) == [data[0], data[2]]
    lines = (tmp_path / "train.available.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [data[0], data[2]]
    assert "2 rows kept, 2 rows with missing images left out" in capsys.readouterr().out


def test_captions_name_the_test_images(shared: Path) -> None:
    """The captions name the 50 images of the chat evaluation, which the published list lacks."""
    path = shared / "oracles" / "llava-med-eval" / "llava_med_eval_qa50_fig_captions.json"
    found = read_lists([path])
    assert found.num_figures == 50 and not found.bad
    assert found.articles[0].url.startswith("https://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/")
    asked = shared / "oracles" / "llava-med-eval" / "llava_med_eval_qa50_qa.jsonl"
    names = {json.loads(line)["image"] for line in asked.read_text().splitlines()}
    assert names == {figure.file_name for article in found.articles for figure in article.figures}


BAD: list[Any] = [
    "text", [], {}, {"pair_id": 1}, {"pair_id": "a/b"}, {"pair_id": ".hidden"}, {"image_file_path": "/etc/passwd"},
    {"image_file_path": "a/../../b"}, {"pmc_tar_url": "file:///etc/passwd"}, {"pmc_tar_url": "http://127.0.0.1/x.tar.gz"},
    {"pmc_tar_url": "https://example.org/oa_package/x.tar.gz"}, {"pmc_tar_url": "https://[/x"},
    {"pmc_tar_url": "https://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/../../../x.tar.gz"},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_invalid_rows_are_listed(tmp_path: Path, bad: Any) -> None:
    row = {**rows(1)[0], **bad} if isinstance(bad, dict) and bad else bad
    write_list(tmp_path / "list.jsonl", [row, rows(2)[0]])
    found = read_lists([tmp_path / "list.jsonl"])
    assert found.num_figures == 1 and len(found.bad) == 1 and "row 0" in found.bad[0].detail


def test_lists_zipped_repeated_limited_and_in_conflict(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "a.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows(1)).encode()))
    conflict = {**rows(2)[0], "pair_id": "1_F0"}
    write_list(tmp_path / "b.jsonl", [rows(1)[0], conflict, *rows(3)])
    found = read_lists([tmp_path / "a.gz", tmp_path / "b.jsonl"])
    assert (found.num_figures, found.num_repeated, len(found.bad)) == (6, 1, 1)
    assert read_lists([tmp_path / "a.gz", tmp_path / "b.jsonl"], max_images=2).num_figures == 2
    ftp = {**rows(4)[0], "pmc_tar_url": rows(4)[0]["pmc_tar_url"].replace("https", "ftp")}
    found = read_lists([write_list(tmp_path / "c.jsonl", [ftp])])
    assert found.articles[0].url == rows(4)[0]["pmc_tar_url"]
    with pytest.raises(DataError, match="no rows"):
        read_lists([write_list(tmp_path / "d.jsonl", [])])


def test_hosts_of_the_list_need_permission(server: FileServer, tmp_path: Path) -> None:
    """Other hosts are not contacted without a flag, and private addresses not even with it."""
    offer(server, 1)
    write_list(tmp_path / "list.jsonl", rows(1, base=server.address))
    words = [word for word in flags(tmp_path) if word != "--pmc-base"]
    words += ["--figure-base", str(tmp_path)]
    assert run(words) == 1 and set(missing(tmp_path).values()) == {"bad_row"}
    listed = read_lists([tmp_path / "list.jsonl"], allowed_hosts=["127.0.0.1"])
    options = ImageOptions(tmp_path / "images", tmp_path / "pmc", tmp_path / "second.jsonl")
    with Client(NetworkOptions(per_second=0)) as client:
        assert fetch(listed, client, options).missing == {"unsafe_address": 3}
    assert not server.log


def test_another_file_is_not_overwritten(server: FileServer, tmp_path: Path) -> None:
    write_list(tmp_path / "list.jsonl", offer(server, 1))
    (tmp_path / "train.json").write_text('[{"id": 1}]')
    with pytest.raises(DataError, match="not a list of missing images"):
        run([*flags(tmp_path, server.address), "--missing", str(tmp_path / "train.json")])
    assert (tmp_path / "train.json").read_text() == '[{"id": 1}]'


@pytest.mark.parametrize("word", ["ftp://mirror", "/no/such/folder", "http://"])
def test_invalid_bases(tmp_path: Path, word: str) -> None:
    with pytest.raises(ConfigError):
        run(flags(tmp_path, word))


def test_a_killed_run_is_continued_to_the_same_files(server: FileServer, tmp_path: Path) -> None:
    """A run killed twice inside archives and then resumed writes the same files as an uninterrupted run."""
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
        write_list(tmp_path / name / "list.jsonl", [*offer(server, *range(1, 9)), *rows(99)])
    assert run(flags(tmp_path / "whole", server.address)) == 0
    line = [sys.executable, "llava/data/download_images.py", *flags(tmp_path / "killed", server.address)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for round_ in (1, 2):
        for number in range(1, 9):
            server.faults[f"/{package(number)}"] = [Fault(pause=0.05, piece=700)]
        with started(line, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run_:
            deadline = time.monotonic() + 240
            while len(list((tmp_path / "killed").glob("images/*.jpg"))) < 5 * round_ and time.monotonic() < deadline:
                time.sleep(0.01)
            run_.send_signal(signal.SIGKILL)
        assert run_.returncode == -signal.SIGKILL
    (tmp_path / "killed" / "images" / ".partial" / "half").write_bytes(b"half")
    server.faults.clear()
    done = run_command(line, cwd=ROOT, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    assert image_files(tmp_path / "killed") == image_files(tmp_path / "whole")
    listed = [(tmp_path / name / "missing.jsonl").read_bytes() for name in ("killed", "whole")]
    assert listed[0] == listed[1]


EDITS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=10)


@settings(max_examples=25, deadline=None)
@given(EDITS, st.booleans())
def test_damaged_archives_never_write_elsewhere(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], inside: bool
) -> None:
    """With any archive, images are complete, and no other file is written."""
    import gzip

    folder = tmp_path_factory.mktemp("fuzz")
    members = [plain("../up.jpg", b"x"), plain("/tmp/up.jpg", b"x"), special("PMC1/l", tarfile.SYMTYPE, "/etc")]
    members += [plain(f"PMC1/J-1-g00{figure}.jpg", jpeg(figure)) for figure in range(3)]
    packed = tar_gz(members)
    data = bytearray(gzip.decompress(packed) if inside else packed)
    for place, value in edits:
        data[place % len(data)] = value
    path = folder / "mirror" / package(1)
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(bytes(data), 1) if inside else bytes(data))
    write_list(folder / "list.jsonl", rows(1))
    run(flags(folder, str(folder / "mirror")))
    here = {str(found.relative_to(folder)) for found in folder.rglob("*") if found.is_file()}
    locks = {".missing.jsonl.lock", ".images.lock"}
    allowed = {"list.jsonl", "missing.jsonl", "missing.summary.json", f"mirror/{package(1)}"} | locks
    assert here - allowed <= {f"images/1_F{figure}.jpg" for figure in range(3)}
    assert len(image_files(folder)) + len(missing(folder)) == 3
