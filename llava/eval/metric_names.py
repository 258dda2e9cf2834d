"""Table of the metrics of `llava eval --metrics`: for answers, for reports, and from plug-ins."""

from __future__ import annotations

# Imported because it adds its metrics to the table.
import llava.eval.reports.scorers  # noqa: F401
from llava.errors import ConfigError
from llava.scoring.metrics import METRICS, SCALES, metrics_named
from llava.utils.reporting import text_table


def chosen_metrics(text: str | None) -> tuple[str, ...]:
    """Return the metrics of a list such as `open f1,ROUGE-L`; none for None.

    Raises:
        ConfigError: a name is unknown, its metric cannot be shown in a table of percentages, or none is given.
    """
    if text is None:
        return ()
    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not names:
        raise ConfigError(f"--metrics: no metric given; known: {', '.join(METRICS)}")
    return tuple(metric.name for metric in metrics_named(names, place="--metrics"))


def metrics_text() -> str:
    """Return the table of `--metrics list`."""
    rows = []
    for name, metric in METRICS.items():
        facts = metric.facts
        usable = facts.needs == "nothing" and facts.scale in SCALES
        rows.append(
            [name, facts.version, facts.needs, facts.scale, facts.direction, "yes" if usable else "reports only"]
        )
    return text_table(["metric", "version", "needs", "scale", "better", "in llava eval"], rows) + "\n"
