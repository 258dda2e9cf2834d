"""The small real run of findings, on tiny parts: all stages, the baselines, scores, comparisons and the table."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.iu_reports import archive
from tests.support.scripts import load_script
from tests.support.tiny import tiny_image, write_tiny_lm, write_tiny_tower

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """The script as a module."""
    return load_script("findings_small")


def write_notes(folder: Path) -> Path:
    """Write six X-rays of three patients, four of which have findings, for training and for testing."""
    images = folder / "cxr-notes" / "images"
    images.mkdir(parents=True)
    for part in ("train", "test"):
        rows = []
        for number in range(6):
            name = f"{part}{number}.png"
            tiny_image(number).save(images / name)
            text = "No effusion." if number % 2 else "Mild edema."
            row = {"id": f"{part}{number}", "image": name, "patient": str(number // 2), "view": "PA", "findings": ""}
            if number < 4:
                question = "<image>\nProvide a description of the findings in the radiology image."
                turns = [{"from": "human", "value": question}, {"from": "gpt", "value": text}]
                row |= {"findings": text, "conversations": turns}
            rows.append(row)
        (folder / "cxr-notes" / f"{part}.json").write_text(json.dumps(rows))
    return folder


def test_all_stages(program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if archive() is None:
        pytest.skip("torchxrayvision is not installed; run: bash scripts/setup.sh rad")
    lm, tower, out = write_tiny_lm(tmp_path / "lm"), write_tiny_tower(tmp_path / "tower"), tmp_path / "out"
    words = [
        "--data-root",
        str(write_notes(tmp_path)),
        "--out",
        str(out),
        "--lm",
        str(lm),
        "--vision-tower",
        str(tower),
    ]
    program.MAX_NEW_TOKENS = 6
    program.main([*words, "--warm-rows", "6", "--epochs", "1", "--bf16", "False"])
    shown = capsys.readouterr().out
    assert "warm-up: 6 of 6 reports" in shown and "minutes, forecast" in shown
    table = (out / "table.md").read_text()
    assert table in shown
    systems = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert systems == [*program.SYSTEMS, *(f"model minus {name}" for name in program.SYSTEMS[1:])]
    rows = [json.loads(line) for line in (out / "nearest.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["0_test0", "0_test1", "1_test2", "1_test3"]
    assert [row["prediction"] for row in rows] == [row["reference"] for row in rows]  # the same images in both parts
    assert (out / "scores" / "model" / "report.html").is_file() and (
        out / "compare" / "blank" / "compare.json"
    ).is_file()
    warm = json.loads((out / "warm.json").read_text())
    assert len(warm) == 6 and not any("image" in row for row in warm)


def test_the_warm_up_is_shortened_to_the_limit(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "q" * 100}, {"from": "gpt", "value": "a" * 400}]
    rows = [{"id": str(number), "conversations": turns} for number in range(50)]
    args = program.Namespace(lm=None, vision_tower=None, epochs=1, minutes=2.0)
    files = program.Files(rows * 4000, rows[:2], rows[:2])
    kept = program.planned(args, files)
    assert 0 < len(kept.warm) < len(files.warm) and kept.train == files.train
    seconds = float(capsys.readouterr().out.rpartition("together ")[2].split()[0])
    assert seconds <= 2


def test_a_folder_without_the_data_is_one_line(program: ModuleType, tmp_path: Path) -> None:
    import subprocess

    words = ["bash", str(ROOT / "scripts" / "findings_small.sh"), str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cxr-notes/images does not exist" in done.stderr
