"""CheXbert network: the same labels as BERT with 14 heads, from tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from llava.errors import CheckpointError
from llava.eval.reports.chexbert import CLASSES, NUM_CLASSES, ChexbertLabeler, label_pair
from llava.eval.reports.cli import score_main

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "small", "eff", "##usion", ".", "edema", "heart"]
TEXTS = ["Small effusion.", "No  edema.\nNo effusion", "", "heart " * 600]


def published_network(config: BertConfig) -> torch.nn.Module:
    """Return BERT with 14 linear heads, built apart from the code under test."""
    torch.manual_seed(0)
    network = torch.nn.Module()
    network.bert = BertModel(config)
    network.linear_heads = torch.nn.ModuleList(torch.nn.Linear(config.hidden_size, num) for num in NUM_CLASSES)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return network.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights in the published form: DataParallel prefix and a buffer of positions."""
    path = tmp_path_factory.mktemp("chexbert")
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    config.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    state = {f"module.{name}": tensor for name, tensor in published_network(config).state_dict().items()}
    state["module.bert.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save({"model_state_dict": state, "epoch": 1}, path / "chexbert.pth")
    return path


def test_tokens(folder: Path) -> None:
    labeler = ChexbertLabeler(folder)
    assert labeler.token_ids("Small effusion.") == [2, 6, 7, 8, 9, 3]
    assert labeler.token_ids("") == [2, 3]
    cut = labeler.token_ids(TEXTS[3])
    assert (len(cut), cut[0], cut[-1]) == (512, 2, 3)


def test_logits_equal_the_published_network(folder: Path) -> None:
    config = BertConfig.from_pretrained(folder)
    published: Any = published_network(config)
    labeler = ChexbertLabeler(folder)
    ids = [torch.tensor(labeler.token_ids(text)) for text in TEXTS]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    with torch.inference_mode():
        heads = labeler.network(padded, mask)
        for row, tokens in enumerate(ids):
            state = published.bert(input_ids=tokens[None]).last_hidden_state[:, 0]
            for head, expected in zip(heads, published.linear_heads, strict=True):
                torch.testing.assert_close(head[row], expected(state)[0], atol=1e-5, rtol=1e-5)


def test_labels_are_the_largest_class(folder: Path) -> None:
    published: Any = published_network(BertConfig.from_pretrained(folder))
    labeler = ChexbertLabeler(folder)
    labels = labeler.labels(TEXTS)
    for row, text in enumerate(TEXTS):
        with torch.inference_mode():
            state = published.bert(input_ids=torch.tensor([labeler.token_ids(text)])).last_hidden_state[:, 0]
            classes = [int(head(state).argmax()) for head in published.linear_heads]
        assert list(labels[row]) == [CLASSES[value] for value in classes]


def test_equal_texts_have_equal_labels(folder: Path) -> None:
    pair = label_pair(folder, TEXTS, TEXTS)
    assert (pair.predictions == pair.references).all()
    assert pair.source.startswith("CheXbert weights ")


def test_command(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prediction": "Small effusion.", "reference": "Small effusion."}\n')
    score_main([str(tmp_path / "in.jsonl"), "--chexbert", str(folder), "--output-dir", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert content["scorers"]["CheXbert"]["status"] == "run"
    assert content["metrics"]["Micro-F1-14"]["source"].startswith("CheXbert weights ")
    assert "Micro-F1-14" in content["baseline"]["metrics"]


@pytest.mark.parametrize("name", ["chexbert.pth", "config.json", "vocab.txt"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    for other in {"chexbert.pth", "config.json", "vocab.txt"} - {name}:
        (tmp_path / other).write_text("{}")
    with pytest.raises(CheckpointError, match=f"no file {name}"):
        ChexbertLabeler(tmp_path)


@pytest.mark.parametrize(
    "content", [{"model_state_dict": {"module.bert.x": torch.zeros(1)}}, [1], {"a": torch.zeros(1)}]
)
def test_weights_that_do_not_fit(folder: Path, tmp_path: Path, content: Any) -> None:
    for name in ("config.json", "vocab.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save(content, tmp_path / "chexbert.pth")
    with pytest.raises(CheckpointError, match=r"chexbert\.pth"):
        ChexbertLabeler(tmp_path)


def test_pickled_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "vocab.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save({"model_state_dict": Path("x")}, tmp_path / "chexbert.pth")
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        ChexbertLabeler(tmp_path)
