"""Settings of a quickstart and their command-line options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llava.errors import ConfigError, DataError
from llava.utils.cli import Parser
from llava.utils.jsonl import read_object

SETTINGS = "settings.json"
"""File in the run's folder with its settings."""

FEWEST_TEST_DRAWINGS = 50
"""Smallest number of test drawings; with fewer the intervals are too wide."""

AUTO, GIVEN = "auto", "given"
"""Names of the size before it is fitted to the machine, and of a user's own number of rows."""

SIZED = ("size", "num_train", "captions_per_step", "questions_per_step")
"""Settings that a size sets."""


@dataclass(frozen=True, slots=True)
class QuickstartSettings:
    """Settings that decide the result; the folder `out` stores them.

    Attributes:
        out: folder of the run.
        data: folder in LLaVA format (`train.json`, `test.json`, `images/`, optionally `captions.json`); None draws one.
        lm: path or hub name of a causal language model; None takes SmolLM2-135M from its package.
        vision_tower: path or hub name of a vision encoder; None takes DINOv2-Small from its package.
        seed: seed of drawings, initial weights, row order and resampling.
        num_train: drawings to train on.
        num_test: drawings to test on.
        epochs: passes over the questions.
        image_size: side of an image in pixels, for the built-in tower only; `(image_size / 14) ** 2` tokens.
        template: conversation template.
        size: name of the size that sets `SIZED`, or `AUTO` or `GIVEN`.
        captions_per_step: captions per optimizer step of the alignment.
        questions_per_step: questions per optimizer step of the tuning.
        num_before: number of questions asked before training, for comparison only.
    """

    out: Path
    data: Path | None = None
    lm: str | None = None
    vision_tower: str | None = None
    seed: int = 0
    num_train: int = 480
    num_test: int = 64
    epochs: float = 1.0
    image_size: int = 112
    template: str = "chatml"
    size: str = GIVEN
    captions_per_step: int = 8
    questions_per_step: int = 48
    num_before: int = 64

    def to_json(self) -> dict[str, Any]:
        """Return the fields that decide the result, as JSON."""
        fields = asdict(self)
        fields.pop("out")
        return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}

    def check(self) -> None:
        """Check the numbers and the data folder.

        Raises:
            ConfigError: a number is out of range.
            DataError: the data folder lacks a file.
        """
        if self.data is None and (self.num_train < 1 or self.num_test < FEWEST_TEST_DRAWINGS):
            raise ConfigError(
                f"expected --num-train of at least 1 and --num-test of at least {FEWEST_TEST_DRAWINGS}, "
                f"got {self.num_train} and {self.num_test}"
            )
        if self.epochs <= 0:
            raise ConfigError(f"--epochs must be above 0, got {self.epochs}")
        if self.data is not None:
            missing = [name for name in ("train.json", "test.json", "images") if not (self.data / name).exists()]
            if missing:
                raise DataError(
                    f"{self.data} has no {', '.join(missing)}; expected a folder in LLaVA format with train.json, "
                    f"test.json and images/ (captions.json is optional)"
                )


def stored_settings(out: Path) -> dict[str, Any] | None:
    """Return the settings of the run in a folder; None without a run or if another program wrote the file."""
    try:
        found = read_object(out / SETTINGS)
    except DataError:
        return None
    known = {field.name: getattr(QuickstartSettings(out), field.name) for field in fields(QuickstartSettings)}
    if not {"seed", "num_train", "num_test"} <= found.keys() <= known.keys():
        return None
    is_ours = all(isinstance(found[name], type(known[name])) for name in SIZED if name in found)
    return found if is_ours else None


def make_parser() -> Parser:
    """Return the parser of `llava quickstart`."""
    default = QuickstartSettings(Path("runs/quickstart"))
    parser = Parser(
        prog="llava quickstart",
        description="Draw a SYNTHETIC blood-smear set (or take --data), align, tune with LoRA, evaluate before and "
        "after with the blank-image control, and write a page. An interrupted run resumes after its last stage.",
    )
    parser.add_argument("--out", type=Path, default=default.out, help="folder of the run")
    parser.add_argument("--data", type=Path, help="folder in LLaVA format; default: draw one")
    parser.add_argument("--lm", help="path or hub name of a causal language model; default: SmolLM2-135M")
    parser.add_argument("--vision-tower", help="path or hub name of a vision encoder; default: DINOv2-Small")
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="seed of drawings, weights, row order and resampling"
    )
    parser.add_argument("--num-train", type=int, help="drawings to train on; default: a number that fits the machine")
    parser.add_argument("--num-test", type=int, default=default.num_test, help="unseen drawings to test on")
    parser.add_argument("--epochs", type=float, default=default.epochs, help="passes over the questions")
    parser.add_argument(
        "--image-size", type=int, default=default.image_size, help="side of an image in pixels, for the built-in tower"
    )
    parser.add_argument("--template", default=default.template, help="conversation template")
    parser.add_switch("--restart", help="delete the run in --out and start from the beginning")
    return parser


def parse_settings(argv: Sequence[str] | None) -> tuple[QuickstartSettings, bool]:
    """Return the checked settings, whose size may be `AUTO`, and whether to restart."""
    fields = vars(make_parser().parse_args(argv))
    restart = bool(fields.pop("restart"))
    if fields["num_train"] is None:
        del fields["num_train"]
        fields["size"] = AUTO if fields["data"] is None else GIVEN
    settings = QuickstartSettings(**fields)
    if settings.out.is_file():
        raise ConfigError(f"--out {settings.out} is a file; expected a folder")
    settings.check()
    return settings, restart
