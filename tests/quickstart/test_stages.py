"""A whole quickstart with tiny parts: every stage runs, a second start repeats none, the result can chat."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava.quickstart import command, stages
from llava.quickstart.forecast import SPARE_TOKENS
from llava.quickstart.settings import QuickstartSettings
from llava.serve import cli
from tests.support.tiny import write_tiny_lm, write_tiny_tower, write_tiny_vqa


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quickstart")
    write_tiny_lm(root / "lm")
    write_tiny_tower(root / "tower")
    write_tiny_vqa(root / "data", 4, 3)
    shutil.copy(root / "data" / "train.json", root / "data" / "test.json")
    return root


def arguments(folder: Path) -> list[str]:
    words = [
        "--data",
        folder / "data",
        "--lm",
        folder / "lm",
        "--vision_tower",
        folder / "tower",
        "--out",
        folder / "o",
    ]
    return [str(word) for word in words]


def test_every_stage_with_tiny_parts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(arguments(folder))
    first = capsys.readouterr().out
    out = folder / "o"
    assert "page:" in first and "llava chat --model" in first and "done before" not in first
    result = json.loads((out / "results.json").read_text())
    assert result["num_questions"] == 12 and result["num_images"] == 4
    assert set(result["accuracy"]) == {"after", "after_blank", "before", "majority"}
    assert json.loads((out / "stages/before.json").read_text())["max_new_tokens"] > SPARE_TOKENS
    assert not (out / "eval-before/answers-blank.jsonl").exists()
    text = (out / "index.html").read_text()
    assert "Size as given" in text and "measured" in text and "GFLOP/s" in first
    assert text.count('class="case"') == 3 and text.count("<polyline") == 1
    assert not list(out.glob("*/checkpoint-*"))

    command.main(arguments(folder))
    second = capsys.readouterr().out
    assert second.count("done before") == len(stages.STAGES)

    image = next((folder / "data" / "images").iterdir())
    cli.main(["--model", str(out / "model"), "--image", str(image), "--question", "What?", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.endswith("\n")


def test_rows_of_the_alignment_stage(folder: Path, tmp_path: Path) -> None:
    context = stages.Context(QuickstartSettings(tmp_path, folder / "data"))
    rows = json.loads((folder / "data" / "train.json").read_text())
    copy = tmp_path / "data"
    shutil.copytree(folder / "data", copy)
    # Rows that state no facts about their images are used themselves.
    bare = [{key: value for key, value in row.items() if key != "question_type"} for row in rows]
    (copy / "train.json").write_text(json.dumps(bare))
    assert stages.caption_rows(context, copy) == {"captions": str(copy / "train.json"), "captions_version": "chatml"}
    # Rows that name the organ: captions made of it.
    (copy / "train.json").write_text(json.dumps([{**row, "image_organ": "CHEST"} for row in bare]))
    facts = stages.caption_rows(context, copy)
    made = json.loads(Path(facts["captions"]).read_text())
    assert facts["captions_version"] == "chatml" and len({row["image"] for row in made}) == 4
    assert all((copy / "images" / row["image"]).is_file() for row in made)
    # Captions of the folder's own.
    (copy / "captions.json").write_text("[]")
    assert stages.caption_rows(context, copy) == {"captions": str(copy / "captions.json"), "captions_version": "plain"}
