"""Write the model card (README.md) of saved weights: their parts with licenses, and their data.

All of it is read from files: `llava_origin.json` of the parts, `provenance.json` of the run, and the licenses that the
parts' own folders state.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.model.checkpoint.formats import ORIGIN_FILE, PROVENANCE_FILE, read_json

CARD_FILE = "README.md"
MARK = "<!-- written at each save by llava; delete this line to keep your own text -->"
KIND_TITLES = {"model": "a whole model", "adapter": "a LoRA adapter", "projector": "a projector"}
ABSOLUTE_PATH = re.compile(r"(?:(?<![^\s=,:;\[({'\"])|(?<=file://))(?:~|/(?!/))[^=,;:'\"]*")
"""An absolute path in an argument of a command: alone, after `--option=`, or in a list; not a part of a URL."""

NOT_STATED = "not stated in its folder: ask its publisher before passing anything on"

KNOWN_LICENSES = {
    "lmsys/vicuna-7b-v1.5": "Llama 2 Community License",
    "lmsys/vicuna-13b-v1.5": "Llama 2 Community License",
    "mistralai/Mistral-7B-Instruct-v0.2": "Apache-2.0",
    "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224": "MIT",
    "microsoft/llava-rad": "Microsoft Research license, research use only",
}
"""Licenses of parts that are given by hub name, as their publishers state them."""

DATA_FACTS = {
    "data_sha256": "training data",
    "eval_data_sha256": "held-out data",
    "model_sha256": "weights at the start",
}


@dataclass(frozen=True, slots=True)
class ModelPart:
    """Part that a model builds on; `name` is a hub name, or the name of its folder."""

    role: str
    name: str
    license: str


def model_parts(origin: Mapping[str, Any], seen: frozenset[str] = frozenset()) -> Iterator[ModelPart]:
    """Yield the parts that an origin names, and those that they were built from themselves.

    Args:
        origin: as in `llava_origin.json`.
        seen: bases that were visited already: folders may name each other.
    """
    build = origin.get("build") or {}
    load = origin.get("load") or {}
    named = [
        ("language model", build.get("lm") or load.get("base")),
        ("vision tower", build.get("vision_tower_checkpoint") or build.get("vision_tower") or load.get("vision_tower")),
        ("base", origin.get("base")),
    ]
    for role, name in named:
        if name:
            yield ModelPart(role, public_name(str(name)), license_of(str(name)))
    base = origin.get("base")
    if base and (place := str(Path(base).resolve())) not in seen:
        yield from model_parts(read_json(Path(base) / ORIGIN_FILE), seen | {place})


def public_name(name: str) -> str:
    """Return a part's name without its parent folders, which are private; hub names are unchanged."""
    is_path = Path(name).expanduser().exists() or name.startswith(("/", "~", ".")) or name.count("/") > 1
    return Path(name).name if is_path else name


def public_command(command: str) -> str:
    """Return a command with each path cut to its last part, since folders are private."""
    try:
        words = shlex.split(command)
    except ValueError:  # not written by a shell's rules
        words = command.split()
    return shlex.join(ABSOLUTE_PATH.sub(lambda found: Path(found[0]).name, word) for word in words)


def license_of(name: str) -> str:
    """Return the license stated in a folder's card header or license file, or that of a known hub name."""
    folder = Path(name)
    card = folder / CARD_FILE
    if card.is_file():
        header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        found = re.search(r"^license(?:_name)?:\s*(\S.*)$", header[1], re.MULTILINE) if header else None
        if found:
            return found[1].strip()
    for file in sorted(folder.glob("LICENSE*")) if folder.is_dir() else []:
        first = next(iter(file.read_text(encoding="utf-8", errors="replace").split("\n")), "")
        return f"{file.name} in its folder ({first.strip()})" if first.strip() else f"{file.name} in its folder"
    return KNOWN_LICENSES.get(name, NOT_STATED)


def provenance_of(folder: Path) -> dict[str, Any]:
    """Return the record of a training run, from this folder or from the run folder around a checkpoint."""
    return read_json(folder / PROVENANCE_FILE) or read_json(folder.parent / PROVENANCE_FILE)


def card_text(folder: Path, kind: str, config: Any, origin: Mapping[str, Any]) -> str:
    """Return the text of the card.

    Args:
        folder: final folder of the weights; its run's provenance is read.
        kind: `model`, `adapter` or `projector`.
        config: the model's configuration.
        origin: as in `llava_origin.json`.
    """
    found = list(dict.fromkeys(model_parts(origin)))
    run = provenance_of(folder)
    lines = ["---", "tags: [llava, medical]", "pipeline_tag: image-text-to-text"]
    lines += [f"base_model: [{', '.join(part.name for part in found if part.role != 'vision tower')}]"] if found else []
    lines += ["---", MARK, "", f"# {folder.name}", "", f"This folder holds {KIND_TITLES.get(kind, kind)}:"]
    lines += [f"{_text(config)}, {_tower(config)}, projector `{config.projector_type}`."]
    lines += [f"Template `{config.template}`, images `{config.image_aspect_ratio}`.", ""]
    lines += ["## Built on", ""]
    lines += [f"- {part.role}: `{part.name}`; license: {part.license}" for part in found] or ["- no part is recorded"]
    lines += ["", "The licenses of all parts and of the data apply to this model.", "", "## Data", ""]
    lines += list(_data(run)) or ["- no training run wrote this folder"]
    if run:
        lines += ["", "## Run", "", f"- command: `{public_command(str(run.get('command', 'not recorded')))}`"]
        lines += [f"- code: {run.get('git_commit') or 'not recorded'}, seed {run.get('seed', 'not recorded')}"]
    if config.source:
        lines += ["", f"Converted from a checkpoint of kind `{config.source.get('kind')}`."]
    lines += [
        "",
        "For research. Nothing this model writes is medical advice; check it before anyone relies on it.",
        "",
    ]
    return "\n".join(lines)


def _data(run: Mapping[str, Any]) -> Iterator[str]:
    for key, title in DATA_FACTS.items():
        if run.get(key):
            name = f" `{Path(str(run['data_path'])).name}`" if key == "data_sha256" and run.get("data_path") else ""
            yield f"- {title}{name}: sha256 `{run[key]}`"


def _text(config: Any) -> str:
    text = config.text_config
    return f"language model `{text.model_type}` of {text.num_hidden_layers} layers, width {text.hidden_size}"


def _tower(config: Any) -> str:
    vision = config.vision_config
    return f"vision tower `{vision.model_type}` for {vision.image_size} pixels"


def write_card(target: Path, folder: Path, kind: str, config: Any, origin: Mapping[str, Any]) -> None:
    """Write the card into `folder`, which is moved to `target`; a card of the user's own there is kept."""
    existing = target / CARD_FILE
    if existing.is_file() and MARK not in existing.read_text(encoding="utf-8", errors="replace"):
        return
    (folder / CARD_FILE).write_text(card_text(target, kind, config, origin), encoding="utf-8")
