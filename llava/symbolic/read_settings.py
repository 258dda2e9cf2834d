"""Sections `dialogue`, `reward` and `eval` of a rule file, and the phrase file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from llava.symbolic.document import Item
from llava.symbolic.problems import Problems
from llava.symbolic.read_nodes import Values
from llava.symbolic.settings import PRESETS, Consistency, FormatPenalty, LengthPenalty, RewardSettings
from llava.symbolic.structure import SPLITS, DialogueSettings, Phrases

STYLES = ("standard", "diagnosis_first", "shuffled", "improvised", "single")
"""Orders of questions; `single` is one question."""

CONTEXTS = ("none", "agree", "disagree", "hint_ok", "hint_wrong")
"""Statements before a question: none, a right or wrong one about its node, or about the node before it."""

PROVENANCE = ("model", "prompt_sha256", "date")

Wordings = dict[str, tuple[str, ...]]


def read_dialogue(item: Item, problems: Problems, folder: Path) -> DialogueSettings:
    """Return the settings of the dialogues."""
    known = ("phrases", "styles", "improvised_turns", "context", "image_position", "turns_per_image")
    keys = problems.map(item, "dialogue", known)
    settings = DialogueSettings()
    if "phrases" in keys:
        settings = replace(settings, phrases_file=_inside(keys["phrases"], problems, folder))
    if "styles" in keys:
        settings = replace(settings, styles=_weights(keys["styles"], problems, "dialogue, styles", STYLES))
    if "context" in keys:
        settings = replace(settings, context=_weights(keys["context"], problems, "dialogue, context", CONTEXTS))
    if "improvised_turns" in keys:
        where = "dialogue, improvised_turns"
        turns = [problems.whole(part, where, 1, 64) for part in problems.list(keys["improvised_turns"], where)]
        if len(turns) != 2 or turns[0] > turns[1]:
            problems.add(keys["improvised_turns"], f"{where}: expected [fewest, most]")
        else:
            settings = replace(settings, improvised_turns=(turns[0], turns[1]))
    if "image_position" in keys:
        position = problems.choice(keys["image_position"], "dialogue, image_position", ("before", "after", "random"))
        settings = replace(settings, image_position=position)
    if "turns_per_image" in keys:
        turns_per_image = problems.whole(keys["turns_per_image"], "dialogue, turns_per_image", 1, 64)
        settings = replace(settings, turns_per_image=turns_per_image)
    return settings


def _inside(item: Item, problems: Problems, folder: Path) -> Path | None:
    """Return the path of the phrase file, which must be inside the folder of the rule file."""
    name = problems.text(item, "dialogue, phrases")
    if not name or "\0" in name:
        return None
    root = folder.resolve()
    path = (root / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(root):
        problems.add(item, f"dialogue, phrases: {name!r} is outside of the folder of the rule file")
        return None
    return path


def _weights(item: Item, problems: Problems, what: str, known: tuple[str, ...]) -> dict[str, float]:
    weights = {key: problems.number(part, f"{what}, {key}", 0) for key, part in problems.map(item, what, known).items()}
    if not sum(weights.values()) > 0:
        problems.add(item, f"{what}: expected at least one weight above 0")
    return {key: weight for key, weight in weights.items() if key in known}


def read_reward(item: Item, problems: Problems) -> RewardSettings:
    """Return the reward settings: those of the `preset` (by default `default`) with the file's changes."""
    num_problems = len(problems.found)
    numbers = {"correct": 0.0, "wrong": -1e3, "no_match": -1e3, "abstain_wrong": -1e3}
    known = ("preset", *numbers, "partial", "consistency", "length", "format", "void", "balance", "normalize")
    keys = problems.map(item, "reward", known)
    name = problems.choice(keys["preset"], "reward, preset", PRESETS) if "preset" in keys else "default"
    base = PRESETS.get(name, PRESETS["default"])
    changes: dict[str, Any] = {
        key: problems.number(keys[key], f"reward, {key}", low, 1e3) for key, low in numbers.items() if key in keys
    }
    if "partial" in keys:
        changes["partial"] = problems.choice(keys["partial"], "reward, partial", ("confusable", "none")) == "confusable"
    if "balance" in keys:
        balance = problems.choice(keys["balance"], "reward, balance", ("inverse_prior", "none"))
        changes["balance"] = balance == "inverse_prior"
    if "normalize" in keys:
        problems.choice(keys["normalize"], "reward, normalize", ("minmax",))
    if "void" in keys:
        changes["void"] = problems.truth(keys["void"], "reward, void")
    if "consistency" in keys:
        changes["consistency"] = _consistency(keys["consistency"], problems, base.consistency)
    if "length" in keys:
        changes["length"] = _length(keys["length"], problems, base.length)
    if "format" in keys:
        changes["format"] = _format(keys["format"], problems, base.format)
    settings = replace(base, **changes)
    if len(problems.found) == num_problems:
        _check_order(settings, keys, item, problems)
    return settings


def _check_order(settings: RewardSettings, keys: dict[str, Item], item: Item, problems: Problems) -> None:
    """Check that a right answer earns most; then the highest reward is above the lowest, too."""
    for key in ("wrong", "no_match", "abstain_wrong"):
        credit = getattr(settings, key)
        if credit >= settings.correct:
            line = keys.get(key) or keys.get("correct") or item
            problems.add(line, f"reward, {key}: expected less than correct, {settings.correct:g}, got {credit:g}")


def _consistency(item: Item, problems: Problems, base: Consistency) -> Consistency:
    keys = problems.map(item, "reward, consistency", ("mode", "weight", "gate"))
    changes: dict[str, Any] = {}
    for key, known in {"mode": ("adjacent", "pairwise", "global"), "gate": ("none", "multiply", "primary")}.items():
        if key in keys:
            changes[key] = problems.choice(keys[key], f"reward, consistency, {key}", known)
    if "weight" in keys:
        changes["weight"] = problems.number(keys["weight"], "reward, consistency, weight", 0, 1e3)
    return replace(base, **changes)


def _length(item: Item, problems: Problems, base: LengthPenalty) -> LengthPenalty:
    keys = problems.map(item, "reward, length", ("unit", "tolerance", "scale", "cap", "weight"))
    if "unit" in keys:
        problems.choice(keys["unit"], "reward, length, unit", ("chars",))
    names = [key for key in ("tolerance", "scale", "cap", "weight") if key in keys]
    lows = {"scale": 1e-3}
    return replace(
        base, **{key: problems.number(keys[key], f"reward, length, {key}", lows.get(key, 0)) for key in names}
    )


def _format(item: Item, problems: Problems, base: FormatPenalty) -> FormatPenalty:
    keys = problems.map(item, "reward, format", ("missing_eos", "empty", "repeat_ngram"))
    changes: dict[str, Any] = {
        key: problems.number(keys[key], f"reward, format, {key}", -1e3, 0)
        for key in ("missing_eos", "empty")
        if key in keys
    }
    if "repeat_ngram" in keys:
        where = "reward, format, repeat_ngram"
        inner = problems.map(keys["repeat_ngram"], where, ("n", "max", "penalty"))
        if "n" in inner:
            changes["repeat_n"] = problems.whole(inner["n"], where, 1, 100)
        if "max" in inner:
            changes["repeat_max"] = problems.whole(inner["max"], where, 1, 1000)
        if "penalty" in inner:
            changes["repeat"] = problems.number(inner["penalty"], where, -1e3, 0)
    return replace(base, **changes)


def read_evaluation(item: Item, problems: Problems, values: Values) -> dict[str, Any]:
    """Return the settings of the evaluation."""
    keys = problems.map(item, "eval", ("primary", "groups", "bootstrap", "styles"))
    found: dict[str, Any] = {}
    if "primary" in keys and (primary := problems.choice(keys["primary"], "eval, primary", values)):
        found["primary"] = primary
    if "groups" in keys:
        found["groups"] = problems.text(keys["groups"], "eval, groups")
    if "bootstrap" in keys:
        found["bootstrap"] = problems.whole(keys["bootstrap"], "eval, bootstrap", 0, 100_000)
    if "styles" in keys:
        found["styles"] = problems.choices(keys["styles"], "eval, styles", STYLES)
    return found


def read_phrases(item: Item, problems: Problems, values: Values) -> Phrases:
    """Return the phrases of a phrase file."""
    keys = problems.map(item, "phrases", ("provenance", "questions", "answers", "claims"))
    empty = Item({}, item.line)
    source = problems.map(keys.get("provenance", empty), "provenance", PROVENANCE)
    for key in PROVENANCE:
        if key not in source:
            problems.add(keys.get("provenance", item), f"provenance: key {key!r} is missing")
    questions = {
        node: _splits(part, problems, f"questions, {node}")
        for node, part in _known(keys.get("questions", empty), problems, "questions", values)
    }
    answers = _answers(keys.get("answers", empty), problems, "answers", values)
    claims = _answers(keys.get("claims", empty), problems, "claims", values)
    return Phrases(questions, answers, claims)


def _answers(item: Item, problems: Problems, what: str, values: Values) -> dict[str, dict[str, Wordings]]:
    found: dict[str, dict[str, Wordings]] = {}
    for node, part in _known(item, problems, what, values):
        known = dict.fromkeys(values[node], ())
        found[node] = {
            value: _splits(texts, problems, f"{what}, {node}, {value}")
            for value, texts in _known(part, problems, f"{what}, {node}", cast(Values, known))
        }
    return found


def _known(item: Item, problems: Problems, what: str, names: Values) -> list[tuple[str, Item]]:
    """Return the pairs of a map whose keys are known."""
    keys = problems.map(item, what, tuple(names))
    return [(key, part) for key, part in keys.items() if key in names]


def _splits(item: Item, problems: Problems, what: str) -> Wordings:
    keys = problems.map(item, what, SPLITS)
    found = {split: problems.texts(keys[split], f"{what}, {split}") for split in SPLITS if split in keys}
    for split, texts in found.items():
        repeated = [text for text in texts if texts.count(text) > 1]
        if repeated:
            problems.add(keys[split], f"{what}, {split}: {repeated[0][:80]!r} is repeated")
    return found
