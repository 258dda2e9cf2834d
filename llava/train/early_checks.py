"""Checks of a training command line that need neither torch nor a model: options, files, folders, names.

They run before anything is loaded, so that a mistyped path costs a second. What needs the model or the rows is checked
where it is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava.chat_families import FAMILIES
from llava.conversation import TEMPLATES
from llava.errors import ConfigError
from llava.model.checkpoint.formats import ADAPTER_CONFIG_FILE, CONFIG_FILE, ORIGIN_FILE, PROJECTOR_FILES, read_json
from llava.model.projector_types import find_type, known_types
from llava.train.attention_choice import check_attention
from llava.utils.cli import flag, near_options

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


def check_options(options: Options) -> None:
    """Check what the given options name.

    Raises:
        ConfigError: a required option is missing, a file or folder does not exist, or a name is unknown.
        MissingDependency: an option needs a package that is not installed.
    """
    checks: tuple[Callable[[Options], None], ...] = (
        _check_required, _check_files, _check_folders, _check_model, _check_names, _check_attention, _check_launcher,
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
            raise ConfigError(f"{flag(name)} {path}: no such file; expected {what}{_near_path(path)}")


def _check_folders(options: Options) -> None:
    for name in FOLDERS:
        path = options.get(name)
        if path and not Path(path).is_dir():
            what = "is a file" if Path(path).exists() else "no such folder"
            raise ConfigError(f"{flag(name)} {path}: {what}; expected the folder of the images{_near_path(path)}")


def _near_path(path: str) -> str:
    """Return the hint for a path that does not exist: its parent, or a similar name in it."""
    parent = Path(path).parent
    if not parent.is_dir():
        return f" ({parent} does not exist either)"
    try:
        names = sorted(item.name for item in parent.iterdir())[:1000]
    except OSError:
        return ""
    return near_options([Path(path).name], names)


def _check_model(options: Options) -> None:
    for name in ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter"):
        path = str(options.get(name) or "").removeprefix("local-dir:")
        is_path = path.startswith(("/", ".", "~")) or path.count("/") > 1
        if is_path and "hf-hub:" not in path and not Path(path).expanduser().exists():
            raise ConfigError(
                f"{flag(name)} {path}: no such folder; expected a model folder or a hub name{_near_path(path)}"
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
                raise ConfigError(f"--version {version}: no such file; expected a chat template{_near_path(version)}")
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
