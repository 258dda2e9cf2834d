from __future__ import annotations

import importlib.util
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava.errors import ConfigError, DataError
from llava.tokenization import TextTokenizer, find_prefix_mark, read_tokenizer, repair_merges
from tests.support.text_tools import KINDS, byte_level, llama_like
from tests.support.tiny import write_tiny_lm

TEXTS = [
    " A lung.",
    "\nQ ≥ 3 cm 中",
    "USER: a  b ASSISTANT:",
    " A lung.</s>USER: x",
    "</s> y",
    "</s>",
    " ",
    "  two",
    "",
    "a<s></s>b",
]


def reference(model: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Ids of the library itself: split at special tokens, one chunk at a time (`legacy`)."""
    ids: list[int] = []
    for chunk in text.replace("<s>", "\0<s>\0").replace("</s>", "\0</s>\0").split("\0"):
        ids += [{"<s>": 1, "</s>": 2}[chunk]] if chunk in ("<s>", "</s>") else model.encode(chunk)
    return ids


def mistral_model() -> Path:
    """A sentencepiece model of 32,000 pieces from a package, if it is installed."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or found.origin is None:
        pytest.skip("package mistral_common, which ships a sentencepiece model, is not installed")
    path = Path(found.origin).parent / "data" / "tokenizer.model.v1"
    if not path.is_file():
        pytest.skip(f"{path} is not in this version of mistral_common")
    return path


def write_folder(folder: Path, model: Path, **config: Any) -> Path:
    shutil.copy(model, folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **config}))
    return folder


@pytest.mark.parametrize("source", ["oracle", "mistral"])
def test_sentencepiece_folder_gives_the_library_s_ids(
    request: pytest.FixtureRequest, tmp_path: Path, source: str
) -> None:
    if source == "mistral":
        model = mistral_model()
    else:
        model = request.getfixturevalue("shared") / "oracles" / "llava-1.2.2" / "base_llm" / "tokenizer.model"
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    text_tokenizer = TextTokenizer(AutoTokenizer.from_pretrained(write_folder(tmp_path, model)))
    assert (text_tokenizer.prefix_mark, text_tokenizer.bos_ids) == ("chunk", (1,))
    for text in TEXTS:
        assert text_tokenizer(text).ids == reference(library, text), text


def test_merges_follow_the_scores_of_a_real_model(tmp_path: Path) -> None:
    """transformers 5 alone tokenizes runs of spaces incorrectly; the repaired order survives saving and loading."""
    model = mistral_model()
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = AutoTokenizer.from_pretrained(write_folder(tmp_path, model))
    repaired = TextTokenizer(tokenizer)
    assert not repair_merges(tokenizer)  # there is nothing left to do
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = TextTokenizer(AutoTokenizer.from_pretrained(tmp_path / "saved"), "chunk", add_bos=True)
    words = [
        "lung",
        "the",
        " ",
        "  ",
        "    ",
        "\n",
        "\n\n",
        "A",
        "USER:",
        "≥",
        "3",
        "cm.",
        "naïve",
        "###",
        "-",
        "...",
        "\t",
    ]
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choice(words) + draw.choice(["", " "]) for _ in range(draw.randint(1, 8)))
        assert repaired(text).ids == saved(text).ids == library.encode(text), repr(text)


def test_legacy_is_read_from_the_folder(tmp_path: Path) -> None:
    model = mistral_model()
    for legacy, mark in ((None, "chunk"), (True, "chunk"), (False, "text")):
        folder = tmp_path / str(legacy)
        folder.mkdir()
        write_folder(folder, model, **({} if legacy is None else {"legacy": legacy}))
        assert find_prefix_mark(AutoTokenizer.from_pretrained(folder)) == mark


def test_other_tokenizers_keep_their_backend() -> None:
    assert find_prefix_mark(byte_level()) == "backend"
    assert find_prefix_mark(llama_like()) == "chunk"


def test_mark_per_text_is_written_once() -> None:
    text_tokenizer = TextTokenizer(llama_like(), "text")

    def pieces(text: str) -> list[str]:
        return text_tokenizer.tokenizer.convert_ids_to_tokens(text_tokenizer(text).ids)

    assert pieces(" x</s>y") == ["▁", "▁", "x", "</s>", "y"]
    assert pieces("</s>y") == ["</s>", "y"]
    assert pieces("y</s> z") == ["▁", "y", "</s>", "▁", "z"]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=40))
def test_spans_are_in_order_and_cover_the_text(kind: str, text: str) -> None:
    tokenizer, mark = _kinds()[kind]
    tokens = TextTokenizer(tokenizer, mark)(text)
    starts = [start for start, _ in tokens.spans]
    assert starts == sorted(starts)
    assert all(0 <= start <= stop <= len(text) for start, stop in tokens.spans)
    assert {i for start, stop in tokens.spans for i in range(start, stop)} == set(range(len(text)))


_CACHE: dict[str, tuple[PreTrainedTokenizerFast, Any]] = {}


def _kinds() -> dict[str, tuple[PreTrainedTokenizerFast, Any]]:
    if not _CACHE:
        _CACHE.update({kind: make() for kind, make in KINDS.items()})
    return _CACHE


def test_tokens_added_later_are_known() -> None:
    tokenizer = llama_like()
    text_tokenizer = TextTokenizer(tokenizer)
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    assert text_tokenizer("<new>").ids == [tokenizer.convert_tokens_to_ids("<new>")]


def test_errors() -> None:
    with pytest.raises(ConfigError, match="prefix mark must be one of chunk, text, backend, got 'x'"):
        TextTokenizer(llama_like(), "x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not a fast tokenizer"):
        TextTokenizer(PreTrainedTokenizerBase())


def test_a_pattern_that_takes_too_long_ends_one_text(tmp_path: Path) -> None:
    """The regular expressions of tokenizers stop after a number of steps, with a panic that is no `Exception`."""
    write_tiny_lm(tmp_path, "llama")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "pre_tokenizer": pattern}))
    tokens = TextTokenizer(read_tokenizer(tmp_path), "backend")
    assert tokens("is a b").ids
    with pytest.raises(DataError, match=r"cannot read a text of 65 characters: PanicException: .*; shorten the text"):
        tokens("a" * 64 + "b")
    assert tokens("is a b").ids
