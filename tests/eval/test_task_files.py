"""Tasks: shipped files, fields and their errors, prompt, answer type and split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llava.errors import ConfigError, DataError
from llava.eval.task_files import chosen_tasks, read_task, read_tasks, split_sha256, tasks_text
from llava.samples import Conversation, Sample, Turn

TASK = {"name": "mine", "rows": "mine/test.json", "images": "mine/images"}


def write(folder: Path, file: str = "mine.yaml", **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / file
    path.write_text(yaml.safe_dump({**TASK, **changed}))
    return path


def samples(number: int = 3) -> list[Sample]:
    turns = (Turn("human", "<image>\nWhat?"), Turn("gpt", "heart"))
    return [Sample(str(index), Conversation(turns), ("a.png",)) for index in range(number)]


def test_shipped_tasks() -> None:
    tasks = read_tasks()
    assert list(tasks) == ["pathvqa", "slake", "vqa-rad"]
    assert [task.name for task in chosen_tasks("vqa-rad, slake,vqa-rad", tasks)] == ["vqa-rad", "slake"]
    assert "not in nowhere" in tasks_text(tasks, "nowhere")


def test_a_folder_adds_and_replaces_tasks(tmp_path: Path) -> None:
    write(tmp_path / "own")
    write(tmp_path / "own", "other.yaml", name="vqa-rad", rows="elsewhere.json")
    tasks = read_tasks(tmp_path / "own")
    assert tasks["vqa-rad"].rows == "elsewhere.json" and "mine" in tasks
    write(tmp_path / "own", "z.yaml")
    with pytest.raises(ConfigError, match=r"z\.yaml: a task 'mine' is already in this folder"):
        read_tasks(tmp_path / "own")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": None}, "field 'rows' must be text, got None"),
        ({"metric": ["x"]}, "unknown field 'metric'; known: name, rows"),
        ({"metrics": ["accuracy"]}, "unknown metric 'accuracy'; known: closed accuracy"),
        ({"metrics": "open recall"}, "metrics must be a list of names"),
        ({"images": "../images"}, "images must be a path below --data-root"),
        ({"rows": "/etc/rows.json"}, "rows must be a path below --data-root"),
        ({"prompt": "Answer."}, r"prompt must contain \{question\}"),
        ({"answer_type": "MAYBE"}, "unknown answer_type"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number above 0, got 0"),
        ({"name": "../x"}, "must be letters, digits"),
    ],
)
def test_errors_name_file_and_field(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = write(tmp_path, **changed)
    with pytest.raises(ConfigError, match=message) as error:
        read_task(path)
    assert "mine.yaml" in str(error.value) and "\n" not in str(error.value)


def test_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: [")
    with pytest.raises(ConfigError, match=r"a\.yaml: not YAML"):
        read_task(tmp_path / "a.yaml")


def test_prompt_and_answer_type(tmp_path: Path) -> None:
    task = read_task(write(tmp_path, prompt="Answer briefly. {question}", answer_type="OPEN"))
    [one] = task.prepared(samples(1))
    assert one.conversation.turns[0].text == "<image>\nAnswer briefly. What?" and one.meta["answer_type"] == "OPEN"
    assert read_task(write(tmp_path)).prepared(samples(1)) == samples(1)


def test_the_split_is_checked_in_any_order(tmp_path: Path) -> None:
    task = read_task(write(tmp_path, split_sha256=split_sha256(samples())))
    assert task.prepared(samples()[::-1]) == samples()[::-1]
    with pytest.raises(DataError, match="task mine: the rows have split_sha256"):
        task.prepared(samples(2))
