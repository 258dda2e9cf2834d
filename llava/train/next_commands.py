"""Commands that follow a finished run, with its own paths; they can be pasted into a shell.

resolved_arguments.json --paths and options--> llava chat, llava eval, llava checkpoint export or the next stage
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from llava.constants import ARGUMENTS_FILE
from llava.errors import LlavaError
from llava.imaging.decode import resolve_image_path
from llava.utils.json_rows import read_records

MAX_ROWS = 100
"""Rows at the start of a file among which one with an image is searched for."""

ROWS_SUFFIXES = (".json", ".jsonl")


def next_commands(folder: Path) -> list[str]:
    """Return suggested next commands for the finished run in `folder`.

    A path that the run does not know stands in capitals: `IMAGE`, `HELD_OUT.json`, `TRAIN.json`.
    """
    arguments = json.loads((folder / ARGUMENTS_FILE).read_text(encoding="utf-8"))
    data, objective = arguments["data"], arguments["preference"]["objective"]
    rules = arguments["rollout"]["rules"]
    if objective == "reward":
        return []
    commands = [["llava", "chat", "--model", str(folder), "--image", _some_image(data)]]
    if rules:
        commands.append(["llava", "rules", "rollouts", str(folder), "--html"])
    elif objective == "sft":
        commands.append(_scoring(folder, data))
    if arguments["model"]["tune_mm_mlp_adapter"]:
        commands.append(_next_stage(folder, data))
    else:
        commands.append(["llava", "checkpoint", "export", str(folder), f"{folder}-hf", "--to", "hf"])
    return [shlex.join(words) for words in commands]


def _scoring(folder: Path, data: Mapping[str, Any]) -> list[str]:
    """Return the command that scores the model on its held-out rows."""
    rows = data["eval_data_path"] or "HELD_OUT.json"
    images = (data["eval_image_folder"] if data["eval_data_path"] else None) or data["image_folder"] or "IMAGES"
    out = str(folder / "eval")
    return ["llava", "eval", "--model", str(folder), "--data", rows, "--image-folder", images, "--out", out]


def _next_stage(folder: Path, data: Mapping[str, Any]) -> list[str]:
    """Return the command that trains the language model too, after a run of the projector alone."""
    images = data["image_folder"] or "IMAGES"
    return ["llava", "train", "--model-name-or-path", str(folder), "--data-path", "TRAIN.json", "--image-folder",
            images, "--output-dir", f"{folder}-tuned"]  # fmt: skip


def _some_image(data: Mapping[str, Any]) -> str:
    """Return the path of an image of the held-out rows, else of the training rows, else the word `IMAGE`."""
    for rows, images in (("eval_data_path", "eval_image_folder"), ("data_path", "image_folder")):
        path, root = data[rows], data[images] or data["image_folder"]
        if not path or not path.endswith(ROWS_SUFFIXES):  # a mixture has folders of its own
            continue
        try:
            for row in islice(read_records(path), MAX_ROWS):
                name = row.get("image")
                if isinstance(name, str) and (file := resolve_image_path(name, root)).is_file():
                    return str(file if root is None else Path(root) / file.relative_to(Path(root).resolve()))
        except (LlavaError, OSError, ValueError):  # the run succeeded; a missing hint is not an error
            continue
    return "IMAGE"
