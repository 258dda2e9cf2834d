"""Mixture files: sources, rejected content, and fields that rows keep."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.mixture import Shares, data_sha256, is_mixture, load_mixture, main, read_mixture, stream_sources
from llava.data.quarantine import Quarantine
from llava.data.records import load_samples
from llava.errors import ConfigError, DataError
from tests.support.tiny import write_tiny_vqa

TWO = """\
# two hospitals
sources:
  - {name: first, path: a/train.json, images: a/images, weight: 2, license: CC0-1.0}
  - name: second
    path: b/train.json
    images: b/images
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "ab":
        write_tiny_vqa(tmp_path / name)
    (tmp_path / "mixture.yaml").write_text(TWO)
    return tmp_path


def test_rows_keep_source_license_and_images(folder: Path) -> None:
    sources = read_mixture(folder / "mixture.yaml").sources
    samples = load_mixture(sources)
    assert [source.weight for source in sources] == [2.0, 1.0] and len(samples) == 24
    assert [sample.meta["source"] for sample in samples] == ["first"] * 12 + ["second"] * 12
    assert samples[0].meta["license"] == "CC0-1.0" and "license" not in samples[-1].meta
    assert all(Path(image).is_file() for sample in samples for image in sample.images)
    assert Shares.of(samples, sources).of_row == (0,) * 12 + (1,) * 12


def test_what_a_row_says_itself_stays(folder: Path) -> None:
    rows = json.loads((folder / "a" / "train.json").read_text())
    rows[0] |= {"source": "ward 7", "license": "internal"}
    (folder / "a" / "train.json").write_text(json.dumps(rows))
    samples = load_mixture(read_mixture(folder / "mixture.yaml").sources)
    assert (samples[0].meta["source"], samples[0].meta["license"]) == ("ward 7", "internal")
    assert Shares.of(samples, read_mixture(folder / "mixture.yaml").sources).of_row[0] == 0


def test_images_outside_their_folder_are_refused(folder: Path) -> None:
    rows = json.loads((folder / "b" / "train.json").read_text())
    rows[3]["image"] = "../../a/images/0.png"
    (folder / "b" / "train.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"train.json, row 3.*outside"):
        load_mixture(read_mixture(folder / "mixture.yaml").sources)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sources: []", "a list of sources"),
        ("sources: [1]", "source 0: expected fields"),
        ("sources: [{path: x}]", "source 0: field 'name'"),
        ("sources: [{name: x, path: 3}]", "source 0: field 'path'"),
        ("sources: [{name: x, path: y, wieght: 2}]", "unknown field 'wieght'; known: name"),
        ("sources: [{name: x, path: y, weight: 0}]", "'weight' must be a number above 0"),
        ("sources: [{name: x, path: y, weight: .nan}]", "'weight' must be a number above 0"),
        ("sources: [{name: x, path: y, weight: true}]", "'weight' must be a number above 0"),
        ("sources: [{name: x, path: y, images: 3}]", "'images' must be text"),
        ("sources: [{name: x, path: y}, {name: x, path: z}]", "duplicate name x"),
        ("sources: [{name: x, path: y}, {name: z, path: y}]", "duplicate path"),
        ("sources: [{name: x, path: y}, {name: z, path: ./y}]", "duplicate path"),
        ("sources: [{name: x, path: a/y}, {name: z, path: b/..//a/y}]", "duplicate path"),
        ("sources: [{name: x, path: y}]\nmore: 1", "a key `sources`"),
        ("stream: 3\nsources: [{name: x, path: y}]", "`stream` must be true or false"),
        ("sources: [", "is not YAML"),
        ("sources: [{name: x, path: y, weight: 2, weight: 3}]", "key 'weight' is duplicate"),
        ("sources:\n- {name: x, path: y}\nsources:\n- {name: z, path: w}", "key 'sources' is duplicate"),
        ("sources: [{name: x, path: y}]\n? [a]\n: 1", "is not YAML"),
        ("sources: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_mixture(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_mixture_or_a_named_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    with contextlib.suppress(DataError):  # damaged gzip
        is_mixture(path)
    with pytest.raises((ConfigError, DataError)):
        read_mixture(path)


def test_mixtures_are_told_from_rows_by_their_content(folder: Path) -> None:
    assert is_mixture(folder / "mixture.yaml") and not is_mixture(folder / "a" / "train.json")
    with pytest.raises(DataError, match=r"none\.yaml"):
        is_mixture(folder / "none.yaml")


def test_the_identity_covers_every_file(folder: Path) -> None:
    before = data_sha256(folder / "mixture.yaml")
    assert before == data_sha256(folder / "mixture.yaml")
    path = folder / "b" / "train.json"
    path.write_text(path.read_text() + " ")
    assert data_sha256(folder / "mixture.yaml") != before
    assert data_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("before", ["\ufeff", "%YAML 1.1\n---\n", "# a\r\n"])
def test_mixtures_of_other_editors(folder: Path, before: str) -> None:
    path = folder / "edited.yaml"
    path.write_bytes((before + TWO.replace("\n", "\r\n")).encode())
    assert is_mixture(path) and len(read_mixture(path).sources) == 2


def test_bad_images_are_left_out_where_that_is_asked_for(folder: Path) -> None:
    rows = json.loads((folder / "b" / "train.json").read_text())
    rows[3]["image"] = "../../a/images/0.png"
    (folder / "b" / "train.json").write_text(json.dumps(rows))
    quarantine = Quarantine(folder / "left-out.jsonl")
    samples = load_mixture(read_mixture(folder / "mixture.yaml").sources, skip_bad=True, quarantine=quarantine)
    assert len(samples) == 23 and [row.row for row in quarantine.rows] == [3]


def test_a_source_without_usable_rows_is_an_error(folder: Path) -> None:
    rows = json.loads((folder / "b" / "train.json").read_text())
    (folder / "b" / "train.json").write_text(json.dumps([{**row, "image": "../x.png"} for row in rows]))
    sources = read_mixture(folder / "mixture.yaml").sources
    samples = load_mixture(sources, skip_bad=True)
    assert len(samples) == 12
    with pytest.raises(DataError, match=r"source second: none of the rows in .*train\.json can be used"):
        Shares.of(samples, sources)


def test_rows_of_a_source_without_a_folder_name_no_files(folder: Path) -> None:
    path = folder / "a" / "train.json"
    image = (folder / "a" / "images" / "0.png").resolve()
    path.write_text(json.dumps([{**row, "image": str(image)} for row in json.loads(path.read_text())]))
    (folder / "open.yaml").write_text("sources: [{name: own, path: a/train.json}]")
    with pytest.raises(DataError, match=r"row 0, id .*source own has no `images`; write `images: FOLDER`"):
        load_mixture(read_mixture(folder / "open.yaml").sources)
    (folder / "open.yaml").write_text("sources: [{name: own, path: a/train.json, images: /}]")
    assert load_mixture(read_mixture(folder / "open.yaml").sources)[0].images == (str(image),)


def test_folders_with_signs_of_patterns(folder: Path) -> None:
    inner = folder / "[v1]"
    inner.mkdir()
    for name in ("x-[0].jsonl", "x-[1].jsonl"):
        (inner / name).write_text("{}")
    (inner / "stream.yaml").write_text(
        "stream: true\nsources: [{name: all, path: 'x-*.jsonl'}, {name: one, path: 'x-[0].jsonl'}]"
    )
    everything, one = stream_sources(read_mixture(inner / "stream.yaml"))
    assert len(everything.shards) == 2 and one.shards == (inner / "x-[0].jsonl",)


def test_streams_name_shards_by_pattern(folder: Path) -> None:
    (folder / "stream.yaml").write_text("stream: true\nsources: [{name: both, path: '*/train.json', weight: 3}]")
    assert is_mixture(folder / "stream.yaml")
    [source] = stream_sources(read_mixture(folder / "stream.yaml"))
    assert source.shards == (folder / "a" / "train.json", folder / "b" / "train.json") and source.weight == 3.0
    before = data_sha256(folder / "stream.yaml")
    (folder / "b" / "train.json").write_text("{}")
    assert data_sha256(folder / "stream.yaml") != before
    (folder / "none.yaml").write_text("stream: true\nsources: [{name: none, path: '*.tar'}]")
    with pytest.raises(ConfigError, match="source none: no file matches"):
        stream_sources(read_mixture(folder / "none.yaml"))
    with pytest.raises(ConfigError, match="cannot be written as one file"):
        main([str(folder / "stream.yaml"), "--out", str(folder / "x.json")])


@pytest.mark.parametrize("name", ["mixture.yaml", "a/train.json"])
def test_written_over_nothing_that_is_read(folder: Path, name: str) -> None:
    before = (folder / name).read_bytes()
    with pytest.raises(ConfigError, match="would overwrite"):
        main([str(folder / "mixture.yaml"), "--out", str(folder / "b" / ".." / name)])
    assert (folder / name).read_bytes() == before


def test_written_out_as_one_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(folder / "mixture.yaml"), "--out", str(folder / "all.json")])
    rows = load_samples(folder / "all.json", image_folder=folder)
    assert len(rows) == 24 and rows[0].images[0].startswith("a/images/")
    assert (rows[0].meta["source"], rows[0].meta["license"]) == ("first", "CC0-1.0")
    assert "12  first  (license: CC0-1.0)" in capsys.readouterr().out
    with pytest.raises(DataError, match="set --root to a folder above it"):
        main([str(folder / "mixture.yaml"), "--out", str(folder / "x.json"), "--root", str(folder / "a")])
    assert not (folder / "x.json").exists()


def write_rows(folder: Path, **fields: str) -> None:
    path = folder / "a" / "train.json"
    first, *others = json.loads(path.read_text())
    path.write_text(json.dumps([{**first, **fields}, *others]))


def test_the_earlier_spelling_of_license_is_read(folder: Path) -> None:
    path = folder / "mixture.yaml"
    path.write_text(TWO.replace("license:", "licence:"))
    write_rows(folder, licence="internal")
    samples = load_mixture(read_mixture(path).sources)
    assert [sample.meta["license"] for sample in samples[:2]] == ["internal", "CC0-1.0"]
    assert all("licence" not in sample.meta for sample in samples)


def test_both_spellings_of_license_are_refused(folder: Path) -> None:
    path = folder / "mixture.yaml"
    path.write_text(TWO.replace("license: CC0-1.0", "license: CC0-1.0, licence: MIT"))
    with pytest.raises(ConfigError, match="'license' and 'licence' are the same field"):
        read_mixture(path)


def test_mix_reports_the_license_that_a_row_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(folder, license="CC BY 4.0")
    main([str(folder / "mixture.yaml"), "--out", str(folder / "all.json")])
    printed = capsys.readouterr().out
    assert "1  first  (license: CC BY 4.0)" in printed and "11  first  (license: CC0-1.0)" in printed


LARGE = {
    "5,000 brackets": "sources: " + "[" * 5000,
    "5,000 pairs of brackets": "sources: " + "[" * 5000 + "]" * 5000,
    "5,000 braces": "sources: " + "{a: " * 5000,
    "5,000 dashes": "sources:\n" + "- " * 5000,
    "30,000 keys": "sources: []\n" + "".join(f"k{number}: 0\n" for number in range(30_000)),
    "20,000 keys of a source": "sources:\n- {" + ", ".join(f"k{number}: 0" for number in range(20_000)) + "}",
    "300,000 characters": "sources:\n- name: " + "x" * 300_000,
    "merges of merges": "sources:\n- &a0 {k: 1}\n"
    + "".join(f"- &a{number} {{<<: [{', '.join([f'*a{number - 1}'] * 9)}]}}\n" for number in range(1, 40)),
    "a date that is none": "sources: 2024-13-45",
    "a number that is none": "sources: !!int ''",
    "a truth value that is none": "sources: !!bool x",
}
"""Mixture files that need much time or have no error of the library."""


@pytest.mark.parametrize("case", LARGE)
def test_hostile_mixtures_are_refused_in_one_line_and_linear_time(case: str, tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(LARGE[case])
    start = time.process_time()
    with pytest.raises((ConfigError, DataError), match=r"mix\.yaml") as caught:
        read_mixture(path)
    assert time.process_time() - start < 60  # a second or two; merges of merges would take years
    assert "\n" not in str(caught.value)


def test_a_named_pipe_is_no_mixture_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe cannot be read: it is a pipe or a device"):
        is_mixture(tmp_path / "pipe")
