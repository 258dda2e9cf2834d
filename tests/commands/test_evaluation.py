"""The evaluation commands of docs/commands.md, on a tiny model with random weights."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from llava.eval import model_vqa, model_vqa_med, run, run_med_datasets_eval_batch
from llava.model.checkpoint.save import save_model
from llava.quickstart.synthetic import sample_smear, truth_row
from tests.support.eval_fakes import row, rows_of, write_vqa
from tests.support.processes import run_command
from tests.support.tiny import tiny_llava

ROOT = Path(__file__).resolve().parents[2]
ROWS = [row(index, f"{index % 2}.png", f"Is it number {index}?", "yes" if index % 3 else "no") for index in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved tiny model and a small dataset named vqa_rad."""
    folder = tmp_path_factory.mktemp("evaluation")
    loaded = tiny_llava()
    save_model(loaded.model, loaded.processor, folder / "model")
    write_vqa(folder / "vqa_rad", ROWS)
    return folder


def words_for(folder: Path, out: str) -> list[str]:
    return [
        "--model-name",
        str(folder / "model"),
        "--question-file",
        str(folder / "vqa_rad" / "test.json"),
        "--image-folder",
        str(folder / "vqa_rad" / "images"),
        "--answers-file",
        str(folder / "vqa_rad" / out),
        "--max-new-tokens",
        "4",
        "--device",
        "cpu",
    ]


def run_script(python: Path, *words: str, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_command([python, *words], cwd=cwd, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_answers_in_chunks_are_the_answers_of_one_process(
    folder: Path, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "executable", str(python))
    batch = words_for(folder, "test-answer-file.jsonl")
    run_med_datasets_eval_batch.main(["--num-chunks", "2", *batch])  # each chunk is a process of `model_vqa_med`
    model_vqa_med.main(words_for(folder, "single.jsonl"))
    joined, single = (rows_of(folder / "vqa_rad" / name) for name in ("test-answer-file.jsonl", "single.jsonl"))
    assert [answer["question_id"] for answer in joined] == [0, 1, 2, 3, 4]
    assert [answer["text"] for answer in joined] == [answer["text"] for answer in single]
    assert all(answer["metadata"].get("error") is None for answer in single)
    printed = run_script(
        python, "-m", "llava.eval.run_eval", "--gt", "vqa_rad/test.json", "--pred", "vqa_rad/single.jsonl", cwd=folder
    )
    assert "yes/no accuracy" in printed and "========\n vqa_rad" in printed
    script = str(ROOT / "llava" / "eval" / "run_eval_batch.py")
    run_script(python, script, "--pred_file_parent_path", ".", "--target_test_type", "test-answer-file", cwd=folder)
    assert rows_of(folder / "eval_results_med_datasets.jsonl")[0]["dataset"] == "vqa_rad"


def test_chat_questions(folder: Path) -> None:
    chat = [{"question_id": index, "image": "0.png", "text": f"What {index}?\n<image>"} for index in range(2)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, chat)))
    words = words_for(folder, "chat.jsonl")
    words[words.index("--question-file") + 1] = str(folder / "questions.jsonl")
    model_vqa.main([*words, "--temperature", "0.7", "--seed", "3", "--conv-mode", "v1"])
    rows = rows_of(folder / "vqa_rad" / "chat.jsonl")
    assert [answer["prompt"] for answer in rows] == ["What 0?\n<image>", "What 1?\n<image>"]
    assert not any("error" in answer["metadata"] for answer in rows)


def test_llava_eval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder / "vqa_rad"
    words = [
        "--model",
        str(folder / "model"),
        "--data",
        str(data / "test.json"),
        "--image_folder",
        str(data / "images"),
    ]
    words += ["--out", str(folder / "result"), "--max-new-tokens", "4", "--device", "cpu", "--num-resamples", "50"]
    run.main(words)
    printed = capsys.readouterr().out
    assert "blank image" in printed and "NOT above a gray image" in printed
    results = json.loads((folder / "result" / "results.json").read_text())
    assert results["counts"]["failed"] == 0 and results["blank_counts"]["failed"] == 0
    assert results["provenance"]["template"] and results["provenance"]["weights"]
    page = (folder / "result" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 5


def test_conversations_with_rules(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smears = [(sample_smear(seed), f"{seed}.png") for seed in range(2)]
    table = folder / "smears.json"
    table.write_text(json.dumps([truth_row(smear, image) for smear, image in smears]))
    words = ["--model", str(folder / "model"), "--rules", "drawn-smears", "--data", str(table), "--device", "cpu"]
    words += ["--image-folder", str(folder / "vqa_rad" / "images"), "--max-new-tokens", "4", "--num-resamples", "20"]
    words += ["--styles", "standard,diagnosis_first", "--hints", "disagree"]
    run.main([*words, "--out", str(folder / "rules")])
    run.main([*words, "--out", str(folder / "again"), "--compare", str(folder / "rules")])
    shown = capsys.readouterr().out
    assert "6 conversations (2 with wrong hints) about 2 images" in shown and "this run minus rules" in shown
    held = rows_of(folder / "rules" / "dialogues.jsonl")
    assert held == rows_of(folder / "again" / "dialogues.jsonl") and all("error" not in row for row in held)
    assert [len(row["answers"]) for row in held] == [4] * 6 and {row["image"] for row in held} == {"0.png", "1.png"}
    report = json.loads((folder / "rules" / "results.json").read_text())
    assert report["scores"]["A_Q"]["answered"]["num_items"] == 16 and "blank" in report["scores"]["A_Q"]
