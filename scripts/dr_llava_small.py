"""Fine-tuning against reinforcement learning on a rule set, from small parts, with controls.

    data --align--> --dialogues in standard order, LoRA, merged--> sft --an arm, equal wall time--> more_sft, grpo, ppo,
    shuffled --llava eval --rules, all orders, gray image, paired with sft--> results.md, curves.png

bash scripts/dr_llava_small.sh [--data drawn|bccd|cells] [--seed N]
"""

from __future__ import annotations

import json
import random
import shutil
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from llava.data.cells import main as write_cells
from llava.errors import ConfigError
from llava.eval.rules.report import estimate_text
from llava.eval.run import main as evaluate
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_model
from llava.model.packaged import pretrained
from llava.quickstart import machine
from llava.quickstart.forecast import ANSWER, TUNE, Costs, fitted_seconds
from llava.quickstart.stages import training_dtype
from llava.quickstart.synthetic import write_dataset
from llava.quickstart.work import CHARACTERS_PER_TOKEN, TEMPLATE_TOKENS, language_shape, tower_shape
from llava.symbolic.dialogues import main as write_dialogues
from llava.symbolic.rules import load_rules
from llava.train.rollout.records import curve_of, draw_panels
from llava.train.run import run_sft
from llava.utils.cli import Parser, run_program
from llava.utils.json_rows import read_records
from llava.utils.jsonl import read_object, write_atomic, write_json
from llava.utils.reporting import text_table
from llava.utils.terminal import write_out

RULES = {"drawn": "drawn-smears", "bccd": "smear-differential", "cells": "red-cell-morphology"}
ARMS = ("sft", "more_sft", "grpo", "ppo", "shuffled")
TEMPLATE = "chatml"
"""Template whose end mark is a token of the packaged language model, so that its dialogues can be continued."""

ANSWER_TOKENS = 24
"""Longest answer; the wordings of the shipped rule sets are shorter."""

ROW_TOKENS = 2048
"""Tokens of a forward pass: the activations of the packaged language model then fit a laptop."""

CONVERSATIONS = 6
"""Conversations about a test image: four orders; with the gray one about half as many differ."""

DRAWN = 600
"""Drawn training images, unless `--num-train` is given."""

EPOCHS = 8
"""Most epochs of the tuning, which stops earlier where the held-out loss does not fall."""

HELD_OUT = 10
"""One in this many training images is left out of the tuning, to see when its loss stops falling."""

PROBED = 3
"""Steps that are timed before an arm, to find how many fit its minutes."""

LORA = {"lora_enable": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
FIGURES = ("A_Q", "A_C", "A_D", "contradictory")
CURVES = ("reward", "A_Q", "A_C", "no_match")
"""Metrics of the rollouts that are plotted."""


def make_parser() -> Parser:
    """Return the parser of the script."""
    parser = Parser(prog="dr_llava_small.sh", description=__doc__)
    parser.add_argument("--data", choices=list(RULES), default="drawn", help="images and their rule set")
    parser.add_argument("--data-root", type=Path, help="folder of blood-bccd/ and blood-rbc12/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", default="sft,grpo,shuffled", help=f"arms, with commas: {', '.join(ARMS)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of training of each arm")
    parser.add_argument("--out", type=Path, default=Path("runs/dr-llava-small"))
    parser.add_argument("--num-train", type=int, help="training images; default: 600 drawn ones, or all of a real set")
    parser.add_argument("--num-test", type=int, default=400, help="test images")
    parser.add_argument("--rollout-batch-size", type=int, default=64, help="dialogues of a rollout, 8 for each image")
    parser.add_argument("--image-size", type=int, default=112, help="side of the model's input image")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="precision; auto: the faster one (measured)",
    )
    parser.add_argument("--lm", help="language model; default: the packaged one")
    parser.add_argument("--vision-tower", help="vision tower; default: the packaged one")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages that are not finished yet."""
    args = make_parser().parse_args(argv)
    named = args.arms.split(",")
    if unknown := sorted(set(named) - set(ARMS)):
        raise ConfigError(f"--arms: unknown {', '.join(unknown)}; expected {', '.join(ARMS)}")
    arms = [arm for arm in ARMS if arm in named]  # the start comes first: the others are paired with it
    out = args.out / f"{args.data}-{args.seed}"
    tables = data_of(args, out)
    write_out(forecast(args, out, tables, arms))
    start = start_of(args, out, tables)
    for arm in arms:
        model = start if arm == "sft" else train_arm(args, out, arm, start, tables)
        score(args, out, arm, model, tables)
    table = results_of(out, arms)
    write_atomic(out / "results.md", table)
    write_out(f"{table}\n{out / 'results.md'}\n")
    draw_arms(out, arms)


def data_of(args: Namespace, out: Path) -> dict[str, Path]:
    """Return the tables of training and test, the images, and captions where there are some."""
    if args.data == "drawn":
        folder = out / "data"
        if not (folder / "test.json").is_file():
            write_dataset(folder, num_train=args.num_train or DRAWN, num_test=args.num_test, seed=args.seed)
        return {"train": folder / "smears-train.json", "test": folder / "smears-test.json", "images": folder / "images",
                "captions": folder / "captions.json"}  # fmt: skip
    if args.data_root is None:
        raise ConfigError(f"--data {args.data} needs --data-root, the folder of blood-bccd/ and blood-rbc12/")
    if args.data == "bccd":
        folder = args.data_root / "blood-bccd"
        return {"train": first_rows(args, out, folder), "test": folder / "test.json", "images": folder / "images"}
    source, folder = args.data_root / "blood-rbc12", out / "cells"
    if not (folder / "test.json").is_file():
        words = [source / "train.json", "--image-folder", source / "images", "--out", folder]
        write_cells([*map(str, words), "--fractions", "train=0.8,test=0.2"])
    return {"train": first_rows(args, out, folder), "test": folder / "test.json", "images": folder / "images"}


def first_rows(args: Namespace, out: Path, folder: Path) -> Path:
    """Return the training table of a real set, or a table of the first `--num-train` rows of a seeded order."""
    rows = list(read_records(folder / "train.json"))
    if args.num_train is None or args.num_train >= len(rows):
        return folder / "train.json"
    path = out / "train.json"
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, random.Random(args.seed).sample(rows, args.num_train))
    return path


def forecast(args: Namespace, out: Path, tables: dict[str, Path], arms: Sequence[str]) -> str:
    """Return a table of the minutes that the stages will take, from the measured speed of matrix products.

    Raises:
        ConfigError: the sizes of the language model cannot be read.
    """
    language = language_shape(args.lm)
    tower = tower_shape(args.vision_tower, args.image_size) or tower_shape(None, args.image_size)
    if language is None or tower is None:
        raise ConfigError(f"--lm {args.lm}: its configuration cannot be read")
    speed, costs = machine.measure_machine(language.linear_layers, language.config), Costs(language, tower)
    num_turns = len(load_rules(RULES[args.data]).nodes)
    dialogues = [row["conversations"] for row in read_records(dialogues_of(args, out, tables)["tuned"])]
    texts = [turn["value"] for turns in dialogues for turn in turns]
    answers = [turn["value"] for turns in dialogues for turn in turns[1::2]]
    tokens, targets = (sum(len(text) / CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS / 2 for text in one)
                       for one in (texts, answers))  # fmt: skip
    tune = costs.trained(EPOCHS * len(dialogues), EPOCHS * tokens, EPOCHS * targets)
    num_tested = min(args.num_test, len(list(read_records(tables["test"]))))
    asked = num_tested * CONVERSATIONS
    read = costs.prompts(asked, asked * tokens / len(dialogues))
    written = costs.decoded(asked * num_turns * ANSWER_TOKENS / 2)
    trained = [arm for arm in arms if arm != "sft"]
    minutes = {
        f"start (tuning, at most {EPOCHS} epochs)": fitted_seconds(tune, speed, TUNE) / 60,
        f"training of {len(trained)} arms": args.minutes * len(trained),
        f"evaluation of {len(arms)} arms": fitted_seconds(read + written, speed, ANSWER) / 60 * len(arms),
    }
    rows = [[name, f"{value:.1f}"] for name, value in minutes.items()]
    note = "alignment of drawn images and the timed steps of the arms come on top"
    return f"{speed}\n{text_table(['stage', 'minutes, forecast'], rows)}\n{note}\n"


def precision_of(args: Namespace) -> str:
    """Return the precision of all trainings and evaluations of a folder, which is measured once."""
    path = args.out / f"{args.data}-{args.seed}" / "precision.json"
    if not path.is_file():
        measured = training_dtype(args.lm or str(pretrained.language_model())) if args.dtype == "auto" else args.dtype
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"precision": measured})
    return str(read_object(path)["precision"])


def train(args: Namespace, folder: Path, **options: object) -> float:
    """Train into a folder, or continue; return the seconds of all of it."""
    values: dict[str, object] = {
        "output_dir": folder,
        "seed": args.seed,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 20,
        "save_total_limit": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_tokens_per_row": ROW_TOKENS,
        "bf16": precision_of(args) == "bfloat16",
        **options,
    }
    run_sft([word for name, value in values.items() for word in (f"--{name}", str(value))])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float(lines[-1]["train_runtime"])


def start_of(args: Namespace, out: Path, tables: dict[str, Path]) -> Path:
    """Return the model that every arm starts from: aligned, tuned on dialogues in standard order, merged."""
    merged = out / "sft"
    if (merged / "config.json").is_file():
        return merged
    lm = args.lm or str(pretrained.language_model())
    tower = args.vision_tower or str(pretrained.vision_tower(args.image_size))
    parts = {"model_name_or_path": lm, "vision_tower": tower, "mm_projector_type": "mlp2x_gelu",
             "image_folder": tables["images"], "image_aspect_ratio": "pad"}  # fmt: skip
    if "captions" in tables:
        train(args, out / "align", **parts, data_path=tables["captions"], version="plain", tune_mm_mlp_adapter=True,
              calibrate_mm_projector=True, num_train_epochs=1, per_device_train_batch_size=16,
              learning_rate=1e-3)  # fmt: skip
        parts |= {"pretrain_mm_mlp_adapter": out / "align" / "mm_projector.bin"}
    else:
        parts |= {"calibrate_mm_projector": True}
    paths = dialogues_of(args, out, tables)
    train(args, out / "tune", **parts, **LORA, data_path=paths["tuned"], eval_data_path=paths["held-out"],
          version=TEMPLATE, num_train_epochs=EPOCHS, per_device_train_batch_size=16, learning_rate=1e-3,
          mm_projector_lr=1e-3, eval_strategy="steps", eval_steps=20, eval_answers=0, early_stopping_patience=2,
          lr_scheduler_type="constant_with_warmup", warmup_steps=5)  # fmt: skip
    return merge(out / "tune", merged)


def merge(adapter: Path, merged: Path) -> Path:
    """Write the model with its adapter merged."""
    loaded = load_checkpoint(adapter, dtype=torch.float32)
    save_model(loaded.model, loaded.processor, merged, origin=loaded.origin)
    return merged


def dialogues_of(args: Namespace, out: Path, tables: dict[str, Path]) -> dict[str, Path]:
    """Return the dialogues in standard order about all training images, those tuned on, and those held out."""
    paths = {part: out / f"dialogues-{part}.json" for part in ("all", "tuned", "held-out")}
    if not all(path.is_file() for path in paths.values()):
        words = [RULES[args.data], "--table", tables["train"], "--out", paths["all"], "--style", "standard"]
        write_dialogues([*map(str, words), "--seed", str(args.seed)])
        rows = list(read_records(paths["all"]))
        held_out = set(sorted({str(row["image"]) for row in rows})[::HELD_OUT])
        for part in ("held-out", "tuned"):
            write_json(paths[part], [row for row in rows if (row["image"] in held_out) == (part == "held-out")])
    return paths


def train_arm(args: Namespace, out: Path, arm: str, start: Path, tables: dict[str, Path]) -> Path:
    """Train an arm for its minutes and return its merged model."""
    merged = out / arm
    if (merged / "config.json").is_file():
        return merged
    common: dict[str, object] = {"model_name_or_path": start, "image_folder": tables["images"], **LORA}
    if arm == "more_sft":
        common |= {
            "data_path": dialogues_of(args, out, tables)["all"],
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-4,
        }
    else:
        common |= {"objective": "ppo" if arm == "ppo" else "grpo", "rules": RULES[args.data],
                   "data_path": tables["train"], "styles": "shuffled,diagnosis_first,improvised",
                   "num_generations": 8, "rollout_batch_size": args.rollout_batch_size,
                   "rollout_per_device_batch_size": args.rollout_batch_size, "response_len": ANSWER_TOKENS,
                   "learning_rate": 1e-4, "shuffled_rewards": arm == "shuffled",
                   "ref_mode": "cached" if arm == "ppo" else "none"}  # fmt: skip
    common |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}
    train(args, out / f"{arm}-adapter", **common, max_steps=steps_for(args, out, arm, common))
    return merge(out / f"{arm}-adapter", merged)


def steps_for(args: Namespace, out: Path, arm: str, options: dict[str, object]) -> int:
    """Return the steps that fit the minutes of an arm, from timed steps, which are stored for a resumed run."""
    path = out / f"{arm}-plan.json"
    if path.is_file():
        return int(read_object(path)["steps"])
    probe = out / f"{arm}-probe"
    shutil.rmtree(probe, ignore_errors=True)
    seconds = train(args, probe, **options, max_steps=PROBED) / PROBED
    steps = max(PROBED, int(args.minutes * 60 / seconds))
    shutil.rmtree(probe)
    write_json(path, {"steps": steps, "seconds_per_step": seconds, "minutes": args.minutes})
    write_out(f"{arm}: {seconds:.1f} s a step, {steps} steps in {args.minutes:g} minutes\n")
    return steps


def score(args: Namespace, out: Path, arm: str, model: Path, tables: dict[str, Path]) -> None:
    """Evaluate an arm in all orders, paired with the start."""
    folder, first = out / f"eval-{arm}", out / "eval-sft"
    is_paired = arm != "sft" and (first / "results.json").is_file()
    known = read_object(folder / "results.json") if (folder / "results.json").is_file() else None
    if known is not None and (not is_paired or known.get("comparison")):
        return
    started = time.time()
    words = ["--model", model, "--rules", RULES[args.data], "--data", tables["test"], "--out", folder]
    words += ["--image-folder", tables["images"], "--limit", args.num_test, "--max-new-tokens", ANSWER_TOKENS]
    # Conversations with wrong hints count for no figure of the table and would take a third of the time.
    words += ["--hints", "none", "--dtype", precision_of(args)]
    if is_paired:
        words += ["--compare", first]
    evaluate(list(map(str, words)))
    write_out(f"{arm}: evaluated in {time.time() - started:.0f} s\n")


def results_of(out: Path, arms: Sequence[str]) -> str:
    """Return the table of the arms: figures of the images and, of A_C, of gray ones, and differences to the start."""
    lines = ["| arm | " + " | ".join(FIGURES) + " | A_C, gray image |", "| --- " * (len(FIGURES) + 2) + "|"]
    for arm in arms:
        report = read_object(out / f"eval-{arm}" / "results.json")
        scores = report["scores"]
        cells = [estimate_text(scores[name]["answered"]) for name in FIGURES]
        lines.append(f"| {' | '.join([arm, *cells, estimate_text(scores['A_C']['blank'])])} |")
        if comparison := report.get("comparison"):
            cells = [estimate_text(comparison["scores"][name]["difference"], signed=True) for name in FIGURES]
            lines.append(f"| {' | '.join([f'{arm} - sft, paired', *cells, ''])} |")
    return "\n".join(lines) + "\n"


def draw_arms(out: Path, arms: Sequence[str]) -> None:
    """Plot the rollouts of the arms that learn from rewards, to `curves.png`."""
    files = {arm: out / f"{arm}-adapter" / "metrics.jsonl" for arm in arms if arm not in ("sft", "more_sft")}
    rows = {arm: list(read_records(path)) for arm, path in files.items() if path.is_file()}
    panels = {name: {arm: curve_of(logged, name) for arm, logged in rows.items()} for name in CURVES}
    if rows:
        draw_panels(panels, out / "curves.png", num_columns=len(CURVES))


if __name__ == "__main__":
    run_program(main)
