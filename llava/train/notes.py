"""Notes printed before and after a run: the template and whether it fits, and where the model is."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from llava.processing import LlavaMedProcessor
from llava.tokenization import token_id
from llava.train.next_commands import next_commands
from llava.train.run_page import PAGE_FILE
from llava.train.trainer import LlavaTrainer

logger = logging.getLogger(__name__)

_SPECIAL = re.compile(r"<\S+>")
"""Text that looks like a special token."""


def log_template(processor: LlavaMedProcessor) -> None:
    """Log the template of a run, and warn where it does not fit the tokenizer."""
    name = processor.template.name
    logger.info("template %s; an answer ends with %s", name, " or ".join(map(repr, processor.template.stops)))
    if absent := absent_marks(processor):
        logger.warning(
            "--version %s ends an answer with %s, which is not a token of this tokenizer, so the model learns it as "
            "text; use --version auto, or the template that the language model was trained with",
            name,
            ", ".join(absent),
        )
    elif name != "auto" and getattr(processor.tokenizer, "chat_template", None):
        logger.info("the language model has a chat template of its own; --version auto uses it")


def absent_marks(processor: LlavaMedProcessor) -> Sequence[str]:
    """Return the end marks of the template that look like tokens, but are none of this tokenizer."""
    marks = [stop.strip() for stop in processor.template.stops]
    return [mark for mark in marks if _SPECIAL.fullmatch(mark) and token_id(processor.tokenizer, mark) is None]


def log_end(trainer: LlavaTrainer) -> None:
    """Log where the model of a finished run is, its best score, and what to do next."""
    folder, state = Path(str(trainer.args.output_dir)), trainer.state
    if state.max_steps == 1:
        logger.info(
            "the run took a single optimizer step, so it has one loss and no curve; for more steps lower "
            "--per-device-train-batch-size or --gradient-accumulation-steps, or raise --num-train-epochs"
        )
    best = "" if state.best_metric is None else f", best {trainer.args.metric_for_best_model} {state.best_metric:.4g}"
    logger.info("model: %s (%d steps%s)", folder, state.global_step, best)
    if (page := folder / PAGE_FILE).is_file():
        logger.info("page: %s", page)
    if commands := next_commands(folder):
        logger.info("next:\n%s", "\n".join(commands))
