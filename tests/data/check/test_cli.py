"""The command: exit status, summary, written files, cleaned copy and tokens; damage is always reported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.cli import main as llava
from llava.data.check.cli import main
from llava.data.check.report import check_file
from llava.data.records import load_samples
from llava.errors import ConfigError
from llava.utils.json_rows import iter_rows
from tests.support.check_files import row, rules_of, smooth, write_rows
from tests.support.text_tools import write_processor

ROOT = Path(__file__).resolve().parents[3]


def status_of(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def write_case(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Write a file with one finding of each kind, a file it leaks into, and their images."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        smooth(number).save(images / f"{number}.png")
    smooth(0).convert("RGB").save(images / "<i>0.png")
    (images / "broken.png").write_text("x")
    old = {"id": 4, "image": "2.png", "conversatons": [{"from": "user", "value": "?"}, {"from": "gpt", "value": 3}]}
    rows = [row(0, "0.png"), row(0, "0.png"), row(1, "broken.png"), {"id": "<b>"}, old, "text", row(6, "1.png")]
    rows.append(row(7, "<i>0.png", patient="7"))
    test = write_rows(tmp_path / "test.json", [row(9, "1.png")])
    return write_rows(tmp_path / "train.json", rows), test, images


def test_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test, images = write_case(tmp_path)
    page, data, copy = tmp_path / "page.html", tmp_path / "out.json", tmp_path / "clean.json"
    words = [train, "--images", images, "--against", test, "--html", page, "--json", data, "--fix", copy]
    assert status_of(*words) == 1
    shown = capsys.readouterr().out
    assert "1.png" in shown and "[leak-bytes]" in shown and "exit status 1" in shown
    assert len(shown.splitlines()) < 40 and max(map(len, shown.splitlines())) < 200
    result = json.loads(data.read_text())
    rows = {entry["rule"]: entry["rows"] for entry in result["rules"] if entry["file"] == "file"}
    assert rows == {
        "image-broken": [2],
        "row-type": [5],
        "leak-bytes": [6],
        "no-conversation": [3],
        "repeated-row": [1],
        "same-picture": [0, 1, 7],
    }
    assert (result["exit_status"], result["errors"], result["not_trainable"]) == (1, 3, 1)
    kept = json.loads(copy.read_text())
    assert [entry["id"] for entry in kept] == ["row 0", 4, "row 7"]
    assert kept[1]["conversations"] == [{"from": "human", "value": "?"}, {"from": "gpt", "value": "3"}]
    assert status_of(copy, "--images", images, "--against", test) == 0


def test_the_page_is_escaped_and_loads_nothing(tmp_path: Path) -> None:
    train, test, images = write_case(tmp_path)
    page = tmp_path / "page.html"
    status_of(train, "--images", images, "--against", test, "--html", page)
    text = page.read_text()
    assert "<i>0" not in text and "&lt;i&gt;0.png" in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 3 and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(", text)


def test_warnings_count_only_with_strict(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", [{"id": 1}])
    assert status_of(path) == 0
    assert status_of(path, "--strict") == 1
    assert status_of(write_rows(path, [row(0)]), "--strict", "True") == 0


def test_a_missing_file_ends_with_status_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        llava(["data", "check", str(tmp_path / "absent.json")])
    assert stop.value.code == 2 and "cannot be opened" in capsys.readouterr().err


def test_no_output_replaces_the_input_or_another_output(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", [row(0)])
    with pytest.raises(ConfigError, match="choose another file"):
        main([str(path), "--fix", str(path)])
    before = path.read_bytes()
    for flag in ("--json", "--html"):
        with pytest.raises(ConfigError, match=f"{flag} .* would overwrite"):
            main([str(path), flag, str(path)])
    with pytest.raises(ConfigError, match=r"--html .* would overwrite"):
        main([str(path), "--json", str(tmp_path / "out"), "--html", str(tmp_path / "out")])
    assert path.read_bytes() == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--against_images", "images"], "--against-images requires"),
        (["--max_length", "0"], "--max-length must be at least 1"),
    ],
)
def test_inconsistent_options(tmp_path: Path, options: list[str], reason: str) -> None:
    path = write_rows(tmp_path / "rows.json", [row(0)])
    with pytest.raises(ConfigError, match=reason):
        main([str(path), *options])


def test_checking_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", [row(0)])
    code = (
        "import sys\nfrom llava.data.check.cli import main\n"
        f"main([{str(path)!r}, '--html', {str(tmp_path / 'a.html')!r}, '--fix', {str(tmp_path / 'b.json')!r}])\n"
        "heavy = {'torch', 'transformers', 'pydicom'} & sys.modules.keys()\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_copy_keeps_the_form_of_the_file(tmp_path: Path) -> None:
    path, copy = tmp_path / "rows.json", tmp_path / "copy.json"
    question = {"question_id": 3, "text": "What?", "image": "a.png"}
    path.write_text("\n".join(["{broken", json.dumps(row(1, note="é")), json.dumps(question)]))
    assert status_of(path, "--fix", copy) == 1
    assert copy.read_text().splitlines() == [json.dumps(row(1, note="é"), ensure_ascii=False), json.dumps(question)]
    path.write_text("[3]")
    status_of(path, "--fix", copy)
    assert json.loads(copy.read_text()) == []


def test_tokens_of_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = write_processor(tmp_path / "model"), tmp_path / "out.json"
    long = [{"from": "human", "value": "<image>\n" + "Is it? " * 40}, {"from": "gpt", "value": "Yes " * 30}]
    rows = [row(0, "a.png"), {"id": 1}, row(2), row(3, "b.png", conversations=long), {"question_id": 1, "text": "?"}]
    path = write_rows(tmp_path / "rows.json", rows)
    assert status_of(path, "--model", model, "--max_length", 10, "--json", data) == 0
    tokens = json.loads(data.read_text())["tokens"]
    assert tokens["num_rows"] == 4 and tokens["longest_row"] == 3
    assert tokens["num_shortened"] == 4 and tokens["num_without_answer"] == 4
    assert tokens["suggested"] % 64 == 0 and tokens["suggested"] - 64 < tokens["longest"] <= tokens["suggested"]
    assert f"longest {tokens['longest']} (row 3)" in capsys.readouterr().out
    status_of(path, "--model", model, "--max_length", tokens["longest"] - 1, "--json", data)
    less = json.loads(data.read_text())["tokens"]
    assert (less["num_shortened"], less["num_without_answer"]) == (1, 0)
    status_of(path, "--model", model, "--max_length", tokens["suggested"], "--json", data)
    assert json.loads(data.read_text())["tokens"]["num_shortened"] == 0


cells = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=6)
turns = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "user", "x"]), "value": cells})
wild = st.dictionaries(
    st.sampled_from(["id", "image", "conversations", "text", "patient", "answer_type", "domain", "question_type"]),
    cells | st.lists(turns | cells, max_size=3) | st.dictionaries(st.text(max_size=2), cells, max_size=2),
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(wild | cells | st.just(row(1)), max_size=5), others=st.lists(wild, max_size=3), lines=st.booleans()
)
def test_any_rows_are_reported_and_their_copy_has_no_errors(rows: list[Any], others: list[Any], lines: bool) -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path, test, copy, images = (folder / name for name in ("a.json", "b.json", "c.json", "images"))
        images.mkdir()
        path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
        write_rows(test, others)
        page, data = folder / "p.html", folder / "r.json"
        options = [test, "--images", images, "--html", page, "--json", data, "--fix", copy]
        assert status_of(path, "--against", *options) in (0, 1)
        again = check_file(copy, images=images, against=test)
        assert {rule for rule, file in again.findings.rules("error") if file == 0} <= {"no-rows"}
        assert "repeated-row" not in rules_of(again) and "no-conversation" not in rules_of(again)
        if any(True for _ in iter_rows(copy)):
            load_samples(copy)  # training reads the copy


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=80), place=st.integers(0, 500), known=st.booleans())
def test_any_bytes_end_in_a_report(content: bytes, place: int, known: bool) -> None:
    if known:
        good = json.dumps([row(0), row(1, note="é")]).encode()
        place %= len(good)
        content = good[:place] + content + good[place + 1 :]
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "rows"
        path.write_bytes(content)
        assert status_of(path, "--html", f"{path}.html", "--json", f"{path}.json", "--fix", f"{path}.fix") in (0, 1)


FUZZ = """
import sys
import atheris
with atheris.instrument_imports(include=["llava.data.check"]):
    from llava.data.check.rows import view_row
    from llava.utils.json_rows import iter_rows
from pathlib import Path
path = Path(sys.argv.pop())

def once(content):
    path.write_bytes(content)
    for number, value in iter_rows(path):
        view_row(value, number)

atheris.Setup(sys.argv, once)
atheris.Fuzz()
"""


def test_a_fuzzer_finds_no_crash(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "array").write_text(json.dumps([row(0, "a.png"), {"question_id": 1, "text": "?"}]))
    (corpus / "lines").write_text(json.dumps(row(0)) + "\n" + json.dumps(row(1)))
    words = [
        sys.executable,
        "-c",
        FUZZ,
        "-runs=400",
        "-seed=1",
        str(corpus),
        str(tmp_path / "f"),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done" in done.stderr
