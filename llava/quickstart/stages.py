"""Stages of a quickstart, in order; each returns facts that later stages and the page read.

    parts -> data -> before -> align -> tune -> after -> page

Every stage may be interrupted: training resumes from its last checkpoint, answering from its last answer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llava.data.converters.alignment import alignment_rows
from llava.data.records import load_samples
from llava.eval import run as evaluation
from llava.eval.medvqa.items import ScoredItem, check_reference, join_answers
from llava.eval.printing import ANSWERS
from llava.generation.options import engine_of
from llava.imaging.decode import load_image
from llava.model.builder import build_model
from llava.model.calibration import calibrate_projector
from llava.model.checkpoint.formats import CONFIG_FILE, read_json
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_model, save_projector
from llava.model.packaged import pretrained
from llava.model.precision import trains_faster_in_bf16
from llava.quickstart import forecast, report
from llava.quickstart.forecast import LORA_RANK, NUM_CALIBRATION_IMAGES, SPARE_TOKENS, time_table
from llava.quickstart.settings import QuickstartSettings
from llava.quickstart.synthetic import NOTICE, pick_rows, write_dataset
from llava.train.callbacks import METRICS_FILE
from llava.train.run import run_sft
from llava.utils.json_rows import read_records
from llava.utils.jsonl import write_json

PROJECTOR = "mlp2x_gelu"
QUESTIONS_PER_IMAGE = 8
CHECKPOINT_STEPS = 40

Facts = dict[str, Any]


@dataclass(slots=True)
class Context:
    """Settings of a run and the facts of its finished stages by name."""

    settings: QuickstartSettings
    facts: dict[str, Facts] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Return a path in the run's folder."""
        return self.settings.out / name

    @property
    def data(self) -> Path:
        """The data folder."""
        return Path(self.facts["data"]["folder"])

    @property
    def seconds(self) -> dict[str, float]:
        """Measured seconds of the finished stages."""
        return {name: float(facts["seconds"]) for name, facts in self.facts.items()}

    @property
    def notice(self) -> str:
        """Description of the data, shown with every image and number."""
        return str(self.facts["data"]["notice"])


def parts(context: Context) -> Facts:
    """Find or convert language model and vision tower."""
    settings = context.settings
    lm = settings.lm or str(pretrained.language_model())
    tower = settings.vision_tower or str(pretrained.vision_tower(settings.image_size))
    return {"lm": lm, "vision_tower": tower, "training_dtype": training_dtype(lm)}


def data(context: Context) -> Facts:
    """Draw the data set, or count the rows of the given folder."""
    settings = context.settings
    if settings.data is None:
        folder, notice = context.path("data"), f"{NOTICE}."
        write_dataset(folder, num_train=settings.num_train, num_test=settings.num_test, seed=settings.seed)
    else:
        folder, notice = settings.data, f"Data: {settings.data}"
    for sample in load_samples(folder / "test.json"):
        check_reference(sample)
    return {
        "folder": str(folder),
        "notice": notice,
        **caption_rows(context, folder),
        "num_train_questions": sum(1 for _ in read_records(folder / "train.json")),
        "num_test_questions": sum(1 for _ in read_records(folder / "test.json")),
    }


def caption_rows(context: Context, folder: Path) -> Facts:
    """Return the file of the alignment stage and its template.

    The rows are the captions of the folder; without captions, facts that the training rows state about their images, if
    these cover at least half of the images; else the training rows.
    """
    if (folder / "captions.json").is_file():
        return {"captions": str(folder / "captions.json"), "captions_version": "plain"}
    rows = alignment_rows([folder / "train.json"], folder / "images")
    images = {row.get("image") for row in read_records(folder / "train.json")}
    if 2 * len({row["image"] for row in rows}) < len(images):
        return {"captions": str(folder / "train.json"), "captions_version": context.settings.template}
    write_json(context.path("captions.json"), rows)
    # Each of these rows asks for one fact, so the question must stay; `plain` would drop it.
    return {"captions": str(context.path("captions.json")), "captions_version": context.settings.template}


def before(context: Context) -> Facts:
    """Build the model with a random projector of fitting scale, save it, and evaluate it."""
    folder, settings, names = context.path("untrained"), context.settings, context.facts["parts"]
    loaded = build_model(
        names["lm"],
        names["vision_tower"],
        template=settings.template,
        projector_type=PROJECTOR,
        seed=settings.seed,
    )
    images = [load_image(path) for path in training_images(context.data)[:NUM_CALIBRATION_IMAGES]]
    calibrate_projector(loaded.model, loaded.processor.pixels(images), seed=settings.seed)
    save_projector(loaded.model, loaded.processor, folder, origin=loaded.origin)
    limit = longest_answer(context.data, loaded.processor.tokenizer) + SPARE_TOKENS
    del loaded
    # For comparison only, so few questions are enough, without the gray-image control.
    questions = context.path("before.json")
    write_json(questions, pick_rows(read_records(context.data / "test.json"), settings.num_before, seed=settings.seed))
    facts = evaluate(context, folder, context.path("eval-before"), questions, limit, "--no-blank-control")
    return {**facts, "max_new_tokens": limit}


def longest_answer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokens of the longest reference answer, within the default limit of an evaluation."""
    answers = {sample.conversation.turns[1].text for sample in load_samples(folder / "test.json")}  # checked by `data`
    longest = max(len(tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers)
    return min(longest, evaluation.MAX_NEW_TOKENS - SPARE_TOKENS)


def training_images(folder: Path) -> list[Path]:
    """Return the paths of the distinct images of the training rows, in order."""
    names = {
        str(row["image"]): None for row in read_records(folder / "train.json") if isinstance(row.get("image"), str)
    }
    return [folder / "images" / name for name in names]


def align(context: Context) -> Facts:
    """Train the projector alone on captions."""
    return train(
        context,
        context.path("align"),
        data_path=context.facts["data"]["captions"],
        version=context.facts["data"]["captions_version"],
        pretrain_mm_mlp_adapter=context.path("untrained") / "mm_projector.bin",
        tune_mm_mlp_adapter=True,
        num_train_epochs=1,
        per_device_train_batch_size=context.settings.captions_per_step,
        learning_rate=1e-3,
    )


def tune(context: Context) -> Facts:
    """Train LoRA and the projector on the questions; write the merged model."""
    facts = train(
        context,
        context.path("tune"),
        data_path=context.data / "train.json",
        version=context.settings.template,
        pretrain_mm_mlp_adapter=context.path("align") / "mm_projector.bin",
        lora_enable=True,
        lora_r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        lora_dropout=0.0,
        mm_projector_lr=5e-4,
        num_train_epochs=context.settings.epochs,
        per_device_train_batch_size=context.settings.questions_per_step,
        learning_rate=5e-4,
    )
    loaded = load_checkpoint(context.path("tune"))
    save_model(loaded.model, loaded.processor, context.path("model"), origin=loaded.origin)
    return facts


def after(context: Context) -> Facts:
    """Evaluate the trained model on all questions about unseen images, with the image and a gray one."""
    limit = context.facts["before"]["max_new_tokens"]
    return evaluate(context, context.path("model"), context.path("eval-after"), context.data / "test.json", limit)


def page(context: Context) -> Facts:
    """Compare the runs; write results and page."""
    folder = context.data
    samples = load_samples(folder / "test.json", image_folder=folder / "images")
    train_samples = load_samples(folder / "train.json", image_folder=folder / "images")

    def answers(run: str, file: str) -> list[ScoredItem]:
        rows = list(read_records(context.path(run) / file))
        asked = {str(row["question_id"]) for row in rows} if run == "eval-before" else None
        return join_answers([sample for sample in samples if asked is None or sample.id in asked], rows, source=run)

    runs: dict[str, list[ScoredItem]] = {
        "after": answers("eval-after", ANSWERS),
        "after_blank": answers("eval-after", evaluation.BLANK_ANSWERS),
        "before": answers("eval-before", ANSWERS),
    }
    runs["majority"] = report.majority_items(runs["after"], samples, train_samples)
    result = report.compare_runs({name: runs[name] for name in report.RUNS}, seed=context.settings.seed)
    write_json(context.path("results.json"), result)
    chat = f"llava chat --model {context.path('model')} --image {folder / 'images' / runs['after'][0].image}"
    outlook = forecast.read_plan(context.settings.out)
    report.write_page(
        context.path("index.html"),
        result=result,
        items=runs["after"],
        blank=runs["after_blank"],
        image_folder=folder / "images",
        curves={
            "Loss: alignment": context.path("align") / METRICS_FILE,
            "Loss: instruction tuning": context.path("tune") / METRICS_FILE,
        },
        facts={**context.facts["parts"], **context.settings.to_json(), "machine": outlook.machine},
        reason=outlook.reason,
        times=time_table(outlook.seconds, context.seconds, {name: title for name, (title, _) in STAGES.items()}),
        notice=context.notice,
        chat=chat,
    )
    return {"summary": report.summary_text(result), "chat": chat, "passed": result["passed"]}


STAGES: dict[str, tuple[str, Callable[[Context], Facts]]] = {
    "parts": ("pretrained parts", parts),
    "data": ("data", data),
    "before": ("evaluation before training", before),
    "align": ("alignment: the projector learns on captions", align),
    "tune": ("instruction tuning with LoRA", tune),
    "after": ("evaluation after training", after),
    "page": ("numbers and page", page),
}
"""Title and function of every stage, in order."""


def train(context: Context, out: Path, **flags: Any) -> Facts:
    """Run the trainer with the options common to all stages and `flags`."""
    settings = context.settings
    options: dict[str, Any] = {
        "model_name_or_path": context.facts["parts"]["lm"],
        "vision_tower": context.facts["parts"]["vision_tower"],
        "image_folder": context.data / "images",
        "mm_projector_type": PROJECTOR,
        "mm_vision_select_layer": -2,
        "bf16": precision_of(context) == "bfloat16",
        "output_dir": out,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.05,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": CHECKPOINT_STEPS,
        "save_total_limit": 1,
        "model_max_length": 1024,
        "feature_cache_dir": context.path("features"),
        "image_grouping": "on",
        "questions_per_image": QUESTIONS_PER_IMAGE,
        "report_to": "none",
        "seed": settings.seed,
        **flags,
    }
    run_sft([text for name, value in options.items() for text in (f"--{name}", str(value))])
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return {"folder": str(out)}


def evaluate(context: Context, model: Path, out: Path, questions: Path, limit: int, *switches: str) -> Facts:
    """Answer questions with at most `limit` tokens each, in float32; return the closed and open scores."""
    # bfloat16 rounds logits to an eighth, which decides between answers that are nearly as likely: of 361 answers of a
    # trained model 50 % were right in bfloat16 and 56 % in float32.
    folder = context.data
    options = ["--model", model, "--data", questions, "--image-folder", folder / "images"]
    options += ["--train-data", folder / "train.json", "--out", out, "--max-new-tokens", limit]
    options += ["--dtype", "float32", "--note", context.notice]
    argv = [*map(str, options), *switches]
    args = evaluation.make_parser().parse_args(argv)
    result = evaluation.evaluate_model(evaluation.plan_of(args, argv), partial(engine_of, args))
    return {"folder": str(out), "scores": result["scores"]}


def precision_of(context: Context) -> str:
    """Return the precision of training, which the first stage has measured."""
    # Stored, so that a run that is resumed on another machine does not mix precisions; earlier versions did not.
    facts = context.facts["parts"]
    return str(facts.get("training_dtype") or training_dtype(facts["lm"]))


def training_dtype(language_model: str) -> str:
    """Return the precision in which `--bf16 auto` trains."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    config = read_json(Path(language_model) / CONFIG_FILE)
    return "bfloat16" if trains_faster_in_bf16(config, device_type) else "float32"
