"""Mixture of data sources, described by a YAML file: weight, image folder and license of each source.

    stream: false                        true: rows are read while training, never all held in memory (docs/data.md)
    sources:
      - name: vqa-rad                    name in metrics and rows
        path: vqa-rad/train.json         relative to this file; when streaming also a pattern: shards/train-*.tar
        images: vqa-rad/images           folder of its images, relative to this file. Without it rows must not name
                                         image files; `/` lets rows name any file of the machine
        weight: 2                        passes over its rows in one epoch; 1 by default, fractions draw a part
        license: CC0-1.0                 stored in every row, as is the name

mixture.yaml --read_mixture--> Mixture --load_mixture--> Samples with `source` and `license`, complete image paths
"""

from __future__ import annotations

import codecs
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape, glob
from pathlib import Path
from typing import Any

import yaml

from llava.data.quarantine import BadRow, Quarantine, bad_row
from llava.data.records import load_samples
from llava.data.streaming import StreamSource, image_folder_of
from llava.errors import ConfigError, DataError
from llava.imaging.decode import resolve_image_path
from llava.samples import Sample, sample_label, to_row, type_and_length
from llava.utils.cli import Parser
from llava.utils.files import refuse_overwriting
from llava.utils.jsonl import READ_ERRORS, open_decompressed, read_text, write_json
from llava.utils.provenance import file_sha256
from llava.utils.terminal import write_out
from llava.utils.yaml_files import parse_yaml

logger = logging.getLogger(__name__)

MAX_WEIGHT = 1000.0
MAX_BYTES = 1 << 18
"""Largest size of a mixture file: more than a thousand sources."""
MAX_MERGED = 100
"""Largest number of keys that the merge key `<<` of YAML may add to one mapping."""
FIELDS = ("name", "path", "images", "weight", "license")

OLD_LICENSE = "licence"
"""Spelling of `license` in mixtures and rows of earlier versions, which is read as well."""
FIRST_KEYS = tuple(quote + name + quote + b":" for name in (b"sources", b"stream") for quote in (b"", b"'", b'"'))


@dataclass(frozen=True, slots=True)
class MixtureSource:
    """One file of rows in a mixture.

    Attributes:
        name: name in metrics, and `source` of rows that do not name one.
        path: path of the file.
        images: folder that image names are relative to; None if rows must not name image files.
        weight: passes over its rows in one epoch.
        license: license of rows that do not name one.
        pattern: glob pattern of the shards of a stream, as written in the mixture, below the folder of the mixture.
    """

    name: str
    path: Path
    images: Path | None = None
    weight: float = 1.0
    license: str = ""
    pattern: str = ""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Content of a mixture file; with `stream`, rows are read while training."""

    sources: tuple[MixtureSource, ...]
    stream: bool = False


def is_mixture(path: str | Path) -> bool:
    """Return whether a file is a mixture (a YAML mapping) and not a data file (JSON or binary).

    Raises:
        DataError: the file does not exist or cannot be read.
    """
    try:
        with open_decompressed(path) as stream:
            start = stream.read(4096)
    except READ_ERRORS as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    text = start.removeprefix(codecs.BOM_UTF8)
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith((b"#", b"%", b"---"))]
    return bool(lines) and lines[0].startswith(FIRST_KEYS)


def read_mixture(path: str | Path) -> Mixture:
    """Return the content of a mixture file.

    Raises:
        ConfigError: the file is not a mixture; the message names the entry and its field.
        DataError: the file cannot be read, or has more than `MAX_BYTES` bytes.
    """
    try:
        content = parse_yaml(read_text(path, max_bytes=MAX_BYTES), _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    entries = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or not set(content) <= {"sources", "stream"}:
        raise ConfigError(
            f"{path}: expected a key `sources` with a list of sources, each with a name and a path, and optionally "
            "`stream`"
        )
    stream = content.get("stream", False)
    if not isinstance(stream, bool):
        raise ConfigError(f"{path}: `stream` must be true or false, got {type_and_length(stream)}")
    folder = Path(path).parent
    sources = [_source(entry, folder, f"{path}, source {number}") for number, entry in enumerate(entries)]
    paths = [os.path.abspath(source.path) for source in sources]  # so that two spellings of a path are one
    for kind, values in (("name", [source.name for source in sources]), ("path", paths)):
        if duplicates := sorted(value for value, count in Counter(values).items() if count > 1):
            raise ConfigError(
                f"{path}: duplicate {kind} {duplicates[0]}. To sample a source more often, raise its weight."
            )
    return Mixture(tuple(sources), stream)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML loader that rejects duplicate keys, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping.

        Raises:
            yaml.YAMLError: a key is duplicate or not hashable.
        """
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if duplicates := [key for key, count in counts.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {duplicates[0]!r} is duplicate", node.start_mark)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Insert the keys that `<<` merges.

        Raises:
            yaml.YAMLError: there are too many.
        """
        num_own = len(node.value)
        super().flatten_mapping(node)
        if len(node.value) > num_own + MAX_MERGED:  # merges of merges grow exponentially
            raise yaml.constructor.ConstructorError(None, None, f"`<<` merges over {MAX_MERGED} keys", node.start_mark)


def _source(entry: Any, folder: Path, place: str) -> MixtureSource:
    if not isinstance(entry, dict):
        raise ConfigError(f"{place}: expected fields {', '.join(FIELDS)}, got {type_and_length(entry)}")
    if OLD_LICENSE in entry:
        if "license" in entry:
            raise ConfigError(f"{place}: 'license' and {OLD_LICENSE!r} are the same field; remove {OLD_LICENSE!r}")
        entry = {("license" if name == OLD_LICENSE else name): value for name, value in entry.items()}
    if unknown := [name for name in entry if name not in FIELDS]:
        raise ConfigError(f"{place}: unknown field {unknown[0]!r}; known: {', '.join(FIELDS)}")
    for name in ("name", "path"):
        if not isinstance(entry.get(name), str) or not entry[name]:
            raise ConfigError(f"{place}: field {name!r} must be text that is not empty")
    for name in ("images", "license"):
        if not isinstance(entry.get(name, ""), str):
            raise ConfigError(f"{place}: field {name!r} must be text, got {type_and_length(entry[name])}")
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= MAX_WEIGHT:
        raise ConfigError(f"{place}: field 'weight' must be a number above 0 and at most {MAX_WEIGHT:g}")
    images = folder / entry["images"] if entry.get("images") else None
    pattern = os.path.join(escape(str(folder)), entry["path"])
    return MixtureSource(
        entry["name"], folder / entry["path"], images, float(weight), entry.get("license", ""), pattern
    )


def load_mixture(
    sources: Sequence[MixtureSource], *, skip_bad: bool = False, quarantine: Quarantine | None = None
) -> list[Sample]:
    """Return the samples of all sources in order, each row once.

    Images become complete paths, checked to be inside the folder of their source; `source` and `license` are added to
    `meta`.

    Raises:
        DataError: as `load_samples`.
    """
    found: list[Sample] = []
    bad: list[BadRow] = []
    for source in sources:
        for sample in load_samples(source.path, skip_bad=skip_bad, quarantine=quarantine):
            try:
                found.append(_with_image_paths(sample, source))
            except DataError as error:
                if not skip_bad:
                    raise
                bad.append(bad_row(sample, str(error)))
    if bad:
        logger.warning("skipped %d rows whose images cannot be used; the first: %s", len(bad), bad[0])
    if bad and quarantine is not None:
        quarantine.add(bad)
    return found


def meta_with_source(meta: Mapping[str, Any], name: str, license_name: str) -> dict[str, Any]:
    """Return the fields of a row with `source` and `license`; those of the row itself take precedence.

    Args:
        meta: fields of the row; `OLD_LICENSE` is read as `license`.
        name: name of the source.
        license_name: license of the source, or "".
    """
    fields = {name: value for name, value in meta.items() if name != OLD_LICENSE}
    if OLD_LICENSE in meta:
        fields.setdefault("license", meta[OLD_LICENSE])
    return {"source": name, **({"license": license_name} if license_name else {}), **fields}


def _with_image_paths(sample: Sample, source: MixtureSource) -> Sample:
    try:
        images = tuple(
            str(resolve_image_path(ref, image_folder_of(source.name, source.images))) for ref in sample.images
        )
    except DataError as error:
        raise DataError(f"{sample_label(sample)}: {error}") from error
    return replace(sample, images=images, meta=meta_with_source(sample.meta, source.name, source.license))


@dataclass(frozen=True, slots=True)
class Shares:
    """Source of each row of a dataset, and how often the rows of each source are drawn.

    Attributes:
        names: name of each source.
        weights: passes over the rows of each source in one epoch.
        of_row: index of the source of each row.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    of_row: tuple[int, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample], sources: Sequence[MixtureSource]) -> Shares:
        """Return the shares of samples, assigned to sources by the file that they were read from.

        Raises:
            DataError: a source has no sample.
        """
        numbers = {str(source.path): number for number, source in enumerate(sources)}
        of_row = tuple(numbers[sample.origin.file] for sample in samples if sample.origin is not None)
        # Without samples the weight of a source would silently have no effect.
        seen = set(of_row)
        if empty := [source for number, source in enumerate(sources) if number not in seen]:
            raise DataError(
                f"source {empty[0].name}: none of the rows in {empty[0].path} can be used; fix them, or remove the "
                "source from the mixture"
            )
        return cls(tuple(source.name for source in sources), tuple(source.weight for source in sources), of_row)


def stream_sources(mixture: Mixture) -> list[StreamSource]:
    """Return the shards of every source, with patterns expanded.

    Raises:
        ConfigError: no file matches a pattern.
    """
    found = []
    for source in mixture.sources:
        names = [str(source.path)] if source.path.is_file() else sorted(glob(source.pattern))
        shards = tuple(Path(name) for name in names)
        if not shards:
            raise ConfigError(f"source {source.name}: no file matches {source.path}")
        found.append(StreamSource(source.name, shards, source.weight, source.images, source.license))
    return found


def data_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a data file, or of a mixture file and all files that it names."""
    if not is_mixture(path):
        return file_sha256(path)
    mixture = read_mixture(path)
    whole = hashlib.sha256(Path(path).read_bytes())
    if mixture.stream:  # shards may be larger than any disk cache, so only their names and sizes are hashed
        parts = [
            f"{shard.name} {shard.stat().st_size}" for source in stream_sources(mixture) for shard in source.shards
        ]
    else:
        parts = [file_sha256(source.path) for source in mixture.sources]
    whole.update("\n".join(parts).encode())
    return whole.hexdigest()


UNKNOWN = "unknown"


def with_relative_images(sample: Sample, folder: Path) -> Sample:
    """Return the sample with image names relative to a folder.

    Raises:
        DataError: an image is outside the folder.
    """
    outside = [image for image in sample.images if not Path(image).is_relative_to(folder)]
    if outside:
        raise DataError(
            f"{sample_label(sample)}: image {outside[0]} is outside {folder}; set --root to a folder above it"
        )
    return replace(sample, images=tuple(Path(image).relative_to(folder).as_posix() for image in sample.images))


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data mix`."""
    parser = Parser(prog="llava data mix", description="Write the rows of a mixture as one data file.")
    parser.add_argument("mixture", type=Path, help="YAML file with `sources`, see docs/data.md")
    parser.add_argument("--out", type=Path, required=True, help="data file to write: a JSON array in LLaVA format")
    parser.add_argument(
        "--root", type=Path, help="folder that written image names are relative to; default: the folder of the mixture"
    )
    args = parser.parse_args(argv)
    mixture = read_mixture(args.mixture)
    if mixture.stream:
        raise ConfigError(f"{args.mixture}: a streaming mixture cannot be written as one file; remove `stream: true`")
    refuse_overwriting([args.mixture, *(source.path for source in mixture.sources)], {"out": args.out})
    folder = (args.root or args.mixture.parent).resolve()
    samples = [with_relative_images(sample, folder) for sample in load_mixture(mixture.sources)]
    write_json(args.out, [to_row(sample) for sample in samples])
    counts = Counter((str(sample.meta["source"]), str(sample.meta.get("license", UNKNOWN))) for sample in samples)
    lines = [f"{count:>8}  {name}  (license: {license_name})" for (name, license_name), count in counts.items()]
    write_out("\n".join([*lines, f"{len(samples)} rows -> {args.out}"]) + "\n")
