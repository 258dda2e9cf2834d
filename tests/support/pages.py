"""The HTML pages, written with markup in every text that comes from data, answers or file names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from llava.data import show
from llava.data.check.page import write_page as write_check_page
from llava.data.check.report import check_file
from llava.data.check.tokens import TokenBudget
from llava.data.check.vocabulary import MIN_ROWS
from llava.eval.judge.page import write_scores_page
from llava.eval.judge.scores import Rated
from llava.eval.judge.summary import MEASURES
from llava.eval.medvqa.items import ScoredItem
from llava.eval.medvqa.page import write_page as write_evaluation_page
from llava.eval.reports.cli import score_main
from llava.eval.rules.cases import RuleDialogue
from llava.eval.rules.page import write_page as write_rules_evaluation_page
from llava.eval.rules.report import STYLE_SCORES
from llava.eval.rules.scores import HeldDialogue
from llava.imaging.dicom.policy import DicomPolicy
from llava.quickstart.report import write_page as write_quickstart_page
from llava.samples import Conversation, Origin, Sample, Turn
from llava.symbolic.rules import load_rules
from llava.symbolic.show import write_page as write_rules_page
from llava.train.compare import comparison, read_run
from llava.train.compare import write_page as write_compare_page
from llava.train.held_out_page import write_cases
from llava.train.rollout.page import write_page as write_rollouts_page
from llava.train.run_page import write_run_page
from llava.utils.json_rows import read_records
from llava.utils.jsonl import write_json, write_records
from tests.support.check_files import row, write_rows

ESTIMATE = {"value": 50.0, "low": 25.0, "high": 75.0, "num_items": 4}

PERSON = "Zyx Quentin"
"""Folder of images, named as a person."""

NAME = """named"'><script>image"""
"""File name of an image; a slash cannot be part of it."""

IMAGE = f"{PERSON}/{NAME}"
"""Image as rows name it."""


class Marks:
    """Source of distinct hostile texts, so that a test can tell which one a page contains."""

    def __init__(self) -> None:
        self.used: list[str] = []

    def __call__(self, field: str) -> str:
        """Return a text that would leave an attribute and load a script if it were not escaped."""
        text = f"""{field}"'><script src=//{field}>&"""  # short, as the page of a check replaces long class names
        self.used.append(text)
        return text


def write_images(folder: Path, names: list[str]) -> Path:
    """Write gray images under the given names."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (30, 20), 20 * number).save(folder / name, format="PNG")
    return folder


def _item(mark: Marks, kind: str, image: str) -> ScoredItem:
    texts = [mark(f"{kind}-{field}") for field in ("id", "question", "reference", "prediction", "type")]
    return ScoredItem(*texts[:4], True, (texts[4],), image)


def evaluation_page(folder: Path, mark: Marks) -> Path:
    """Write the page of `llava eval`."""
    images = write_images(folder / "images", [IMAGE])
    scored = {"type": mark("type"), "score": mark("score"), "answered": ESTIMATE, "blank": ESTIMATE}
    report = {
        "counts": {mark("count"): 1},
        "verdicts": [mark("verdict")],
        "scores": {mark("heading"): {mark("name"): scored}},
        "by_type": [scored],
        "provenance": {mark("key"): mark("value")},
    }
    write_evaluation_page(
        folder / "page.html",
        title=mark("title"),
        report=report,
        items=[_item(mark, "answer", IMAGE)],
        blank=[ScoredItem("0", "q", "r", mark("blank"), True, (), IMAGE)],
        open_image=lambda name: Image.open(images / name),
        note=mark("note"),
    )
    return folder / "page.html"


def judge_page(folder: Path, mark: Marks) -> Path:
    """Write the page of judged chat answers."""
    images = write_images(folder / "images", [IMAGE])
    texts = ("question", "ans1", "ans2", "result", "result_swapped")
    (folder / "scores.jsonl").write_text(json.dumps({key: mark(key) for key in texts}) + "\n")
    rated = Rated(mark("id"), mark("kind"), (mark("domain"),), IMAGE, None, mark("failure"))
    figures = ("gpt4_score", "pred_score", "pred_relative_score", "ratio_of_means")
    agreement: dict[str, Any] = {side: dict.fromkeys(MEASURES, ESTIMATE) for side in ("reference", "answer")}
    report = {
        "groups": {mark("group"): {"data_size": 1, "asked": 1, **dict.fromkeys(figures, ESTIMATE)}},
        "failures": {mark("reason"): 1},
        "agreement": {**agreement, "winner": {"exact": ESTIMATE}, "first place": ESTIMATE, "num_questions": 1},
        "provenance": {mark("key"): mark("value")},
    }
    write_scores_page(folder / "page.html", folder / "scores.jsonl", [rated], report, image_folder=images)
    return folder / "page.html"


def check_page(folder: Path, mark: Marks) -> Path:
    """Write the page of `llava data check`; it shows names of files, images, fields and classes, but no texts."""
    names = [IMAGE, f"{PERSON}/other {NAME}"]
    images = write_images(folder / "images", names)
    (images / names[1]).write_bytes((images / names[0]).read_bytes())
    classes = [mark(f"class-{n}") for n in range(len(names))]
    rows = [row(n, name, modality=classes[n]) for n, name in enumerate(names) for _ in range(MIN_ROWS)]
    train = write_rows(folder / "train<script>.json", rows)
    test = write_rows(folder / "test<script>.json", [row(9, names[0], modality="x")])
    report = check_file(train, images=images, against=test)
    report.tokens = TokenBudget(mark("model"), *[1] * 9)
    write_check_page(folder / "page.html", report, strict=False)
    return folder / "page.html"


def quickstart_page(folder: Path, mark: Marks) -> Path:
    """Write the page of a quickstart."""
    images = write_images(folder / "images", [IMAGE])
    runs = ("after", "after_blank", "majority")
    result = {
        "num_questions": 4,
        "num_images": 1,
        "accuracy": dict.fromkeys(runs, ESTIMATE),
        "difference": dict.fromkeys(runs[1:], ESTIMATE),
        "by_type": {mark("type"): dict.fromkeys(runs, 50.0)},
        "passed": True,
    }
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    write_quickstart_page(
        folder / "page.html",
        result=result,
        items=[_item(mark, "answer", IMAGE)],
        blank=[ScoredItem("0", "q", "r", mark("blank"), True, (), IMAGE)],
        image_folder=images,
        curves={mark("curve"): folder / "metrics.jsonl"},
        facts={mark("fact"): mark("value")},
        reason=mark("reason"),
        times=[[mark("stage"), mark("forecast"), mark("measured")]],
        notice=mark("notice"),
        chat=mark("chat"),
    )
    return folder / "page.html"


def row_page(folder: Path, mark: Marks) -> Path:
    """Write the page of `llava data show`."""
    from tests.support.text_tools import make_processor

    processor = make_processor()
    ids = processor.tokenizer("<script>").input_ids
    stretches = (show.Stretch("trained", False, 0, tuple(ids), mark("text"), 1),)
    view = show.RowView(mark("title"), mark("settings"), stretches)
    url = "data:image/png;base64,AAAA"
    (folder / "page.html").write_text(show.to_html(view, processor, [url]), encoding="utf-8")
    return folder / "page.html"


def rules_page(folder: Path, mark: Marks) -> Path:
    """Write the page of `llava rules show`."""
    values = [mark("value"), "b"]
    said = {values[0]: {"train": [mark("answer")], "test": ["x"]}, "b": {"train": ["b"], "test": ["is b"]}}
    nodes = [{"id": id, "values": values, "extract": [{"value": "b", "any": ["b"]}]} for id in ("first", "second")]
    phrases = {
        "provenance": {"model": "m", "prompt_sha256": "0", "date": "d"},
        "questions": {
            id: {"train": [mark(f"question-{id}")], "test": [mark(f"test-{id}")]} for id in ("first", "second")
        },
        "answers": {"first": said, "second": said},
    }
    (folder / "phrases.yaml").write_text(json.dumps(phrases))
    rules = {
        "schema": "llava.rules/v1",
        "id": "rules",
        "version": mark("version"),
        "specialty": mark("specialty"),
        "nodes": nodes,
        "profiles": {mark("profile"): {"first": values[0], "second": "b"}, "B": {"first": "b", "second": values[0]}},
        "dialogue": {"phrases": "phrases.yaml"},
    }
    (folder / "rules.yaml").write_text(json.dumps(rules))
    write_rules_page(load_rules(folder / "rules.yaml"), folder / "page.html")
    return folder / "page.html"


def rollouts_page(folder: Path, mark: Marks) -> Path:
    """Write the page of `llava rules rollouts`."""
    node = mark("node")
    row = {
        "step": 1,
        "case": mark("case"),
        "image": IMAGE,
        "group": 0,
        "sample": 0,
        "style": mark("style"),
        "asked": [node],
        "truth": {node: mark("truth")},
        "answers": [mark("answer")],
        "values": [mark("value")],
        "finishes": ["length"],
        "turns": [0.5],
        "total": 0.5,
        "raw": 0.5,
        "violations": [mark("rule")],
        "dropped": True,
    }
    images = write_images(folder / "images", [IMAGE])
    write_rollouts_page(folder / "page.html", [row], image_folder=str(images))
    return folder / "page.html"


def reports_page(folder: Path, mark: Marks) -> Path:
    """Write the page of `llava reports score`."""
    images = write_images(folder / "images", [IMAGE])
    findings = ("Small effusion. Possible edema.", "No pneumothorax. Small effusion.")
    rows = [
        {
            "id": mark(f"id-{n}"),
            "image": IMAGE,
            "prediction": f"{findings[n]} {mark(f'prediction-{n}')}",
            "reference": f"{findings[0]} {mark(f'reference-{n}')}",
        }
        for n in range(2)
    ]
    write_records(folder / "in.jsonl", rows)
    words = [str(folder / "in.jsonl"), "--output-dir", str(folder), "--image-folder", str(images)]
    score_main([*words, "--scorers", "ROUGE-L,rules", "--num-resamples", "2"])
    return folder / "report.html"


def rules_evaluation_page(folder: Path, mark: Marks) -> Path:
    """Write the page of `llava eval --rules`."""
    images = write_images(folder / "images", [IMAGE])
    node, style, hint = mark("node"), mark("style"), mark("hint")
    dialogue = RuleDialogue(
        id=mark("id"),
        case="case",
        image=IMAGE,
        group="",
        truth={node: mark("truth")},
        asked=(node, node),
        style=style,
        hint=hint,
        contexts=("unknown", "unknown"),
        questions=(mark("question"), "again?"),
    )
    answers, values = (mark("answer"), "right"), (mark("value"), dialogue.truth[node])
    held = HeldDialogue(dialogue, answers, values, (False, False), (mark("rule"),), failed=False, unfinished=0)
    score = {"answered": ESTIMATE, "blank": ESTIMATE, "difference": ESTIMATE}
    report = {
        "counts": {mark("count"): 1},
        "scores": {mark("score"): score},
        "styles": {style: dict.fromkeys(STYLE_SCORES, ESTIMATE)},
        "nodes": {node: {"accuracy": ESTIMATE, "macro_f1": ESTIMATE}},
        "contradictions": {"per_conversation": ESTIMATE, "by_constraint": {mark("constraint"): 1}},
        "order_invariance": ESTIMATE,
        "flips": {hint: ESTIMATE},
        "provenance": {mark("key"): mark("value")},
    }
    write_rules_evaluation_page(
        folder / "page.html",
        title=mark("title"),
        report=report,
        held=[held],
        open_image=lambda name: Image.open(images / name),
        note=mark("note"),
    )
    return folder / "page.html"


def _run_folder(folder: Path, mark: Marks, *, rate: float) -> Path:
    """Write the folder of a training run with a curve, a held-out answer and an evaluation."""
    (folder / "eval").mkdir(parents=True)
    rows = [
        {"step": step, "loss": 4 / step, "learning_rate": -8.331e-7 * step, mark("curve"): rate * step}
        for step in (1, 2, 3)
    ]
    write_records(folder / "metrics.jsonl", [*rows, {"step": 3, "eval_loss": 1.5}])
    write_json(
        folder / "resolved_arguments.json", {"training": {"learning_rate": rate, "data_path": mark(f"data-{rate}")}}
    )
    score = {"answered": ESTIMATE, "blank": ESTIMATE}
    asked = {"data": {"questions": {"file": mark("file"), "sha256": "0" * 64}}}
    report = {"scores": {"strict": {mark("score"): score}}, "provenance": asked}
    write_json(folder / "eval" / "results.json", report)
    return folder


def run_page(folder: Path, mark: Marks) -> Path:
    """Write the page of a training run."""
    images = write_images(folder / "images", [IMAGE])
    run = _run_folder(folder / "run", mark, rate=1.0)
    mark.used = [text for text in mark.used if text.startswith("curve")]
    turns = (Turn("human", f"<image>{mark('question')}"), Turn("gpt", mark("reference")))
    sample = Sample("0", Conversation(turns), (IMAGE,), origin=Origin("rows.json", 4))
    write_cases(run, [sample], [mark("answer")], [0.0], image_folder=images, dicom=DicomPolicy())
    write_run_page(run, list(read_records(run / "metrics.jsonl")), num_steps=3, is_over=True)
    return run / "report.html"


def compare_page(folder: Path, mark: Marks) -> Path:
    """Write the page of `llava compare`."""
    runs = [read_run(_run_folder(folder / f"run-{n}", mark, rate=float(n)), mark(f"name-{n}")) for n in (1, 2)]
    write_compare_page(folder / "page.html", runs, comparison(runs))
    return folder / "page.html"


PAGES: dict[str, Callable[[Path, Marks], Path]] = {
    "evaluation": evaluation_page,
    "judge": judge_page,
    "check": check_page,
    "quickstart": quickstart_page,
    "run": run_page,
    "compare": compare_page,
    "row": row_page,
    "rules": rules_page,
    "rollouts": rollouts_page,
    "reports": reports_page,
    "rules_evaluation": rules_evaluation_page,
}
