"""Settings that answers depend on, stored beside an answer file to detect a run with other settings.

    options of a command --model_settings--+
    weights, adapter, its base, tower -----+--> settings --write_settings--> answers.jsonl.settings.json
    sampling, images, questions -----------+                                      |
                                                   a later run --differences--> names of the settings that differ

The file holds hashes and last path components, never full paths. Importing this module does not load torch.
"""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from llava.constants import PROCESSOR_FILE
from llava.errors import DataError
from llava.generation.options import answer_defects, served_by, template_of
from llava.model.checkpoint.formats import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    ORIGIN_FILE,
    PROJECTOR_FILES,
    TOKENIZER_FILES,
    read_json,
)
from llava.model.checkpoint.legacy_keys import TOWER_KEYS
from llava.utils.jsonl import read_object, write_json
from llava.utils.plugins import loaded_plugins, needed_plugins
from llava.utils.provenance import file_sha256, weights_sha256

READ_FILES = (CONFIG_FILE, ADAPTER_CONFIG_FILE, PROCESSOR_FILE, "preprocessor_config.json", *TOKENIZER_FILES)
"""Files of a checkpoint, other than the weights, that change its answers."""

BASE_KEYS = ("base_model_name_or_path", "_name_or_path")
"""Keys of a configuration that name the base of an adapter or projector."""


def json_sha256(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def model_settings(args: Namespace) -> dict[str, Any]:
    """Return the settings of `add_model_options` that change answers, without sampling."""
    if (served := served_by(args)) is not None:
        facts = {**asdict(served), "name": served.shown_name}
        kept = {name: facts.pop(name) for name in ("weights", "template")}
        return {**kept, "server": facts, "dicom window": args.dicom_window, "dicom frame": args.dicom_frame}
    given = [name for name in (args.model_base, args.vision_tower, args.lora_pretrain) if name]
    system = None if args.conv_mode else read_json(Path(args.model) / PROCESSOR_FILE).get("system")
    return {
        "weights": checkpoint_hash(args.model, *given),
        "template": template_of(args),
        "system text": None if system is None else json_sha256(system),
        "dtype": args.dtype,
        "bits": args.bits,
        "compat": sorted(answer_defects(args)) or None,
        "dicom window": args.dicom_window,
        "dicom frame": args.dicom_frame,
        **({} if args.fast_jpeg is None else {"fast jpeg": args.fast_jpeg}),
        **_plugin_versions(args),
    }


def _plugin_versions(args: Namespace) -> dict[str, Any]:
    """Return the versions of the plug-ins that provide the model or its template; empty without any."""
    names = read_json(Path(args.model) / CONFIG_FILE).get("plugins")
    used = {*(names if isinstance(names, list) else ()), *needed_plugins(template=str(args.conv_mode))}
    found = {name: version for name, version in loaded_plugins().items() if name in used}
    return {"plugins": found} if found else {}


def checkpoint_hash(*names: str) -> str:
    """Return one hash over the weights and configuration of checkpoints and of everything they build on.

    Args:
        names: folders, weight files, or hub names (only the name of which is hashed).
    """
    seen: dict[str, Any] = {}
    waiting = list(names)
    while waiting:
        place = _place(waiting[0])
        name = str(place.resolve()) if place is not None else waiting[0]
        del waiting[0]
        if name in seen:
            continue
        seen[name] = name if place is None else _content(place)
        if place is not None and place.is_dir():
            waiting += _parts(place)
    return json_sha256(sorted(map(json_sha256, seen.values())))


def weights_hash(folder: str | Path) -> str | None:
    """Return the hash of a checkpoint's weight files, cached until the size or time of a file changes."""
    place = Path(folder).resolve()
    files = sorted(place.glob("*")) if place.is_dir() else [place]
    states = [(file.name, file.stat()) for file in files if file.is_file()]
    return _weights_hash(place, tuple((name, state.st_size, state.st_mtime_ns) for name, state in states))


@lru_cache(maxsize=64)
def _weights_hash(place: Path, _state: tuple[tuple[str, int, int], ...]) -> str | None:
    return weights_sha256(place) if place.exists() else None


def folder_name(path: str | Path | None) -> str | None:
    """Return the last component of a folder's path and a hash of the full path, which stays private."""
    if path is None:
        return None
    place = Path(path).resolve()
    return f"{place.name} {json_sha256(str(place))[:16]}"


def sidecar_path(answers: str | Path) -> Path:
    """Return the path of the settings file of an answer file."""
    path = Path(answers)
    return path.with_name(f"{path.name}.settings.json")


def write_settings(answers: str | Path, settings: Mapping[str, Any], *, precisions: Collection[str] = ()) -> None:
    """Write the settings of an answer file beside it.

    Args:
        answers: the answer file.
        settings: everything that the answers depend on.
        precisions: precisions that the answers were computed in. They are recorded but not compared, since
            `--dtype auto` may choose differently on another machine.
    """
    content = {"fingerprint": json_sha256(settings), "settings": dict(settings), "precisions": sorted(precisions)}
    write_json(sidecar_path(answers), content)


def read_precisions(answers: str | Path) -> list[str]:
    """Return the precisions of an answer file; several after a resume on another machine."""
    path = sidecar_path(answers)
    return list(read_object(path).get("precisions", ())) if path.is_file() else []


def join_settings(answers: str | Path, parts: Sequence[str | Path]) -> None:
    """Write the settings of an answer file joined from parts: the parts' settings and all precisions."""
    stored = [sidecar_path(part) for part in parts if sidecar_path(part).is_file()]
    if not stored:
        return
    precisions = {name for part in parts for name in read_precisions(part)}
    found = [_read(path) for path in stored]
    questions = json_sha256([settings.get("questions") for settings in found])  # each part has its own
    write_settings(answers, {**found[0], "questions": questions}, precisions=precisions)


def read_settings(answers: str | Path, *, of_empty: bool = False) -> dict[str, Any]:
    """Return the settings stored for an answer file; empty without stored settings or without answers.

    Args:
        answers: the answer file.
        of_empty: return the settings of a file without answers, too.

    Raises:
        DataError: the settings file cannot be read.
    """
    path, answers = sidecar_path(answers), Path(answers)
    has_answers = answers.is_file() and (of_empty or answers.stat().st_size > 0)
    return _read(path) if path.is_file() and has_answers else {}


def check_settings(answers: str | Path, settings: Mapping[str, Any]) -> None:
    """Check that the answers of a file were generated with these settings.

    Raises:
        DataError: a setting differs, or the settings file is missing.
    """
    path = sidecar_path(answers)
    fix = "name another file or folder, or start over with --resume False"
    if not path.is_file():
        raise DataError(f"{answers} holds answers, but its settings file {path.name} is missing; {fix}")
    different = differing_settings(_read(path), settings)
    if different:
        raise DataError(f"{answers} holds answers with other {', '.join(different)}; {fix}")


def differing_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that differ; nested values are named like `sampling.temperature`."""
    names = []
    for name in dict.fromkeys((*now, *before)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names += [f"{name}.{inner}" for inner in differing_settings(old, new)]
        elif json_sha256(old) != json_sha256(new):
            names.append(name)
    return names


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = read_object(path)["settings"]
    except (ValueError, KeyError, TypeError):
        settings = None
    if not isinstance(settings, dict):
        raise DataError(f"{path} is not a settings file of answers; start over with --resume False")
    return settings


def _place(name: str) -> Path | None:
    """Return the folder or file that a name refers to; None for a name of the hub."""
    path = Path(name.rpartition(":")[2]).expanduser()
    return path if path.exists() else None


def _content(place: Path) -> Any:
    """Return hashes of a file, or of the weights and configuration of a folder and its subfolders."""
    if place.is_file():
        return weights_hash(place)
    inside = sorted(folder for folder in place.iterdir() if folder.is_dir() and (folder / CONFIG_FILE).is_file())
    inside += sorted(file.parent for file in place.glob(f"*/{ADAPTER_CONFIG_FILE}"))
    return {
        folder.relative_to(place).as_posix(): [
            weights_hash(folder),
            *((name, file_sha256(folder / name)) for name in READ_FILES if (folder / name).is_file()),
        ]
        for folder in (place, *inside)
        if not folder.name.startswith("checkpoint-") or folder == place
    }


def _parts(folder: Path) -> list[str]:
    """Return the local paths that a checkpoint folder builds on: base models and vision towers."""
    config, adapter = read_json(folder / CONFIG_FILE), read_json(folder / ADAPTER_CONFIG_FILE)
    names = [config.get(key) for key in TOWER_KEYS]
    if adapter or any((folder / name).is_file() for name in PROJECTOR_FILES):
        names += [table.get(key) for table in (config, adapter) for key in BASE_KEYS]
        names += list(_texts(read_json(folder / ORIGIN_FILE)))
    return [name for name in names if isinstance(name, str) and name and _place(name) is not None]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
