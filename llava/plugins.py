"""Registration functions of plug-ins: `--plugin my.py`, or an entry point in `llava.plugins`.

    from llava.plugins import Metric, MetricFacts, add_metric
    add_metric(Metric("short answers", values, MetricFacts(version="1")))

Each function refuses a name that exists. A plug-in runs when a command names it; from Python, `load_plugins(["my.py"])`
does the same. Checkpoints and configuration files record the names of plug-ins and never load them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Imported because the names of report scorers are reserved.
import llava.eval.reports.scorers  # noqa: F401
from llava.chat_families import FAMILIES
from llava.cli import COMMANDS, Command
from llava.conversation import TEMPLATES, ConversationTemplate
from llava.data.converters.plugged import CONVERTERS
from llava.errors import ConfigError
from llava.eval.task_files import EvaluationTask, add_task
from llava.jinja_template import ASKING, AUTO
from llava.model.projector_types import (
    PROJECTOR_TYPES,
    ProjectorType,
    Shape,
    TransformersForm,
    check_type,
    find_type,
)
from llava.scoring.metrics import Metric, MetricFacts, ScoredAnswer, add_metric
from llava.template_forms import SLOT, Form
from llava.utils.plugins import add_named, load_plugins, loaded_plugins, unload_plugins

if TYPE_CHECKING:
    from torch import nn

    from llava.train.objectives.base import Objective

__all__ = [
    "SLOT",
    "ConversationTemplate",
    "EvaluationTask",
    "Form",
    "Metric",
    "MetricFacts",
    "ScoredAnswer",
    "TransformersForm",
    "add_converter",
    "add_metric",
    "add_objective",
    "add_projector",
    "add_task",
    "add_template",
    "load_plugins",
    "loaded_plugins",
    "unload_plugins",
]


def add_template(template: ConversationTemplate) -> None:
    """Add a conversation template for `--version` and `--conv-mode`.

    Raises:
        ConfigError: its name exists already, or its form has no place for the text of a turn.
    """
    if template.name.removesuffix(ASKING) in (AUTO, *FAMILIES) or template.name.endswith(".jinja"):
        raise ConfigError(f"template {template.name!r}: the name stands for a chat template; choose another one")
    frames = (template.form.human, template.form.gpt)
    if any(sum(SLOT in text for text, _ in frame) != 1 for frame in frames):
        raise ConfigError(f"template {template.name!r}: expected one {SLOT} in the frame of questions and of answers")
    add_named(TEMPLATES, template.name, template, "template")


def add_projector(
    name: str,
    build: Callable[[int, int], nn.Module],
    shapes: Callable[[int, int], Mapping[str, Shape]],
    *,
    transformers: TransformersForm | None = None,
) -> None:
    """Add a projector type for `--mm-projector-type`; checkpoint commands read its declaration.

    Args:
        name: name of the type.
        build: returns the module for the widths of a tower feature and of a language-model input; the module maps
            features [N, P, Dv] to [N, P, D].
        shapes: returns name and shape of every weight for these widths. It is called with other numbers too, so it must
            only compute.
        transformers: how `llava checkpoint export --to hf` writes it; None if transformers' Llava cannot hold it.

    Raises:
        ConfigError: the name exists already, or the declaration contradicts itself.
    """
    kind = ProjectorType(name, shapes, build, transformers)
    if find_type(name) is not None:
        raise ConfigError(f"a projector {name!r} already exists; choose another name")
    check_type(kind)
    add_named(PROJECTOR_TYPES, name, kind, "projector")


def add_objective(name: str, make: Callable[..., Objective]) -> None:
    """Add an objective for `--objective`, trained on the rows of fine-tuning.

    Args:
        name: name of the objective.
        make: called with the keywords of `llava.train.objectives.sft.SFT`, which a subclass has: `without`,
            `source_names`, `asks`.

    Raises:
        ConfigError: the name exists already, or `make` does not take these keywords.
    """
    from llava.train.objectives.sft import OBJECTIVES
    from llava.train.preference_args import OTHER_OBJECTIVES

    if name in OTHER_OBJECTIVES:
        raise ConfigError(f"an objective {name!r} already exists; choose another name")
    try:
        inspect.signature(make).bind(without=None, source_names=(), asks=False)
    except TypeError as error:
        raise ConfigError(
            f"objective {name!r}: {error}; expected a function of the keywords without, source_names and asks"
        ) from None
    add_named(OBJECTIVES, name, make, "objective")


def add_converter(name: str, rows: Callable[[Path], Iterable[Mapping[str, Any]]], *, summary: str = "") -> None:
    """Add a converter, the command `llava data NAME SOURCE --out ROWS.json`.

    Args:
        name: last word of the command.
        rows: yields rows in LLaVA format for the source, a file or a folder.
        summary: a line for the help.

    Raises:
        ConfigError: the name exists already, or is more than one word.
    """
    if not name or name.split() != [name] or name.startswith("-"):
        raise ConfigError(f"converter {name!r}: expected one word")
    command = Command(
        "llava.data.converters.plugged:main",
        summary or f"convert {name} to rows (a plug-in)",
        f"llava data {name} SOURCE --out {name}.json --plugin FILE",
        passes_name=True,
    )
    add_named(COMMANDS, f"data {name}", command, "command")
    add_named(CONVERTERS, name, rows, "converter")
