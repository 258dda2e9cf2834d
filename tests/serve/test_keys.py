"""Files of keys: who may read them, what lines they hold, limits by key."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from llava.errors import ConfigError
from llava.serve.failures import RequestError
from llava.serve.keys import KeyRing, read_cluster_key, read_keys

SECRET = "sk-ward-7"


def key_file(folder: Path, text: str, *, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_lines_with_limits_comments_and_hashes(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"other").hexdigest()
    path = key_file(tmp_path, f"# keys\n\nward {SECRET} rpm=3 max_running=2\n  lab sha256:{digest}\n")
    ward, lab = read_keys(path)
    assert (ward.name, ward.rpm, ward.max_running) == ("ward", 3, 2)
    assert (lab.name, lab.rpm, lab.max_running) == ("lab", None, None)
    ring = KeyRing(path)
    assert ring.find(bearer(SECRET)) == ward and ring.find(bearer("other")) == lab


@pytest.mark.parametrize(
    "text",
    [
        *("", "# nothing\n", "one\n", "a x rpm=0\n", "a x rpm=two\n", "a x size=1\n", "a x rpm=1 rpm=2\n"),
        *("a x\na y\n", "a x\nb x\n", "a sha256:12\n", "a/b x\n"),
        *(f"a x rpm={'9' * 5000}\n", "a x rpm=٣\n", "a schlüssel\n"),
    ],
)
def test_wrong_files(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--api-keys"):
        read_keys(key_file(tmp_path, text))


def test_files_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = key_file(tmp_path, "")
    path.write_bytes(b"a 0123456789abcdef\xff\n")
    with pytest.raises(ConfigError, match=r"--api-keys.*UTF-8"):
        read_keys(path)
    with pytest.raises(ConfigError, match=r"--cluster-key.*UTF-8"):
        read_cluster_key(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_files_that_others_can_read_are_refused(mode: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        read_keys(key_file(tmp_path, f"a {SECRET}\n", mode=mode))
    with pytest.raises(ConfigError, match="chmod 600"):
        read_cluster_key(key_file(tmp_path, "0123456789abcdef\n", mode=mode))


@pytest.mark.parametrize(
    "headers", [{}, bearer("wrong"), {"authorization": SECRET}, {"authorization": f"Basic {SECRET}"}]
)
def test_requests_without_a_valid_key(headers: dict[str, str], tmp_path: Path) -> None:
    ring = KeyRing(key_file(tmp_path, f"a {SECRET}\n"))
    with pytest.raises(RequestError) as caught:
        ring.find(headers)
    assert (caught.value.status, caught.value.headers) == (401, {"WWW-Authenticate": "Bearer"})
    assert KeyRing().find(headers) is None


def test_requests_of_the_last_minute_are_limited(tmp_path: Path) -> None:
    @dataclass
    class Clock:
        now: float = 0.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    ring = KeyRing(key_file(tmp_path, f"a {SECRET} rpm=2\n"), clock)
    key = ring.find(bearer(SECRET))
    ring.count(key)
    clock.now = 10
    ring.count(key)
    with pytest.raises(RequestError) as caught:
        ring.count(key)
    assert (caught.value.code, caught.value.retry_after) == ("rate_limited", 50)
    clock.now = 10.75
    with pytest.raises(RequestError) as caught:
        ring.count(key)
    assert caught.value.headers["Retry-After"] == "50"  # after 49 s the oldest request still counts
    clock.now = 60
    ring.count(key)


def test_a_file_is_read_again_and_a_wrong_one_changes_nothing(tmp_path: Path) -> None:
    ring = KeyRing(key_file(tmp_path, f"a {SECRET}\n"))
    key_file(tmp_path, "a new\n")
    ring.reload()
    assert ring.find(bearer("new")) is not None
    key_file(tmp_path, "broken\n")
    with pytest.raises(ConfigError):
        ring.reload()
    assert ring.find(bearer("new")) is not None


@pytest.mark.parametrize("text", ["", "short", "two words of enough length"])
def test_wrong_cluster_keys(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="16 characters"):
        read_cluster_key(key_file(tmp_path, text))
