"""RadGraph model: loading of a folder and graphs of texts, with tiny random weights and radeval's copy of the code."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from llava.errors import CheckpointError
from llava.eval.reports.radgraph_model import annotate, dataset_of, radgraph_code

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "no", "small", "left", "effusion", "is", ".", "the"]
LABELS = {"ner": ["", "ANAT-DP", "OBS-DP", "OBS-U", "OBS-DA"], "relation": ["modify", "located_at", "suggestive_of"]}

needs_radeval = pytest.mark.skipif(
    importlib.util.find_spec("radeval") is None, reason="radeval is not installed; run: bash scripts/setup.sh rad"
)


def write_encoder(folder: Path) -> None:
    """Write a tiny encoder with its tokenizer."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)


def write_model(folder: Path) -> dict[str, Any]:
    """Write configuration and vocabulary of a tiny model, and return its configuration."""
    write_encoder(folder / "encoder")
    encoder = {"bert": {"model_name": str(folder / "encoder"), "max_length": 128}}
    modules = {
        "coref": {"spans_per_word": 0.3, "max_antecedents": 10, "coref_prop": 0},
        "ner": {},
        "relation": {"spans_per_word": 0.5},
        "events": {
            "trigger_spans_per_word": 0.3,
            "argument_spans_per_word": 0.8,
            "loss_weights": {"trigger": 1.0, "arguments": 1.0},
        },
    }
    model = {
        "type": "dygie",
        "embedder": {"token_embedders": encoder},
        "initializer": {},
        "module_initializer": {},
        "feature_size": 4,
        "max_span_width": 3,
        "target_task": "relation",
        "feedforward_params": {"num_layers": 1, "hidden_dims": 8, "dropout": 0.0},
        "loss_weights": {"ner": 1.0, "relation": 1.0, "coref": 0.0, "events": 0.0},
        "modules": modules,
    }
    config = {"dataset_reader": {"max_span_width": 3, "token_indexers": encoder}, "model": model}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocabulary").mkdir()
    for name, labels in LABELS.items():
        (folder / "vocabulary" / f"radgraph__{name}_labels.txt").write_text("\n".join(labels))
    (folder / "vocabulary" / "non_padded_namespaces.txt").write_text("*labels\n*tags\n")
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked RadGraph model with random weights."""
    path = tmp_path_factory.mktemp("radgraph")
    config = write_model(path)
    code = radgraph_code()
    vocabulary = code.Vocabulary.from_files(str(path / "vocabulary"), {}, {})
    encoder = config["model"]["embedder"]["token_embedders"]["bert"]
    embedder = code.text_field_embedders.BasicTextFieldEmbedder(
        {"bert": code.token_embedders.PretrainedTransformerMismatchedEmbedder(**encoder)}
    )
    removed = ("type", "embedder", "initializer", "module_initializer")
    options = {name: value for name, value in config["model"].items() if name not in removed}
    torch.manual_seed(1)
    network = code.dygie.DyGIE(vocab=vocabulary, embedder=embedder, **options)
    torch.save(network.state_dict(), path / "weights.th")
    return path


@needs_radeval
def test_graphs_of_reports(folder: Path) -> None:
    texts = [("small left effusion .", "no effusion ."), ("", "no effusion .")]
    graphs, source = annotate(folder, texts)
    assert source.startswith("RadGraph v1, weights ")
    assert graphs[1][0] == {}
    assert graphs[0][1] == graphs[1][1]
    assert all(entity["label"] in LABELS["ner"] for pair in graphs for side in pair for entity in side.values())


@needs_radeval
def test_graphs_equal_the_package(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "radgraph").symlink_to(folder)
    model = radgraph_code().RadGraph(model_type="radgraph", model_cache_dir=str(tmp_path), cuda=-1)
    expected = model(["small left effusion ."])["0"]["entities"]
    assert annotate(folder, [("small left effusion .", "")])[0][0][0] == expected


@needs_radeval
def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    torch.save({"x": torch.zeros(1)}, tmp_path / "model" / "weights.th")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        annotate(tmp_path / "model", [("no effusion .", "no effusion .")])


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights\.th, config\.json, vocabulary"):
        dataset_of(tmp_path)


@pytest.mark.parametrize(
    ("names", "expected"), [(["radgraph"], "radgraph"), (["radgraph-xl"], "radgraph-xl"), (["other"], None), ([], None)]
)
def test_dataset_by_content(tmp_path: Path, names: list[str], expected: str | None) -> None:
    (tmp_path / "vocabulary").mkdir()
    for name in ("weights.th", "config.json"):
        (tmp_path / name).write_text("{}")
    for name in names:
        (tmp_path / "vocabulary" / f"{name}__ner_labels.txt").write_text("OBS-DP")
    if expected is None:
        with pytest.raises(CheckpointError, match="expected one of radgraph"):
            dataset_of(tmp_path)
    else:
        assert dataset_of(tmp_path) == expected
