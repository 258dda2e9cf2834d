"""Additional tables of an evaluation: controls other than the gray image, and scores by row field.

items, items with other images --control_tables--> {control: {score: answered, control, difference}}
items, values of a field ------field_table-------> [{value, score, n, %, interval}]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llava.errors import ConfigError
from llava.eval.intervals import Draws, interval_text, percent_text
from llava.eval.medvqa.controls import by_type, check_same_questions
from llava.eval.medvqa.items import ScoredItem
from llava.eval.medvqa.metrics import strict_scores
from llava.samples import Sample
from llava.utils.reporting import Cell, text_table

NO_VALUE = "(none)"
MAX_VALUES = 200
"""Largest number of values of a field; more would be a table of single rows."""

Rows = list[list[Cell]]


def control_tables(
    items: Sequence[ScoredItem],
    controls: Mapping[str, Sequence[ScoredItem]],
    *,
    metrics: Sequence[str] = (),
    num_resamples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Return, for each control and strict score, the figure, that of the control, and their difference.

    Raises:
        DataError: a control has other questions.
    """
    draws = Draws([item.cluster for item in items], num_resamples=num_resamples, seed=seed)
    scores, tables = strict_scores(items, metrics), {}
    for name, other in controls.items():
        check_same_questions(items, other, what=f"the control {name}")
        theirs = strict_scores(other, metrics)
        tables[name] = {
            title: {
                "answered": draws.estimate(score).to_json(),
                "control": draws.estimate(theirs[title]).to_json(),
                "difference": draws.difference(score, theirs[title]).to_json(),
            }
            for title, score in scores.items()
            if score.num_items
        }
    return tables


def field_values(samples: Sequence[Sample], field: str | None) -> list[tuple[str, ...]]:
    """Return the values of a field of each row, empty without a field.

    Raises:
        ConfigError: no row has the field, or it has more than `MAX_VALUES` values.
    """
    if field is None:
        return []
    values = [_values(sample, field) for sample in samples]
    found = {value for row in values for value in row}
    if found == {NO_VALUE}:
        known = sorted({name for sample in samples for name in sample.meta})
        raise ConfigError(f"--by {field}: no row has this field; the rows have {', '.join(known) or 'no fields'}")
    if len(found) > MAX_VALUES:
        raise ConfigError(f"--by {field}: {len(found)} values, more than {MAX_VALUES}; expected a field of groups")
    return values


def field_table(
    samples: Sequence[Sample], items: Sequence[ScoredItem], field: str, *, num_resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Return the strict scores of the rows with each value of a field, with intervals clustered by image.

    A row whose field is a list counts for each of its values, a row without the field for `(none)`.

    Raises:
        ConfigError: as `field_values`.
    """
    typed = [replace(item, types=row) for item, row in zip(items, field_values(samples, field), strict=True)]
    rows = by_type(typed, None, num_resamples=num_resamples, seed=seed)
    return [{"value": row["type"], "score": row["score"], "answered": row["answered"]} for row in rows]


def _values(sample: Sample, field: str) -> tuple[str, ...]:
    value = sample.meta.get(field)
    several = value if isinstance(value, list | tuple) else [value]
    return tuple(dict.fromkeys(NO_VALUE if one in (None, "") else str(one) for one in several)) or (NO_VALUE,)


def control_rows(table: Mapping[str, Any]) -> Rows:
    """Return the cells of one control: score, n, figure, control, difference with its interval."""
    return [
        [
            name,
            row["answered"]["num_items"],
            percent_text(row["answered"]["value"]),
            percent_text(row["control"]["value"]),
            f"{percent_text(row['difference']['value'], signed=True)} {interval_text(row['difference'])}",
        ]
        for name, row in table.items()
    ]


def field_rows(table: Sequence[Mapping[str, Any]]) -> Rows:
    """Return the cells of a table by a field: value, score, n, figure, interval."""
    return [
        [
            row["value"],
            row["score"],
            row["answered"]["num_items"],
            percent_text(row["answered"]["value"]),
            interval_text(row["answered"]),
        ]
        for row in table
    ]


CONTROL_HEADERS = ("score", "n", "%", "control", "minus control")
FIELD_HEADERS = ("value", "score", "n", "%", "95 % interval")


def tables_text(report: Mapping[str, Any]) -> str:
    """Return the additional tables of a report as text; empty without any."""
    parts = [
        f"control {name}\n{text_table(CONTROL_HEADERS, control_rows(table))}"
        for name, table in report["controls"].items()
    ]
    if report["by"] is not None:
        parts.append(f"by {report['by']['field']}\n{text_table(FIELD_HEADERS, field_rows(report['by']['rows']))}")
    return "".join(f"\n{part}\n" for part in parts)
