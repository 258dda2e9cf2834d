"""Commands of the delta and merge tools; torch is imported after the options are parsed."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.constants import DTYPES
from llava.errors import CheckpointError
from llava.model.checkpoint.files.shards import open_tensors
from llava.model.checkpoint.folder import check_links, copy_companions
from llava.model.checkpoint.formats import CONFIG_FILE, read_json
from llava.model.checkpoint.legacy_keys import ARCHITECTURES
from llava.model.checkpoint.weight_names import is_buffer, projector_suffix
from llava.utils.cli import Parser
from llava.utils.folders import new_folder
from llava.utils.jsonl import write_json
from llava.utils.log import with_progress
from llava.utils.plugins import add_plugin_option
from llava.utils.terminal import write_out

if TYPE_CHECKING:
    from llava.model.checkpoint.tools.delta import WriteOptions

GIGABYTE = 10**9

UPGRADES = {
    "llama": {"model_type": "llava", "architectures": [ARCHITECTURES["llama"]]},
    "mistral": {"model_type": "llava_mistral", "architectures": [ARCHITECTURES["mistral"]]},
}
"""Corrections by type for early training, which wrote a plain language model although a projector is inside."""


def _parser(prog: str, about: str, example: str) -> Parser:
    parser = Parser(prog=prog, description=about, epilog=f"example: {prog} {example}")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest shard in gigabytes")
    return parser


def _delta_parser(prog: str, about: str, example: str) -> Parser:
    parser = _parser(f"python -m llava.model.{prog}", about, example)
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="dtype of arithmetic and result")
    parser.add_switch("--bin", help="write pytorch_model.bin files instead of safetensors")
    return parser


def _shard_bytes(args: Namespace) -> int:
    if args.max_shard_gb <= 0:
        raise CheckpointError(f"--max-shard-gb is {args.max_shard_gb}; expected a number above 0")
    return int(args.max_shard_gb * GIGABYTE)


def _writing(args: Namespace) -> WriteOptions:
    from llava.model.checkpoint.tools import delta

    return delta.WriteOptions(delta.DTYPES[args.dtype], _shard_bytes(args), safe=not args.bin)


def apply_delta(argv: Sequence[str] | None = None) -> None:
    """Run `python -m llava.model.apply_delta`."""
    about = "Add a delta to the language model it was made from, tensor by tensor."
    parser = _delta_parser("apply_delta", about, "--base llama-7b --target llava-7b --delta llava-7b-delta")
    parser.add_argument("--base-model-path", type=Path, required=True, help="folder of the base")
    parser.add_argument("--target-model-path", type=Path, required=True, help="new folder")
    parser.add_argument("--delta-path", type=Path, required=True, help="folder of the delta")
    parser.add_switch("--verify", help="compare the result with the checksum in the delta")
    args = parser.parse_args(argv)
    from llava.model.checkpoint.tools import delta

    found = delta.write_target(
        args.base_model_path, args.delta_path, args.target_model_path, _writing(args), verify=args.verify
    )
    if found == "unknown base":
        sys.stderr.write("the delta does not name its base; shapes fit, but the base was not checked further\n")
    write_out(f"{args.target_model_path}: base + delta, {args.dtype}, {found}\n")


def make_delta(argv: Sequence[str] | None = None) -> None:
    """Run `python -m llava.model.make_delta`."""
    about = "Write the difference between a model and its base, tensor by tensor."
    parser = _delta_parser("make_delta", about, "--base llama-7b --target llava-7b --delta llava-7b-delta")
    parser.add_argument("--base-model-path", type=Path, required=True, help="folder of the base")
    parser.add_argument("--target-model-path", type=Path, required=True, help="folder of the model")
    parser.add_argument("--delta-path", type=Path, required=True, help="new folder")
    parser.add_argument("--hub-repo-id", help="hub repository to which the delta is also uploaded")
    args = parser.parse_args(argv)
    from llava.model.checkpoint.tools import delta

    record = delta.write_delta(args.base_model_path, args.target_model_path, args.delta_path, _writing(args))
    write_out(f"{args.delta_path}: target - base, {args.dtype}, result sha256 {record['result_sha256']}\n")
    if args.hub_repo_id:
        _upload(args.delta_path, args.hub_repo_id)


def _upload(folder: Path, repo_id: str) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    except Exception as error:  # the hub client raises many types of errors; the folder is complete in any case
        reason = str(error).strip().splitlines()[:1]
        raise CheckpointError(f"{folder} was written, but not uploaded to {repo_id}: {' '.join(reason)}") from error


def consolidate_main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m llava.model.consolidate`."""
    about = "Rewrite a checkpoint with one dtype and even shards, without rotary tables and training state."
    parser = _delta_parser("consolidate", about, "--src checkpoint-1000 --dst llava-7b")
    parser.add_argument("--src", type=Path, required=True, help="folder of a model")
    parser.add_argument("--dst", type=Path, required=True, help="new folder")
    args = parser.parse_args(argv)
    from llava.model.checkpoint.tools import delta

    writing = _writing(args)
    check_links(args.src)
    with open_tensors(args.src) as source, new_folder(args.dst) as folder:
        names = [name for name in source.names if not is_buffer(name)]
        with delta.shard_writer(folder, writing) as writer:
            for name in with_progress(names, title="consolidate", unit="tensor"):
                writer.add(name, delta.in_dtype(source.read(name), writing.dtype))
        copy_companions(args.src, folder, dtype=writing.dtype)
        _upgrade(folder, names)
    write_out(f"{args.dst}: {len(names)} tensors, {args.dtype}\n")


def _upgrade(folder: Path, names: Sequence[str]) -> None:
    """Correct the type in an early configuration, by the weights and without asking as the original did."""
    config = read_json(folder / CONFIG_FILE)
    upgrade = UPGRADES.get(str(config.get("model_type")))
    if upgrade is not None and any(projector_suffix(name) is not None for name in names):
        write_json(folder / CONFIG_FILE, {**config, **upgrade})


def merge_lora_weights(argv: Sequence[str] | None = None) -> None:
    """Run `python scripts/merge_lora_weights.py`."""
    about = "Add a LoRA adapter to the weights it was trained on and write a whole model, tensor by tensor."
    example = "--model-path llava-rad --model-base vicuna-7b-v1.5 --save-model-path llava-rad-merged"
    parser = _parser("python scripts/merge_lora_weights.py", about, example)
    parser.add_argument("--model-path", required=True, help="folder of the adapter")
    parser.add_argument("--model-base", help="language model it was trained on; for a tower's adapter, the tower")
    parser.add_argument("--save-model-path", type=Path, required=True, help="new folder")
    parser.add_switch("--include-vision-tower", help="put the vision tower and mm_projector.bin into the folder too")
    parser.add_argument("--vision-tower", help="folder or hub name, instead of the one that the adapter names")
    parser.add_argument("--lora-pretrain", help="the tower's own adapter, if it is not inside the folder")
    add_plugin_option(parser)
    args = parser.parse_args(argv)
    from llava.model.checkpoint.assemble import LoadOptions
    from llava.model.checkpoint.tools.merge_lora import merge_lora

    merge_lora(
        args.model_path,
        args.model_base,
        args.save_model_path,
        options=LoadOptions(vision_tower=args.vision_tower, tower_adapter=args.lora_pretrain),
        include_tower=args.include_vision_tower,
        max_shard_bytes=_shard_bytes(args),
    )
    write_out(f"{args.save_model_path}: {args.model_path} merged\n")
