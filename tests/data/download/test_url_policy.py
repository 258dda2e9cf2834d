"""Policy of URLs: the user's and public ones are allowed, private ones of servers or lists are not."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.download.client import Client, NetworkOptions
from llava.data.download.transfer import RemoteFile
from llava.data.download.url_policy import UrlPolicy, check_base, join_url, redacted_url, split_bases, url_origin
from llava.errors import ConfigError, DownloadError
from llava.utils.retry import retry_after_seconds
from tests.support.file_server import Fault, serve

PRIVATE = [
    "http://127.0.0.1/", "http://10.1.2.3/", "http://192.168.0.1:8080/", "http://172.16.0.1/", "http://169.254.169.254/",
    "http://0.0.0.0/", "http://[::1]/", "http://[fe80::1]/", "http://[fd00::1]/", "http://[::ffff:127.0.0.1]/",
    "http://[2002:7f00:1::]/", "http://224.0.0.1/", "http://100.64.0.1/", "http://255.255.255.255/",
]  # fmt: skip


@pytest.mark.parametrize("url", PRIVATE)
def test_private_urls_are_refused_unless_the_user_gave_them(url: str) -> None:
    policy = UrlPolicy(["https://mirror.example.org/base"], proxies=False)
    with pytest.raises(DownloadError) as caught:
        policy.check(url)
    assert caught.value.reason == "unsafe_address"
    UrlPolicy([url], proxies=False).check(url + "some/file")


def test_the_port_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = UrlPolicy(["http://127.0.0.1:8000"], proxies=False)
    policy.check("http://127.0.0.1:8000/x")
    with pytest.raises(DownloadError):
        policy.check("http://127.0.0.1:6379/x")


def resolving(monkeypatch: pytest.MonkeyPatch, *numbers: str) -> None:
    """Resolve every host name to these IP addresses."""
    found: list[Any] = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, 80)) for number in numbers]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)


def test_host_names_are_checked_by_all_their_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = UrlPolicy(proxies=False)
    resolving(monkeypatch, "8.8.8.8")
    policy.check("https://example.org/x")
    resolving(monkeypatch, "8.8.8.8", "10.0.0.1")
    with pytest.raises(DownloadError, match=r"10\.0\.0\.1"):
        policy.check("https://example.org/x")
    UrlPolicy(proxies=True).check("https://example.org/x")
    with pytest.raises(DownloadError):
        UrlPolicy(proxies=True).check("https://10.0.0.1/x")


def test_connected_server_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host name may be public when it is resolved and private when it is connected."""
    with serve() as server, Client(NetworkOptions(per_second=0)) as client:
        server.files["/a"] = b"secret"
        monkeypatch.setattr(UrlPolicy, "_numbers", lambda *args: ["8.8.8.8"])
        with pytest.raises(DownloadError) as caught:
            list(RemoteFile(client, f"{server.address}/a"))
        assert caught.value.reason == "unsafe_address"


def test_no_redirect_from_https_to_http(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, "8.8.8.8")
    policy = UrlPolicy(proxies=False)
    policy.check("https://example.org/x", before="http://example.org/x")
    with pytest.raises(DownloadError, match="from https to http"):
        policy.check("http://example.org/x", before="https://example.org/x")


def test_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(DownloadError) as caught:
        UrlPolicy(proxies=False).check("https://no.such.host/")
    assert caught.value.reason == "unreachable"


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://host/x", "http:///x", "http://a:99999/", "http://[::1/", "data:,x", "/etc/passwd",
     "http://base\\@10.0.0.1/", "http://a b/", "http://a\n/", "http://ex\u00e4mple.org/"],
)  # fmt: skip
def test_invalid_urls(url: str) -> None:
    with pytest.raises(DownloadError) as caught:
        url_origin(url)
    assert caught.value.reason == "unsafe_address"


@given(st.text(max_size=60), st.sampled_from(["", "http://", "https://", "http://[", "file:", "//"]))
def test_any_text_is_a_url_or_has_a_reason(text: str, scheme: str) -> None:
    try:
        host, port = url_origin(scheme + text)
        assert host and 0 <= port < 65536
    except DownloadError as error:
        assert error.reason == "unsafe_address"


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=30))
def test_a_server_may_redirect_to_anything(text: str) -> None:
    location = text.encode("utf-8", "replace").decode("latin-1").replace("\r", "").replace("\n", "")
    with serve() as server:
        options = NetworkOptions(per_second=0, max_attempts=1, stall_seconds=1, connect_seconds=1)
        server.faults["/a"] = [Fault(status=302, headers=(("Location", location),))]
        with Client(options, bases=[server.address]) as client, pytest.raises(DownloadError):
            list(RemoteFile(client, f"{server.address}/a"))


def test_passwords_stay_out_of_messages() -> None:
    assert redacted_url("https://user:secret@host/file?token=secret") == "https://host/file"


def test_bases_are_split_at_commas_and_white_space() -> None:
    assert split_bases(" http://a, /b\nfile:///c ") == ["http://a", "/b", "file:///c"]


@pytest.mark.parametrize(
    ("base", "path", "joined"),
    [
        ("http://a/", "x/y z.gz", "http://a/x/y%20z.gz"),
        ("/b", "x/y z.gz", "/b/x/y z.gz"),
        ("file:///b%20c/", "y z", "file:///b%20c/y%20z"),
    ],
)
def test_a_path_is_joined_to_a_base(base: str, path: str, joined: str) -> None:
    assert join_url(base, path) == joined


@pytest.mark.parametrize("base", ["ftp://host", "http://", "s3://bucket", "/no/such/folder"])
def test_other_bases_are_refused(base: str) -> None:
    with pytest.raises(ConfigError):
        check_base(base)


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [("0", 0, 0), ("7", 7, 7), ("-3", 0, 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
     ("Wed, 21 Oct 2099 07:28:00 GMT", 1e9, 1e10)],
)  # fmt: skip
def test_retry_after(value: str, low: float, high: float) -> None:
    assert low <= (retry_after_seconds(value) or 0.0) <= high


@pytest.mark.parametrize("value", [None, "", "soon", "nan", "inf", "1e999", "Wed, 99 Foo 2015"])
def test_invalid_retry_after(value: str | None) -> None:
    assert retry_after_seconds(value) is None
