"""Download the figures of the PMC articles that the published data refers to.

Example::

    python llava/data/download_images.py --input_path data/llava_med_image_urls.jsonl \\
        --pmc_output_path data/pmc_articles/ --images_output_path data/images/
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.data.download import pmc
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    pmc.main(argv, prog="download_images.py")


if __name__ == "__main__":
    run_program(main)
