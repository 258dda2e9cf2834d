"""Names of images as paths."""

from __future__ import annotations

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.groups import image_name_key

ONE_FILE = [
    ("0.png", "./0.png", "././0.png", "a/../0.png", ".\\0.png", "a/b/../../0.png"),
    ("sub/0.png", "sub//0.png", "./sub/./0.png", "sub\\0.png", "a/../sub///0.png"),
    ("/data/0.png", "//data/0.png", "/data//0.png", "file:///data/0.png", "FILE:///data/./0.png", "/x/../data/0.png"),
    ("https://h.org/a/0.png", "HTTPS://H.org/a//0.png", "https://h.org/./a/0.png#page", "https://h.org/a/%30.png"),
    ("\u00e9.png", "e\u0301.png"),
    ("../0.png", "./../0.png", "a/../../0.png"),
]


@pytest.mark.parametrize("names", ONE_FILE)
def test_spellings_of_one_name_are_equal(names: tuple[str, ...]) -> None:
    assert len(set(map(image_name_key, names))) == 1


def test_names_of_different_files_are_different() -> None:
    firsts = [names[0] for names in ONE_FILE] + [
        "0.PNG",
        "sub/1.png",
        "http://h.org/a/0.png",
        "https://h.org/a/0.png?v=2",
    ]
    assert len(set(map(image_name_key, firsts))) == len(firsts)


parts = st.lists(st.sampled_from(["a", "b", ".", "..", ""]), min_size=1, max_size=6)


@given(parts)
def test_equal_to_the_normal_path(names: list[str]) -> None:
    name = "x/" + "/".join(names) + "/0.png"
    assert image_name_key(name) == posixpath.normpath(name) == image_name_key(image_name_key(name))


@given(st.text(max_size=12))
def test_any_name_has_a_key(name: str) -> None:
    assert isinstance(image_name_key(name), str)
