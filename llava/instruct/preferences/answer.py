"""`llava preferences answer`: sample several answers of a model to each question about images.

questions --pending, by image--> batches --engine, one seed for each question--> answers.jsonl, row by row

The seed of a question depends on `--seed`, its images and its text only, so neither batches nor a restart change its
answers.

Command:
    llava preferences answer questions.jsonl --model runs/stage1 --image-folder images --out answers.jsonl
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import ConfigError, DataError, LlavaError
from llava.generation import fingerprint
from llava.generation.options import IMAGE_HELP, MODEL_HELP, MORE_MODEL_HELP, add_engine_options, local_engine_of
from llava.generation.protocol import Completion, Engine, Prompt, Sampling
from llava.imaging.decode import resolve_image_path
from llava.instruct.preferences import sampling_options
from llava.instruct.preferences.rows import Asked, KeyedFile, read_questions
from llava.instruct.preferences.sampling_options import add_sampling_options, sampling_of
from llava.utils import log
from llava.utils.cli import Parser, check_folder, chunk_of
from llava.utils.config_file import with_config
from llava.utils.files import exclusive_file, refuse_overwriting
from llava.utils.terminal import write_out

if TYPE_CHECKING:
    from argparse import Namespace


def seed_of(run_seed: int, key: str) -> int:
    """Return the seed of a question."""
    return int.from_bytes(hashlib.sha256(f"{run_seed} {key}".encode()).digest()[:6], "big")


def prompt_of(asked: Asked, image_folder: str | Path | None) -> Prompt:
    """Return the prompt of a question.

    Raises:
        DataError: an image is missing or outside the image folder.
    """
    paths = [resolve_image_path(name, image_folder) for name in asked.images]
    for path in paths:
        if not path.is_file():
            raise DataError(f"image {path.name!r} is not in the image folder")
    return Prompt(asked.conversation(), tuple(map(str, paths)))


def answers_to(
    engine: Engine, questions: Sequence[Asked], sampling: Sampling, *, image_folder: str | Path | None
) -> list[list[Completion]]:
    """Return `sampling.n` answers per question.

    A question that cannot be answered has one answer with finish `error`.

    Args:
        engine: the model.
        questions: the questions.
        sampling: sampling parameters; its seed is that of the run.
        image_folder: folder of the images.
    """
    found: dict[str, list[Completion]] = {}
    prompts: dict[str, Prompt] = {}
    for asked in questions:
        try:
            prompts[asked.key] = prompt_of(asked, image_folder)
        except DataError as error:
            found[asked.key] = [_failed(error)]
    samplings = [replace(sampling, seed=seed_of(sampling.seed or 0, key)) for key in prompts]
    try:
        found |= zip(prompts, engine.generate(list(prompts.values()), samplings), strict=True) if prompts else ()
    except LlavaError as error:
        if len(questions) == 1:
            return [[_failed(error)]]
        return [one for asked in questions for one in answers_to(engine, [asked], sampling, image_folder=image_folder)]
    return [found[asked.key] for asked in questions]


def _failed(error: LlavaError) -> Completion:
    return Completion("", (), "error", error=str(error))


def answer_row(asked: Asked, answers: Sequence[Completion], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a question: its fields, `answers`, `finishes`, any `error`, and `facts`."""
    failed = next((one.error for one in answers if one.finish == "error"), None)
    if failed is not None:
        return {**asked.fields(), "answers": [], "error": failed, **facts}
    texts = [one.text.strip() for one in answers]
    return {**asked.fields(), "answers": texts, "finishes": [one.finish for one in answers], **facts}


FIRST_HELP = {
    "files": ("--image-folder", "--out"),
    **sampling_options.FIRST_HELP,
    "sampling": ("--n", *sampling_options.FIRST_HELP["sampling"]),
}
"""Options that `llava preferences answer --help` shows."""

MORE_HELP = {"files": ("--questions",), **sampling_options.MORE_HELP}
"""Options that `llava preferences answer --help all` shows too."""


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="llava preferences answer",
        description="Sample answers to questions about images, several to each; rerun to resume.",
    )
    parser.add_argument("questions", nargs="?", type=Path, help="rows with conversations, or images with questions")
    parser.add_argument("--questions", "--rows", "--question-file", dest="named", type=Path, help="the same as a flag")
    parser.add_argument("--image-folder", help="folder that image names are relative to")
    add_sampling_options(
        parser,
        items="answers",
        asked="question",
        count="--n",
        num=2,
        count_help="answers to each question",
        top_k=100,
        max_new_tokens=1024,
        batch_size=32,
    )
    parser.show_first(FIRST_HELP, MORE_HELP)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava preferences answer`.

    Raises:
        LlavaError: options, questions or the model cannot be used, or the file holds answers with other settings.
    """
    log.setup_logging()
    parser = make_parser()
    args = parser.parse_args(with_config(parser, argv))
    path = args.named or args.questions
    if path is None:
        raise ConfigError("no questions; pass the file of questions, such as questions.jsonl")
    sampling = sampling_of(args)
    check_folder(args.image_folder, "--image-folder")
    refuse_overwriting([path], {"out": args.out})
    questions = read_questions(path)
    with exclusive_file(args.out, option="--out"):
        write_out(answer_questions(questions, sampling, args))


def answer_questions(questions: Sequence[Asked], sampling: Sampling, args: Namespace) -> str:
    """Answer what is pending, and return a line about the result."""
    settings = {
        **fingerprint.model_settings(args),
        "sampling": asdict(sampling),
        "image folder": fingerprint.folder_name(args.image_folder),
    }
    out = KeyedFile(args.out, settings, resume=args.resume)
    num_kept = len(out.rows)
    if args.retry_failed:
        out.forget(lambda row: "error" in row)
    pending = sorted((asked for asked in questions if asked.key not in out.rows), key=lambda asked: asked.images)
    if pending:
        engine = local_engine_of(args)
        facts = {"model": Path(args.model).name, "weights": settings["weights"], "seed": args.seed}
        with log.progress_bar(len(pending), title="answering", unit="question") as bar:
            for start in range(0, len(pending), args.batch_size):
                batch = pending[start : start + args.batch_size]
                for asked, answers in zip(
                    batch, answers_to(engine, batch, sampling, image_folder=args.image_folder), strict=True
                ):
                    out.append(answer_row(asked, answers, facts))
                bar.update(len(batch))
    out.settle([asked.key for asked in questions])
    rows = [out.rows[asked.key] for asked in questions]
    num_failed = sum("error" in row for row in rows)
    num_cut = sum("length" in row.get("finishes", ()) for row in rows)
    return (
        f"{len(rows)} questions ({num_kept} kept), {num_failed} failed, {num_cut} with an unfinished answer "
        f"-> {args.out}\n"
    )


def published_main(argv: Sequence[str] | None = None) -> None:
    """Run `llava/eval/model_collectA.py`, with the options of the published script.

    Two answers to each question are sampled as there: temperature 1.2, top_k 100, top_p 0.95, up to 1,024 tokens.

    Raises:
        LlavaError: as `main`.
    """
    log.setup_logging()
    parser = Parser(
        prog="model_collectA.py",
        description="Sample two answers to each question that a model asked.",
        epilog="example: python llava/eval/model_collectA.py --model-path runs/stage1 --image-folder images "
        "--question-file questions.jsonl --answers-file answers.jsonl",
    )
    parser.add_argument("--image-folder", required=True, help="folder of the images")
    parser.add_argument("--question-file", type=Path, required=True, help="images with their questions")
    parser.add_argument("--answers-file", dest="out", type=Path, required=True, help="answers as JSON lines")
    parser.add_argument(
        "--num-chunks", type=int, default=1, help="number of chunks that the questions are divided into"
    )
    parser.add_argument("--chunk-idx", type=int, default=0, help="index of the chunk to answer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    for name in ("temperature", "top_p", "num_beams"):
        parser.add_argument(f"--{name}", type=float, help="no effect, as in the original")
    parser.set_defaults(resume=True, retry_failed=False, batch_size=32)
    add_engine_options(parser)
    parser.show_first(
        {"files": ("--image-folder", "--question-file", "--answers-file"), "model": MODEL_HELP},
        {"files": ("--num-chunks", "--chunk-idx"), "model": MORE_MODEL_HELP, "image files": IMAGE_HELP},
    )
    args = parser.parse_args(argv)
    check_folder(args.image_folder, "--image-folder")
    refuse_overwriting([args.question_file], {"answers_file": args.out})
    sampling = Sampling(max_new_tokens=1024, temperature=1.2, top_k=100, top_p=0.95, n=2, seed=args.seed)
    questions = chunk_of(read_questions(args.question_file), args.num_chunks, args.chunk_idx)
    with exclusive_file(args.out, option="--answers-file"):
        write_out(answer_questions(questions, sampling, args))
