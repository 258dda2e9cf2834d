"""Loading pictures: our loader against the originals' dataset and the `datasets` library, all with one processor.

python -m benchmarks.data_loading [--rounds 5] [--workers 0,1,2] [--films DIR] [--quick]

    files --each side's loader--> [N, 3, 336, 336]      (batches of 8, `--workers` processes, one thread each)

- originals: open, convert to RGB, pad to a square, image processor, all in `__getitem__`; nothing is remembered.
- datasets: the same steps as the transform of a `datasets.Dataset` of file names.
- ours: `ImageStore`, exact; and for large grey JPEG files with `--fast_jpeg`. Its digests are computed in the time.

Every side gives the same numbers, bit for bit, but for scaled decoding (the table of differences says how far it is
off) and deep pictures (Pillow's own conversion of 16 bits is not a picture; the others window it as usual scripts do).
Neither of the others reads DICOM: they are given the usual few lines of pydicom. Sides take turns at being first, the
first round is not counted, files are in the system's cache, each round of ours begins with nothing known.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessorPil

from benchmarks import common, radiographs
from benchmarks.eval_throughput import make_processor
from llava.data.image_store import ImageIndex, ImageStore
from llava.processing import LlavaMedProcessor
from llava.utils.cli import Parser
from llava.utils.lookup import require

BATCH_SIZE = 8
FILL = (122, 116, 104)
"""CLIP's mean colour in 8 bits, the border of the originals."""

Batches = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of files: how many are made, the bytes of number `n`, whether scaled decoding has an effect."""

    num: int
    make: Callable[[int], bytes]
    is_scaled: bool = False


def kinds(side: int, num: int) -> dict[str, Kind]:
    """The kinds of files, films with `side` pixels on a side."""
    small = side * 800 // 2048, side * 600 // 2048
    return {
        "grey_jpeg": Kind(num, lambda n: radiographs.as_jpeg(radiographs.film(side, side, n)), is_scaled=True),
        "figure_jpeg": Kind(2 * num, lambda n: radiographs.as_jpeg(radiographs.figure(*small, n), quality=85)),
        "figure_png": Kind(2 * num, lambda n: radiographs.as_png(radiographs.figure(*small, n))),
        "deep_png": Kind(num // 2, lambda n: radiographs.as_deep_png(radiographs.film(side, side, n), n)),
        "dicom": Kind(num // 2, lambda n: radiographs.as_dicom(radiographs.film(side, side, n), n)),
    }


def image_processor(size: int) -> CLIPImageProcessorPil:
    """The image processor of every side."""
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def our_processor(size: int, *, mode: str = "pad", fast: bool = False) -> LlavaMedProcessor:
    """Our processor around it."""
    made = make_processor()
    return LlavaMedProcessor(
        made.tokenizer,
        image_processor(size),
        template="mistral_instruct",
        image_mode=mode,
        num_image_tokens=(size // 14) ** 2,
        fast_jpeg=fast,
    )


def open_usual(path: Path) -> Image.Image:
    """Open a picture in RGB as usual scripts do; deep ones and DICOM from their smallest to their largest value."""
    if path.suffix == ".dcm":
        import pydicom

        return _stretched(pydicom.dcmread(path).pixel_array)
    image = Image.open(path)
    return _stretched(np.asarray(image)) if image.mode.startswith("I") else image.convert("RGB")


def _stretched(values: np.ndarray) -> Image.Image:
    exact = values.astype(np.float32)
    low, high = exact.min(), exact.max()
    return Image.fromarray(((exact - low) / max(high - low, 1) * 255).astype(np.uint8)).convert("RGB")


def expand_to_square(image: Image.Image) -> Image.Image:
    """Put a picture into the middle of a square of the mean colour."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), FILL)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


class OriginalsData(Dataset[Tensor]):
    """A picture is opened and prepared whenever its row is asked for."""

    def __init__(self, paths: Sequence[Path], processor: Any) -> None:
        self.paths, self.processor = paths, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        image = expand_to_square(open_usual(self.paths[row]))
        pixels: Tensor = self.processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
        return pixels


class OurData(Dataset[Tensor]):
    """A row's picture by its key, as the training loader asks for it; the store is new, so no picture is known."""

    def __init__(self, paths: Sequence[Path], processor: LlavaMedProcessor) -> None:
        self.names = [path.name for path in paths]
        self.store = ImageStore(ImageIndex(paths[0].parent), processor)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> Tensor:
        return self.store.pixels(self.store.key(self.names[row]))


def library_data(paths: Sequence[Path], processor: Any) -> Any:
    """A `datasets.Dataset` of the file names whose transform is the processor."""
    datasets = require("datasets", "data")

    def transform(rows: dict[str, list[str]]) -> dict[str, Any]:
        pictures = [expand_to_square(open_usual(Path(path))) for path in rows["path"]]
        return {"pixel_values": processor(images=pictures, return_tensors="pt")["pixel_values"]}

    made = datasets.Dataset.from_dict({"path": [str(path) for path in paths]})
    made.set_transform(transform)
    return made


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def batches(data: Any, num_workers: int) -> Iterator[Tensor]:
    """Load all of a data set in batches."""
    loader: Any = DataLoader(data, batch_size=BATCH_SIZE, num_workers=num_workers, worker_init_fn=_one_thread)
    for batch in loader:
        yield batch["pixel_values"] if isinstance(batch, dict) else batch


def sides_of(paths: Sequence[Path], num_workers: int, size: int, *, scaled: bool) -> dict[str, Batches]:
    """Every way to load the files; the first two are the others."""
    own = image_processor(size)
    exact, fast = our_processor(size), our_processor(size, fast=True)
    sides: dict[str, Batches] = {
        "originals": lambda: batches(OriginalsData(paths, own), num_workers),
        "datasets": lambda: batches(library_data(paths, own), num_workers),
        "ours": lambda: batches(OurData(paths, exact), num_workers),
    }
    if scaled:
        sides["scaled"] = lambda: batches(OurData(paths, fast), num_workers)
    return sides


def seconds_of(side: Batches, expected: int) -> float:
    """Seconds that loading everything takes."""
    start = time.perf_counter()
    count = sum(len(batch) for batch in side())
    taken = time.perf_counter() - start
    assert count == expected, f"{count} pictures were loaded of {expected}"
    return taken


def measure(
    paths: Sequence[Path], num_workers: int, args: argparse.Namespace, *, scaled: bool
) -> list[dict[str, float]]:
    """Seconds of every side in each counted round."""
    sides = sides_of(paths, num_workers, args.size, scaled=scaled)
    rounds = []
    for number in range(args.rounds + 1):
        order = list(sides) if number % 2 else list(reversed(sides))
        taken = {name: seconds_of(sides[name], len(paths)) for name in order}
        if number:
            rounds.append({name: taken[name] for name in sides})
    return rounds


def check_equal(name: str, paths: Sequence[Path], size: int) -> None:
    """Make sure that all sides load the same numbers, where they mean the same.

    Raises:
        AssertionError: they do not.
    """
    sides = sides_of(paths, 0, size, scaled=False)
    first, *others = (torch.cat(list(side())) for side in sides.values())
    for other in others:
        if name in ("deep_png", "dicom"):
            levels = (first - other).abs().mean() * 0.27 * 255
            assert levels < 2, f"{name}: {levels:.2f} grey levels apart; one of the sides shows something else"
        else:
            assert torch.equal(first, other), f"{name}: the sides load different numbers"


def difference(content: bytes, size: int, mode: str) -> tuple[int, float, float, float] | None:
    """How a scaled picture differs from the whole one after all preprocessing, in grey levels.

    Returns:
        the divisor, the mean, the 99.9th percentile and the largest difference; None where it is decoded whole.
    """
    exact, fast = our_processor(size, mode=mode), our_processor(size, mode=mode, fast=True)
    opened = fast.open(content)
    if opened.scale == 1:
        return None
    deviation = torch.tensor(image_processor(size).image_std)[:, None, None] * 255
    off = ((fast.picture(opened) - exact.picture(exact.open(content))).abs() * deviation).numpy()
    return opened.scale, float(off.mean()), float(np.percentile(off, 99.9)), float(off.max())


def pictures_to_compare(folder: Path | None, side: int) -> Iterator[tuple[str, bytes]]:
    """Films of several shapes, and the pictures of a folder, enlarged to a film's size if they are smaller."""
    shapes = [(1, 1), (1.22, 1), (1, 1.22), (0.987, 0.9866), (0.66, 0.83), (1.3125, 1.3125), (1.47, 1.17)]
    for seed, (across, down) in enumerate(shapes):
        width, height = round(side * across), round(side * down)
        yield f"film {width} x {height}", radiographs.as_jpeg(radiographs.film(width, height, seed))
    for number, path in enumerate(sorted(folder.iterdir()) if folder is not None else []):
        with Image.open(path) as image:
            factor = side / max(image.size)
            size = (round(image.width * factor), round(image.height * factor))
            picture = image.convert("L").resize(size, Image.Resampling.LANCZOS) if factor > 1 else image.convert("L")
        yield f"real film {number + 1}", radiographs.as_jpeg(picture)


def compare(args: argparse.Namespace) -> dict[str, float]:
    """Print the table of differences; returns the worst of each column."""
    common.say(f"\nscaled against exact decoding, grey levels after preprocessing to {args.size} pixels")
    common.say(
        "| picture | image mode | scale | mean | 99.9th percentile | largest |\n| --- | --- | --- | --- | --- | --- |"
    )
    worst: dict[str, list[tuple[int, float, float, float]]] = {"pad": [], "square": []}
    for name, content in pictures_to_compare(args.films, args.side):
        for mode, found in worst.items():
            one = difference(content, args.size, mode)
            if one is None:
                continue
            found.append(one)
            if not name.startswith("real"):
                common.say(f"| {name} | {mode} | 1/{one[0]} | {one[1]:.3f} | {one[2]:.1f} | {one[3]:.0f} |")
    everything = [one for found in worst.values() for one in found]
    mean, high, largest = (max(one[column] for one in everything) for column in (1, 2, 3))
    common.say(f"| worst of {len(everything)} | | | {mean:.3f} | {high:.1f} | {largest:.0f} |")
    return {"scaled_mean": mean, "scaled_p999": high}


def report(title: str, rounds: Sequence[dict[str, float]], num: int) -> dict[str, float]:
    """Print pictures a second of each side; returns the ratios (above 1: ours is faster)."""
    rates = {name: num / common.median([taken[name] for taken in rounds]) for name in rounds[0]}
    common.say(
        f"| {title} | "
        + " | ".join(f"{rates.get(n, 0):.1f}" for n in ("originals", "datasets", "ours"))
        + " | "
        + (f"{rates['scaled']:.1f} |" if "scaled" in rates else "- |")
    )
    others = ("originals", "datasets")
    ratios = {"": common.median([min(taken[other] for other in others) / taken["ours"] for taken in rounds])}
    if "scaled" in rates:
        ratios["_scaled"] = common.median([min(taken[o] for o in others) / taken["scaled"] for taken in rounds])
        ratios["_scaled_vs_exact"] = common.median([taken["ours"] / taken["scaled"] for taken in rounds])
    return ratios


def main(argv: Sequence[str] | None = None) -> None:
    """Make the files, check that the sides agree, run the rounds, print the tables."""
    parser = Parser(prog="python -m benchmarks.data_loading", description="Loading pictures: ours and others.")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured")
    parser.add_argument("--num", type=int, default=16, help="large films a round")
    parser.add_argument("--side", type=int, default=2048, help="pixels on a side of a film")
    parser.add_argument("--size", type=int, default=336, help="pixels on a side of the model's input")
    parser.add_argument("--workers", default="0,1,2", help="numbers of loading processes")
    parser.add_argument("--films", type=Path, help="folder of real films for the table of differences")
    parser.add_switch("--quick", help="one small round of everything, to see that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.num, args.side, args.size, args.workers = 1, 4, 300, 56, "0,1"
    torch.set_num_threads(1)
    common.say(common.machine())
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = {name: write(kind, Path(folder), name) for name, kind in kinds(args.side, args.num).items()}
        common.say("pictures a second (medians)\n| files, workers | originals | datasets | ours | ours, scaled |")
        common.say("| --- | --- | --- | --- | --- |")
        for name, kind in kinds(args.side, args.num).items():
            check_equal(name, made[name][:4], args.size)
            for num_workers in map(int, args.workers.split(",")):
                rounds = measure(made[name], num_workers, args, scaled=kind.is_scaled)
                found = report(f"{name}, {num_workers}", rounds, len(made[name]))
                ratios |= {f"load_{name}{which}_w{num_workers}": ratio for which, ratio in found.items()}
    common.say_ratios(ratios | compare(args))


def write(kind: Kind, folder: Path, name: str) -> list[Path]:
    """Write the files of a kind; returns their paths."""
    suffix = {"dicom": ".dcm"}.get(name, "." + name.rsplit("_", 1)[-1].replace("jpeg", "jpg"))
    place = folder / name
    place.mkdir()
    paths = [place / f"{number}{suffix}" for number in range(kind.num)]
    for number, path in enumerate(paths):
        path.write_bytes(kind.make(number))
    return paths


if __name__ == "__main__":
    main()
