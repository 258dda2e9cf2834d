"""Checks of a training command line without torch or a model: options, files, folders, names.

They run before anything is loaded, so that a mistyped path costs a second. What needs the model or the rows is checked
where it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava.chat_families import FAMILIES
from llava.conversation import TEMPLATES
from llava.data.mixture import is_mixture
from llava.data.records import read_default, sample_of
from llava.errors import BrokenFileError, ConfigError, DataError
from llava.model.checkpoint.formats import ADAPTER_CONFIG_FILE, CONFIG_FILE, ORIGIN_FILE, PROJECTOR_FILES, read_json
from llava.model.projector_types import find_type, known_types
from llava.samples import Origin
from llava.train.attention_choice import check_attention
from llava.train.bounds import check_bounds
from llava.utils.cli import check_folder, flag, near_options, near_path
from llava.utils.file_kinds import utf8_text
from llava.utils.json_rows import iter_rows
from llava.utils.jsonl import JSON_ERRORS

Options = Mapping[str, Any]
"""Given options by name with underscores."""

IMAGE_MODES = ("square", "pad", "resize", "keep", "anyres")

FILES = {
    "eval_data_path": "rows in LLaVA format",
    "eval_vqa_path": "rows in LLaVA format",
    "system_file": "a text file",
    "ref_logprobs": "a file that `llava preferences score` wrote",
}
"""Options that name a file, and what it holds."""

FOLDERS = ("image_folder", "eval_image_folder")

CONFIG_FILES = ("deepspeed", "fsdp_config")
"""Options that hold the path of a JSON file, or JSON text."""

JSON_OPTIONS = (*CONFIG_FILES, "accelerator_config", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs")
"""Options that may hold JSON text."""


def check_options(options: Options) -> None:
    """Check what the given options name.

    Raises:
        ConfigError: a required option is missing, a number is out of bounds, a file or folder does not exist, or a
            name is unknown.
        DataError: the first row of a data file cannot be used.
        MissingDependency: an option needs a package that is not installed.
    """
    checks: tuple[Callable[[Options], None], ...] = (
        _check_required, check_bounds, _check_files, _check_folders, _check_model, _check_names, _check_attention,
        _check_launcher, check_json, _check_first_rows,
    )  # fmt: skip
    for check in checks:
        check(options)


def _check_required(options: Options) -> None:
    missing = [name for name in ("model_name_or_path", "data_path") if not options.get(name)]
    if missing:
        flags = ", ".join(map(flag, missing))
        raise ConfigError(
            f"{flags} {'is' if len(missing) == 1 else 'are'} missing; expected at least --model-name-or-path MODEL and "
            "--data-path ROWS, and for a new model --vision-tower TOWER"
        )


def _check_files(options: Options) -> None:
    for name, what in {"data_path": "rows in LLaVA format, or a mixture", **FILES}.items():
        path = options.get(name)
        if path and Path(path).is_dir():
            raise ConfigError(
                f"{flag(name)} {path} is a folder; expected {what}, for example {Path(path) / 'train.json'}"
            )
        if path and not Path(path).is_file():
            raise ConfigError(f"{flag(name)} {path}: no such file; expected {what}{near_path(path)}")


def _check_folders(options: Options) -> None:
    for name in FOLDERS:
        check_folder(options.get(name), flag(name))
    out = options.get("output_dir")
    if out and Path(out).is_file():
        raise ConfigError(f"--output-dir {out} is a file; expected a folder")


def _check_model(options: Options) -> None:
    for name in ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter"):
        path = str(options.get(name) or "").removeprefix("local-dir:")
        is_path = path.startswith(("/", ".", "~")) or path.count("/") > 1
        if is_path and "hf-hub:" not in path and not Path(path).expanduser().exists():
            raise ConfigError(
                f"{flag(name)} {path}: no such folder; expected a model folder or a hub name{near_path(path)}"
            )
    folder = Path(str(options["model_name_or_path"])).expanduser()
    if folder.is_file():
        raise ConfigError(f"--model-name-or-path {folder} is a file; expected a model folder or a hub name")
    if not options.get("vision_tower") and folder.is_dir() and _is_language_model(folder):
        raise ConfigError(
            f"{folder} is not a llava checkpoint, so it is treated as a language model. Pass --vision-tower."
        )


def _is_language_model(folder: Path) -> bool:
    """Return whether a folder has the configuration of a plain model, without parts of ours."""
    if any((folder / name).is_file() for name in (ORIGIN_FILE, ADAPTER_CONFIG_FILE, *PROJECTOR_FILES)):
        return False
    config = read_json(folder / CONFIG_FILE)
    kind = str(config.get("model_type", ""))
    return bool(kind) and "llava" not in kind and not config.keys() & {"mm_vision_tower", "vision_config"}


def _check_names(options: Options) -> None:
    version, mode, projector = (options.get(name) for name in ("version", "image_aspect_ratio", "mm_projector_type"))
    templates = sorted({*TEMPLATES, *FAMILIES})
    family = str(version).removesuffix("_sq")
    if version and family != "auto" and family not in FAMILIES and version not in templates:
        if str(version).endswith(".jinja"):
            if not Path(version).is_file():
                raise ConfigError(f"--version {version}: no such file; expected a chat template{near_path(version)}")
        else:
            hint = near_options([version], TEMPLATES) or "."
            known = ", ".join(sorted(TEMPLATES))
            raise ConfigError(
                f"--version {version}: unknown template{hint} Expected auto, FILE.jinja, or one of {known}"
            )
    if mode and mode not in IMAGE_MODES:
        raise ConfigError(
            f"--image-aspect-ratio {mode}: expected one of {', '.join(IMAGE_MODES)}{near_options([mode], IMAGE_MODES)}"
        )
    if projector and find_type(str(projector)) is None:
        raise ConfigError(f"--mm-projector-type {projector}: expected {known_types()}")


def _check_attention(options: Options) -> None:
    if options.get("attn_implementation"):
        check_attention(str(options["attn_implementation"]))


def check_json(options: Options) -> None:
    """Check the options that hold JSON objects or name files of them.

    Raises:
        ConfigError: a file does not exist, or is not a JSON object.
    """
    for name in JSON_OPTIONS:
        value = options.get(name)
        if not isinstance(value, str) or not value:
            continue
        is_json = value.lstrip().startswith("{")
        if name in CONFIG_FILES and not is_json and not Path(value).is_file():
            raise ConfigError(f"{flag(name)} {value}: no such file; expected a JSON file")
        if is_json or name in CONFIG_FILES:
            _check_object(name, value, value if is_json else None)


def _check_object(name: str, value: str, text: str | None) -> None:
    """Check that an option is a JSON object, given as `text` or in the file that `value` names."""
    try:
        content = json.loads(text if text is not None else utf8_text(Path(value).read_bytes(), takes_mark=False))
    except (OSError, *JSON_ERRORS) as error:
        raise ConfigError(f"{flag(name)} {value}: not JSON ({error}); expected a JSON object") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{flag(name)} {value}: expected a JSON object, got {type(content).__name__}")


def _check_first_rows(options: Options) -> None:
    """Check the first row of the data files, so that a wrong file is reported before a model is loaded."""
    if str(options.get("loader") or "default") != "default":  # tables and annotation files, with rows to leave out
        return
    is_sft = (options.get("objective") or "sft") == "sft"
    for name in ("data_path", "eval_data_path"):
        path = options.get(name)
        if path and not is_mixture(path):
            _check_first_row(path, is_sft=is_sft, skips_bad=bool(options.get("skip_bad")))


def _check_first_row(path: str, *, is_sft: bool, skips_bad: bool) -> None:
    first = next(iter_rows(path), None)
    if first is None:
        raise DataError(f"{path}: no row can be used; the file is empty")
    row, value = first
    try:
        if isinstance(value, DataError):
            raise value
        if is_sft:
            sample_of(value, Origin(path, row), read_default)
    except DataError as error:
        if not skips_bad or isinstance(error, BrokenFileError):
            raise DataError(f"{path}, row {row}: {error}") from error


def _check_launcher(options: Options) -> None:
    if options.get("deepspeed") and not options.get("nproc"):
        check_launched("--deepspeed")


def check_launched(option: str) -> None:
    """Check that a launcher started this process.

    Raises:
        ConfigError: it did not, but `option` needs one.
    """
    if "RANK" not in os.environ and "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            f"{option} needs a launcher; add --nproc N to `llava train` (N processes on this machine, 1 is enough), "
            "or start the command with torchrun --nproc_per_node=N or deepspeed"
        )
