"""Tasks of `llava eval --tasks`: YAML files with rows, images, prompt, metrics and expected split.

    llava/eval/tasks/*.yaml, --tasks-dir DIR --read_tasks--> EvaluationTask --prepared--> samples of one evaluation

A file has `name`, `rows` and `images` (paths below --data-root); and optionally `description`, `train` (rows for the
majority baseline), `loader`, `prompt` (text with `{question}`), `answer_type` (OPEN or CLOSED for all rows), `metrics`
(names of `llava.scoring.metrics`), `split_sha256`, `max_new_tokens` and `by` (a field for a table).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from llava.constants import IMAGE_TOKEN
from llava.errors import ConfigError, DataError
from llava.generation.fingerprint import json_sha256
from llava.samples import Conversation, Sample
from llava.scoring.metrics import METRICS, STRICT_NAMES, metrics_named
from llava.utils.jsonl import read_text
from llava.utils.lookup import lookup
from llava.utils.plugins import add_named
from llava.utils.reporting import text_table
from llava.utils.yaml_files import parse_yaml

FOLDER = Path(__file__).parent / "tasks"
"""Folder of the tasks of this package."""

LIST = "list"
QUESTION = "{question}"
ANSWER_TYPES = {"OPEN": "OPEN", "CLOSED": "CLOSED"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class EvaluationTask:
    """Evaluation task; the module docstring lists its fields.

    Attributes:
        name: name on the command line, and of its output folder.
        rows: file of questions with answers, below the data root.
        images: folder of the images, below the data root.
    """

    name: str
    rows: str
    images: str
    description: str = ""
    train: str | None = None
    loader: str = "default"
    prompt: str = QUESTION
    answer_type: str | None = None
    metrics: tuple[str, ...] = STRICT_NAMES
    split_sha256: str | None = None
    max_new_tokens: int | None = None
    by: str | None = None

    def prepared(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples with the prompt and the answer type of the task.

        Raises:
            DataError: the rows are not those of the expected split.
        """
        found = split_sha256(samples)
        if self.split_sha256 is not None and found != self.split_sha256:
            raise DataError(
                f"task {self.name}: the rows have split_sha256 {found}, expected {self.split_sha256}; use the same "
                "rows, or remove split_sha256 from the task"
            )
        return [self._prepared(sample) for sample in samples]

    def _prepared(self, sample: Sample) -> Sample:
        first, *rest = sample.conversation.turns
        plain = first.text.replace(IMAGE_TOKEN, "").strip()
        text = first.text
        if self.prompt != QUESTION:
            asked = self.prompt.replace(QUESTION, plain)
            text = f"{IMAGE_TOKEN}\n" * first.text.count(IMAGE_TOKEN) + asked
        meta = sample.meta if self.answer_type is None else {**sample.meta, "answer_type": self.answer_type}
        turns = (replace(first, text=text), *rest)
        return replace(sample, conversation=Conversation(turns, sample.conversation.system), meta=meta)


def split_sha256(samples: Sequence[Sample]) -> str:
    """Return the hash of a split: ids, images, questions and answers, in any order of the rows."""
    rows = [(one.id, one.images, [turn.text for turn in one.conversation.turns]) for one in samples]
    return json_sha256(sorted(map(json_sha256, rows)))


def read_task(path: str | Path) -> EvaluationTask:
    """Return the task of a file.

    Raises:
        ConfigError: the file is not a task; names it and the field.
    """
    try:
        found = parse_yaml(read_text(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    known = [field.name for field in fields(EvaluationTask)]
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected fields {', '.join(known[:3])} ..., got {type(found).__name__}")
    for name in found:
        if name not in known:
            raise ConfigError(f"{path}: unknown field {name!r}; known: {', '.join(known)}")
    for name in known[:3]:
        if not isinstance(found.get(name), str) or not found[name]:
            raise ConfigError(f"{path}: field {name!r} must be text, got {found.get(name)!r}")
    _check_fields(path, found)
    metrics = found.get("metrics", list(STRICT_NAMES))
    return EvaluationTask(**{**found, "metrics": tuple(metrics)})


def _check_fields(path: str | Path, found: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a field of a task that cannot be used."""
    if not NAME.fullmatch(found["name"]):
        raise ConfigError(f"{path}: name {found['name']!r} must be letters, digits, '.', '-' and '_'")
    for name in ("rows", "images", "train"):
        if name in found and (Path(str(found[name])).is_absolute() or ".." in Path(str(found[name])).parts):
            raise ConfigError(f"{path}: {name} must be a path below --data-root, got {found[name]!r}")
    for name in ("description", "train", "loader", "prompt", "answer_type", "split_sha256", "by"):
        if not isinstance(found.get(name, ""), str):
            raise ConfigError(f"{path}: field {name!r} must be text, got {found[name]!r}")
    if QUESTION not in found.get("prompt", QUESTION):
        raise ConfigError(f"{path}: prompt must contain {QUESTION}, got {found['prompt']!r}")
    if "answer_type" in found:
        lookup(ANSWER_TYPES, found["answer_type"], f"answer_type in {path}")
    limit = found.get("max_new_tokens", 1)
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ConfigError(f"{path}: max_new_tokens must be a whole number above 0, got {limit!r}")
    metrics = found.get("metrics", list(STRICT_NAMES))
    if not isinstance(metrics, list | tuple) or not metrics:
        raise ConfigError(f"{path}: metrics must be a list of names; known: {', '.join(METRICS)}")
    metrics_named(list(map(str, metrics)), place=str(path))


TASKS: dict[str, EvaluationTask] = {}
"""Tasks of plug-ins, by name."""


def add_task(task: EvaluationTask) -> None:
    """Add a task of a plug-in.

    Raises:
        ConfigError: its name exists already, or a field cannot be used.
    """
    if task.name in read_tasks():
        raise ConfigError(f"a task {task.name!r} already exists; choose another name")
    found = {field.name: getattr(task, field.name) for field in fields(task)}
    _check_fields(f"task {task.name}", {name: value for name, value in found.items() if value is not None})
    add_named(TASKS, task.name, task, "task")


def read_tasks(folder: str | Path | None = None) -> dict[str, EvaluationTask]:
    """Return the tasks of this package, of plug-ins and of a folder.

    A folder's task replaces one of the same name.

    Raises:
        ConfigError: a file is not a task, the folder does not exist, or two of its files have one name.
    """
    tasks = {task.name: task for task in map(read_task, sorted(FOLDER.glob("*.yaml")))}
    tasks |= TASKS
    if folder is None:
        return tasks
    place = Path(folder)
    if not place.is_dir():
        raise ConfigError(f"--tasks-dir {folder} is not a folder; expected one with a YAML file per task")
    own: dict[str, EvaluationTask] = {}
    for path in sorted((*place.glob("*.yaml"), *place.glob("*.yml"))):
        task = read_task(path)
        if task.name in own:
            raise ConfigError(f"{path}: a task {task.name!r} is already in this folder")
        own[task.name] = task
    return {**tasks, **own}


def chosen_tasks(text: str, tasks: Mapping[str, EvaluationTask]) -> list[EvaluationTask]:
    """Return the tasks of a list such as `vqa-rad,slake`.

    Raises:
        ConfigError: a name is unknown or none is given.
    """
    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not names:
        raise ConfigError(f"--tasks: no task given; known: {', '.join(tasks)}, or {LIST}")
    return [lookup(tasks, name, "task") for name in names]


def tasks_text(tasks: Mapping[str, EvaluationTask], data_root: str | Path) -> str:
    """Return the table of `--tasks list`: whether the rows are there, metrics and description."""
    rows = [
        [
            task.name,
            "found" if (Path(data_root) / task.rows).is_file() else f"not in {data_root}",
            ", ".join(task.metrics),
            task.description,
        ]
        for task in tasks.values()
    ]
    return text_table(["task", "rows", "metrics", "description"], rows) + "\n"
