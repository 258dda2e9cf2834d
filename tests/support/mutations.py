"""Mutations of the code: each changes one place of a copy of the project, and the tests beside it must notice.

    python -m tests.support.mutations [--only NAME ...] [--from N] [--to N]

    project --copy--> temporary folder --substitute--> mutant --narrow tests--> killed, or survived

Not part of the default tests: sixty runs take about half an hour. Exit status 1 if a mutant survives.
"""

# ruff: noqa: E501 - one mutation a line

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("llava", "tests", "benchmarks", "docs", "pyproject.toml", "README.md")
TIME_LIMIT = 600


@dataclass(frozen=True, slots=True)
class Mutation:
    """Change of one place: file, text, its replacement, and the test files that should notice."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def of(file: str, old: str, new: str, *tests: str) -> Mutation:
    """Return a mutation; paths are relative to `llava/` and `tests/`."""
    return Mutation(f"llava/{file}", old, new, tuple(f"tests/{test}" for test in tests))


MUTATIONS: tuple[Mutation, ...] = (
    # eval/: verdicts, intervals, scores
    of("eval/medvqa/controls.py", 'if estimate["low"] > 0 else', 'if estimate["value"] > 0 else', "eval/medvqa/test_controls.py"),
    of("eval/medvqa/controls.py", "Draws([item.cluster for item in part]", "Draws([item.question_id for item in part]", "eval/medvqa/test_controls.py"),
    of("eval/medvqa/controls.py", "counter.most_common(1)[0][0]", "counter.most_common()[-1][0]", "eval/medvqa/test_controls.py"),
    of("eval/intervals.py", "self._means(score) - self._means(other)", "self._means(score)", "eval/test_intervals.py"),
    of("eval/intervals.py", "where=sizes > 0", "where=sizes >= 0", "eval/test_intervals.py"),
    of("eval/intervals.py", "100.0 * sums", "1.0 * sums", "eval/test_intervals.py"),
    of("eval/intervals.py", "self.members & asked", "self.members", "eval/test_intervals.py"),
    of("eval/medvqa/metrics.py", "shares[best] == 0.0 and", "shares[best] == 0.0 or", "eval/medvqa/test_metrics.py"),
    of("eval/medvqa/metrics.py", "first_decision(item.prediction) is None", "first_decision(item.prediction) is not None", "eval/medvqa/test_strict.py", "eval/medvqa/test_metrics.py"),
    of("eval/questions.py", "missing or extra", "missing", "eval/test_questions.py"),
    of("eval/questions.py", "if count > 1]", "if count > 2]", "eval/test_questions.py"),
    # train/: what decides a resume, counts, groups
    of("train/checkpointing.py", '"global_batch", "seed", "image_grouping"', '"global_batch", "image_grouping"', "train/test_resume_guards.py"),
    of("train/trainer.py", "return total.clamp(min=1.0)", "return total", "train/test_loss_normalization.py"),
    of("train/trainer.py", "output.loss * self.args.world_size", "output.loss", "distributed/test_ranks.py"),
    of("train/trainer.py", "largest) // 2", "largest)", "train/test_out_of_memory.py"),
    of("train/trainer.py", "parameter.grad is None:\n                parameter.grad = torch.zeros_like(parameter)", "parameter.grad is None:\n                pass", "train/test_parts.py", "train/test_runs.py"),
    of("train/optimizer.py", 'not getattr(parameter, "is_marker_table", False)', "True", "train/test_parts.py"),
    of("train/optimizer.py", "if not parameter.requires_grad:\n            continue", "if not parameter.requires_grad:\n            pass", "train/test_parts.py"),
    of("train/callbacks.py", 'row["step"] <= done and SUMMARY_KEY not in row', 'row["step"] < done and SUMMARY_KEY not in row', "train/test_resume.py"),
    of("train/validation.py", "sums[0] / sums[1].clamp(min=1.0)", "sums[0]", "train/test_validation.py"),
    of("train/objectives/sft.py", "without_token(target_logits(model, batch), self.without)", "target_logits(model, batch)", "train/test_loss_normalization.py"),
    of("train/data.py", "if not Path(path).is_file():\n        raise ConfigError", "if not Path(path).exists():\n        raise ConfigError", "train/test_model.py"),
    of("train/args.py", "not Path(self.system_file).is_file()", "not Path(self.system_file).exists()", "train/test_arguments.py"),
    # data/: rows, samplers, trees, look-alikes
    of("data/records.py", "        if not path.is_file():\n            raise DataError(f\"image", "        if not path.exists():\n            raise DataError(f\"image", "data/test_records.py"),
    of("data/flat_batch.py", "together > max_tokens_per_row", "together >= max_tokens_per_row", "data/test_flat_batch.py"),
    of("data/flat_batch.py", "_row_size(group, layout) <= limit", "_row_size(group, layout) < limit", "data/test_flat_batch.py"),
    of("data/check/near_duplicates.py", "MIN_CORRELATION = 0.99", "MIN_CORRELATION = 0.90", "data/check/test_near_duplicates.py"),
    of("data/check/near_duplicates.py", "MIN_SMALL_CORRELATION = 0.97", "MIN_SMALL_CORRELATION = 0.9999", "data/check/test_near_duplicates.py"),
    of("data/encode.py", "draft.in_block[t] or seen <= budget", "draft.in_block[t] or seen < budget", "data/test_encode.py"),
    of("data/encode.py", "stop - start - 1 for start, stop", "stop - start for start, stop", "data/test_encode.py"),
    of("data/encode.py", "draft.trained[0] = False", "pass", "data/test_encode.py", "data/test_flat_batch.py"),
    of("data/encode.py", "if budget < 1:", "if budget < 0:", "data/test_encode.py"),
    of("data/encode.py", "num_cut=len(draft.ids) - len(keep)", "num_cut=0", "data/test_encode.py"),
    of("data/samplers.py", "if number >= self.start_step:", "if number > self.start_step:", "data/test_samplers.py"),
    of("data/samplers.py", "rank * small + min(rank, extra)", "rank * small", "data/test_samplers.py"),
    of("data/samplers.py", "steps += cut[:-1]\n            rest += cut[-1]", "steps += cut", "data/test_samplers.py"),
    of("data/samplers.py", "(-self.lengths[row], row)", "(self.lengths[row], row)", "data/test_samplers.py"),
    of("data/prefix_tree.py", "if _cost(root) <= sum(map(_cost, apart)):", "if _cost(root) >= sum(map(_cost, apart)):", "data/test_prefix_tree.py"),
    of("data/prefix_tree.py", "-1 - numbers.setdefault(key, len(numbers))", "-1", "data/test_prefix_tree.py"),
    of("data/collator.py", "_weighing(rows, 1 / len(parts))", "_weighing(rows, 1.0)", "train/test_loss_normalization.py", "data/test_collator.py"),
    of("data/collator.py", "torch.zeros_like(row.edge_weight)", "row.edge_weight", "data/test_collator.py", "distributed/test_ranks.py"),
    # generation/: limits, drawing, beams, stopping
    of("generation/prompt_encoder.py", "self._check_length(encoded, self.max_tokens - 1)", "self._check_length(encoded, self.max_tokens)", "generation/test_engine.py"),
    of("generation/sampling.py", "(before < wanted) | is_whole", "(before <= wanted) | is_whole", "generation/test_sampling.py"),
    of("generation/sampling.py", "ranks < limits", "ranks <= limits", "generation/test_sampling.py"),
    of("generation/sampling.py", "index = torch.minimum(index, last)", "pass", "generation/test_sampling.py"),
    of("generation/sampling.py", 'f"{root}/{sample_index}"', 'f"{root}"', "generation/test_sampling.py", "generation/test_engine.py"),
    of("generation/beam_search.py", "max(2, 1 + num_end_tokens) * num_beams", "num_beams", "generation/test_beam_search.py"),
    of("generation/beam_search.py", "values * penalty, values / penalty", "values / penalty, values * penalty", "generation/test_beam_search.py"),
    of("generation/beam_search.py", "elif rank < self.num_beams and could_improve:", "elif could_improve:", "generation/test_beam_search.py"),
    of("generation/stopping.py", "len(text) - len(stop) + 1", "len(text) - len(stop) + 2", "generation/test_stopping.py"),
    of("generation/stopping.py", "whole = text.rstrip(BROKEN)", "whole = text", "generation/test_stopping.py", "generation/test_growing_text.py"),
    of("generation/slot_memory.py", "wanted = min(request.sampling.max_new_tokens, room)", "wanted = request.sampling.max_new_tokens", "generation/test_scheduler.py", "generation/test_engine.py"),
    # model/: adapters, projectors, tiles, frozen parts
    of("model/checkpoint/legacy/lora_files.py", "float(alpha / r**0.5) if", "float(alpha / r) if", "parity/test_peft.py"),
    of("model/lora.py", "parameter.requires_grad_(train_tower and not projector_only)", "parameter.requires_grad_(train_tower)", "model/test_lora.py"),
    of("model/lora.py", ' or last == "lm_head":', ":", "model/test_lora.py", "parity/test_peft.py"),
    of("model/multimodal_projector.py", "dtype=torch.float32)[..., None] + 1)", "dtype=torch.float32)[..., None])", "model/test_cluster_projector.py"),
    of("model/projector_types.py", 'r"mlp([1-9][0-9]?)x_gelu"', 'r"mlp([0-9][0-9]?)x_gelu"', "model/test_multimodal_projector.py"),
    of("model/anyres.py", ".transpose(1, 2).flatten(2, 3)", ".flatten(2, 3)", "model/test_anyres.py"),
    of("model/anyres.py", "whole = whole[top:bottom, left:right]", "whole = whole[top:bottom]", "model/test_anyres.py"),
    of("model/precision.py", "return min(times[1:])", "return max(times)", "model/test_precision.py"),
    # imaging/: gray levels, tiles, padding
    of("imaging/grayscale.py", "values > center - 0.5", "values >= center - 0.5", "imaging/test_grayscale.py"),
    of("imaging/grayscale.py", "and width < 1 else", "and width <= 1 else", "imaging/test_grayscale.py"),
    of("imaging/grayscale.py", "255 - levels if inverted", "levels if inverted", "imaging/test_grayscale.py"),
    of("imaging/grayscale.py", "np.floor(values) - self.first", "np.rint(values) - self.first", "imaging/test_grayscale.py"),
    of("imaging/geometry.py", "int(value * 255) for value", "round(value * 255) for value", "imaging/test_geometry.py"),
    of("imaging/geometry.py", "(side - width) // 2 + shift", "-((width - side) // 2) + shift", "imaging/test_geometry.py"),
    of("imaging/geometry.py", "image.height > side > image.width", "image.width > side > image.height", "imaging/test_image_processor.py", "imaging/test_anyres.py", "parity/test_fidelity.py"),
    of("imaging/anyres.py", "return shown, -(choice[0] * choice[1] - shown)", "return shown, choice[0] * choice[1] - shown", "imaging/test_anyres.py"),
    of("imaging/anyres.py", "(right - left + 1) * (bottom - top)", "(right - left) * (bottom - top)", "imaging/test_anyres.py", "model/test_anyres.py"),
    of("imaging/anyres.py", "edge = max(1, int(", "edge = max(0, int(", "imaging/test_anyres.py"),
)  # fmt: skip
"""Mutations; the first of each group survived once."""


def survives(mutation: Mutation, folder: Path) -> tuple[bool, str]:
    """Return whether the tests pass on a mutated copy of the project in `folder`, and the last line of the tests."""
    target = folder / mutation.file
    original = target.read_text(encoding="utf-8")
    if original.count(mutation.old) != 1:
        raise SystemExit(
            f"{mutation.file}: {mutation.old!r} occurs {original.count(mutation.old)} times, expected once"
        )
    target.write_text(original.replace(mutation.old, mutation.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutation.tests]
    try:
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"no end within {TIME_LIMIT} s"
    finally:
        target.write_text(original, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutation.file}: the tests did not run: {done.stdout[-800:]}{done.stderr[-800:]}")
    return done.returncode == 0, (done.stdout.strip().splitlines() or [""])[-1]


def copy_project(folder: Path) -> None:
    """Copy the code and tests of the project."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tests of mutants; print one line each and the number of survivors."""
    parser = argparse.ArgumentParser(description="Run narrow tests on mutated copies of the code.")
    parser.add_argument("--only", nargs="*", default=[], help="parts of file names")
    parser.add_argument("--from", dest="first", type=int, default=1, help="number of the first mutation")
    parser.add_argument("--to", dest="last", type=int, default=len(MUTATIONS), help="number of the last mutation")
    args = parser.parse_args(argv)
    num_survived = 0
    with tempfile.TemporaryDirectory() as scratch:
        copy_project(Path(scratch))
        for number, mutation in enumerate(MUTATIONS, 1):
            if not args.first <= number <= args.last or not any(part in mutation.file for part in args.only or [""]):
                continue
            start = time.perf_counter()
            survived, last = survives(mutation, Path(scratch))
            num_survived += survived
            sys.stdout.write(
                f"{number:3} {'SURVIVED' if survived else 'killed  '} {mutation.file}: "
                f"{mutation.old.splitlines()[0][:60]} -> {mutation.new.strip().splitlines()[-1][:50]} "
                f"({time.perf_counter() - start:.0f} s; {last})\n"
            )
            sys.stdout.flush()
    sys.stdout.write(f"{num_survived} survived\n")
    sys.exit(int(bool(num_survived)))


if __name__ == "__main__":
    main()
