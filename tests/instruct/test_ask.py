"""`llava ask`: which questions are kept, seeds by image, resuming, and the published scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import ConfigError, DataError
from llava.eval import model_collectA, visual_sq
from llava.generation.loading import open_engine
from llava.generation.protocol import Completion, Prompt, Sampling
from llava.instruct import ask
from llava.instruct.ask import QuestionSampling, asked_rows, images_of_folder, kept_questions, nearly_equal
from llava.instruct.preferences.rows import read_questions
from llava.model.checkpoint.save import save_model
from tests.support.tiny import tiny_image, tiny_llava


def stopped(*texts: str) -> list[Completion]:
    return [Completion(text, (1,), "stop") for text in texts]


def test_questions_that_are_cut_off_empty_or_repeated_are_dropped_and_counted() -> None:
    sampled = [
        *stopped("Is there an effusion?", " is there effusion ", "", "?!", "Is it  on\nthe left?"),
        Completion("Is the heart", (1,), "length"),
    ]
    kept, dropped = kept_questions(sampled)
    assert kept == ["Is there an effusion?", "Is it on the left?"]
    assert dropped == {"cut_off": 1, "empty": 2, "repeated": 1}


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("Is the lung clear?", "is lung clear", True),
        ("Is it on the left?", "Is it on the right?", False),
        (
            "What is shown in the upper left lobe of this lung here?",
            "What is shown in the upper right lobe of this lung here?",
            False,
        ),
    ],
)
def test_nearly_equal(first: str, second: str, equal: bool) -> None:
    assert nearly_equal(first, second) is equal


class Scripted:
    """Engine that describes an image by its name and asks what the test says; it keeps what it was asked."""

    def __init__(self, questions: list[str], broken: str = "") -> None:
        self.questions, self.broken = questions, broken
        self.seen: list[tuple[Prompt, Sampling]] = []

    def generate(self, prompts: Any, sampling: Any) -> list[list[Completion]]:
        self.seen += zip(prompts, sampling, strict=True)
        found = []
        for prompt, own in zip(prompts, sampling, strict=True):
            name = prompt.images[0].name
            if name == self.broken:
                found.append([Completion("", (), "error", error=f"{name} is damaged")])
            elif len(prompt.conversation.turns) == 1:
                found.append(stopped(f"about {name}"))
            else:
                found.append(stopped(*self.questions[: own.n]))
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "b").mkdir(parents=True)
    for number, name in enumerate(("c.png", "a.png", "b/d.JPG")):
        tiny_image(number).save(tmp_path / "images" / name, format="PNG")
    (tmp_path / "images" / "notes.txt").write_text("x")
    return tmp_path / "images"


def test_images_are_asked_in_the_order_of_their_names(folder: Path) -> None:
    engine = Scripted(["Why?"], broken="c.png")
    rows = asked_rows(engine, images_of_folder(folder), QuestionSampling())  # type: ignore[arg-type]
    assert [(row["question_id"], row["image"], row["prompt"]) for row in rows] == [
        (0, "a.png", ["Why?"]),
        (1, "b/d.JPG", ["Why?"]),
        (2, "c.png", []),
    ]
    assert rows[0]["description"] == "about a.png" and rows[2]["error"] == "c.png is damaged"
    describing, asking = engine.seen[0][1], engine.seen[3][1]
    assert (describing.temperature, describing.max_new_tokens, describing.n) == (0.0, 1024, 1)
    assert (asking.temperature, asking.top_k, asking.top_p, asking.max_new_tokens, asking.n) == (1.2, 300, 0.95, 300, 5)
    last = engine.seen[3][0].conversation.turns
    assert [turn.role for turn in last] == ["human", "gpt"] and last[0].text.startswith("<image>\n")


def test_seeds_depend_on_the_bytes_of_the_image_and_the_run(folder: Path) -> None:
    def seeds(run_seed: int) -> list[int | None]:
        engine = Scripted(["Why?"])
        settings = QuestionSampling(asking=Sampling(temperature=1.0, n=2, seed=run_seed))
        asked_rows(engine, images_of_folder(folder), settings)  # type: ignore[arg-type]
        return [sampling.seed for _, sampling in engine.seen if sampling.temperature]

    first = seeds(0)
    assert len(set(first)) == 3 and seeds(0) == first and seeds(1) != first
    (folder / "a.png").write_bytes((folder / "c.png").read_bytes())
    assert seeds(0) == [first[2], *first[1:]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "asking"
    loaded = tiny_llava(template="v1_sq")
    save_model(loaded.model, loaded.processor, path, origin=loaded.origin)
    return path


def run(model: Path, folder: Path, out: Path, *words: str) -> list[dict[str, Any]]:
    short = ["--max-new-tokens", "12", "--max-description-tokens", "8", "--n-shot", "3"]
    ask.main(["--model", str(model), "--images", str(folder), "--out", str(out), *short, *words])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_batches_and_a_restart_write_the_same_file(model: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "questions.jsonl"
    rows = run(model, folder, out)
    assert [row["image"] for row in rows] == ["a.png", "b/d.JPG", "c.png"]
    assert all(len(row["prompt"]) + sum(row["dropped"].values()) == 3 for row in rows)
    assert all(len(row["weights"]) == 64 and row["model"] == "asking" and row["seed"] == 0 for row in rows)
    whole = out.read_bytes()
    run(model, folder, tmp_path / "single.jsonl", "--batch-size", "1")
    assert (tmp_path / "single.jsonl").read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[2] + lines[0][:50])
    run(model, folder, out)
    assert out.read_bytes() == whole
    with pytest.raises(DataError, match=r"other asking\.temperature"):
        run(model, folder, out, "--temperature", "0.5")


def test_rows_name_their_images(model: Path, folder: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    rows = [{"id": str(n), "image": name, "conversations": turns} for n, name in enumerate(["c.png", "a.png", "c.png"])]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out = tmp_path / "questions.jsonl"
    words = ["--model", str(model), "--rows", str(tmp_path / "rows.json"), "--image-folder", str(folder)]
    ask.main([*words, "--out", str(out), "--max-new-tokens", "4", "--max-description-tokens", "4", "--n-shot", "1"])
    assert [json.loads(line)["image"] for line in out.read_text().splitlines()] == ["a.png", "c.png"]


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    loaded = tiny_llava()
    save_model(loaded.model, loaded.processor, tmp_path / "model", origin=loaded.origin)
    with pytest.raises(ConfigError, match=r"template vicuna_v1 cannot ask questions; train with --version v1_sq"):
        run(tmp_path / "model", folder, tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="no image"):
        images_of_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match="no such folder"):
        images_of_folder(tmp_path / "none")


def test_the_published_scripts_ask_and_collect_answers(model: Path, folder: Path, tmp_path: Path) -> None:
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    words = ["--model_path", str(model), "--image-folder", str(folder)]
    chunk = ["--num-chunks", "3", "--chunk-idx", "2"]
    visual_sq.main([*words, "--answers-file", str(questions), "--conv-mode", "v1_sq", "--n_shot", "1", *chunk])
    [row] = [json.loads(line) for line in questions.read_text().splitlines()]
    assert row["image"] == "c.png" and row["question_id"] == 2
    row["prompt"] = ["Why?"]  # a random model may ask nothing
    questions.write_text(json.dumps([row]))
    assert [asked.text for asked in read_questions(questions)] == ["Why?"]
    model_collectA.main([*words, "--question_file", str(questions), "--answers_file", str(answers), "--top_p", "0.3"])
    [found] = [json.loads(line) for line in answers.read_text().splitlines()]
    assert (found["img"], found["prompt"], len(found["answers"])) == ("c.png", "Why?", 2)


def test_unpadded_images_are_cropped(tmp_path: Path) -> None:
    loaded = tiny_llava(template="v1_sq", image_mode="pad")
    save_model(loaded.model, loaded.processor, tmp_path, origin=loaded.origin)
    assert open_engine(tmp_path).processor.image_mode == "pad"
    assert open_engine(tmp_path, compat="unpadded_images").processor.image_mode == "square"
