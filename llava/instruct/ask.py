"""`llava ask`: questions that a model asks about images, in a template in which it learned to ask.

images, sorted --greedy--> a description of each --sampled--> questions --drop cut, empty, repeated--> questions.jsonl

The questions about an image depend on `--seed` and the bytes of the image only, so neither batches nor a restart change
them. `llava preferences answer` reads the file.

Command:
    llava ask --model runs/stage1 --images images --out questions.jsonl
"""

from __future__ import annotations

import hashlib
import json
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.constants import IMAGE_TOKEN
from llava.data.records import load_samples
from llava.errors import ConfigError, DataError
from llava.generation import fingerprint
from llava.generation.options import IMAGE_HELP, MODEL_HELP, MORE_MODEL_HELP, add_engine_options, local_engine_of
from llava.generation.protocol import Completion, Engine, Prompt, Sampling
from llava.imaging.decode import resolve_image_path
from llava.instruct.preferences import sampling_options
from llava.instruct.preferences.answer import seed_of
from llava.instruct.preferences.rows import KeyedFile
from llava.instruct.preferences.sampling_options import add_sampling_options, sampling_of
from llava.samples import Conversation, Turn
from llava.utils import log
from llava.utils.cli import Parser, check_folder, chunk_of
from llava.utils.files import exclusive_file, refuse_overwriting
from llava.utils.provenance import file_sha256
from llava.utils.terminal import write_out

if TYPE_CHECKING:
    from llava.generation.engine import LocalEngine

REQUEST = (
    "Describe this image in detail: what kind of image it is, which structures it shows, and everything about them "
    "that is notable."
)
"""Request for the description that the questions follow."""

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".tga", ".dcm"))
"""Endings of the files in a folder that are asked about, in lower case."""

NEARLY_EQUAL = 0.95
"""Share of common words, without articles, from which two questions count as the same."""

DROPPED = ("cut_off", "empty", "repeated")
"""Reasons why a question is left out: it reached the limit of tokens, has no text, or nearly equals an earlier one."""


@dataclass(frozen=True, slots=True)
class AskedImage:
    """Image that is asked about: its place among all, its name, and its file."""

    place: int
    name: str
    path: Path

    def digest(self) -> str:
        """Return the hash of the bytes of the file."""
        return file_sha256(self.path)

    @property
    def key(self) -> str:
        """Hash of the name, which identifies the image when a stopped run resumes."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class QuestionSampling:
    """Settings of `llava ask`.

    Attributes:
        request: request for the description.
        describing: sampling parameters of the description.
        asking: sampling parameters of the questions; `n` of them are sampled, and `seed` is that of the run.
    """

    request: str = REQUEST
    describing: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=1024))
    asking: Sampling = field(
        default_factory=lambda: Sampling(max_new_tokens=300, temperature=1.2, top_k=300, top_p=0.95, n=5, seed=0)
    )


def images_of_folder(folder: str | Path, option: str = "--images") -> list[AskedImage]:
    """Return the images below a folder, sorted by name.

    Raises:
        ConfigError: it is no folder, or holds no image.
    """
    root = Path(folder)
    check_folder(root, option)
    files = (path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    names = sorted(path.relative_to(root).as_posix() for path in files)
    if not names:
        raise ConfigError(f"{option} {folder}: no image; expected files such as {', '.join(sorted(IMAGE_SUFFIXES))}")
    return [AskedImage(place, name, root / name) for place, name in enumerate(names)]


def images_of_rows(path: str | Path, folder: str | Path | None) -> list[AskedImage]:
    """Return the distinct images of a file of rows, sorted by name.

    Raises:
        DataError: a row cannot be used, or none has an image.
    """
    names = sorted({name for sample in load_samples(path) for name in sample.images})
    if not names:
        raise DataError(f"{path}: no row has an image; expected rows about images")
    return [AskedImage(place, name, resolve_image_path(name, folder)) for place, name in enumerate(names)]


def kept_questions(completions: Sequence[Completion]) -> tuple[list[str], dict[str, int]]:
    """Return the sampled questions that are complete, not empty and not repeated, and their numbers."""
    kept: list[str] = []
    dropped: Counter[str] = Counter()
    for completion in completions:
        text = " ".join(completion.text.replace(IMAGE_TOKEN, " ").split())
        if completion.finish == "length":
            dropped["cut_off"] += 1
        elif not re.search(r"\w", text):
            dropped["empty"] += 1
        elif any(nearly_equal(text, earlier) for earlier in kept):
            dropped["repeated"] += 1
        else:
            kept.append(text)
    return kept, {reason: dropped[reason] for reason in DROPPED}


def nearly_equal(first: str, second: str) -> bool:
    """Return whether two questions have nearly the same words in the same order."""
    return SequenceMatcher(None, _words(first), _words(second), autojunk=False).ratio() >= NEARLY_EQUAL


def _words(text: str) -> list[str]:
    """Return the words of a text without articles."""
    return [word for word in re.findall(r"\w+", text.casefold()) if word not in ("a", "an", "the")]


def asked_rows(engine: Engine, images: Sequence[AskedImage], settings: QuestionSampling) -> list[dict[str, Any]]:
    """Return the row of each image: `key`, `question_id`, `image`, `prompt`, `description`, `dropped`.

    `prompt` holds the questions.

    An image that cannot be read has no questions, and an `error`.
    """
    found: dict[int, dict[str, Any]] = {
        image.place: {"key": image.key, "question_id": image.place, "image": image.name, "prompt": []}
        for image in images
    }
    seeds: dict[int, int] = {}
    for image in images:
        try:
            seeds[image.place] = seed_of(settings.asking.seed or 0, image.digest())
        except OSError as error:
            found[image.place]["error"] = f"image {image.path.name!r} cannot be read: {error.strerror}"
    request = Turn("human", f"{IMAGE_TOKEN}\n{settings.request}")
    readable = [image for image in images if image.place in seeds]
    prompts = [Prompt(Conversation((request,)), (image.path,)) for image in readable]
    own = [_seeded(settings.describing, seeds[image.place]) for image in readable]
    described: list[tuple[AskedImage, Prompt, str]] = []
    for image, prompt, [completion] in zip(readable, prompts, engine.generate(prompts, own), strict=True):
        if completion.finish == "error":
            found[image.place]["error"] = completion.error
        else:
            turns = (request, Turn("gpt", completion.text, train=True))
            described.append((image, replace(prompt, conversation=Conversation(turns)), completion.text))
    samplings = [_seeded(settings.asking, seeds[image.place]) for image, _, _ in described]
    asked = engine.generate([prompt for _, prompt, _ in described], samplings)
    for (image, _, description), completions in zip(described, asked, strict=True):
        row = found[image.place]
        if failed := next((one.error for one in completions if one.finish == "error"), None):
            row["error"] = failed
            continue
        questions, dropped = kept_questions(completions)
        row |= {"prompt": questions, "description": description, "dropped": dropped}
    return [found[image.place] for image in images]


def _seeded(sampling: Sampling, seed: int) -> Sampling:
    return sampling if sampling.temperature == 0.0 else replace(sampling, seed=seed)


def ask(images: Sequence[AskedImage], settings: QuestionSampling, args: Namespace) -> str:
    """Ask about the images that the output file lacks, and return a line about the result.

    Raises:
        ConfigError: the template of the model cannot ask.
        LlavaError: the model cannot be loaded, or the file holds questions with other settings.
    """
    facts = {**fingerprint.model_settings(args), **json.loads(json.dumps(asdict(settings)))}
    out = KeyedFile(args.out, facts, resume=args.resume)
    num_kept = len(out.rows)
    if args.retry_failed:
        out.forget(lambda row: "error" in row)
    pending = [image for image in images if image.key not in out.rows]
    if pending:
        engine = local_engine_of(args)
        _check_template(engine)
        shown = {"model": Path(args.model).name, "weights": facts["weights"], "seed": settings.asking.seed}
        with log.progress_bar(len(pending), title="asking", unit="image") as bar:
            for start in range(0, len(pending), args.batch_size):
                batch = pending[start : start + args.batch_size]
                for row in asked_rows(engine, batch, settings):
                    out.append({**row, **shown})
                bar.update(len(batch))
    out.settle([image.key for image in images])
    return _summary([out.rows[image.key] for image in images], num_kept, args.out)


def _check_template(engine: LocalEngine) -> None:
    template = engine.processor.template
    if template.asked_header() is None:
        raise ConfigError(
            f"the model's template {template.name} cannot ask questions; train with --version v1_sq or chatml_sq, or "
            "name such a template with --conv-mode"
        )


def _summary(rows: Sequence[Any], num_kept: int, out: Path) -> str:
    dropped: Counter[str] = Counter()
    for row in rows:
        dropped.update(row.get("dropped", {}))
    reasons = ", ".join(f"{dropped[reason]} {reason.replace('_', ' ')}" for reason in DROPPED)
    num_questions = sum(len(row["prompt"]) for row in rows)
    num_failed = sum("error" in row for row in rows)
    return (
        f"{len(rows)} images ({num_kept} kept), {num_questions} questions; dropped {reasons}; {num_failed} images "
        f"failed -> {out}\n"
    )


FIRST_HELP = {
    "images": ("--images", "--rows", "--image-folder", "--out"),
    **sampling_options.FIRST_HELP,
    "sampling": ("--n-shot", *sampling_options.FIRST_HELP["sampling"]),
}
"""Options that `llava ask --help` shows."""

MORE_HELP = {"description": ("--request", "--max-description-tokens"), **sampling_options.MORE_HELP}
"""Options that `llava ask --help all` shows too."""


def make_parser() -> Parser:
    """Return the parser of `llava ask`."""
    parser = Parser(
        prog="llava ask",
        description="Let a model ask questions about images; rerun to resume.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", help="folder of images, with its subfolders")
    source.add_argument("--rows", type=Path, help="rows in LLaVA format, whose images are asked about")
    parser.add_argument("--image-folder", help="folder that the image names of --rows are relative to")
    first = parser.add_argument_group("description")
    first.add_argument("--max-description-tokens", type=int, default=1024, help="limit of the description in tokens")
    first.add_argument("--request", default=REQUEST, help="request for the description that the questions follow")
    add_sampling_options(
        parser,
        items="questions",
        asked="image",
        count="--n-shot",
        num=5,
        count_help="questions that are sampled about each image",
        top_k=300,
        max_new_tokens=300,
        batch_size=8,
    )
    parser.show_first(FIRST_HELP, MORE_HELP)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava ask`.

    Raises:
        LlavaError: options, images or the model cannot be used, or the file holds questions with other settings.
    """
    log.setup_logging()
    args = make_parser().parse_args(argv)
    asking = sampling_of(args)
    if not args.request.strip() or IMAGE_TOKEN in args.request:
        raise ConfigError(f"--request must be a text without {IMAGE_TOKEN}, which is placed before it")
    check_folder(args.image_folder, "--image-folder")
    if args.rows is not None:
        refuse_overwriting([args.rows], {"out": args.out})
    images = images_of_folder(args.images) if args.rows is None else images_of_rows(args.rows, args.image_folder)
    settings = QuestionSampling(args.request.strip(), Sampling(max_new_tokens=args.max_description_tokens), asking)
    with exclusive_file(args.out, option="--out"):
        write_out(ask(images, settings, args))


def published_main(argv: Sequence[str] | None = None) -> None:
    """Run `llava/eval/visual_sq.py`, with the options of the published script.

    Raises:
        LlavaError: as `main`.
    """
    log.setup_logging()
    parser = Parser(
        prog="visual_sq.py",
        description="Let a model ask questions about the images of a folder.",
        epilog="example: python llava/eval/visual_sq.py --model-path runs/stage1 --image-folder images "
        "--answers-file questions.jsonl",
    )
    parser.add_argument("--image-folder", required=True, help="folder of images, with its subfolders")
    parser.add_argument("--answers-file", dest="out", type=Path, required=True, help="questions as JSON lines")
    parser.add_argument("--num-chunks", type=int, default=1, help="number of chunks that the images are divided into")
    parser.add_argument("--chunk-idx", type=int, default=0, help="index of the chunk to ask about")
    parser.add_argument("--do_sample", action="store_true", help="sample the description, which is greedy otherwise")
    parser.add_argument("--temperature", type=float, default=0.2, help="temperature of a sampled description")
    parser.add_argument("--top_p", type=float, default=1.0, help="probability mass of a sampled description")
    parser.add_argument("--num_beams", type=int, default=1, help="beams of a description that is not sampled")
    parser.add_argument("--n_shot", type=int, default=5, help="questions that are sampled about each image")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    parser.add_argument("--ptlength", type=int, default=10, help="no effect, as in the original")
    parser.add_argument("--pt", help="no effect, as in the original")
    parser.set_defaults(resume=True, retry_failed=False, batch_size=8)
    add_engine_options(parser)
    parser.show_first(
        {"files": ("--image-folder", "--answers-file"), "sampling": ("--n-shot", "--seed"), "model": MODEL_HELP},
        {"files": ("--num-chunks", "--chunk-idx"), "model": MORE_MODEL_HELP, "image files": IMAGE_HELP},
    )
    args = parser.parse_args(argv)
    sampled = {"temperature": args.temperature, "top_p": args.top_p or 1.0} if args.do_sample else {}
    describing = Sampling(max_new_tokens=1024, num_beams=1 if args.do_sample else args.num_beams, **sampled)
    asking = replace(QuestionSampling().asking, n=args.n_shot, seed=args.seed)
    images = chunk_of(images_of_folder(args.image_folder, "--image-folder"), args.num_chunks, args.chunk_idx)
    with exclusive_file(args.out, option="--answers-file"):
        write_out(ask(images, QuestionSampling(describing=describing, asking=asking), args))
