"""Write the model card (README.md) of saved weights: use, licenses, training, scores, citation.

    llava_origin.json of the parts, provenance.json of the run, records of earlier runs --card_text--> README.md

Everything is read from files. An export and a merge have no run of their own: their card shows those of their base,
which `training_runs.json` keeps beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.model.checkpoint.formats import ORIGIN_FILE, read_json
from llava.model.checkpoint.model_cells import CITATION, code_cell
from llava.model.checkpoint.training_runs import RUNS_FILE, Run, clean_run, inherited_runs, own_run, runs_text, shown
from llava.utils.bootstrap import LEVEL

CARD_FILE = "README.md"
MARK = "<!-- written at each save by llava; delete this line to keep your own text -->"
KIND_TITLES = {
    "model": "a whole model",
    "adapter": "a LoRA adapter",
    "projector": "a projector",
    "hf": "a whole model for transformers and vLLM",
    "legacy": "a whole model in the format of LLaVA",
}

NOT_STATED = "not stated in its folder: ask its publisher before passing anything on"

KNOWN_LICENSES = {
    "lmsys/vicuna-7b-v1.5": "Llama 2 Community License",
    "lmsys/vicuna-13b-v1.5": "Llama 2 Community License",
    "mistralai/Mistral-7B-Instruct-v0.2": "Apache-2.0",
    "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224": "MIT",
    "microsoft/llava-rad": "Microsoft Research license, research use only",
}
"""Licenses of parts that are given by hub name, as their publishers state them."""

HUB_CACHE = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


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
    """Return a part's name without its parent folders, which are private; hub names are unchanged.

    A folder of the hub client's cache has its hub name.
    """
    if found := HUB_CACHE.search(f"{name}/"):
        return f"{found['owner']}/{found['name']}"
    is_path = Path(name).expanduser().exists() or name.startswith(("/", "~", ".")) or name.count("/") > 1
    return Path(name).name if is_path else name


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
    return KNOWN_LICENSES.get(public_name(name), NOT_STATED)


def card_text(folder: Path, kind: str, config: Any, origin: Mapping[str, Any], earlier: Sequence[Run] = ()) -> str:
    """Return the text of the card.

    Args:
        folder: final folder of the weights; its run's provenance is read.
        kind: key of `KIND_TITLES`.
        config: the model's configuration.
        origin: as in `llava_origin.json`.
        earlier: runs behind the base.
    """
    found = list(dict.fromkeys(model_parts(origin)))
    runs = [*earlier, *map(clean_run, own_run(folder))]
    lines = ["---", "tags: [llava, medical]", "pipeline_tag: image-text-to-text"]
    hub = [part.name for part in found if part.role != "vision tower" and HUB_NAME.fullmatch(part.name)]
    lines += [f"base_model: [{', '.join(hub)}]"] if hub else []
    lines += ["---", MARK, "", f"# {folder.name}", "", f"This folder holds {KIND_TITLES.get(kind, kind)}:"]
    lines += [f"{_text(config)}, {_tower(config)}, projector `{config.projector_type}`."]
    lines += [f"Template `{config.template}`, images `{config.image_aspect_ratio}`.", ""]
    lines += ["## Use", "", *code_cell(folder.name, kind, config), ""]
    lines += ["## Built on", ""]
    lines += [f"- {part.role}: `{part.name}`; license: {part.license}" for part in found] or ["- no part is recorded"]
    lines += ["", "The licenses of all parts and of the data apply to this model.", ""]
    lines += [*_training(runs), *_scores(runs)]
    if config.source:
        lines += [f"Converted from a checkpoint of kind `{config.source.get('kind')}`.", ""]
    lines += ["## Citation", "", *CITATION, ""]
    lines += ["For research. Nothing this model writes is medical advice; check it before anyone relies on it.", ""]
    return "\n".join(lines)


def _training(runs: Sequence[Run]) -> Iterator[str]:
    """Yield the lines about the training runs, oldest first."""
    yield from ("## Training", "")
    for run in runs:
        if len(runs) > 1:
            yield from (f"### {shown(run.get('name', 'a run'))}", "")
        for data in run.get("data", ()):
            name = f" `{data['name']}`" if data.get("name") else ""
            yield f"- {shown(data.get('role'))}{name}: sha256 `{data.get('sha256')}`"
        facts = {"objective": "objective", "trains": "trained", "precision": "precision", "seed": "seed"}
        said = [f"{title} {run[key]}" for key, title in facts.items() if run.get(key) is not None]
        yield shown(f"- {', '.join(said) or 'settings not recorded'}; code: {run.get('code') or 'not recorded'}")
        for name, version in (run.get("plugins") or {}).items():
            yield f"- plug-in `{name}`: `{version}`"
        yield f"- command: `{run.get('command', 'not recorded')}`"
        yield ""
    if not runs:
        yield from ("No training run wrote this folder.", "")


def _scores(runs: Sequence[Run]) -> Iterator[str]:
    """Yield tables of the scores of `llava eval`, each with its protocol."""
    scores = [score for run in runs[-1:] for score in run.get("scores", ())]
    if scores:
        yield from ("## Scores", "", "Of these weights before they were converted, by `llava eval`.", "")
    for score in scores:
        yield from (f"{_protocol(score)}:", "")
        yield f"| metric | n | % | {LEVEL * 100:g} % interval | on gray images |"
        yield "| --- | --- | --- | --- | --- |"
        for name, number, value, low, high, blank in score.get("rows", ()):
            interval = f"{_figure(low)} to {_figure(high)}"
            yield f"| {shown(name)} | {number} | {_figure(value)} | {interval} | {_figure(blank)} |"
        yield ""


def _protocol(score: Mapping[str, Any]) -> str:
    """Return how the figures of a table were counted."""
    sampling, intervals = score.get("sampling") or {}, score.get("intervals") or {}
    temperature = sampling.get("temperature")
    how = "greedy" if temperature in (None, "0", "0.0") else f"temperature {temperature}"
    parts = [f"`{score.get('data')}` (sha256 `{score.get('sha256')}`)"]
    parts += [f"task {score['task']}"] if score.get("task") else []
    parts += [f"first {score['limit']} rows"] if score.get("limit") else []
    parts += [f"template {score.get('template')}", how, f"at most {sampling.get('max_new_tokens')} tokens"]
    parts += [f"metrics {score.get('metric_version')}", f"intervals over {intervals.get('clusters', 'item')}s"]
    return f"{parts[0]}, {shown(', '.join(parts[1:]))}"


def _figure(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "-"


def _text(config: Any) -> str:
    text = config.text_config
    return f"language model `{text.model_type}` of {text.num_hidden_layers} layers, width {text.hidden_size}"


def _tower(config: Any) -> str:
    vision = config.vision_config
    return f"vision tower `{vision.model_type}` for {vision.image_size} pixels"


def write_card(target: Path, folder: Path, kind: str, config: Any, origin: Mapping[str, Any]) -> None:
    """Write card and earlier runs into `folder`, which is moved to `target`; a user's own card is kept."""
    earlier = inherited_runs(origin, with_scores=not own_run(target))
    if earlier:
        (folder / RUNS_FILE).write_text(runs_text(earlier), encoding="utf-8")
    existing = target / CARD_FILE
    if existing.is_file() and MARK not in existing.read_text(encoding="utf-8", errors="replace"):
        return
    (folder / CARD_FILE).write_text(card_text(target, kind, config, origin, earlier), encoding="utf-8")
