"""Benchmark of loading images: our loader, the originals' dataset, and the `datasets` library.

python -m benchmarks.data_loading [--rounds 5] [--workers 0,1,2] [--films DIR] [--quick]

    files --each side's loader--> [N, 3, 336, 336]      (batches of 8, `--workers` processes, one thread each)

- originals: open, convert to RGB, pad to a square, image processor, all in `__getitem__`, without a cache.
- datasets: the same steps as the transform of a `datasets.Dataset` of file names.
- ours: `ImageStore`, exact; and for large gray JPEG files with `--fast-jpeg`. Computing its digests is counted.

All sides use one image processor and give the same numbers bit for bit, except for scaled decoding (see the table of
differences) and 16-bit images (Pillow does not window them, so the other sides do it as usual scripts do).
The other sides read DICOM with the usual few lines of pydicom. The order of sides alternates, the first round is not
counted, files are in the page cache, and our cache is empty at the start of each round.
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
"""Mean color of CLIP in 8 bits, the border of the originals."""

Batches = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True, slots=True)
class Kind:
    """Kind of files: their number, the bytes of file `n`, and whether scaled decoding has an effect."""

    num: int
    make: Callable[[int], bytes]
    is_scaled: bool = False


def kinds(side: int, num: int) -> dict[str, Kind]:
    """Return the kinds of files; synthetic X-ray images have `side` x `side` pixels."""
    small = side * 800 // 2048, side * 600 // 2048
    return {
        "grey_jpeg": Kind(num, lambda n: radiographs.as_jpeg(radiographs.film(side, side, n)), is_scaled=True),
        "figure_jpeg": Kind(2 * num, lambda n: radiographs.as_jpeg(radiographs.figure(*small, n), quality=85)),
        "figure_png": Kind(2 * num, lambda n: radiographs.as_png(radiographs.figure(*small, n))),
        "deep_png": Kind(num // 2, lambda n: radiographs.as_deep_png(radiographs.film(side, side, n), n)),
        "dicom": Kind(num // 2, lambda n: radiographs.as_dicom(radiographs.film(side, side, n), n)),
    }


def image_processor(size: int) -> CLIPImageProcessorPil:
    """Return the image processor of every side."""
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def our_processor(size: int, *, mode: str = "pad", fast: bool = False) -> LlavaMedProcessor:
    """Return our processor with that image processor."""
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
    """Return an image in RGB as usual scripts open it; 16-bit and DICOM images get their full range."""
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
    """Return the image in the center of a square of the mean color."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), FILL)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


class OriginalsData(Dataset[Tensor]):
    """Dataset that opens and preprocesses an image for every access."""

    def __init__(self, paths: Sequence[Path], processor: Any) -> None:
        self.paths, self.processor = paths, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        image = expand_to_square(open_usual(self.paths[row]))
        pixels: Tensor = self.processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
        return pixels


class OurData(Dataset[Tensor]):
    """Dataset that gets images by key from a new, empty store, as the training loader does."""

    def __init__(self, paths: Sequence[Path], processor: LlavaMedProcessor) -> None:
        self.names = [path.name for path in paths]
        self.store = ImageStore(ImageIndex(paths[0].parent), processor)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> Tensor:
        return self.store.pixels(self.store.key(self.names[row]))


def library_data(paths: Sequence[Path], processor: Any) -> Any:
    """Return a `datasets.Dataset` of the file names with the processor as transform."""
    datasets = require("datasets", "data")

    def transform(rows: dict[str, list[str]]) -> dict[str, Any]:
        images = [expand_to_square(open_usual(Path(path))) for path in rows["path"]]
        return {"pixel_values": processor(images=images, return_tensors="pt")["pixel_values"]}

    made = datasets.Dataset.from_dict({"path": [str(path) for path in paths]})
    made.set_transform(transform)
    return made


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def batches(data: Any, num_workers: int) -> Iterator[Tensor]:
    """Yield a data set in batches."""
    loader: Any = DataLoader(data, batch_size=BATCH_SIZE, num_workers=num_workers, worker_init_fn=_one_thread)
    for batch in loader:
        yield batch["pixel_values"] if isinstance(batch, dict) else batch


def sides_of(paths: Sequence[Path], num_workers: int, size: int, *, scaled: bool) -> dict[str, Batches]:
    """Return the sides by name; the first two are not ours."""
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
    """Return the seconds of loading all files."""
    start = time.perf_counter()
    count = sum(len(batch) for batch in side())
    taken = time.perf_counter() - start
    assert count == expected, f"loaded {count} of {expected} images"
    return taken


def measure(
    paths: Sequence[Path], num_workers: int, args: argparse.Namespace, *, scaled: bool
) -> list[dict[str, float]]:
    """Return the seconds of every side in each counted round."""
    sides = sides_of(paths, num_workers, args.size, scaled=scaled)
    rounds = []
    for number in range(args.rounds + 1):
        order = list(sides) if number % 2 else list(reversed(sides))
        taken = {name: seconds_of(sides[name], len(paths)) for name in order}
        if number:
            rounds.append({name: taken[name] for name in sides})
    return rounds


def check_equal(name: str, paths: Sequence[Path], size: int) -> None:
    """Check that all sides load the same numbers, up to windowing of 16-bit images.

    Raises:
        AssertionError: two sides differ.
    """
    sides = sides_of(paths, 0, size, scaled=False)
    first, *others = (torch.cat(list(side())) for side in sides.values())
    for other in others:
        if name in ("deep_png", "dicom"):
            levels = (first - other).abs().mean() * 0.27 * 255
            assert levels < 2, f"{name}: the sides differ by {levels:.2f} gray levels; expected less than 2"
        else:
            assert torch.equal(first, other), f"{name}: the sides load different numbers"


def difference(content: bytes, size: int, mode: str) -> tuple[int, float, float, float] | None:
    """Return the difference in gray levels of scaled to exact decoding after preprocessing.

    Returns:
        the divisor, and the mean, 99.9th percentile and largest difference; None for an image that is not scaled.
    """
    exact, fast = our_processor(size, mode=mode), our_processor(size, mode=mode, fast=True)
    opened = fast.open(content)
    if opened.scale == 1:
        return None
    deviation = torch.tensor(image_processor(size).image_std)[:, None, None] * 255
    off = ((fast.preprocess(opened) - exact.preprocess(exact.open(content))).abs() * deviation).numpy()
    return opened.scale, float(off.mean()), float(np.percentile(off, 99.9)), float(off.max())


def images_to_compare(folder: Path | None, side: int) -> Iterator[tuple[str, bytes]]:
    """Yield names and JPEG bytes of synthetic and real images of at least `side` pixels."""
    shapes = [(1, 1), (1.22, 1), (1, 1.22), (0.987, 0.9866), (0.66, 0.83), (1.3125, 1.3125), (1.47, 1.17)]
    for seed, (across, down) in enumerate(shapes):
        width, height = round(side * across), round(side * down)
        yield f"synthetic {width} x {height}", radiographs.as_jpeg(radiographs.film(width, height, seed))
    for number, path in enumerate(sorted(folder.iterdir()) if folder is not None else []):
        with Image.open(path) as image:
            factor = side / max(image.size)
            size = (round(image.width * factor), round(image.height * factor))
            gray = image.convert("L")
            resized = gray.resize(size, Image.Resampling.LANCZOS) if factor > 1 else gray
        yield f"real image {number + 1}", radiographs.as_jpeg(resized)


def compare(args: argparse.Namespace) -> dict[str, float]:
    """Print the table of differences; return the worst of each column."""
    common.say(f"\nscaled against exact decoding, gray levels after preprocessing to {args.size} pixels")
    common.say(
        "| image | image mode | scale | mean | 99.9th percentile | largest |\n| --- | --- | --- | --- | --- | --- |"
    )
    worst: dict[str, list[tuple[int, float, float, float]]] = {"pad": [], "square": []}
    for name, content in images_to_compare(args.films, args.side):
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
    """Print images per second of each side; return the ratios (above 1: ours is faster)."""
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
    """Make the files, check that the sides agree, run the rounds, and print the tables."""
    parser = Parser(
        prog="python -m benchmarks.data_loading", description="Benchmark of loading images: ours and others."
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    parser.add_argument("--num", type=int, default=16, help="number of large images per round")
    parser.add_argument("--side", type=int, default=2048, help="side of a large image in pixels")
    parser.add_argument("--size", type=int, default=336, help="side of the model input in pixels")
    parser.add_argument("--workers", default="0,1,2", help="numbers of loader processes")
    parser.add_argument("--films", type=Path, help="folder of real X-ray images for the table of differences")
    parser.add_switch("--quick", help="one small round, as a test")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.num, args.side, args.size, args.workers = 1, 4, 300, 56, "0,1"
    torch.set_num_threads(1)
    common.say(common.machine())
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = {name: write(kind, Path(folder), name) for name, kind in kinds(args.side, args.num).items()}
        common.say("images per second (medians)\n| files, workers | originals | datasets | ours | ours, scaled |")
        common.say("| --- | --- | --- | --- | --- |")
        for name, kind in kinds(args.side, args.num).items():
            check_equal(name, made[name][:4], args.size)
            for num_workers in map(int, args.workers.split(",")):
                rounds = measure(made[name], num_workers, args, scaled=kind.is_scaled)
                found = report(f"{name}, {num_workers}", rounds, len(made[name]))
                ratios |= {f"load_{name}{which}_w{num_workers}": ratio for which, ratio in found.items()}
    common.say_ratios(ratios | compare(args))


def write(kind: Kind, folder: Path, name: str) -> list[Path]:
    """Write the files of a kind; return their paths."""
    suffix = {"dicom": ".dcm"}.get(name, "." + name.rsplit("_", 1)[-1].replace("jpeg", "jpg"))
    place = folder / name
    place.mkdir()
    paths = [place / f"{number}{suffix}" for number in range(kind.num)]
    for number, path in enumerate(paths):
        path.write_bytes(kind.make(number))
    return paths


if __name__ == "__main__":
    main()
