"""Train small parts on findings, and score them beside the baselines that a score needs.

    packaged reports --text only--> warm model --X-rays with findings--> model --llava findings--> predictions
    the commonest sentence, the nearest training X-ray's text, a blank image ------------------> their predictions
    predictions --llava reports score, compare--> scores/, compare/, table.md; intervals by patient

bash scripts/findings_small.sh DATA_ROOT OUT
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.constants import BLANK_SIZE, GRAY
from llava.data.converters.iu_xray import packaged_documents, section_texts
from llava.data.report_rows import report_question
from llava.errors import ConfigError, DataError
from llava.eval.reports.cli import score_main
from llava.eval.reports.compare_cli import compare_main
from llava.eval.reports.texts import commonest_sentence
from llava.quickstart import machine
from llava.quickstart.forecast import ANSWER, TUNE, Costs, fitted_seconds
from llava.quickstart.work import CHARACTERS_PER_TOKEN, TEMPLATE_TOKENS, LanguageShape, language_shape, tower_shape
from llava.serve import findings
from llava.utils.cli import Parser, run_program
from llava.utils.json_rows import read_records
from llava.utils.jsonl import write_atomic, write_json, write_records
from llava.utils.reporting import text_table
from llava.utils.terminal import write_out

Row = dict[str, Any]

IMAGE_SIZE = 168
MAX_NEW_TOKENS = 96
LOADING_SECONDS = 60.0
"""Imports, loading, saving and scoring, measured on two AVX2 cores."""

X_RAY_SHARE = 0.7
"""Largest share of the limit for everything but the warm-up, above which there are fewer epochs."""

SHOWN = ("Micro-F1-14[rule]", "Micro-F1-14+[rule]", "Macro-F1-14[rule]", "BLEU-1", "BLEU-4", "ROUGE-L")
SYSTEMS = ("model", "blank", "commonest", "nearest")


@dataclass(frozen=True, slots=True)
class Files:
    """Rows of a run: text-only reports, training and test X-rays."""

    warm: list[Row]
    train: list[Row]
    test: list[Row]

    def tokens(self, name: str, *, answers: bool = False) -> float:
        """Return the text tokens of a part, or of its answers alone."""
        turns = [turn["value"] for row in getattr(self, name) for turn in row["conversations"][answers:]]
        return sum(len(text) / CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS / 2 for text in turns)


def packaged_reports() -> Iterator[Row]:
    """Yield a text-only row for each packaged report with findings."""
    for name, root in packaged_documents():
        texts = section_texts(root)
        if answer := texts.get("findings"):
            question = report_question("findings", texts.get("indication", ""))
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            yield {"id": name, "conversations": turns}


def xray_rows(path: Path) -> list[Row]:
    """Return the rows of cxr-notes that have findings; ids begin with the patient.

    Raises:
        DataError: no row has findings.
    """
    rows = [
        {
            "id": f"{row['patient']}_{row['id']}",
            "image": row["image"],
            "view": row.get("view"),
            "conversations": row["conversations"],
        }
        for row in read_records(path)
        if row.get("findings") and row.get("conversations")
    ]
    if not rows:
        raise DataError(f"{path}: no row has findings; expected the folder cxr-notes")
    return rows


def forecast(args: Namespace, files: Files, language: LanguageShape, speed: machine.Machine) -> dict[str, float]:
    """Return the seconds forecast for the stages: all weights but the tower's are trained."""
    costs = Costs(language, tower_shape(args.vision_tower, IMAGE_SIZE) or tower_shape(None, IMAGE_SIZE))  # type: ignore[arg-type]
    epochs = args.epochs
    # A second backward pass for the gradients of the trained weights.
    warm = 1.5 * costs.trained(0, files.tokens("warm"), files.tokens("warm", answers=True))
    tune = 1.5 * costs.trained(
        len(files.train) * epochs, files.tokens("train") * epochs, files.tokens("train", answers=True) * epochs
    )
    seen = costs.seen(len(files.train) + len(files.test))
    written = costs.decoded((len(files.test) + 1) * MAX_NEW_TOKENS)
    return {
        "warm-up": fitted_seconds(warm, speed, TUNE),
        "X-rays": fitted_seconds(tune, speed, TUNE) + fitted_seconds(seen, speed, ANSWER),
        "findings": fitted_seconds(written, speed, ANSWER),
        "constant": LOADING_SECONDS,
    }


def planned(args: Namespace, files: Files) -> Files:
    """Print the forecast, and return the rows with a warm-up that fits the limit; `args.epochs` is lowered for it.

    Raises:
        ConfigError: the sizes of the language model cannot be read.
    """
    language = language_shape(args.lm)
    if language is None:
        raise ConfigError(f"--lm {args.lm}: its configuration cannot be read")
    speed = machine.measure_machine(language.linear_layers, language.config)
    limit = 60.0 * args.minutes
    seconds = forecast(args, files, language, speed)
    while args.epochs > 1 and sum(seconds.values()) - seconds["warm-up"] > X_RAY_SHARE * limit:
        args.epochs -= 1
        seconds = forecast(args, files, language, speed)
    others = sum(seconds.values()) - seconds["warm-up"]
    kept = min(len(files.warm), max(1, int(len(files.warm) * (limit - others) / max(seconds["warm-up"], 1e-9))))
    chosen = Files(files.warm[:kept], files.train, files.test)
    seconds = forecast(args, chosen, language, speed)
    rows = [[name, f"{value / 60:.1f}"] for name, value in seconds.items()]
    write_out(f"{speed}\n{text_table(['stage', 'minutes, forecast'], rows)}\n")
    total = sum(seconds.values()) / 60
    write_out(f"warm-up: {kept} of {len(files.warm)} reports; X-rays: {args.epochs} epochs; ")
    write_out(f"together {total:.0f} minutes\n")
    return chosen


def train(args: Namespace, out: Path, **changed: Any) -> Path:
    """Train one stage, or resume it, and return its folder."""
    from llava.train.run import run_sft

    values = {
        "version": "auto",
        "image_aspect_ratio": "pad",
        "mm_projector_type": "mlp2x_gelu",
        "model_max_length": 1024,
        "warmup_ratio": 0.05,
        "lr_scheduler_type": "cosine",
        "logging_steps": 5,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "report_to": "none",
        "seed": 0,
        "bf16": args.bf16,
        "output_dir": out,
        **changed,
    }
    run_sft([word for name, value in values.items() for word in (f"--{name}", str(value))])
    return out


def asked(model: Path, images: Sequence[Path]) -> list[str]:
    """Return what `llava findings` writes about images."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        words = ["--model", str(model), "--json", "--max-new-tokens", str(MAX_NEW_TOKENS)]
        findings.main([*map(str, images), *words])
    return [json.loads(line)["findings"] for line in shown.getvalue().splitlines()]


def nearest(model: Path, folder: Path, rows: Files) -> list[str]:
    """Return for each test X-ray the text of the training X-ray with the most similar features of the tower."""
    import torch

    from llava.generation.loading import open_engine

    engine = open_engine(str(model))
    sides = []
    for part in (rows.train, rows.test):
        pixels = [engine.processor.preprocess(engine.processor.open(row["image"], folder)) for row in part]
        with torch.no_grad():
            features = [engine.model.tower_features(one[None]).float().mean(dim=1)[0] for one in pixels]
        sides.append(torch.nn.functional.normalize(torch.stack(features), dim=1))
    best = (sides[1] @ sides[0].T).argmax(dim=1).tolist()
    return [rows.train[number]["conversations"][1]["value"] for number in best]


def predictions(args: Namespace, model: Path, rows: Files) -> dict[str, Path]:
    """Write the predictions of the model and of the baselines, and return their files."""
    from PIL import Image

    folder = args.data_root / "cxr-notes" / "images"
    blank = args.out / "blank.png"
    Image.new("RGB", (BLANK_SIZE, BLANK_SIZE), GRAY).save(blank)
    sentence = commonest_sentence([row["conversations"][1]["value"] for row in rows.train])
    *texts, gray = asked(model, [*(folder / row["image"] for row in rows.test), blank])
    count = len(rows.test)
    systems = dict(zip(SYSTEMS, (texts, [gray] * count, [sentence] * count, nearest(model, folder, rows)), strict=True))
    files = {}
    for name, found in systems.items():
        files[name] = args.out / f"{name}.jsonl"
        write_records(
            files[name],
            [
                {
                    "id": row["id"],
                    "image": row["image"],
                    "reference": row["conversations"][1]["value"],
                    "prediction": text,
                }
                for row, text in zip(rows.test, found, strict=True)
            ],
        )
    return files


def scored(args: Namespace, files: dict[str, Path]) -> str:
    """Score and compare all systems; return the table of figures with intervals by patient."""
    images = args.data_root / "cxr-notes" / "images"
    table = []
    for name, file in files.items():
        place = args.out / "scores" / name
        with contextlib.redirect_stdout(io.StringIO()):
            score_main([str(file), "--output-dir", str(place), "--run-name", name, "--image-folder", str(images)])
        metrics = json.loads((place / "metrics.json").read_text())["metrics"]
        table.append([name, *(_cell(metrics.get(figure)) for figure in SHOWN)])
    for name in SYSTEMS[1:]:
        with contextlib.redirect_stdout(io.StringIO()):
            compare_main([str(files["model"]), str(files[name]), "--out", str(args.out / "compare" / name)])
        found = json.loads((args.out / "compare" / name / "compare.json").read_text())["differences"]
        table.append([f"model minus {name}", *(_cell(found.get(figure), signed=True) for figure in SHOWN)])
    lines = ["| system | " + " | ".join(SHOWN) + " |", "| --- |" + " --- |" * len(SHOWN)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in table)]) + "\n"


def _cell(facts: Row | None, *, signed: bool = False) -> str:
    if facts is None:
        return "-"
    clustered = facts.get("clustered") or facts
    form = "+.3f" if signed else ".3f"
    return f"{facts['value']:{form}} [{clustered['ci_l']:{form}}, {clustered['ci_h']:{form}}]"


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages."""
    parser = Parser(prog="findings_small.sh", description="Small real run of findings with its baselines.")
    parser.add_argument("--data-root", type=Path, required=True, help="folder of cxr-notes")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--lm", help="language model; default: SmolLM2-135M from a package")
    parser.add_argument("--vision-tower", help="vision tower; default: DINOv2-Small from a package")
    parser.add_argument("--minutes", type=float, default=60.0, help="limit of the forecast; shortens the warm-up")
    parser.add_argument("--epochs", type=int, default=8, help="epochs on the X-rays")
    parser.add_argument("--warm-rows", type=int, help="use only the first N reports of the warm-up")
    parser.add_argument("--test-rows", type=int, help="use only the first N test X-rays")
    parser.add_argument("--bf16", default="auto", help="precision of the training, as of llava train")
    args = parser.parse_args(argv)
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    notes = args.data_root / "cxr-notes"
    test = xray_rows(notes / "test.json")[: args.test_rows]
    rows = planned(args, Files(list(packaged_reports())[: args.warm_rows], xray_rows(notes / "train.json"), test))
    for name in ("warm", "train", "test"):
        write_json(args.out / f"{name}.json", getattr(rows, name))
    from llava.model.packaged import pretrained

    lm = args.lm or str(pretrained.language_model())
    tower = args.vision_tower or str(pretrained.vision_tower(IMAGE_SIZE))
    warm = train(
        args, args.out / "warm", model_name_or_path=lm, vision_tower=tower, data_path=args.out / "warm.json",
        num_train_epochs=1, per_device_train_batch_size=16, learning_rate=1e-4,
    )  # fmt: skip
    model = train(
        args, args.out / "model", model_name_or_path=warm, data_path=args.out / "train.json",
        image_folder=notes / "images", feature_cache_dir=args.out / "features", num_train_epochs=args.epochs,
        per_device_train_batch_size=8, learning_rate=1e-4, mm_projector_lr=1e-3,
    )  # fmt: skip
    text = scored(args, predictions(args, model, rows))
    write_atomic(args.out / "table.md", text)
    write_out(f"\n{len(rows.test)} test X-rays, intervals by patient\n{text}")
    write_out(f"pages: {args.out}/scores/*/report.html; {(time.monotonic() - start) / 60:.1f} minutes in all\n")


if __name__ == "__main__":
    run_program(main)
