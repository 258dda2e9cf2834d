"""File of log-probabilities for `--ref-logprobs`, computed by a model before training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

from torch import nn

from llava.data.preference import sequence_key
from llava.errors import ConfigError
from llava.train import data
from llava.train.model import open_model
from llava.train.parsed import Parsed
from llava.train.ranks import checked_together
from llava.train.reference_cache import ReferenceScorer, cached_logprobs, reference_line, unit_of, unit_places
from llava.train.run import layout_of, make_collator, num_epochs
from llava.utils.files import refuse_overwriting
from llava.utils.jsonl import write_records
from llava.utils.terminal import write_out


def score(parsed: Parsed, out: Path) -> None:
    """Write the log-probability of each side of the pairs under the model that training would start from.

    Args:
        parsed: arguments of the training.
        out: file to write: JSON lines.

    Raises:
        LlavaError: the model or a pair cannot be used, or a value is not finite.
    """
    args = parsed.training
    if (spec := parsed.preference.spec()) is not None and spec.is_kto:
        raise ConfigError("--pref-loss kto: its mismatched answers change with the step, so no file can hold them")
    refuse_overwriting([parsed.data.data_path], {"out": out})
    loaded = open_model(parsed.model_spec())
    dataset = data.open_rows(parsed.training_rows(), loaded.processor)
    collator = make_collator(dataset, loaded, layout_of(loaded, args), args)
    scorer = ReferenceScorer.of(loaded.model, precision=parsed.provenance_spec().precision, device=args.device)
    cast(nn.Module, loaded.model).to(args.device)
    parts = out.with_name(f"{out.name}.parts")
    size = args.per_device_train_batch_size
    epochs = num_epochs(args, len(dataset))
    where: dict[str, Any] = {"folder": parts, "batch_size": size, "epochs": epochs, **args.ranks}
    values = cached_logprobs(loaded.model, collator, scorer, **where)

    def write() -> None:
        places = unit_places(collator, epochs)
        keys = dict.fromkeys(sequence_key(s) for row, epoch in places for s in unit_of(collator, row, epoch))
        write_records(out, (reference_line(key, values[key], scorer) for key in keys))
        shutil.rmtree(parts)
        write_out(f"{len(keys)} log-probabilities of {len(dataset)} pairs -> {out}\n")

    checked_together(write, here=args.should_save)
