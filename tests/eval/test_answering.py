"""Answering commands: options, chunks in processes, joining."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.errors import ConfigError, GenerationError
from llava.eval import answering, model_vqa, model_vqa_med, run_med_datasets_eval_batch
from llava.generation.fingerprint import read_precisions, read_settings
from tests.support.eval_fakes import FakeEngine, row, rows_of, write_vqa


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    questions, images = write_vqa(tmp_path, [row(index, "a.png", f"Q{index}?", "yes") for index in range(5)])
    out = str(tmp_path / "an answers.jsonl")
    return [
        "--model-name",
        "m",
        "--question-file",
        str(questions),
        "--image-folder",
        str(images),
        "--answers-file",
        out,
    ]


@pytest.mark.parametrize("entry", [model_vqa, model_vqa_med])
def test_single_commands(entry, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(answering, "engine_of", lambda args: seen.append(args) or FakeEngine())
    old = ["--mm-projector", "p.bin", "--vision-tower", "clip", "--conv-mode", "simple", "--num_beams", "2"]
    entry.main([*words, *old])
    rows = rows_of(tmp_path / "an answers.jsonl")
    assert [answer["text"] for answer in rows] == ["saw a.png"] * 5
    assert rows[0]["model_id"] == "m" and rows[0]["prompt"] == "Q0?\n<image>"
    assert seen[0].conv_mode == "simple" and seen[0].num_beams == 2
    entry.main([*words, *old])
    assert len(seen) == 1


def test_batch_runs_every_chunk_with_all_options_and_joins(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Done:
        returncode = 0

    def fake_process(command: list[str], *, env: dict[str, str], check: bool) -> Done:
        args = answering.make_parser("x", "y").parse_args(command[3:])
        calls.append((args.chunk_idx, env.get("CUDA_VISIBLE_DEVICES"), args))
        Path(args.answers_file).write_text(f'{{"question_id": {args.chunk_idx}}}\n' if args.chunk_idx < 2 else "")
        return Done()

    monkeypatch.setattr(answering.subprocess, "run", fake_process)
    run_med_datasets_eval_batch.main(
        [
            *words,
            "--num-chunks",
            "3",
            "--devices",
            "0,5",
            "--conv-mode",
            "a b;c",
            "--answer-prompter",
            "--temperature=0.3",
        ]
    )
    assert sorted(index for index, _, _ in calls) == [0, 1, 2]
    assert {device for _, device, _ in calls} <= {"0", "5"}
    assert all(args.conv_mode == "a b;c" and args.answer_prompter and args.temperature == 0.3 for _, _, args in calls)
    assert all(args.num_chunks == 3 for _, _, args in calls)
    assert rows_of(tmp_path / "an answers.jsonl") == [{"question_id": 0}, {"question_id": 1}]
    assert (tmp_path / "an answers-chunk2.jsonl").exists()


def test_failed_chunk_is_named_and_nothing_is_joined(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "_run_chunk", lambda words, num, index, out, device: int(index == 1))
    with pytest.raises(GenerationError, match="chunks 1 of 2 failed"):
        run_med_datasets_eval_batch.main([*words, "--num-chunks", "2", "--devices", "0"])
    assert not (tmp_path / "an answers.jsonl").exists()


def test_another_number_of_chunks_is_refused_with_the_fix(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def in_process(words: list[str], num_chunks: int, index: int, out: Path, device: str) -> int:
        started.append(index)
        own = ["--num-chunks", str(num_chunks), "--chunk-idx", str(index), "--answers-file", str(out)]
        model_vqa_med.main([*answering._without_devices(words), *own])
        return 0

    monkeypatch.setattr(answering, "engine_of", lambda args: FakeEngine())
    monkeypatch.setattr(answering, "_run_chunk", in_process)

    def batch(num_chunks: int, *more: str) -> list[int]:
        started.clear()
        run_med_datasets_eval_batch.main([*words, "--num-chunks", str(num_chunks), "--devices", "0", *more])
        return [answer["question_id"] for answer in rows_of(tmp_path / "an answers.jsonl")]

    assert batch(2) == [0, 1, 2, 3, 4]
    for num_chunks in (1, 3):
        with pytest.raises(ConfigError, match=r"resume with --num-chunks 2, or start over with --resume False$"):
            batch(num_chunks)
        assert started == []
    assert batch(2) == [0, 1, 2, 3, 4]
    assert batch(3, "--resume", "False") == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="resume with --num-chunks 3"):
        batch(2)
    assert batch(3) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("num_chunks", "precisions"), [
    (1, ["float32"]), (2, ["bfloat16", "float32"]), (2, ["float32"]), (3, ["float16", "float32"]), (5, ["bfloat16"]),
])  # fmt: skip
def test_the_joined_file_has_the_settings_and_precisions_of_its_chunks(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_chunks: int, precisions: list[str]
) -> None:
    def in_process(words: list[str], num_chunks: int, index: int, out: Path, device: str) -> int:
        engine = FakeEngine()
        engine.precision = precisions[index % len(precisions)]  # type: ignore[attr-defined]
        monkeypatch.setattr(answering, "engine_of", lambda args: engine)
        own = ["--num-chunks", str(num_chunks), "--chunk-idx", str(index), "--answers-file", str(out)]
        model_vqa_med.main([*answering._without_devices(words), *own])
        return 0

    monkeypatch.setattr(answering, "_run_chunk", in_process)
    run_med_datasets_eval_batch.main([*words, "--num-chunks", str(num_chunks), "--devices", "0"])
    joined = tmp_path / "an answers.jsonl"
    assert read_precisions(joined) == precisions
    parts = [read_settings(answering.chunk_path(joined, index)) for index in range(num_chunks)]
    settings = read_settings(joined)
    assert {name for name in settings if settings[name] != parts[0][name]} == {"questions"}


def test_real_processes_fail_with_their_own_message(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    words[words.index("--question-file") + 1] = "no_such_file.json"
    with pytest.raises(GenerationError, match="chunks 0 of 1 failed"):
        run_med_datasets_eval_batch.main([*words, "--device", "cpu"])
    assert "no_such_file.json" in capfd.readouterr().err


def test_json_of_chunk_names() -> None:
    assert answering.chunk_path("a/b.jsonl", 2) == Path("a/b-chunk2.jsonl")
    assert answering.chunk_path("a/b", 0) == Path("a/b-chunk0.jsonl")
    assert json.dumps(answering._without_devices(["--devices", "0", "--device", "cpu", "--devices=1"])) == json.dumps(
        ["--device", "cpu"]
    )
