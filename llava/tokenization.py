"""Tokenization of text with character spans, equal to that of the published models in training.

Sentencepiece tokenizers (Llama, Mistral) write a prefix mark `▁` before a text. The tokenizers of the published models
always wrote it. transformers 5 omits it if a text starts with a space, and does not save whether it is written before
every chunk between special tokens ("legacy") or once per text. Therefore the mark is set here, on a copy of the
backend, and the choice is saved with the processor.

From a folder with only tokenizer.model, transformers 5 orders merges by the vocabulary instead of by the scores of the
model. Llama and Mistral vocabularies start with runs of spaces, which must merge last. `repair_merges` corrects the
tokenizer itself, so that it is also saved correctly.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import sentencepiece
from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llava.errors import ConfigError, DataError
from llava.utils.faults import start_of
from llava.utils.jsonl import is_unicode

PrefixMark = Literal["chunk", "text", "backend"]
"""Position of the prefix mark: before every chunk between special tokens (sentencepiece tokenizers until transformers
4.37 and all with `legacy: true`), once per text (`legacy: false`), or as in the backend (all other tokenizers)."""

MARK = "\N{LOWER ONE EIGHTH BLOCK}"


class Tokens(NamedTuple):
    """Token ids of a text and the `(start, stop)` characters of each token; a prefix mark starts at 0."""

    ids: list[int]
    spans: list[tuple[int, int]]


@contextlib.contextmanager
def _quiet_configurations() -> Iterator[None]:
    """Turn off that a tokenizer warns of the type of a model, which is ours and unknown to transformers."""
    logger = logging.getLogger("transformers.configuration_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _ordinary_errors() -> Iterator[None]:
    """Turn what tokenizers raises, `Exception` itself and panics that are none, into `ValueError`."""
    try:
        yield
    except (OSError, ValueError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def read_tokenizer(path: str | Path, **settings: Any) -> Any:
    """Return the tokenizer of a folder or hub name.

    Args:
        path: the folder or hub name.
        settings: passed to transformers.

    Raises:
        OSError, ValueError: it cannot be read; callers add where it was expected.
    """
    with _ordinary_errors(), _quiet_configurations():
        tokenizer = AutoTokenizer.from_pretrained(path, **settings)
        tokenizer.decode(tokenizer("a b")["input_ids"])  # some parts are read when they are used
        return tokenizer


def token_id(tokenizer: Any, word: str) -> int | None:
    """Return the id of a token in the vocabulary or the added tokens; None if it is in neither."""
    # The backend looks up one token; transformers builds a table of the whole vocabulary for every lookup.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found: int | None = tokenizer.get_vocab().get(word) if backend is None else backend.token_to_id(word)
    return found


class TextTokenizer:
    """Tokenizer of parts of a text; it adds no special tokens, and encodes those that the text contains."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prefix_mark: PrefixMark | None = None, *, add_bos: bool | None = None
    ) -> None:
        """Wrap a tokenizer.

        Args:
            tokenizer: any fast tokenizer of transformers.
            prefix_mark: position of the prefix mark; None to read it from the files of the tokenizer.
            add_bos: whether a text starts with the begin-of-text token; None to read it from the files.

        Raises:
            ConfigError: the tokenizer has no fast backend, which is needed for character spans.
        """
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ConfigError(
                f"{type(tokenizer).__name__} is not a fast tokenizer, so its tokens have no positions in the text; "
                "use a folder with tokenizer.json or a sentencepiece tokenizer.model"
            )
        if prefix_mark is not None and prefix_mark not in get_args(PrefixMark):
            raise ConfigError(f"prefix mark must be one of {', '.join(get_args(PrefixMark))}, got {prefix_mark!r}")
        self.tokenizer = tokenizer
        self.prefix_mark: PrefixMark = prefix_mark or find_prefix_mark(tokenizer)
        bos = tokenizer.bos_token_id
        adds = find_add_bos(tokenizer, self.prefix_mark) if add_bos is None else add_bos
        self.bos_ids: tuple[int, ...] = (int(bos),) if adds and bos is not None else ()
        """Begin-of-text token that is written before a text, or empty."""
        if self.prefix_mark != "backend":
            repair_merges(tokenizer)
        self._made: tuple[int, Tokenizer] | None = None  # created on first use; not needed for token ids only

    def plain_backend(self) -> Tokenizer:
        """Return a backend that writes the prefix marks of this tokenizer itself, for other programs.

        If the mark is written once per text, it is before the first chunk only.
        """
        backend = self._make_backend()
        if self.prefix_mark == "text":
            backend.normalizer = cast(Any, None)
            backend.pre_tokenizer = cast(Any, pre_tokenizers.Metaspace(MARK, prepend_scheme="first", split=False))
        return backend

    def _make_backend(self) -> Tokenizer:
        backend = Tokenizer.from_str(cast(Any, self.tokenizer).backend_tokenizer.to_str())
        backend.post_processor = cast(Any, None)  # those of byte-level tokenizers would remove spaces from the spans
        backend.no_truncation()
        backend.no_padding()
        if self.prefix_mark != "backend":
            steps = [backend.normalizer] if backend.normalizer is not None else []
            if self.prefix_mark == "chunk":
                steps.append(normalizers.Prepend(MARK))
            steps.append(normalizers.Replace(" ", MARK))
            backend.normalizer = cast(Any, normalizers.Sequence(steps))
            backend.pre_tokenizer = cast(Any, None)
        return backend

    def _backend(self) -> Tokenizer:
        size = len(self.tokenizer)
        if self._made is None or self._made[0] != size:  # tokens were added after the last call
            self._made = size, self._make_backend()
        return self._made[1]

    def __call__(self, text: str) -> Tokens:
        """Return the tokens of one part of a text, tokenized independently of other parts.

        Raises:
            DataError: the text holds half of a surrogate pair, which no tokenizer accepts, or this tokenizer fails.
        """
        if not text:
            return Tokens([], [])
        if not is_unicode(text):
            raise DataError(
                "a text holds half of a surrogate pair, which is not Unicode (was an emoji cut?); remove it"
            )
        starts = self.prefix_mark == "text"
        try:
            with _ordinary_errors():
                encoding = self._backend().encode(MARK + text if starts else text, add_special_tokens=False)
        except ValueError as error:
            raise DataError(
                f"the tokenizer cannot read a text of {len(text)} characters: {start_of(error)}; shorten the text, "
                "or use the tokenizer of another copy of the model"
            ) from error
        if not starts:
            return Tokens(encoding.ids, encoding.offsets)
        ids, spans = encoding.ids, [(max(start - 1, 0), stop - 1) for start, stop in encoding.offsets]
        if len(ids) > 1 and encoding.offsets[0] == (0, 1) and ids[1] in self.tokenizer.added_tokens_decoder:
            ids, spans = ids[1:], spans[1:]  # a special token has no prefix mark
        return Tokens(ids, spans)


def repair_merges(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Order merges by score if only tokenizer.model was loaded; return whether the order changed.

    Raises:
        ConfigError: the file is not a sentencepiece model.
    """
    name = str(tokenizer.name_or_path or "")
    file = _find_file(name, "tokenizer.model")
    backend = cast(Any, tokenizer).backend_tokenizer
    state = json.loads(backend.to_str())
    if file is None or _find_file(name, "tokenizer.json") or state["model"]["type"] != "BPE":
        return False
    try:
        merges = _merges_by_score(sentencepiece.SentencePieceProcessor(model_file=str(file)))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{file} is not a sentencepiece model: {error}") from error
    if merges == [tuple(pair) for pair in state["model"]["merges"]]:
        return False
    state["model"]["merges"] = merges
    backend.model = Tokenizer.from_str(json.dumps(state)).model
    return True


def _merges_by_score(model: Any) -> list[tuple[str, str]]:
    """Return all pairs of pieces that form a piece, ordered by its score, then by the lengths of the pair."""
    num_pieces = model.get_piece_size()
    special = [model.is_control(i) or model.is_unknown(i) or model.is_byte(i) for i in range(num_pieces)]
    pieces = {model.id_to_piece(i): i for i in range(num_pieces) if not special[i]}
    found: list[tuple[float, int, int, int, int, str, str]] = []
    for piece, i in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                rank = (-model.get_score(i), -len(left), -len(right), pieces[left], pieces[right])
                found.append((*rank, left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def find_prefix_mark(tokenizer: PreTrainedTokenizerBase) -> PrefixMark:
    """Return the position of the prefix mark that the models of this tokenizer expect.

    In a sentencepiece folder, the key `legacy` of tokenizer_config.json determines it; without the key, the mark is
    before every chunk. For a tokenizer.json alone, the backend determines it.
    """
    before = cast(Any, tokenizer).backend_tokenizer.pre_tokenizer
    if not isinstance(before, pre_tokenizers.Metaspace) or before.split or before.prepend_scheme == "never":
        return "backend"
    name = str(tokenizer.name_or_path or "")
    config = _find_file(name, "tokenizer_config.json")
    legacy = json.loads(config.read_text(encoding="utf-8")).get("legacy") if config else None
    if legacy is None and _find_file(name, "tokenizer.model") and not _find_file(name, "tokenizer.json"):
        legacy = True
    if legacy is None:
        legacy = before.prepend_scheme == "always"
    return "chunk" if legacy else "text"


def find_add_bos(tokenizer: PreTrainedTokenizerBase, prefix_mark: PrefixMark) -> bool:
    """Return whether the models of this tokenizer expect the begin-of-text token."""
    # A sentencepiece folder without the key `add_bos_token` means yes, which transformers 5 reads as no.
    ids = cast(list[int], tokenizer("").input_ids)
    if ids and ids[0] == tokenizer.bos_token_id:
        return True
    name = str(tokenizer.name_or_path or "")
    if prefix_mark == "backend" or not _find_file(name, "tokenizer.model") or _find_file(name, "tokenizer.json"):
        return False
    config = _find_file(name, "tokenizer_config.json")
    return config is None or "add_bos_token" not in json.loads(config.read_text(encoding="utf-8"))


def _find_file(name: str, file: str) -> Path | None:
    """Return the path of a file of a tokenizer, in a folder or in the hub cache; None if it is missing."""
    if not name:
        return None
    if (Path(name) / file).is_file():
        return Path(name) / file
    if Path(name).exists() or name.startswith(("/", ".")) or name.count("/") > 1:
        return None
    cached = try_to_load_from_cache(name, file)
    return Path(cached) if isinstance(cached, str) else None
