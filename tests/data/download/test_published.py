"""Download of one file from a faulty server: a complete file, or a failure with a reason."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.data.download.client import Client, NetworkOptions
from llava.data.download.files import Expected, fetch_file
from llava.data.download.transfer import RemoteFile
from llava.errors import DownloadError
from tests.support.file_server import Fault, FileServer, serve

DATA = random.Random(0).randbytes(300_000)
RIGHT = Expected(len(DATA), hashlib.sha256(DATA).hexdigest())
OPTIONS = NetworkOptions(per_second=0, first_wait=0.01, max_wait=0.05, stall_seconds=0.3, max_attempts=4)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve() as state:
        state.files["/a.bin"] = DATA
        yield state


@pytest.fixture
def client(server: FileServer) -> Iterator[Client]:
    with Client(OPTIONS, bases=[server.address]) as found:
        yield found


FAULTS: dict[str, list[Fault]] = {
    "none": [],
    "cut off twice": [Fault(cut_after=100_000), Fault(cut_after=50_000)],
    "cut off before the first byte": [Fault(cut_after=0)],
    "overloaded": [Fault(status=503), Fault(status=429, headers=(("Retry-After", "0"),)), Fault(status=500)],
    "stops sending": [Fault(stall_after=70_000)],
    "trickles": [Fault(pause=0.1, piece=10)],
    "ignores ranges": [Fault(cut_after=100_000), Fault(ignore_range=True)],
    "ignores ranges and cuts": [Fault(cut_after=100_000), Fault(ignore_range=True, cut_after=120_000)],
    "no length": [Fault(unknown_length=True)],
    "redirect": [Fault(status=302, headers=(("Location", "/a.bin"),))],
    "labeled as zipped": [Fault(headers=(("Content-Encoding", "gzip"),))],
}


@pytest.mark.parametrize("name", FAULTS)
def test_downloaded_file_is_complete(server: FileServer, client: Client, tmp_path: Path, name: str) -> None:
    server.faults["/a.bin"] = list(FAULTS[name])
    fetch_file(client, [f"{server.address}/a.bin"], tmp_path / "a.bin", expected=RIGHT)
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert not server.faults["/a.bin"], "the fault did not happen"


BAD_LUCK = st.one_of(
    st.builds(Fault, cut_after=st.integers(0, 20_000), ignore_range=st.booleans(), unknown_length=st.booleans()),
    st.builds(Fault, status=st.sampled_from([408, 429, 500, 503])),
    st.builds(Fault, ignore_range=st.just(True), pause=st.just(0.001), piece=st.integers(3000, 9000)),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(BAD_LUCK, max_size=6), st.integers(0, 20_000), st.booleans())
def test_any_bad_luck(server: FileServer, faults: list[Fault], left: int, right: bool) -> None:
    """With faults in any order and any part of an earlier run, right or wrong, the file is complete."""
    data = DATA[:20_000]
    server.files["/b.bin"] = data
    server.faults["/b.bin"] = list(faults)
    expected = Expected(len(data), hashlib.sha256(data).hexdigest())
    options = NetworkOptions(per_second=0, first_wait=0.001, max_wait=0.001, max_attempts=8, stall_seconds=2)
    with TemporaryDirectory() as folder, Client(options, bases=[server.address]) as client:
        target = Path(folder) / "b.bin"
        target.with_name("b.bin.part").write_bytes(data[:left] if right else bytes(left))
        counts: list[int] = []
        try:
            fetch_file(client, [f"{server.address}/b.bin"] * 2, target, expected=expected, on_bytes=counts.append)
        except DownloadError as error:  # a truncated response without a length looks like a short file
            assert error.reason == "wrong_content" and any(fault.unknown_length for fault in faults)
            assert not target.exists()
        else:
            assert target.read_bytes() == data and sum(counts) == len(data)


def test_broken_connection_is_resumed_not_repeated(server: FileServer, client: Client, tmp_path: Path) -> None:
    server.faults["/a.bin"] = [Fault(cut_after=100_000)]
    fetch_file(client, [f"{server.address}/a.bin"], tmp_path / "a.bin", expected=RIGHT)
    assert [request.range for request in server.log] == ["", "bytes=100000-"]
    assert server.log[1].if_range, "the version of the file was not named"


def test_earlier_run_is_resumed(server: FileServer, client: Client, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(DATA[:123_456])
    counts: list[int] = []
    fetch_file(client, [f"{server.address}/a.bin"], tmp_path / "a.bin", expected=RIGHT, on_bytes=counts.append)
    assert (tmp_path / "a.bin").read_bytes() == DATA and sum(counts) == len(DATA)
    assert [request.range for request in server.log] == ["bytes=123456-"]


@pytest.mark.parametrize("left", [b"x" * 1000, DATA[:50_000] + b"x", DATA + b"more", DATA[:-1] + b"x"])
@pytest.mark.parametrize("ignore_range", [False, True])
def test_part_of_another_file_is_restarted(
    server: FileServer, client: Client, tmp_path: Path, left: bytes, ignore_range: bool
) -> None:
    (tmp_path / "a.bin.part").write_bytes(left)
    server.faults["/a.bin"] = [Fault(ignore_range=ignore_range, always=True)]
    fetch_file(client, [f"{server.address}/a.bin"], tmp_path / "a.bin", expected=RIGHT)
    assert (tmp_path / "a.bin").read_bytes() == DATA


def test_login_page_does_not_replace_the_part(server: FileServer, client: Client, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(DATA[:200_000])
    server.faults["/a.bin"] = [Fault(ignore_range=True, body=b"<html>please log in</html>")]
    with pytest.raises(DownloadError):
        fetch_file(client, [f"{server.address}/a.bin"], tmp_path / "a.bin", expected=RIGHT)
    fetch_file(client, [f"{server.address}/a.bin"], tmp_path / "a.bin", expected=RIGHT)
    assert (tmp_path / "a.bin").read_bytes() == DATA and server.log[-1].range == "bytes=200000-"


def test_complete_part_needs_no_server(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(DATA)
    fetch_file(client, ["http://127.0.0.1:9/a.bin"], tmp_path / "a.bin", expected=RIGHT)
    assert (tmp_path / "a.bin").read_bytes() == DATA


WRONG: dict[str, tuple[list[Fault], str]] = {
    "gone": ([Fault(status=404, always=True)], "not_found"),
    "forbidden": ([Fault(status=403, always=True)], "refused"),
    "always failing": ([Fault(status=500, always=True)], "unavailable"),
    "always cut off": ([Fault(cut_after=0, always=True)], "cut_off"),
    "always stalling": ([Fault(stall_after=10, always=True)], "stalled"),
    "other bytes": ([Fault(body=DATA[:-1] + b"?", always=True)], "wrong_content"),
    "a page": ([Fault(body=b"<html>please log in</html>", always=True)], "wrong_size"),
    "longer": ([Fault(body=DATA + b"?", unknown_length=True, always=True)], "wrong_content"),
    "a loop": ([Fault(status=301, headers=(("Location", "/a.bin"),), always=True)], "refused"),
    "to a file": ([Fault(status=302, headers=(("Location", "file:///etc/passwd"),), always=True)], "unsafe_address"),
    "to another service": (
        [Fault(status=302, headers=(("Location", "http://127.0.0.1:9/x"),), always=True)],
        "unsafe_address",
    ),
    "to the cloud's keys": (
        [Fault(status=307, headers=(("Location", "http://169.254.169.254/latest"),), always=True)],
        "unsafe_address",
    ),
    "nowhere": ([Fault(status=302, headers=(("Location", "http://[::1/"),), always=True)], "unsafe_address"),
}


@pytest.mark.parametrize("name", WRONG)
def test_failures_have_a_reason(server: FileServer, client: Client, tmp_path: Path, name: str) -> None:
    faults, reason = WRONG[name]
    server.faults["/a.bin"] = list(faults)
    with pytest.raises(DownloadError) as caught:
        fetch_file(client, [f"{server.address}/a.bin"], tmp_path / "a.bin", expected=RIGHT)
    assert caught.value.reason == reason
    assert not (tmp_path / "a.bin").exists()


def test_no_server_at_all(client: Client, tmp_path: Path) -> None:
    with Client(OPTIONS, bases=["http://127.0.0.1:9"]) as alone, pytest.raises(DownloadError) as caught:
        fetch_file(alone, ["http://127.0.0.1:9/a.bin"], tmp_path / "a.bin", expected=RIGHT)
    assert caught.value.reason == "unreachable" and "(4 attempts)" in str(caught.value)


def test_mirrors_are_tried_in_order(server: FileServer, client: Client, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "a.bin").write_bytes(DATA[:-1])
    server.files["/bad/a.bin"] = DATA[::-1]
    urls = [str(mirror / "a.bin"), f"{server.address}/none/a.bin", f"{server.address}/bad/a.bin"]
    good = f"{server.address}/a.bin"
    assert fetch_file(client, [*urls, good], tmp_path / "a.bin", expected=RIGHT) == good
    with pytest.raises(DownloadError) as caught:
        fetch_file(client, urls, tmp_path / "b.bin", expected=RIGHT)
    assert caught.value.reason == "wrong_size" and all(url in str(caught.value) for url in urls)


@pytest.mark.parametrize("local", [True, False])
def test_git_lfs_pointer_is_named(server: FileServer, client: Client, tmp_path: Path, local: bool) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 300000\n"
    (tmp_path / "pointer").write_bytes(pointer)
    server.files["/a.bin"] = pointer
    url = str(tmp_path / "pointer") if local else f"{server.address}/a.bin"
    with pytest.raises(DownloadError, match="Git LFS pointer"):
        fetch_file(client, [url], tmp_path / "a.bin", expected=RIGHT)


def test_file_that_changes_during_the_download_is_detected(server: FileServer, client: Client) -> None:
    server.faults["/a.bin"] = [Fault(cut_after=100_000)]
    remote = RemoteFile(client, f"{server.address}/a.bin")
    read = remote.read()
    server.files["/a.bin"] = b"another" * 50_000
    with pytest.raises(DownloadError, match="changed") as caught:
        while piece := remote.read():
            read += piece
    assert caught.value.reason == "wrong_content" and DATA.startswith(read)


def test_wrong_range_is_refused(server: FileServer, client: Client) -> None:
    server.faults["/a.bin"] = [Fault(cut_after=1000), Fault(content_range="bytes 0-10/300000", always=True)]
    with pytest.raises(DownloadError, match="requested bytes from 1000 on"):
        list(RemoteFile(client, f"{server.address}/a.bin"))


def test_the_largest_size_holds_with_and_without_a_length(server: FileServer, client: Client) -> None:
    for fault in (Fault(), Fault(unknown_length=True)):
        server.faults["/a.bin"] = [fault]
        with pytest.raises(DownloadError) as caught:
            list(RemoteFile(client, f"{server.address}/a.bin", max_bytes=1000))
        assert caught.value.reason == "too_large"


def test_long_file_over_a_bad_connection(server: FileServer, client: Client) -> None:
    """There are more failures than attempts, but each connection transfers a megabyte."""
    data = random.Random(1).randbytes(9 << 20)
    server.files["/a.bin"] = data
    server.faults["/a.bin"] = [Fault(cut_after=5 << 18)] * 6
    assert b"".join(RemoteFile(client, f"{server.address}/a.bin")) == data
    assert len(server.log) == 7


def test_an_empty_file(server: FileServer, client: Client) -> None:
    server.files["/empty"] = b""
    assert list(RemoteFile(client, f"{server.address}/empty")) == []


def test_rate_and_user_agent(server: FileServer) -> None:
    options = NetworkOptions(per_second=5, user_agent="llava test (a@example.org)")
    with Client(options, bases=[server.address]) as client:
        for _ in range(4):
            list(RemoteFile(client, f"{server.address}/a.bin"))
    times = [request.time for request in server.log]
    assert times[-1] - times[0] > 0.4, "four requests at five per second"
    assert {request.user_agent for request in server.log} == {"llava test (a@example.org)"}


def test_retry_after_is_respected_up_to_the_limit(server: FileServer) -> None:
    server.faults["/a.bin"] = [Fault(status=503, headers=(("Retry-After", "600"),))]
    with Client(NetworkOptions(per_second=0, first_wait=0.01, max_wait=0.4), bases=[server.address]) as client:
        list(RemoteFile(client, f"{server.address}/a.bin"))
    waited = server.log[1].time - server.log[0].time
    assert 0.35 < waited < 300, "the longest wait is 0.4 s, the server asks for 600 s, the first wait is 0.01 s"


def test_closed_client_ends_its_readers(server: FileServer) -> None:
    server.faults["/a.bin"] = [Fault(status=503, always=True)]
    client = Client(NetworkOptions(first_wait=600), bases=[server.address])
    client.close()
    start = time.monotonic()
    with pytest.raises(DownloadError):
        list(RemoteFile(client, f"{server.address}/a.bin"))
    assert time.monotonic() - start < 300
