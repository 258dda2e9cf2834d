"""F1-RadGraph: rewards of report graphs, from given graphs or from a RadGraph model.

    graph of the prediction, graph of the reference --entities and relations as sets--> F1 at three levels

simple: (words, label). partial: (words, label) and whether the entity has relations; this is the published figure.
complete: one element per relation with its type and the words it points to. A report is 0 where either graph or text is
empty. Words are compared in lower case; `legacy` lower-cases only what the radgraph package up to 0.1.18 does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava.errors import DataError
from llava.eval.reports.figures import ReportFigure, mean_figure

LEVELS = ("simple", "partial", "complete")

NAMES = {"partial": "F1-RadGraph", "simple": "F1-RadGraph-simple", "complete": "F1-RadGraph-complete"}
"""Names of the figures; the published one is partial."""

CASES = ("new", "legacy")

Entities = Mapping[str, Mapping[str, Any]]


def entities_of(graph: Any, where: str) -> Entities:
    """Return the entities of a graph by id; a missing graph has none.

    Args:
        graph: `{"entities": {id: {"tokens", "label", "relations": [[type, id], ...]}}}`, the entities alone, or the
            output of radgraph for one report, with the key `0`.
        where: file, row and side, for messages.

    Raises:
        DataError: it is none of these.
    """
    if graph is None:
        return {}
    if (
        isinstance(graph, Mapping)
        and set(graph) == {"0"}
        and isinstance(graph["0"], Mapping)
        and "entities" in graph["0"]
    ):
        graph = graph["0"]
    entities = graph.get("entities", graph) if isinstance(graph, Mapping) else None
    if (
        isinstance(graph, Mapping)
        and "entities" not in graph
        and graph
        and not all(_is_entity(e) for e in graph.values())
    ):
        entities = None
    if not isinstance(entities, Mapping):
        raise DataError(f"{where}: expected a graph with 'entities', got {type(graph).__name__}")
    for name, entity in entities.items():
        if not _is_entity(entity):
            raise DataError(f"{where}: entity {str(name)[:20]!r} needs the texts 'tokens' and 'label'")
        for relation in entity.get("relations") or []:
            if not isinstance(relation, list | tuple) or len(relation) != 2 or str(relation[1]) not in entities:
                raise DataError(f"{where}: a relation of entity {str(name)[:20]!r} is not [type, id of an entity]")
    return entities


def _is_entity(entity: Any) -> bool:
    return isinstance(entity, Mapping) and all(isinstance(entity.get(key), str) for key in ("tokens", "label"))


def model_of(graphs: Sequence[Entities]) -> str:
    """Return which RadGraph the labels of graphs belong to: `v1`, `XL` (as the modern ones), or `unknown`."""
    labels = {str(entity["label"]) for graph in graphs for entity in graph.values()}
    if not labels:
        return "unknown"
    if all("::" in label for label in labels):
        return "XL"
    return "v1" if labels <= {"ANAT-DP", "OBS-DP", "OBS-U", "OBS-DA"} else "unknown"


def elements(entities: Entities, level: str, *, case: str = "new") -> set[tuple[Any, ...]]:
    """Return the set of a graph that a level compares."""
    found: set[tuple[Any, ...]] = set()
    for entity in entities.values():
        relations = entity.get("relations") or []
        lower = case == "new" or (level == "complete" and bool(relations))
        words = str(entity["tokens"]).lower() if lower else str(entity["tokens"])
        label = str(entity["label"])
        if level == "simple" or not relations:
            found.add((words, label))
        elif level == "partial":
            found.add((words, label, True))
        else:
            for kind, target in relations:
                aim = str(entities[str(target)]["tokens"])
                found.add((words, label, str(kind), aim.lower() if lower else aim))
    return found


def reward(prediction: Entities, reference: Entities, level: str, *, case: str = "new") -> float:
    """Return the F1 of two graphs at one level, from 0 to 1; 0 if either has no entities."""
    one, other = elements(prediction, level, case=case), elements(reference, level, case=case)
    shared = len(one & other)
    return 2.0 * shared / (len(one) + len(other)) if shared else 0.0


def radgraph_figures(
    graphs: Sequence[tuple[Entities, Entities]],
    texts: Sequence[tuple[str, str]],
    *,
    source: str,
    case: str = "new",
) -> list[ReportFigure]:
    """Return the three figures, partial first.

    Args:
        graphs: graphs of prediction and reference of each report.
        texts: prediction and reference of each report; an empty one gives 0.
        source: where the graphs came from.
        case: `new` or `legacy`.
    """
    figures = []
    for level in ("partial", "simple", "complete"):
        values = [
            reward(one, other, level, case=case) if prediction.strip() and reference.strip() else 0.0
            for (one, other), (prediction, reference) in zip(graphs, texts, strict=True)
        ]
        figures.append(mean_figure(NAMES[level], values, source=source))
    return figures
