"""Write an open_clip tower's vision trunk as a transformers folder, a seventh of the file's size.

Command:
    python -m llava.model.multimodal_encoder.open_clip_encoder.convert --vision-tower-config biomedclip_cxr_518.json \
        --vision-tower-checkpoint biomedclipcxr_518_checkpoint.pt --out towers/biomedclip_cxr_518
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llava.model.multimodal_encoder.open_clip_encoder.loading import OpenClipFiles, find_files, load_trunk
from llava.model.multimodal_encoder.open_clip_encoder.trunks import open_clip_image_processor
from llava.utils.cli import Parser, run_program
from llava.utils.folders import new_folder
from llava.utils.lookup import lookup

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert_trunk(files: OpenClipFiles, target: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write the trunk and its image processor to a folder for `--vision-tower`.

    Args:
        files: files of the open_clip tower.
        target: new folder, which appears when it is complete.
        dtype: dtype of the weights.

    Raises:
        CheckpointError: the files do not hold a known trunk, or `target` holds files; nothing is written then.
    """
    trunk = load_trunk(files, dtype)
    processor = open_clip_image_processor(files.model_config, files.preprocess)
    with new_folder(Path(target)) as folder:
        trunk.save_pretrained(folder)
        processor.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and convert."""
    parser = Parser(description="Write an open_clip tower's vision trunk as a transformers folder.")
    parser.add_argument("--vision-tower", default="", help="folder, local-dir: or hf-hub: name of the tower")
    parser.add_argument("--vision-tower-config", help="open_clip model configuration, for a tower without a folder")
    parser.add_argument("--vision-tower-checkpoint", help="open_clip weights")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--dtype", default="float32", help=f"dtype of the weights: {', '.join(DTYPES)}")
    given = parser.parse_args(argv)
    files = find_files(given.vision_tower, given.vision_tower_config, given.vision_tower_checkpoint)
    convert_trunk(files, given.out, dtype=lookup(DTYPES, given.dtype, "dtype"))


if __name__ == "__main__":
    run_program(main)
