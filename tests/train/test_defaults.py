"""Defaults of `llava train` for a new model and for a checkpoint; those of the published commands stay."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from llava.chat_families import FAMILIES
from llava.generation.loading import open_engine
from llava.processing import LlavaMedProcessor
from llava.serve import cli as chat
from llava.serve.admission import Admission
from llava.serve.answering import AnswerService
from llava.serve.gate import GateSettings
from llava.serve.image_inputs import ImageLimits
from llava.serve.worker import make_worker_app, served_model
from llava.train import command, train_mem
from llava.train.run_start import RESOLVED_FILE
from tests.support.runs import arguments, losses, metrics, saved, steps, write_parts
from tests.support.served import served
from tests.support.tiny import byte_tokenizer, write_tiny_lm

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "lm")
    return folder


@pytest.fixture(scope="module")
def run(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `llava train` with 12 steps."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    command.main(arguments(parts, folder, per_device_train_batch_size=2, num_train_epochs=2, logging_steps=None))
    return folder


def resolved(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "resolved_arguments.json").read_text()))


def test_a_new_model_has_the_defaults_of_today(run: Path) -> None:
    found = resolved(run)
    assert found["model"]["mm_projector_type"] == "mlp2x_gelu"
    assert found["model"]["version"] == "auto" and found["model"]["calibrate_mm_projector"] is True
    assert found["data"]["image_aspect_ratio"] == "pad"
    processor = LlavaMedProcessor.from_pretrained(run)
    assert (processor.template.name, processor.image_mode) == ("auto", "pad")
    assert processor.template.stops == ("<|im_end|>", "</s>")


def test_about_a_hundred_lines_are_logged_and_the_curve_is_drawn(run: Path) -> None:
    assert steps(run) == list(range(1, 13))
    assert (run / "loss_curve.png").stat().st_size > 1000


def test_the_published_command_keeps_its_defaults(parts: Path, tmp_path: Path) -> None:
    train_mem.main(arguments(parts, tmp_path / "run", max_steps=2, logging_steps=None))
    found = resolved(tmp_path / "run")
    assert found["model"]["mm_projector_type"] == "linear" and found["model"]["version"] is None
    assert found["model"]["calibrate_mm_projector"] is False and found["data"]["image_aspect_ratio"] is None
    assert found["training"]["logging_steps"] == 500
    processor = LlavaMedProcessor.from_pretrained(tmp_path / "run")
    assert (processor.template.name, processor.image_mode) == ("v0", "square")
    assert not (tmp_path / "run" / "loss_curve.png").exists() and not (tmp_path / "run" / RESOLVED_FILE).exists()


def test_a_checkpoint_keeps_its_own_values(
    run: Path, parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = arguments(parts, tmp_path / "more", model_name_or_path=run, vision_tower=None, max_steps=1)
    with caplog.at_level("INFO", logger="llava"):
        command.main(words)
    found = resolved(tmp_path / "more")
    assert found["model"]["version"] is None and found["model"]["calibrate_mm_projector"] is False
    processor = LlavaMedProcessor.from_pretrained(tmp_path / "more")
    assert (processor.template.name, processor.image_mode) == ("auto", "pad")
    assert "is ignored" not in caplog.text
    assert "a single optimizer step" in caplog.text


def test_the_resolved_file_repeats_the_run(run: Path, tmp_path: Path) -> None:
    assert yaml.safe_load((run / RESOLVED_FILE).read_text())["mm_projector_type"] == "mlp2x_gelu"
    command.main([str(run / RESOLVED_FILE), "--output-dir", str(tmp_path / "again")])
    assert losses(tmp_path / "again") == losses(run)
    assert all((saved(run)[name] == weight).all() for name, weight in saved(tmp_path / "again").items())


def test_the_last_lines_name_the_model_and_the_next_commands(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    with caplog.at_level("INFO", logger="llava"):
        command.main(arguments(parts, folder, eval_data_path=parts / "vqa" / "train.json", save_strategy="epoch"))
    assert f"model: {folder} (3 steps, best eval_loss" in caplog.text
    for line in ("llava eval --model", "llava chat --model", "llava checkpoint export"):
        assert f"{line} {folder}" in caplog.text
    assert "step 1/3  loss " in caplog.text and "validation 3/3" in caplog.text
    assert metrics(folder)


def test_a_run_of_one_step_says_so_and_draws_nothing(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="llava"):
        command.main(arguments(parts, tmp_path / "run", max_steps=1))
    assert "the run took a single optimizer step, so it has one loss and no curve" in caplog.text
    assert not (tmp_path / "run" / "loss_curve.png").exists()


def test_a_new_qwen_is_trained_answers_and_is_served_under_its_own_template(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = FAMILIES["qwen2.5"]
    write_tiny_lm(tmp_path / "qwen", "qwen2")
    tokenizer.save_pretrained(tmp_path / "qwen")
    command.main(arguments(parts, tmp_path / "run", model_name_or_path=tmp_path / "qwen", max_steps=2))
    image = str(parts / "vqa" / "images" / "0.png")
    processor = LlavaMedProcessor.from_pretrained(tmp_path / "run")
    assert processor.template.name == "auto" and "<|im_end|>" in processor.template.stops
    chat.main(["--model", str(tmp_path / "run"), "--image", image, "--question", "What?", "--max-new-tokens", "4"])
    printed = capsys.readouterr().out.strip()
    engine = open_engine(str(tmp_path / "run"), device="cpu")
    service = AnswerService(
        engine, served_model(engine, str(tmp_path / "run"), None), admission=Admission(max_running=2, max_waiting=2),
        images=ImageLimits(dicom=processor.dicom),
    )  # fmt: skip
    url = "data:image/png;base64," + base64.b64encode(Path(image).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    body = {"model": "run", "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    app = make_worker_app(service, GateSettings(), engine.processor.tokenizer)
    with served(app) as address, httpx2.Client(base_url=address, timeout=120, trust_env=False) as client:
        answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert printed and answer.strip() == printed


def test_a_template_without_its_tokens_is_warned_about(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="llava"):
        command.main(arguments(parts, tmp_path / "run", version="llama3", max_steps=1))
    assert "--version llama3 ends an answer with <|eot_id|>, which is not a token of this tokenizer" in caplog.text


def test_a_template_file_is_saved_with_the_model(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(CHATML.replace("<|im_end|>", "</s>"))
    command.main(arguments(parts, tmp_path / "run", version=tmp_path / "own.jinja", max_steps=1))
    (tmp_path / "own.jinja").unlink()
    processor = LlavaMedProcessor.from_pretrained(tmp_path / "run")
    assert processor.template.name == "auto" and processor.template.stops == ("</s>",)


def test_rows_without_images_do_not_stop_the_default(parts: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]
    (tmp_path / "text.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    words = arguments(parts, tmp_path / "run", data_path=tmp_path / "text.json", image_folder=None, max_steps=1)
    command.main(words)
    assert resolved(tmp_path / "run")["model"]["calibrate_mm_projector"] is True
