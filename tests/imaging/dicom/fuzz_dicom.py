"""Coverage-guided fuzzing of DICOM decoding: all bytes give an image or an error of this package.

python -m tests.imaging.dicom.fuzz_dicom -max_total_time=60      a run of one minute; needs atheris (extra `dev`)
python -m tests.imaging.dicom.fuzz_dicom CORPUS_DIR -runs=100000 keeps what it finds
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pydicom", "llava.data"]):
    from llava.errors import LlavaError
    from llava.imaging import decode
    from llava.imaging.dicom import render

from tests.support.dicom_files import corpus

MAX_SEED = 12_000
"""Largest size of a seed file; mutations of the pixels of longer files find nothing."""

MAX_PIXELS = 1 << 20
"""Smaller limit than in use, so that one input takes little time."""


def test_one_input(data: bytes) -> None:
    """Decode one file; every exception but an error of this package is a finding."""
    try:
        decode.load_image(data)
        image = render.render_frame(data, render.DicomPolicy(), name="fuzzed", max_pixels=MAX_PIXELS)
        assert image.mode in ("L", "RGB")
    except LlavaError:
        pass


def main() -> None:
    """Fuzz from the small packaged files."""
    decode.MAX_PIXELS = MAX_PIXELS
    with tempfile.TemporaryDirectory() as folder:
        for name, path in corpus():
            if path.stat().st_size <= MAX_SEED:
                Path(folder, name).write_bytes(path.read_bytes())
        atheris.Setup([*sys.argv, folder], test_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
