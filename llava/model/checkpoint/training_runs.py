"""Record of the training runs of weights, without private paths, for exports and merges.

provenance.json of a run, training_runs.json of its base --runs_of--> runs, oldest first --> card, training_runs.json
results.json of `llava eval` on the same weights --scores_of--> scores with their protocol
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError
from llava.model.checkpoint.formats import ORIGIN_FILE, PROVENANCE_FILE, read_json
from llava.utils.provenance import weights_sha256

RUNS_FILE = "training_runs.json"
"""Runs that made the base of exported, merged or further trained weights; `provenance.json` is the folder's own."""

RESULTS = ("results.json", "*/results.json", "*/*/results.json")
"""Places of the results of `llava eval` below the folder of a run."""

MAX_RESULTS = 50
MAX_RUNS = 50
MAX_BYTES = 1 << 20
LONGEST = 2000
"""Largest file of runs in bytes, and longest text of one field."""

TEXTS = ("name", "command", "code", "seed", "objective", "trains", "precision")
SCORE_TEXTS = ("data", "sha256", "task", "metric_version", "template")
CHECKPOINT = re.compile(r"checkpoint-\d+")

ABSOLUTE_PATH = re.compile(r"(?:(?<![^\s=,:;\[({'\"])|(?<=file://))(?:~|/(?!/))[^=,;:'\"]*")
"""An absolute path in an argument of a command: alone, after `--option=`, or in a list; not a part of a URL."""

DATA_FACTS = {
    "data_sha256": "training data",
    "eval_data_sha256": "held-out data",
    "model_sha256": "weights at the start",
}

Run = dict[str, Any]


def public_command(command: str) -> str:
    """Return a command with each path cut to its last part, since folders are private."""
    try:
        words = shlex.split(command)
    except ValueError:  # not written by a shell's rules
        words = command.split()
    return shlex.join(ABSOLUTE_PATH.sub(lambda found: Path(found[0]).name, word) for word in words)


def public_run(record: Mapping[str, Any], name: str) -> Run:
    """Return the fields of a run's provenance that may be shared.

    Args:
        record: `provenance.json`.
        name: name of the run's folder.
    """
    options = record.get("options")
    objective = options.get("objective") if isinstance(options, Mapping) else None
    found: Run = {"name": name, "command": public_command(str(record.get("command", "not recorded")))}
    found |= {"code": record.get("git_commit"), "seed": record.get("seed"), "objective": objective}
    found |= {"trains": record.get("trains"), "precision": record.get("precision"), "plugins": record.get("plugins")}
    found["data"] = [
        {"role": title, "name": _data_name(record, key), "sha256": record[key]}
        for key, title in DATA_FACTS.items()
        if record.get(key)
    ]
    return {key: value for key, value in found.items() if value not in (None, {}, [])}


def _data_name(record: Mapping[str, Any], key: str) -> str:
    return Path(str(record["data_path"])).name if key == "data_sha256" and record.get("data_path") else ""


def provenance_of(folder: Path) -> dict[str, Any]:
    """Return the record of a training run, from this folder or the run folder around a `checkpoint-N`."""
    inside = CHECKPOINT.fullmatch(folder.name) is not None
    return read_json(folder / PROVENANCE_FILE) or (read_json(folder.parent / PROVENANCE_FILE) if inside else {})


def own_run(folder: Path) -> list[Run]:
    """Return the run that wrote a folder, if one did."""
    record = provenance_of(folder)
    return [public_run(record, folder.name)] if record else []


def inherited_runs(
    origin: Mapping[str, Any], seen: frozenset[str] = frozenset(), *, with_scores: bool = True
) -> list[Run]:
    """Return the runs behind the base that an origin names, oldest first.

    Args:
        origin: as in `llava_origin.json`.
        seen: folders that were visited already: they may name each other.
        with_scores: also read the scores of the base, for which its weights are hashed.
    """
    folder = Path(str(origin.get("base") or ""))
    if not origin.get("base") or not folder.is_dir() or str(folder.resolve()) in seen:
        return []
    try:
        earlier = _stored(folder) or inherited_runs(read_json(folder / ORIGIN_FILE), seen | {str(folder.resolve())})
        scores = _scored(folder) if with_scores and not seen else {}
        runs = [clean_run({**run, **scores}) for run in own_run(folder)]
    except CheckpointError:  # only the record of the base is damaged, not its weights
        return []
    return [*earlier, *(run for run in runs if run not in earlier)]


def _stored(folder: Path) -> list[Run]:
    """Return the runs that an exported folder lists; entries of another form are left out."""
    file = folder / RUNS_FILE
    runs = read_json(file).get("runs") if file.is_file() and file.stat().st_size < MAX_BYTES else None
    return [clean_run(run) for run in runs if isinstance(run, dict)][:MAX_RUNS] if isinstance(runs, list) else []


def plain(value: Any) -> str:
    """Return a value as one line that can stand between code marks."""
    return " ".join(str(value).split()).replace("`", "'")[:LONGEST]


def shown(text: Any) -> str:
    """Return a text for Markdown outside of code marks: no tags, links or borders of tables."""
    return str(text).replace("<", "&lt;").replace("|", "&#124;").replace("[", "&#91;")


def clean_run(run: Mapping[str, Any]) -> Run:
    """Return the known fields of a run that may come from a stranger, with text that is safe in a card."""
    found: Run = {key: plain(run[key]) for key in TEXTS if run.get(key) is not None}
    data = run.get("data")
    found["data"] = [
        {key: plain(item.get(key, "")) for key in ("role", "name", "sha256")}
        for item in (data if isinstance(data, list) else [])
        if isinstance(item, dict)
    ]
    if isinstance(plugins := run.get("plugins"), dict):
        found["plugins"] = {plain(name): plain(version) for name, version in plugins.items()}
    scores = run.get("scores")
    cleaned = [clean_score(score) for score in (scores if isinstance(scores, list) else []) if isinstance(score, dict)]
    return found | ({"scores": [score for score in cleaned if score["rows"]]} if cleaned else {})


def clean_score(score: Mapping[str, Any]) -> dict[str, Any]:
    """Return the known fields of the scores of an evaluation; rows are a name and numbers."""
    found: dict[str, Any] = {key: plain(score[key]) for key in SCORE_TEXTS if score.get(key) is not None}
    for key, names in (("sampling", ("temperature", "max_new_tokens")), ("intervals", ("clusters",))):
        inner = score.get(key)
        found[key] = {name: plain(inner[name]) for name in names if name in inner} if isinstance(inner, dict) else {}
    if isinstance(limit := score.get("limit"), int):
        found["limit"] = limit
    rows = score.get("rows")
    found["rows"] = [
        [plain(row[0]), *(value if isinstance(value, int | float) else None for value in row[1:6])]
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, list) and len(row) == 6
    ]
    return found


def _scored(folder: Path) -> Run:
    scores = list(scores_of(folder))
    return {"scores": scores} if scores else {}


def scores_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the scores of `llava eval` in a run's folder that belong to its weights as they are now."""
    files = [file for pattern in RESULTS for file in sorted(folder.glob(pattern))][:MAX_RESULTS]
    current = weights_sha256(folder) if files else None
    for file in files:
        try:
            report = read_json(file)
            facts = report.get("provenance")
            if isinstance(facts, dict) and current is not None and facts.get("weights") == current:
                yield from _scores(report, facts)
        except (CheckpointError, AttributeError, TypeError, ValueError):  # not a file of `llava eval`
            continue


def _scores(report: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    questions = (facts.get("data") or {}).get("questions") or {}
    strict = (report.get("scores") or {}).get("strict") or {}
    rows = []
    for name, row in strict.items():
        answered, blank = row.get("answered") or {}, row.get("blank") or {}
        if answered.get("num_items"):
            rows.append(
                [name, *(answered.get(key) for key in ("num_items", "value", "low", "high")), blank.get("value")]
            )
    if rows:
        yield {
            "data": questions.get("file"),
            "sha256": questions.get("sha256"),
            "task": report.get("task"),
            "metric_version": report.get("metric_version"),
            "template": facts.get("template"),
            "sampling": facts.get("sampling"),
            "limit": facts.get("limit"),
            "intervals": report.get("intervals"),
            "plugins": facts.get("plugins"),
            "rows": rows,
        }


def runs_text(runs: list[Run]) -> str:
    """Return the content of `RUNS_FILE`."""
    return json.dumps({"runs": runs}, indent=2, ensure_ascii=False) + "\n"
