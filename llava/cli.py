"""The `llava` command: one name for training, evaluation, chat, data inspection and the quickstart.

    llava COMMAND [flags]  --lookup-->  COMMANDS[COMMAND]  --import only now-->  function(flags)

A command's module is imported when that command runs, so `llava --help` costs nothing: neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava.utils.cli import run_program
from llava.utils.lookup import lookup


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand: its function (`module:function`, called with the rest of argv) and what help says of it."""

    target: str
    summary: str
    example: str


COMMANDS: dict[str, Command] = {
    "train": Command(
        "llava.train.run:run_sft",
        "train a model: alignment, instruction tuning, downstream fine-tuning; full, LoRA or QLoRA",
        "llava train --model_name_or_path LM --vision_tower TOWER --data_path train.json --image_folder images "
        "--output_dir runs/first",
    ),
    "eval": Command(
        "llava.eval.run:main",
        "answer and score questions about images, with intervals and the blank-image control",
        "llava eval --model runs/first --data test.json --image-folder images --out runs/first/eval",
    ),
    "chat": Command(
        "llava.serve.cli:main",
        "ask a trained model about a picture, in the terminal",
        "llava chat --model runs/first --image picture.png",
    ),
    "data show": Command(
        "llava.data.show:main",
        "show one row as the model will see it: text, trained tokens, image positions, ids, truncation",
        "llava data show train.json --row 3 --model runs/first",
    ),
    "data align": Command(
        "llava.data.converters.alignment:main",
        "make alignment captions from what question-answer rows already state about each picture",
        "llava data align train.json --root data --out align.json",
    ),
    "data dicom": Command(
        "llava.data.dicom.rows:main",
        "a folder of DICOM studies to rows: modality, part, view, texts from a table; patients by hashed keys",
        "llava data dicom studies --out rows.json --salt_file salt.txt",
    ),
    "data deid": Command(
        "llava.data.dicom.deid:main",
        "what in DICOM files may tell whose they are, writing in pictures too; clean copies with new identifiers",
        "llava data deid studies --out clean --salt_file salt.txt --report found.json",
    ),
    "data download": Command(
        "llava.data.download.published:main",
        "fetch the published data files, check them, then fetch their images; `sh download_data.sh` is the same",
        "llava data download --only instruct --images False",
    ),
    "data images": Command(
        "llava.data.download.pmc:main",
        "fetch the listed figures of PMC articles; continues, and lists what is missing and why",
        "llava data images --input_path data/llava_med_image_urls.jsonl --only train.json --filter-json train.json",
    ),
    "data vqa-rad": Command(
        "llava.data.converters.vqa_rad:main",
        "VQA-RAD as downloaded to train.json, test.json and images/",
        "llava data vqa-rad downloads/vqa-rad --out data/vqa-rad",
    ),
    "data slake": Command(
        "llava.data.converters.slake:main",
        "SLAKE as downloaded to train.json, val.json, test.json and images/; English, Chinese or both",
        "llava data slake downloads/slake imgs.zip --out data/slake --lang en",
    ),
    "data pathvqa": Command(
        "llava.data.converters.pathvqa:main",
        "PathVQA (Parquet or JSON, never pickles) to train.json, val.json, test.json and images/",
        "llava data pathvqa downloads/path-vqa --out data/pathvqa",
    ),
    "data pmc-vqa": Command(
        "llava.data.converters.pmc_vqa:main",
        "PMC-VQA, either release, to train.json, test.json and images/; open answers or choices",
        "llava data pmc-vqa downloads images_2.zip --out data/pmc-vqa --release 2",
    ),
    "data iu-xray": Command(
        "llava.data.converters.iu_xray:main",
        "IU X-ray (Open-i) reports and films to train.json, val.json, test.json and images/",
        "llava data iu-xray NLMCXR_reports.tgz NLMCXR_png.tgz --views all --out data/iu-xray",
    ),
    "data mimic-cxr": Command(
        "llava.data.converters.mimic_cxr:main",
        "MIMIC-CXR (credentialed) findings or impressions to train.json, val.json, test.json and images/",
        "llava data mimic-cxr mimic-cxr-jpg mimic-cxr-reports.zip --out data/mimic-cxr --target findings",
    ),
    "data csv": Command(
        "llava.data.converters.csv_table:main",
        "any table (CSV, TSV, JSON, JSON lines, Parquet) to rows, by the names of its columns",
        "llava data csv cases.csv --image_column file --answer_column report --image_root scans --out data/cases",
    ),
    "data split": Command(
        "llava.data.converters.split:main",
        "rows to train, val and test so that no patient, or no picture, is in two of them",
        "llava data split all.json --by patient --fractions train=0.8,val=0.1,test=0.1 --out data/split",
    ),
    "instruct generate": Command(
        "llava.instruct.generate:main",
        "let a language model write dialogues about figures from their captions; continues where it stopped",
        "llava instruct generate --input_path captions.json --output_path gen.jsonl --use_inline_mentions --dry_run",
    ),
    "instruct postprocess": Command(
        "llava.instruct.postprocess:main",
        "make training data of generated dialogues, and say what every rule did",
        "llava instruct postprocess --input_path gen.jsonl --output_path train.json",
    ),
    "data mix": Command(
        "llava.data.mixture:main",
        "write the rows of a mixture as one data file, each with its source and licence",
        "llava data mix mixture.yaml --out rows.json",
    ),
    "data check": Command(
        "llava.data.check.cli:main",
        "what is wrong with a data file and its pictures, and what it shares with a test file; exit 1 on errors",
        "llava data check train.json --images images --against test.json --html check.html --fix clean.json",
    ),
    "checkpoint inspect": Command(
        "llava.model.checkpoint.tools.inspection:main",
        "what a checkpoint of any kind holds, tensor by tensor; reads no weights",
        "llava checkpoint inspect checkpoints/llava-med",
    ),
    "checkpoint doctor": Command(
        "llava.model.checkpoint.tools.doctor:main",
        "what would go wrong with a checkpoint, and what to do about it",
        "llava checkpoint doctor checkpoints/llava-med --weights",
    ),
    "checkpoint convert": Command(
        "llava.model.checkpoint.tools.convert:convert_main",
        "write a checkpoint in another layout: ours, the originals', transformers'",
        "llava checkpoint convert checkpoints/llava-med runs/llava-med",
    ),
    "checkpoint export": Command(
        "llava.model.checkpoint.tools.convert:export_main",
        "write a checkpoint for transformers and vLLM (hf, peft) or for the originals' code (legacy)",
        "llava checkpoint export runs/first runs/first-hf --to hf",
    ),
    "checkpoint diff": Command(
        "llava.model.checkpoint.tools.diff:main",
        "what two checkpoints differ in, tensor by tensor, whatever their layouts",
        "llava checkpoint diff runs/first runs/second",
    ),
    "quickstart": Command(
        "llava.quickstart.run:main",
        "from nothing to a model you can ask: draw data, align, tune, evaluate, write a page",
        "llava quickstart --out runs/quickstart",
    ),
}

USAGE = "usage: llava COMMAND [flags]      (flags of a command: llava COMMAND --help)"


def overview(commands: Mapping[str, Command] = COMMANDS) -> str:
    """Return the text of `llava --help`: every command with its summary and one example."""
    lines = [USAGE, ""]
    for name, command in commands.items():
        lines += [f"  {name:<22}{command.summary}", f"{'':24}{command.example}", ""]
    return "\n".join(lines).rstrip()


def split(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command's name and the rest of argv; a name may be two words (`data show`)."""
    two_words = " ".join(argv[:2])
    return (two_words, list(argv[2:])) if two_words in COMMANDS else (argv[0], list(argv[1:]))


def group(name: str) -> dict[str, Command]:
    """Return the commands whose first word is `name` while `name` alone is not a command (`data`)."""
    return {key: command for key, command in COMMANDS.items() if key.split()[0] == name != key}


def run(argv: Sequence[str]) -> None:
    """Run one command.

    Raises:
        ConfigError: the command is unknown.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview() + "\n")
        return
    name, rest = split(argv)
    members = group(name)
    if members and (not rest or rest[0] in ("-h", "--help")):
        sys.stdout.write(overview(members) + "\n")
        return
    command = lookup(COMMANDS, " ".join([name, *rest[:1]]) if members else name, "command")
    if "-h" in rest or "--help" in rest:
        sys.stdout.write(f"llava {name}: {command.summary}\nexample: {command.example}\n\n")
        sys.stdout.flush()
    module, function = command.target.split(":")
    getattr(importlib.import_module(module), function)(rest)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of the console script; deliberate errors end with their message and status 2."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    run_program(lambda: run(arguments))


if __name__ == "__main__":
    main()
