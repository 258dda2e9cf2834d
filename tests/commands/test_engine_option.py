"""`--engine URL` of commands: the same answers as the model in their own process, and options that suit no server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llava.errors import ConfigError
from llava.eval import answering, findings_run
from llava.eval.run import main as eval_main
from llava.eval.run import make_parser as eval_parser
from llava.generation.fingerprint import read_settings
from llava.serve.admission import Admission
from llava.serve.answering import AnswerService
from llava.serve.cli import main as chat_main
from llava.serve.cli import make_parser as chat_parser
from llava.serve.gate import GateSettings
from llava.serve.image_inputs import ImageLimits
from llava.serve.worker import make_worker_app, served_model
from llava.utils.jsonl import read_object
from tests.support.generation_tools import engine_of
from tests.support.served import served
from tests.support.tiny import tiny_llava, write_tiny_vqa


class Place(NamedTuple):
    """Checkpoint, server of it, and questions."""

    model: str
    url: str
    data: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("engine")
    loaded = tiny_llava(seed=3, template="vicuna_v1")
    loaded.model.save_pretrained(folder / "first")
    loaded.processor.save_pretrained(folder / "first")
    engine = engine_of(loaded, prefill_chunk=512, prefix_cache_mb=8)
    service = AnswerService(
        engine, served_model(engine, str(folder / "first"), None), admission=Admission(), images=ImageLimits()
    )
    with served(make_worker_app(service, GateSettings(), engine.processor.tokenizer)) as url:
        yield Place(str(folder / "first"), url, write_tiny_vqa(folder / "vqa"))


def answers(place: Place, out: Path, *words: str) -> list[dict[str, Any]]:
    files = ["--question-file", str(place.data / "train.json"), "--image-folder", str(place.data / "images")]
    answering.model_vqa_med([*words, *files, "--answers-file", str(out), "--max-new-tokens", "6"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("answer_id",)} for row in rows]


def test_answering_gives_the_same_rows_and_resumes(place: Place, tmp_path: Path) -> None:
    local = answers(place, tmp_path / "a.jsonl", "--model-name", place.model)
    remote = answers(place, tmp_path / "b.jsonl", "--engine", place.url)
    assert remote == local and {row["model_id"] for row in remote} == {"first"}
    settings = read_settings(tmp_path / "b.jsonl")
    assert settings["server"]["is_ours"] and settings["template"] == "vicuna_v1" and settings["weights"]
    assert "127.0.0.1" not in json.dumps(settings)
    # A folder on this machine stands for the name under which it is served.
    assert answers(place, tmp_path / "b.jsonl", "--model-name", place.model, "--eng", place.url) == remote


def test_chat_prints_the_same_answer(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    image = next((place.data / "images").iterdir())
    words = ["--image", str(image), "--question", "What is shown?", "--max-new-tokens", "8"]
    chat_main(["--model", place.model, *words])
    local = capsys.readouterr().out
    chat_main(["--engine", f"{place.url}/v1", *words])
    assert capsys.readouterr().out == local and local.strip()


def test_evaluation_of_a_server_has_its_provenance(place: Place, tmp_path: Path) -> None:
    words = ["--data", str(place.data / "train.json"), "--image-folder", str(place.data / "images")]
    quick = ["--num-resamples", "20", "--controls", "none", "--max-new-tokens", "4"]
    scores = []
    for name, chosen in {"local": ["--model", place.model], "remote": ["--engine", place.url]}.items():
        eval_main([*chosen, *words, *quick, "--out", str(tmp_path / name)])
        scores.append(read_object(tmp_path / name / "results.json"))
    assert scores[0]["scores"] == scores[1]["scores"]
    facts = scores[1]["provenance"]
    assert facts["weights"] == scores[0]["provenance"]["weights"] and facts["template"] == "vicuna_v1"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--vision-tower", "t", "--dtype", "float32"], "--vision-tower, --dtype: the server of --engine"),
        (["--conv-mode", "v1"], "--conv-mode: the server"),
        (["--num-beams", "2"], "no beam search"),
        (["--model", "other"], "--model other is not served"),
        (["--compat", "cut_prompt"], "--compat: the server"),
    ],
)
def test_options_that_suit_no_server_are_refused_before_anything_is_written(
    place: Place, words: list[str], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        answers(place, tmp_path / "a.jsonl", "--engine", place.url, *words)
    assert not list(tmp_path.iterdir())


def test_a_model_or_a_server_is_needed(place: Place, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--model is missing"):
        answers(place, tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="must be the URL"):
        answers(place, tmp_path / "a.jsonl", "--engine", "gpt-4")


PARSERS: list[Callable[[], Any]] = [
    eval_parser,
    chat_parser,
    findings_run.make_parser,
    lambda: answering.make_parser("p", "d"),
]


@pytest.mark.parametrize("make", PARSERS)
def test_no_other_option_begins_like_the_new_one(make: Callable[[], Any]) -> None:
    options = [name for action in make()._actions for name in action.option_strings]
    assert [name for name in options if name.startswith("--e")] == ["--engine"]


def test_chunks_of_a_server_run_in_turn(place: Place, tmp_path: Path) -> None:
    parser = answering.make_parser("p", "d")
    parser.add_argument("--devices")
    words = ["--engine", place.url, "--question-file", "q", "--answers-file", "a"]
    assert answering._devices(parser.parse_args(words)) == [""]
