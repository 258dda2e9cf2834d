"""Answering commands: chat questions, medical VQA questions, and the latter in one process per chunk.

model_vqa, model_vqa_med       questions --answer--> answers file
run_med_datasets_eval_batch    the same in chunks: a queue of processes over the devices, joined in order
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

from llava.errors import ConfigError, GenerationError
from llava.eval.inference import AnswerOptions, AnswerRun, AnswerSummary
from llava.eval.options import (
    FIRST_MODEL_HELP,
    MORE_MODEL_OPTIONS,
    add_model_options,
    connected_model,
    model_id_of,
    sampling_of,
    warn_no_effect,
)
from llava.eval.questions import PromptForm
from llava.generation.fingerprint import join_settings, model_settings, read_settings
from llava.generation.options import engine_of
from llava.utils import log
from llava.utils.cli import Parser, check_folder
from llava.utils.files import exclusive_file
from llava.utils.json_rows import read_records
from llava.utils.jsonl import write_records

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 1024
"""Default limit of an answer in the published commands."""


EXAMPLE = (
    "example: python llava/eval/{prog} --model-name runs/first --question-file test.json --image-folder images "
    "--answers-file answers.jsonl"
)
"""Last line of the help of an answering command."""


def make_parser(prog: str, description: str) -> Parser:
    """Return a parser with the options that the answering commands share."""
    parser = Parser(prog=prog, description=description, epilog=EXAMPLE.format(prog=prog))
    add_model_options(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--question-file", required=True, help="JSON array or JSON lines, VQA rows or chat questions")
    files.add_argument("--image-folder", default=None, help="folder of the images")
    files.add_argument("--answers-file", required=True, help="JSON lines, one answer per line; resumed if unfinished")
    files.add_argument("--num-chunks", type=int, default=1, help="number of chunks that the questions are divided into")
    files.add_argument("--chunk-idx", type=int, default=0, help="index of the chunk to answer")
    files.add_argument("--batch-size", type=int, default=64, help="questions passed to the engine at once")
    parser.add_switch("--resume", default=True, help="keep the answers that the file already holds")
    parser.add_switch("--blank-images", help="replace every image by a gray square")
    parser.add_switch("--with-options", help="append the two options to closed yes/no questions")
    parser.add_switch("--answer-prompter", help="ask for a short answer after the long one")
    parser.show_first(
        {"files": ("--question-file", "--image-folder", "--answers-file"), **FIRST_MODEL_HELP}, MORE_MODEL_OPTIONS
    )
    return parser


def run_answering(args: Namespace, form: PromptForm) -> AnswerSummary:
    """Answer one chunk of a question file; the model is loaded only if questions are pending."""
    log.setup_logging()
    check_folder(args.image_folder, "--image-folder")
    args = connected_model(args)
    warn_no_effect(args)
    options = AnswerOptions(
        image_folder=args.image_folder,
        sampling=sampling_of(args, max_new_tokens=MAX_NEW_TOKENS),
        model_id=model_id_of(args),
        form=form,
        choices=args.with_options,
        answer_prompter=args.answer_prompter,
        blank_images=args.blank_images,
        settings=model_settings(args),
    )
    with exclusive_file(args.answers_file, option="--answers-file"):
        run = AnswerRun(
            args.question_file,
            args.answers_file,
            num_chunks=args.num_chunks,
            chunk_idx=args.chunk_idx,
            resume=args.resume,
            options=options,
        )
        engine = engine_of(args) if run.pending else None
        summary = run.finish(engine, batch_size=args.batch_size)
    logger.info("%d answers (%d kept) in %.1f s", summary.num_questions, summary.num_resumed, summary.seconds)
    return summary


def model_vqa(argv: Sequence[str] | None = None) -> None:
    """Answer chat questions."""
    parser = make_parser("model_vqa.py", "Answer the questions of a chat evaluation.")
    parser.add_argument(
        "--prompt-form",
        choices=get_args(PromptForm),
        default="raw",
        help="how rows repeat the question: raw (as in the file and in v1.0), tagged (with the placeholder after it), "
        "or plain (without the placeholder, as in v1.5)",
    )
    args = parser.parse_args(argv)
    run_answering(args, args.prompt_form)


def model_vqa_med(argv: Sequence[str] | None = None) -> None:
    """Answer medical VQA questions."""
    run_answering(make_parser("model_vqa_med.py", "Answer medical VQA questions.").parse_args(argv), "tagged")


def run_batch(argv: Sequence[str] | None = None) -> None:
    """Answer medical VQA questions with one process per chunk and join the chunks in order.

    Raises:
        ConfigError: existing chunk files were written with another number of chunks.
        GenerationError: a chunk failed; finished answers are kept, and the same command resumes.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser("run_med_datasets_eval_batch.py", "Answer medical VQA questions, one process per chunk.")
    parser.add_argument("--devices", help="device numbers, e.g. 0,1,2 (default: all); chunks wait for a free device")
    args = parser.parse_args(words)
    log.setup_logging()
    check_folder(args.image_folder, "--image-folder")
    if args.num_chunks < 1:
        raise ConfigError(f"--num-chunks must be at least 1, got {args.num_chunks}")
    parts = [chunk_path(args.answers_file, index) for index in range(args.num_chunks)]
    if args.resume:
        _refuse_other_division(parts, args.num_chunks)
    devices = _devices(args)
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    def answer(index: int) -> int:
        device = free.get()
        try:
            return _run_chunk(words, args.num_chunks, index, parts[index], device)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        codes = list(log.with_progress(pool.map(answer, range(len(parts))), title="chunks", total=len(parts)))
    failed = [str(index) for index, code in enumerate(codes) if code]
    if failed:
        raise GenerationError(
            f"chunks {', '.join(failed)} of {len(parts)} failed (see the messages above); finished answers are kept. "
            f"Fix the errors above and rerun the same command to resume, or start over with --resume False"
        )
    write_records(args.answers_file, [row for part in parts for row in read_records(part)])
    join_settings(args.answers_file, parts)


def chunk_path(answers_file: str | Path, index: int) -> Path:
    """Return the answer file of one chunk."""
    path = Path(answers_file)
    return path.with_name(f"{path.name.removesuffix('.jsonl')}-chunk{index}.jsonl")


def _refuse_other_division(parts: Sequence[Path], num_chunks: int) -> None:
    """Check the number of chunks that existing files were written with, before any process starts.

    Raises:
        ConfigError: it differs from `num_chunks`.
    """
    for part in parts:
        before = read_settings(part).get("num chunks", num_chunks)
        if before != num_chunks:
            raise ConfigError(
                f"{part} was written with --num-chunks {before}, got --num-chunks {num_chunks}; resume with "
                f"--num-chunks {before}, or start over with --resume False"
            )


def _run_chunk(words: Sequence[str], num_chunks: int, index: int, out: Path, device: str) -> int:
    """Run one chunk in its own process and return its exit status."""
    # argparse uses the last of repeated options, so these override what `words` says.
    own = ["--num-chunks", str(num_chunks), "--chunk-idx", str(index), "--answers-file", str(out)]
    environment = dict(os.environ)
    if device:
        environment["CUDA_VISIBLE_DEVICES"] = device
    command = [sys.executable, "-m", "llava.eval.model_vqa_med", *_without_devices(words), *own]
    return subprocess.run(command, env=environment, check=False).returncode


def _without_devices(words: Sequence[str]) -> list[str]:
    """Return the arguments without `--devices`, the one option that a chunk does not accept."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word == "--devices":
            skip = True
        elif not word.startswith("--devices="):
            kept.append(word)
    return kept


def _devices(args: Namespace) -> list[str]:
    """Return the devices that chunks may use; one empty name without an accelerator (chunks run in turn)."""
    if args.devices:
        return [part.strip() for part in args.devices.split(",") if part.strip()]
    if args.device == "cpu" or args.engine:
        return [""]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip()] or [""]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())] or [""]
