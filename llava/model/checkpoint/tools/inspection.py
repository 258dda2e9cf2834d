"""Report a checkpoint's content and how each tensor would be loaded, by headers and without torch.

Checkpoint.open(path) --names, shapes, settings--> Inspection --> text or JSON
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.constants import IM_END_TOKEN, IM_PATCH_TOKEN, IM_START_TOKEN, IMAGE_TOKEN
from llava.errors import CheckpointError
from llava.model.checkpoint.files.shards import TensorEntry
from llava.model.checkpoint.formats import KINDS, OUR_KINDS, PAD_TOKEN, Checkpoint, our_name, read_json
from llava.model.checkpoint.legacy_keys import merge_type, unknown_keys
from llava.model.checkpoint.weight_names import EMBEDDINGS, HEAD, NEWLINE, PROJECTOR, is_buffer
from llava.model.projector_types import declared_shapes, find_type
from llava.utils.cli import Parser
from llava.utils.faults import sensible
from llava.utils.plugins import add_plugin_option
from llava.utils.terminal import visible, write_out

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
DEFAULTS: dict[str, dict[str, int]] = {
    "llama": dict(zip(SIZES, (4096, 11008, 32, 32), strict=True)),
    "mistral": {**dict(zip(SIZES, (4096, 14336, 32, 32), strict=True)), "num_key_value_heads": 8},
}
"""transformers' defaults for sizes that a nested configuration omits, as published ones do."""


def expected_shapes(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the language model's and the projector's weights by our names, with shapes; -1 is any size.

    Only for whole models with Llama or Mistral, whose configuration determines all shapes.
    """
    config = _text_settings(checkpoint)
    if not all(isinstance(config.get(key), int) for key in SIZES):
        return
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or width // heads
    keys = config.get("num_key_value_heads") or heads
    yield EMBEDDINGS, (-1, width)
    model = EMBEDDINGS.removesuffix("embed_tokens.weight")
    for layer in range(config["num_hidden_layers"]):
        place = f"{model}layers.{layer}."
        for name in ("q", "k", "v"):
            yield f"{place}self_attn.{name}_proj.weight", ((heads if name == "q" else keys) * size, width)
        yield f"{place}self_attn.o_proj.weight", (width, heads * size)
        for name in ("gate", "up"):
            yield f"{place}mlp.{name}_proj.weight", (inner, width)
        yield f"{place}mlp.down_proj.weight", (width, inner)
        for name in ("input", "post_attention"):
            yield f"{place}{name}_layernorm.weight", (width,)
    yield f"{model}norm.weight", (width,)
    if _has_head(checkpoint):
        yield "lm_head.weight", (-1, width)
    yield from _expected_projector(checkpoint, width)
    merge = merge_type(config) if checkpoint.kind == "legacy" else checkpoint.config.get("patch_merge_type")
    if merge == "spatial_unpad":
        yield f"model.{NEWLINE}", (width,)


def _text_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the language model's settings; empty if they are absent, or its weights have other names."""
    if checkpoint.kind == "legacy":
        return checkpoint.config
    inner = checkpoint.config.get("text_config")
    if (
        checkpoint.kind not in ("model", "hf_llava")
        or not isinstance(inner, dict)
        or inner.get("model_type") not in DEFAULTS
    ):
        return {}
    return {**DEFAULTS[inner["model_type"]], **inner}


def _has_head(checkpoint: Checkpoint) -> bool:
    """Return whether the head has its own table, by default only in legacy configurations."""
    tied = checkpoint.config.get("tie_word_embeddings")
    return not tied if checkpoint.kind == "legacy" else tied is False


def _expected_projector(checkpoint: Checkpoint, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the weights of the projector type that the weights show, or else the settings."""
    config = checkpoint.config
    if checkpoint.kind == "legacy":
        vision, written = config.get("mm_hidden_size") or None, str(config.get("mm_projector_type") or "linear")
    else:
        vision, written = None, str(config.get("projector_type") or "mlp2x_gelu")
    try:
        kind = written if checkpoint.kind != "legacy" else checkpoint.projector_type or written
    except CheckpointError:
        kind = written
    declared = find_type(kind)
    for name, shape in declared_shapes(declared, vision, width).items() if declared is not None else ():
        yield PROJECTOR + name, shape


STATUSES = {
    "loaded": "loaded unchanged",
    "renamed": "loaded under our name",
    "computed": "a table that is computed today; not loaded",
    "copy": "a copy of what another file holds; not loaded",
    "missing": "needed, but not here",
    "unexpected": "belongs to no part of the model",
    "new": "initialized when the checkpoint is loaded",
    "wrong shape": "does not fit the configuration",
}
PROBLEMS = ("missing", "unexpected", "wrong shape")
SPECIAL_TOKENS = (IMAGE_TOKEN, IM_PATCH_TOKEN, IM_START_TOKEN, IM_END_TOKEN, PAD_TOKEN)
PROCESSOR_FILE = "llava_processor.json"


@dataclass(frozen=True, slots=True)
class TensorRow:
    """Tensor with its name in the file and ours, shape, dtype, and how it is loaded (key of `STATUSES`)."""

    status: str
    name: str
    ours: str
    shape: tuple[int, ...] = ()
    dtype: str = ""


@dataclass(slots=True)
class Inspection:
    """Facts (in print order) and tensors of a checkpoint."""

    checkpoint: Checkpoint
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[TensorRow] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """Number of tensors per status."""
        return Counter(row.status for row in self.rows)


def local_path(path: str | Path) -> str | Path:
    """Return a path, or the local copy of the hub repository that it names.

    Raises:
        CheckpointError: the repository cannot be downloaded.
    """
    if Path(path).exists():
        return path
    from llava.model.checkpoint.hub import is_hub_name, local_folder  # loads torch, which headers do not need

    return local_folder(path) if is_hub_name(path) else path


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Inspect a checkpoint: a folder, a weight file or a hub name.

    Raises:
        CheckpointError: it is in no known format, a file is broken, or it cannot be downloaded.
    """
    checkpoint = Checkpoint.open(local_path(path))
    rows = list(_rows(checkpoint))
    return Inspection(checkpoint, _facts(checkpoint), rows)


def _rows(checkpoint: Checkpoint) -> Iterator[TensorRow]:
    expected = dict(expected_shapes(checkpoint))
    found: set[str] = set()
    for entry in (*checkpoint.tensors.values(), *checkpoint.extra.values()):
        row = _row(checkpoint, entry, expected)
        found.add(row.ours)
        yield row
    for name, shape in expected.items():
        if name not in found:
            yield TensorRow("missing", "", name, shape)
    yield from _new_rows(checkpoint)


def _row(checkpoint: Checkpoint, entry: TensorEntry, expected: dict[str, tuple[int, ...]]) -> TensorRow:
    ours = our_name(checkpoint, entry.name)
    if is_buffer(entry.name):
        status = "computed"
    elif ours is None:
        status = "unexpected"
    elif checkpoint.kind == "legacy_adapter" and "lora_" in entry.name and ".vision_tower." in ours:
        status = "copy"
    elif ours in expected and not _fits(entry.shape, expected[ours]):
        status = "wrong shape"
    else:
        status = "loaded" if ours == entry.name else "renamed"
    return TensorRow(status, entry.name, ours or "", entry.shape, entry.dtype)


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether two shapes are equal, where -1 matches any size."""
    return len(shape) == len(expected) and all(want in (-1, got) for got, want in zip(shape, expected, strict=True))


def _new_rows(checkpoint: Checkpoint) -> Iterator[TensorRow]:
    """Yield the rows that loading appends to embeddings and head, for tokens without one."""
    tables = {our_name(checkpoint, name): entry for name, entry in checkpoint.tensors.items()}
    if checkpoint.kind not in ("legacy", "hf_llava") or EMBEDDINGS not in tables:
        return
    num_words, wanted = num_known_tokens(checkpoint), added_tokens(checkpoint)
    if checkpoint.kind == "legacy":
        lacking = [word for word in checkpoint.needed_tokens if word not in wanted]
        wanted |= {word: num_words + number for number, word in enumerate(lacking)}
    num_rows = max([tables[EMBEDDINGS].shape[0], *(row + 1 for row in wanted.values())])
    for name in (EMBEDDINGS, HEAD + "weight"):
        entry = tables.get(name)
        if entry is None or len(entry.shape) != 2:
            continue
        first, width = entry.shape
        new = {row: word for word, row in wanted.items() if row >= first}
        for row, word in sorted(new.items()):
            yield TensorRow("new", "", f"{name}[{row}] ({word})", (width,), entry.dtype)
        if num_unnamed := num_rows - first - len(new):
            yield TensorRow("new", "", f"{name} (further rows)", (num_unnamed, width), entry.dtype)


def num_known_tokens(checkpoint: Checkpoint) -> int:
    """Return the number of a tokenizer's tokens before loading adds any.

    If the folder has only a sentencepiece file (which is not read) or uses the base's tokenizer, it is the number of
    rows in the embedding table.
    """
    vocabulary = (read_json(checkpoint.folder / "tokenizer.json").get("model") or {}).get("vocab") or ()
    if not vocabulary:
        table = next((e for name, e in checkpoint.tensors.items() if our_name(checkpoint, name) == EMBEDDINGS), None)
        vocabulary = range(0 if table is None else table.shape[0])
    return max([len(vocabulary), *(row + 1 for row in added_tokens(checkpoint).values())])


def added_tokens(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the tokens added to a tokenizer's own vocabulary, with their ids, from all its files."""
    folder = checkpoint.folder
    found = {word: row for word, row in read_json(folder / "added_tokens.json").items() if isinstance(row, int)}
    decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    found.update({str(entry["content"]): int(row) for row, entry in decoder.items() if isinstance(entry, dict)})
    for entry in read_json(folder / "tokenizer.json").get("added_tokens") or ():
        found[str(entry["content"])] = int(entry["id"])
    return found


def special_tokens(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the added tokens that stand for images and padding."""
    return {word: row for word, row in added_tokens(checkpoint).items() if word in SPECIAL_TOKENS}


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    entries = [*checkpoint.tensors.values(), *checkpoint.extra.values()]
    dtypes = Counter(entry.dtype for entry in entries)
    facts: dict[str, Any] = {
        "checkpoint": str(checkpoint.path),
        "kind": KINDS[checkpoint.kind],
        "files": ", ".join(sorted({entry.file.name for entry in entries})),
        "size": f"{len(entries)} tensors, {sum(entry.num_bytes for entry in entries):,} bytes, "
        + ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items()),
    }
    if checkpoint.kind in OUR_KINDS:
        facts.update(_facts_of_ours(checkpoint))
    elif checkpoint.kind.startswith(("legacy", "hf")):
        facts.update(_facts_of_others(checkpoint))
    facts["token ids"] = ", ".join(f"{word} {row}" for word, row in special_tokens(checkpoint).items()) or "none added"
    return facts


def _facts_of_ours(checkpoint: Checkpoint) -> dict[str, Any]:
    settings = read_json(checkpoint.folder / PROCESSOR_FILE)
    config = checkpoint.config
    images = (settings.get(name) for name in ("image_mode", "num_image_tokens", "placement"))
    return {
        "language model": (config.get("text_config") or {}).get("model_type"),
        "projector": config.get("projector_type"),
        "vision tower": (config.get("vision_config") or {}).get("model_type"),
        "template": settings.get("template"),
        "images (shape, tokens, place)": ", ".join(map(str, images)),
        "converted from": (config.get("source") or {}).get("kind") or "nothing: built here",
    }


def _facts_of_others(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    try:
        projector = checkpoint.projector_type or "none here"
    except CheckpointError as error:
        projector = str(error)
    if checkpoint.kind == "hf_adapter":
        base = checkpoint.adapter.get("base_model_name_or_path")
        return {"base": base, "r": checkpoint.adapter.get("r"), "lora_alpha": checkpoint.adapter.get("lora_alpha")}
    facts: dict[str, Any] = {"language model": checkpoint.text_type, "projector": projector}
    if checkpoint.kind == "hf_llava":
        return facts
    place = "inside, used" if checkpoint.has_tower else "outside, loaded by name"
    facts["vision tower"] = f"{config.get('mm_vision_tower')} ({place})"
    facts["style"] = {
        "patch_token": "patch tokens (LLaVA before 1.0, LLaVA-Med 1.0)",
        "placeholder": "one placeholder per image (LLaVA from 1.0 on)",
    }[checkpoint.style]
    facts["template"] = f"{checkpoint.template(added_tokens(checkpoint))} (by content; --template overrides)"
    mode, placement = config.get("image_aspect_ratio") or "square", "front"
    if checkpoint.style == "patch_token":
        placement = "as written, white space around images dropped"
    if mode == "anyres":
        mode += f" ({config.get('mm_patch_merge_type') or 'flat'})"
    facts["images"] = f"{mode}, layer {config.get('mm_vision_select_layer', -1)}, {placement}"
    facts["base"] = config.get("_name_or_path") if checkpoint.kind != "legacy" else None
    facts["tower adapter"] = checkpoint.tower_adapter.name if checkpoint.tower_adapter else None
    facts["unknown keys, kept"] = ", ".join(unknown_keys(config)) or None
    return {key: value for key, value in facts.items() if value is not None}


def inspection_text(inspection: Inspection, *, tensors: bool = True) -> str:
    """Return the inspection as text: facts, counts, and a line for every tensor."""
    lines = [f"{name:<31}{value}" for name, value in inspection.facts.items()]
    lines.append("")
    lines += [f"{count:>6}  {status:<12}{STATUSES[status]}" for status, count in sorted(inspection.counts.items())]
    if tensors:
        width = max([len(row.name) for row in inspection.rows], default=0)
        lines.append("")
        for row in inspection.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            target = "" if row.ours == row.name else f"  -> {row.ours}" if row.name else row.ours
            lines.append(f"{row.status:<12}{row.name:<{width}}  {row.dtype:<9}{shape}{target}")
    return "\n".join(visible(line.rstrip()) for line in lines) + "\n"


def inspection_json(inspection: Inspection) -> str:
    """Return the inspection as JSON."""
    rows = [
        {"status": row.status, "name": row.name, "ours": row.ours, "shape": row.shape, "dtype": row.dtype}
        for row in inspection.rows
    ]
    facts = {**inspection.facts, "kind": inspection.checkpoint.kind}
    content = {**facts, "counts": inspection.counts, "tensors": rows}
    return json.dumps(content, indent=2).replace("\x7f", "\\u007f") + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava checkpoint inspect`."""
    parser = Parser(prog="llava checkpoint inspect", description="List the content of a checkpoint, tensor by tensor.")
    parser.add_argument("path", help="checkpoint folder, weight file or hub name")
    parser.add_switch("--json", help="write JSON instead of text")
    parser.add_switch("--summary", help="omit the list of tensors")
    add_plugin_option(parser)
    args = parser.parse_args(argv)
    with sensible(args.path, "inspected"):
        inspection = inspect_checkpoint(args.path)
        text = inspection_json(inspection) if args.json else inspection_text(inspection, tensors=not args.summary)
    write_out(text)
