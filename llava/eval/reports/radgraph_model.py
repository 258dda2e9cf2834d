"""Graphs of reports from a RadGraph model, by the copy of its code in the package radeval.

    FOLDER: config.json, vocabulary/, weights.th (an unpacked radgraph.tar.gz, radgraph-xl.tar.gz or modern-radgraph-xl)

The package radgraph itself does not run with transformers 5; radeval carries a repaired copy. Importing this module
does not load torch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from llava.errors import CheckpointError, MissingDependency
from llava.eval.reports.radgraph import Entities, entities_of
from llava.utils.provenance import file_sha256

WEIGHTS, CONFIG, VOCABULARY = "weights.th", "config.json", "vocabulary"

MODELS = {"radgraph": "v1", "radgraph-xl": "XL", "modern-radgraph-xl": "modern XL"}
"""Names of the models by their dataset, which is part of the names of their vocabulary files."""

_SUFFIX = "__ner_labels.txt"


def annotate(folder: str | Path, texts: Sequence[tuple[str, str]]) -> tuple[list[tuple[Entities, Entities]], str]:
    """Return the graphs of predictions and references, and the model's name with its weight hash.

    Args:
        folder: unpacked RadGraph model.
        texts: prediction and reference of each report; equal texts are annotated once, empty ones have no entities.

    Raises:
        CheckpointError: the folder is not such a model, or its encoder is not on this machine.
        MissingDependency: radeval is not installed.
    """
    folder = Path(folder)
    dataset = dataset_of(folder)
    distinct = sorted({text for pair in texts for text in pair if text.strip()})
    model = _load(folder, dataset)
    found = model(distinct) if distinct else {}
    graphs = {text: entities_of(found[str(row)], "RadGraph") for row, text in enumerate(distinct)}
    pairs = [(graphs.get(one, {}), graphs.get(other, {})) for one, other in texts]
    return pairs, f"RadGraph {MODELS[dataset]}, weights {file_sha256(folder / WEIGHTS)[:12]}"


def dataset_of(folder: Path) -> str:
    """Return the dataset of a RadGraph model, a key of `MODELS`.

    Raises:
        CheckpointError: the folder lacks a file, or the dataset is unknown.
    """
    missing = [name for name in (WEIGHTS, CONFIG, VOCABULARY) if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{folder}: no {', '.join(missing)}; expected an unpacked RadGraph model")
    names = [path.name.removesuffix(_SUFFIX) for path in (folder / VOCABULARY).glob(f"*{_SUFFIX}")]
    known = [name for name in MODELS if name in names]
    if len(known) != 1:
        raise CheckpointError(
            f"{folder / VOCABULARY}: has label files of {', '.join(sorted(names)) or 'nothing'}; expected one of "
            f"{', '.join(MODELS)}"
        )
    return known[0]


def radgraph_code() -> ModuleType:
    """Return the module with the class `RadGraph` of radeval's copy.

    Raises:
        MissingDependency: radeval or a package that its copy needs is not installed.
    """
    spec = importlib.util.find_spec("radeval")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency("radeval is required for --radgraph-model; install it with: bash scripts/setup.sh rad")
    # The copy imports itself by the old name of the package. An alias without its top-level code, which downloads
    # data of nltk, is enough.
    if "RadEval" not in sys.modules:
        alias = ModuleType("RadEval")
        alias.__path__ = list(spec.submodule_search_locations)
        sys.modules["RadEval"] = alias
    try:
        return importlib.import_module("RadEval.metrics.radgraph._vendor.core")
    except ImportError as error:
        raise MissingDependency(f"radeval cannot be imported ({error}); run: bash scripts/setup.sh rad") from error


def _load(folder: Path, dataset: str) -> Any:
    """Return the model; it maps texts to graphs by their number as text."""
    code = radgraph_code()
    with tempfile.TemporaryDirectory(prefix="llava-radgraph-") as place, contextlib.redirect_stdout(sys.stderr):
        (Path(place) / dataset).symlink_to(folder.resolve(), target_is_directory=True)
        try:
            return code.RadGraph(model_type=dataset, model_cache_dir=place, cuda=-1)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise CheckpointError(
                f"{folder}: the model cannot be loaded ({' '.join(str(error).split())[:200]}); its encoder, which "
                f"{CONFIG} names, must be a folder or in the cache of the hub"
            ) from error
